"""Models of a configuration alone, with random weights, and the inputs of one denoising step.

No checkpoint is read: parameters are made on the meta device and filled with random numbers where they will
run. What attention and linear layers cost does not depend on the values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.plan import TokenLayout
from ..sites import SITES, Unsupported

TEXT = 512  # tokens of text in FLUX, Wan and Qwen-Image as their pipelines pad them


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A denoiser of diffusers, or a model of timm.

    cls: the class's name in diffusers; None for timm, whose name is `name`. config: its arguments. size: the
    usual one in pixels, (height, width) or (height, width, frames). scale: pixels of a latent on an axis.
    """

    name: str
    cls: str | None
    config: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, ...] = (1024, 1024)
    scale: int = 8
    text: int = TEXT


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with the inputs of a step, the same in every process.

    depth: blocks of the whole architecture by class name; the model may have fewer. layout, heads, head_dim: of
        self-attention; layout is None where nothing knows its tokens.
    """

    name: str
    model: Any
    inputs: dict[str, Any]
    size: tuple[int, ...]
    depth: dict[str, int]
    layout: TokenLayout | None
    heads: int
    head_dim: int

    def step(self) -> Any:
        with torch.no_grad():
            return self.model(**self.inputs)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


_WAN = {
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "text_dim": 4096,
    "freq_dim": 256,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 128,
}
NAMED = {
    a.name: a
    for a in (
        Architecture(
            name="flux.1-dev", cls="FluxTransformer2DModel", config={"guidance_embeds": True}
        ),
        Architecture(
            name="wan2.1-1.3b", cls="WanTransformer3DModel", size=(480, 832, 81),
            config={**_WAN, "num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
        ),
        Architecture(
            name="wan2.1-14b", cls="WanTransformer3DModel", size=(720, 1280, 81),
            config={**_WAN, "num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
        ),
        Architecture(
            name="hunyuan", cls="HunyuanVideoTransformer3DModel", size=(720, 1280, 129), text=256,
            config={"guidance_embeds": True},
        ),
        Architecture(name="qwen-image", cls="QwenImageTransformer2DModel", size=(1328, 1328)),
    )
}  # fmt: skip


def named(model: str) -> Architecture:
    """A name of `NAMED`, a folder or Hub name of a diffusers pipeline (its configuration alone is read), or a
    model of timm. Raises ValueError for anything else."""
    if model.lower() in NAMED:
        return NAMED[model.lower()]
    if Path(model).is_dir() or "/" in model:
        return _of_pipeline(model)
    import timm

    from .. import models  # noqa: F401  puts KAT, MedViTV2 and NAT into timm's registry

    if timm.is_model(model):
        size = (timm.get_pretrained_cfg(model) or timm.models.PretrainedCfg()).input_size
        return Architecture(name=model, cls=None, size=tuple(size[1:]), scale=1, text=0)
    raise ValueError(
        f"Unknown model {model!r}. Name one of {', '.join(NAMED)}, a folder or Hub name of a diffusers "
        "pipeline, or a model of timm."
    )


def _of_pipeline(model: str) -> Architecture:
    from diffusers import AutoencoderKL

    config = dict(AutoencoderKL.load_config(model, subfolder="transformer"))
    cls = config["_class_name"]
    if cls not in INPUTS:
        raise ValueError(f"No inputs are known for {cls}; known are {', '.join(INPUTS)}.")
    try:
        vae = AutoencoderKL.load_config(model, subfolder="vae")
    except OSError:  # a folder of the transformer alone
        vae = {}
    scale = 2 ** (len(vae["block_out_channels"]) - 1) if "block_out_channels" in vae else 8
    usual = next((a for a in NAMED.values() if a.cls == cls), None)
    return Architecture(
        name=Path(model).name, cls=cls, config=config, scale=scale,
        size=usual.size if usual else (1024, 1024), text=usual.text if usual else TEXT,
    )  # fmt: skip


def subject(
    architecture: Architecture,
    size: tuple[int, ...] | None = None,
    *,
    layers: int | None = None,
    batch: int = 1,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> Subject:
    """Build it with random weights. layers: of every kind of block instead of all of them.

    Raises ValueError where the size does not fit.
    """
    device = torch.device(device)
    size = architecture.size if size is None else size
    if len(size) != len(architecture.size):
        raise ValueError(
            f"{architecture.name} takes a size of {len(architecture.size)} numbers such as "
            f"{'x'.join(map(str, architecture.size))}, got {'x'.join(map(str, size))}."
        )
    if architecture.cls is None:
        return _vision(architecture, size, batch, device, dtype)
    import diffusers

    cls = getattr(diffusers, architecture.cls)
    config = dict(architecture.config)
    whole = _empty(lambda: cls.from_config(config))
    depth = _depth(whole)
    for name in ("num_layers", "num_single_layers"):
        if layers is not None and getattr(whole.config, name, 0):
            config[name] = min(layers, getattr(whole.config, name))
    model = whole if layers is None else _empty(lambda: cls.from_config(config))
    fill(model, device, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = INPUTS[architecture.cls](model, size, architecture, batch)
    inputs = {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, Tensor) else value
        for name, value in made.items()
    }  # fmt: skip
    site = SITES[architecture.cls]
    layout = site.layout(model, inputs, {})
    if isinstance(layout, Unsupported):
        raise ValueError(f"{architecture.name} at {'x'.join(map(str, size))}: {layout.reason}.")
    return Subject(
        name=architecture.name, model=model, inputs=inputs, size=size, depth=depth, layout=layout,
        heads=model.config.num_attention_heads, head_dim=site.head_dim(model),
    )  # fmt: skip


def _vision(
    architecture: Architecture,
    size: tuple[int, ...],
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Subject:
    """A model of timm, whose own initialisation is quick, on random images."""
    import timm

    options: dict[str, Any] = {}
    if size != architecture.size:
        options["img_size"] = size
    model = timm.create_model(architecture.name, **options).to(device, dtype).eval()
    images = torch.randn(batch, 3, *size, device=device, dtype=dtype)
    embed, blocks = getattr(model, "patch_embed", None), getattr(model, "blocks", None)
    attention = (
        getattr(blocks[0], "attn", None)
        if isinstance(blocks, nn.Sequential | nn.ModuleList)
        else None
    )
    heads = getattr(attention, "num_heads", 0)
    grid = getattr(embed, "grid_size", None)
    joint = (
        TokenLayout.joint(text=getattr(model, "num_prefix_tokens", 0), grids=[tuple(grid)])
        if grid and heads
        else None
    )
    return Subject(
        name=architecture.name, model=model, inputs={"x": images}, size=size, depth=_depth(model),
        layout=joint, heads=heads, head_dim=getattr(model, "embed_dim", 0) // heads if heads else 0,
    )  # fmt: skip


def _depth(model: Any) -> dict[str, int]:
    """How many blocks of every class the lists of a model hold."""
    found: dict[str, int] = {}
    for block in blocks(model):
        found[type(block).__name__] = found.get(type(block).__name__, 0) + 1
    return found


def blocks(model: Any) -> list[nn.Module]:
    """The repeated blocks: the members of the lists of modules that belong to the model itself."""
    lists = [m for m in model.children() if isinstance(m, nn.ModuleList | nn.Sequential)]
    return [block for each in lists for block in each if any(True for _ in block.parameters())]


def _empty(build: Callable[[], Any]) -> Any:
    """A model whose parameters are on the meta device; its buffers hold what they should."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return build().eval()


