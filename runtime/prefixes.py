"""Sequences that begin with the system prompt and a picture, kept for the next question about the same picture."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

import numpy as np

from .errors import GenerationError
from .executors import Context


class Prefixes:
    """Contexts by what they begin with, the least recently used dropped above `limit_bytes` of caches.

    A context is found only by the very pixels and prompt that are in it, and is gone from here while it is in use: no
    two requests share one.
    """

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise GenerationError(f"prefix_cache_bytes must be 0 or above, got {limit_bytes}")
        self._limit_bytes = limit_bytes
        self._contexts: OrderedDict[str, Context] = OrderedDict()
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        """Whether anything is to be kept at all."""
        return self._limit_bytes > 0

    @staticmethod
    def key(task: str, pixels: np.ndarray, token_ids: np.ndarray) -> str:
        """The SHA-256 of a task's picture, uint8 [H, W, 3], and the tokens up to its last patch, int64 [S]."""
        digest = hashlib.sha256(f"{task} {pixels.shape} {len(token_ids)} ".encode())
        digest.update(pixels.tobytes())
        digest.update(token_ids.tobytes())
        return digest.hexdigest()

    def take(self, key: str) -> Context | None:
        """The context of `key`, now the caller's alone; None if there is none."""
        with self._lock:
            return self._contexts.pop(key, None)

    def keep(self, key: str, context: Context, length: int) -> None:
        """Keep the first `length` tokens of `context` for `key`."""
        context.length = length
        with self._lock:
            self._contexts[key] = context
            while sum(one.memory_bytes for one in self._contexts.values()) > self._limit_bytes:
                self._contexts.popitem(last=False)

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._contexts.clear()
