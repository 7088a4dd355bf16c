"""Reading and renaming in ONNX graphs: what `lower` and `merge` share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from healthgpt_edge.errors import ExecutorError

from ..graph.builder import DOMAIN


def is_named(node: NodeProto, name: str) -> bool:
    """Whether a node is `healthgpt::name`."""
    return node.domain == DOMAIN and node.op_type == name


def input_at(node: NodeProto, index: int) -> str:
    """The node's input, "" where it is left out."""
    return str(node.input[index]) if index < len(node.input) else ""


def attribute(node: NodeProto, name: str) -> int:
    """An integer attribute of a node that has it."""
    for entry in node.attribute:
        if entry.name == name:
            return int(entry.i)
    raise ExecutorError(f"node {node.name} must have the attribute {name}")


def location_of(tensor: TensorProto) -> dict[str, str]:
    """Where external data lies: location, offset and length."""
    return {entry.key: entry.value for entry in tensor.external_data}


def values_of(tensor: TensorProto, folder: Path) -> np.ndarray:
    """The values of an initializer of a bundle in `folder`; int4 as int8."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    place = location_of(tensor)
    raw = np.fromfile(folder / place["location"], np.uint8, int(place["length"]), offset=int(place["offset"]))
    shape = tuple(tensor.dims)
    if tensor.data_type == TensorProto.INT4:
        # Two neighbours in a byte, the first in the low half; shifting as signed integers extends the sign.
        halves = np.stack([(raw << 4).view(np.int8) >> 4, raw.view(np.int8) >> 4], axis=-1)
        return halves.reshape(-1)[: int(np.prod(shape))].reshape(shape)
    return raw.view(helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(shape)