def fill(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Random weights in `dtype`, but for those that diffusers' `from_pretrained` keeps in float32."""
    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    generator = torch.Generator(device).manual_seed(0)
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            path = f"{prefix}.{name}".split(".")
            own = torch.float32 if any(part in path for part in kept) else dtype
            weight = torch.empty(parameter.shape, dtype=own, device=device)
            if weight.ndim < 2:  # norms and biases
                weight.fill_(1.0 if name == "weight" else 0.0)
            else:
                weight.normal_(std=weight[0].numel() ** -0.5, generator=generator)
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
    model.to(device)


# Inputs of a step, by class ---------------------------------------------------------------------------


def _latents(size: tuple[int, ...], a: Architecture) -> tuple[int, ...]:
    """Of an image (rows, columns), of a video (frames, rows, columns), whose VAE keeps the first frame."""
    rows, columns = size[0] // a.scale, size[1] // a.scale
    return (rows, columns) if len(size) == 2 else ((size[2] - 1) // 4 + 1, rows, columns)


def _flux(model: Any, size: tuple[int, ...], a: Architecture, batch: int) -> dict[str, Any]:
    rows, columns = (n // 2 for n in _latents(size, a))
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)
    made = {
        "hidden_states": torch.randn(batch, rows * columns, model.config.in_channels),
        "encoder_hidden_states": torch.randn(batch, a.text, model.config.joint_attention_dim),
        "pooled_projections": torch.randn(batch, model.config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(a.text, 3),
    }
    if model.config.guidance_embeds:
        made["guidance"] = torch.full((batch,), 3.5)
    return made


def _wan(model: Any, size: tuple[int, ...], a: Architecture, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, model.config.in_channels, *_latents(size, a)),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, a.text, model.config.text_dim),
    }


def _hunyuan(model: Any, size: tuple[int, ...], a: Architecture, batch: int) -> dict[str, Any]:
    made = {
        "hidden_states": torch.randn(batch, model.config.in_channels, *_latents(size, a)),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, a.text, model.config.text_embed_dim),
        "encoder_attention_mask": torch.ones(batch, a.text, dtype=torch.long),
        "pooled_projections": torch.randn(batch, model.config.pooled_projection_dim),
    }
    if model.config.guidance_embeds:
        made["guidance"] = torch.full((batch,), 6000.0)
    return made


def _qwen(model: Any, size: tuple[int, ...], a: Architecture, batch: int) -> dict[str, Any]:
    rows, columns = (n // 2 for n in _latents(size, a))
    return {
        "hidden_states": torch.randn(batch, rows * columns, model.config.in_channels),
        "encoder_hidden_states": torch.randn(batch, a.text, model.config.joint_attention_dim),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, rows, columns)]] * batch,
    }


INPUTS: dict[str, Callable[[Any, tuple[int, ...], Architecture, int], dict[str, Any]]] = {
    "FluxTransformer2DModel": _flux,
    "HunyuanVideoTransformer3DModel": _hunyuan,
    "QwenImageTransformer2DModel": _qwen,
    "WanTransformer3DModel": _wan,
}
