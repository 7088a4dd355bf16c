"""The CUDA decode attention against the formula in float64, and against itself."""

from __future__ import annotations

import numpy as np
import pytest
from formats import exact, store

# The caches' own rounding of what is appended, in an average of such values; all else is float32.
TOLERANCE = {"float16": 1e-3, "bfloat16": 1e-2, "int8": 2e-2}
each_cache = pytest.mark.parametrize("cache", list(TOLERANCE))
# batch, tokens, heads, kv_heads, head size, capacity, past lengths, window
CASES = [
    (1, 1, 4, 4, 96, 70, [69], 0),
    (1, 1, 6, 2, 128, 300, [255], 0),
    (2, 3, 4, 2, 18, 70, [0, 62], 0),
    (1, 19, 10, 2, 10, 150, [120], 0),
    (1, 1, 2, 1, 6, 300, [250], 64),
    (1, 7, 2, 2, 32, 200, [150], 33),
    (2, 75, 2, 1, 16, 160, [3, 60], 40),
    (1, 1, 5, 1, 24, 200, [130], 0),
    (2, 1, 64, 64, 2, 400, [390, 350], 0),  # more chunks than blocks to a head
]


def store_rows(values, cache):
    """Rows as a cache keeps them: stored numbers, and what one step of bytes is worth, [..., 1]."""
    if cache != "int8":
        return store(values, cache), np.ones((*values.shape[:-1], 1), np.float32)
    scales = (np.abs(values).max(axis=-1, keepdims=True) / 127).astype(np.float32)
    return np.rint(values / scales).astype(np.int8), scales


def rows(stored, scales, cache):
    return exact(stored, cache) * scales


