"""What stands between a peer and what is done for it: its lines, of which some are read ahead, and ours."""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import Cancelled, RequestError

# A picture of 48 MiB in base64; a larger one goes by its path. Text beyond ASCII takes up to eight times that, parsed.
MAX_LINE_BYTES = 64 << 20
# Lines read ahead, as long as they have no more than MAX_LINE_BYTES together. More stay in the pipe.
MAX_WAITING = 64
# A pipe's, and how many of them are read between two tokens: a line of any size must not hold up a request for long.
_CHUNK_BYTES, _CHUNKS = 1 << 16, 16
_RATHER = "give the path of the picture"


@dataclass(slots=True, eq=False)
class Line:
    """A line that waits for its turn, or has it."""

    content: bytearray
    error: Exception | None = None  # what it will get instead of being done
    name: str | float | None = None  # its id
    found: bool | None = None  # of one that cancels: whether there was something to cancel

    def give_up(self, error: Exception) -> None:
        self.content, self.error = bytearray(), error

    @property
    def is_cancelled(self) -> bool:
        return isinstance(self.error, Cancelled)


class Channel:
    """Reads lines from the file descriptor `source` and writes lines to `target`, on the thread of whoever calls.

    `arrived` is called with each line as soon as it is read, which may be long before its turn.
    """

    def __init__(self, source: int, target: int, arrived: Callable[[Line], None]) -> None:
        self.waiting: deque[Line] = deque()
        self._source, self._target, self._arrived = source, target, arrived
        self._chunk = b""  # read, and not yet divided into lines
        self._begun = Line(bytearray())  # whose end is not read
        self._ended = False

    def receive(self, wait: bool = True) -> Line | None:
        """The next line, once there is one; None where there will be none, or is none yet and nobody is to `wait`."""
        if not wait:
            self.look()
        self._divide()
        while wait and not self.waiting and not self._ended:
            select.select([self._source], [], [])
            self._read()
        return self.waiting.popleft() if self.waiting else None

    def look(self) -> None:
        """Read what has come, without waiting for more."""
        self._divide()
        for _ in range(_CHUNKS):
            if not (self._reads_on() and select.select([self._source], [], [], 0)[0]):
                break
            self._read()

    def send(self, line: str) -> None:
        """Write a line of ASCII, and read meanwhile: else a peer that writes before it reads would wait for ever."""
        rest = memoryview(line.encode("ascii") + b"\n")
        while rest:
            sources = [self._source] if self._reads_on() else []
            readable, writable, _ = select.select(sources, [self._target], [])
            if readable:
                self._read()
            if writable:  # of so many bytes none has to wait
                rest = rest[os.write(self._target, rest[: select.PIPE_BUF]) :]

    def _has_room(self) -> bool:
        if len(self.waiting) >= MAX_WAITING:
            return False
        return sum(len(line.content) for line in self.waiting) <= MAX_LINE_BYTES

    def _reads_on(self) -> bool:
        return not self._ended and not self._chunk and self._has_room()

    def _read(self) -> None:
        """Read once, when there is something to read or the end."""
        self._chunk = os.read(self._source, _CHUNK_BYTES)
        if not self._chunk:
            self._ended = True
            if self._begun.content or self._begun.error:
                self._end_line()
        self._divide()

    def _divide(self) -> None:
        """Divide what was read into lines, as many as there is room for."""
        while self._chunk and self._has_room():
            piece, end, self._chunk = self._chunk.partition(b"\n")
            self._extend(piece + end)
            if end:
                self._end_line()

    def _extend(self, piece: bytes) -> None:
        """Add to the line that is begun, unless it is given up."""
        line = self._begun
        if line.error:
            return
        if len(line.content) + len(piece) > MAX_LINE_BYTES:
            line.give_up(RequestError(f"a line must have at most {MAX_LINE_BYTES} bytes, found more; {_RATHER}"))
            return
        try:
            line.content += piece
        except MemoryError:
            line.give_up(MemoryError())

    def _end_line(self) -> None:
        line, self._begun = self._begun, Line(bytearray())
        self.waiting.append(line)
        self._arrived(line)
