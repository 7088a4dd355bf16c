"""Stored numbers: what an array becomes in memory, and the float64 array that this stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from device import load
from onnx import TensorProto

quantize = load(Path(__file__).parents[3] / "export" / "quantize.py", "quantize")


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Their bits, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def store(values: np.ndarray, storage: str) -> np.ndarray:
    return to_bfloat16(values) if storage == "bfloat16" else values.astype(storage)


def exact(stored: np.ndarray, storage: str) -> np.ndarray:
    return (from_bfloat16(stored) if storage == "bfloat16" else stored).astype(np.float64)


def pack(values: np.ndarray) -> np.ndarray:
    """Two int4 per byte, the first in the low bits, as ONNX stores them."""
    flat = np.append(values.ravel(), np.zeros(values.size % 2, np.int8)).astype(np.uint8) & 15
    return flat[::2] | flat[1::2] << 4


def store_matrix(device: Any, weight: np.ndarray, storage: str, block_size: int, stride: int = 0) -> Any:
    """The kernels' matrix of a float32 one [C, O], and the float64 matrix that it stands for."""
    channels, outputs = weight.shape
    stride = stride or outputs

    def rows(values: np.ndarray) -> np.ndarray:
        return np.pad(values, ((0, 0), (0, stride - outputs)))

    if storage in ("float16", "bfloat16"):
        stored = store(weight, storage)
        matrix = device.kernels.Matrix(device.put(rows(stored)), storage, (channels, outputs), stride=stride)
        return matrix, exact(stored, storage)
    data_type = TensorProto.INT4 if storage == "int4" else TensorProto.INT8
    values, scales = quantize.quantise(np.ascontiguousarray(weight.T), data_type, block_size)
    stored = pack(rows(values)) if storage == "int4" else rows(values)
    matrix = device.kernels.Matrix(
        device.put(stored), storage, (channels, outputs), device.put(scales), block_size, stride
    )
    return matrix, quantize.dequantise(values.astype(np.float64), scales, block_size)
