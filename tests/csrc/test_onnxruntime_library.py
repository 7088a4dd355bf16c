"""The library of kernels for ONNX Runtime, one node at a time in real sessions, against the node's standard body.

csrc/onnxruntime/abi.h declares ONNX Runtime's interface by hand: were one place in it wrong, what is asserted here
would not come out.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import FunctionProto, TensorProto, helper, numpy_helper

from healthgpt_edge.executors.onnx import DEVICES
from healthgpt_edge.export.graph.builder import DOMAIN, IR_VERSION, OPSET
from healthgpt_edge.export.graph.functions import (
    cached_attention,
    caches,
    convolution,
    enlarged_convolution,
    hlora_linear,
    linear,
    norm_hlora_linear,
    norm_swish,
    norm_swish_convolution,
    packed_attention,
    packed_cached_attention,
    quick_gelu_residual_linear,
    residual_convolution,
    residual_hlora_linear,
    residual_linear,
    swiglu_residual_hlora_linear,
)
from healthgpt_edge.export.quantize import quantise, to_panels

FLOAT, FLOAT16, BFLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
INT8, INT4 = TensorProto.INT8, TensorProto.INT4
STORED = {"float32": FLOAT, "float16": FLOAT16, "bfloat16": BFLOAT16, "int8": INT8, "int4": INT4}
FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
BLOCK_SIZE = 32
# float32 sums of some hundred products of order one; attention with float16 caches reads the same rounded rows.
TOLERANCE = 2e-5
# A kernel rounds activations to 8 bits where weights are integers: relative to the largest result.
TOLERANCE_8_BIT = 0.02

Operands = dict[str, np.ndarray | TensorProto | None]


def library() -> Path:
    path = DEVICES["cpu"].library
    assert path.is_file(), "the kernels were not built"
    return path


def model(op: str, operands: Operands, results: dict[str, int], body: Any = None, **attributes: Any) -> onnx.ModelProto:
    """One node. TensorProtos are stored in the graph, arrays are its inputs, None is left out."""
    names = [name if value is not None else "" for name, value in operands.items()]
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in operands.items()
        if isinstance(value, np.ndarray)
    ]
    return helper.make_model(
        helper.make_graph(
            [helper.make_node(op, names, list(results), name="node", domain=DOMAIN, **attributes)],
            "one node",
            inputs,
            [helper.make_tensor_value_info(name, data_type, None) for name, data_type in results.items()],
            [value for value in operands.values() if isinstance(value, TensorProto)],
        ),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        functions=body if isinstance(body, list) else [body] if body else [],
        ir_version=IR_VERSION,
    )


def open_session(
    graph: onnx.ModelProto, kernels: Path | bool, threads: int = 1, told: str | None = None, **settings: Any
) -> Any:
    """`kernels` is a library of them, or whether to take that of the CPU; `told` is what it is told of the threads."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if told is not None:
        options.add_session_config_entry("healthgpt.threads", told)
    for name, value in settings.items():
        setattr(options, name, value)
    if kernels:
        options.register_custom_ops_library(str(library() if kernels is True else kernels))
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(
    op: str, operands: Operands, results: dict[str, int], threads: int = 1, kernels: Path | bool = True, **more: Any
) -> list[np.ndarray]:
    """By the kernel, from a graph without a body; by the body where one is given."""
    graph = model(op, operands, results, **more)
    if "body" in more:
        # What bodies say of types alone is left out (functions.py).
        basic = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        session = open_session(graph, False, threads, graph_optimization_level=basic)
    else:
        session = open_session(graph, kernels, threads)
    return session.run(None, {name: value for name, value in operands.items() if isinstance(value, np.ndarray)})


def tensor(name: str, values: np.ndarray) -> TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(values), name)


def stored(name: str, matrix: np.ndarray, storage: str, panels: bool = False) -> Operands:
    """A matrix [C, O] and its scales, as the exporter stores them."""
    if storage in FLOATS:
        return {name: tensor(name, matrix.astype(FLOATS[storage])), f"{name}_scale": None}
    values, scales = quantise(np.ascontiguousarray(matrix.T), STORED[storage], BLOCK_SIZE)
    if panels:
        values, scales = to_panels(values), to_panels(scales).astype(ml_dtypes.bfloat16)
    if storage == "int8":
        return {name: tensor(name, values), f"{name}_scale": tensor(f"{name}_scale", scales)}
    # Two numbers a byte, the first in the low bits.
    flat = np.append(values.ravel(), np.zeros(values.size % 2, np.int8)).astype(np.uint8) & 15
    packed = helper.make_tensor(name, INT4, values.shape, (flat[::2] | flat[1::2] << 4).tobytes(), raw=True)
    return {name: packed, f"{name}_scale": tensor(f"{name}_scale", scales)}


