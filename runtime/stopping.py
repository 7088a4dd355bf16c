"""Signals that end the process, taken so that it cleans up first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_IMPORT_SECONDS = 0.01  # until it is asked again whether an import is over


@contextmanager
def stopping_cleanly() -> Iterator[None]:
    """Within the block SIGINT, SIGTERM and SIGHUP raise SystemExit, so that `finally` removes what is half-written.

    The first of them alone, or a second Ctrl-C would cut that short. For the main thread.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if _importing(frame):
            # Libraries try an import and go on without it, which would be the end of the signal.
            threading.Timer(_IMPORT_SECONDS, os.kill, (os.getpid(), number)).start()
            return
        for other in handlers:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    known = (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP"))
    handlers = {number: signal.getsignal(number) for number in known if number is not None}
    # What is ignored stays ignored, as SIGHUP is under nohup.
    handlers = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
    for number in handlers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported where `frame` is."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None
