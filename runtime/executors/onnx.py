"""ONNX Runtime: the executor that runs everywhere, on the CPU or, where installed, the CUDA provider."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from ..bundle import Bundle
from ..errors import ExecutorError, HealthGPTError
from . import RunAhead
from .contract import Value, cache_values, graph_values

# Attention in the standard body reads the whole cache, so the cache grows in steps with the context: a step is small
# beside a context, and copying at each step costs a fraction of a percent of the tokens in between.
_CAPACITY_STEP_TOKENS = 256
# A prefill's workspace is worth giving back, a decode step's is not, but over many steps the heap grows too.
_TRIM_ABOVE_ROWS = 64
_TRIM_EVERY_PASSES = 64
_RESIDENT = ("vision", "language", "codes")
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_KERNEL_LIBRARY = Path(__file__).parents[1] / "healthgpt_onnxruntime.so"


def kernel_library() -> Path | None:
    """The library that gives ONNX Runtime our CPU kernels for the named nodes; None where it was not built."""
    return _KERNEL_LIBRARY if _KERNEL_LIBRARY.is_file() else None


class OnnxExecutor:
    """All graphs of the given tasks as ONNX Runtime sessions; weights are mapped from the bundle's files.

    On the CPU our kernels compute the named nodes, where they are built and wanted; `name` says whether they do.
    Otherwise ONNX Runtime runs the bodies that the graphs hold of them.
    """

    def __init__(
        self,
        bundle: Bundle,
        tasks: tuple[str, ...],
        *,
        device: str = "cpu",
        threads: int | None = None,
        kernels: bool = True,
    ) -> None:
        if device not in _PROVIDERS:
            raise ExecutorError(f"device must be cpu or cuda, found {device!r}")
        provider = _PROVIDERS[device]
        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise ExecutorError(f"device {device} needs {provider}; this onnxruntime has {', '.join(available)}")
        self._kernels = kernel_library() if kernels and device == "cpu" else None
        self.name = f"onnx-{device}+kernels" if self._kernels else f"onnx-{device}"
        self.bundle = bundle
        self._provider, self._threads = provider, threads
        self._tasks = tasks
        # The rest (a faithful run's vocabulary, the encoder for drafts) is opened by who asks for it first.
        self._sessions = {
            (task, role): self._open(task, role)
            for task in tasks
            for role in bundle.manifest.tasks[task].graphs
            if role in _RESIDENT
        }

    def _open(self, task: str, role: str) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # fatal: every error is raised as well, and stderr holds one line
        # The arena keeps a prefill's workspace for good, 0.9 GB per task at M3's size, and gains no time here.
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        if self.bundle.manifest.precision == "fp32" and role != "codes":
            # Packing would copy every matrix out of the mapped file, once per task. (The VQGAN is small and all
            # convolutions, which gain more from it.)
            options.add_session_config_entry("session.disable_prepacking", "1")
        if self._kernels:
            self._register(options, self._kernels)
        path = self.bundle.graph(task, role)
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=[self._provider])
        except Exception as error:  # onnxruntime's own exceptions share no public base class
            reason = _first_line(error).replace(str(path), path.name)
            raise ExecutorError(f"ONNX Runtime cannot load {path.name}: {reason}") from error
        _return_freed_memory()
        found = {node.name: value_of(node) for node in [*session.get_inputs(), *session.get_outputs()]}
        expected = graph_values(self.bundle.manifest, task, role)
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                raise ExecutorError(
                    f"{path.name}: {name} must be {expected.get(name, 'absent')} by the manifest, "
                    f"found {found.get(name, 'none')}"
                )
        return session

    @staticmethod
    def _register(options: onnxruntime.SessionOptions, library: Path) -> None:
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:
            reason = _first_line(error).replace(str(library), library.name)
            raise ExecutorError(f"ONNX Runtime cannot load {library.name}: {reason}") from error

    def features(self, task: str, pixels: np.ndarray) -> np.ndarray:
        (features,) = self.run(task, "vision", {"pixels": pixels[None]})
        _return_freed_memory()
        return np.asarray(features[0])

    def context(self, task: str, image_features: np.ndarray | None) -> OnnxContext:
        return OnnxContext(self, task, image_features)

    def picture(self, codes: np.ndarray) -> np.ndarray:
        (image,) = self.run("generation", "codes", {"codes": codes[None]})
        return np.asarray(image[0])

    def draft(self, pixels: np.ndarray) -> np.ndarray:
        (codes,) = self.run("generation", "draft", {"pixels": pixels[None]})
        return np.asarray(codes[0])

    def session(self, task: str, role: str) -> onnxruntime.InferenceSession:
        if task not in self._tasks:
            raise ExecutorError(f"the executor was opened for {', '.join(self._tasks)}, not for {task}")
        if (task, role) not in self._sessions:
            self._sessions[task, role] = self._open(task, role)
        return self._sessions[task, role]

    def run(self, task: str, role: str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        try:
            return list(self.session(task, role).run(None, feeds))
        except HealthGPTError:
            raise
        except Exception as error:
            raise ExecutorError(f"ONNX Runtime failed in the {role} graph of {task}: {_first_line(error)}") from error


class _Bound(NamedTuple):
    """What passes of the same sizes (new tokens, positions asked for) are bound to: arrays to write and to read."""

    sizes: tuple[int, int]
    binding: Any
    token_ids: np.ndarray
    past_length: np.ndarray
    logits: np.ndarray
    hidden: np.ndarray | None


class OnnxContext:
    """Caches of one sequence, bound as input and output of every step, so that they are written in place."""

    run_ahead: RunAhead | None = None

    def __init__(self, executor: OnnxExecutor, task: str, image_features: np.ndarray | None) -> None:
        language = executor.bundle.manifest.language
        self._executor, self._task = executor, task
        self._session = executor.session(task, "language")
        self._cache_values = cache_values(executor.bundle.manifest)
        self._caches: dict[str, Any] = {}
        self._bound: _Bound | None = None
        self._capacity = self._cache_bytes = self._passes = 0
        if image_features is None:
            image_features = np.zeros((1, language.hidden), np.float32)
        self._image_features = np.ascontiguousarray(image_features[None])
        self.length = 0

    @property
    def memory_bytes(self) -> int:
        return self._cache_bytes + int(self._image_features.nbytes)

    def forward(self, token_ids: np.ndarray, last_positions: int = 1, full_vocabulary: bool = False) -> np.ndarray:
        self._reserve(self.length + len(token_ids))
        if self._bound is None or self._bound.sizes != (len(token_ids), last_positions):
            self._bound = self._bind(len(token_ids), last_positions)
        bound = self._bound
        bound.token_ids[0], bound.past_length[0] = token_ids, self.length
        try:
            self._session.run_with_iobinding(bound.binding)
        except Exception as error:
            raise ExecutorError(f"ONNX Runtime failed in the language graph: {_first_line(error)}") from error
        self.length += len(token_ids)
        self._passes += 1
        if len(token_ids) > _TRIM_ABOVE_ROWS or self._passes % _TRIM_EVERY_PASSES == 0:
            _return_freed_memory()
        if full_vocabulary and bound.hidden is not None:
            (other,) = self._executor.run(self._task, "vocabulary", {"hidden": bound.hidden})
            return np.concatenate([other[0], bound.logits[0]], axis=-1)
        return np.array(bound.logits[0])  # of its own: the next pass writes there again

    def caches(self, length: int) -> dict[str, np.ndarray]:
        return {name: cache.numpy()[:, :, :length] for name, cache in self._caches.items()}

    def restore(self, caches: dict[str, np.ndarray]) -> None:
        length = next(iter(caches.values())).shape[2]
        self._reserve(length)
        for name, cache in self._caches.items():
            whole = cache.numpy()
            whole[:, :, :length] = caches[name]
            cache.update_inplace(whole)
        self.length = length

    def _bind(self, tokens: int, last_positions: int) -> _Bound:
        """Bind everything for passes of this size: at decode steps of a small model that takes a tenth of the time."""
        binding = self._session.io_binding()
        outputs = {output.name: output for output in self._session.get_outputs()}
        results = {
            name: np.empty((1, last_positions, outputs[name].shape[-1]), np.float32)
            for name in ("logits", "hidden")
            if name in outputs
        }
        inputs = {
            "token_ids": np.empty((1, tokens), np.int64),
            "past_length": np.empty(1, np.int64),
            "last_positions": np.array([last_positions], np.int64),
        }
        for name, array in [*inputs.items(), ("image_features", self._image_features)]:
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(f"past_{name}", cache)
            binding.bind_ortvalue_output(f"present_{name}", cache)
        for name, array in results.items():
            binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        sizes = (tokens, last_positions)
        return _Bound(
            sizes, binding, inputs["token_ids"], inputs["past_length"], results["logits"], results.get("hidden")
        )

    def _reserve(self, length: int) -> None:
        """Grow the caches to hold `length` tokens; what they hold already is kept."""
        if length <= self._capacity:
            return
        capacity = -(-length // _CAPACITY_STEP_TOKENS) * _CAPACITY_STEP_TOKENS
        sizes: dict[int | str, int] = {"B": 1, "M": capacity}
        self._cache_bytes = 0
        for name, value in self._cache_values.items():
            grown = _zeros(tuple(sizes.get(size, size) for size in value.shape), np.dtype(value.type))
            self._cache_bytes += grown.nbytes
            if self._capacity:
                grown[:, :, : self.length] = self._caches[name].numpy()[:, :, : self.length]
            self._caches[name] = onnxruntime.OrtValue.ortvalue_from_numpy(grown)
        self._capacity, self._bound = capacity, None
        _return_freed_memory()


def value_of(node: Any) -> Value:
    """An input or output of a session as the contract writes it."""
    element = node.type.removeprefix("tensor(").removesuffix(")")
    return Value("float32" if element == "float" else element, node.shape)


def _zeros(shape: tuple[Any, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Zeros straight from the system, which get back to it when dropped; the heap would keep much of M3's caches."""
    memory = mmap.mmap(-1, dtype.itemsize * math.prod(shape))
    return np.frombuffer(memory, dtype).reshape(shape)


def _return_freed_memory() -> None:
    """Give back what was freed: at M3's size glibc would keep 1.1 GB per task from packing the weights alone."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]
