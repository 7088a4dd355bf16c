"""Engines without a GPU: the graphs that TensorRT gets, run by ONNX Runtime on host memory.

The executor deals in addresses and shapes alone, so these stand in for a GPU and for TensorRT behind it: what is tested
is the graphs, the arrangement of buffers and caches, and the passes.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import NodeProto, TensorProto, helper

from healthgpt_edge.bundle import Bundle
from healthgpt_edge.engines import LANGUAGE, Settings, engine_graphs
from healthgpt_edge.executors.contract import Value
from healthgpt_edge.executors.onnx import value_of
from healthgpt_edge.executors.tensorrt import TensorRtExecutor
from healthgpt_edge.executors.tensorrt_engine import Tensor
from healthgpt_edge.export.engines.build import engine_model
from healthgpt_edge.export.weights import WeightFile


class HostMemory:
    """Bytes of this process; unless they are asked for as zeros they would be anything, so they are not zeros here."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.values = np.zeros(size_bytes + 256, np.uint8)
        self.address = -(-self.values.ctypes.data // 256) * 256


class HostKernels:
    """The kernel that chooses tokens, by the rules in csrc/token_selection/cuda.h; tests/csrc/cuda holds it to them."""

    def token_selection(
        self, logits, step, ids, token, *, first_id, allowed, penalty, seen, past_length, stream
    ) -> None:
        (place,) = step
        if place == len(ids):
            return
        (scores,) = logits.copy()
        finite = np.isfinite(scores).all()
        if seen is not None:
            scores = np.where(seen[0] == 0, scores, np.where(scores < 0, scores * penalty, scores / penalty))
        may = np.unpackbits(allowed.view(np.uint8), bitorder="little")[: len(scores)]
        row = np.where(may, scores, -np.inf).argmax()
        token[0] = ids[place, 0] = row + first_id if finite else -1
        step[0] += 1
        past_length[0] += 1
        if seen is not None:
            seen[0, row] = 1


class HostDevice:
    """A device that is the host, with the kernels that are given."""

    stream = 0

    def __init__(self, kernels: HostKernels | None = None) -> None:
        self.kernels = kernels

    def array(self, address: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return at(address, shape, dtype)

    def allocate(self, size_bytes: int) -> HostMemory:
        return HostMemory(size_bytes)

    def upload(self, values: np.ndarray, memory: HostMemory, offset: int = 0) -> None:
        assert offset + values.nbytes <= memory.size_bytes
        at(memory.address + offset, values.shape, values.dtype)[...] = values

    def download(self, memory: HostMemory, shape: tuple[int, ...], dtype: np.dtype, offset: int = 0) -> np.ndarray:
        assert offset + math.prod(shape) * np.dtype(dtype).itemsize <= memory.size_bytes
        return at(memory.address + offset, shape, dtype).copy()


def at(address: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The array at an address."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not size:
        return np.empty(shape, dtype)
    buffer = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * size).from_address(address))
    return buffer.view(dtype).reshape(shape)


def widen(model: onnx.ModelProto) -> frozenset[str]:
    """Let a graph compute in float32 what it has in bfloat16, which ONNX Runtime multiplies on no CPU; in place.

    Products get the same numbers, and what is cast from or to bfloat16 is rounded to it. Returns the inputs and outputs
    that were bfloat16.
    """
    graph, float32, bfloat16 = model.graph, TensorProto.FLOAT, TensorProto.BFLOAT16
    ends = [entry for entry in (*graph.input, *graph.output) if entry.type.tensor_type.elem_type == bfloat16]
    stored = {tensor.name for tensor in graph.initializer if tensor.data_type == bfloat16}
    narrow = {entry.name for entry in ends} | stored
    nodes = [cast(name, f"{name}/wide", float32) for name in stored]
    for node in graph.node:
        inputs = list(node.input)
        node.input[:] = [f"{name}/wide" if name in stored else name for name in inputs]
        is_narrow = not narrow.isdisjoint(inputs)
        to = node.attribute[0].i if node.op_type == "Cast" else None
        if to == bfloat16 or (is_narrow and to == float32):
            (result,) = node.output
            nodes += [cast(node.input[0], f"{result}/rounded", bfloat16), cast(f"{result}/rounded", result, float32)]
        else:
            nodes.append(node)
        if to == bfloat16 or (is_narrow and to is None):
            narrow.update(node.output)
    del graph.node[:]
    graph.node.extend(nodes)
    for entry in ends:
        entry.type.tensor_type.elem_type = float32
    return frozenset(entry.name for entry in ends)


def cast(name: str, to_name: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [name], [to_name], name=to_name, to=to)


class OrtEngine:
    """An engine's graph in ONNX Runtime, with outputs copied to where they were asked for; `narrow` is of `widen`."""

    workspace_bytes, streams = 1024, False

    def __init__(self, path: Path, passes: list[tuple[str, int, int]], narrow: frozenset[str]) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(str(path), options)
        self.name, self.passes = path.stem, passes
        found = {node.name: value_of(node) for node in [*self.session.get_inputs(), *self.session.get_outputs()]}
        self.values = {
            name: Value(
                "bfloat16" if name in narrow else value.type,
                ["?" if not isinstance(size, int) else size for size in value.shape],
            )
            for name, value in found.items()
        }

    def run(self, profile: int, tensors: Mapping[str, Tensor], workspace: HostMemory) -> None:
        assert set(tensors) == set(self.values), "every input and output needs an address"
        assert workspace.size_bytes >= self.workspace_bytes
        arrays = {name: at(one.address, one.shape, self.values[name].type) for name, one in tensors.items()}
        self.passes.append((self.name, profile, tensors["token_ids"].shape[1] if "token_ids" in tensors else 0))
        inputs = [node.name for node in self.session.get_inputs()]
        outputs = [node.name for node in self.session.get_outputs()]
        feeds = {
            name: arrays[name].astype(np.float32) if self.values[name].type == "bfloat16" else arrays[name].copy()
            for name in inputs
        }
        results = self.session.run(outputs, feeds)
        for name, values in zip(outputs, results, strict=True):
            assert values.shape == arrays[name].shape, f"{name}: {values.shape} is not {arrays[name].shape}"
            arrays[name][...] = values


def host_executor(
    bundle: Bundle, tasks: tuple[str, ...], settings: Settings, work: Path, kernels: HostKernels | None = None
) -> tuple[TensorRtExecutor, list[tuple[str, int, int]]]:
    """An executor whose engines are doubles, made in `work`, and the passes they will be asked for: engine, profile and
    new tokens of each."""
    passes: list[tuple[str, int, int]] = []
    for file in bundle.manifest.files:
        if file.startswith("weights/"):
            (work / file).parent.mkdir(parents=True, exist_ok=True)
            # No hard link: ONNX's checker refuses such files, also where they were first.
            shutil.copyfile(bundle.path / file, work / file)
    return TensorRtExecutor(
        bundle, tasks, HostDevice(kernels), settings, _opener(bundle, settings, work, passes)
    ), passes


def _opener(
    bundle: Bundle, settings: Settings, work: Path, passes: list[tuple[str, int, int]]
) -> Callable[[str], OrtEngine]:
    def open_engine(name: str) -> OrtEngine:
        with WeightFile(work / f"{name}.stacked.bin", f"{name}.stacked.bin") as stacked:
            model = engine_model(bundle, name, engine_graphs(bundle.manifest)[name], settings, stacked)
        narrow = widen(model) if settings.compute == "bf16" else frozenset()
        onnx.save(model, work / f"{name}.onnx")
        return OrtEngine(work / f"{name}.onnx", passes, narrow)

    assert LANGUAGE in engine_graphs(bundle.manifest)
    return open_engine
