"""Signals that end the process, taken so that it cleans up first."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN_SECONDS = 0.01  # until a signal that came at a bad time comes again


@contextmanager
def stopping_cleanly(ends_process: bool = False) -> Iterator[None]:
    """Within the block SIGINT, SIGTERM and SIGHUP raise SystemExit, so that `finally` removes what is half-written.

    The first of them alone, or a second Ctrl-C would cut that short. Where the process ends with the block
    (`ends_process`), it would cut that short, too: then all stay ignored after one of them. For the main thread.
    """

    def again(number: int) -> None:
        threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), number)).start()

    def stop(number: int, frame: FrameType | None) -> None:
        if _importing(frame):
            # Libraries try an import and go on without it, which would be the end of the signal.
            again(number)
            return
        for other in handlers:
            signal.signal(other, _ignore)
        raise SystemExit(128 + number)

    def unraisable(lost: sys.UnraisableHookArgs) -> None:
        """Where nothing can be raised, in a finalizer or inside a library, Python drops what is."""
        if not isinstance(lost.exc_value, SystemExit) or not isinstance(lost.exc_value.code, int):
            hook(lost)
            return
        for number in handlers:
            signal.signal(number, stop)
        again(lost.exc_value.code - 128)

    known = (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP"))
    handlers = {number: signal.getsignal(number) for number in known if number is not None}
    # What is ignored stays ignored, as SIGHUP is under nohup.
    handlers = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
    for number in handlers:
        signal.signal(number, stop)
    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            stays_ignored = ends_process and signal.getsignal(number) is not stop
            # Until the process is gone: Python would take its own functions out before.
            signal.signal(number, signal.SIG_IGN if stays_ignored else handler)


def _ignore(number: int, frame: FrameType | None) -> None:
    """What SIG_IGN does; but of a signal that came with the first, during a pass, Python would say that it is lost."""


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported where `frame` is."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None
