"""TensorRT: the executor that drives the engines of a bundle, of either TensorRT.

All that is known about buffers, caches and passes is here and in tensorrt_context.py, on addresses; what runs a pass is
an `Engine` on a `Device`, which tests replace by the same graphs in ONNX Runtime on host memory. Not run on a GPU yet.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import numpy as np

from ..bundle import Bundle
from ..engines import (
    COMPUTE_TYPES,
    LANGUAGE,
    MODULES,
    EngineRecord,
    Settings,
    check_fresh,
    folder,
    import_tensorrt,
    read_engine,
    read_record,
)
from ..errors import ExecutorError
from ..manifest import Manifest
from .contract import Value, graph_values
from .cuda import CudaDevice, Device
from .hlora_plugin import register
from .tensorrt_context import DECODE, LanguageBuffers, TensorRtContext, caches_bytes, output_name
from .tensorrt_engine import Engine, Tensor, TensorRtEngine
from .weight_streaming import MARGIN_BYTES

_RESIDENT = ("vision", "codes")


class TensorRtExecutor:
    """The engines of `tasks`, their workspace and their input and output buffers, all allocated when it is made.

    open_engine gives an engine by its name in the record; raises ExecutorError where one is not what the manifest says.
    """

    prompt_tokens: int | None = None
    rows_in_tiles = True

    def __init__(
        self,
        bundle: Bundle,
        tasks: tuple[str, ...],
        device: Device,
        settings: Settings,
        open_engine: Callable[[str], Engine],
        name: str = "tensorrt",
    ) -> None:
        self.bundle, self.device, self.settings = bundle, device, settings
        self._tasks, self._open = tasks, open_engine
        # Sequences share the engines' workspace and buffers, and copies go through the same memory.
        self.lock = threading.RLock()
        self._engines: dict[str, Engine] = {}
        self.language = LanguageBuffers(bundle.manifest, settings, device)
        self._workspace = device.allocate(0)
        # The language engine last: where it streams weights, it keeps as many as the others leave it room for.
        for engine in reversed(resident_engines(bundle.manifest, tasks)):
            self._reserve(self.engine(engine))
        self.name = f"{name}+streaming" if self.engine(LANGUAGE).streams else name

    @classmethod
    def open(cls, bundle: Bundle, tasks: tuple[str, ...], target: str | None = None) -> TensorRtExecutor:
        """The engines of `target` on the first GPU; by default of the target that has some here, TensorRT-RTX first.

        Raises ExecutorError for engines that are missing, stale, damaged, not for this GPU or in need of a plugin that
        is not here.
        """
        if target is None:
            target = next((one for one in MODULES if folder(bundle, one).is_dir()), next(iter(MODULES)))
        record = read_record(bundle, target)
        trt = import_tensorrt(target)
        for engine in resident_engines(bundle.manifest, tasks):
            check_fresh(bundle, record, engine, str(trt.__version__))
        device = CudaDevice()
        if record.settings.plugin:
            register(trt, device.kernels, device.array)

        def open_engine(name: str) -> Engine:
            data = read_engine(bundle, record, name, str(trt.__version__))
            jit_cache = folder(bundle, target) / f"{name}.{device.compute_capability}.jit"
            kept = kept_bytes(bundle.manifest, record, tasks) if name == LANGUAGE else None
            return TensorRtEngine(trt, target, name, data, device, jit_cache, kept)

        return cls(bundle, tasks, device, record.settings, open_engine, f"{target}-{record.settings.compute}")

    def engine(self, name: str) -> Engine:
        """The engine called `name`; what is rarely used is opened by who asks for it first."""
        if name not in self._engines:
            engine = self._open(name)
            expected = engine_values(self.bundle.manifest, name, self.settings)
            for tensor in sorted(engine.values.keys() | expected.keys()):
                found = engine.values.get(tensor)
                if found != expected.get(tensor):
                    raise ExecutorError(
                        f"engine {name}: {tensor} must be {expected.get(tensor, 'absent')} by the manifest, "
                        f"found {found or 'none'}"
                    )
            self._engines[name] = engine
        return self._engines[name]

    def run(self, name: str, tensors: dict[str, Tensor], profile: int = DECODE) -> None:
        """Order a pass of engine `name`."""
        engine = self.engine(name)
        self._reserve(engine)
        engine.run(profile, tensors, self._workspace)

    def _reserve(self, engine: Engine) -> None:
        """Let the workspace, one for all engines, be large enough for this one."""
        if engine.workspace_bytes > self._workspace.size_bytes:
            self._workspace = self.device.allocate(engine.workspace_bytes)

    def features(self, task: str, pixels: np.ndarray) -> np.ndarray:
        if task not in self._tasks:
            raise ExecutorError(f"the executor was opened for {', '.join(self._tasks)}, not for {task}")
        return self._call(f"{task}.vision", "pixels", pixels, "image_features")

    def picture(self, codes: np.ndarray) -> np.ndarray:
        return self._call("generation.codes", "codes", codes, "image")

    def draft(self, pixels: np.ndarray) -> np.ndarray:
        return self._call("generation.draft", "pixels", pixels, "codes")

    def context(self, task: str, image_features: np.ndarray | None) -> TensorRtContext:
        if task not in self._tasks:
            raise ExecutorError(f"the executor was opened for {', '.join(self._tasks)}, not for {task}")
        return TensorRtContext(self, task, image_features)

    def group(self, task: str, sequences: int) -> None:
        """None: the engines take one sequence."""

    def _call(self, name: str, feed: str, values: np.ndarray, result: str) -> np.ndarray:
        """Run an engine of one input, `feed`, and one output on one picture."""
        with self.lock:
            found = self.engine(name).values
            batch = np.ascontiguousarray(values[None], found[feed].type)
            given = self.device.allocate(batch.nbytes)
            self.device.upload(batch, given)
            shape = (1, *(int(size) for size in found[result].shape[1:]))
            dtype = np.dtype(found[result].type)
            memory = self.device.allocate(math.prod(shape) * dtype.itemsize)
            self.run(name, {feed: Tensor(given.address, batch.shape), result: Tensor(memory.address, shape)})
            return np.asarray(self.device.download(memory, shape, dtype)[0])


def resident_engines(manifest: Manifest, tasks: tuple[str, ...]) -> list[str]:
    """The engines that are loaded with the executor of `tasks`."""
    own = [f"{task}.{role}" for task in tasks for role in _RESIDENT if role in manifest.tasks[task].graphs]
    return [LANGUAGE, *own]


def kept_bytes(manifest: Manifest, record: EngineRecord, tasks: tuple[str, ...]) -> int | None:
    """Memory that a language engine which may stream its weights leaves free: for the caches of a sequence and for the
    engines that are opened by who asks for them. None for one that may not."""
    if not record.settings.stream_weights:
        return None
    resident = resident_engines(manifest, tasks)
    later = [
        entry.size for name, entry in record.engines.items() if name not in resident and name.split(".")[0] in tasks
    ]
    return caches_bytes(manifest, record.settings) + sum(later) + MARGIN_BYTES


def engine_values(manifest: Manifest, name: str, settings: Settings) -> dict[str, Value]:
    """What engine `name` takes and gives by the manifest; "?" for dimensions that a run chooses."""
    if name != LANGUAGE:
        task, role = name.split(".")
        return {tensor: _closed(value) for tensor, value in graph_values(manifest, task, role).items()}
    values = {"task": Value("int64", [1])} if len(manifest.tasks) > 1 else {}
    for task in manifest.tasks:
        for tensor, value in graph_values(manifest, task, LANGUAGE).items():
            if tensor.endswith("_scale"):
                continue  # of int8 caches, which engines keep as floats
            own = tensor in ("last_positions", "logits", "hidden")
            closed = _closed(value, {"M": settings.max_context})
            if tensor.startswith(("past_key", "present_key")):
                closed = closed._replace(type=COMPUTE_TYPES[settings.compute])
            values[output_name(task, tensor) if own else tensor] = closed
    return values


def _closed(value: Value, sizes: dict[str, int] | None = None) -> Value:
    known = sizes or {}
    return Value(value.type, [known.get(size, "?") if isinstance(size, str) else size for size in value.shape])
