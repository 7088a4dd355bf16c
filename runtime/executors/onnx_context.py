"""One sequence of the language graph by ONNX Runtime: passes bound to fixed memory, on a GPU as CUDA graphs."""

from __future__ import annotations

import ctypes
import itertools
import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import onnxruntime

from ..errors import ExecutorError
from . import RunAhead
from .onnx_memory import Buffer, Caches

# Decode steps and drafts (drafting.pace.MAX_ROWS) come again; prompts do not, which have more tokens or come first.
MOST_STEP_ROWS = 64
# A prefill's workspace is worth giving back, a decode step's is not, but over many steps the heap grows too.
TRIM_EVERY_PASSES = 64
# Drafts change between a few sizes, and binding one anew takes 0.2 ms, a fifth of a small model's pass. Each has logits
# of its own, so not all of them are kept.
_BOUND_PASSES = 4
# What ONNX Runtime says, behind places in its own source, and what it means.
_REFUSALS = {
    "bad_alloc": "there is not enough memory",
    "Failed to allocate memory": "there is not enough memory",  # for an arena
    "pthread_create failed": "the system starts no more threads, by a limit on them or on memory",
    "requires procfs": "it opens weights by way of /proc, found it not mounted",
}
_NO_GRAPH = -1
_graph_ids = itertools.count(1)


class Pass:
    """A pass of fixed sizes, bound to fixed memory: at decode steps of a small model binding takes a tenth of the time.

    Over the first sequences of `caches`, as many as `features` [B, P, C] is of. Where it is a CUDA graph, its first run
    captures it and the others replay it. Must go before the caches grow.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        caches: Caches,
        features: Buffer,
        tokens: int,
        last_positions: int,
        is_graph: bool | None,
    ) -> None:
        self._session, self._binding = session, session.io_binding()
        outputs = {output.name: output for output in session.get_outputs()}
        sequences, device = features.shape[0], caches.device
        self._token_ids = Buffer.of(np.zeros((sequences, tokens), np.int64), device)
        self._past_length = Buffer.of(np.zeros(sequences, np.int64), device)
        # The CPU has to know it, for it says where a slice begins.
        self._last_positions = Buffer.of(np.array([last_positions], np.int64), "cpu")
        self._results = {
            name: Buffer.of(np.zeros((sequences, last_positions, outputs[name].shape[-1]), np.float32), device)
            for name in ("logits", "hidden")
            if name in outputs
        }
        inputs = {
            "token_ids": self._token_ids,
            "past_length": self._past_length,
            "last_positions": self._last_positions,
            "image_features": features,
        }
        for name, buffer in inputs.items():
            self._binding.bind_ortvalue_input(name, buffer.value)
        for name, part in caches.first(sequences):
            self._binding.bind_input(f"past_{name}", *part)
            self._binding.bind_output(f"present_{name}", *part)
        for name, buffer in self._results.items():
            self._binding.bind_ortvalue_output(name, buffer.value)
        self._graph_id = next(_graph_ids) if is_graph else _NO_GRAPH
        self._options = None
        if is_graph is not None:  # a session that captures has to be told when not to
            self._options = onnxruntime.RunOptions()
            self._options.add_run_config_entry("gpu_graph_id", str(self._graph_id))

    def run(self, token_ids: np.ndarray, past_length: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """One pass over token_ids [B, S], each sequence's past_length [B] tokens in.

        Logits and, where the graph gives them, hidden states, [B, n, ...]; the next run may write there again.
        """
        self._token_ids.write(token_ids)
        self._past_length.write(past_length)
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # onnxruntime's own exceptions share no public base class
            raise ExecutorError(f"ONNX Runtime failed in the language graph: {first_line(error)}") from error
        hidden = self._results.get("hidden")
        return self._results["logits"].read(), hidden.read() if hidden else None

    def release(self) -> None:
        """Give back the CUDA graph, where ONNX Runtime can (1.31)."""
        if self._graph_id != _NO_GRAPH and hasattr(self._session, "release_captured_graph"):
            self._session.release_captured_graph(self._graph_id)


class BoundPasses:
    """Passes over the same caches. Steps are kept for when they come again: as CUDA graphs with `graphs`, otherwise the
    last few; None for a session that knows of no graphs.
    """

    def __init__(self, session: onnxruntime.InferenceSession, caches: Caches, graphs: bool | None) -> None:
        self._session, self._caches, self._graphs = session, caches, graphs
        self._steps: dict[tuple[int, int, int], Pass] = {}

    def prompt(self, features: Buffer, tokens: int, last_positions: int) -> Pass:
        is_graph = None if self._graphs is None else False
        return Pass(self._session, self._caches, features, tokens, last_positions, is_graph)

    def step(self, sequences: int, tokens: int, last_positions: int, features: Callable[[], Buffer]) -> Pass:
        """A pass of these sizes, with `features` if it is the first."""
        sizes = sequences, tokens, last_positions
        bound = self._steps.pop(sizes, None)
        if bound is None:
            bound = Pass(self._session, self._caches, features(), tokens, last_positions, self._graphs)
        self._steps[sizes] = bound  # the last one in use is the last one in order
        while not self._graphs and len(self._steps) > _BOUND_PASSES:
            del self._steps[next(iter(self._steps))]
        return bound

    def drop(self) -> None:
        """Forget them all; their CUDA graphs would stay with the session otherwise."""
        for one in self._steps.values():
            one.release()
        self._steps.clear()


class BoundSequence:
    """What a sequence takes: its caches, its image's features [1, P, C], and the passes that are bound to them."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        caches: Caches,
        features: Buffer,
        graphs: bool | None,
    ) -> None:
        self.caches, self.features = caches, features
        self._passes = BoundPasses(session, caches, graphs)

    @property
    def size_bytes(self) -> int:
        return self.caches.size_bytes + self.features.size_bytes

    def reserve(self, length: int, kept: int) -> bool:
        """Have room for `length` tokens and keep what the first `kept` left; whether that took new memory."""
        if length <= self.caches.capacity:
            return False
        self._passes.drop()
        self.caches.grow(length, kept)
        return True

    def run(self, token_ids: np.ndarray, past_length: int, last_positions: int) -> tuple[np.ndarray, np.ndarray | None]:
        """One pass, see Pass.run."""
        tokens = len(token_ids)
        if past_length > 0 and tokens <= MOST_STEP_ROWS:
            bound = self._passes.step(1, tokens, last_positions, lambda: self.features)
        else:
            bound = self._passes.prompt(self.features, tokens, last_positions)
        return bound.run(token_ids[None], np.array([past_length], np.int64))


