"""Block quantisation: how far a weight may move, at every awkward size and value, and how int4 is packed."""

from __future__ import annotations

import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from healthgpt_edge.export.quantize import (
    BLOCK_SIZES,
    PANEL,
    Storage,
    dequantise,
    is_quantised,
    quantise,
    to_panels,
    to_rows,
)
from healthgpt_edge.export.weights import WeightFile, pack_int4
from healthgpt_edge.manifest import PRECISIONS

LOWEST = {TensorProto.INT4: -8, TensorProto.INT8: -128}
# A block below the least becomes zero; the greatest may move up by a step and must stay finite.
TINY, LEAST, GREATEST = float(np.finfo(np.float32).tiny), 512 * float(np.finfo(np.float32).tiny), 3e38
# Of a level up to 128 as a float32 product of two rounded factors, at the border between two.
SLACK = 1 + 1e-4
each_type = pytest.mark.parametrize("data_type", LOWEST, ids=["int4", "int8"])
each_block_size = pytest.mark.parametrize("block_size", BLOCK_SIZES)


@pytest.fixture(autouse=True)
def no_warnings():
    """What overflows or is not a number numpy tells by a warning first."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def random_weight(outputs: int, channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((outputs, channels)).astype(np.float32)


def blocks_of(matrix: np.ndarray, block_size: int) -> np.ndarray:
    """[C, O] as [blocks, block, O] in float64, filled up with zeros."""
    padded = np.pad(matrix.astype(np.float64), ((0, -len(matrix) % block_size), (0, 0)))
    return padded.reshape(-1, block_size, matrix.shape[1])


def check(weight: np.ndarray, data_type: int, block_size: int) -> None:
    """Shapes, types, ranges, and every value's error against the bound that the scale of its block sets."""
    outputs, channels = weight.shape
    values, scales = quantise(weight, data_type, block_size)
    assert (values.dtype, values.shape) == (np.int8, (channels, outputs))
    assert (scales.dtype, scales.shape) == (np.float32, (-(-channels // block_size), outputs))
    assert values.flags.c_contiguous and scales.flags.c_contiguous
    lowest, top = LOWEST[data_type], -LOWEST[data_type] - 1
    assert lowest <= values.min() and values.max() <= top
    assert np.isfinite(scales).all()

    original = blocks_of(weight.T, block_size)
    error = np.abs(blocks_of(dequantise(values, scales, block_size), block_size) - original)
    scale = scales.astype(np.float64)[:, None]
    levels = np.divide(original, scale, out=np.zeros_like(original), where=scale != 0)
    # Half a step, and what lies beyond the last levels.
    beyond = np.maximum(np.maximum(lowest - levels, levels - top), 0.5)
    assert (error <= np.where(scale == 0, np.abs(original), beyond * np.abs(scale) * SLACK)).all()
    # No block is worse off than with its greatest magnitude on the lowest level.
    peaks = np.abs(original).max(axis=1)
    smallest, greatest = original.min(axis=1, keepdims=True), original.max(axis=1, keepdims=True)
    highest = np.where(greatest > -smallest, greatest, smallest)  # of two as great, the negative one
    step = highest / lowest
    nearest = np.divide(original, step, out=np.zeros_like(original), where=step != 0).round().clip(lowest, top) * step
    # But for the rounding of its scale to bfloat16, by up to 1 / 128.
    assert (scales.astype(ml_dtypes.bfloat16).astype(np.float32) == scales).all()
    lost, whole = (np.linalg.norm(numbers, axis=1) for numbers in (nearest - original, original))
    assert (np.linalg.norm(error, axis=1) <= lost * SLACK + (whole + lost) / 128 + LEAST).all()
    # Only what float32 cannot scale in full becomes zero.
    assert (peaks[scales == 0] < LEAST).all()


@each_type
@each_block_size
@pytest.mark.parametrize(("outputs", "channels"), [(1, 1), (3, 31), (2, 32), (5, 33), (31, 64), (7, 129), (4, 4099)])
def test_no_value_moves_by_more_than_its_step_allows(data_type, block_size, outputs, channels):
    check(random_weight(outputs, channels), data_type, block_size)


@each_type
def test_matrices_larger_than_one_step_of_work(data_type):
    """More than the 2^18 values that are worked on at a time: the same as row by row."""
    weight = random_weight(300, 1000)
    values, scales = quantise(weight, data_type, 128)
    for row in (0, 261, 262, 263, 299):
        alone, alone_scales = quantise(weight[row : row + 1], data_type, 128)
        np.testing.assert_array_equal(values[:, row], alone[:, 0])
        np.testing.assert_array_equal(scales[:, row], alone_scales[:, 0])


@each_type
def test_one_row_longer_than_a_step_of_work(data_type):
    check(random_weight(2, (1 << 18) + 1), data_type, 32)


@each_type
def test_zeros_stay_zeros(data_type):
    weight = np.zeros((3, 70), np.float32)
    weight[1, 40] = 2.0
    values, scales = quantise(weight, data_type, 32)
    np.testing.assert_array_equal(dequantise(values, scales, 32), weight.T)
    assert scales[1, 1] != 0 and np.count_nonzero(scales) == 1
    check(-weight, data_type, 32)


@each_type
def test_the_sign_of_the_scale_is_that_of_the_greatest_entry(data_type):
    weight = np.array([[0.5, -2, 1], [0.5, 2, -1], [2, -2, 0]], np.float32)
    values, scales = quantise(weight, data_type, 32)
    lowest = LOWEST[data_type]
    assert np.sign(scales).tolist() == [[1, -1, 1]]
    np.testing.assert_allclose(np.abs(scales), 2 / -lowest, rtol=0.08)
    # Of 8 bits, 128 steps are 127 where the scale is rounded up by 1 / 128.
    assert all(lowest <= value <= lowest + (lowest == -128) for value in (values[1, 0], values[1, 1], values[1, 2]))
    # Of two equals one has no level, and takes the next.
    assert values[0, 2] == -lowest - 1
    check(weight, data_type, 32)


@each_type
@pytest.mark.parametrize(
    "row",
    [
        [GREATEST, -GREATEST, 1.0],
        [GREATEST, 0.0, TINY],
        [TINY, -TINY, 0.0],
        [TINY * 200, -TINY * 7, TINY],
        [1e-45, 0.0, -1e-45],
        [1e-40, 0.0, 3e-39],
        [-0.0, 0.0, -0.0],
        [1e38, 1e-38, -1e38],
        [1.0, 1e-45, -1.0],
    ],
)
def test_extreme_values(data_type, row):
    check(np.array([row], np.float32), data_type, 32)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-float(np.float32(GREATEST)), float(np.float32(GREATEST)), width=32), min_size=1, max_size=70),
    st.sampled_from(list(LOWEST)),
    st.sampled_from(BLOCK_SIZES),
)
@example([0.55, 0.74, 0.75, -0.75], TensorProto.INT4, 32)  # two as great
@example([2.7914003e37, 2.3820053e38], TensorProto.INT8, 32)  # nearly 15 steps, and 128
def test_any_finite_row(row, data_type, block_size):
    check(np.array([row, row[::-1]], np.float32), data_type, block_size)


