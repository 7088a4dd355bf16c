"""ONNX Runtime: the executor that runs everywhere, on the CPU or, where installed, the CUDA provider."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from ..bundle import Bundle
from ..errors import ExecutorError, HealthGPTError
from ..machine import cores
from ..manifest import CACHE_TYPES, GENERATION, PRECISIONS, Manifest
from ..threads import require_threads
from .contract import Value, cache_values, graph_values
from .onnx_context import BoundSequence, OnnxContext, first_line, return_freed_memory
from .onnx_group import OnnxGroup
from .onnx_memory import Buffer, Caches, KernelMemory, Memory

# For a host that imported ONNX Runtime before us: what it has not yet sent of itself it keeps to itself from here on.
onnxruntime.disable_telemetry_events()

_RESIDENT = ("vision", "language", "codes")
# What works on pictures, in buffers so large that malloc would have every one of them from the system anew.
_OF_PICTURES = ("vision", "codes", "draft")
# How long a thread that has nothing to do may wait for the next pass without giving its core away.
_SPIN_MICROSECONDS = 1000
_PACKAGE = Path(__file__).parents[1]


class Device(NamedTuple):
    """What a name of a device stands for: ONNX Runtime's provider there, and what our kernels for it can do."""

    provider: str
    memory: str  # where arrays lie, by ONNX Runtime's name
    library: Path  # the kernels for the named nodes; not there where it was not built
    precisions: tuple[str, ...]  # that the kernels take, of weights
    caches: tuple[str, ...]  # and of caches
    # Attention in the standard body reads the whole cache, so the cache grows in steps with the context: a step is
    # small beside a context, and copying at each step costs a fraction of a percent of the tokens in between. On a GPU
    # the kernel reads what is filled, and growing ends the CUDA graphs.
    step_tokens: int
    # The most tokens of a prompt in one pass of our kernels. All of M3's would take a CPU many seconds, in which it is
    # deaf and others wait; and more rows than about 200 gain nothing, but take more memory.
    prompt_tokens: int | None
    is_gpu: bool  # where decode steps can be CUDA graphs, and float32 is multiplied as TF32 unless told

    def kernels(self, manifest: Manifest) -> Path | None:
        """The library, where it is built and takes the bundle."""
        takes = manifest.precision in self.precisions and manifest.cache_precision in self.caches
        return self.library if takes and self.library.is_file() else None


_CPU = "CPUExecutionProvider"
DEVICES = {
    "cpu": Device(_CPU, "cpu", _PACKAGE / "healthgpt_onnxruntime.so", PRECISIONS, tuple(CACHE_TYPES), 256, 256, False),
    "cuda": Device(
        "CUDAExecutionProvider",
        "cuda",
        _PACKAGE / "healthgpt_onnxruntime_cuda.so",
        ("fp16", "bf16", "int8", "int4"),
        ("fp16", "int8"),
        1024,
        None,
        True,
    ),
}