def linear_operands(
    x_shape: tuple[int, ...], outputs: int, storage: str, has_bias: bool, panels: bool = False
) -> Operands:
    random = np.random.default_rng(0)
    bias = tensor("bias", random.standard_normal(outputs).astype(np.float32)) if has_bias else None
    weight = random.standard_normal((x_shape[-1], outputs)).astype(np.float32) / 4
    x = random.standard_normal(x_shape).astype(np.float32)
    return {"x": x, **stored("weight", weight, storage, panels), "bias": bias}


def hlora_operands(
    storage: str, adapters: str, has_bias: bool = True, rows: int = 5, outputs: int = 24, panels: bool = False
) -> Operands:
    """70 channels, 24 outputs, 4 experts of rank 2."""
    random = np.random.default_rng(1)
    into, out_of = (random.standard_normal(shape).astype(np.float32) / 4 for shape in ((70, 12), (8, outputs)))
    return {
        **linear_operands((2, rows, 70), outputs, storage, has_bias, panels),
        **stored("adapter_in", into, adapters),
        **stored("adapter_out", out_of, adapters, panels),
    }


# What stands around an H-LoRA linear, as attributes of its node.
AROUND = {
    "NormHLoraLinear": {"epsilon": 0.5},
    "ResidualHLoraLinear": {},
    "SwigluResidualHLoraLinear": {},
}


def around_operands(op: str, storage: str, rows: int = 5) -> tuple[Operands, list[FunctionProto]]:
    """Operands of one of AROUND, and its body with the one within."""
    kind, random = STORED[storage], np.random.default_rng(2)
    operands = hlora_operands(storage, storage, rows=rows)
    bodies = {
        "NormHLoraLinear": norm_hlora_linear(kind, kind, 70),
        "ResidualHLoraLinear": residual_hlora_linear(kind, kind),
        "SwigluResidualHLoraLinear": swiglu_residual_hlora_linear(kind, kind),
    }
    if op == "SwigluResidualHLoraLinear":
        operands["x"] = random.standard_normal((2, rows, 140)).astype(np.float32)
    if op != "NormHLoraLinear":
        operands["residual"] = random.standard_normal((2, rows, 24)).astype(np.float32)
    return operands, [bodies[op], hlora_linear(kind, kind, True)]


