"""The loop of `healthgpt-edge serve`: a request is read, done, and said to be done, before the next is looked at."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import HealthGPTError, RequestError, in_one_line
from ..images import png_bytes, write_image, write_report
from ..machine import version
from ..requests import ANSWER, PICTURE, checked_request, result_fields
from ..session import COMPREHENSION, GENERATION, Session
from .fields import take_id, take_task
from .lines import read_request

# Of what lines say and mean; a change that a peer has to know of counts it up.
PROTOCOL = 1
_NAMES = {COMPREHENSION: "answer", GENERATION: "generate"}

Say = Callable[..., None]


class Server:
    """Does the requests of one peer, in order; `write` gets the lines for it, ASCII without their ends.

    Nothing of a request outlives it, but for what the session keeps of pictures.
    """

    def __init__(self, session: Session, write: Callable[[str], None]) -> None:
        self._session, self._write = session, write
        self._tasks: dict[str, Callable[..., dict[str, Any]]] = {
            "answer": self._answer,
            "generate": self._generate,
            "forget": self._forget,
        }

    def run(self, stream: BinaryIO) -> None:
        """Until `stream` ends. Whatever is wrong with a request is said to the peer; ConnectionError if it is gone."""
        self._write_event(
            "ready",
            protocol=PROTOCOL,
            version=version("healthgpt-edge"),
            executor=self._session.executor.name,
            tasks=[_NAMES[task] for task in sorted(self._session.bundle.manifest.tasks)],
        )
        while self._serve_one(stream):
            pass

    def _serve_one(self, stream: BinaryIO) -> bool:
        """Do the next request; False if there is none. Returns, so that no variable keeps a request until the next."""
        try:
            request = read_request(stream)
        except (RequestError, MemoryError) as error:
            self._write_event("error", id=None, error=in_one_line(error))
            return True
        if request is None:
            return False
        name = None
        try:
            name = take_id(request)

            def say(event: str, **fields: Any) -> None:
                self._write_event(event, id=name, **fields)

            do = self._tasks[take_task(request)]
            streams = request.pop("stream", False)
            result = do(say if streams else None, **request)
        except (HealthGPTError, OSError, MemoryError) as error:  # a peer that is gone is found gone by this line, too
            self._write_event("error", id=name, error=in_one_line(error))
        except Exception as error:  # ours, but the next request may be served; its text may hold what was asked
            self._write_event("error", id=name, error=f"internal error: {type(error).__name__}{_place(error)}")
        else:
            self._write_event("result", id=name, **result)
        return True

    def _answer(self, say: Say | None, question: str, out: str | None = None, **fields: Any) -> dict[str, Any]:
        picture, study, options = checked_request(ANSWER, *_taken(fields), out, **fields)
        on_text = (lambda piece: say("text", text=piece)) if say else None
        result = self._session.answer(picture, question, **options, on_text=on_text)
        if out is None or study is None:
            return result_fields(result)
        write_report(out, [(question, result.text)], study)
        return result_fields(result) | {"report": out}

    def _generate(self, say: Say | None, instruction: str, out: str | None = None, **fields: Any) -> dict[str, Any]:
        picture, study, options = checked_request(PICTURE, *_taken(fields), out, **fields)
        codes = self._session.bundle.manifest.codes
        total = codes.grid**2 if codes else None
        on_code = (lambda count: say("progress", tokens=count, codes=total)) if say else None
        result = self._session.generate(picture, instruction, **options, on_code=on_code)
        if out is None:
            return result_fields(result) | {"image_base64": base64.b64encode(png_bytes(result.pixels)).decode()}
        write_image(out, result.pixels, study)
        return result_fields(result) | {"image": out}

    def _forget(self, say: Say | None) -> dict[str, Any]:
        self._session.forget_pictures()
        return {}

    def _write_event(self, event: str, **fields: Any) -> None:
        self._write(json.dumps({"event": event, **fields}, allow_nan=False))


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


def _place(error: Exception) -> str:
    """Where an exception comes from."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""
