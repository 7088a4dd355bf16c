"""The VQGAN of the reference against what the original drew, and against its own definition."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from healthgpt_edge.export.checkpoint import VqConfig
from healthgpt_edge.export.reference.vqgan import AttentionBlock, Downsample, Upsample, Vqgan, to_uint8
from tests.golden_cases import GOLDEN, open_golden
from tests.tolerances import HIDDEN_STATES, IMAGE_LEVELS, IMAGE_SHARE

SMALL = VqConfig(
    codes=11,
    embed_dim=6,
    z_channels=6,
    channels=32,
    multipliers=(1, 2),
    blocks=1,
    attention_resolutions=(8,),
    resolution=16,
)


@pytest.fixture(scope="module")
def golden() -> Vqgan:
    with open_golden("m3") as checkpoint:
        assert checkpoint.vq is not None
        model = Vqgan(checkpoint.vq)
        model.load_state_dict({name: checkpoint.vq_tensor(name).float() for name in model.state_dict()})
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def small() -> Vqgan:
    torch.manual_seed(0)
    return Vqgan(SMALL).eval().requires_grad_(False)


def test_decode_equals_the_original(golden: Vqgan) -> None:
    with np.load(GOLDEN / "expected" / "m3_gen_wide.npz") as expected:
        codes, image = torch.from_numpy(expected["vq_indices"]).reshape(1, 32, 32), expected["image_uint8"]
    drawn = to_uint8(golden.decode(codes))[0].numpy()
    difference = np.abs(drawn.astype(int) - image)
    assert drawn.shape == (256, 256, 3)
    assert difference.max() <= IMAGE_LEVELS
    assert (difference > 0).mean() <= IMAGE_SHARE


def test_decode_follows_the_codes(golden: Vqgan) -> None:
    codes = torch.zeros(1, 32, 32, dtype=torch.long)
    changed = codes.clone()
    changed[0, 0, 31] = 1  # the upper right corner
    difference = (golden.decode(changed) - golden.decode(codes)).abs()[0].sum(dim=0)
    assert difference[:64, -64:].mean() > 2 * difference[-64:, :64].mean()


def test_encode_is_the_nearest_row_for_a_distance_codebook(small: Vqgan) -> None:
    """With proj = (2e, -|e|^2) the argmax over logits is the nearest row: the form the phantom is trained in."""
    model = Vqgan(SMALL).eval().requires_grad_(False)
    rows = torch.randn(SMALL.codes, SMALL.embed_dim)
    model.quantize.proj.weight.copy_(2 * rows[:, :, None, None])
    model.quantize.proj.bias.copy_(-rows.square().sum(dim=1))
    picture = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = model.quant_conv(model.encoder(picture)).permute(0, 2, 3, 1)
    assert torch.equal(model.encode(picture), torch.cdist(latents, rows).argmin(dim=-1))


def test_shapes_of_an_f2_model(small: Vqgan) -> None:
    picture = torch.rand(2, 3, 16, 16)
    codes = small.encode(picture)
    assert codes.shape == (2, 8, 8)
    assert codes.dtype == torch.int64
    assert small.decode(codes).shape == picture.shape


def test_parameter_names_are_the_released_ones(golden: Vqgan) -> None:
    names = set(golden.state_dict())
    for name in (
        "encoder.down.0.downsample.conv.weight",
        "encoder.down.3.attn.1.proj_out.bias",
        "decoder.up.3.attn.2.q.weight",
        "decoder.up.2.block.0.nin_shortcut.weight",
        "decoder.mid.attn_1.norm.weight",
        "quantize.proj.bias",
        "quantize.embed.weight",
        "quant_conv.weight",
        "post_quant_conv.bias",
    ):
        assert name in names
    assert not any(name.startswith("decoder.up.0.upsample") for name in names)


def test_attention_block_against_torch() -> None:
    torch.manual_seed(1)
    block = AttentionBlock(32)
    x = torch.randn(2, 32, 3, 5)
    normed = block.norm(x)
    query, key, value = (conv(normed).flatten(2).transpose(1, 2) for conv in (block.q, block.k, block.v))
    mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape_as(x)
    torch.testing.assert_close(block(x), x + block.proj_out(mixed), atol=HIDDEN_STATES, rtol=0)


def test_downsample_pads_below_and_right_only() -> None:
    layer = Downsample(1)
    torch.nn.init.zeros_(layer.conv.bias)
    torch.nn.init.zeros_(layer.conv.weight)
    layer.conv.weight.data[0, 0, 0, 0] = 1.0  # picks the upper left of each window
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert layer(x).flatten().tolist() == [0.0, 2.0, 8.0, 10.0]


def test_upsample_repeats_pixels() -> None:
    layer = Upsample(1)
    torch.nn.init.zeros_(layer.conv.bias)
    torch.nn.init.zeros_(layer.conv.weight)
    layer.conv.weight.data[0, 0, 1, 1] = 1.0
    x = torch.tensor([[[[1.0, 2.0]]]])
    assert layer(x).tolist() == [[[[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0]]]]


def test_to_uint8_clamps_and_truncates() -> None:
    # 0.5 -> (1.5 / 2) * 255 = 191.25; 0.999 -> 254.8725: rounding would give 255.
    picture = torch.tensor([-3.0, -1.0, 0.0, 0.5, 0.999, 1.0, 7.0]).reshape(1, 1, 1, 7).expand(1, 3, 1, 7)
    pixels = to_uint8(picture)
    assert pixels.shape == (1, 1, 7, 3)
    assert pixels[0, 0, :, 1].tolist() == [0, 0, 127, 191, 254, 255, 255]


def test_gradients_reach_the_encoder() -> None:
    model = Vqgan(dataclasses.replace(SMALL, attention_resolutions=()))
    model.quant_conv(model.encoder(torch.rand(1, 3, 16, 16))).sum().backward()
    assert model.encoder.conv_in.weight.grad is not None
    assert float(model.encoder.conv_in.weight.grad.abs().sum()) > 0
