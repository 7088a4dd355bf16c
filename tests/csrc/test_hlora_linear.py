"""The H-LoRA linear of every instruction set this machine has, against the formula in float64."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto

from healthgpt_edge import _kernels
from healthgpt_edge.export.quantize import PANEL, dequantise, quantise, to_panels

# float32 sums of some hundred products of order one.
TOLERANCE = 2e-5
# Activations rounded to 8 bits by row and block: relative to the largest result; measured 0.006.
TOLERANCE_8_BIT = 0.02

FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
STORAGES = [*FLOATS, "int8", "int4"]
# channels, outputs, rank, experts, block size. Odd sizes, tails of a vector, of a tile and of a block, ranks below a
# block, and int4 rows that start inside a byte.
SIZES = [
    (31, 33, 8, 4, 32),
    (7, 1, 2, 1, 4),
    (64, 129, 12, 3, 32),
    (128, 128, 16, 4, 64),
    (259, 514, 64, 4, 128),
    (200, 1100, 36, 4, 64),
    (384, 96, 256, 4, 128),
]
# What stands around a linear, as options of the kernel; with the pair also a residual.
AROUND = {
    "alone": {},
    "norm": {"epsilon": 1e-5},
    "swiglu-residual": {"pair_input": True},
    "quick-gelu-residual": {"quick_gelu": True},
}
each_target = pytest.mark.parametrize("target", _kernels.targets())
each_storage = pytest.mark.parametrize("storage", STORAGES)
each_around = pytest.mark.parametrize("around", AROUND)


def pack(values):
    """Two int4 per byte, the first in the low bits, as ONNX stores them."""
    flat = np.append(values.ravel(), np.zeros(values.size % 2, np.int8)).astype(np.uint8) & 15
    return flat[::2] | flat[1::2] << 4


def store(weight, storage, block_size, panels=False):
    """The stored matrix of a float32 one [C, O], in rows or in panels, and the float64 matrix that it stands for."""
    if storage in FLOATS:
        stored = weight.astype(FLOATS[storage])
        return _kernels.Matrix(stored.view(np.uint16) if storage == "bfloat16" else stored), stored.astype(np.float64)
    data_type = TensorProto.INT4 if storage == "int4" else TensorProto.INT8
    values, scales = quantise(np.ascontiguousarray(weight.T), data_type, block_size)
    exact = dequantise(values.astype(np.float64), scales, block_size)
    if panels:
        values, scales = to_panels(values), to_panels(scales).astype(ml_dtypes.bfloat16).view(np.uint16)
    if storage == "int8":
        return _kernels.Matrix(values, scales, block_size), exact
    return _kernels.Matrix(pack(values), scales, block_size, values.shape), exact


def formula(x, weight, bias, adapter_in, adapter_out, experts):
    product = x @ weight + (0 if bias is None else bias)
    if not experts:
        return product
    rank = adapter_out.shape[0]
    low = x @ adapter_in
    routes = np.exp(low[:, rank:] - low[:, rank:].max(-1, keepdims=True))
    gate = routes / routes.sum(-1, keepdims=True)
    return product + (low[:, :rank] * np.repeat(gate, rank // experts, -1)) @ adapter_out


def rms_norm(x, epsilon):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)


def swiglu(pair):
    gate, up = np.split(pair, 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


def quick_gelu(x):
    return x / (1 + np.exp(-1.702 * x))


def around_operands(around, rows, channels, outputs, seed=1):
    """x, the options that go with it, and the float64 x and residual that they stand for."""
    random = np.random.default_rng(seed)
    options = dict(AROUND[around])
    x = random.standard_normal((rows, channels * (2 if around == "swiglu-residual" else 1))).astype(np.float32)
    exact, residual = x.astype(np.float64), 0
    if around == "norm":
        x *= np.resize(np.array([1e4, 1, 1e-2], np.float32), (rows, 1))
        exact = rms_norm(x.astype(np.float64), options["epsilon"])
    elif around == "swiglu-residual":
        exact = swiglu(exact)
    elif around == "quick-gelu-residual":
        exact = quick_gelu(exact)
    if around.endswith("residual"):
        residual = options["residual"] = random.standard_normal((rows, outputs)).astype(np.float32)
    return x, options, exact, residual


def operands(rows, channels, outputs, rank, experts, seed=0):
    random = np.random.default_rng(seed)
    shapes = [(rows, channels), (channels, outputs), (outputs,), (channels, rank + experts), (rank, outputs)]
    x, weight, bias, adapter_in, adapter_out = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    return x, weight / channels**0.5, bias, adapter_in / channels**0.5, adapter_out / rank**0.5


def linear(
    case, storage, rows, target, *, around="alone", adapters=True, with_bias=True, threads=1, adapter_storage=None
):
    """The kernel's result and the formula's."""
    channels, outputs, rank, experts, block_size = case
    _, weight, bias, adapter_in, adapter_out = operands(rows, channels, outputs, rank, experts)
    x, options, exact, residual = around_operands(around, rows, channels, outputs)
    bias = bias if with_bias else None
    kept, weight = store(weight, storage, block_size)
    (kept_in, adapter_in), (kept_out, adapter_out) = (
        store(matrix, adapter_storage or storage, block_size) for matrix in (adapter_in, adapter_out)
    )
    if adapters:
        options |= {"adapter_in": kept_in, "adapter_out": kept_out, "experts": experts}
    y = _kernels.hlora_linear(x, kept, bias, target=target, threads=threads, **options)
    return y, formula(exact, weight, bias, adapter_in, adapter_out, experts if adapters else 0) + residual


def close(y, expected, storage):
    if storage.startswith("int"):
        return np.abs(y - expected).max(initial=0) <= TOLERANCE_8_BIT * np.abs(expected).max(initial=1e-9)
    return np.allclose(y, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_fastest_instruction_set_is_used_and_named():
    from_the_slowest = ["portable", "neon", "avx2", "avx-vnni", "avx512"]
    named = _kernels.instruction_set().removesuffix(" with amx")
    assert named == max(_kernels.targets(), key=from_the_slowest.index)


@each_target
@each_storage
@pytest.mark.parametrize("case", SIZES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 19])
@pytest.mark.parametrize("adapters", [True, False])
def test_equals_the_formula(case, storage, rows, adapters, target):
    assert close(*linear(case, storage, rows, target, adapters=adapters), storage)


@each_target
@each_storage
@pytest.mark.parametrize("case", SIZES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3, 19])
@pytest.mark.parametrize("around", ["norm", "swiglu-residual", "quick-gelu-residual"])
def test_what_stands_around_equals_the_formula(case, storage, rows, around, target):
    assert close(*linear(case, storage, rows, target, around=around), storage)


@each_target
@pytest.mark.parametrize("channels", [1, 7, 31, 32, 1000, 8191])
def test_a_norm_is_accurate(channels, target):
    """Seen through a matrix that picks a few channels, which rounds nothing."""
    x = np.random.default_rng(3).standard_normal((3, channels)).astype(np.float32)
    x[1] *= 1e4
    x[2] = 0
    picked = [0, channels // 2, channels - 1]
    weight = np.zeros((channels, 3), np.float32)
    weight[picked, range(3)] = 1
    y = _kernels.hlora_linear(x, _kernels.Matrix(weight), target=target, epsilon=1e-6)
    np.testing.assert_allclose(y, rms_norm(x.astype(np.float64), 1e-6)[:, picked], rtol=5e-7)


@each_target
def test_a_swish_is_accurate(target):
    """Also where e^-x overflows float32, and where it is below all float32."""
    gate = np.linspace(-120, 120, 961, dtype=np.float32)[None]
    up = np.full_like(gate, -3)
    pair, eye = np.concatenate([gate, up], axis=-1), _kernels.Matrix(np.eye(961, dtype=np.float32))
    y = _kernels.hlora_linear(pair, eye, target=target, pair_input=True)
    np.testing.assert_allclose(y, swiglu(pair.astype(np.float64)), rtol=1e-6, atol=1e-34)
    # 1.702 x is rounded to float32 before it is an exponent: 87 of it are off by 2.6e-6 at most, so is the power.
    y = _kernels.hlora_linear(gate, eye, target=target, quick_gelu=True)
    np.testing.assert_allclose(y, quick_gelu(gate.astype(np.float64)), rtol=5e-6, atol=1e-34)


@each_target
@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_integer_products_are_exact_but_for_the_rounding_of_x(storage, target):
    """With x that 8 bits hold exactly, nothing but float32 rounding remains."""
    channels, outputs, block_size = 259, 514, 64
    random = np.random.default_rng(1)
    x = random.integers(-127, 128, (5, channels)).astype(np.float32)
    x[:, ::block_size] = 127  # makes the scale of every block one
    weight = random.standard_normal((channels, outputs)).astype(np.float32)
    kept, weight = store(weight, storage, block_size)
    y = _kernels.hlora_linear(x, kept, target=target)
    np.testing.assert_allclose(y, x @ weight, rtol=TOLERANCE, atol=TOLERANCE * np.abs(x @ weight).max())


@each_target
@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 3, 6, 7])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_products_do_not_overflow(storage, rows, sign, target):
    """All of one sign and as large as they can be: AVX2 sums sixteen of them in 16 bits."""
    channels, outputs, block_size = 256, 66, 128
    x = np.full((rows, channels), sign * 127, np.float32)
    for value in (-128, 127) if storage == "int8" else (-8, 7):
        weight = np.full((channels, outputs), value, np.int8)
        scales = np.ones((channels // block_size, outputs), np.float32)
        values = (weight, scales, block_size) if storage == "int8" else (pack(weight), scales, block_size, weight.shape)
        y = _kernels.hlora_linear(x, _kernels.Matrix(*values), target=target)
        np.testing.assert_array_equal(y, sign * 127.0 * value * channels)


@each_target
@each_storage
@each_around
def test_a_row_depends_neither_on_the_others_nor_on_the_threads(storage, around, target):
    channels, outputs, rank, experts, block_size = 200, 1100, 36, 4, 64
    _, *matrices = operands(50, channels, outputs, rank, experts)
    x, options, *_ = around_operands(around, 50, channels, outputs)
    residual = options.pop("residual", None)
    weight, bias, adapter_in, adapter_out = matrices
    (weight, _), (adapter_in, _), (adapter_out, _) = (
        store(matrix, storage, block_size) for matrix in (weight, adapter_in, adapter_out)
    )

    def run(rows, threads):
        more = options | ({} if residual is None else {"residual": residual[rows]})
        return _kernels.hlora_linear(x[rows], weight, bias, adapter_in, adapter_out, experts, target, threads, **more)

    everything = slice(0, len(x))
    together = run(everything, 1)
    for threads in (2, 3, 4):
        np.testing.assert_array_equal(run(everything, threads), together)
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 24):
        parts = [run(slice(row, row + count), 1 + row % 2) for row in range(0, len(x), count)]
        np.testing.assert_array_equal(np.concatenate(parts), together)


# Channels whose last four, and last block, are not whole; a block of 36 that no register's channels divide.
PANELS = [(259, 384, 36, 4, 128), (72, 1152, 12, 3, 36), (1024, 128, 64, 4, 64), (16, 128, 8, 4, 4)]


@each_target
@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize("case", PANELS, ids=str)
@pytest.mark.parametrize("in_panels", ["both", "weight", "adapter"])
@each_around
def test_panels_give_the_same_bits_as_rows(in_panels, case, storage, target, around):
    channels, outputs, rank, experts, block_size = case
    _, weight, bias, adapter_in, adapter_out = operands(1, channels, outputs, rank, experts)
    kept_in, _ = store(adapter_in, storage, block_size)
    in_rows, in_place = (
        (
            store(weight, storage, block_size, panels and in_panels != "adapter")[0],
            store(adapter_out, storage, block_size, panels and in_panels != "weight")[0],
        )
        for panels in (False, True)
    )
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 24, 25, 32, 33, 50):
        x, options, *_ = around_operands(around, rows, channels, outputs)
        expected, *found = (
            _kernels.hlora_linear(x, kept, bias, kept_in, kept_out, experts, target, threads, **options)
            for (kept, kept_out), threads in ((in_rows, 1), (in_place, 1), (in_place, 2), (in_place, 3))
        )
        for one in found:
            np.testing.assert_array_equal(one, expected, err_msg=f"{rows} rows")


@each_target
@pytest.mark.parametrize("storage", ["int4", "float16"])
def test_parts_of_wide_rows_for_many_threads_change_no_bit(storage, target):
    """Of 6200 outputs, for 6 threads two runs are made and for 16 three; of the rest, as many parts as threads."""
    _, *matrices = operands(13, 260, 6200, 36, 4)
    x = np.random.default_rng(1).standard_normal((13, 260)).astype(np.float32)
    weight, bias, *adapters = matrices
    (weight, _), *adapters = (store(matrix, storage, 32) for matrix in (weight, *adapters))
    adapters = [adapter for adapter, _ in adapters]
    for rows in (1, 4, 13):
        few, *many = (
            _kernels.hlora_linear(x[:rows], weight, bias, *adapters, 4, target, threads) for threads in (1, 6, 16, 29)
        )
        for one in many:
            np.testing.assert_array_equal(one, few)


@each_target
@pytest.mark.parametrize(
    ("storage", "adapter_storage"), [("int4", "int8"), ("int4", "float32"), ("float16", "int8"), ("int8", "bfloat16")]
)
@each_around
def test_base_and_adapters_may_be_stored_differently(around, storage, adapter_storage, target):
    for rows in (5, 19):
        y, expected = linear(SIZES[4], storage, rows, target, around=around, adapter_storage=adapter_storage)
        assert close(y, expected, "int4")


@each_target
@each_around
def test_more_rows_than_a_task_takes(around, target):
    y, expected = linear((64, 129, 12, 3, 32), "int4", 800, target, around=around, threads=2)
    assert close(y, expected, "int4")


@each_target
@each_storage
@each_around
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_not_finite(storage, target, bad, around):
    channels, outputs, rank, experts, block_size = SIZES[4]
    _, weight, *_ = operands(4, channels, outputs, rank, experts)
    x, options, *_ = around_operands(around, 4, channels, outputs)
    x[2, 77] = bad
    y = _kernels.hlora_linear(x, store(weight, storage, block_size)[0], target=target, **options)
    assert not np.isfinite(y[2]).any()
    assert np.isfinite(y[[0, 1, 3]]).all()


@each_target
def test_zeros_give_the_bias(target):
    _, weight, bias, *_ = operands(1, 64, 129, 12, 3)
    y = _kernels.hlora_linear(np.zeros((3, 64), np.float32), store(weight, "int4", 32)[0], bias, target=target)
    np.testing.assert_array_equal(y, np.repeat(bias[None], 3, 0))


def test_strided_input_is_read_as_it_is_seen():
    x, weight, *_ = operands(6, 16, 8, 4, 2)
    kept = _kernels.Matrix(weight)
    np.testing.assert_array_equal(
        _kernels.hlora_linear(np.repeat(x, 2, axis=0)[::2], kept), _kernels.hlora_linear(x, kept)
    )


def test_wrong_operands_are_named():
    x, weight, bias, adapter_in, adapter_out = operands(2, 16, 8, 4, 2)
    kept, kept_in, kept_out = (_kernels.Matrix(matrix) for matrix in (weight, adapter_in, adapter_out))
    short = _kernels.Matrix(np.ascontiguousarray(adapter_in[:, :5]))
    with pytest.raises(ValueError, match=r"adapter_in must be \[16, 6\], got \[16, 5\]"):
        _kernels.hlora_linear(x, kept, bias, short, kept_out, 2)
    with pytest.raises(ValueError, match=r"x must be \[2, 16\], got \[2, 15\]"):
        _kernels.hlora_linear(x[:, :15], kept, bias, kept_in, kept_out, 2)
    with pytest.raises(ValueError, match=r"x must be \[2, 32\], got \[2, 16\]"):
        _kernels.hlora_linear(x, kept, bias, kept_in, kept_out, 2, pair_input=True)
    for two in ({"pair_input": True, "epsilon": 1e-5}, {"pair_input": True, "quick_gelu": True}):
        with pytest.raises(ValueError, match="epsilon, pair_input and quick_gelu exclude each other"):
            _kernels.hlora_linear(x, kept, bias, kept_in, kept_out, 2, **two)
    with pytest.raises(ValueError, match=r"residual must be \[2, 8\], got \[2, 16\]"):
        _kernels.hlora_linear(x, kept, bias, kept_in, kept_out, 2, residual=x)
    with pytest.raises(ValueError, match=r"bias must be \[8\], got \[7\]"):
        _kernels.hlora_linear(x, kept, bias[:7], kept_in, kept_out, 2)
    with pytest.raises(ValueError, match="rank must be a multiple of experts, got 4 and 3"):
        _kernels.hlora_linear(x, kept, bias, kept_in, kept_out, 3)
    with pytest.raises(ValueError, match="x must have 2 dimensions"):
        _kernels.hlora_linear(x[0], kept, bias, kept_in, kept_out, 2)
    with pytest.raises(ValueError, match="go together"):
        _kernels.hlora_linear(x, kept, bias, kept_in, None, 2)
    with pytest.raises(ValueError, match=r"target must be one of .*portable.*, got mmx"):
        _kernels.hlora_linear(x, kept, target="mmx")
    with pytest.raises(ValueError, match=r"scales must be \[1, 8\], got \[2, 8\]"):
        _kernels.Matrix(weight.astype(np.int8), np.ones((2, 8), np.float32), 32)
    with pytest.raises(ValueError, match="block_size must be a multiple of 4 up to 256, got 512"):
        _kernels.Matrix(weight.astype(np.int8), np.ones((1, 8), np.float32), 512)
    with pytest.raises(ValueError, match="float16, uint16 with the bits of bfloat16, int8, or uint8 with two int4"):
        _kernels.Matrix(weight.astype(ml_dtypes.bfloat16))
    with pytest.raises(ValueError, match=r"values must be \[64\], got \[63\]"):
        _kernels.Matrix(np.zeros(63, np.uint8), np.ones((1, 8), np.float32), 32, (16, 8))
    for shape in ((16, 0), (0, 8)):
        with pytest.raises(ValueError, match="a matrix must have numbers, got"):
            _kernels.Matrix(np.zeros(shape, np.float32))
    panels = "a matrix must have 2 dimensions, or 3 if it is of integers in panels of 128, got"
    for values in (weight[0], weight[None], np.zeros((2, 16, PANEL), np.float32), np.zeros((2, 16, 64), np.int8)):
        scales = (np.ones((2, 1, values.shape[-1]), np.float32), 32) if values.dtype == np.int8 else ()
        with pytest.raises(ValueError, match=panels):
            _kernels.Matrix(values, *scales)
    with pytest.raises(ValueError, match=r"scales must be \[2, 1, 128\], got \[1, 256\]"):
        _kernels.Matrix(np.zeros((2, 16, PANEL), np.int8), np.ones((1, 256), np.float32), 32)
    with pytest.raises(ValueError, match="scales in panels must be uint16 with the bits of bfloat16"):
        _kernels.Matrix(np.zeros((2, 16, PANEL), np.int8), np.ones((2, 1, PANEL), np.float32), 32)
    with pytest.raises(ValueError, match=r"shape is too large: \[4294967296, 4294967296\]"):
        _kernels.Matrix(np.zeros(0, np.uint8), np.ones((1, 8), np.float32), 32, (1 << 32, 1 << 32))


WITHOUT_MEMORY = """
import resource
import numpy as np
from healthgpt_edge import _kernels
x, weight = np.ones((2048, 16384), np.float32), np.ones((16384, 64), np.int8)
matrix = _kernels.Matrix(weight, np.ones((128, 64), np.float32), 128)
pages = int(open("/proc/self/statm").read().split()[0])
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (16 << 20), hard))
try:
    _kernels.hlora_linear(x, matrix)
