"""The scalar C++ H-LoRA linear against the formula in float64."""

import numpy as np
import pytest

from healthgpt_edge import _kernels

TOLERANCE = 1e-5


def reference(x, weight, bias, adapter_in, adapter_out, experts):
    rank = adapter_out.shape[0]
    low = x @ adapter_in
    routes = np.exp(low[:, rank:] - low[:, rank:].max(-1, keepdims=True))
    gate = routes / routes.sum(-1, keepdims=True)
    product = x @ weight + (low[:, :rank] * np.repeat(gate, rank // experts, -1)) @ adapter_out
    return product if bias is None else product + bias


def operands(rows, channels, outputs, rank, experts, seed=0):
    random = np.random.default_rng(seed)
    shapes = [(rows, channels), (channels, outputs), (outputs,), (channels, rank + experts), (rank, outputs)]
    return [random.standard_normal(shape).astype(np.float32) / 4 for shape in shapes]


@pytest.mark.parametrize("rows", [0, 1, 19, 99])
@pytest.mark.parametrize(("channels", "outputs", "rank", "experts"), [(31, 33, 8, 4), (7, 1, 2, 1), (64, 129, 12, 3)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_the_formula(rows, channels, outputs, rank, experts, with_bias):
    x, weight, bias, adapter_in, adapter_out = operands(rows, channels, outputs, rank, experts)
    bias = bias if with_bias else None
    y = _kernels.hlora_linear(x, weight, bias, adapter_in, adapter_out, experts)
    wide = [None if a is None else a.astype(np.float64) for a in (x, weight, bias, adapter_in, adapter_out)]
    np.testing.assert_allclose(y, reference(*wide, experts), rtol=TOLERANCE, atol=TOLERANCE)


def test_a_row_does_not_depend_on_the_others():
    x, weight, bias, adapter_in, adapter_out = operands(19, 33, 40, 8, 4)
    together = _kernels.hlora_linear(x, weight, bias, adapter_in, adapter_out, 4)
    for row in range(len(x)):
        alone = _kernels.hlora_linear(x[row : row + 1], weight, bias, adapter_in, adapter_out, 4)
        np.testing.assert_array_equal(alone[0], together[row])


def test_strided_input_is_read_as_it_is_seen():
    x, weight, bias, adapter_in, adapter_out = operands(6, 16, 8, 4, 2)
    doubled = np.repeat(x, 2, axis=0)
    np.testing.assert_array_equal(
        _kernels.hlora_linear(doubled[::2], weight, bias, adapter_in, adapter_out, 2),
        _kernels.hlora_linear(x, weight, bias, adapter_in, adapter_out, 2),
    )


def test_wrong_shapes_are_named():
    x, weight, bias, adapter_in, adapter_out = operands(2, 16, 8, 4, 2)
    with pytest.raises(ValueError, match=r"adapter_in must be \[16, 6\], got \[16, 5\]"):
        _kernels.hlora_linear(x, weight, bias, adapter_in[:, :5], adapter_out, 2)
    with pytest.raises(ValueError, match=r"bias must be \[8\], got \[7\]"):
        _kernels.hlora_linear(x, weight, bias[:7], adapter_in, adapter_out, 2)
    with pytest.raises(ValueError, match="rank must be a multiple of experts, got 4 and 3"):
        _kernels.hlora_linear(x, weight, bias, adapter_in, adapter_out, 3)
    with pytest.raises(ValueError, match="must have 2 dimensions"):
        _kernels.hlora_linear(x[0], weight, bias, adapter_in, adapter_out, 2)
