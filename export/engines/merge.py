"""One language graph for all tasks of a bundle, so that an engine holds the base matrices once.

The graphs of the tasks differ only in their weights. Values computed from the same inputs in the same way are merged;
where the tasks differ,

* `HLoraLinear` gets the plugins of all tasks side by side, as one router over all their experts. `silence` removes the
  experts of the other tasks from the softmax exactly: their gates are 0. A token then reads the other plugin's bytes,
  too, which at int4 is 3% (generation) to 11% (comprehension) of M3's token. A second engine would double the memory of
  the base, and adapters as inputs would have to be float16, 40% more bytes for each token of a picture;
* where the embeddings differ, rows are gathered from each, and one is selected;
* the heads stay separate, and a task's positions (`last_positions.<task>`) are 0 while another task runs. So positions
  are cut where the heads begin, and not, as in the graphs, within the last layer, of which there is one for all tasks.

The input `task` int64 [1] says which task runs; a bundle of one task keeps its graph, without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from healthgpt_edge.errors import ExecutorError

from ..graph.builder import DOMAIN
from ..weights import WeightFile
from .graphs import attribute, in_panels, input_at, is_named, location_of, rows_of

# Added to the logits of silent experts: exp() of it is 0, and adding it cannot overflow.
SILENCE = -1e30
PER_TASK_INPUTS = ("last_positions",)
SHARED_OUTPUTS = "present_"
# Positions of HLoraLinear's inputs.
_BASE, _ADAPTER_IN, _ADAPTER_OUT = slice(0, 4), 4, 6


@dataclass(frozen=True, slots=True)
class Padding:
    """Multiples to which stacked adapters are padded with zeros: each plugin's rank, and the columns of A."""

    rank: int = 1
    columns: int = 1


def merge(
    models: dict[str, ModelProto], folder: Path, stacked: WeightFile, padding: Padding | None = None
) -> ModelProto:
    """The language graph of all tasks; `models` by task, from the bundle in `folder`.

    Stacked adapters go to `stacked`, padded as `padding` says, and base matrices that lie in panels, in rows. Inputs
    and outputs are those of the tasks' graphs, with the task's name appended to `last_positions`, `logits` and
    `hidden`, and `task` where there are several.
    """
    merged = _Merged(folder, stacked, padding or Padding())
    for task, model in models.items():
        _cut_at_the_head(model.graph)
        merged.add(task, model.graph)
    return merged.model(next(iter(models.values())))


def _cut_at_the_head(graph: GraphProto) -> None:
    """Let the last layer compute all positions, and cut what the head gets, in place. Raises ExecutorError."""
    starts = {node.output[0] for node in graph.node if node.op_type == "Sub" and "last_positions" in node.input}
    cuts = [node for node in graph.node if node.op_type == "Slice" and input_at(node, 1) in starts]
    norms = [node for node in graph.node if node.op_type == "RMSNormalization"]
    if not cuts or not norms:
        raise ExecutorError("the language graph must cut last_positions and norm them, found no cut or no norm")
    whole = {cut.output[0]: cut.input[0] for cut in cuts}
    for node in graph.node:
        node.input[:] = [whole.get(name, name) for name in node.input]
    cut, head = NodeProto(), norms[-1]
    cut.CopyFrom(cuts[0])
    cut.name = cut.output[0] = "head/Slice"
    cut.input[0], head.input[0] = head.input[0], cut.output[0]
    kept = [node for node in graph.node if node not in cuts]
    place = kept.index(head)
    del graph.node[:]
    graph.node.extend([*kept[:place], cut, *kept[place:]])


