"""Matrices in a graph: written once to a weight file in the type asked for, read back as float32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from ..quantize import is_quantised, quantise, transpose
from ..weights import WeightFile
from .builder import GraphBuilder


def stored_matrix(
    graph: GraphBuilder,
    file: WeightFile,
    key: str,
    data_type: int,
    block_size: int,
    produce: Callable[[], np.ndarray],
) -> tuple[str, str]:
    """Store a matrix [O, C] as the right operand [C, O]; names its values and its scales ("" for floats)."""
    if not is_quantised(data_type):
        return graph.weight(file, key, data_type, lambda: transpose(produce())), ""
    parts: list[np.ndarray] = []

    def part(index: int) -> np.ndarray:
        if not parts:
            parts.extend(quantise(produce(), data_type, block_size))
        return parts[index]

    values = graph.weight(file, key, data_type, lambda: part(0))
    return values, graph.weight(file, f"{key}_scale", TensorProto.FLOAT, lambda: part(1))


def matrix(
    graph: GraphBuilder,
    file: WeightFile,
    key: str,
    data_type: int,
    block_size: int,
    produce: Callable[[], np.ndarray],
) -> str:
    """A matrix [O, C] as the float32 right operand [C, O] of a product, however it is stored."""
    values, scales = stored_matrix(graph, file, key, data_type, block_size, produce)
    if scales:
        return str(graph.op("DequantizeLinear", values, scales, axis=0, block_size=block_size))
    return values if data_type == TensorProto.FLOAT else str(graph.op("Cast", values, to=TensorProto.FLOAT))
