"""Several sequences of the language graph by ONNX Runtime on the CPU, to each of which a pass appends a token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import onnxruntime

from ..errors import ExecutorError
from . import Context, Sequence
from .onnx_context import TRIM_EVERY_PASSES, Pass, return_freed_memory
from .onnx_memory import Buffer, Caches


class OnnxMember:
    """A sequence of a group."""

    room: int | None = None

    def __init__(self, length: int) -> None:
        self.length = length


class OnnxGroup:
    """At most so many sequences as `caches` are of. Those that are in it lie in the first of them, in order."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        caches: Caches,
        hidden: int,
        vocabulary: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        self._session, self._caches, self._hidden, self._vocabulary = session, caches, hidden, vocabulary
        self._members: list[OnnxMember] = []
        self._bound: dict[int, Pass] = {}  # by the number of sequences
        self._passes = 0

    @contextmanager
    def join(self, context: Context) -> Iterator[Sequence]:
        self._reserve(context.length)
        self._caches.restore(context.caches(context.length), len(self._members))
        member = OnnxMember(context.length)
        del context  # with what it holds, if nobody else wants it
        self._members.append(member)
        try:
            yield member
        finally:
            self._leave(member)

    def forward(
        self, token_ids: Mapping[Sequence, int], full_vocabulary: Collection[Sequence]
    ) -> dict[Sequence, np.ndarray]:
        members = self._members
        if token_ids.keys() != set(members):
            raise ExecutorError(f"each of {len(members)} sequences needs a token, got {len(token_ids)}")
        self._reserve(max(member.length for member in members) + 1)
        ids = np.array([[token_ids[member]] for member in members], np.int64)
        lengths = np.array([member.length for member in members], np.int64)
        logits, hidden = self._pass(len(members)).run(ids, lengths)
        self._passes += 1
        if self._passes % TRIM_EVERY_PASSES == 0:
            return_freed_memory()
        # Of its own each: the next pass writes there again.
        given: dict[Sequence, np.ndarray] = {
            member: np.array(rows) for member, rows in zip(members, logits, strict=True)
        }
        for place, member in enumerate(members):
            member.length += 1
            if hidden is not None and member in full_vocabulary:
                given[member] = np.concatenate([self._vocabulary(hidden[[place]])[0], given[member]], axis=-1)
        return given

    def _pass(self, sequences: int) -> Pass:
        if sequences not in self._bound:
            # No token after the prefill is a picture's.
            features = Buffer(np.zeros((sequences, 1, self._hidden), np.float32), "cpu")
            self._bound[sequences] = Pass(self._session, self._caches.first(sequences), features, 1, 1, "cpu", None)
        return self._bound[sequences]

    def _reserve(self, length: int) -> None:
        kept = max((member.length for member in self._members), default=0)
        if self._caches.reserve(max(length, kept), kept, len(self._members)):
            self._bound.clear()
            return_freed_memory()

    def _leave(self, member: OnnxMember) -> None:
        """The last one takes its place; and of the last one nothing stays."""
        place, last = self._members.index(member), self._members.pop()
        if last is not member:
            self._caches.restore(self._caches.rows(last.length, len(self._members)), place)
            self._members[place] = last
        if not self._members:
            self._bound.clear()
            self._caches.release()
            return_freed_memory()
