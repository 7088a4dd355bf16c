"""Who asks `healthgpt-edge serve`: on the other end of its pipes, in this process or as its parent."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

from healthgpt_edge.serving import Server

QUESTION = "What is in the image?"
ASK = {"task": "answer", "question": QUESTION, "max_new_tokens": 4}
# No test waits as long, unless it fails.
SECONDS = 120


def line(request: dict[str, Any] | bytes) -> bytes:
    return request if isinstance(request, bytes) else json.dumps(request).encode() + b"\n"


class Peer:
    """Asks a server that runs on a thread of its own, until the block is left."""

    def __init__(self, session: Any, **options: int) -> None:
        source, self._asks = os.pipe()
        self._told, target = os.pipe()
        self._read = b""

        def serve() -> None:
            try:
                Server(session, source, target, **options).run()
            finally:
                os.close(source)
                os.close(target)

        self._thread = Thread(target=serve, daemon=True)

    def __enter__(self) -> Peer:
        self._thread.start()
        event = self.event()
        assert event and event["event"] == "ready"
        return self

    def __exit__(self, *failure: object) -> None:
        if failure[0] is None:
            assert self.end() == []
            self._thread.join(SECONDS)
            assert not self._thread.is_alive()

    def ask(self, *requests: dict[str, Any] | bytes) -> None:
        rest = b"".join(map(line, requests))
        while rest:
            assert select.select([], [self._asks], [], SECONDS)[1], "the server reads no more"
            rest = rest[os.write(self._asks, rest[: select.PIPE_BUF]) :]

    def event(self) -> dict[str, Any] | None:
        """The next line; None where there are no more."""
        while b"\n" not in self._read:
            assert select.select([self._told], [], [], SECONDS)[0], "the server says nothing"
            if not (chunk := os.read(self._told, 1 << 16)):
                assert not self._read
                return None
            self._read += chunk
        first, _, self._read = self._read.partition(b"\n")
        return json.loads(first)

    def last(self) -> dict[str, Any]:
        """The next line that is the last one of a request."""
        while (event := self.event()) and event["event"] not in ("result", "error"):
            pass
        assert event
        return event

    def end(self) -> list[dict[str, Any]]:
        """Ask no more; the lines that come until the server has done all."""
        if self._asks >= 0:
            os.close(self._asks)
            self._asks = -1
        return list(iter(self.event, None))


def process(bundle: Path, *options: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "healthgpt_edge.cli", "serve", str(bundle), "--threads", "1", *options]
    # Lines must not wait in a buffer, nor be an error when Python exits, where Python buffers as it does by default.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, env=environment)
