"""Scale-DiT's third stream through stock FLUX blocks: what it computes, and that nothing of it stays."""

import copy
from contextlib import nullcontext

import pytest
import torch
from diffusers import FluxPipeline

from visionfuse import exact
from visionfuse.context import ACTIVE
from visionfuse.scale_dit.guidance import Guidance, TwoStreams, drawn_to, guided
from visionfuse.testing_pipelines import flux_pipeline, flux_transformer

IMAGE, COARSE, TEXT = (8, 12), (2, 3), 5


def inputs(model, seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=generator)
    ids = torch.cartesian_prod(torch.zeros(1), *(torch.arange(n).float() for n in IMAGE))
    return {
        "hidden_states": rand(batch, IMAGE[0] * IMAGE[1], 4),
        "encoder_hidden_states": rand(batch, TEXT, 32),
        "pooled_projections": rand(batch, 32),
        "timestep": torch.full((batch,), 0.7),
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }


def guidance(seed=1, **options):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, COARSE[0] * COARSE[1], 4, generator=generator)
    return Guidance(latents=latents, coarse=COARSE, image=IMAGE, **options)


@torch.no_grad()
def by_hand(model, given, small):
    """The third stream written out: three streams in every block, each with its own modulation."""
    batch = given["hidden_states"].shape[0]
    model = copy.deepcopy(model)
    model.pos_embed.theta *= 10
    n = given["hidden_states"].shape[1]
    image = model.x_embedder(given["hidden_states"])
    low = model.x_embedder(small.latents.expand(batch, -1, -1))
    text = model.context_embedder(given["encoder_hidden_states"])
    time = given["timestep"] * 1000
    temb = model.time_text_embed(time, given["pooled_projections"])
    clean = model.time_text_embed(torch.zeros_like(time), given["pooled_projections"])
    places = torch.cartesian_prod(torch.zeros(1), *(4 * torch.arange(m).float() for m in COARSE))
    rope = model.pos_embed(torch.cat([given["txt_ids"], given["img_ids"], places]))
    for block in model.transformer_blocks:
        a, gate_a, shift_a, scale_a, out_a = block.norm1(image, emb=temb)
        b, gate_b, shift_b, scale_b, out_b = block.norm1(low, emb=clean)
        c, gate_c, shift_c, scale_c, out_c = block.norm1_context(text, emb=temb)
        x, y = block.attn(torch.cat([a, b], 1), encoder_hidden_states=c, image_rotary_emb=rope)
        image, low, text = (
            image + gate_a[:, None] * x[:, :n],
            low + gate_b[:, None] * x[:, n:],
            text + gate_c[:, None] * y,
        )
        image = image + out_a[:, None] * block.ff(block.norm2(image) * (1 + scale_a[:, None]) + shift_a[:, None])  # fmt: skip
        low = low + out_b[:, None] * block.ff(block.norm2(low) * (1 + scale_b[:, None]) + shift_b[:, None])  # fmt: skip
        text = text + out_c[:, None] * block.ff_context(block.norm2_context(text) * (1 + scale_c[:, None]) + shift_c[:, None])  # fmt: skip
    joint = torch.cat([text, image], 1)
    for block in model.single_transformer_blocks:
        a, gate_a = block.norm(joint, emb=temb)
        b, gate_b = block.norm(low, emb=clean)
        both = torch.cat([a, b], 1)
        x = torch.cat(
            [block.attn(both, image_rotary_emb=rope), block.act_mlp(block.proj_mlp(both))], 2
        )
        x, at = block.proj_out(x), joint.shape[1]
        joint, low = joint + gate_a[:, None] * x[:, :at], low + gate_b[:, None] * x[:, at:]
    return model.proj_out(model.norm_out(joint[:, TEXT:], temb))


@pytest.mark.parametrize("return_dict", [False, True])
def test_the_third_stream(return_dict):
    model = flux_transformer()
    given, small = inputs(model), guidance()
    before, stock = dict(vars(model)), model(**given)[0]
    with guided(model, small), torch.no_grad():
        out = model(**{**given, "return_dict": return_dict})
        out = out.sample if return_dict else out[0]
        # Clean at every time: that of the image does not reach it but through the image.
    torch.testing.assert_close(out, by_hand(model, given, small))
    assert not torch.allclose(out, stock)
    assert vars(model) == before
    assert torch.equal(model(**given)[0], stock)
    for module in model.modules():
        assert "forward" not in vars(module)


def test_gradients_reach_both_streams():
    model = flux_transformer()
    given, small = inputs(model), guidance()
    small.latents.requires_grad_()
    given["hidden_states"].requires_grad_()
    with guided(model, small):
        model(**given)[0].square().mean().backward()
    assert small.latents.grad.abs().sum() > 0
    assert given["hidden_states"].grad.abs().sum() > 0
    assert model.transformer_blocks[0].norm1.linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("how", ["repeated blocks", pytest.param("model", marks=pytest.mark.slow)])
