"""Matrices in a graph: written once to a weight file in the type asked for, and multiplied with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..quantize import is_quantised, quantise, scale_type, to_panels, transpose
from ..weights import WeightFile, require_finite
from .builder import GraphBuilder
from .functions import linear, quick_gelu_residual_linear, residual_linear


def stored_matrix(
    graph: GraphBuilder,
    file: WeightFile,
    key: str,
    data_type: int,
    block_size: int,
    produce: Callable[[], np.ndarray],
    panels: bool = False,
) -> tuple[str, str]:
    """Store a matrix [O, C] as the right operand [C, O], integers in `panels` if they shall be.

    Returns the names of its values and of its scales ("" for floats).
    """
    if not is_quantised(data_type):
        return graph.weight(file, key, data_type, lambda: transpose(produce())), ""
    parts: list[np.ndarray] = []

    def part(index: int) -> np.ndarray:
        if not parts:
            rounded = quantise(require_finite(key, produce()), data_type, block_size)
            parts.extend(map(to_panels, rounded) if panels else rounded)
        return parts[index]

    values = graph.weight(file, key, data_type, lambda: part(0))
    return values, graph.weight(file, f"{key}_scale", scale_type(panels), lambda: part(1))


def stored_linear(
    graph: GraphBuilder,
    x: str,
    file: WeightFile,
    key: str,
    data_type: int,
    block_size: int,
    produce: Callable[[], np.ndarray],
    bias: str = "",
    residual: str = "",
    quick_gelu: bool = False,
) -> str:
    """`x` times a stored matrix [O, C], plus a `bias` [O] where one is named, as the node `healthgpt::Linear`.

    A `residual`, where one is named, is added by the same node; with it, `quick_gelu` takes x sigmoid(1.702 x) for x.
    """
    values, scales = stored_matrix(graph, file, key, data_type, block_size, produce)
    operands, alone = (x, values, scales, bias), linear(data_type, bool(bias))
    if not residual:
        return str(graph.call(alone, *operands, block_size=block_size))
    around = quick_gelu_residual_linear(data_type) if quick_gelu else residual_linear(data_type)
    return str(graph.call(around, *operands, residual, within=[alone], block_size=block_size))
