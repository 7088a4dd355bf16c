"""Cached attention of every instruction set this machine has, against the formula in float64."""

import numpy as np
import pytest

from healthgpt_edge import _kernels

# float32 sums of order one, over whatever the caches hold.
TOLERANCE = 2e-5

each_target = pytest.mark.parametrize("target", _kernels.targets())
each_cache = pytest.mark.parametrize("cache", ["float32", "float16", "int8"])
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
    rows = {name: normal(batch, kv_heads, capacity, size) for name in ("keys", "values")}
    caches = {name: array.astype(cache) for name, array in rows.items()}
    if cache == "int8":
        for name, array in rows.items():
            scale = np.abs(array).max(axis=-1, keepdims=True) / 127
            caches |= {name: np.rint(array / scale).astype(np.int8), f"{name[:-1]}_scales": scale}
    return [*new, np.cos(angles), np.sin(angles), np.array(past)], caches


def rotate(heads, cosine, sine):
    first, second = np.split(heads, 2, axis=-1)
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def heads_of(rows, size):
    """[B, S, heads * D] -> [B, heads, S, D] in float64."""
    return rows.astype(np.float64).reshape(*rows.shape[:2], -1, size).swapaxes(1, 2)


def widened(caches):
    """The keys and values that caches hold, in float64."""
    return [caches[f"{name}s"].astype(np.float64) * caches.get(f"{name}_scales", 1.0) for name in ("key", "value")]


def new_rows(new, size):
    """The keys and values that a call appends, [B, K, S, D]."""
    _, key, value, cosine, sine, _ = new
    return rotate(heads_of(key, size), cosine[:, None], sine[:, None]), heads_of(value, size)


