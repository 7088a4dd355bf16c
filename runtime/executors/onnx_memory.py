"""Arrays where ONNX Runtime's kernels look for them, on the CPU or on a GPU, and the caches of sequences."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from ..errors import ExecutorError, in_one_line
from .contract import Value


class Buffer:
    """An array on a device, by ONNX Runtime's name of it: cpu or cuda."""

    def __init__(self, value: Any, shape: tuple[int, ...], dtype: np.dtype[Any], array: np.ndarray | None) -> None:
        self.value, self.shape, self.dtype = value, shape, dtype
        self._array = array  # the same memory, where that is the CPU's

    @classmethod
    def of(cls, array: np.ndarray, device: str) -> Buffer:
        """With an array's numbers; on the CPU in its memory."""
        value = onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0)
        return cls(value, array.shape, array.dtype, array if device == "cpu" else None)

    @classmethod
    def unwritten(cls, shape: tuple[int, ...], dtype: np.dtype[Any], device: str) -> Buffer:
        """With whatever numbers its memory holds."""
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, device, 0)
        return cls(value, shape, dtype, None)

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def address(self) -> int:
        return int(self.value.data_ptr())

    def write(self, array: np.ndarray) -> None:
        """Take the numbers of an array of the same shape and type."""
        if self._array is None:
            self.value.update_inplace(np.ascontiguousarray(array))
        else:
            self._array[...] = array

    def read(self) -> np.ndarray:
        """The array; on the CPU not a copy of it."""
        array: np.ndarray = self.value.numpy() if self._array is None else self._array
        return array


class Memory:
    """Where caches lie: on a device, by ONNX Runtime's name of it."""

    def __init__(self, device: str) -> None:
        self.device = device

    def buffer(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        """For caches; zeros, because the standard bodies multiply by 0 what is not filled."""
        return Buffer.of(_zeros(shape, dtype), self.device)

    def copy(self, source: Buffer, target: Buffer, length: int, begin: int = 0, place: int = 0, count: int = 1) -> None:
        """Copy the first `length` tokens of caches [B, K, M, ...]: of `count` sequences, from `begin` to `place`."""
        whole = target.read()
        whole[place : place + count, :, :length] = source.read()[begin : begin + count, :, :length]
        target.write(whole)


class KernelMemory(Memory):
    """A GPU's, where our kernels alone use caches: they read what is filled, and their library copies on the GPU."""

    def __init__(self, device: str, library: Path) -> None:
        super().__init__(device)
        try:
            self._copy_rows = ctypes.CDLL(os.fspath(library)).HealthGptCopyRows
        except AttributeError:
            raise ExecutorError(f"{library.name} must be of this version, found an older one: install again") from None
        address, number = ctypes.c_void_p, ctypes.c_int64
        self._copy_rows.argtypes = [address, number, address, number, number, number]
        self._copy_rows.restype = ctypes.c_char_p

    def buffer(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        return Buffer.unwritten(shape, dtype, self.device)

    def copy(self, source: Buffer, target: Buffer, length: int, begin: int = 0, place: int = 0, count: int = 1) -> None:
        heads, row_bytes = source.shape[1], math.prod(source.shape[3:]) * source.dtype.itemsize
        to_bytes, from_bytes = (buffer.shape[2] * row_bytes for buffer in (target, source))  # of a head
        error = self._copy_rows(
            target.address + place * heads * to_bytes,
            to_bytes,
            source.address + begin * heads * from_bytes,
            from_bytes,
            length * row_bytes,
            count * heads,
        )
        if error:
            raise ExecutorError(f"caches cannot be copied on the GPU: {error.decode()}")


class Part(NamedTuple):
    """Caches of some sequences, as ONNX Runtime binds them by their address."""

    device: str
    device_id: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    address: int


class Caches:
    """Keys and values of some sequences, by what follows `past_` and `present_` in the graph; grown in steps.

    New ones have room for `ahead` tokens more than are asked for: those that are sure to come.
    """

    def __init__(
        self, values: dict[str, Value], memory: Memory, step_tokens: int, sequences: int = 1, ahead: int = 0
    ) -> None:
        self._values, self._memory, self._step_tokens, self._sequences = values, memory, step_tokens, sequences
        self._ahead = ahead
        self._buffers: dict[str, Buffer] = {}
        self.capacity = 0

    @property
    def device(self) -> str:
        return self._memory.device

    @property
    def size_bytes(self) -> int:
        return sum(buffer.size_bytes for buffer in self._buffers.values())

    def grow(self, length: int, kept: int, sequences: int = 1) -> None:
        """Have room for `length` tokens each, in new memory.

        It holds what the first `kept` tokens of the first `sequences` left; what was never used takes no memory of the
        CPU. Raises ExecutorError; then nothing is left of any sequence.
        """
        if kept and not self._buffers:
            raise ExecutorError("the caches are gone, because there was no memory for longer ones")
        needed = length if self.capacity else length + self._ahead
        capacity = -(-needed // self._step_tokens) * self._step_tokens
        sizes: dict[int | str, int] = {"B": self._sequences, "M": capacity}
        try:
            for name, value in self._values.items():
                shape = tuple(int(sizes.get(size, size)) for size in value.shape)
                grown = self._memory.buffer(shape, np.dtype(value.type))
                if kept:
                    self._memory.copy(self._buffers[name], grown, kept, count=sequences)
                self._buffers[name] = grown  # one by one, so that all are there twice at no time
        except Exception as error:  # onnxruntime's own exceptions share no public base class
            self.release()
            raise ExecutorError(f"no memory for caches of {capacity} tokens: {in_one_line(error)}") from error
        self.capacity = capacity

    def release(self) -> None:
        """Give all memory back."""
        self._buffers.clear()
        self.capacity = 0

    def first(self, sequences: int) -> Iterator[tuple[str, Part]]:
        """Those of the first sequences alone, in the same memory; until they grow."""
        for name, buffer in self._buffers.items():
            yield name, Part(self.device, 0, buffer.dtype, (sequences, *buffer.shape[1:]), buffer.address)

    def take(self, other: Caches, length: int, begin: int = 0, place: int = 0) -> None:
        """Begin sequence `place` with the first `length` tokens of sequence `begin` of others; there must be room."""
        for name, buffer in self._buffers.items():
            self._memory.copy(other._buffers[name], buffer, length, begin, place)

    def rows(self, length: int) -> dict[str, np.ndarray]:
        """What the first `length` tokens of the first sequence left, [1, K, length, ...] each."""
        return {name: buffer.read()[:1, :, :length] for name, buffer in self._buffers.items()}

    def restore(self, rows: dict[str, np.ndarray]) -> None:
        """Begin the first sequence with what `rows` gave of another's caches; there must be room."""
        for name, buffer in self._buffers.items():
            whole = buffer.read()
            whole[:1, :, : rows[name].shape[2]] = rows[name]
            buffer.write(whole)


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Zeros straight from the system, which get back to it when dropped; the heap would keep much of M3's caches."""
    memory = mmap.mmap(-1, dtype.itemsize * math.prod(shape))
    return np.frombuffer(memory, dtype).reshape(shape)
