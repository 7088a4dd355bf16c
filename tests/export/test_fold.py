"""Each piece of exact algebra against the plain computation it replaces, to float32 rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from healthgpt_edge.export import fold

# Values are of order one: what is left is the rounding of the folded weights.
ROUNDING = 1e-5


def tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random values, scaled like a layer's weights: by the square root of the inputs."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values / values[0].numel() ** 0.5 if len(shape) > 1 else values


def assert_equal(found: np.ndarray | torch.Tensor, expected: torch.Tensor, tolerance: float = ROUNDING) -> None:
    assert np.asarray(found).dtype == np.float32
    np.testing.assert_allclose(np.asarray(found), expected.numpy(), rtol=0, atol=tolerance)


# --- language -----------------------------------------------------------------------------------------------------

# Rank, experts, channels in and out; odd and prime ones too.
HLORA_SHAPES = [(8, 4, 64, 96), (6, 3, 31, 33), (1, 1, 7, 1), (12, 4, 128, 129)]


def assert_float32(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING)


def adapter(rank: int, experts: int, channels: int, out: int) -> tuple[np.ndarray, ...]:
    """W [O, C], A [R, C], B [O, R], the router [E, C] and a norm's weight [C]."""
    matrices = (tensor(*shape, seed=i) for i, shape in enumerate([(out, channels), (rank, channels), (out, rank)]))
    router, norm = tensor(experts, channels, seed=3) * 5, tensor(channels, seed=4) + 1
    return *(matrix.numpy() for matrix in matrices), router.numpy(), norm.numpy()


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(("channels", "out"), [(64, 96), (31, 1), (4099, 3)])
def test_take_norm(channels, out):
    weight, norm, x = tensor(out, channels).numpy(), tensor(channels).numpy() + 1, tensor(5, channels).numpy() * 8
    before = weight.copy()
    assert_float32(x @ fold.take_norm(weight, norm).T, (x * norm) @ weight.T)
    assert fold.take_norm(weight, None) is weight
    np.testing.assert_array_equal(weight, before)


@pytest.mark.parametrize(("rank", "experts", "channels", "out"), HLORA_SHAPES)
def test_stack_router(rank, experts, channels, out):
    _, reduce, _, router, norm = adapter(rank, experts, channels, out)
    x = tensor(5, channels).numpy() * 8
    together = x @ fold.stack_router(reduce, router, norm).T
    assert_float32(together[:, :rank], (x * norm) @ reduce.T)
    assert_float32(together[:, rank:], (x * norm) @ router.T)
    np.testing.assert_array_equal(fold.stack_router(reduce, router, None), np.concatenate([reduce, router]))


@pytest.mark.parametrize("scaling", [8.0, 1.0, 2 / 3, 0.1])
def test_scale_expansion(scaling):
    expand, z = tensor(33, 12).numpy(), tensor(5, 12, seed=1).numpy()
    assert_float32(z @ fold.scale_expansion(expand, scaling).T, (scaling * z) @ expand.T)


@pytest.mark.parametrize("scaling", [8.0, 2 / 3])
@pytest.mark.parametrize(("rank", "experts", "channels", "out"), HLORA_SHAPES)
def test_a_whole_hlora_linear_is_two_products(rank, experts, channels, out, scaling):
    """[A;R] x, the gate, then [W|B][x;z]: the released formula with its norm, in float64."""
    weight, reduce, expand, router, norm = adapter(rank, experts, channels, out)
    x = tensor(5, channels, seed=7).numpy() * 8
    wide = (part.astype(np.float64) for part in (x, weight, reduce, expand, router, norm))
    x64, weight64, reduce64, expand64, router64, norm64 = wide
    normed = x64 * norm64
    gates = softmax(normed @ router64.T).repeat(rank // experts, axis=-1)
    expected = normed @ weight64.T + (gates * (normed @ reduce64.T) * scaling) @ expand64.T

    low = x @ fold.stack_router(reduce, router, norm).T
    z = softmax(low[:, rank:]).repeat(rank // experts, axis=-1) * low[:, :rank]
    both = np.concatenate([fold.take_norm(weight, norm), fold.scale_expansion(expand, scaling)], axis=1)
    assert_float32(np.concatenate([x, z], axis=1) @ both.T, expected)


# --- vision and VQGAN ---------------------------------------------------------------------------------------------

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize("side", [1, 7, 14])
def test_patch_matrix_and_position_table(side):
    grid, width = 3, 33
    weight, class_embedding = tensor(width, 3, side, side), tensor(width)
    positions = tensor(grid * grid + 1, width, seed=1)
    pixels = torch.randint(0, 256, (2, 3, grid * side, grid * side), generator=torch.Generator().manual_seed(2))
    pixels[1] = 255  # the largest sum

    normalised = (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    patches = functional.conv2d(normalised, weight, stride=side).flatten(2).transpose(1, 2)
    expected = torch.cat([class_embedding.expand(2, 1, width), patches], dim=1) + positions

    matrix, bias = fold.patch_matrix(weight.numpy(), MEAN, STD)
    table = fold.position_table(class_embedding.numpy(), positions.numpy(), bias)
    split = pixels.float().sub(fold.PIXEL_CENTRE).view(2, 3, grid, side, grid, side)
    rows = split.permute(0, 2, 4, 3, 5, 1).reshape(2, grid * grid, side * side * 3)
    found = functional.pad(rows, (0, 0, 1, 0)) @ torch.from_numpy(matrix) + torch.from_numpy(table)
    assert_equal(found, expected)


@pytest.mark.parametrize("channels", [32, 33, 512])
def test_scale(channels):
    query, key, bias, x = tensor(channels, channels), tensor(channels, 5, seed=1), tensor(channels), tensor(5, channels)
    expected = functional.linear(x, query, bias) @ key * channels**-0.5
    scaled = [torch.from_numpy(fold.scale(part.numpy(), channels**-0.5)) for part in (query, bias)]
    assert_equal(functional.linear(x, *scaled) @ key, expected)


@pytest.mark.parametrize(("codes", "width", "out"), [(64, 32, 32), (7, 5, 31)])
def test_convolved_codebook(codes, width, out):
    codebook, weight, bias = tensor(codes, width), tensor(out, width, 1, 1), tensor(out)
    chosen = torch.randint(0, codes, (2, 3, 4), generator=torch.Generator().manual_seed(3))
    expected = functional.conv2d(codebook[chosen].permute(0, 3, 1, 2), weight, bias)
    table = fold.convolved_codebook(codebook.numpy(), weight.numpy(), bias.numpy())
    assert_equal(table[chosen.numpy()].transpose(0, 3, 1, 2), expected)


@pytest.mark.parametrize(("channels", "middle", "out"), [(32, 32, 64), (5, 3, 31)])
def test_chain_pointwise(channels, middle, out):
    first, second = tensor(middle, channels, 1, 1), tensor(out, middle, 1, 1, seed=1)
    first_bias, second_bias, x = tensor(middle), tensor(out, seed=1), tensor(2, channels, 3, 4)
    expected = functional.conv2d(functional.conv2d(x, first, first_bias), second, second_bias)
    weight, bias = fold.chain_pointwise(*(part.numpy() for part in (first, first_bias, second, second_bias)))
    rows = x.permute(0, 2, 3, 1) @ torch.from_numpy(weight) + torch.from_numpy(bias)
    assert_equal(rows.permute(0, 3, 1, 2), expected)
