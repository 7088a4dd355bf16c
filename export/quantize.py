"""Weight-only block quantisation, stored as standard QuantizeLinear/DequantizeLinear operands.

A weight [C, O] is cut along its input axis C into blocks of `block_size`; each block of each output column has one
scale and no zero point, the form that executors recognise and keep packed (`w = scale * q`). Scales are numbers of
bfloat16, whose range is float32's. Weights are rounded to multiples of these, so little is lost.

Values and scales lie in rows, or in panels of 128 outputs, one panel after the other. Our kernels go through few rows'
products panel by panel, and so read memory in order. Other executors recognise only rows, and only scales of float32.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from onnx import TensorProto

BLOCK_SIZES = (32, 64, 128)
LAYOUTS = ("panels", "rows")
PANEL = 128  # outputs; of the kernels (csrc/hlora_linear/hlora_linear.h), too
# Types of keys and values, by their name in the manifest.
CACHE_TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "int8": TensorProto.INT8}

# The levels that the entry of largest magnitude in a block may map to. With 8 bits one is as good as several.
_LEVELS = {TensorProto.INT4: (-7.5, -8.0, -8.5, -9.0), TensorProto.INT8: (-128.0,)}
_LEAST_PEAK = 512 * np.finfo(np.float32).tiny

# Values per work item: few enough to stay in a core's cache through all the passes below.
_VALUES_PER_STEP = 1 << 18
_ROWS_PER_MOVE = 256


@dataclass(frozen=True, slots=True)
class Storage:
    """How a bundle stores each kind of tensor, as onnx.TensorProto types.

    linear: base matrices. adapter: [A;R] and B. head: the output head. vision: tower and projector. table: the
    embedding, of which only the rows of a prompt are ever read. picture: the VQGAN's 3x3 convolutions. cache: keys and
    values, which the runtime keeps. panels: whether base matrices and B lie in panels.
    """

    linear: int
    adapter: int
    head: int
    vision: int
    table: int
    picture: int
    cache: int
    panels: bool = False

    @classmethod
    def of(cls, precision: str, cache: str | None = None, panels: bool = False) -> Storage:
        """The storage of a precision, with caches of another type than its own where `cache` names one.

        `panels`, which is for linears of whole panels, is of no effect for floats: their rows are wide enough.

        Adapters take the type of the base: their product is the smaller summand of every linear, so the same
        relative rounding error weighs less there, and at rank 256 an 8-bit adapter would add 22% to the bytes of
        a 4-bit token instead of 11%. Head and vision keep 8 bits at `int4`: the head's rounding goes straight into
        the logits, and the tower runs once per picture, so 4 bits would save little there. Caches are float32 only
        where the ids must be the original's; float16 rounds keys and values no more than the matrices that made them.
        The VQGAN is never rounded to integers, for a wrong level in a picture is visible.

        `bf16` has the range of the released bases, which are bfloat16, where float16 ends at 65504 and loses what is
        small. Its VQGAN, of which the same holds as above, and its caches stay float16: neither needs that range, 11
        bits round less than 8, and their kernels read no other type of 16 bits.
        """
        float32, float16, bfloat16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
        int8, int4 = TensorProto.INT8, TensorProto.INT4
        storage = {
            "fp32": cls(*[float32] * 7),
            "fp16": cls(*[float16] * 7),
            "bf16": cls(*[bfloat16] * 5, float16, float16),
            "int8": cls(int8, int8, int8, int8, float16, float16, float16),
            "int4": cls(int4, int4, int8, int8, float16, float16, float16),
        }[precision]
        storage = replace(storage, panels=panels and is_quantised(storage.linear))
        return replace(storage, cache=CACHE_TYPES[cache]) if cache else storage


def is_quantised(data_type: int) -> bool:
    return data_type in (TensorProto.INT8, TensorProto.INT4)


def quantise(weight: np.ndarray, data_type: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Round a float32 weight [O, C] to blocks along C.

    Returns int8 values [C, O] (in [-8, 7] for INT4) and scales [ceil(C / block_size), O], in float32. The entry of
    largest magnitude in a block maps onto the most negative integer or near it, and the scale carries its sign: this
    uses all 2^bits levels where a symmetric range would leave one idle. See `scales_of` for where exactly it maps.
    """
    outputs, channels = weight.shape
    blocks = -(-channels // block_size)
    values = np.empty((outputs, channels), np.int8)
    scales = np.empty((outputs, blocks), np.float32)
    step = max(1, _VALUES_PER_STEP // channels)

    def round_rows(first: int) -> None:
        part = weight[first : first + step]
        if channels != blocks * block_size:
            part = np.pad(part, ((0, 0), (0, blocks * block_size - channels)))
        grouped = part.reshape(-1, blocks, block_size)
        scale = scales_of(grouped, data_type)
        values[first : first + step] = round_to(grouped, scale, data_type).reshape(len(part), -1)[:, :channels]
        scales[first : first + step] = scale

    with ThreadPoolExecutor() as pool:  # numpy releases the GIL
        list(pool.map(round_rows, range(0, outputs, step)))
    return transpose(values), transpose(scales)


def scales_of(grouped: np.ndarray, data_type: int) -> np.ndarray:
    """The scale of each block, float32 [..., block] -> [...], searched for the least squared error.

    Tries a few levels for the entry of largest magnitude and refits the scale to each rounded block by least squares,
    <w, q> / <q, q>. In 4 bits this leaves 0.89 to 0.92 of the squared error of the single level -8, for normal weights
    as for longer tails; 20 levels would leave 0.88 to 0.91.
    """
    smallest, greatest = grouped.min(axis=-1), grouped.max(axis=-1)
    peak = np.where(greatest > -smallest, greatest, smallest)
    # A block with all entries below 1e-37 becomes zero: its scale would be subnormal, and its inverse might overflow.
    peak[np.abs(peak) < _LEAST_PEAK] = 0
    relative = np.divide(grouped, peak[..., None], out=np.zeros_like(grouped), where=peak[..., None] != 0)
    best, scale = np.zeros_like(peak), np.zeros_like(peak)
    for level in _LEVELS[data_type]:
        rounded = _clipped(relative * np.float32(level), data_type)
        product = np.einsum("...i,...i->...", relative, rounded)
        square = np.einsum("...i,...i->...", rounded, rounded)
        fitted = np.divide(product, square, out=np.zeros_like(product), where=square != 0)
        # How much the fitted scale reduces the block's squared error.
        taken = product * fitted
        better = taken > best
        best[better], scale[better] = taken[better], fitted[better]
    return _as_bfloat16(scale * peak)


def round_to(grouped: np.ndarray, scale: np.ndarray, data_type: int) -> np.ndarray:
    """Round float32 blocks [..., block] to the nearest multiples of their scales [...]; returns float32 integers."""
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    return _clipped(grouped * inverse[..., None], data_type)


def _clipped(levels: np.ndarray, data_type: int) -> np.ndarray:
    """Round and clip to the integers of a type, in place."""
    lowest = -8 if data_type == TensorProto.INT4 else -128
    np.rint(levels, out=levels)
    return np.clip(levels, lowest, -lowest - 1, out=levels)


def transpose(matrix: np.ndarray) -> np.ndarray:
    """A transposed copy [C, O] of a matrix [O, C], made on all cores."""
    result = np.empty(matrix.shape[::-1], matrix.dtype)

    def move_rows(first: int) -> None:
        result[:, first : first + _ROWS_PER_MOVE] = matrix[first : first + _ROWS_PER_MOVE].T

    with ThreadPoolExecutor() as pool:
        list(pool.map(move_rows, range(0, len(matrix), _ROWS_PER_MOVE)))
    return result


def _as_bfloat16(scales: np.ndarray) -> np.ndarray:
    """Numbers of bfloat16, as float32, rounded away from zero: no entry then lies beyond the levels for it.

    With 8 bits that matters: on the phantom GPTQ leaves 0.47 of the squared error that plain rounding makes, 0.56 with
    scales rounded to the nearest (means of `test_layers_lose_less`).
    """
    bits = np.ascontiguousarray(scales, np.float32).view(np.uint32)
    return (bits + np.uint32(0xFFFF) & np.uint32(0xFFFF0000)).view(np.float32)


def scale_type(panels: bool) -> int:
    """The type that scales are stored in, an onnx.TensorProto one: for rows, what ONNX Runtime's kernels take."""
    return TensorProto.BFLOAT16 if panels else TensorProto.FLOAT


def to_panels(matrix: np.ndarray) -> np.ndarray:
    """Values or scales [N, O] of whole panels as [O / PANEL, N, PANEL]."""
    return np.ascontiguousarray(matrix.reshape(len(matrix), -1, PANEL).transpose(1, 0, 2))


def to_rows(panels: np.ndarray) -> np.ndarray:
    """What `to_panels` got."""
    return panels.transpose(1, 0, 2).reshape(panels.shape[1], -1)


def dequantise(values: np.ndarray, scales: np.ndarray, block_size: int) -> np.ndarray:
    """The float32 weight [C, O] that `quantise` stands for."""
    return values * np.repeat(scales, block_size, axis=0)[: values.shape[0]]
