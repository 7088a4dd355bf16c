"""The loop of `healthgpt-edge serve`: a request is done, and said to be done, before the next is begun.

One thread does it all: between two tokens it looks at what the peer has sent meanwhile, for what cancels a request.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import Cancelled, HealthGPTError, RequestError, in_one_line
from ..images import png_bytes, write_image, write_report
from ..machine import version
from ..requests import ANSWER, PICTURE, checked_request, result_fields
from ..session import COMPREHENSION, GENERATION, Session
from .channel import Channel, Line
from .fields import take_id, take_task
from .lines import parse

# Of what lines say and mean; a change that a peer has to know of counts it up.
PROTOCOL = 1
_NAMES = {COMPREHENSION: "answer", GENERATION: "generate"}

Say = Callable[..., None]


class Server:
    """Does the requests of one peer, in order, from the file descriptor `source`; `target` gets the lines for it.

    Nothing of a request outlives it, but for what the session keeps of pictures. What is read ahead waits in memory.
    """

    def __init__(self, session: Session, source: int, target: int) -> None:
        self._session = session
        self._channel = Channel(source, target, self._arrived)
        self._current: Line | None = None  # whose request is being done
        self._tasks: dict[str, Callable[..., dict[str, Any]]] = {
            "answer": self._answer,
            "generate": self._generate,
            "forget": self._forget,
        }

    def run(self) -> None:
        """Until `source` ends. Whatever is wrong with a request is said to the peer; ConnectionError if it is gone."""
        self._write_event(
            "ready",
            protocol=PROTOCOL,
            version=version("healthgpt-edge"),
            executor=self._session.executor.name,
            tasks=[_NAMES[task] for task in sorted(self._session.bundle.manifest.tasks)],
        )
        while self._serve_one():
            pass

    def _serve_one(self) -> bool:
        """Do the next request; False if there is none. Returns, so that no variable keeps a request until the next."""
        self._current = line = self._channel.receive()
        if line is None:
            return False
        said = _failed(line.error) if line.error else self._said(line)
        if line.is_cancelled:  # and may have failed for another reason since
            said = _failed(Cancelled()) | {"cancelled": True}
        self._current = None  # while this is written it is too late to cancel it
        self._write_event(id=line.name, **said)
        return True

    def _said(self, line: Line) -> dict[str, Any]:
        """Do a request; what is said of it in the end."""
        try:
            return {"event": "result", **self._do(line)}
        except (HealthGPTError, OSError, MemoryError) as error:  # a peer that is gone is found gone by this line, too
            return _failed(error)
        except Exception as error:  # ours, but the next request may be served; its text may hold what was asked
            return _failed(f"internal error: {type(error).__name__}{_place(error)}")

    def _do(self, line: Line) -> dict[str, Any]:
        request, line.content = parse(line.content), bytearray()
        name = take_id(request)

        def say(event: str, **fields: Any) -> None:
            self._write_event(event, id=name, **fields)

        task = take_task(request)
        if task == "cancel":
            return self._cancel(line)
        streams = request.pop("stream", False)
        self._check_wanted()
        return self._tasks[task](say if streams else None, **request)

    def _arrived(self, line: Line) -> None:
        """Look at a line before its turn, for its id and for whether it cancels others."""
        if line.error:
            return
        try:
            request = parse(line.content)
            line.name = take_id(request)
            if take_task(request) != "cancel" or line.name is None:
                return
        except (RequestError, MemoryError):
            return  # said in its turn
        line.found = False
        for one in [self._current, *self._channel.waiting]:
            if one and one.name == line.name and one.found is None:
                one.give_up(Cancelled())
                line.found = True

    def _is_unwanted(self) -> bool:
        """Whether the request that is being done has been cancelled by what the peer has sent."""
        self._channel.look()
        return self._current is not None and self._current.is_cancelled

    def _check_wanted(self) -> None:
        if self._is_unwanted():
            raise Cancelled

    def _answer(self, say: Say | None, question: str, out: str | None = None, **fields: Any) -> dict[str, Any]:
        picture, study, options = checked_request(ANSWER, *_taken(fields), out, **fields)
        on_text = (lambda piece: say("text", text=piece)) if say else None
        result = self._session.answer(picture, question, **options, on_text=on_text, stop=self._is_unwanted)
        self._check_wanted()
        if out is None or study is None:
            return result_fields(result)
        write_report(out, [(question, result.text)], study)
        return result_fields(result) | {"report": out}

    def _generate(
        self, say: Say | None, instruction: str, out: str | None = None, previews: bool = False, **fields: Any
    ) -> dict[str, Any]:
        picture, study, options = checked_request(PICTURE, *_taken(fields), out, **fields)
        codes = self._session.bundle.manifest.codes
        total = codes.grid**2 if codes else None
        on_code = (lambda count: say("progress", tokens=count, codes=total)) if say else None
        on_preview = (lambda pixels, rows: say("preview", rows=rows, **_inline(pixels))) if say and previews else None
        result = self._session.generate(
            picture, instruction, **options, on_code=on_code, on_preview=on_preview, stop=self._is_unwanted
        )
        self._check_wanted()
        if out is None:
            return result_fields(result) | _inline(result.pixels)
        write_image(out, result.pixels, study)
        return result_fields(result) | {"image": out}

    def _cancel(self, line: Line) -> dict[str, Any]:
        """What a line that cancels is told in its turn; `_arrived` has done what it asks for."""
        if line.name is None:
            raise RequestError("cancel needs id, found none")
        return {"found": bool(line.found)}

    def _forget(self, say: Say | None) -> dict[str, Any]:
        self._session.forget_pictures()
        return {}

    def _write_event(self, event: str, **fields: Any) -> None:
        self._channel.send(json.dumps({"event": event, **fields}, allow_nan=False))


def _taken(fields: dict[str, Any]) -> tuple[str | bytes | None, int | None, tuple[float, float] | None]:
    """Take out of `fields` where the picture is, a path or the bytes of a file, and what frame and window of it."""
    source = fields.pop("image", None)
    if "image_base64" in fields:
        try:
            source = base64.b64decode(fields.pop("image_base64"), validate=True)
        except ValueError:
            raise RequestError("image_base64 must be base64 without line breaks, found something else") from None
    window = fields.pop("window", None)
    return source, fields.pop("frame", None), tuple(window) if window is not None else None


def _inline(pixels: np.ndarray) -> dict[str, str]:
    """A picture uint8 [H, W, 3] as the field that holds the file itself."""
    return {"image_base64": base64.b64encode(png_bytes(pixels)).decode()}


def _failed(error: Exception | str) -> dict[str, Any]:
    return {"event": "error", "error": in_one_line(error)}


def _place(error: Exception) -> str:
    """Where an exception comes from."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""
