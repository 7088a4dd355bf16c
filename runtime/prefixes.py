"""Sequences that begin with the system prompt and a picture, kept for the next question about the same picture."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from .checks import is_whole
from .errors import OptionError
from .executors import Context


class Prefix(NamedTuple):
    """What a sequence begins with: the task, the SHA-256 of picture and tokens, and how many tokens these are."""

    task: str
    pixels: str
    tokens: str
    length: int

    @classmethod
    def of(cls, task: str, pixels: np.ndarray, token_ids: np.ndarray) -> Prefix:
        """That of a picture, uint8 [H, W, 3], and the tokens up to its last patch, int64 [S]."""
        shape = f"{pixels.shape} ".encode()
        return cls(task, _sha256(shape + pixels.tobytes()), _sha256(token_ids.tobytes()), len(token_ids))


class Prefixes:
    """Contexts by what they begin with, the least recently used dropped above `limit_bytes` of caches.

    A context is found only by the very pixels and prompt that are in it, and is gone from here while it is in use: no
    two requests share one.
    """

    def __init__(self, limit_bytes: int) -> None:
        if not (is_whole(limit_bytes) and limit_bytes >= 0):
            raise OptionError(f"keep_pictures_bytes must be 0 or above, got {limit_bytes!r:.40}")
        self.limit_bytes = limit_bytes
        self._contexts: OrderedDict[Prefix, Context] = OrderedDict()
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        """Whether anything is to be kept at all."""
        return self.limit_bytes > 0

    def take(self, prefix: Prefix) -> Context | None:
        """The context of `prefix`, now the caller's alone; None if there is none."""
        with self._lock:
            return self._contexts.pop(prefix, None)

    def keep(self, prefix: Prefix, context: Context) -> None:
        """Keep what `context` holds of `prefix`; one that does not fit by itself is not kept, and drops no other."""
        context.length = prefix.length
        if context.memory_bytes > self.limit_bytes:
            return
        with self._lock:
            self._contexts[prefix] = context
            self._contexts.move_to_end(prefix)
            while sum(one.memory_bytes for one in self._contexts.values()) > self.limit_bytes:
                self._contexts.popitem(last=False)

    def kept(self) -> list[tuple[Prefix, Context]]:
        """All that is kept and not in use, the least recently used first."""
        with self._lock:
            return list(self._contexts.items())

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._contexts.clear()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