class OnnxContext:
    """One sequence of a task. `sequence` is its own until it goes; then `give_back` takes it."""

    room: int | None = None
    run_ahead: RunAhead | None = None

    def __init__(
        self,
        sequence: BoundSequence,
        vocabulary: Callable[[np.ndarray], np.ndarray],
        lock: AbstractContextManager[Any],
        give_back: Callable[[BoundSequence], None],
    ) -> None:
        self._sequence, self._vocabulary, self._lock = sequence, vocabulary, lock
        self._passes = 0
        self.length = 0
        weakref.finalize(self, give_back, sequence)

    @property
    def memory_bytes(self) -> int:
        return self._sequence.size_bytes

    def expect(self, tokens: int) -> None:
        with self._lock:
            self._reserve(self.length + tokens)

    def forward(self, token_ids: np.ndarray, last_positions: int = 1, full_vocabulary: bool = False) -> np.ndarray:
        with self._lock:
            self._reserve(self.length + len(token_ids))
            logits, hidden = self._sequence.run(token_ids, self.length, last_positions)
            self.length += len(token_ids)
            self._passes += 1
            if len(token_ids) > MOST_STEP_ROWS or self._passes % TRIM_EVERY_PASSES == 0:
                return_freed_memory()
            if full_vocabulary and hidden is not None:
                return np.concatenate([self._vocabulary(hidden)[0], logits[0]], axis=-1)
            return np.array(logits[0])  # of its own: the next pass writes there again

    def caches(self, length: int) -> dict[str, np.ndarray]:
        with self._lock:
            return self._sequence.caches.rows(length)

    def restore(self, caches: dict[str, np.ndarray]) -> None:
        length = next(iter(caches.values())).shape[2]
        with self._lock:
            self._reserve(length)
            self._sequence.caches.restore(caches)
        self.length = length

    def copy_to(self, caches: Caches, place: int) -> None:
        """Begin a sequence of `caches` with this one; there must be room."""
        with self._lock:
            caches.take(self._sequence.caches, self.length, place=place)

    def _reserve(self, length: int) -> None:
        if self._sequence.reserve(length, self.length):
            return_freed_memory()


def return_freed_memory() -> None:
    """Give back what was freed: at M3's size glibc would keep 1.1 GB per task from packing the weights alone."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def first_line(error: Exception) -> str:
    """What an error says, as one line; where it is the machine that refuses something, this alone, in our words."""
    text = str(error)
    for sign, words in _REFUSALS.items():
        if sign in text:
            return words
    return (text.splitlines() or [""])[0][:300]
