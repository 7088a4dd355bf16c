"""One sequence of the language engine: its caches on the device, and its passes as addresses."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engines import LANGUAGE, Settings
from ..errors import ExecutorError
from ..manifest import Manifest
from . import Choice, RunAhead
from .chooser import Chooser
from .cuda import Device, Memory
from .tensorrt_engine import Tensor

if TYPE_CHECKING:
    from .tensorrt import TensorRtExecutor

DECODE, PREFILL = 0, 1
# What TensorRT and CUDA ask of addresses at most.
_ALIGNMENT_BYTES = 256
_INT64, _FLOAT32 = np.dtype(np.int64), np.dtype(np.float32)
_CACHE_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "uint16"}


def cache_layout(manifest: Manifest, settings: Settings) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape and type of a cache, bfloat16 as the bytes it has, and the bytes from one to the next."""
    language = manifest.language
    shape = (1, language.kv_heads, settings.max_context, language.head_dim)
    dtype = np.dtype(_CACHE_TYPES[settings.compute])
    return shape, dtype, -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def caches_bytes(manifest: Manifest, settings: Settings) -> int:
    """What the caches of one sequence take."""
    return 2 * manifest.language.layers * cache_layout(manifest, settings)[2]


def output_name(task: str, name: str) -> str:
    """The language engine's name for an input or output that each task has of its own."""
    return f"{name}.{task}"


class LanguageBuffers:
    """Inputs and outputs of the language engine, and the arrangement of one sequence's caches."""

    def __init__(self, manifest: Manifest, settings: Settings, device: Device) -> None:
        language = manifest.language
        # Numbers that give shapes, read on the host when a pass is ordered, and always at the same address.
        self._numbers = np.arange(settings.max_rows + 1, dtype=np.int64)
        # past_length, then the new tokens: one copy a pass.
        self.tokens_at = _ALIGNMENT_BYTES
        self.inputs = device.allocate(_ALIGNMENT_BYTES + settings.prefill_rows * _INT64.itemsize)
        self.task_numbers = device.allocate(_ALIGNMENT_BYTES * len(manifest.tasks))
        for index in range(len(manifest.tasks)):
            device.upload(np.array([index], np.int64), self.task_numbers, index * _ALIGNMENT_BYTES)
        self.outputs: dict[str, Memory] = {}
        self.rows: dict[str, int] = {}
        for task, entry in manifest.tasks.items():
            sizes = {"logits": language.vocab - entry.first_logit}
            if entry.first_logit:
                sizes["hidden"] = language.hidden
            for name, size in sizes.items():
                output = output_name(task, name)
                self.rows[output] = size
                self.outputs[output] = device.allocate(settings.max_rows * size * _FLOAT32.itemsize)
        self.cache_shape, self.cache_type, stride = cache_layout(manifest, settings)
        names = [f"key_values.{layer}.{kind}" for layer in range(language.layers) for kind in ("key", "value")]
        self.cache_offsets = {name: index * stride for index, name in enumerate(names)}
        self.caches_bytes = caches_bytes(manifest, settings)

    def number_on_host(self, number: int) -> int:
        """The address of an int64 on the host that is `number`, at most max_rows."""
        return int(self._numbers.ctypes.data) + number * _INT64.itemsize