def operands(batch, tokens, heads, kv_heads, size, capacity, past, cache, seed=0):
    """packed, cosine and sine, past lengths, and the caches: keys, values and the scales of both."""
    random = np.random.default_rng(seed)
    packed = random.standard_normal((batch, tokens, (heads + 2 * kv_heads) * size)).astype(np.float32)
    angles = random.uniform(0, 6, (batch, tokens, size // 2)).astype(np.float32)
    stored = [store_rows(random.standard_normal((batch, kv_heads, capacity, size)), cache) for _ in range(2)]
    caches = [one for pair in zip(*stored, strict=True) for one in pair]
    return packed, np.cos(angles), np.sin(angles), np.array(past, np.int64), *caches


def rotate(heads, cosine, sine):
    first, second = np.split(heads, 2, axis=-1)
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def formula(packed, cosine, sine, past_length, keys, values, key_scales, value_scales, window, cache):
    """The outputs and the caches after it."""
    (batch, tokens, _), (_, kv_heads, _, size) = packed.shape, keys.shape
    split = packed.astype(np.float64).reshape(batch, tokens, -1, size)
    heads = split.shape[2] - 2 * kv_heads
    turned = rotate(split[:, :, : heads + kv_heads], cosine[:, :, None], sine[:, :, None])
    query, key, value = turned[:, :, :heads], turned[:, :, heads:], split[:, :, heads + kv_heads :]
    caches = [one.copy() for one in (keys, values, key_scales, value_scales)]
    outputs = np.empty((batch, tokens, heads, size))
    for b, past in enumerate(past_length):
        new = zip(store_rows(key[b].swapaxes(0, 1), cache), store_rows(value[b].swapaxes(0, 1), cache), strict=True)
        for grown, one in zip(caches, (one for pair in new for one in pair), strict=True):
            grown[b, :, past : past + tokens] = one
        for token, head in np.ndindex(tokens, heads):
            seen = slice(max(0, past + token - window) if window else 0, past + token + 1)
            of_head = b, head // (heads // kv_heads), seen
            scores = rows(caches[0][of_head], caches[2][of_head], cache) @ query[b, token, head] / size**0.5
            shares = np.exp(scores - scores.max())
            outputs[b, token, head] = shares / shares.sum() @ rows(caches[1][of_head], caches[3][of_head], cache)
    return outputs.reshape(batch, tokens, -1), *caches


def run(device, packed, cosine, sine, past_length, *more, by="cached_attention"):
    """The outputs and the caches, which the call has changed; `more` are the caches, the window, the format."""
    (*caches, window, cache), workspace = more[:6], more[6] if len(more) > 6 else None
    (batch, tokens, width), (_, kv_heads, capacity, size) = packed.shape, caches[0].shape
    heads = width // size - 2 * kv_heads
    if by == "cached_attention" and workspace is None:
        needed = device.kernels.cached_attention_workspace_bytes(batch, tokens, heads, kv_heads, size, capacity)
        workspace = device.workspace(needed, batch * kv_heads)
    output = device.poisoned(batch, tokens, heads * size)
    put = [device.put(one) for one in (packed, cosine, sine, past_length, *caches)]
    scales = {}
    if cache == "int8":
        put[6:] = [device.put(one[..., 0]) for one in caches[2:]]
        scales = {"key_scales": put[6], "value_scales": put[7]}
    memory = [] if workspace is None else [workspace]  # the others need none, or have their own
    getattr(device.kernels, by)(*put[:6], output, *memory, cache, window, **scales)
    found = [device.get(one) for one in put[4:]]
    if cache == "int8":
        found[2:] = [one[..., None] for one in found[2:]]
    return device.get(output), *found


def partly_filled(shape, cache):
    """`operands` whose caches hold anything in rows that are not filled yet."""
    given = operands(*shape, cache)
    for stored in given[6:] if cache == "int8" else given[4:6]:
        for b, past in enumerate(shape[6]):
            stored[b, :, past:] = np.nan if cache == "int8" else store(np.array(np.nan), cache)
    return given


@each_cache
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_formula(device, case, cache):
    *shape, window = case
    given = partly_filled(shape, cache)
    expected, *wanted_caches = formula(*given, window, cache)
    output, *found = run(device, *given, window, cache)
    np.testing.assert_allclose(output, expected, rtol=0, atol=TOLERANCE[cache])
    for stored, wanted, before in zip(found, wanted_caches, given[4:], strict=True):
        # A rotated number between two of the cache's may fall to either.
        numbers = (stored, wanted) if stored.dtype == np.float32 else (exact(stored, cache), exact(wanted, cache))
        one = 1.0 if stored.dtype == np.int8 else 1e-6
        np.testing.assert_allclose(*numbers, rtol=TOLERANCE[cache] * 2, atol=one)
        for b, past in enumerate(shape[6]):  # nothing else is touched
            np.testing.assert_array_equal(stored[b, :, :past], before[b, :, :past])
            np.testing.assert_array_equal(stored[b, :, past + shape[1] :], before[b, :, past + shape[1] :])


@pytest.mark.parametrize("cache", ["float16", "int8"])
# Rows at a time: 1, 4 or 5, and others in a call of more tokens.
@pytest.mark.parametrize(("heads", "window"), [(2, 50), (4, 0), (4, 50), (10, 0)])
def test_a_position_depends_neither_on_the_call_nor_on_the_capacity(device, heads, window, cache):
    tokens, past = 40, 100
    packed, cosine, sine, _, *caches = operands(1, tokens, heads, 2, 48, 140, [past], cache)

    def one_by_one(pieces, capacity):
        grown = [np.concatenate([one, one], axis=2)[:, :, :capacity].copy() for one in caches]
        outputs, start = [], 0
        for piece in pieces:
            new = [one[:, start : start + piece] for one in (packed, cosine, sine)]
            length = np.array([past + start], np.int64)
            output, *grown = run(device, *new, length, *grown, window, cache)
            outputs.append(output)
            start += piece
        return np.concatenate(outputs, axis=1), grown[0][:, :, :140]

    together, keys = one_by_one([tokens], 140)
    for pieces, capacity in (([1] * tokens, 140), ([7, 1, 32], 270)):
        output, grown = one_by_one(pieces, capacity)
        np.testing.assert_array_equal(output, together)
        np.testing.assert_array_equal(grown, keys)


# By the kernels of decode steps and of prompts: how many tokens, and what 11 bits of a query move a score of thousands.
@pytest.mark.parametrize(
    ("by", "tokens", "tolerance"), [("cached_attention", 2, 5e-3), ("cached_attention_prefill", 66, 0.1)]
)
def test_large_scores_and_what_is_not_finite(device, by, tokens, tolerance):
    given = list(operands(1, tokens, 2, 2, 32, 200, [130], "float16"))
    given[0][..., :64] *= 300
    expected, *_ = formula(*given, 0, "float16")
    output, *_ = run(device, *given, 0, "float16", by=by)
    np.testing.assert_allclose(output, expected, rtol=0, atol=tolerance)
    given[4][0, 1, 100] = np.nan
    output, *_ = run(device, *given, 0, "float16", by=by)
    assert np.isfinite(output[..., :32]).all()
    assert np.isnan(output[..., 32:]).all()


@pytest.mark.parametrize(
    ("by", "tokens", "capacity"), [("cached_attention", 3, 70), ("cached_attention_prefill", 70, 100)]
)
def test_a_length_beyond_the_capacity_touches_nothing_outside(device, by, tokens, capacity):
    """It is the caller's mistake, and on the GPU nobody sees it: but no memory may be harmed."""
    given = operands(1, tokens, 2, 2, 32, capacity, [69], "float16")
    _, keys, *_ = run(device, *given, 0, "float16", by=by)
    np.testing.assert_array_equal(keys[:, :, :69], given[4][:, :, :69])


def test_wrong_operands_are_named(device):
    given = operands(1, 2, 4, 2, 8, 10, [3], "float16")
    with pytest.raises(ValueError, match=r"cosine must be \[1, 2, 4\], got \[1, 2, 3\]"):
        run(device, given[0], given[1][..., :3], *given[2:], 0, "float16")
    with pytest.raises(ValueError, match="caches must be float16, bfloat16 or int8"):
        run(device, *given, 0, "int4")
    with pytest.raises(ValueError, match=r"keys must be \[1, 2, 10, 8\] of 8 bits, got \[1, 2, 10, 8\] of 16"):
        run(device, *given, 0, "int8")
    with pytest.raises(ValueError, match="the workspace is too small"):
        run(device, *given, 0, "float16", device.workspace(16, 4))
    bytes_alone = device.put(given[4].astype(np.int8)), device.put(given[5].astype(np.int8))
    put = [device.put(one) for one in given[:4]]
    output, workspace = device.poisoned(1, 2, 32), device.workspace(1 << 16, 4)
    with pytest.raises(ValueError, match="int8 caches, and no others, must come with scales"):
        device.kernels.cached_attention(*put, *bytes_alone, output, workspace, "int8")