class _Plugin:
    """The adapters of one task at one linear."""

    def __init__(self, node: NodeProto, initializers: dict[str, TensorProto], folder: Path, rank_multiple: int) -> None:
        given = [initializers.get(input_at(node, index)) for index in range(_ADAPTER_IN, _ADAPTER_OUT + 2)]
        self.experts, self.block_size = attribute(node, "experts"), attribute(node, "block_size")
        self.types = tuple(tensor and tensor.data_type for tensor in given)
        arrays = [tensor and rows_of(tensor, folder) for tensor in given]
        if not _are_adapters(arrays, self.experts, self.block_size):
            raise ExecutorError(
                f"the linear of {input_at(node, 1)} must have an H-LoRA linear's matrices, found others"
            )
        adapter_in, self.in_scale, adapter_out, self.out_scale = arrays
        self.own_rank = adapter_out.shape[0]
        self._more = ((0, 0), (0, -self.own_rank % rank_multiple))
        self.rank = self.own_rank + self._more[1][1]
        self.reduce, self.router = np.pad(adapter_in[:, : self.own_rank], self._more), adapter_in[:, self.own_rank :]
        self.expand = np.pad(adapter_out, self._more[::-1])

    def scales_in(self) -> tuple[np.ndarray, np.ndarray]:
        """Scales of `reduce` and of `router`."""
        return np.pad(self.in_scale[:, : self.own_rank], self._more), self.in_scale[:, self.own_rank :]

    def scales_out(self, block_size: int) -> np.ndarray:
        """Scales of `expand` in blocks of a size that divides its rank and the size it is stored in."""
        return np.repeat(self.out_scale, self.block_size // block_size, axis=0)[: self.rank // block_size]

    def expert_of(self, first: int) -> np.ndarray:
        """The expert of each column of `reduce`, counted from `first`."""
        return first + np.minimum(np.arange(self.rank) // (self.own_rank // self.experts), self.experts - 1)


def _are_adapters(arrays: list[np.ndarray | None], experts: int, block_size: int) -> bool:
    """Whether [A; router] [C, R + E] and B [R, O] fit together, each with its scales or both without."""
    adapter_in, in_scale, adapter_out, out_scale = arrays
    if adapter_in is None or adapter_out is None or adapter_in.ndim != 2 or adapter_out.ndim != 2:
        return False
    (channels, columns), (rank, outputs) = adapter_in.shape, adapter_out.shape
    if columns != rank + experts or not 0 < experts <= rank or rank % experts:
        return False
    if in_scale is None or out_scale is None:
        return in_scale is None and out_scale is None
    if block_size < 1:
        return False
    return in_scale.shape == (-(-channels // block_size), columns) and (
        out_scale.shape == (-(-rank // block_size), outputs)
    )


class _Merged:
    """The merged graph under construction."""

    def __init__(self, folder: Path, stacked: WeightFile, padding: Padding) -> None:
        self.folder, self.stacked, self.padding = folder, stacked, padding
        self.nodes: list[NodeProto] = []
        self.inputs: dict[str, object] = {}
        self.outputs: dict[str, object] = {}
        self.initializers: dict[str, TensorProto] = {}
        self._tasks: list[str] = []
        self._names: set[str] = set()
        self._known: dict[object, list[str]] = {}  # what a node computes -> the names of its outputs
        self._plugins: dict[str, list[_Plugin]] = {}  # by the output of the linear
        self._tables: dict[str, list[str]] = {}  # by the output of the gather: the embedding of each task

    def add(self, task: str, graph: GraphProto) -> None:
        self._tasks.append(task)
        initializers = {tensor.name: tensor for tensor in graph.initializer}
        value: dict[str, str] = {"": ""}
        for entry in graph.input:
            name = f"{entry.name}.{task}" if entry.name in PER_TASK_INPUTS else entry.name
            value[entry.name] = name
            if name not in self.inputs:
                self.inputs[name] = helper.make_value_info(name, entry.type)
                self._names.add(name)
        results = {entry.name: entry for entry in graph.output}
        for node in graph.node:
            for name in node.input:
                if name not in value:
                    value[name] = self._initializer(task, initializers[name])
            for name, merged in zip(node.output, self._node(task, node, value, initializers, results), strict=True):
                value[name] = merged
        for name, entry in results.items():
            self.outputs[value[name]] = helper.make_value_info(value[name], entry.type)

    def _initializer(self, task: str, tensor: TensorProto) -> str:
        content = tuple(sorted(location_of(tensor).items())) or numpy_helper.to_array(tensor).tobytes()
        key = (tensor.data_type, tuple(tensor.dims), content)
        if key not in self._known:
            copy = TensorProto()
            copy.CopyFrom(tensor)
            copy.name = self._unique(tensor.name, task)
            self.initializers[copy.name] = copy
            self._known[key] = [copy.name]
        return self._known[key][0]

    def _node(
        self,
        task: str,
        node: NodeProto,
        value: dict[str, str],
        initializers: dict[str, TensorProto],
        results: dict[str, object],
    ) -> list[str]:
        """The merged names of a node's outputs; the node is added unless an equal one exists."""
        inputs = [value[name] for name in node.input]
        attributes = tuple(sorted(entry.SerializeToString() for entry in node.attribute))
        key: object = (node.domain, node.op_type, attributes, tuple(inputs))
        plugin = None
        if is_named(node, "HLoraLinear"):
            plugin = _Plugin(node, initializers, self.folder, self.padding.rank)
            key = ("HLoraLinear", tuple(inputs[_BASE]))
        elif node.op_type == "Gather" and node.input[0] in initializers:
            key = ("Gather", attributes, inputs[1], tuple(initializers[node.input[0]].dims[1:]))
        if key not in self._known:
            copy = NodeProto()
            copy.CopyFrom(node)
            names = [self._output_name(task, name, results) for name in node.output]
            copy.name = names[0]
            del copy.input[:], copy.output[:]
            copy.input.extend(inputs)
            copy.output.extend(names)
            self.nodes.append(copy)
            self._known[key] = names
        names = self._known[key]
        if plugin:
            self._plugins.setdefault(names[0], []).append(plugin)
        elif key[0] == "Gather" and isinstance(key, tuple):
            self._tables.setdefault(names[0], []).append(inputs[0])
        return names

    def _output_name(self, task: str, name: str, results: dict[str, object]) -> str:
        if name in results and not name.startswith(SHARED_OUTPUTS):
            name = f"{name}.{task}"
        return self._unique(name, task)

    def _unique(self, name: str, task: str) -> str:
        if name in self._names:
            name = f"{name}.{task}"
        self._names.add(name)
        return name

    def model(self, like: ModelProto) -> ModelProto:
        several = len(self._tasks) > 1
        if several:
            self.inputs["task"] = helper.make_tensor_value_info("task", TensorProto.INT64, [1])
        nodes = []
        for node in self.nodes:
            if node.output[0] in self._plugins:
                nodes += self._stack(node, self._plugins[node.output[0]], several)
            elif len(set(self._tables.get(node.output[0], ()))) > 1:
                nodes += self._select(node, self._tables[node.output[0]])
            else:
                nodes.append(node)
        if several:
            nodes = [*self._silence(), *nodes]
        graph = helper.make_graph(
            nodes,
            "language",
            list(self.inputs.values()),
            list(self.outputs.values()),
            list(self.initializers.values()),
        )
        return helper.make_model(
            graph,
            opset_imports=like.opset_import,
            functions=like.functions,
            ir_version=like.ir_version,
            producer_name=like.producer_name,
        )

    def _constant(self, name: str, values: np.ndarray) -> str:
        self.initializers.setdefault(name, numpy_helper.from_array(values, name))
        return name

    def _silence(self) -> list[NodeProto]:
        """silence [1, E] of the task that runs."""
        counts = [plugin.experts for plugin in next(iter(self._plugins.values()))]
        owner = np.repeat(np.arange(len(counts)), counts)
        table = np.where(owner[None] == np.arange(len(counts))[:, None], 0, SILENCE).astype(np.float32)
        name = self._constant("silence_of_task", table)
        return [helper.make_node("Gather", [name, "task"], ["silence"], name="silence", axis=0)]

    def _select(self, node: NodeProto, tables: list[str]) -> list[NodeProto]:
        """The node's gather from the table of the task that runs."""
        result, (axis,) = node.output[0], node.attribute
        nodes, selected = [], ""
        for index, table in enumerate(tables):
            gathered = f"{result}/{index}"
            nodes.append(helper.make_node("Gather", [table, node.input[1]], [gathered], name=gathered, axis=axis.i))
            if not selected:
                selected = gathered
                continue
            is_task, chosen = f"{result}/{index}/is", result if index == len(tables) - 1 else f"{result}/{index}/of"
            number = self._constant(f"task/{index}", np.array([index], np.int64))
            nodes.append(helper.make_node("Equal", ["task", number], [is_task], name=is_task))
            nodes.append(helper.make_node("Where", [is_task, gathered, selected], [chosen], name=chosen))
            selected = chosen
        return nodes

    def _stack(self, node: NodeProto, plugins: list[_Plugin], several: bool) -> list[NodeProto]:
        """The linear with its plugins side by side."""
        name, (in_type, _, out_type, _) = node.output[0], plugins[0].types
        if any((plugin.types, plugin.block_size) != (plugins[0].types, plugins[0].block_size) for plugin in plugins):
            raise ExecutorError(f"the adapters of all tasks at {name} must be stored alike, found several types")
        adapter_in = np.concatenate([*(p.reduce for p in plugins), *(p.router for p in plugins)], axis=1)
        adapter_in = np.pad(adapter_in, ((0, 0), (0, -adapter_in.shape[1] % self.padding.columns)))
        adapter_out = np.concatenate([p.expand for p in plugins])
        parts = [self._stored(f"{name}/adapter_in", in_type, adapter_in), ""]
        if plugins[0].in_scale is not None:
            reduces, routers = zip(*(plugin.scales_in() for plugin in plugins), strict=True)
            scales = np.concatenate([*reduces, *routers], axis=1)
            parts[1] = self._stored(f"{name}/adapter_in_scale", TensorProto.FLOAT, scales)
        parts += [self._stored(f"{name}/adapter_out", out_type, adapter_out), ""]
        # TensorRT needs whole blocks, and the rows of each plugin must start a new one.
        rank_block = math.gcd(plugins[0].block_size, *(p.rank for p in plugins))
        if plugins[0].out_scale is not None:
            scales = np.concatenate([p.scales_out(rank_block) for p in plugins])
            parts[3] = self._stored(f"{name}/adapter_out_scale", TensorProto.FLOAT, scales)
        firsts = np.cumsum([0, *(p.experts for p in plugins)])
        expert_of = np.concatenate([p.expert_of(first) for p, first in zip(plugins, firsts, strict=False)])
        shape = "x".join(f"{plugin.experts}of{plugin.own_rank}" for plugin in plugins)
        parts += [self._constant(f"expert_of/{shape}", expert_of.astype(np.int64)), "silence" if several else ""]
        stacked = helper.make_node(
            "HLoraLinear",
            [*(self._in_rows(one) for one in list(node.input)[_BASE]), *parts],
            [name],
            name=node.name,
            domain=DOMAIN,
            block_size=plugins[0].block_size,
            rank_block_size=rank_block,
            experts=int(firsts[-1]),
        )
        return [stacked]

    def _in_rows(self, name: str) -> str:
        """The same name, of a tensor in rows: TensorRT, and our plugin for it, take no panels."""
        tensor = self.initializers.get(name)
        if tensor is not None and in_panels(tensor):
            values = rows_of(tensor, self.folder)
            self._stored(name, TensorProto.FLOAT if values.dtype == np.float32 else tensor.data_type, values)
        return name

    def _stored(self, key: str, data_type: int, values: np.ndarray) -> str:
        self.initializers[key] = self.stacked.put(key, data_type, lambda: values).initializer(key)
        return key
