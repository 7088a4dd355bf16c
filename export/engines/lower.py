"""Lower a bundle's graph for TensorRT: typed bodies, one flat graph, caches of a fixed capacity."""

from __future__ import annotations

from collections import Counter

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, inliner

from ..graph.builder import DOMAIN
from .bodies import BODIES
from .graphs import is_named

CACHES = ("past_key_values.", "present_key_values.")
# CachedAttention's inputs up to past_value and outputs up to present_value; behind them are the scales of int8 caches.
_CACHED_INPUTS, _CACHED_OUTPUTS = 9, 3


def lower(model: ModelProto, compute: int, capacity: int | None = None) -> ModelProto:
    """`model` with the named nodes' products in `compute` (an onnx.TensorProto type), as standard operators only.

    capacity: tokens that the caches of a language graph hold, because TensorRT cannot update a cache of dynamic length.
    `model` is changed in the process; use what is returned.
    """
    _type_caches(model.graph, compute)
    _type_bodies(model, compute)
    flat = inliner.inline_local_functions(model)
    for node in flat.graph.node:
        # Inlined nodes have no names, and TensorRT names its layers by them.
        node.name = node.output[0]
    _shorten_outputs(flat.graph)
    if capacity is not None:
        for entry in (*flat.graph.input, *flat.graph.output):
            if entry.name.startswith(CACHES):
                entry.type.tensor_type.shape.dim[2].dim_value = capacity
    return flat


def _type_caches(graph: GraphProto, compute: int) -> None:
    """Store keys and values in the type of the products: TensorRT only updates caches of floats, without scales."""
    for node in graph.node:
        if is_named(node, "CachedAttention"):
            del node.input[_CACHED_INPUTS:], node.output[_CACHED_OUTPUTS:]
    for entries in (graph.input, graph.output):
        kept = [entry for entry in entries if not (entry.name.startswith(CACHES) and entry.name.endswith("_scale"))]
        for entry in kept:
            if entry.name.startswith(CACHES):
                entry.type.tensor_type.elem_type = compute
        del entries[:]
        entries.extend(kept)


def _type_bodies(model: ModelProto, compute: int) -> None:
    """Give every named node a body for its input types; nodes with equal name and types share one."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    types |= {entry.name: entry.type.tensor_type.elem_type for entry in model.graph.input}
    bodies = {function.name: function for function in model.functions if function.name not in BODIES}
    inputs = {function.name: list(function.input) for function in model.functions}
    for node in model.graph.node:
        if node.domain != DOMAIN or node.op_type not in BODIES:
            continue
        names = BODIES[node.op_type](dict.fromkeys(inputs[node.op_type], 1), compute).input
        given = [(name, value) for name, value in zip(names, node.input, strict=False) if value]
        found = {name: types.get(value, TensorProto.FLOAT) for name, value in given}
        body = BODIES[node.op_type](found, compute)
        body.name = f"{body.name}_{'_'.join(str(found.get(name, 0)) for name in names)}"
        node.op_type = body.name
        bodies[body.name] = body
    del model.functions[:]
    model.functions.extend(bodies.values())


def _shorten_outputs(graph: GraphProto) -> None:
    """Drop the Identity before each output, so that its producer writes it: TensorRT allows uint8 for outputs only."""
    producer: dict[str, NodeProto] = {name: node for node in graph.node for name in node.output}
    uses = Counter(name for node in graph.node for name in node.input)
    kept = []
    results = {entry.name for entry in graph.output}
    for node in graph.node:
        source = node.input[0] if node.input else ""
        if node.op_type == "Identity" and node.output[0] in results and source in producer and uses[source] == 1:
            maker = producer[source]
            maker.output[list(maker.output).index(source)] = node.output[0]
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
