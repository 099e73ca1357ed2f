"""The diffusion video decoder of LTX-2 with our processor: the same video as with diffusers' FlexAttention."""

import pytest
import torch
from diffusers.models.autoencoders import ltx2_diffusion_decoder as ltx2

from visionfuse.neighborhood.ltx2 import NeighborhoodProcessor


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return ltx2.LTX2VideoDiffusionDecoder3d(
        in_channels=8, out_channels=3, patch_size=2, head_dim=16,
        stage_channels=(64, 32, 32, 32, 16), stage_depths=(1, 1, 1, 1, 2),
        stage_kernels=((3, 3, 3), (3, 3, 3), (3, 3, 5), (3, 5, 5)),
        upsample_strides=((1, 1, 1), (1, 1, 1), (1, 2, 1), (2, 1, 1)), temporal_compression_ratio=2,
        upsample_channel_reductions=(2, 1, 1, 2), stage5_kernel=(3, 7, 5), t_emb_dim=32,
    ).eval()  # fmt: skip


def attentions(decoder):
    return [m for m in decoder.modules() if isinstance(m, ltx2.LTX2VideoVaeNeighborhoodAttention)]


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
def test_same_as_flex_attention(decoder):
    """Every layer of every stage, in the decoder's own order."""
    found = []
    for processor in (None, NeighborhoodProcessor()):
        for attn in attentions(decoder):
            if processor is not None:
                attn.set_processor(processor)
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(decoder(torch.randn(1, 8, 3, 4, 5)))
    assert len(attentions(decoder)) == 6
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-3)


def test_set_by_the_model(decoder):
    """`set_attn_processor` reaches every layer, and no block mask is built for it."""
    model = ltx2.LTX2VideoDiffusionDecoderModel.__new__(ltx2.LTX2VideoDiffusionDecoderModel)
    torch.nn.Module.__init__(model)
    model.decoder = decoder
    model.set_attn_processor(NeighborhoodProcessor(precision="int8"))
    assert len(model.attn_processors) == 6
    for attn in attentions(decoder):
        assert isinstance(attn.processor, NeighborhoodProcessor)
        assert attn.build_block_mask(torch.zeros(1, 4, 4, 4, 16)) is None
