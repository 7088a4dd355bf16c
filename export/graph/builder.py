"""A small builder of ONNX graphs: nodes in order, readable names, weights by reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..weights import WeightFile

OPSET = 24
IR_VERSION = 11
DOMAIN = "healthgpt"


class GraphBuilder:
    """Collects the nodes, weights, inputs and outputs of one graph."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._functions: dict[str, FunctionProto] = {}
        self._scope: list[str] = []
        self._counts: dict[str, int] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of what is built inside the `with` block, as in `layers.0/attention/MatMul`."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def input(self, name: str, data_type: int, shape: list[int | str]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, data_type, shape))
        return name

    def output(self, value: str, name: str, data_type: int, shape: list[int | str]) -> None:
        """Give `value` out of the graph under `name`, by a node of its own unless it has that name already."""
        if value != name:
            self.nodes.append(helper.make_node("Identity", [value], [name], name=f"output/{name}"))
        self._outputs.append(helper.make_tensor_value_info(name, data_type, shape))

    def op(
        self,
        op_type: str,
        *inputs: str,
        outputs: int = 1,
        last: Sequence[str] = (),
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """Append one node; returns its output name, or a list of them where `outputs` is above one.

        `last` names the last outputs: those that leave the graph as they are, so that the node itself writes to the
        buffer that the caller has bound.
        """
        name = self._unique(op_type)
        names = [name] if outputs == 1 else [*(f"{name}:{i}" for i in range(outputs - len(last))), *last]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, name=name, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, values: Any, dtype: Any) -> str:
        """A small constant kept inside the graph; equal constants are stored once."""
        array = np.asarray(values, dtype=dtype)
        name = f"constant/{array.dtype}{list(array.shape)}/{array.tobytes().hex()}"
        if len(name) > 120:
            name = self._unique("constant")
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(array, name)
        return name

    def weight(self, file: WeightFile, key: str, data_type: int, produce: Callable[[], np.ndarray]) -> str:
        """A tensor of a weight file, by `key` (see WeightFile.put); returns the initializer's name."""
        if key not in self._initializers:
            self._initializers[key] = file.put(key, data_type, produce).initializer(key)
        return key

    def call(
        self, function: FunctionProto, *inputs: str, within: Sequence[FunctionProto] = (), **attributes: Any
    ) -> Any:
        """Append a node of domain `healthgpt` that carries `function` as its standard body.

        `within` are the functions that the body calls.
        """
        self._functions |= {one.name: one for one in (function, *within)}
        return self.op(function.name, *inputs, outputs=len(function.output), domain=DOMAIN, **attributes)

    def model(self) -> ModelProto:
        graph = helper.make_graph(self.nodes, self.name, self._inputs, self._outputs, list(self._initializers.values()))
        opsets = [helper.make_opsetid("", OPSET)]
        if self._functions:
            opsets.append(helper.make_opsetid(DOMAIN, 1))
        return helper.make_model(
            graph,
            opset_imports=opsets,
            functions=list(self._functions.values()),
            ir_version=IR_VERSION,
            producer_name="healthgpt-edge",
        )

    def _unique(self, op_type: str) -> str:
        name = "/".join([*self._scope, op_type])
        count = self._counts.get(name, 0)
        self._counts[name] = count + 1
        return f"{name}.{count}" if count else name
