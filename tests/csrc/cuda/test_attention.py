"""The CUDA decode attention against the formula in float64, and against itself."""

from __future__ import annotations

import numpy as np
import pytest
from formats import exact, store

# The caches' own rounding of what is appended, in an average of such values; all else is float32.
TOLERANCE = {"float16": 1e-3, "bfloat16": 1e-2}
each_cache = pytest.mark.parametrize("cache", list(TOLERANCE))
# batch, tokens, heads, kv_heads, head size, capacity, past lengths, window
CASES = [
    (1, 1, 4, 4, 96, 70, [69], 0),
    (1, 1, 6, 2, 128, 300, [255], 0),
    (2, 3, 4, 2, 18, 70, [0, 62], 0),
    (1, 19, 10, 2, 10, 150, [120], 0),
    (1, 1, 2, 1, 6, 300, [250], 64),
    (1, 7, 2, 2, 32, 200, [150], 33),
]


def operands(batch, tokens, heads, kv_heads, size, capacity, past, cache, seed=0):
    """packed, cosine and sine, past lengths, and the stored caches."""
    random = np.random.default_rng(seed)
    packed = random.standard_normal((batch, tokens, (heads + 2 * kv_heads) * size)).astype(np.float32)
    angles = random.uniform(0, 6, (batch, tokens, size // 2)).astype(np.float32)
    caches = [store(random.standard_normal((batch, kv_heads, capacity, size)), cache) for _ in range(2)]
    return packed, np.cos(angles), np.sin(angles), np.array(past, np.int64), *caches


def rotate(heads, cosine, sine):
    first, second = np.split(heads, 2, axis=-1)
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def formula(packed, cosine, sine, past_length, keys, values, window, cache):
    """The outputs and the stored caches after it."""
    (batch, tokens, _), (_, kv_heads, _, size) = packed.shape, keys.shape
    split = packed.astype(np.float64).reshape(batch, tokens, -1, size)
    heads = split.shape[2] - 2 * kv_heads
    turned = rotate(split[:, :, : heads + kv_heads], cosine[:, :, None], sine[:, :, None])
    query, key, value = turned[:, :, :heads], turned[:, :, heads:], split[:, :, heads + kv_heads :]
    keys, values, outputs = keys.copy(), values.copy(), np.empty((batch, tokens, heads, size))
    for b, past in enumerate(past_length):
        keys[b, :, past : past + tokens] = store(key[b].swapaxes(0, 1), cache)
        values[b, :, past : past + tokens] = store(value[b].swapaxes(0, 1), cache)
        for token, head in np.ndindex(tokens, heads):
            seen = slice(max(0, past + token - window) if window else 0, past + token + 1)
            of_head = b, head // (heads // kv_heads), seen
            scores = exact(keys[of_head], cache) @ query[b, token, head] / size**0.5
            shares = np.exp(scores - scores.max())
            outputs[b, token, head] = shares / shares.sum() @ exact(values[of_head], cache)
    return outputs.reshape(batch, tokens, -1), keys, values


def run(device, packed, cosine, sine, past_length, keys, values, window, cache, workspace=None):
    """The outputs and the caches, which the call has changed."""
    (batch, tokens, width), (_, kv_heads, capacity, size) = packed.shape, keys.shape
    heads = width // size - 2 * kv_heads
    if workspace is None:
        needed = device.kernels.cached_attention_workspace_bytes(batch, tokens, heads, kv_heads, size, capacity)
        workspace = device.workspace(needed, batch * kv_heads)
    output = device.poisoned(batch, tokens, heads * size)
    put = [device.put(one) for one in (packed, cosine, sine, past_length, keys, values)]
    device.kernels.cached_attention(*put, output, workspace, cache, window)
    return device.get(output), device.get(put[4]), device.get(put[5])


@each_cache
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_formula(device, case, cache):
    *shape, window = case
    given = operands(*shape, cache)
    # Rows that are not filled yet hold anything.
    for stored in given[4:]:
        for b, past in enumerate(shape[6]):
            stored[b, :, past:] = store(np.array(np.nan), cache)
    expected, keys, values = formula(*given, window, cache)
    output, *found = run(device, *given, window, cache)
    np.testing.assert_allclose(output, expected, rtol=0, atol=TOLERANCE[cache])
    for stored, wanted, before in zip(found, (keys, values), given[4:], strict=True):
        # A rotated number between two of the cache's may fall to either.
        np.testing.assert_allclose(exact(stored, cache), exact(wanted, cache), rtol=TOLERANCE[cache] * 2, atol=1e-6)
        for b, past in enumerate(shape[6]):  # nothing else is touched
            np.testing.assert_array_equal(stored[b, :, :past], before[b, :, :past])
            np.testing.assert_array_equal(stored[b, :, past + shape[1] :], before[b, :, past + shape[1] :])


@pytest.mark.parametrize("window", [0, 50])
def test_a_position_depends_neither_on_the_call_nor_on_the_capacity(device, window):
    tokens, past = 20, 120
    packed, cosine, sine, _, *caches = operands(1, tokens, 4, 2, 48, 140, [past], "float16")

    def one_by_one(pieces, capacity):
        keys, values = (np.concatenate([one, one], axis=2)[:, :, :capacity].copy() for one in caches)
        outputs, start = [], 0
        for piece in pieces:
            new = [one[:, start : start + piece] for one in (packed, cosine, sine)]
            length = np.array([past + start], np.int64)
            output, keys, values = run(device, *new, length, keys, values, window, "float16")
            outputs.append(output)
            start += piece
        return np.concatenate(outputs, axis=1), keys[:, :, :140]

    together, keys = one_by_one([tokens], 140)
    for pieces, capacity in (([1] * tokens, 140), ([7, 1, 12], 270)):
        output, grown = one_by_one(pieces, capacity)
        np.testing.assert_array_equal(output, together)
        np.testing.assert_array_equal(grown, keys)


def test_large_scores_and_what_is_not_finite(device):
    given = list(operands(1, 2, 2, 2, 32, 200, [130], "float16"))
    given[0][..., :64] *= 300
    expected, *_ = formula(*given, 0, "float16")
    output, *_ = run(device, *given, 0, "float16")
    np.testing.assert_allclose(output, expected, rtol=0, atol=5e-3)
    given[4][0, 1, 100] = np.nan
    output, *_ = run(device, *given, 0, "float16")
    assert np.isfinite(output[..., :32]).all()
    assert np.isnan(output[..., 32:]).all()


def test_a_length_beyond_the_capacity_touches_nothing_outside(device):
    """It is the caller's mistake, and on the GPU nobody sees it: but no memory may be harmed."""
    given = operands(1, 3, 2, 2, 32, 70, [69], "float16")
    _, keys, _ = run(device, *given, 0, "float16")
    np.testing.assert_array_equal(keys[:, :, :69], given[4][:, :, :69])


def test_wrong_operands_are_named(device):
    given = operands(1, 2, 4, 2, 8, 10, [3], "float16")
    with pytest.raises(ValueError, match=r"cosine must be \[1, 2, 4\], got \[1, 2, 3\]"):
        run(device, given[0], given[1][..., :3], *given[2:], 0, "float16")
    with pytest.raises(ValueError, match="caches must be float16 or bfloat16"):
        run(device, *given, 0, "int8")
    with pytest.raises(ValueError, match="the workspace is too small"):
        run(device, *given, 0, "float16", device.workspace(16, 4))
    with pytest.raises(ValueError, match="tokens must be 1 to 32"):
        run(device, *operands(1, 33, 4, 2, 8, 40, [3], "float16"), 0, "float16")