def test_compiled_graphs_do_not_outlive_their_guidance(how):
    model = flux_transformer(num_layers=1, num_single_layers=1)
    given = inputs(model)

    @torch.no_grad()
    def outputs(run):
        found = []
        for small in (guidance(1), None, guidance(2)):
            with guided(run, small) if small else nullcontext():
                found.append(run(**given)[0])
        return found

    expected = outputs(model)
    torch._dynamo.reset()
    run = model
    if how == "model":
        run = torch.compile(model, backend="eager", fullgraph=True)
    else:
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
    for one, other in zip(outputs(run), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_two_guidances_are_refused():
    model = flux_transformer()
    with guided(model, guidance()), pytest.raises(ValueError, match="guided already"):
        guided(model, guidance()).__enter__()


def test_latents_must_fit():
    with pytest.raises(ValueError, match="2x3 tokens"):
        Guidance(latents=torch.zeros(1, 5, 4), coarse=COARSE, image=IMAGE)


def run(pipe, small=None, steps=3, **arguments):
    def call():
        generator = torch.Generator().manual_seed(0)
        return pipe("words", height=2 * IMAGE[0], width=2 * IMAGE[1], num_inference_steps=steps,
                    max_sequence_length=16, generator=generator, output_type="latent", **arguments)  # fmt: skip

    if small is None:
        return call().images
    with guided(pipe.transformer, small):
        return call().images


@pytest.mark.parametrize("rule", ["columns", "hilbert", "released", "token"])
def test_the_recipe_permutes_all_streams_alike(rule):
    """With a window as large as the image the plan hides only what the rules hide: the same as a mask says."""
    pipe = flux_pipeline(FluxPipeline)
    small = guidance()
    pipe.enable_visionfuse("scale_dit", rule=rule, window=4)
    out = run(pipe, small)
    plan = next(iter(pipe._visionfuse.ran.values())).plan
    assert plan.layout.segments[-1].kind == "guidance"
    mask = plan.blocks.dense_mask()
    if plan.inverse is not None:
        mask = mask[plan.inverse][:, plan.inverse]
    pipe.disable_visionfuse()
    expected = masked(pipe, small, mask)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)


def masked(pipe, small, mask):
    """The guided run with an explicit mask and tokens where they are."""
    from visionfuse.testing_pipelines import masked_attention

    with masked_attention(pipe, mask):
        return run(pipe, small)


def test_kept_keys_and_values_change_nothing():
    pipe = flux_pipeline(FluxPipeline)
    pipe.enable_visionfuse("scale_dit", window=4)
    expected = run(pipe, guidance(), steps=4)
    calls = []
    hook = pipe.transformer.x_embedder.register_forward_hook(
        lambda m, a, out: calls.append(out.shape[1])
    )
    out = run(pipe, guidance(cached=True), steps=4)
    hook.remove()
    tokens = IMAGE[0] * IMAGE[1]
    assert calls == [tokens + COARSE[0] * COARSE[1], tokens, tokens, tokens]
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)
    assert ACTIVE.keys is None


def test_layers_that_stay_dense_never_see_kept_keys(monkeypatch):
    pipe = flux_pipeline(FluxPipeline)
    pipe.enable_visionfuse("scale_dit", window=4, dense_layers=(0,))
    expected = run(pipe, guidance(cached=True))
    monkeypatch.setattr(exact, "KERNEL", "reference")
    head_dim = pipe.transformer.config.attention_head_dim
    monkeypatch.setattr(exact, "GAINS", {head_dim: {16: 1.2}})
    assert torch.equal(run(pipe, guidance(cached=True)), expected)


def test_low_band_is_that_of_the_enlarged_image():
    generator = torch.Generator().manual_seed(0)
    noise, clean, off = torch.randn(3, 2, 6, 8, generator=generator)
    t = 0.6
    noisy = t * noise + (1 - t) * clean
    velocity = noise - clean + off
    out = drawn_to(velocity, noisy, clean, t, 1.0)
    low = lambda x: x.unflatten(-1, (-1, 4)).mean(-1)
    torch.testing.assert_close(low(noisy - t * out), low(clean))
    high = lambda x: x - low(x).repeat_interleave(4, -1)
    torch.testing.assert_close(high(out), high(velocity))
    assert drawn_to(velocity, noisy, clean, t, 0.0) is velocity


def test_the_low_band_follows_the_order():
    pipe = flux_pipeline(FluxPipeline)
    band = torch.randn(1, IMAGE[0] * IMAGE[1], 4, generator=torch.Generator().manual_seed(3))
    plain = run(pipe, guidance(low_band=band, strength=lambda t: 0.5))
    pipe.enable_visionfuse("scale_dit", window=200, block=(4096, 4096), rule="hilbert")
    hidden = run(pipe, guidance(low_band=band, strength=lambda t: 0.5))
    free = run(pipe, guidance())
    assert (plain - hidden).abs().mean() < 0.5 * (free - hidden).abs().mean()


def test_two_streams_do_what_blocks_ask():
    a, b, x = torch.randn(2, 4), torch.randn(2, 4), torch.randn(2, 5, 4)
    both = TwoStreams(a, b, 3)
    whole = torch.cat([a[:, None].expand(-1, 3, -1), b[:, None].expand(-1, 2, -1)], 1)
    torch.testing.assert_close(both.unsqueeze(1) * x, whole * x)
    torch.testing.assert_close(x * (1 + both[:, None]) + both[:, None], x * (1 + whole) + whole)