@each_block_size
@pytest.mark.parametrize(("tail", "most"), [(None, 0.91), (5, 0.93)], ids=["normal", "long tails"])
def test_what_the_search_for_the_scale_gives_in_int4(block_size, tail, most):
    """Of the squared error of one level, -8. Measured: 0.89 to 0.91; 0.86 to 0.92 for Student's t with 5 degrees."""
    random = np.random.default_rng(0)
    draw = random.standard_normal if tail is None else lambda shape: random.standard_t(tail, shape)
    weight = draw((256, 4096)).astype(np.float32)
    values, scales = quantise(weight, TensorProto.INT4, block_size)
    found = np.square(dequantise(values, scales, block_size).T - weight).mean()
    grouped = weight.reshape(256, -1, block_size)
    step = np.take_along_axis(grouped, np.abs(grouped).argmax(axis=2)[..., None], axis=2) / -8
    nearest = np.square((grouped / step).round().clip(-8, 7) * step - grouped).mean()
    assert found < most * nearest


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 3), (64, 33), (7, 1), (5,), (0, 4)])
def test_int4_is_packed_as_onnx_packs_it(shape):
    values = np.random.default_rng(0).integers(-8, 8, shape).astype(np.int8)
    packed = pack_int4(values)
    assert (packed.dtype, packed.shape) == (np.uint8, (-(-values.size // 2),))
    tensor = helper.make_tensor("packed", TensorProto.INT4, shape, packed.tobytes(), raw=True)
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int8), values)


def test_every_pair_of_int4_neighbours():
    values = np.array([(low, high) for low in range(-8, 8) for high in range(-8, 8)], np.int8)
    assert pack_int4(values).tolist() == [(low & 15) | (high & 15) << 4 for low, high in values.tolist()]


@each_type
@each_block_size
@pytest.mark.parametrize(("outputs", "channels"), [(31, 64), (33, 130), (5, 8)])
def test_onnxruntime_reads_from_the_file_what_dequantise_says(tmp_path: Path, data_type, block_size, outputs, channels):
    """Odd outputs put the two neighbours of a byte into different rows; 130 and 8 leave a block unfinished."""
    values, scales = quantise(random_weight(outputs, channels), data_type, block_size)
    file = WeightFile(tmp_path / "weights.bin", "weights.bin")
    initializers = [
        file.put("values", data_type, lambda: values).initializer("values"),
        file.put("scales", TensorProto.FLOAT, lambda: scales).initializer("scales"),
    ]
    file.close()
    node = helper.make_node("DequantizeLinear", ["values", "scales"], ["weight"], axis=0, block_size=block_size)
    output = helper.make_tensor_value_info("weight", TensorProto.FLOAT, [channels, outputs])
    graph = helper.make_graph([node], "dequantise", [], [output], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {})
    np.testing.assert_array_equal(found, dequantise(values, scales, block_size))


def test_what_each_precision_stores_in_blocks():
    for precision in PRECISIONS:
        storage = Storage.of(precision)
        quantised = [name for name in storage.__slots__ if is_quantised(getattr(storage, name))]
        assert quantised == ([] if not precision.startswith("int") else ["linear", "adapter", "head", "vision"])
        assert Storage.of(precision, panels=True).panels == bool(quantised) and not storage.panels
    int4 = Storage.of("int4")
    assert {int4.linear, int4.adapter} == {TensorProto.INT4} and {int4.head, int4.vision} == {TensorProto.INT8}


def test_panels_are_columns_one_after_the_other():
    matrix = np.arange(5 * 384, dtype=np.float32).reshape(5, 384)
    panels = to_panels(matrix)
    assert panels.shape == (3, 5, PANEL) and panels.flags.c_contiguous
    for index, panel in enumerate(panels):
        np.testing.assert_array_equal(panel, matrix[:, index * PANEL : (index + 1) * PANEL])
    np.testing.assert_array_equal(to_rows(panels), matrix)
