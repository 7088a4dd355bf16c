"""The GPU as an executor of engines needs it: memory, copies and one stream, by NVIDIA's own bindings."""

from __future__ import annotations

import ctypes
import functools
import importlib
import weakref
from typing import Any, Protocol

import numpy as np

from ..errors import ExecutorError

INSTALL = "pip install 'healthgpt-edge[tensorrt-rtx]'"


class Memory(Protocol):
    """Bytes on a device, given back when nothing refers to them any more."""

    address: int
    size_bytes: int


class CudaArray:
    """An array in memory of the GPU, as our kernels take it: by CUDA's array interface, version 3."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.__cuda_array_interface__ = {"data": (address, False), "shape": shape, "typestr": dtype.str, "version": 3}


class Device(Protocol):
    """Where engines run. Everything is ordered by one stream; `download` waits for what was ordered before it."""

    stream: int

    @property
    def free_bytes(self) -> int:
        """Memory that is not taken by anybody."""
        ...

    @property
    def kernels(self) -> Any:
        """The module of our kernels for it (csrc/python/cuda.cc); None where it is not built."""
        ...

    def array(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """What lies at an address, as the kernels take it."""
        ...

    def allocate(self, size_bytes: int) -> Memory:
        """Memory filled with zeros."""
        ...

    def upload(self, values: np.ndarray, memory: Memory, offset: int = 0) -> None:
        """Copy a contiguous array to `offset` bytes into `memory`; the array may be changed at once."""
        ...

    def download(self, memory: Memory, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int = 0) -> np.ndarray:
        """An array from `offset` bytes into `memory`."""
        ...


def own_kernels() -> Any:
    """The module of our CUDA kernels; None where it is not built, or for another Python."""
    try:
        return importlib.import_module("healthgpt_edge._cuda")
    except ImportError:
        return None


class CudaMemory:
    """One allocation on the GPU."""

    def __init__(self, device: CudaDevice, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.address = int(device.call("cudaMalloc", max(size_bytes, 1)))
        # Frees when the object goes, also at the interpreter's end, as long as the driver is there.
        weakref.finalize(self, device.runtime.cudaFree, self.address)


class CudaDevice:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves; raises ExecutorError where there is none.

    Not run on a GPU yet.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise ExecutorError(f"device cuda needs the module cuda.bindings: {INSTALL}") from error
        self.runtime: Any = runtime
        count = int(self.call("cudaGetDeviceCount"))
        if count < 1:
            raise ExecutorError("device cuda needs an NVIDIA GPU, found none")
        properties = self.call("cudaGetDeviceProperties", 0)
        self.name = properties.name.decode(errors="replace")
        self.compute_capability = f"{properties.major}.{properties.minor}"
        self.stream = int(self.call("cudaStreamCreate"))
        self._staging = self._staging_bytes = 0

    @property
    def free_bytes(self) -> int:
        return int(self.call("cudaMemGetInfo")[0])

    @functools.cached_property
    def kernels(self) -> Any:
        return own_kernels()

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime; its result, or ExecutorError with what CUDA says."""
        status, *results = getattr(self.runtime, name)(*arguments)
        if status != self.runtime.cudaError_t.cudaSuccess:
            _, text = self.runtime.cudaGetErrorString(status)
            raise ExecutorError(f"CUDA failed in {name}: {text.decode(errors='replace')} (error {int(status)})")
        return results[0] if len(results) == 1 else results

    def array(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> CudaArray:
        return CudaArray(address, shape, dtype)

    def allocate(self, size_bytes: int) -> CudaMemory:
        memory = CudaMemory(self, size_bytes)
        self.call("cudaMemsetAsync", memory.address, 0, size_bytes, self.stream)
        return memory

    def upload(self, values: np.ndarray, memory: Memory, offset: int = 0) -> None:
        self._reserve(values.nbytes)
        # The staging memory is free: every pass ends with a download, which waits for all copies before it.
        ctypes.memmove(self._staging, values.ctypes.data, values.nbytes)
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", memory.address + offset, self._staging, values.nbytes, kind, self.stream)
        self.call("cudaStreamSynchronize", self.stream)

    def download(self, memory: Memory, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int = 0) -> np.ndarray:
        values = np.empty(shape, dtype)
        self._reserve(values.nbytes)
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", self._staging, memory.address + offset, values.nbytes, kind, self.stream)
        self.call("cudaStreamSynchronize", self.stream)
        ctypes.memmove(values.ctypes.data, self._staging, values.nbytes)
        return values

    def _reserve(self, size_bytes: int) -> None:
        """Grow the page-locked memory that copies go through."""
        if size_bytes > self._staging_bytes:
            if self._staging_bytes:
                self.call("cudaFreeHost", self._staging)
            self._staging = int(self.call("cudaMallocHost", size_bytes))
            self._staging_bytes = size_bytes
