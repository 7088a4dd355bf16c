"""One TensorRT engine, loaded and run; the same for TensorRT and TensorRT-RTX. Not run on a GPU yet."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..errors import ExecutorError
from ..files import written_whole
from .contract import Value
from .cuda import CudaDevice, Memory
from .weight_streaming import stream_weights, workspace_bytes

RTX = "tensorrt-rtx"
# A pass of few rows is launched as one captured graph; more shapes than these would fill memory with graphs.
_MAX_CUDA_GRAPHS = 64
MAX_JIT_CACHE_BYTES = 1 << 30
_DIGEST_BYTES = hashlib.sha256().digest_size


class Tensor(NamedTuple):
    """Where an input or output lies, on the device or, for inputs that give shapes, on the host; and its shape."""

    address: int
    shape: tuple[int, ...]


class Engine(Protocol):
    """A graph that is compiled for a device.

    values: its inputs and outputs; an open dimension is "?". workspace_bytes: what `run` needs beside tensors and
    weights. streams: whether a pass fetches some of the weights.
    """

    values: dict[str, Value]
    workspace_bytes: int
    streams: bool

    def run(self, profile: int, tensors: Mapping[str, Tensor], workspace: Memory) -> None:
        """Order a pass over the shapes of optimisation profile `profile` on the device's stream."""
        ...


class Log:
    """Makes TensorRT's loggers; keeps the last error for the message of an exception and prints nothing."""

    def __init__(self, trt: Any) -> None:
        kept: list[str] = []

        class Logger(trt.ILogger):  # type: ignore[misc]
            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                    kept.append(" ".join(message.split()))

        self.logger, self._kept = Logger(), kept

    @property
    def reason(self) -> str:
        return self._kept[-1][:300] if self._kept else "it gave no reason"


class TensorRtEngine:
    """An engine on the GPU.

    trt: TensorRT's module. data: the checked bytes. jit_cache: where TensorRT-RTX keeps what it compiles for this GPU.
    kept_bytes: of the GPU's memory, what an engine that may stream its weights leaves to others; None for one that may
    not. Raises ExecutorError, with TensorRT's reason, for an engine of another version, GPU or driver.
    """

    def __init__(
        self,
        trt: Any,
        target: str,
        name: str,
        data: np.ndarray,
        device: CudaDevice,
        jit_cache: Path,
        kept_bytes: int | None = None,
    ) -> None:
        self._trt, self._name, self._device, self._log = trt, name, device, Log(trt)
        self._label = f"{target} {trt.__version__}"
        runtime = trt.Runtime(self._log.logger)
        if target == RTX:
            self._check_validity(runtime, data)
        self._engine = runtime.deserialize_cuda_engine(data.data)
        if self._engine is None:
            raise ExecutorError(f"{self._label} cannot load the engine {name}: {self._log.reason}")
        self._jit = _JitCache(jit_cache, data) if target == RTX else None
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        types = {getattr(trt.DataType, ours): numpy for ours, numpy in _TYPES.items()}
        self.values = {
            tensor: Value(
                types.get(self._engine.get_tensor_dtype(tensor), "unknown"),
                ["?" if size < 0 else size for size in self._engine.get_tensor_shape(tensor)],
            )
            for tensor in names
        }
        self.streams = kept_bytes is not None and stream_weights(self._engine, device.free_bytes - kept_bytes)
        self.workspace_bytes = workspace_bytes(self._engine)
        self._contexts = [self._context(profile) for profile in range(self._engine.num_optimization_profiles)]
        self._graphs: dict[object, Any] = {}

    def run(self, profile: int, tensors: Mapping[str, Tensor], workspace: Memory) -> None:
        context, inputs = self._contexts[profile], self._trt.TensorIOMode.INPUT
        for name, tensor in tensors.items():
            context.set_tensor_address(name, tensor.address)
            if self._engine.get_tensor_mode(name) == inputs:
                context.set_input_shape(name, tensor.shape)
        context.set_device_memory(workspace.address, self.workspace_bytes)
        if self._jit is not None:
            self._enqueue(context)  # TensorRT-RTX captures graphs by itself
            self._jit.save()
        elif self.streams:
            self._enqueue(context)
        else:
            self._replay(context, (profile, *tensors.items()))

    def _replay(self, context: Any, key: object) -> None:
        """Run by the CUDA graph of these shapes and addresses; the first time without, which sets up the kernels."""
        call, stream = self._device.call, self._device.stream
        known = self._graphs.get(key)
        if known is None:
            self._enqueue(context)
            if len(self._graphs) < _MAX_CUDA_GRAPHS:
                self._graphs[key] = ()
            return
        if known == ():
            mode = self._device.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            call("cudaStreamBeginCapture", stream, mode)
            self._enqueue(context)
            known = self._graphs[key] = call("cudaGraphInstantiate", call("cudaStreamEndCapture", stream), 0)
        call("cudaGraphLaunch", known, stream)

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._device.stream):
            raise ExecutorError(f"{self._label} failed in the engine {self._name}: {self._log.reason}")

    def _context(self, profile: int) -> Any:
        """A context for one profile whose workspace is given with each pass, so that all engines share one."""
        trt, user_managed = self._trt, self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._jit is None:
            context = self._engine.create_execution_context(user_managed)
        else:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(user_managed)
            if not self.streams:  # beside copies from the host, launches cost nothing
                config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self._jit.attach(config)
            context = self._engine.create_execution_context(config)
        if context is None or not context.set_optimization_profile_async(profile, self._device.stream):
            raise ExecutorError(f"{self._label} cannot run the engine {self._name}: {self._log.reason}")
        return context

    def _check_validity(self, runtime: Any, data: np.ndarray) -> None:
        validity, diagnostics = runtime.get_engine_validity(data[: runtime.engine_header_size].data)
        if validity == self._trt.EngineValidity.INVALID:
            found = [
                name.lower().replace("_", " ")
                for name, flag in self._trt.EngineInvalidityDiagnostics.__members__.items()
                if diagnostics & int(flag)
            ]
            raise ExecutorError(
                f"the engine {self._name} does not run on {self._device.name} (compute capability "
                f"{self._device.compute_capability}) with {self._label}: {', '.join(found) or self._log.reason}; "
                "build it for this GPU"
            )


_TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "UINT8": "uint8"}


class _JitCache:
    """What TensorRT-RTX has compiled for this GPU, kept beside the engine for the next start.

    The file begins with the SHA-256 of the engine and the rest: what is damaged or of another engine is compiled anew.
    A place that cannot be written costs only that time.
    """

    def __init__(self, path: Path, engine: np.ndarray) -> None:
        self._path, self._engine_digest = path, hashlib.sha256(engine.data).digest()
        self._cache: Any = None
        self._saved_bytes = 0

    def attach(self, config: Any) -> None:
        """Give a runtime configuration the engine's one cache."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if blob := self._read():
                self._cache.deserialize(blob)
                self._saved_bytes = len(blob)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the cache if it has grown."""
        blob = bytes(self._cache.serialize() or b"")
        if len(blob) == self._saved_bytes:
            return
        self._saved_bytes = len(blob)
        with contextlib.suppress(OSError), written_whole(self._path) as file:
            file.write(self._digest(blob) + blob)

    def _read(self) -> bytes:
        try:
            if self._path.is_symlink() or self._path.stat().st_size > MAX_JIT_CACHE_BYTES:
                return b""
            data = self._path.read_bytes()
        except OSError:
            return b""
        digest, blob = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        return blob if digest == self._digest(blob) else b""

    def _digest(self, blob: bytes) -> bytes:
        return hashlib.sha256(self._engine_digest + blob).digest()
