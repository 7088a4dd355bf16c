"""Threads that a library is about to start."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from .errors import ExecutorError

_GONE_TRIES, _GONE_SECONDS = 1000, 0.0001


def require_threads(count: int) -> None:
    """Raise ExecutorError unless the system starts so many threads at once.

    Asked before ONNX Runtime is: where it gets only some of its threads, it waits for these for ever, deaf to signals.
    """
    done, started = threading.Event(), 0
    threads = [threading.Thread(target=done.wait, daemon=True) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
            started += 1
    except RuntimeError:
        message = f"the system must start {count} more threads, found {started}, by a limit on threads or memory"
        raise ExecutorError(message) from None
    finally:
        done.set()
        for thread in threads[:started]:
            thread.join()
            _wait_until_gone(thread)


def _wait_until_gone(thread: threading.Thread) -> None:
    """Until Linux has done with a thread, as it has somewhat later than Python: so long it counts in the limit."""
    task = Path(f"/proc/self/task/{thread.native_id}")
    for _ in range(_GONE_TRIES):
        if not task.exists():
            break
        time.sleep(_GONE_SECONDS)
