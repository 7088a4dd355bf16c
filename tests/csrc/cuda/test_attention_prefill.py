"""The CUDA attention of a prompt against the formula in float64, and its caches against those of decode steps."""

from __future__ import annotations

import numpy as np
import pytest
from test_attention import formula, operands, partly_filled, run

# Rotated queries, softmax weights and the values of int8 caches are rounded to 11 bits: relative to the largest result.
TOLERANCE = 1e-3
each_cache = pytest.mark.parametrize("cache", ["float16", "int8"])
# batch, tokens, heads, kv_heads, head size, capacity, past lengths, window
CASES = [
    (1, 70, 2, 2, 96, 150, [0], 0),
    (1, 65, 2, 1, 128, 200, [130], 0),
    (1, 1, 2, 2, 64, 70, [69], 0),
    (2, 67, 4, 2, 18, 140, [0, 62], 0),
    (1, 130, 2, 1, 32, 200, [69], 33),
    (2, 75, 3, 1, 10, 210, [3, 130], 64),
    (1, 68, 1, 1, 100, 70, [2], 0),
    (1, 200, 2, 2, 8, 200, [0], 1),
    (1, 66, 1, 1, 6, 140, [66], 80),  # a warp whose last token does not see the first position of a chunk
]


def prefill(device, *given):
    return run(device, *given, by="cached_attention_prefill")


@each_cache
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_formula_and_appends_like_decode_steps(device, case, cache):
    *shape, window = case
    given = partly_filled(shape, cache)
    expected, *_ = formula(*given, window, cache)
    output, *caches = prefill(device, *given, window, cache)
    np.testing.assert_allclose(output, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
    for found, wanted in zip(caches, run(device, *given, window, cache)[1:], strict=True):
        np.testing.assert_array_equal(found, wanted)


@each_cache
def test_what_no_token_sees_may_be_anything(device, cache):
    """Before the window, and behind the last token: not even NaN times a weight of 0 comes through."""
    given = operands(1, 66, 2, 1, 16, 210, [100], cache)
    expected, *_ = prefill(device, *given, 30, cache)
    for stored in given[6:] if cache == "int8" else given[4:6]:
        stored[:, :, :70] = stored[:, :, 100:] = np.nan
    output, *_ = prefill(device, *given, 30, cache)
    np.testing.assert_array_equal(output, expected)


@each_cache
@pytest.mark.parametrize("tokens", [1, 64, 65])
def test_a_pass_of_any_number_of_tokens(device, tokens, cache):
    """By the kernels of few tokens or of many, to their bits."""
    if not hasattr(device.kernels, "cached_attention_pass"):
        pytest.skip("built without cuBLASLt")
    given = operands(1, tokens, 4, 2, 16, 120, [50], cache)
    by = "cached_attention_prefill" if tokens > 64 else "cached_attention"
    expected = run(device, *given, 0, cache, by=by)
    for found, wanted in zip(run(device, *given, 0, cache, by="cached_attention_pass"), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_pass_over_bfloat16_caches(device):
    """The kernels of few tokens alone know them."""
    if not hasattr(device.kernels, "cached_attention_pass"):
        pytest.skip("built without cuBLASLt")
    given = operands(1, 70, 2, 1, 8, 80, [3], "bfloat16")
    expected, *_ = run(device, *given, 0, "bfloat16")
    output, *_ = run(device, *given, 0, "bfloat16", by="cached_attention_pass")
    np.testing.assert_array_equal(output, expected)
    with pytest.raises(ValueError, match="caches of a prompt must be float16 or int8"):
        prefill(device, *given, 0, "bfloat16")


def test_wrong_operands_are_named(device):
    given = operands(1, 70, 4, 2, 8, 80, [3], "float16")
    for by in ("cached_attention_prefill", "cached_attention_pass"):
        if not hasattr(device.kernels, by):
            continue
        with pytest.raises(ValueError, match="caches must be float16, bfloat16 or int8"):
            run(device, *given, 0, "int4", by=by)