def assert_near(found: np.ndarray, expected: np.ndarray, exact: bool) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    tolerance = TOLERANCE if exact else TOLERANCE_8_BIT * np.abs(expected).max(initial=0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize("x_shape", [(70,), (5, 70), (2, 3, 70), (1, 0, 70), (1, 99, 70)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True], ids=["without-bias", "with-bias"])
def test_linear(storage, x_shape, has_bias):
    """Also no row at all, a last block that is not full, and int4 rows that start inside a byte."""
    operands = linear_operands(x_shape, 33, storage, has_bias)
    (found,) = run("Linear", operands, {"y": FLOAT}, threads=2, block_size=BLOCK_SIZE)
    (expected,) = run("Linear", operands, {"y": FLOAT}, body=linear(STORED[storage], has_bias), block_size=BLOCK_SIZE)
    assert_near(found, expected, storage in FLOATS)


@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize("around", [residual_linear, quick_gelu_residual_linear])
@pytest.mark.parametrize("rows", [1, 40])
def test_what_stands_around_a_linear_without_adapters(around, storage, rows):
    kind, operands = STORED[storage], linear_operands((2, rows, 70), 24, storage, has_bias=True)
    operands["residual"] = np.random.default_rng(2).standard_normal((2, rows, 24)).astype(np.float32)
    body, more = around(kind), {"block_size": BLOCK_SIZE}
    (found,) = run(body.name, operands, {"y": FLOAT}, threads=2, **more)
    (expected,) = run(body.name, operands, {"y": FLOAT}, body=[body, linear(kind, True)], **more)
    assert_near(found, expected, storage in FLOATS)


@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize("adapters", STORED)
@pytest.mark.parametrize("has_bias", [False, True], ids=["without-bias", "with-bias"])
def test_hlora_linear(storage, adapters, has_bias):
    operands, more = hlora_operands(storage, adapters, has_bias), {"block_size": BLOCK_SIZE, "experts": 4}
    (found,) = run("HLoraLinear", operands, {"y": FLOAT}, **more)
    body = hlora_linear(STORED[storage], STORED[adapters], has_bias)
    (expected,) = run("HLoraLinear", operands, {"y": FLOAT}, body=body, **more)
    assert_near(found, expected, storage in FLOATS and adapters in FLOATS)


@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize("has_bias", [False, True], ids=["without-bias", "with-bias"])
def test_panels(storage, rows, has_bias):
    """The bits of a matrix in rows; the body in panels is as near as that in rows."""
    more: Any = {"block_size": BLOCK_SIZE, "experts": 4}
    in_rows, in_panels = (hlora_operands(storage, storage, has_bias, rows, 384, panels) for panels in (False, True))
    assert in_panels["weight"].dims == [3, 70, 128] and in_panels["adapter_out_scale"].dims == [3, 1, 128]
    (expected,) = run("HLoraLinear", in_rows, {"y": FLOAT}, **more)
    (found,) = run("HLoraLinear", in_panels, {"y": FLOAT}, threads=2, **more)
    np.testing.assert_array_equal(found, expected)
    body = hlora_linear(STORED[storage], STORED[storage], has_bias, panels=True)
    (of_body,) = run("HLoraLinear", in_panels, {"y": FLOAT}, body=body, **more)
    assert_near(found, of_body, exact=False)


@pytest.mark.parametrize("op", AROUND)
@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize("rows", [1, 40])
def test_what_stands_around_a_linear(op, storage, rows):
    operands, bodies = around_operands(op, storage, rows)
    more = {"block_size": BLOCK_SIZE, "experts": 4, **AROUND[op]}
    (found,) = run(op, operands, {"y": FLOAT}, threads=2, **more)
    (expected,) = run(op, operands, {"y": FLOAT}, body=bodies, **more)
    assert_near(found, expected, storage in FLOATS)


@pytest.mark.parametrize("storage", ["float32", "int4"])
def test_threads_change_nothing(storage):
    operands, more = hlora_operands(storage, storage, rows=50), {"block_size": BLOCK_SIZE, "experts": 4}
    one, four = (run("HLoraLinear", operands, {"y": FLOAT}, threads=threads, **more)[0] for threads in (1, 4))
    np.testing.assert_array_equal(one, four)


def test_what_kernels_are_told_of_the_threads():
    """Which changes no bit either; nonsense is refused, so it has arrived."""
    operands, more = hlora_operands("int4", "int4", rows=2), {"block_size": BLOCK_SIZE, "experts": 4}
    graph = model("HLoraLinear", operands, {"y": FLOAT}, **more)
    given = {name: value for name, value in operands.items() if isinstance(value, np.ndarray)}
    one, *others = (open_session(graph, True, 1, told).run(None, given)[0] for told in (None, "1", "6", "64"))
    for other in others:
        np.testing.assert_array_equal(other, one)
    for nonsense in ("", "0", "-1", "2 ", "4097", "99999999999999999999"):
        with pytest.raises(Exception, match=f'threads must be from 1 to 4096, found "{nonsense}"'):
            open_session(graph, True, 1, nonsense)


def attention_operands(cache: str, lengths: tuple[int, ...] = (3, 1), tokens: int = 2, capacity: int = 9) -> Operands:
    """As many sequences as lengths; 4 heads of 8 numbers on 2 of keys and values."""
    random = np.random.default_rng(0)
    batch, length = len(lengths), np.array(lengths, np.int64)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal((batch, *shape)).astype(np.float32)

    angles, position = draw(tokens, 4), length[:, None] + np.arange(tokens)
    distance = position[:, None, :, None] - np.arange(capacity)
    return {
        "query": draw(tokens, 32),
        "key": draw(tokens, 16),
        "value": draw(tokens, 16),
        "cosine": np.cos(angles),
        "sine": np.sin(angles),
        "past_length": length,
        "visible": distance >= 0,
        **pasts(cache, {name: draw(2, capacity, 8) for name in ("past_key", "past_value")}),
    }


def pasts(cache: str, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if cache != "int8":
        return {name: one.astype(cache) for name, one in rows.items()}
    scales = {f"{name}_scale": np.abs(one).max(axis=-1, keepdims=True) / 127 for name, one in rows.items()}
    return {name: np.rint(one / scales[f"{name}_scale"]).astype(np.int8) for name, one in rows.items()} | scales


HEADS = {"heads": 4, "kv_heads": 2}


def attention_results(cache: str) -> dict[str, int]:
    return {"output": FLOAT} | {f"present_{name}": kind for name, kind in caches(STORED[cache]).items()}


@pytest.mark.parametrize("cache", ["float32", "float16", "int8"])
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("tokens", [0, 1, 2, 5])
def test_cached_attention(cache, window, tokens):
    operands = attention_operands(cache, tokens=tokens)
    if window:
        distance = operands["past_length"][:, None] + np.arange(tokens)
        operands["visible"] &= distance[:, None, :, None] - np.arange(9) <= window
    more = HEADS | {"window": window}
    found = run("CachedAttention", operands, attention_results(cache), threads=2, **more)
    # The past came in other memory: all of it is in the present ones.
    if tokens:
        expected = run(
            "CachedAttention", operands, attention_results(cache), body=cached_attention(STORED[cache]), **more
        )
    else:
        expected = [operands["query"], *(operands[f"past_{kind}"] for kind in caches(STORED[cache]))]
    assert_near(found[0], expected[0], exact=True)
    for present, wanted in zip(found[1:], expected[1:], strict=True):
        assert present.dtype == wanted.dtype
        # Between two numbers of float16 a rotated key may fall to either.
        np.testing.assert_allclose(present, wanted, rtol=2e-3 if cache == "float16" else 0, atol=1e-6)


@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_attention_of_every_token(tokens):
    packed = np.random.default_rng(0).standard_normal((2, tokens, 3 * 24)).astype(np.float32)
    (found,) = run("PackedAttention", {"packed": packed}, {"output": FLOAT}, threads=2, heads=3)
    expected = packed[:, :, :24]  # no numbers, but of this shape
    if tokens:
        (expected,) = run("PackedAttention", {"packed": packed}, {"output": FLOAT}, body=packed_attention(), heads=3)
    assert_near(found, expected, exact=True)


def packed_operands(cache: str, tokens: int) -> Operands:
    operands = attention_operands(cache, tokens=tokens)
    packed = np.concatenate([operands.pop(name) for name in ("query", "key", "value")], axis=-1)
    return {"packed": packed, **operands}


@pytest.mark.parametrize("cache", ["float32", "float16", "int8"])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_packed_attention_is_that_of_its_parts(cache, tokens):
    results, more = attention_results(cache), HEADS | {"window": 0}
    operands, sizes = packed_operands(cache, tokens), [32, 16, 16]
    found = run("PackedCachedAttention", operands, results, sizes=sizes, threads=2, **more)
    expected = run("CachedAttention", attention_operands(cache, tokens=tokens), results, **more)
    for one, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, wanted)
    if tokens:  # the body of the one is the other
        bodies = [packed_cached_attention(STORED[cache]), cached_attention(STORED[cache])]
        body = run("PackedCachedAttention", operands, results, body=bodies, sizes=sizes, **more)
        assert_near(found[0], body[0], exact=True)


@pytest.mark.parametrize("cache", ["float32", "float16", "int8"])
def test_caches_bound_as_input_and_output_are_written_in_place(cache):
    operands = attention_operands(cache, lengths=(3,), tokens=1)
    expected = run("CachedAttention", operands, attention_results(cache), window=0, **HEADS)
    session = open_session(model("CachedAttention", operands, attention_results(cache), window=0, **HEADS), True)
    binding = session.io_binding()
    kept = {
        kind: onnxruntime.OrtValue.ortvalue_from_numpy(operands[f"past_{kind}"].copy())
        for kind in caches(STORED[cache])
    }
    for name, value in operands.items():
        if not name.startswith("past_") or name == "past_length":
            binding.bind_cpu_input(name, value)
    for kind, value in kept.items():
        binding.bind_ortvalue_input(f"past_{kind}", value)
        binding.bind_ortvalue_output(f"present_{kind}", value)
    binding.bind_output("output")
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(binding.get_outputs()[-1].numpy(), expected[0])
    for (kind, value), wanted in zip(kept.items(), expected[1:], strict=True):
        np.testing.assert_array_equal(value.numpy(), wanted)
        # Only the new row has changed.
        assert [row for row in range(9) if (value.numpy() != operands[f"past_{kind}"])[:, :, row].any()] == [3]


CONVOLUTIONS = {
    "Convolution": convolution,
    "EnlargedConvolution": enlarged_convolution,
    "NormSwishConvolution": norm_swish_convolution,
    "ResidualConvolution": residual_convolution,
}


def convolution_operands(op: str) -> Operands:
    """In the order of the node: two pictures of 5x7 pixels, 8 channels to 6."""
    random = np.random.default_rng(0)
    shapes = {"x": (2, 5, 7, 8), "weight": (3, 3, 8, 6), "bias": (6,)}
    if op in ("NormSwishConvolution", "ResidualConvolution"):
        shapes |= {"norm_weight": (8,), "norm_bias": (8,)}
    if op == "ResidualConvolution":
        shapes["residual"] = (2, 5, 7, 6)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def convolution_attributes(op: str) -> dict[str, int]:
    return {"groups": 4} if "norm_weight" in convolution_operands(op) else {}


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("op", CONVOLUTIONS)
def test_convolutions(op, storage):
    operands, more = convolution_operands(op), convolution_attributes(op)
    operands["weight"] = operands["weight"].astype(storage)
    (found,) = run(op, operands, {"y": FLOAT}, threads=2, **more)
    bodies = [CONVOLUTIONS[op](STORED[storage]), norm_swish()]
    (expected,) = run(op, operands, {"y": FLOAT}, body=bodies, **more)
    assert found.shape == ((2, 10, 14, 6) if op == "EnlargedConvolution" else (2, 5, 7, 6))
    # Winograd's transforms lose a digit: relative to results of up to 10.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_kernel_replaces_the_body(tmp_path):
    """The file that holds both runs by either: with the library the node is still there when all is optimised."""
    operands, more = hlora_operands("float32", "float32"), {"block_size": 0, "experts": 4}
    graph = model("HLoraLinear", operands, {"y": FLOAT}, body=hlora_linear(FLOAT, FLOAT, True), **more)
    outputs = {}
    for kernels in (True, False):
        path = tmp_path / f"{kernels}.onnx"
        session = open_session(graph, kernels, optimized_model_filepath=str(path))
        assert ("HLoraLinear" in {node.op_type for node in onnx.load(path).graph.node}) == kernels
        (outputs[kernels],) = session.run(None, {"x": operands["x"]})
    assert_near(outputs[True], outputs[False], exact=True)


def test_only_the_registration_is_exported():
    opened = ctypes.CDLL(str(library()))
    assert opened.RegisterCustomOps
    with pytest.raises(AttributeError):
        opened._ZN9healthgpt10BestTargetEv  # noqa: B018


def test_an_older_onnx_runtime_is_told_so():
    """One that knows no interface of this version still makes the message, by the first."""
    create_status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    said = []

    @create_status
    def keep(code: int, message: bytes) -> int:
        said.append((code, message.decode()))
        return 1

    first = (ctypes.c_void_p * 1)(ctypes.cast(keep, ctypes.c_void_p))
    give = get_api(lambda version: ctypes.addressof(first) if version == 1 else None)
    base = (ctypes.c_void_p * 2)(ctypes.cast(give, ctypes.c_void_p))
    register = ctypes.CDLL(str(library())).RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
    assert register(None, ctypes.addressof(base)) == 1
    assert said == [(1, "the kernels of healthgpt-edge need ONNX Runtime 1.24 or newer")]


def refusal(op: str, operands: Operands, results: dict[str, int], **attributes: int) -> str:
    with pytest.raises(Exception) as caught:  # onnxruntime's own exceptions share no public base class
        run(op, operands, results, **attributes)
    return str(caught.value)


def zeros(name: str, *shape: int, dtype: Any = np.float32) -> Operands:
    return {name: np.zeros(shape, dtype)}


WRONG_LINEARS = [
    ("int4", zeros("x", 2, 5, 69), {}, "x must end in 70 channels, found [2, 5, 69]"),
    ("int4", zeros("x"), {}, "x must end in 70 channels, found []"),
    ("int4", zeros("x", *[1] * 8, 70), {}, "x must have at most 8 dimensions, found 9"),
    ("int4", zeros("weight", 70 * 24), {}, "weight must be a matrix that is not empty, found [1680]"),
    ("int4", zeros("weight", 70, 0), {}, "weight must be a matrix that is not empty, found [70, 0]"),
    ("int4", zeros("weight", 70, 24, dtype=np.uint8), {}, "float16, bfloat16, int8 or int4, found the ONNX type 2"),
    ("int4", zeros("weight_scale", 3, 24, dtype=np.float16), {}, "weight_scale must be float32, found the ONNX type"),
    ("int4", {"weight_scale": None}, {}, "weight is quantised and must come with weight_scale"),
    ("int4", zeros("weight_scale", 2, 24), {}, "weight_scale must be [3, 24], found [2, 24]"),
    ("int8", zeros("weight_scale", 3, 23), {}, "weight_scale must be [3, 24], found [3, 23]"),
    ("int8", zeros("weight_scale", 72), {}, "weight_scale must be [3, 24], found [72]"),
    ("int8", {}, {"block_size": 0}, "block_size must be a multiple of 4 up to 256, found 0"),
    ("int8", {}, {"block_size": 30}, "block_size must be a multiple of 4 up to 256, found 30"),
    ("int8", {}, {"block_size": 512}, "block_size must be a multiple of 4 up to 256, found 512"),
    ("int8", {}, {"block_size": 64}, "weight_scale must be [2, 24], found [3, 24]"),
    ("int8", zeros("bias", 23), {}, "bias must be [24], found [23]"),
]
# Of 24 outputs; panels have 128.
WRONG_PANELS = [
    (
        "int8",
        zeros("weight", 3, 70, 8, dtype=np.int8),
        {},
        "a matrix that is not empty, found [3, 70, 8]",
    ),
    ("float32", zeros("weight", 1, 70, 128), {}, "weight must be a matrix that is not empty, found [1, 70, 128]"),
    ("int8", zeros("weight", 1, 70, 128, dtype=np.int8), {}, "weight_scale must be [1, 3, 128], found [3, 24]"),
    ("int8", zeros("weight", 2, 70, 128, dtype=np.int8), {}, "weight_scale must be [2, 3, 128], found [3, 24]"),
    (
        "int8",
        zeros("weight", 1, 70, 128, dtype=np.int8) | zeros("weight_scale", 1, 3, 128),
        {},
        "weight_scale must be bfloat16 in panels, found the ONNX type 1",
    ),
]
WRONG_ADAPTERS = [
    ("int4", zeros("adapter_in", 70, 11), {}, "adapter_in must be [70, 12], found [70, 11]"),
    ("int8", zeros("adapter_in", 69, 12), {}, "adapter_in must be [70, 12], found [69, 12]"),
    ("int8", zeros("adapter_out", 9, 24), {}, "the rank must be a multiple of 4 experts, found 9"),
    ("int8", zeros("adapter_out", 8, 23), {}, "adapter_out must be [8, 24], found [8, 23]"),
    ("int8", zeros("adapter_out_scale", 2, 24), {}, "adapter_out_scale must be [1, 24], found [2, 24]"),
    ("int4", {"adapter_in_scale": None}, {}, "adapter_in is quantised and must come with adapter_in_scale"),
    ("int8", {}, {"experts": 8}, "adapter_in must be [70, 16], found [70, 12]"),
    (
        "int8",
        zeros("adapter_out", 1, 8, 128, dtype=np.int8)
        | {"adapter_out_scale": tensor("adapter_out_scale", np.zeros((1, 1, 128), ml_dtypes.bfloat16))},
        {},
        "adapter_out must be [8, 24], found [1, 8, 128]",
    ),
]

WRONG_AROUND = [
    ("NormHLoraLinear", {}, {"epsilon": -1.0}, "epsilon must be 0 or a positive number, found -1"),
    ("NormHLoraLinear", zeros("x", 2, 5, 140), {}, "x must end in 70 channels, found [2, 5, 140]"),
    ("ResidualHLoraLinear", zeros("residual", 2, 5, 23), {}, "found [2, 5, 23]"),
    ("ResidualHLoraLinear", zeros("residual", 5, 24), {}, "found [5, 24]"),
    ("SwigluResidualHLoraLinear", zeros("x", 2, 5, 70), {}, "x must end in 140 channels, found [2, 5, 70]"),
]


@pytest.mark.parametrize(("storage", "wrong", "attributes", "message"), WRONG_LINEARS + WRONG_PANELS)
def test_a_wrong_linear_is_named(storage, wrong, attributes, message):
    operands = linear_operands((2, 5, 70), 24, storage, True) | wrong
    text = refusal("Linear", operands, {"y": FLOAT}, **{"block_size": BLOCK_SIZE} | attributes)
    assert "INVALID_ARGUMENT" in text and ": Linear: " in text and message in text


@pytest.mark.parametrize("shape", [(2, 5, 23), (5, 24)], ids=str)
def test_a_wrong_residual_of_a_linear_is_named(shape):
    operands = linear_operands((2, 5, 70), 24, "float16", True) | zeros("residual", *shape)
    text = refusal("ResidualLinear", operands, {"y": FLOAT}, block_size=BLOCK_SIZE)
    assert f"ResidualLinear: residual must be [2, 5, 24], found {list(shape)}" in text


@pytest.mark.parametrize(("storage", "wrong", "attributes", "message"), WRONG_LINEARS + WRONG_PANELS + WRONG_ADAPTERS)
def test_a_wrong_hlora_linear_is_named(storage, wrong, attributes, message):
    operands = hlora_operands(storage, storage) | wrong
    text = refusal("HLoraLinear", operands, {"y": FLOAT}, **{"block_size": BLOCK_SIZE, "experts": 4} | attributes)
    assert "INVALID_ARGUMENT" in text and ": HLoraLinear: " in text and message in text


@pytest.mark.parametrize(("op", "wrong", "attributes", "message"), WRONG_AROUND)
def test_what_cannot_stand_around_a_linear_is_named(op, wrong, attributes, message):
    operands, _ = around_operands(op, "float16")
    text = refusal(
        op, operands | wrong, {"y": FLOAT}, **{"block_size": BLOCK_SIZE, "experts": 4} | AROUND[op] | attributes
    )
    assert f"{op}: " in text and message in text


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"experts": 4}, "No attribute with name:'block_size'is defined."),
        ({"block_size": BLOCK_SIZE}, "No attribute with name:'experts'is defined."),
        ({"block_size": -1, "experts": 4}, "block_size must be from 0 to 9223372036854775807, found -1"),
        ({"block_size": BLOCK_SIZE, "experts": 0}, "experts must be from 1 to 2147483647, found 0"),
    ],
)
def test_wrong_attributes_are_refused_when_the_session_is_opened(attributes, message):
    graph = model("HLoraLinear", hlora_operands("int8", "int8"), {"y": FLOAT}, **attributes)
    with pytest.raises(Exception) as caught:
        open_session(graph, True)
    assert f"HLoraLinear: {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "attributes", "message"),
    [
        (zeros("query", 2, 32), {}, "query must be [B, S, 4 heads of an even size], found [2, 32]"),
        (zeros("query", 2, 2, 36), {}, "query must be [B, S, 4 heads of an even size], found [2, 2, 36]"),
        (zeros("query", 2, 2, 0), {}, "query must be [B, S, 4 heads of an even size], found [2, 2, 0]"),
        (zeros("query", 3, 2, 32), {}, "past_length must be [3], found [2]"),
        (zeros("query", 2, 3, 32), {}, "key must be [2, 3, 16], found [2, 2, 16]"),
        (zeros("query", 2, 2, 16), {}, "key must be [2, 2, 8], found [2, 2, 16]"),
        (zeros("key", 2, 2, 32), {}, "key must be [2, 2, 16], found [2, 2, 32]"),
        (zeros("value", 2, 1, 16), {}, "value must be [2, 2, 16], found [2, 1, 16]"),
        (zeros("cosine", 2, 2, 8), {}, "cosine must be [2, 2, 4], found [2, 2, 8]"),
        (zeros("sine", 1, 2, 4), {}, "sine must be [2, 2, 4], found [1, 2, 4]"),
        (zeros("past_key", 2, 2, 72), {}, "past_key must have 4 dimensions, found [2, 2, 72]"),
        (zeros("past_key", 2, 1, 9, 8), {}, "past_key must be [2, 2, 9, 8], found [2, 1, 9, 8]"),
        (zeros("past_key", 2, 2, 9, 16), {}, "past_key must be [2, 2, 9, 8], found [2, 2, 9, 16]"),
        (zeros("past_value", 2, 2, 8, 8), {}, "past_value must be [2, 2, 9, 8], found [2, 2, 8, 8]"),
        ({"past_length": np.array([0, 8])}, {}, "past_length must be from 0 to 9 positions less 2 new ones, found 8"),
        ({"past_length": np.array([-1, 0])}, {}, "past_length must be from 0 to 9 positions less 2 new ones, found -1"),
        ({"past_length": np.array([0, 2**63 - 1])}, {}, "less 2 new ones, found 9223372036854775807"),
        ({}, {"kv_heads": 3}, "heads must be a multiple of 3 kv_heads, found 4"),
        ({}, {"heads": 0}, "heads must be from 1 to 2147483647, found 0"),
        ({}, {"kv_heads": 0}, "kv_heads must be from 1 to 2147483647, found 0"),
        ({}, {"window": -1}, "window must be from 0 to 2147483647, found -1"),
    ],
)
def test_wrong_attention_is_named(wrong, attributes, message):
    more = HEADS | {"window": 0} | attributes
    text = refusal("CachedAttention", attention_operands("float32") | wrong, attention_results("float32"), **more)
    assert "CachedAttention: " in text and message in text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (zeros("packed", 2, 2, 60), "packed must be [B, S, 8 heads of an even size], found [2, 2, 60]"),
        (zeros("packed", 2, 3, 64), "cosine must be [2, 3, 4], found [2, 2, 4]"),
        (zeros("past_key", 2, 2, 9, 6), "past_key must be [2, 2, 9, 8], found [2, 2, 9, 6]"),
    ],
)
def test_wrong_packed_attention_is_named(wrong, message):
    operands, results = packed_operands("float32", 2) | wrong, attention_results("float32")
    text = refusal("PackedCachedAttention", operands, results, window=0, sizes=[32, 16, 16], **HEADS)
    assert "PackedCachedAttention: " in text and message in text


