"""Weight files: raw tensors, page aligned, written once and shared by the graphs that name them.

A graph refers to its tensors by ONNX external data (file, offset, length). The file is written front to back while
the checkpoint is read, so that exporting never holds more than one tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper

from healthgpt_edge.errors import BundleError
from healthgpt_edge.manifest import FileEntry

# A mapping of the file then starts every tensor on a page, which is what executors and DMA engines want.
ALIGNMENT_BYTES = 4096
# Converted at a time: a vocabulary of 32B size has 3 GB in float32, and half as much again must not stand beside it.
VALUES_PER_PIECE = 1 << 24


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor stands: `length` bytes at `offset` of the bundle-relative file `location`."""

    location: str
    offset: int
    length: int
    data_type: int
    shape: tuple[int, ...]

    def initializer(self, name: str) -> TensorProto:
        """The ONNX initializer `name` that reads this tensor as external data."""
        tensor = TensorProto(name=name, data_type=self.data_type, dims=self.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.location), ("offset", self.offset), ("length", self.length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def pack_int4(values: np.ndarray) -> np.ndarray:
    """Two neighbours of the last axis per byte, the first in the low half, as ONNX stores INT4.

    values: int8 of any shape, each in [-8, 7]. Returns uint8 [ceil(size / 2)].
    """
    flat = values.reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.int8(0))
    low, high = flat[0::2].view(np.uint8), flat[1::2].view(np.uint8)
    return (low & 0xF) | (high << 4)


class WeightFile:
    """An append-only file of tensors, each stored once under its key.

    `put` returns the place of a key that is already there without producing the tensor again: this is how the
    graphs of two tasks come to share one set of base weights. Once `limit_bytes` are in it, w.bin goes on as w-1.bin,
    w-2.bin and so on: several files are hashed at once, and every file system takes them.
    """

    def __init__(self, path: Path, location: str, limit_bytes: int | None = None) -> None:
        self._path, self.first_location, self._limit_bytes = path, PurePosixPath(location), limit_bytes
        self.stored: dict[str, StoredTensor] = {}
        self._files: dict[str, FileEntry] = {}  # that are full
        self._begin(path, location)

    def _begin(self, path: Path, location: str) -> None:
        self.location, self.size_bytes = location, 0
        self._sha256 = hashlib.sha256()
        self._file = path.open("wb")

    def put(self, key: str, data_type: int, produce: Callable[[], np.ndarray]) -> StoredTensor:
        """Store `produce()` as `data_type` (an onnx.TensorProto type; INT4 takes int8 values) under `key`.

        Raises BundleError for values that are not finite, or that 16 bits cannot hold.
        """
        if key in self.stored:
            return self.stored[key]
        with np.errstate(over="ignore", invalid="ignore"):  # an error, with the key, in place of numpy's warning
            values = require_finite(key, produce())
        shape = tuple(values.shape)
        if self._limit_bytes is not None and self.size_bytes >= self._limit_bytes:
            count = len(self.close())
            name = f"{self._path.stem}-{count}{self._path.suffix}"
            self._begin(self._path.with_name(name), str(self.first_location.with_name(name)))
        self._append(b"\0" * (-self.size_bytes % ALIGNMENT_BYTES))
        offset = self.size_bytes
        flat = np.ascontiguousarray(values).reshape(-1)
        for first in range(0, flat.size, VALUES_PER_PIECE):
            self._append(_payload(key, data_type, flat[first : first + VALUES_PER_PIECE]).view(np.uint8).data)
        stored = StoredTensor(self.location, offset, self.size_bytes - offset, data_type, shape)
        self.stored[key] = stored
        return stored

    def _append(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self.size_bytes += len(data)

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def close(self) -> dict[str, FileEntry]:
        """Flush and close; returns the size and the SHA-256 of each file by its location."""
        self._file.close()
        self._files[self.location] = FileEntry(self.size_bytes, self._sha256.hexdigest())
        return self._files


def require_finite(key: str, values: np.ndarray) -> np.ndarray:
    """`values` if every one is finite. The extremes decide: a NaN spreads to both, and no copy is made."""
    if values.size and not (np.isfinite(values.min()) and np.isfinite(values.max())):
        raise BundleError(f"tensor {key} must be finite, found NaN or infinity")
    return values


def _payload(key: str, data_type: int, values: np.ndarray) -> np.ndarray:
    """Values [N] as they are stored; raises BundleError for what 16 bits cannot hold."""
    if data_type == TensorProto.INT4:
        return pack_int4(values)
    with np.errstate(over="ignore"):  # an error below
        payload = values.astype(helper.tensor_dtype_to_np_dtype(data_type), copy=False)
    if data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16) and not np.isfinite(payload).all():
        most, largest = float(ml_dtypes.finfo(payload.dtype).max), float(np.abs(values).max())
        raise BundleError(
            f"tensor {key} must fit {payload.dtype} ({most:.6g}), found {largest:.6g}: export another precision"
        )
    return payload
