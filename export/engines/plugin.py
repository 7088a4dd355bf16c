"""`HLoraLinear` of a merged language graph as nodes of our plugin (runtime/executors/hlora_plugin.py)."""

from __future__ import annotations

import dataclasses

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from healthgpt_edge.engines import PLUGIN_VERSION
from healthgpt_edge.errors import ExecutorError
from healthgpt_edge.executors.hlora_plugin import MATRICES, NAME, NAMESPACE, Linear

from .graphs import attribute, is_named, location_of
from .merge import Padding

# A domain of its own, so that it cannot be confused with the bundle's functions.
DOMAIN = "healthgpt.plugin"
# The kernel's blocks have at least 32 channels, and its loads at most 16 columns (csrc/hlora_linear/weights.cuh).
KERNEL = Padding(rank=32, columns=16)
_STORAGE = {TensorProto.FLOAT16: "float16", TensorProto.INT8: "int8", TensorProto.INT4: "int4"}
_WORD_BYTES = 4
# The inputs of the merged node, as the plugin's operands are called.
_OPERANDS = (
    "x",
    "weight",
    "weight_scale",
    "bias",
    "adapter_in",
    "adapter_in_scale",
    "adapter_out",
    "adapter_out_scale",
    "expert_of",
    "route_bias",
)


def use_plugin(model: ModelProto) -> None:
    """Replace every `HLoraLinear` of a graph merged with the padding KERNEL by a node of our plugin, in place.

    Integer matrices are reinterpreted as 32-bit words of the same bytes. Raises ExecutorError for matrices that the
    kernel does not support.
    """
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    made: dict[str, TensorProto] = {}
    for node in model.graph.node:
        if is_named(node, "HLoraLinear"):
            _rewrite(node, initializers, made)
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in (initializers | made).values() if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def _rewrite(node: NodeProto, initializers: dict[str, TensorProto], made: dict[str, TensorProto]) -> None:
    given = {operand: name for operand, name in zip(_OPERANDS, node.input, strict=True) if name}
    matrices = {name: initializers[given[name]] for name in MATRICES}
    types = {tensor.data_type for tensor in matrices.values()}
    if len(types) > 1 or not types <= _STORAGE.keys():
        found = ", ".join(TensorProto.DataType.Name(one) for one in sorted(types))
        raise ExecutorError(f"the plugin takes matrices of float16, int8 or int4, all three alike, found {found}")
    for columns in (tensor.dims[1] for tensor in matrices.values()):
        if columns % KERNEL.columns:
            raise ExecutorError(f"the plugin takes matrices of whole {KERNEL.columns} columns, found {columns}")
    linear = Linear(
        operands=",".join(given),
        storage=_STORAGE[types.pop()],
        outputs=matrices["weight"].dims[1],
        rank=matrices["adapter_out"].dims[0],
        experts=attribute(node, "experts"),
        block_size=attribute(node, "block_size"),
        rank_block_size=attribute(node, "rank_block_size"),
        adapter_in_stride=matrices["adapter_in"].dims[1],
    )
    if linear.storage != "float16":
        for operand, tensor in matrices.items():
            given[operand] = _add(made, _words(tensor))
    given["expert_of"] = _add(made, _int32(initializers[given["expert_of"]]))
    fields = {"plugin_namespace": NAMESPACE, "plugin_version": str(PLUGIN_VERSION)} | dataclasses.asdict(linear)
    node.domain, node.op_type = DOMAIN, NAME
    del node.input[:], node.attribute[:]
    node.input.extend(given.values())
    node.attribute.extend(helper.make_attribute(name, value) for name, value in fields.items())


def _add(made: dict[str, TensorProto], tensor: TensorProto) -> str:
    made[tensor.name] = tensor
    return str(tensor.name)


def _words(tensor: TensorProto) -> TensorProto:
    """The same bytes of a stored matrix as int32 [bytes / 4]."""
    words = TensorProto(name=f"{tensor.name}/words", data_type=TensorProto.INT32)
    words.dims.append(int(location_of(tensor)["length"]) // _WORD_BYTES)
    words.data_location = TensorProto.EXTERNAL
    words.external_data.extend(tensor.external_data)
    return words


def _int32(tensor: TensorProto) -> TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.int32), f"{tensor.name}/int32")
