"""The convolution of every instruction set this machine has, against its definition in float64."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from healthgpt_edge import _kernels

# Relative to the largest result: Winograd's transforms lose a digit against direct float32 sums; measured up to 1.2e-5.
TOLERANCE = 4e-5

# batch, height, width, channels, outputs, groups, enlarge, residual. Pictures that no tile of 4x4 fits, single pixels,
# channels below and above a vector, tails of a strip and of a part of the outputs, more tiles than a group and a band.
CASES = [
    (1, 1, 1, 4, 1, 2, 1, False),
    (1, 5, 7, 8, 5, 4, 1, True),
    (2, 4, 4, 3, 70, 0, 1, False),
    (1, 9, 6, 36, 130, 6, 2, True),
    (2, 3, 2, 20, 16, 0, 2, False),
    (1, 33, 70, 24, 300, 8, 1, True),
    (1, 130, 9, 16, 3, 1, 1, False),
    (1, 0, 5, 4, 4, 2, 1, False),
]
each_target = pytest.mark.parametrize("target", _kernels.targets())
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def operands(case, seed=0):
    batch, height, width, channels, outputs, groups, enlarge, residual = case
    random = np.random.default_rng(seed)

    def draw(*shape):
        return random.standard_normal(shape).astype(np.float32)

    given = {
        "x": draw(batch, height, width, channels) * 2 + 0.5,
        "weight": draw(3, 3, channels, outputs) / (9 * channels) ** 0.5,
        "bias": draw(outputs),
        "groups": groups,
        "enlarge": enlarge,
    }
    if groups:
        given |= {"norm_weight": draw(channels), "norm_bias": draw(channels)}
    if residual:
        given["residual"] = draw(batch, enlarge * height, enlarge * width, outputs)
    return given


def definition(x, weight, bias, groups, enlarge, norm_weight=None, norm_bias=None, residual=None):
    x, weight, bias = (torch.from_numpy(array).double() for array in (x, weight, bias))
    picture = x.permute(0, 3, 1, 2)
    if groups:
        grouped = picture.reshape(len(picture), groups, -1)
        variance, mean = torch.var_mean(grouped, -1, correction=0, keepdim=True)
        picture = ((grouped - mean) / (variance + 1e-6).sqrt()).reshape(picture.shape)
        scale, shift = (torch.from_numpy(array).double()[:, None, None] for array in (norm_weight, norm_bias))
        picture = functional.silu(picture * scale + shift)
    if enlarge == 2:
        picture = picture.repeat_interleave(2, 2).repeat_interleave(2, 3)
    y = functional.conv2d(picture, weight.permute(3, 2, 0, 1), bias, padding=1).permute(0, 2, 3, 1).numpy()
    return y if residual is None else y + residual


@each_target
@each_case
def test_the_definition(case, target):
    given = operands(case)
    found = _kernels.convolution(**given, target=target)
    if not found.size:
        assert found.shape == (1, 0, 5, 4)
        return
    expected = definition(**given)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@each_target
@pytest.mark.parametrize("case", CASES[1:6], ids=str)
def test_weights_of_float16_are_widened(case, target):
    given = operands(case)
    half = given["weight"].astype(np.float16)
    found = _kernels.convolution(**given | {"weight": half}, target=target)
    np.testing.assert_array_equal(
        found, _kernels.convolution(**given | {"weight": half.astype(np.float32)}, target=target)
    )


@each_target
def test_every_weight_and_pixel_has_its_place(target):
    """One pixel and one weight at a time: the transforms must not mix places, nor one picture with the next."""
    for row in range(3):
        for column in range(3):
            x = np.zeros((2, 6, 5, 2), np.float32)
            weight = np.zeros((3, 3, 2, 3), np.float32)
            x[1, 2, 3, 1] = 1
            weight[row, column, 1, 2] = 1
            y = _kernels.convolution(x, weight, np.zeros(3, np.float32), target=target)
            expected = np.zeros_like(y)
            expected[1, 3 - row, 4 - column, 2] = 1
            np.testing.assert_allclose(y, expected, atol=1e-6)


@each_target
@pytest.mark.parametrize("case", CASES[3:6], ids=str)
def test_threads_change_nothing(case, target):
    given = operands(case)
    one = _kernels.convolution(**given, target=target, threads=1)
    for threads in (2, 3, 4):
        np.testing.assert_array_equal(_kernels.convolution(**given, target=target, threads=threads), one)


@each_target
def test_a_picture_does_not_depend_on_its_neighbours(target):
    given = operands((3, 9, 10, 16, 5, 4, 1, True))
    one = {name: array[1:2] if name in ("x", "residual") else array for name, array in given.items()}
    together, alone = (_kernels.convolution(**arguments, target=target) for arguments in (given, one))
    np.testing.assert_array_equal(together[1:2], alone)


@each_target
def test_a_large_mean_does_not_drown_the_variance(target):
    given = operands((1, 16, 16, 16, 8, 4, 1, False))
    given["x"] = (given["x"] / 8 + 500).astype(np.float32)
    expected = definition(**given)
    found = _kernels.convolution(**given, target=target)
    # x itself is rounded at 500: 3e-5 of a standard deviation of 0.25.
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-4 * np.abs(expected).max())


@each_target
@pytest.mark.parametrize("groups", [0, 4])
def test_extremes(groups, target):
    """Far below zero swish is zero; what is not finite stays so."""
    given = operands((1, 8, 8, 8, 4, groups, 1, False))
    if groups:
        given["norm_bias"] = np.full(8, -1e4, np.float32)
        np.testing.assert_allclose(
            _kernels.convolution(**given, target=target), np.broadcast_to(given["bias"], (1, 8, 8, 4)), atol=1e-6
        )
    given["x"][0, 3, 3, 2] = np.nan
    assert np.isnan(_kernels.convolution(**given, target=target)[0, 3, 3]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enlarge": 3}, "enlarge must be 1 or 2, got 3"),
        ({"groups": 3}, "groups must be 0 or divide 8 channels, got 3"),
        (
            {"x": np.zeros((1, 5, 7, 0)), "weight": np.zeros((3, 3, 0, 5)), "groups": 4},
            "groups must be 0 or divide 0 channels, got 4",
        ),
        ({"groups": 0}, "groups, norm_weight and norm_bias go together"),
        ({"x": np.zeros((5, 7, 8))}, "x and weight must have 4 dimensions"),
        ({"weight": np.zeros((3, 3, 7, 5))}, r"weight must be \[3, 3, 8, 5\], got \[3, 3, 7, 5\]"),
        ({"bias": np.zeros(6)}, r"bias must be \[5\], got \[6\]"),
        ({"norm_bias": np.zeros(5)}, r"norm_bias must be \[8\], got \[5\]"),
        ({"residual": np.zeros((1, 5, 7, 8))}, r"residual must be \[1, 5, 7, 5\], got \[1, 5, 7, 8\]"),
    ],
)
def test_wrong_operands_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        _kernels.convolution(**operands(CASES[1]) | change)
