"""Several sequences of the language graph by ONNX Runtime, to each of which a pass appends as many tokens."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import numpy as np
import onnxruntime

from ..errors import ExecutorError
from . import Context, Sequence
from .onnx_context import MOST_STEP_ROWS, TRIM_EVERY_PASSES, BoundPasses, OnnxContext, return_freed_memory
from .onnx_memory import Buffer, Caches


class OnnxMember:
    """A sequence of a group."""

    room: int | None = None

    def __init__(self, length: int) -> None:
        self.length = length


class OnnxGroup:
    """At most so many sequences as `caches` are of. Those that are in it lie in the first of them, in order.

    With `graphs` its passes are CUDA graphs, as in BoundSequence. These are tied to the caches, so both then stay when
    all have left, for those who come next.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        caches: Caches,
        hidden: int,
        vocabulary: Callable[[np.ndarray], np.ndarray],
        lock: AbstractContextManager[Any],
        graphs: bool | None,
    ) -> None:
        self._caches, self._hidden, self._vocabulary = caches, hidden, vocabulary
        self._lock, self._graphs = lock, graphs
        self._members: list[OnnxMember] = []
        self._bound = BoundPasses(session, caches, graphs)
        self._passes = 0
        weakref.finalize(self, _end, self._bound, lock)

    @contextmanager
    def join(self, context: Context) -> Iterator[Sequence]:
        with self._lock:
            self._reserve(context.length)
            cast(OnnxContext, context).copy_to(self._caches, len(self._members))
            member = OnnxMember(context.length)
            self._members.append(member)
        del context  # with what it holds, if nobody else wants it
        try:
            yield member
        finally:
            with self._lock:
                self._leave(member)

    def forward(
        self, token_ids: Mapping[Sequence, np.ndarray], full_vocabulary: Collection[Sequence]
    ) -> dict[Sequence, np.ndarray]:
        members = self._members
        if token_ids.keys() != set(members):
            raise ExecutorError(f"each of {len(members)} sequences needs tokens, got those of {len(token_ids)}")
        # All rows of a pass are those of a step, for a prompt's may have other bits.
        tokens = min(*map(len, token_ids.values()), max(1, MOST_STEP_ROWS // len(members)))
        with self._lock:
            self._reserve(max(member.length for member in members) + tokens)
            ids = np.stack([token_ids[member][:tokens] for member in members])
            lengths = np.array([member.length for member in members], np.int64)
            logits, hidden = self._bound.step(len(members), tokens, tokens, self._no_features).run(ids, lengths)
            self._passes += 1
            if self._passes % TRIM_EVERY_PASSES == 0:
                return_freed_memory()
            # Of its own each: the next pass writes there again.
            given: dict[Sequence, np.ndarray] = {
                member: np.array(rows) for member, rows in zip(members, logits, strict=True)
            }
            for place, member in enumerate(members):
                member.length += tokens
                if hidden is not None and member in full_vocabulary:
                    given[member] = np.concatenate([self._vocabulary(hidden[[place]])[0], given[member]], axis=-1)
            return given

    def _no_features(self) -> Buffer:
        """No token after the prefill is a picture's."""
        return Buffer.of(np.zeros((len(self._members), 1, self._hidden), np.float32), self._caches.device)

    def _reserve(self, length: int) -> None:
        if length <= self._caches.capacity:
            return
        self._bound.drop()
        kept = max((member.length for member in self._members), default=0)
        self._caches.grow(length, kept, len(self._members))
        return_freed_memory()

    def _leave(self, member: OnnxMember) -> None:
        """The last one takes its place; and of the last one nothing stays."""
        place, last = self._members.index(member), self._members.pop()
        if last is not member:
            self._caches.take(self._caches, last.length, len(self._members), place)
            self._members[place] = last
        if not self._members and not self._graphs:
            self._bound.drop()
            self._caches.release()
            return_freed_memory()


def _end(passes: BoundPasses, lock: AbstractContextManager[Any]) -> None:
    """What is left of a group that is gone."""
    with lock:
        passes.drop()
