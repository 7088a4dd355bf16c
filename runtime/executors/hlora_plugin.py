"""`HLoraLinear` as a plugin of the full TensorRT: its engines then launch our CUDA kernel. Not run on a GPU yet.

A plugin of TensorRT's version 3, in Python: shapes and types while an engine is built, addresses and a stream when it
runs; inside a CUDA graph no Python is left. Its matrices are inputs that are constants, so that TensorRT keeps them
with its other weights. Integers are words of 32 bits there, with the bytes of the bundle: as int4 or int8 they would be
TensorRT's to quantise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..engines import PLUGIN_VERSION
from ..errors import ExecutorError

NAME, NAMESPACE = "HLoraLinear", "healthgpt"
# How a matrix may be stored, with the bits of a number.
STORAGE_BITS = {"float16": 16, "int8": 8, "int4": 4}
MATRICES = ("weight", "adapter_in", "adapter_out")
_FLOAT32, _INT32, _UINT8 = (np.dtype(name) for name in ("float32", "int32", "uint8"))
# What TensorRT holds of a plugin is a bare pointer.
_creators: list[Any] = []

Array = Callable[[int, tuple[int, ...], np.dtype[Any]], Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Linear:
    """One linear as the plugin's fields: what its inputs are, and their sizes as csrc/hlora_linear/cuda.h names them.

    operands: names of the inputs in their order, of x, weight, bias, adapter_in, adapter_out, the matrices' scales
    (weight_scale...), expert_of and route_bias, separated by commas. storage: of all three matrices. adapter_in_stride:
    numbers from one row of [A;R] to the next.
    """

    operands: str
    storage: str
    outputs: int
    rank: int
    experts: int
    block_size: int
    rank_block_size: int
    adapter_in_stride: int

    def matrix(self, name: str, channels: int) -> tuple[tuple[int, int], int, int]:
        """Shape, stride and block size of one of MATRICES; of a linear of so many channels."""
        if name == "adapter_in":
            return (channels, self.rank + self.experts), self.adapter_in_stride, self.block_size
        if name == "adapter_out":
            return (self.rank, self.outputs), self.outputs, self.rank_block_size
        return (channels, self.outputs), self.outputs, self.block_size


def register(trt: Any, kernels: Any, array: Array) -> None:
    """Let a TensorRT find the plugin, before it reads a graph or an engine that has it.

    trt: its module. kernels: of our CUDA kernels. array: gives what lies at an address, as the kernels take it. Raises
    ExecutorError where the kernels are missing or not of PLUGIN_VERSION.
    """
    if kernels is None:
        raise ExecutorError("the plugin needs our CUDA kernels: HEALTHGPT_CUDA=1 pip install .")
    version = getattr(kernels, "hlora_linear_version", None)
    if version is None:
        raise ExecutorError("the plugin needs CUDA kernels that were built with cuBLASLt, found some without")
    if version != PLUGIN_VERSION:
        raise ExecutorError(
            f"the plugin needs CUDA kernels of version {PLUGIN_VERSION}, found {version}: build them from this source"
        )
    registry = trt.get_plugin_registry()
    if registry.get_creator(NAME, str(PLUGIN_VERSION), NAMESPACE) is None:
        _creators.append(creator(trt, kernels, array))
        registry.register_creator(_creators[-1], NAMESPACE)


def launch(
    linear: Linear, kernels: Any, array: Array, shape: Sequence[int], at: Mapping[str, int], y: int, stream: int
) -> None:
    """Order y [S, O] of x [..., C] of a shape, operands by their addresses; raises ValueError or RuntimeError."""
    rows, channels = math.prod(shape[:-1]), shape[-1]

    def matrix(name: str) -> Any:
        (inner, outer), stride, block_size = linear.matrix(name, channels)
        values = array(at[name], (inner * stride * STORAGE_BITS[linear.storage] // 8,), _UINT8)
        scales = None
        if (scale := at.get(f"{name}_scale")) is not None:
            scales = array(scale, (-(-inner // block_size), outer), _FLOAT32)
        return kernels.Matrix(values, linear.storage, (inner, outer), scales, block_size, stride)

    vectors = {
        "bias": ((linear.outputs,), _FLOAT32),
        "expert_of": ((linear.rank,), _INT32),
        "route_bias": ((linear.experts,), _FLOAT32),
    }
    kernels.hlora_linear_rows(
        array(at["x"], (rows, channels), _FLOAT32),
        y=array(y, (rows, linear.outputs), _FLOAT32),
        experts=linear.experts,
        stream=stream,
        **{name: matrix(name) for name in MATRICES},
        **{name: array(at[name], *what) for name, what in vectors.items() if name in at},
    )


def creator(trt: Any, kernels: Any, array: Array) -> Any:
    """What makes plugins for a TensorRT, from a graph's nodes and from engines; see `register`."""
    text, number = trt.PluginFieldType.CHAR, trt.PluginFieldType.INT32
    fields = {field.name: text if field.type == "str" else number for field in dataclasses.fields(Linear)}
    float32, int32 = trt.DataType.FLOAT, trt.DataType.INT32
    matrix_types = {"float16": trt.DataType.HALF, "int8": int32, "int4": int32}

    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    class Plugin(*bases):  # type: ignore[misc]
        def __init__(self, linear: Linear) -> None:
            for base in bases:
                base.__init__(self)
            self.plugin_name, self.plugin_namespace = NAME, NAMESPACE
            self.plugin_version = str(PLUGIN_VERSION)
            self.num_outputs = 1
            self.linear, self.names = linear, linear.operands.split(",")
            self.kept: list[Any] = []

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.linear)

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            # TensorRT gets addresses, so what lies there is kept.
            self.kept = [
                trt.PluginField(name, value.encode() if kind == text else np.array([value], np.int32), kind)
                for (name, kind), value in zip(fields.items(), dataclasses.astuple(self.linear), strict=True)
            ]
            return trt.PluginFieldCollection(self.kept)

        def get_output_data_types(self, input_types: Any) -> list[Any]:
            return [float32]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> list[Any]:
            shape = trt.DimsExprs(inputs[0])
            shape[len(shape) - 1] = builder.constant(self.linear.outputs)
            return [shape]

        def supports_format_combination(self, position: int, tensors: Any, inputs: int) -> bool:
            found = tensors[position].desc
            name = self.names[position] if position < inputs else "y"
            vector = int32 if name == "expert_of" else float32
            expected = matrix_types[self.linear.storage] if name in MATRICES else vector
            return bool(found.format == trt.TensorFormat.LINEAR and found.type == expected)

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            pass

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            pass

        def enqueue(
            self, input_desc: Any, output_desc: Any, inputs: Any, outputs: Any, workspace: int, stream: int
        ) -> None:
            at = dict(zip(self.names, inputs, strict=True))
            launch(self.linear, kernels, array, tuple(input_desc[0].dims), at, outputs[0], stream)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = NAME, NAMESPACE, str(PLUGIN_VERSION)
            self.kept = [trt.PluginField(name, np.array([]), kind) for name, kind in fields.items()]
            self.field_names = trt.PluginFieldCollection(self.kept)

        def create_plugin(self, name: str, collection: Any, phase: Any) -> Any:
            found = {field.name: np.array(field.data) for field in collection}
            # TensorRT's parser ends a text with a zero.
            values: dict[str, Any] = {
                key: found[key].tobytes().rstrip(b"\0").decode() if kind == text else int(found[key][0])
                for key, kind in fields.items()
            }
            return Plugin(Linear(**values))

    return Creator()
