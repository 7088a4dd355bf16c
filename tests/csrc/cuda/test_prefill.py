"""The CUDA H-LoRA linear of many rows against the formula in float64; on the host, loops are in cuBLASLt's place."""

from __future__ import annotations

import numpy as np
import pytest
from test_linear import each_storage, formula, normal, operands

# x, and what is gated, are rounded to 11 bits, 8 for bfloat16: relative to the largest result.
TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3, "int8": 1e-3, "int4": 1e-3}


def prefill(device, x, stored, experts, outputs, bias=None):
    if not hasattr(device.kernels, "hlora_prefill"):
        pytest.skip("built without cuBLASLt")
    matrices = stored if experts else {"weight": stored["weight"]}
    needed = device.kernels.hlora_prefill_workspace_bytes(len(x), experts=experts, **matrices)
    workspace, y = device.workspace(needed, 0), device.poisoned(len(x), outputs)
    bias = None if bias is None else device.put(bias)
    device.kernels.hlora_prefill(device.put(x), y=y, workspace=workspace, bias=bias, experts=experts, **matrices)
    return device.get(y)


@each_storage
@pytest.mark.parametrize("size", [(31, 33, 8, 4, 32, 0), (70, 64, 12, 3, 64, 8)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_the_formula(device, storage, size, has_bias):
    stored, exact, bias = operands(device, storage, size)
    bias = bias if has_bias else None
    x = normal(np.random.default_rng(1), 40, size[0])
    for experts in (size[3], 0):
        expected = formula(x, exact, experts, bias)
        found = prefill(device, x, stored, experts, size[1], bias)
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[storage] * np.abs(expected).max())


def test_wrong_operands_are_named(device):
    stored, _, bias = operands(device, "float16", (64, 72, 8, 4, 32, 0))
    with pytest.raises(ValueError, match="rank must be a multiple of experts"):
        prefill(device, np.zeros((2, 64), np.float32), stored, 3, 72)
    with pytest.raises(ValueError, match=r"bias must be \[72\], got \[71\]"):
        prefill(device, np.zeros((2, 64), np.float32), stored, 4, 72, bias[:-1])
