"""Cached attention of every instruction set this machine has, against the formula in float64."""

import numpy as np
import pytest

from healthgpt_edge import _kernels

# float32 sums of order one; and caches rounded to float16.
TOLERANCE = {"float32": 2e-5, "float16": 2e-3}

each_target = pytest.mark.parametrize("target", _kernels.targets())
each_cache = pytest.mark.parametrize("cache", ["float32", "float16"])
# batch, tokens, heads, kv_heads, head size, capacity, past lengths, window
CASES = [
    (1, 1, 4, 4, 96, 70, [69], 0),
    (1, 1, 6, 2, 128, 700, [640], 0),
    (2, 3, 4, 2, 18, 40, [0, 37], 0),
    (1, 130, 4, 2, 64, 200, [5], 0),
    (1, 90, 2, 1, 32, 300, [200], 33),
    (1, 1, 2, 2, 6, 300, [250], 64),
    (1, 7, 10, 2, 10, 64, [57], 3),
]


def operands(batch, tokens, heads, kv_heads, size, capacity, past, cache, seed=0):
    random = np.random.default_rng(seed)

    def normal(*shape):
        return random.standard_normal(shape).astype(np.float32)

    new = [normal(batch, tokens, count * size) for count in (heads, kv_heads, kv_heads)]
    angles = random.uniform(0, 6, (batch, tokens, size // 2))
    caches = [normal(batch, kv_heads, capacity, size).astype(cache) for _ in range(2)]
    return [*new, np.cos(angles), np.sin(angles), np.array(past)], caches


def rotate(heads, cosine, sine):
    first, second = np.split(heads, 2, axis=-1)
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def formula(query, key, value, cosine, sine, past_length, keys, values, window):
    """The outputs and the caches after it, in float64 but for the caches' own rounding."""
    batch, tokens, _ = query.shape
    kv_heads, _, size = keys.shape[1:]
    keys, values = keys.copy(), values.copy()
    outputs = np.empty(query.shape)
    for b in range(batch):
        past = past_length[b]
        turns = cosine[b, :, None], sine[b, :, None]
        turned_query = rotate(query[b].astype(np.float64).reshape(tokens, -1, size), *turns)
        keys[b, :, past : past + tokens] = rotate(key[b].reshape(tokens, kv_heads, size), *turns).swapaxes(0, 1)
        values[b, :, past : past + tokens] = value[b].reshape(tokens, kv_heads, size).swapaxes(0, 1)
        group = turned_query.shape[1] // kv_heads
        for token in range(tokens):
            seen = slice(max(0, past + token - window) if window else 0, past + token + 1)
            for head in range(turned_query.shape[1]):
                scores = keys[b, head // group, seen].astype(np.float64) @ turned_query[token, head] / size**0.5
                shares = np.exp(scores - scores.max())
                shared = shares / shares.sum() @ values[b, head // group, seen].astype(np.float64)
                outputs[b, token, head * size : (head + 1) * size] = shared
    return outputs, keys, values


@each_target
@each_cache
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_equals_the_formula(case, cache, threads, target):
    *shape, window = case
    new, caches = operands(*shape, cache)
    expected, keys, values = formula(*new, *caches, window)
    before = [one.copy() for one in caches]
    output = _kernels.cached_attention(*new, *caches, window, target, threads)
    np.testing.assert_allclose(output, expected, rtol=0, atol=TOLERANCE[cache])
    rounding = 1e-6 if cache == "float32" else 1e-2  # one last place of float16 up to 8
    for found, wanted, kept in zip(caches, (keys, values), before, strict=True):
        np.testing.assert_allclose(found.astype(float), wanted.astype(float), rtol=0, atol=rounding)
        for b, past in enumerate(shape[6]):  # nothing else is touched
            np.testing.assert_array_equal(found[b, :, :past], kept[b, :, :past])
            np.testing.assert_array_equal(found[b, :, past + shape[1] :], kept[b, :, past + shape[1] :])


@each_target
@each_cache
@pytest.mark.parametrize("window", [0, 50])
def test_a_position_depends_neither_on_the_call_nor_on_the_threads(cache, window, target):
    """All tokens at once, in pieces, and one by one give the same bits, whatever the capacity."""
    tokens, past = 150, 20
    new, caches = operands(1, tokens, 4, 2, 48, 170, [past], cache)

    def run(pieces, threads, capacity=170):
        keys, values = (np.concatenate([one, one], axis=2)[:, :, :capacity].copy() for one in caches)
        outputs, start = [], 0
        for piece in pieces:
            part = [one[:, start : start + piece] for one in new[:5]]
            outputs.append(
                _kernels.cached_attention(*part, np.array([past + start]), keys, values, window, target, threads)
            )
            start += piece
        return np.concatenate(outputs, axis=1), keys[:, :, :170]

    together, keys = run([tokens], 1)
    for pieces, threads, capacity in (([tokens], 4, 170), ([1] * tokens, 2, 170), ([7, 64, 70, 9], 3, 333)):
        output, grown = run(pieces, threads, capacity)
        np.testing.assert_array_equal(output, together)
        np.testing.assert_array_equal(grown, keys)


@each_target
def test_large_and_very_different_scores(target):
    new, caches = operands(1, 2, 2, 2, 32, 200, [130], "float32")
    new[0] *= 300
    expected, *_ = formula(*new, *caches, 0)
    output = _kernels.cached_attention(*new, *caches, target=target)
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-3)


@each_target
def test_what_is_not_finite_stays_not_finite(target):
    new, caches = operands(1, 1, 2, 2, 32, 200, [130], "float32")
    caches[0][0, 1, 100] = np.nan
    output = _kernels.cached_attention(*new, *caches, target=target)
    assert np.isfinite(output[..., :32]).all()
    assert np.isnan(output[..., 32:]).all()


def test_wrong_operands_are_named():
    new, caches = operands(1, 2, 4, 2, 8, 10, [9], "float32")
    with pytest.raises(ValueError, match=r"past_length \+ tokens must be at most 10, got 9 \+ 2"):
        _kernels.cached_attention(*new, *caches)
    new[5] = np.array([3])
    with pytest.raises(ValueError, match="both float32 or both float16"):
        _kernels.cached_attention(*new, caches[0], caches[1].astype(np.float16))
    with pytest.raises(ValueError, match=r"key must be \[1, 2, 16\], got \[1, 2, 8\]"):
        _kernels.cached_attention(new[0], new[1][..., :8], *new[2:], *caches)
    with pytest.raises(ValueError, match="heads must be a multiple of kv_heads, got 3 and 2"):
        _kernels.cached_attention(new[0][..., :24], *new[1:], *caches)
