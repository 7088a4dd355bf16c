"""What stands between the VQGAN's convolutions, against the formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
from formats import exact, store

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}  # of results up to 4, but for the float32: of 2e-6
each_storage = pytest.mark.parametrize("storage", list(TOLERANCE))


def normed(x, groups, weight, bias, epsilon, swish):
    batch, positions, _ = x.shape
    split = x.reshape(batch, positions, groups, -1)
    mean, variance = (f(split, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    y = ((split - mean) / np.sqrt(variance + epsilon)).reshape(x.shape) * weight + bias
    return y / (1 + np.exp(-y)) if swish else y


@each_storage
@pytest.mark.parametrize(
    ("shape", "swish"),
    [((1, 1, 32), True), ((2, 65, 64), False), ((1, 300, 96), True), ((1, 70, 512), True), ((1, 8200, 4), False)],
    ids=str,
)
def test_group_norm(device, storage, shape, swish):
    random = np.random.default_rng(0)
    # Far from zero: squares of what is not centred would lose most of float32.
    x = store(random.standard_normal(shape) + 30 * (storage == "float32"), storage)
    weight, bias = (random.standard_normal(shape[2]).astype(np.float32) for _ in range(2))
    y = device.poisoned(*shape, dtype=x.dtype)
    groups = min(32, shape[2])
    workspace = device.workspace(device.kernels.group_norm_workspace_bytes(shape[0], groups), shape[0])
    operands = [device.put(one) for one in (x, weight, bias)]
    for to in (y, operands[0]):  # also in place
        device.kernels.group_norm(*operands, to, workspace, groups, swish=swish, storage=storage)
        expected = normed(exact(x, storage), groups, weight, bias, 1e-6, swish)
        found = exact(device.get(to), storage)
        np.testing.assert_allclose(found, expected, rtol=TOLERANCE[storage], atol=2 * TOLERANCE[storage])


@each_storage
@pytest.mark.parametrize("channels", [1, 8, 40])
def test_phase_interleave(device, storage, channels):
    height, width = 3, 5
    grown = (2, height + 1, width + 1, 2, 2, channels)
    phases = store(np.random.default_rng(0).standard_normal(grown), storage)
    image = device.poisoned(2, 2 * height, 2 * width, channels, dtype=phases.dtype)
    device.kernels.phase_interleave(device.put(phases), image, storage)
    whole = phases.transpose(0, 1, 3, 2, 4, 5).reshape(2, 2 * height + 2, 2 * width + 2, channels)
    np.testing.assert_array_equal(device.get(image), whole[:, 1:-1, 1:-1])


@each_storage
def test_image_levels(device, storage):
    x = store(np.concatenate([np.linspace(-1.2, 1.2, 995), [np.nan, np.inf, -np.inf, 1, -1]]), storage)
    image = device.poisoned(1000, dtype=np.uint8)
    device.kernels.image_levels(device.put(x), image, storage)
    clamped = np.clip(np.nan_to_num(exact(x, storage), nan=-1.0), -1, 1).astype(np.float32)
    expected = ((clamped + np.float32(1)) / np.float32(2) * np.float32(255)).astype(np.uint8)
    np.testing.assert_array_equal(device.get(image), expected)


def test_wrong_operands_are_named(device):
    x, row = device.put(np.zeros((1, 4, 40), np.float32)), device.put(np.zeros(40, np.float32))
    with pytest.raises(ValueError, match="channels must be a multiple of groups"):
        device.kernels.group_norm(x, row, row, x, device.workspace(1 << 16, 1), storage="float32")
    with pytest.raises(ValueError, match=r"x must be \[1, 4, 40\] of 16 bits, got \[1, 4, 40\] of 32"):
        device.kernels.group_norm(x, row, row, x, device.workspace(1 << 16, 1))
    with pytest.raises(ValueError, match="the workspace is too small"):
        device.kernels.group_norm(x, row, row, x, device.workspace(8, 1), groups=8, storage="float32")