@pytest.mark.parametrize("shape", [(2, 5, 60), (2, 5, 0), (5, 72)], ids=str)
def test_wrong_attention_of_every_token_is_named(shape):
    heads = 3 if shape[-1] else 1
    text = refusal("PackedAttention", zeros("packed", *shape), {"output": FLOAT}, heads=heads)
    assert f"PackedAttention: packed must be [B, T, 3 * {heads} * D], found {list(shape)}" in text


def test_both_caches_have_one_type():
    operands = attention_operands("float32")
    operands["past_value"] = operands["past_value"].astype(np.float16)
    text = refusal("CachedAttention", operands, attention_results("float32"), window=0, **HEADS)
    assert "CachedAttention" in text


def test_a_bound_output_of_another_shape_is_onnx_runtimes_own_error():
    operands = linear_operands((5, 70), 24, "float32", False)
    session = open_session(model("Linear", operands, {"y": FLOAT}, block_size=0), True)
    binding = session.io_binding()
    binding.bind_cpu_input("x", operands["x"])
    binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((5, 23), np.float32)))
    with pytest.raises(Exception, match="Linear"):
        session.run_with_iobinding(binding)


@pytest.mark.parametrize(
    ("op", "wrong", "attributes", "message"),
    [
        ("Convolution", zeros("x", 5, 7, 8), {}, "x must be [B, H, W, C], found [5, 7, 8]"),
        ("Convolution", zeros("weight", 8, 6), {}, "weight must be [3, 3, C, O], found [8, 6]"),
        (
            "Convolution",
            {"weight": np.zeros((3, 3, 8, 6))},
            {},
            "weight must be float32 or float16, found the ONNX type 11",
        ),
        ("EnlargedConvolution", zeros("weight", 3, 3, 7, 6), {}, "weight must be [3, 3, 8, 6], found [3, 3, 7, 6]"),
        ("EnlargedConvolution", zeros("weight", 1, 1, 8, 6), {}, "weight must be [3, 3, 8, 6], found [1, 1, 8, 6]"),
        ("NormSwishConvolution", zeros("bias", 8), {}, "bias must be [6], found [8]"),
        ("NormSwishConvolution", zeros("norm_weight", 6), {}, "norm_weight must be [8], found [6]"),
        ("NormSwishConvolution", {}, {"groups": 3}, "groups must divide 8 channels, found 3"),
        (
            "NormSwishConvolution",
            zeros("x", 2, 5, 7, 0) | zeros("weight", 3, 3, 0, 6) | zeros("norm_weight", 0) | zeros("norm_bias", 0),
            {"groups": 4},
            "groups must divide 0 channels, found 4",
        ),
        ("NormSwishConvolution", {}, {"groups": 0}, "groups must be from 1 to 2147483647, found 0"),
        ("ResidualConvolution", zeros("norm_bias", 8, 1), {}, "norm_bias must be [8], found [8, 1]"),
        ("ResidualConvolution", zeros("residual", 2, 5, 7, 8), {}, "residual must be [2, 5, 7, 6], found [2, 5, 7, 8]"),
    ],
)
def test_a_wrong_convolution_is_named(op, wrong, attributes, message):
    text = refusal(op, convolution_operands(op) | wrong, {"y": FLOAT}, **convolution_attributes(op) | attributes)
    assert f"{op}: " in text and message in text
