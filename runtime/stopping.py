"""Signals that end the process, taken so that it cleans up first."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


@contextmanager
def stopping_cleanly() -> Iterator[None]:
    """Within the block SIGINT, SIGTERM and SIGHUP raise SystemExit, so that `finally` removes what is half-written.

    The first of them alone, or a second Ctrl-C would cut that short. For the main thread.
    """

    def stop(number: int, frame: object) -> NoReturn:
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
