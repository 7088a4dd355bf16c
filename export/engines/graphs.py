"""Reading and renaming in ONNX graphs: what `lower` and `merge` share."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message
from onnx import ModelProto, NodeProto, TensorProto, helper, inliner, numpy_helper

from healthgpt_edge.bundle import Bundle
from healthgpt_edge.errors import ExecutorError

from ..graph.builder import DOMAIN
from ..graph.functions import FUSED
from ..quantize import to_rows

# Bits per value, by type, of what weight files hold.
_BITS = {
    TensorProto.FLOAT: 32,
    TensorProto.FLOAT16: 16,
    TensorProto.BFLOAT16: 16,
    TensorProto.INT8: 8,
    TensorProto.INT4: 4,
}
_PLACE = ["length", "location", "offset"]


def read_graph(bundle: Bundle, file: str) -> ModelProto:
    """A graph of the bundle, checked to keep its external data in the bundle's own files; FUSED nodes as their bodies.

    Nothing checks this later: `values_of` and TensorRT's parser follow whatever path is given. Raises ExecutorError.
    """
    try:
        model = onnx.load(bundle.file(file), load_external_data=False)
    except (DecodeError, OSError) as error:
        raise ExecutorError(f"{file} must be an ONNX graph, found {type(error).__name__}") from error
    if not model.graph.node:
        raise ExecutorError(f"{file} must be an ONNX graph, found one without nodes")
    for tensor in _tensors_in(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            _check_place(tensor, bundle, file)
    return _unfused(model)


def _unfused(model: ModelProto) -> ModelProto:
    """The model with the bodies of the nodes FUSED in their place: TensorRT fuses by itself."""
    present = [(DOMAIN, function.name) for function in model.functions if function.name in FUSED]
    if not present:
        return model
    model = inliner.inline_selected_functions(model, present)
    used = {name for node in model.graph.node for name in node.input} | {entry.name for entry in model.graph.output}
    kept = [node for node in model.graph.node if used.intersection(node.output)]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


def _tensors_in(message: Message) -> Iterator[TensorProto]:
    """Every tensor of a model: initializers and attributes, also those in functions and subgraphs."""
    if isinstance(message, TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for one in [value] if isinstance(value, Message) else value:
                yield from _tensors_in(one)


def _check_place(tensor: TensorProto, bundle: Bundle, file: str) -> None:
    place, name = location_of(tensor), f"{file}: {tensor.name[:100]}"
    location, offset, length = (place.get(key, "") for key in ("location", "offset", "length"))
    if location not in bundle.manifest.files:
        raise ExecutorError(f"{name} must lie in a file of the bundle, found {reprlib.repr(location)}")
    if sorted(entry.key for entry in tensor.external_data) != _PLACE or not (_is_count(offset) and _is_count(length)):
        found = f"{reprlib.repr(offset)} and {reprlib.repr(length)}"
        raise ExecutorError(f"{name} must have its offset and length, once each, found {found}")
    first, end, size = int(offset), int(offset) + int(length), bundle.manifest.files[location].size
    if end > size:
        raise ExecutorError(f"{name} must lie in the {size} bytes of {location}, found {first} to {end}")
    expected = -(-math.prod(tensor.dims) * _BITS.get(tensor.data_type, 0) // 8)
    if int(length) != expected:
        raise ExecutorError(f"{name} must be {expected} bytes, found {length}")


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 20


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
    """The location, offset and length of external data."""
    return {entry.key: entry.value for entry in tensor.external_data}


def in_panels(tensor: TensorProto) -> bool:
    """Whether an initializer that stands for a matrix or its scales lies in panels."""
    return len(tensor.dims) == 3


def rows_of(tensor: TensorProto, folder: Path) -> np.ndarray:
    """`values_of` of a matrix or its scales as they would lie in rows: the latter as float32."""
    values = values_of(tensor, folder)
    if not in_panels(tensor):
        return values
    return to_rows(values.astype(np.float32) if tensor.data_type == TensorProto.BFLOAT16 else values)


def values_of(tensor: TensorProto, folder: Path) -> np.ndarray:
    """The values of an initializer of a graph that `read_graph` has checked; int4 as int8."""
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
