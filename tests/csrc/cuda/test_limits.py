"""Sizes that a launch cannot hold are refused before anything is read, never cut off to a smaller number."""

from __future__ import annotations

import numpy as np
import pytest

TOO_MANY_BLOCKS = r"\[launch\] operands must fit into a grid"


def test_more_pixels_than_blocks_can_be_counted(device):
    shape = ((1 << 40) + 256,)  # of 256 to a block: 2^32 blocks and one
    x, image = device.put(np.zeros(256, np.float16)), device.put(np.full(256, 77, np.uint8))
    with pytest.raises(ValueError, match=TOO_MANY_BLOCKS):
        device.kernels.image_levels(device.claiming(x, shape), device.claiming(image, shape))
    assert (device.get(image) == 77).all()


def test_more_rows_than_blocks_can_be_counted(device):
    rows = (1 << 32) + 1
    ids, table = device.put(np.zeros(1, np.int64)), device.put(np.ones((2, 3), np.float16))
    output = device.poisoned(1, 3, dtype=np.float16)
    with pytest.raises(ValueError, match=TOO_MANY_BLOCKS):
        device.kernels.gather_rows(device.claiming(ids, (rows,)), table, device.claiming(output, (rows, 3)))
    assert np.isnan(device.get(output)).all()


def test_more_pictures_than_a_grid_is_high(device):
    x, row = device.put(np.ones((1 << 16, 1, 1), np.float16)), device.put(np.ones(1, np.float32))
    workspace = device.workspace(device.kernels.group_norm_workspace_bytes(1 << 16, 1), 1 << 16)
    with pytest.raises(ValueError, match=TOO_MANY_BLOCKS):
        device.kernels.group_norm(x, row, row, x, workspace, 1)


@pytest.mark.parametrize(("heads", "capacity"), [(1, (1 << 25) + 1), (1 << 26, 1)])
def test_more_positions_or_heads_than_kernels_count(device, heads, capacity):
    small = device.put(np.zeros(8, np.float32))
    cache = device.claiming(device.put(np.zeros(8, np.float16)), (1, heads, capacity, 2))
    packed = device.claiming(small, (1, 1, 3 * heads * 2))
    angle, length = device.put(np.zeros((1, 1, 1), np.float32)), device.put(np.zeros(1, np.int64))
    needed = device.kernels.cached_attention_workspace_bytes(1, 1, heads, heads, 2, capacity)
    memory = device.claiming(device.put(np.zeros(8, np.uint8)), (needed,))
    output = device.claiming(small, (1, 1, heads * 2))
    with pytest.raises(ValueError, match=r"must be at most 2\^25"):
        device.kernels.cached_attention(packed, angle, angle, length, cache, cache, output, memory)


def test_more_channels_than_kernels_count(device):
    channels, small = 1 << 32, device.put(np.zeros(8, np.float32))
    values = device.claiming(device.put(np.zeros(8, np.uint8)), (channels // 2,))
    scales = device.claiming(small, (channels // 32, 1))
    weight = device.kernels.Matrix(values, "int4", (channels, 1), scales, 32)
    x, y = device.claiming(small, (1, channels)), device.poisoned(1, 1)
    with pytest.raises(ValueError, match=r"a matrix must have at most 2\^25 channels"):
        device.kernels.hlora_linear(x, weight, y, device.workspace(1 << 16, 2048))


def test_more_numbers_of_a_prompt_than_kernels_count(device):
    if not hasattr(device.kernels, "hlora_prefill"):
        pytest.skip("built without cuBLASLt")
    rows, small = 1 << 28, device.put(np.zeros(8, np.float32))
    weight = device.kernels.Matrix(device.put(np.zeros((8, 8), np.float16)), "float16", (8, 8))
    x, y, memory = device.claiming(small, (rows, 8)), device.claiming(small, (rows, 8)), device.workspace(1 << 16, 0)
    with pytest.raises(ValueError, match=r"x must have fewer than 2\^31 numbers"):
        device.kernels.hlora_prefill(x, weight, y, memory)
    x = device.claiming(small, (rows // 2, 16))
    with pytest.raises(ValueError, match=r"x must have fewer than 2\^31 numbers"):
        device.kernels.hlora_prefill(x, weight, device.claiming(small, (rows // 2, 8)), memory, pair_input=True)


def test_experts_less_than_none(device):
    if not hasattr(device.kernels, "hlora_prefill"):
        pytest.skip("built without cuBLASLt")
    weight = device.kernels.Matrix(device.put(np.zeros((8, 8), np.float16)), "float16", (8, 8))
    x, y, memory = device.poisoned(2, 8), device.poisoned(2, 8), device.workspace(40 << 20, 0)
    with pytest.raises(ValueError, match="experts must be 0 to 32"):
        device.kernels.hlora_prefill(x, weight, y, memory, experts=-1)
