"""The attention of the vision tower by every instruction set this machine has, against its definition in float64."""

import numpy as np
import pytest

from healthgpt_edge import _kernels

# By the size of the numbers: scores reach 20 and 360, and float32 rounds them as coarsely. NumPy's float32 is as near,
# 1.2e-5 and 6e-4.
TOLERANCES = {2.0: 2e-5, 8.0: 1e-3}

# batch, tokens, heads, numbers of a head. No token, one, a query and a key more than a group and a block, more than a
# task; heads below a vector, of odd sizes, and CLIP's.
CASES = [
    (1, 0, 2, 8),
    (1, 1, 1, 1),
    (2, 65, 3, 5),
    (1, 64, 1, 33),
    (2, 130, 2, 72),
    (1, 257, 4, 64),
]
each_target = pytest.mark.parametrize("target", _kernels.targets())
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def draw(case, scale=2.0):
    batch, tokens, heads, size = case
    random = np.random.default_rng(0)
    return (random.standard_normal((batch, tokens, 3 * heads * size)) * scale).astype(np.float32)


def definition(packed, heads):
    batch, tokens, width = packed.shape
    by_head = packed.astype(np.float64).reshape(batch, tokens, 3, heads, width // (3 * heads)).transpose(2, 0, 3, 1, 4)
    query, key, value = by_head
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    shares = np.exp(scores - scores.max(-1, keepdims=True, initial=-np.inf))
    shares /= shares.sum(-1, keepdims=True)
    return (shares @ value).transpose(0, 2, 1, 3).reshape(batch, tokens, width // 3)


@each_target
@each_case
@pytest.mark.parametrize("scale", TOLERANCES)
def test_the_definition(case, scale, target):
    """Also where most shares are 0, and the largest score of a block is far from that of the blocks before."""
    packed = draw(case, scale)
    found = _kernels.packed_attention(packed, case[2], target=target)
    np.testing.assert_allclose(found, definition(packed, case[2]), rtol=0, atol=TOLERANCES[scale])


@each_target
@each_case
def test_threads_change_nothing(case, target):
    packed = draw(case)
    one = _kernels.packed_attention(packed, case[2], target=target)
    for threads in (2, 3, 4):
        np.testing.assert_array_equal(_kernels.packed_attention(packed, case[2], target=target, threads=threads), one)


@each_target
def test_a_picture_does_not_depend_on_its_neighbours(target):
    packed = draw((3, 70, 2, 16))
    together = _kernels.packed_attention(packed, 2, target=target)
    np.testing.assert_array_equal(together[1:2], _kernels.packed_attention(packed[1:2], 2, target=target))


@each_target
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(value, target):
    packed = draw((1, 70, 1, 16))
    for part in range(3):  # of a query, a key and a value
        given = packed.copy()
        given[0, 66, part * 16 + 3] = value
        found = _kernels.packed_attention(given, 1, target=target)[0]
        # A key that is infinite in one place has no share where it is infinitely far from the query.
        sees = packed[0, :, 3] > 0 if value == np.inf else np.full(70, True)
        if part == 0:
            assert np.isnan(found[66]).all() and np.isfinite(np.delete(found, 66, axis=0)).all()
        elif part == 1:
            assert np.isnan(found[sees]).all() and np.isfinite(found[~sees]).all()
        else:
            assert not np.isfinite(found[:, 3]).any() and np.isfinite(np.delete(found, 3, axis=1)).all()


def test_wrong_operands_are_named():
    packed = np.zeros((1, 4, 24), np.float32)
    with pytest.raises(ValueError, match=r"packed must end in 3 \* 3 \* D numbers, got 24"):
        _kernels.packed_attention(packed, 3)
    with pytest.raises(ValueError, match=r"packed must end in 3 \* 0 \* D numbers, got 24"):
        _kernels.packed_attention(packed, 0)
    with pytest.raises(ValueError, match=r"packed must end in 3 \* 1 \* D numbers, got 25"):
        _kernels.packed_attention(np.zeros((1, 4, 25), np.float32), 1)
    with pytest.raises(ValueError, match="packed must have 3 dimensions"):
        _kernels.packed_attention(packed[0], 2)