def formula(new, caches, window):
    """Attention over the caches as they are after the call, in float64."""
    query, _, _, cosine, sine, past_length = new
    keys, values = widened(caches)
    size = keys.shape[-1]
    turned = rotate(heads_of(query, size), cosine[:, None], sine[:, None])
    group = turned.shape[1] // keys.shape[1]
    outputs = np.empty(turned.shape)
    for batch, head, token in np.ndindex(turned.shape[:3]):
        position = past_length[batch] + token
        seen = slice(max(0, position - window) if window else 0, position + 1)
        scores = keys[batch, head // group, seen] @ turned[batch, head, token] / size**0.5
        shares = np.exp(scores - scores.max())
        outputs[batch, head, token] = shares / shares.sum() @ values[batch, head // group, seen]
    return outputs.swapaxes(1, 2).reshape(query.shape)


def half_a_step(cache, rows, caches):
    """How far the rounding of a cache may take rows, [B, K, M, 1]."""
    if cache == "int8":
        return [caches[name] * 0.50001 for name in ("key_scales", "value_scales")]
    share = 1e-6 if cache == "float32" else 2.0**-11 * 1.001
    return [np.abs(one).max(axis=-1, keepdims=True) * share for one in rows]


@each_target
@each_cache
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_equals_the_formula(case, cache, threads, target):
    *shape, window = case
    new, caches = operands(*shape, cache)
    tokens, size = shape[1], shape[4]
    before = {name: one.copy() for name, one in caches.items()}
    output = _kernels.cached_attention(*new, **caches, window=window, target=target, threads=threads)
    np.testing.assert_allclose(output, formula(new, caches, window), rtol=0, atol=TOLERANCE)
    found = widened(caches)
    for rows, exact, most in zip(found, new_rows(new, size), half_a_step(cache, found, caches), strict=True):
        for b, past in enumerate(shape[6]):
            written = slice(past, past + tokens)
            assert (np.abs(rows[b, :, written] - exact[b]) <= most[b, :, written] + 1e-6).all()
    for name, one in caches.items():
        for b, past in enumerate(shape[6]):  # nothing else is touched
            np.testing.assert_array_equal(one[b, :, :past], before[name][b, :, :past])
            np.testing.assert_array_equal(one[b, :, past + tokens :], before[name][b, :, past + tokens :])


@each_target
@each_cache
@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("heads", [2, 4])
def test_a_position_depends_neither_on_the_call_nor_on_the_threads(cache, window, heads, target):
    """All tokens at once, in pieces, and one by one give the same bits, whatever the capacity."""
    tokens, past = 150, 20
    new, caches = operands(1, tokens, heads, 2, 48, 170, [past], cache)

    def run(pieces, threads, capacity=170):
        grown = {name: np.concatenate([one, one], axis=2)[:, :, :capacity].copy() for name, one in caches.items()}
        outputs, start = [], 0
        for piece in pieces:
            part = [one[:, start : start + piece] for one in new[:5]]
            length, options = np.array([past + start]), {"window": window, "target": target, "threads": threads}
            outputs.append(_kernels.cached_attention(*part, length, **grown, **options))
            start += piece
        return np.concatenate(outputs, axis=1), {name: one[:, :, :170] for name, one in grown.items()}

    together, kept = run([tokens], 1)
    for pieces, threads, capacity in (
        ([tokens], 4, 170),
        ([1] * tokens, 2, 170),
        ([7, 64, 70, 9], 3, 333),
        ([5, 3, 142], 1, 170),
    ):
        output, grown = run(pieces, threads, capacity)
        np.testing.assert_array_equal(output, together)
        for name, one in kept.items():
            np.testing.assert_array_equal(grown[name], one)


@each_target
def test_large_and_very_different_scores(target):
    new, caches = operands(1, 2, 2, 2, 32, 200, [130], "float32")
    new[0] *= 300
    output = _kernels.cached_attention(*new, **caches, target=target)
    np.testing.assert_allclose(output, formula(new, caches, 0), rtol=0, atol=1e-3)


@each_target
@each_cache
def test_what_is_not_finite_stays_not_finite(cache, target):
    """Of the past, and of what a call appends itself."""
    new, caches = operands(1, 1, 2, 2, 32, 200, [130], cache)
    caches["key_scales" if cache == "int8" else "keys"][0, 1, 100] = np.nan
    output = _kernels.cached_attention(*new, **caches, target=target)
    assert np.isfinite(output[..., :32]).all()
    assert np.isnan(output[..., 32:]).all()
    for number in (np.nan, np.inf):
        new, caches = operands(1, 1, 2, 2, 32, 200, [130], cache)
        new[2][0, 0, 3] = number
        output = _kernels.cached_attention(*new, **caches, target=target)
        assert not np.isfinite(output[0, 0, 3])
        assert np.isfinite(output[..., 32:]).all()


@each_target
@pytest.mark.parametrize("size", [6, 48])
def test_rows_of_an_int8_cache(size, target):
    """Zeros, the smallest numbers and the largest, and ties; every row by itself."""
    new, caches = operands(1, 4, 2, 2, size, 10, [2], "int8")
    value = np.zeros((4, 2, size), np.float32)
    value[1] = 1e-38
    value[2, :, :4] = [3e38, -3e38, 1.5e38, 0]
    value[3, :, :4] = [127, 0.5, 1.5, -2.5]
    new[2] = value.reshape(1, 4, -1)
    _kernels.cached_attention(*new, **caches, target=target)
    rows, scales = caches["values"][0, :, 2:6], caches["value_scales"][0, :, 2:6, 0]
    np.testing.assert_array_equal(rows[:, 0], 0)
    np.testing.assert_array_equal(scales[:, 0], 0)
    np.testing.assert_array_equal(rows[:, 1], 0)
    np.testing.assert_array_equal(rows[:, 2, :4], [[127, -127, 64, 0]] * 2)
    np.testing.assert_array_equal(rows[:, 3, :4], [[127, 0, 2, -2]] * 2)
    np.testing.assert_allclose(scales[:, 2:], [[3e38 / 127, 1]] * 2, rtol=1e-6)


def test_wrong_operands_are_named():
    new, caches = operands(1, 2, 4, 2, 8, 10, [9], "float32")
    with pytest.raises(ValueError, match=r"past_length \+ tokens must be at most 10, got 9 \+ 2"):
        _kernels.cached_attention(*new, **caches)
    for length in (2**63 - 1, -1):  # plus 2 the first is a negative number
        new[5] = np.array([length])
        with pytest.raises(ValueError, match=rf"past_length \+ tokens must be at most 10, got {length} \+ 2"):
            _kernels.cached_attention(*new, **caches)
    new[5] = np.array([3])
    with pytest.raises(ValueError, match="window must be 0 or more, got -1"):
        _kernels.cached_attention(*new, **caches, window=-1)
    keys, values = caches.values()
    with pytest.raises(ValueError, match="both float32, both float16 or both int8"):
        _kernels.cached_attention(*new, keys, values.astype(np.float16))
    with pytest.raises(ValueError, match="both float32, both float16 or both int8"):
        _kernels.cached_attention(*new, keys.astype(np.int32), values.astype(np.int32))
    with pytest.raises(ValueError, match=r"key must be \[1, 2, 16\], got \[1, 2, 8\]"):
        _kernels.cached_attention(new[0], new[1][..., :8], *new[2:], **caches)
    with pytest.raises(ValueError, match="heads must be a multiple of kv_heads, got 3 and 2"):
        _kernels.cached_attention(new[0][..., :24], *new[1:], **caches)
    scales = {name: np.ones((1, 2, 10, 1), np.float32) for name in ("key_scales", "value_scales")}
    bytes_only = {name: one.astype(np.int8) for name, one in caches.items()}
    for some in (caches | scales, bytes_only, bytes_only | {"key_scales": scales["key_scales"]}):
        with pytest.raises(ValueError, match="key_scales and value_scales go with int8 caches, and only with them"):
            _kernels.cached_attention(*new, **some)
    with pytest.raises(ValueError, match=r"scales must be \[1, 2, 10, 1\], got \[1, 2, 10\]"):
        _kernels.cached_attention(*new, **bytes_only, **{name: one[..., 0] for name, one in scales.items()})
    with pytest.raises(ValueError, match="scales must be writable C arrays of float32"):
        _kernels.cached_attention(*new, **bytes_only, **{name: one.astype(np.float16) for name, one in scales.items()})