class TensorRtContext:
    """Caches of one sequence on the device, updated in place by every pass."""

    def __init__(self, executor: TensorRtExecutor, task: str, image_features: np.ndarray | None) -> None:
        self._executor, self._task, self._buffers = executor, task, executor.language
        self._manifest = executor.bundle.manifest
        if image_features is None:
            image_features = np.zeros((1, self._manifest.language.hidden), np.float32)
        patches = self._manifest.vision.patches
        if len(image_features) > patches:
            raise ExecutorError(f"image_features must have at most {patches} rows, got {len(image_features)}")
        features = np.ascontiguousarray(image_features[None], np.float32)
        self._features = executor.device.allocate(features.nbytes)
        with executor.lock:
            executor.device.upload(features, self._features)
        self._caches = executor.device.allocate(self._buffers.caches_bytes)
        self._fixed = {"image_features": Tensor(self._features.address, features.shape)}
        for name, offset in self._buffers.cache_offsets.items():
            cache = Tensor(self._caches.address + offset, self._buffers.cache_shape)
            self._fixed[f"past_{name}"] = self._fixed[f"present_{name}"] = cache
        if len(self._manifest.tasks) > 1:
            # The language engine holds all of the bundle's tasks, and numbers them in this order.
            number = sorted(self._manifest.tasks).index(task) * _ALIGNMENT_BYTES
            self._fixed["task"] = Tensor(self._buffers.task_numbers.address + number, (1,))
        self._chooser: Chooser | None = None
        self.length = 0

    @property
    def room(self) -> int | None:
        return self._executor.settings.max_context - self.length

    @property
    def memory_bytes(self) -> int:
        return self._caches.size_bytes + self._features.size_bytes

    def expect(self, tokens: int) -> None:
        """Nothing: the caches have the engine's capacity."""

    def forward(self, token_ids: np.ndarray, last_positions: int = 1, full_vocabulary: bool = False) -> np.ndarray:
        with self._executor.lock:
            settings, count = self._executor.settings, len(token_ids)
            self._require_room(count)
            logits, first, silent = [], 0, count - last_positions
            while first < count:
                end = min(first + settings.prefill_rows, count)
                # Rows of logits that this pass gives, of which there is room for max_rows.
                rows = max(0, end - max(first, silent))
                end -= max(0, rows - settings.max_rows)
                logits.append(self._pass(token_ids[first:end], min(rows, settings.max_rows), full_vocabulary))
                first = end
            given = [part for part in logits if len(part)]
            return np.concatenate(given) if len(given) > 1 else given[0]

    def caches(self, length: int) -> dict[str, np.ndarray]:
        with self._executor.lock:
            kept = {}
            for name, offset in self._buffers.cache_offsets.items():
                # Whole rows of all heads are far apart, so a cache comes as it is and is cut here.
                whole = self._executor.device.download(
                    self._caches, self._buffers.cache_shape, self._buffers.cache_type, offset
                )
                kept[name] = whole[:, :, :length] if self._exact else _widened(whole[:, :, :length])
            return kept

    def restore(self, caches: dict[str, np.ndarray]) -> None:
        with self._executor.lock:
            length = next(iter(caches.values())).shape[2]
            for name, offset in self._buffers.cache_offsets.items():
                whole = np.zeros(self._buffers.cache_shape, self._buffers.cache_type)
                whole[:, :, :length] = caches[name] if self._exact else _narrowed(caches[name])
                self._executor.device.upload(whole, self._caches, offset)
            self.length = length

    @property
    def _exact(self) -> bool:
        """Whether numpy knows the caches' type; it does not know bfloat16, which is given as float32."""
        return self._executor.settings.compute != "bf16"

    @property
    def run_ahead(self) -> RunAhead | None:
        return self._run_ahead if self._executor.device.kernels else None

    def _run_ahead(self, token_id: int, count: int, choice: Choice) -> np.ndarray:
        with self._executor.lock:
            executor, buffers = self._executor, self._buffers
            self._require_room(count)
            name = self._results["logits"]
            if self._chooser is None:
                first_id = self._manifest.tasks[self._task].first_logit
                self._chooser = Chooser(executor.device, first_id, buffers.rows[name])
            self._chooser.begin(choice, count)
            self._upload(np.array([token_id], np.int64))
            tensors = self._tensors(1, 1)
            token, past_length = tensors["token_ids"].address, tensors["past_length"].address
            for _ in range(count):
                executor.run(LANGUAGE, tensors, DECODE)
                self._chooser.order(buffers.outputs[name].address, token, past_length)
            self.length += count
            return self._chooser.ids()

    def _pass(self, token_ids: np.ndarray, last_positions: int, full_vocabulary: bool) -> np.ndarray:
        """One pass over [S] tokens; logits float32 [last_positions, rows]."""
        executor, count = self._executor, len(token_ids)
        self._upload(token_ids)
        profile = DECODE if count <= executor.settings.max_rows else PREFILL
        executor.run(LANGUAGE, self._tensors(count, last_positions), profile)
        self.length += count
        if not last_positions:
            return np.empty((0, 0), np.float32)
        name = self._results["logits"]
        shape = (last_positions, self._buffers.rows[name])
        logits = executor.device.download(self._buffers.outputs[name], shape, _FLOAT32)
        if full_vocabulary and "hidden" in self._results:
            logits = np.concatenate([self._other_rows(last_positions), logits], axis=-1)
        return logits

    def _upload(self, token_ids: np.ndarray) -> None:
        """What a pass reads first: the tokens before it, and its own."""
        buffers = self._buffers
        inputs = np.zeros(buffers.tokens_at // _INT64.itemsize + len(token_ids), np.int64)
        inputs[0], inputs[-len(token_ids) :] = self.length, token_ids
        self._executor.device.upload(inputs, buffers.inputs)

    def _tensors(self, count: int, last_positions: int) -> dict[str, Tensor]:
        """Where the inputs and outputs of a pass over `count` tokens lie."""
        buffers = self._buffers
        tensors = dict(self._fixed)
        tensors["past_length"] = Tensor(buffers.inputs.address, (1,))
        tensors["token_ids"] = Tensor(buffers.inputs.address + buffers.tokens_at, (1, count))
        for task in self._manifest.tasks:
            wanted = last_positions if task == self._task else 0
            tensors[output_name(task, "last_positions")] = Tensor(buffers.number_on_host(wanted), (1,))
        for name, memory in buffers.outputs.items():
            given = last_positions if name in self._results.values() else 0
            tensors[name] = Tensor(memory.address, (1, given, buffers.rows[name]))
        return tensors

    def _require_room(self, count: int) -> None:
        """Raises ExecutorError unless the caches hold `count` tokens more."""
        most, needed = self._executor.settings.max_context, self.length + count
        if needed > most:
            raise ExecutorError(f"the engines hold {most} tokens, found {needed}: build with --max-context")

    @property
    def _results(self) -> dict[str, str]:
        """The names of this task's outputs in the engine."""
        first_logit = self._manifest.tasks[self._task].first_logit
        names = ("logits", "hidden") if first_logit else ("logits",)
        return {name: output_name(self._task, name) for name in names}

    def _other_rows(self, rows: int) -> np.ndarray:
        """Logits [rows, first_logit] of the head rows that the language engine leaves out."""
        device, first_logit = self._executor.device, self._manifest.tasks[self._task].first_logit
        logits = device.allocate(rows * first_logit * _FLOAT32.itemsize)
        hidden = self._buffers.outputs[self._results["hidden"]]
        tensors = {
            "hidden": Tensor(hidden.address, (1, rows, self._manifest.language.hidden)),
            "logits": Tensor(logits.address, (1, rows, first_logit)),
        }
        self._executor.run(f"{self._task}.vocabulary", tensors)
        return device.download(logits, (rows, first_logit), _FLOAT32)


def _widened(values: np.ndarray) -> np.ndarray:
    """The bytes of bfloat16 values as float32: their upper half."""
    return (values.astype(np.uint32) << 16).view(np.float32)


def _narrowed(values: np.ndarray) -> np.ndarray:
    """Float32 values that bfloat16 holds, as its bytes."""
    return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