class OnnxExecutor:
    """All graphs of the given tasks as ONNX Runtime sessions; weights are mapped from the bundle's files.

    Our kernels compute the named nodes, where they are built, wanted and take the bundle; otherwise ONNX Runtime runs
    the bodies that the graphs hold of them. `name` says which it is, and whether decode steps are CUDA graphs.
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
        if device not in DEVICES:
            raise ExecutorError(f"device must be cpu or cuda, found {device!r}")
        self._device = DEVICES[device]
        provider, available = self._device.provider, onnxruntime.get_available_providers()
        if provider not in available:
            raise ExecutorError(f"device {device} needs {provider}; this onnxruntime has {', '.join(available)}")
        if device == "cuda":
            _load_cuda()
        self._kernels = self._device.kernels(bundle.manifest) if kernels else None
        self._has_graphs = self._device.is_gpu and self._kernels is not None
        self.prompt_tokens = self._device.prompt_tokens if self._kernels else None
        self.rows_in_tiles = self._device.is_gpu
        self.bundle = bundle
        self._threads, self._tasks = threads, tasks
        # On a GPU, sessions have one stream each, whose working memory passes share.
        self._lock: AbstractContextManager[Any] = threading.RLock() if self._device.is_gpu else nullcontext()
        # Of a GPU, what sequences have left: the CUDA graphs of one go with its memory.
        self._left: dict[str, list[BoundSequence]] = {task: [] for task in tasks}
        # The rest (a faithful run's vocabulary, the encoder for drafts) is opened by who asks for it first.
        self._sessions = {
            (task, role): self._open(task, role)
            for task in tasks
            for role in bundle.manifest.tasks[task].graphs
            if role in _RESIDENT
        }
        memory = self._device.memory
        by_kernels = self._kernels if self._device.is_gpu else None
        self._memory = KernelMemory(memory, by_kernels) if by_kernels else Memory(memory)
        self._graphs = self._has_graphs if self._device.is_gpu else None  # as BoundSequence takes it
        self.name = f"onnx-{device}" + "+kernels" * (self._kernels is not None) + "+graphs" * self._has_graphs

    def _open(self, task: str, role: str) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # fatal: every error is raised as well, and stderr holds one line
        # The arena would keep a prefill's workspace for good, 0.9 GB per task at M3's size, and gain no time. On
        # pictures it saves an eighth, though it gives everything back at the end.
        options.enable_cpu_mem_arena = self._takes_from_arena(role)
        options.enable_mem_pattern = False
        # Left to itself ONNX Runtime takes the cores of the machine, whatever a container is given of them.
        threads = self._threads or cores()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("healthgpt.threads", str(threads))  # our kernels cannot ask it
        # Every graph has threads of its own. Left to themselves they would spin for tens of milliseconds after a run,
        # on the cores that the next graph needs.
        if role == "language":
            options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_MICROSECONDS))
        else:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._device.is_gpu:
            # The arena doubles with what it holds. Weights beside it leave it as small as passes need.
            options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        if self.bundle.manifest.precision == "fp32" and role != "codes":
            # Packing would copy every matrix out of the mapped file, once per task. (The VQGAN is small and all
            # convolutions, which gain more from it.)
            options.add_session_config_entry("session.disable_prepacking", "1")
        if self._kernels:
            self._register(options, self._kernels)
        path = self.bundle.graph(task, role)
        require_threads(threads - 1)  # the caller's is one, too
        try:
            session = self._create(path, options, role)
        except Exception as error:  # onnxruntime's own exceptions share no public base class
            reason = first_line(error).replace(str(path), path.name)
            raise ExecutorError(f"ONNX Runtime cannot load {path.name}: {reason}") from error
        if self._device.provider not in session.get_providers():  # ONNX Runtime went on without it
            raise ExecutorError(f"{self._device.provider} could not start, for want of a GPU, CUDA or cuDNN")
        return_freed_memory()
        found = {node.name: value_of(node) for node in [*session.get_inputs(), *session.get_outputs()]}
        expected = graph_values(self.bundle.manifest, task, role)
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                raise ExecutorError(
                    f"{path.name}: {name} must be {expected.get(name, 'absent')} by the manifest, "
                    f"found {found.get(name, 'none')}"
                )
        return session

    def _create(self, path: Path, options: onnxruntime.SessionOptions, role: str) -> onnxruntime.InferenceSession:
        def create(settings: dict[str, str]) -> onnxruntime.InferenceSession:
            if self._device.is_gpu and self.bundle.manifest.precision == "fp32":
                # Products of float32 would otherwise keep 10 of its 23 bits, and ids would not be the CPU's.
                settings = settings | {"use_tf32": "0"}
            if self._device.is_gpu:
                # To try every algorithm would take the first picture 0.4 s, and find none that is faster (an H200).
                settings = settings | {"cudnn_conv_algo_search": "HEURISTIC"}
            # Without onnxruntime's own way of falling back, which is to print and to go on with the CPU.
            providers = [(self._device.provider, settings)]
            return onnxruntime.InferenceSession(_Encoded(path), options, providers=providers, enable_fallback=False)

        if role == "language" and self._has_graphs:
            try:
                return create({"enable_cuda_graph": "1"})
            except Exception as error:
                if "graph capture" not in str(error):
                    raise
                self._has_graphs = False  # a node is not on the GPU; the name will say so
        return create({})

    @staticmethod
    def _register(options: onnxruntime.SessionOptions, library: Path) -> None:
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:
            reason = first_line(error).replace(str(library), library.name)
            raise ExecutorError(f"ONNX Runtime cannot load {library.name}: {reason}") from error

    def features(self, task: str, pixels: np.ndarray) -> np.ndarray:
        (features,) = self.run(task, "vision", {"pixels": pixels[None]})
        return np.asarray(features[0])

    def context(self, task: str, image_features: np.ndarray | None) -> OnnxContext:
        sequence = self._sequence(task, image_features)
        return OnnxContext(sequence, self._vocabulary(task), self._lock, lambda left: self._keep(task, left))

    def group(self, task: str, sequences: int) -> OnnxGroup | None:
        """On a GPU by our kernels alone: ONNX Runtime's products round by how many rows there are."""
        if self._device.is_gpu and not self._kernels:
            return None
        session, hidden = self.session(task, "language"), self.bundle.manifest.language.hidden
        caches = self._caches(task, sequences)
        return OnnxGroup(session, caches, hidden, self._vocabulary(task), self._lock, self._graphs)

    def _caches(self, task: str, sequences: int = 1) -> Caches:
        codes, device = self.bundle.manifest.codes, self._device
        # Growing ends a GPU's CUDA graphs, and all codes of a picture will come.
        ahead = codes.grid**2 if task == GENERATION and codes and device.is_gpu else 0
        return Caches(cache_values(self.bundle.manifest), self._memory, device.step_tokens, sequences, ahead)

    def _vocabulary(self, task: str) -> Callable[[np.ndarray], np.ndarray]:
        return lambda hidden: self.run(task, "vocabulary", {"hidden": hidden})[0]

    def _sequence(self, task: str, image_features: np.ndarray | None) -> BoundSequence:
        session, manifest = self.session(task, "language"), self.bundle.manifest
        # Where graphs are captured, all sequences are of one size: with room for an image, seen or not.
        patches = manifest.vision.patches if self._has_graphs else 1
        if image_features is None:
            image_features = np.zeros((patches, manifest.language.hidden), np.float32)
        with self._lock:
            if self._left[task]:
                sequence = self._left[task].pop()
                sequence.features.write(image_features[None])
                return sequence
            features = Buffer.of(np.ascontiguousarray(image_features[None]), self._device.memory)
            return BoundSequence(session, self._caches(task), features, self._graphs)

    def _keep(self, task: str, sequence: BoundSequence) -> None:
        """Take back what a sequence that is gone leaves; on the CPU that is freed."""
        if self._has_graphs:
            with self._lock:
                self._left[task].append(sequence)

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

    def _takes_from_arena(self, role: str) -> bool:
        return role in _OF_PICTURES and not self._device.is_gpu

    def run(self, task: str, role: str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        options = onnxruntime.RunOptions()
        if self._takes_from_arena(role):
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        try:
            with self._lock:
                results = list(self.session(task, role).run(None, feeds, options))
            if role in _OF_PICTURES:
                return_freed_memory()
            return results
        except HealthGPTError:
            raise
        except Exception as error:
            raise ExecutorError(f"ONNX Runtime failed in the {role} graph of {task}: {first_line(error)}") from error


class _Encoded(os.PathLike[bytes]):
    """A path as the system has it: as text it may be none, in a locale that is not UTF-8."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> bytes:
        return os.fsencode(self._path)


def _load_cuda() -> None:
    """Open the CUDA libraries and cuDNN that other wheels brought, where ONNX Runtime knows how (1.21)."""
    if hasattr(onnxruntime, "preload_dlls"):
        with redirect_stdout(io.StringIO()):  # it prints what it does not find, which then may not be needed
            onnxruntime.preload_dlls()


def value_of(node: Any) -> Value:
    """An input or output of a session as the contract writes it."""
    element = node.type.removeprefix("tensor(").removesuffix(")")
    return Value("float32" if element == "float" else element, node.shape)
