"""Arrays where ONNX Runtime's kernels look for them, on the CPU or on a GPU, and the caches of a sequence."""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
import onnxruntime

from .contract import Value


class Buffer:
    """An array on a device, by ONNX Runtime's name of it: cpu or cuda."""

    def __init__(self, array: np.ndarray, device: str) -> None:
        # On the CPU both are the same memory.
        self._array = array if device == "cpu" else None
        self.value: Any = onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0)
        self.size_bytes = array.nbytes

    def write(self, array: np.ndarray) -> None:
        """Take the numbers of an array of the same shape and type."""
        if self._array is None:
            self.value.update_inplace(np.ascontiguousarray(array))
        else:
            self._array[...] = array

    def read(self) -> np.ndarray:
        """The array; on the CPU not a copy of it."""
        return self.value.numpy() if self._array is None else self._array


class Caches:
    """Keys and values of some sequences, by what follows `past_` and `present_` in the graph; grown in steps.

    New ones have room for `ahead` tokens more than are asked for: those that are sure to come.
    """

    def __init__(
        self, values: dict[str, Value], device: str, step_tokens: int, sequences: int = 1, ahead: int = 0
    ) -> None:
        self._values, self._device, self._step_tokens, self._sequences = values, device, step_tokens, sequences
        self._ahead = ahead
        self.buffers: dict[str, Buffer] = {}
        self.capacity = 0

    @property
    def size_bytes(self) -> int:
        return sum(buffer.size_bytes for buffer in self.buffers.values())

    def reserve(self, length: int, kept: int, sequences: int = 1) -> bool:
        """Have room for `length` tokens each; whether that took new buffers.

        These hold what the first `kept` tokens of the first `sequences` left; memory that was never used stays so.
        """
        if length <= self.capacity:
            return False
        needed = length if self.capacity else length + self._ahead
        self.capacity = -(-needed // self._step_tokens) * self._step_tokens
        sizes: dict[int | str, int] = {"B": self._sequences, "M": self.capacity}
        for name, value in self._values.items():
            grown = _zeros(tuple(int(sizes.get(size, size)) for size in value.shape), np.dtype(value.type))
            if kept:
                grown[:sequences, :, :kept] = self.buffers[name].read()[:sequences, :, :kept]
            self.buffers[name] = Buffer(grown, self._device)
        return True

    def release(self) -> None:
        """Give all memory back."""
        self.buffers.clear()
        self.capacity = 0

    def first(self, sequences: int) -> dict[str, Buffer]:
        """Those of the first sequences alone, in the same memory, which must be the CPU's."""
        return {name: Buffer(buffer.read()[:sequences], self._device) for name, buffer in self.buffers.items()}

    def rows(self, length: int, sequence: int = 0) -> dict[str, np.ndarray]:
        """What the first `length` tokens of one of the sequences left, [1, K, length, ...] each."""
        return {name: buffer.read()[sequence : sequence + 1, :, :length] for name, buffer in self.buffers.items()}

    def restore(self, rows: dict[str, np.ndarray], sequence: int = 0) -> None:
        """Begin one of the sequences with what `rows` gave of another's caches; there must be room."""
        for name, buffer in self.buffers.items():
            whole = buffer.read()
            whole[sequence, :, : rows[name].shape[2]] = rows[name][0]
            buffer.write(whole)


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Zeros straight from the system, which get back to it when dropped; the heap would keep much of M3's caches."""
    memory = mmap.mmap(-1, dtype.itemsize * math.prod(shape))
    return np.frombuffer(memory, dtype).reshape(shape)
