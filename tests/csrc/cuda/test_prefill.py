"""The CUDA H-LoRA linear of many rows against the formula in float64; on the host, loops are in cuBLASLt's place."""

from __future__ import annotations

import numpy as np
import pytest
from test_linear import ROUTERS, SHARED, each_storage, formula, normal, operands, run

# x, and what is gated, are rounded to 11 bits, 8 for bfloat16: relative to the largest result.
TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3, "int8": 1e-3, "int4": 1e-3}


def prefill(device, x, stored, experts, outputs, bias=None, **options):
    if not hasattr(device.kernels, "hlora_prefill"):
        pytest.skip("built without cuBLASLt")
    matrices = stored if experts else {"weight": stored["weight"]}
    needed = device.kernels.hlora_prefill_workspace_bytes(len(x), experts=experts, **matrices)
    workspace, y = device.workspace(needed, 0), device.poisoned(len(x), outputs)
    more = {
        name: device.put(value) if isinstance(value, np.ndarray) else value
        for name, value in {"bias": bias, **options}.items()
        if value is not None
    }
    device.kernels.hlora_prefill(device.put(x), y=y, workspace=workspace, experts=experts, **matrices, **more)
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


@each_storage
@pytest.mark.parametrize("size", [(31, 33, 8, 4, 32, 0), (96, 80, 16, 4, 32, 0)], ids=str)
@pytest.mark.parametrize("experts", [0, 4])
def test_norm_pairing_and_residual_on_the_way(device, storage, size, experts):
    """Also with channels that are read one by one, because their rows are not aligned."""
    stored, exact, bias = operands(device, storage, size)
    random = np.random.default_rng(1)
    x, residual = normal(random, 40, 2 * size[0]) * 3, normal(random, 40, size[1])
    for more in (
        {"epsilon": 1e-5},
        {"pair_input": True},
        {"residual": residual},
        {"epsilon": 0.5, "pair_input": True, "residual": residual, "bias": bias},
    ):
        given = x if "pair_input" in more else np.ascontiguousarray(x[:, : size[0]])
        expected = formula(given, exact, experts, **more)
        found = prefill(device, given, stored, experts, size[1], **more)
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[storage] * np.abs(expected).max())


@each_storage
@pytest.mark.parametrize("name", ["first", "second", "both"])
def test_a_router_of_several_plugins(device, storage, name):
    stored, exact, bias = operands(device, storage, SHARED)
    x = normal(np.random.default_rng(1), 40, SHARED[0])
    expected = formula(x, exact, SHARED[3], bias, **ROUTERS[name])
    found = prefill(device, x, stored, SHARED[3], SHARED[1], bias, **ROUTERS[name])
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[storage] * np.abs(expected).max())


@pytest.mark.parametrize("rows", [1, 33, 64, 65])
@pytest.mark.parametrize("experts", [0, 5])
@pytest.mark.parametrize("around", ["alone", "norm", "pairs and residual"])
def test_any_number_of_rows(device, rows, experts, around):
    """By the kernels of few rows or of many, to their bits: all that there is, and rows go on where they stopped."""
    if not hasattr(device.kernels, "hlora_linear_rows"):
        pytest.skip("built without cuBLASLt")
    stored, _, bias = operands(device, "int4", SHARED)
    random = np.random.default_rng(1)
    x = normal(random, rows, SHARED[0] * (2 if around == "pairs and residual" else 1))
    options = {"bias": bias, **(ROUTERS["second"] if experts else {})}
    options |= {"alone": {}, "norm": {"epsilon": 0.1}, "pairs and residual": {"pair_input": True}}[around]
    residual = normal(random, rows, SHARED[1]) if around == "pairs and residual" else None

    def pieces(first, end):
        return options if residual is None else options | {"residual": residual[first:end]}

    given = {
        name: device.put(value) if isinstance(value, np.ndarray) else value for name, value in pieces(0, rows).items()
    }
    matrices = stored if experts else {"weight": stored["weight"]}
    y = device.poisoned(rows, SHARED[1])
    device.kernels.hlora_linear_rows(device.put(x), y=y, experts=experts, **matrices, **given)
    if rows > 64:
        expected = prefill(device, x, stored, experts, SHARED[1], **pieces(0, rows))
    else:
        expected = np.concatenate(
            [
                run(device, x[at : at + 32], stored, experts, outputs=SHARED[1], **pieces(at, at + 32))
                for at in range(0, rows, 32)
            ]
        )
    np.testing.assert_array_equal(device.get(y), expected)


def test_wrong_operands_are_named(device):
    stored, _, bias = operands(device, "float16", (64, 72, 8, 4, 32, 0))
    with pytest.raises(ValueError, match="rank must be a multiple of experts"):
        prefill(device, np.zeros((2, 64), np.float32), stored, 3, 72)
    with pytest.raises(ValueError, match=r"bias must be \[72\], got \[71\]"):
        prefill(device, np.zeros((2, 64), np.float32), stored, 4, 72, bias[:-1])