except MemoryError:
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert (_kernels.hlora_linear(x, matrix) == 16384).all()
    print("told")
"""


WITHOUT_THREADS = """
import resource
import numpy as np
from healthgpt_edge import _kernels
x, weight = np.ones((1, 64), np.float32), _kernels.Matrix(np.ones((64, 65536), np.float32))
expected = _kernels.hlora_linear(x, weight)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
assert (_kernels.hlora_linear(x, weight, threads=64) == expected).all()
try:
    _kernels.float32_rate(64)
except RuntimeError as error:
    assert "temporarily unavailable" in str(error)
    print("told")
"""


# What a task takes, not the call; of the other threads none is to be had, either.
WITHOUT_MEMORY_FOR_A_TASK = """
import resource
import numpy as np
from healthgpt_edge import _kernels
given = np.ones((1, 8, 8, 512), np.float32), np.ones((3, 3, 512, 64), np.float32), np.ones(64, np.float32)
pages = int(open("/proc/self/statm").read().split()[0])
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
for threads in (1, 2):
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), hard))
    try:
        _kernels.convolution(*given, threads=threads)
        print("not told")
    except MemoryError:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
assert _kernels.convolution(*given).shape == (1, 8, 8, 64)
print("told")
"""


@pytest.mark.parametrize(
    "program", [WITHOUT_MEMORY, WITHOUT_MEMORY_FOR_A_TASK, WITHOUT_THREADS], ids=["memory", "task", "threads"]
)
def test_what_is_not_to_be_had_is_not_the_end(program):
    """x in 8 bits takes 32 MB, of which 16 are to be had: an error. Of 64 stacks a few fit: others do their work."""
    # A sanitizer, where one is loaded first, could not do with so little.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "told"), done.stderr
