"""The loop of `healthgpt-edge serve`: a request is done, and said to be done, before the next is begun; or several are
done together, and each is said to be done when it is.

One thread does it all: between two tokens it looks at what the peer has sent meanwhile, for what cancels a request.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import Cancelled, HealthGPTError, RequestError, in_one_line
from ..images import png_bytes, write_image, write_report
from ..machine import version
from ..requests import ANSWER, PICTURE, checked_request, result_fields
from ..session import Session
from ..steps import Steps
from .channel import Channel, Line
from .fields import TASKS, take_id, take_task
from .lines import parse, path_of

# Of what lines say and mean; a change that a peer has to know of counts it up.
PROTOCOL = 1

Say = Callable[..., None]


class Server:
    """Does the requests of one peer from the file descriptor `source`; `target` gets the lines for it.

    In order, or with `together` up to so many at a time. Nothing of a request outlives it, but for what the session
    keeps of pictures. What is read ahead waits in memory.
    """

    def __init__(self, session: Session, source: int, target: int, together: int = 1) -> None:
        self._session = session
        self._together = session.together(together)
        self._channel = Channel(source, target, self._arrived)
        self._begun: list[Line] = []  # whose requests are being done

    def run(self) -> None:
        """Until `source` ends. Whatever is wrong with a request is said to the peer; ConnectionError if it is gone."""
        self._write_event(
            "ready",
            protocol=PROTOCOL,
            version=version("healthgpt-edge"),
            executor=self._session.executor.name,
            tasks=[name for name, task in TASKS.items() if task in self._session.bundle.manifest.tasks],
            together=self._together.limit,
        )
        while self._begin():
            self._go_on()

    def _begin(self) -> bool:
        """Begin the requests that have come and for which there is a place; False if there is nothing left to do."""
        while len(self._begun) < self._together.limit:
            line = self._channel.receive(wait=not self._begun)
            if line is None:
                break
            self._begun.append(line)
            self._together.add(line, self._do(line))
        return bool(self._begun)

    def _go_on(self) -> None:
        """Make a pass, and say what is done by it. Returns, so that no variable keeps a request until the next."""
        for line, result, error in self._together.step():
            assert isinstance(line, Line)
            said = _failed(error) if error else {"event": "result", **result}
            if line.is_cancelled:  # and may have failed for another reason since
                said = _failed(Cancelled())
            self._begun.remove(line)  # while this is written it is too late to cancel it
            self._write_event(id=line.name, **said)

    def _do(self, line: Line) -> Steps[dict[str, Any]]:
        """Do a request; what is said of it in the end."""
        if line.error:
            raise line.error
        request, line.content = parse(line.content), bytearray()
        name = take_id(request)

        def say(event: str, **fields: Any) -> None:
            self._write_event(event, id=name, **fields)

        task = take_task(request)
        if task == "cancel":
            return self._cancel(line)
        streams = request.pop("stream", False)
        self._check_wanted(line)
        if task == "forget":
            return self._forget(**request)
        do = self._answer if task == "answer" else self._generate
        return (yield from do(line, say if streams else None, **request))

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
        for one in [*self._begun, *self._channel.waiting]:
            if one.name == line.name and one.found is None:
                one.give_up(Cancelled())
                line.found = True

    def _is_unwanted(self, line: Line) -> bool:
        """Whether a request that is being done has been cancelled by what the peer has sent."""
        self._channel.look()
        return line.is_cancelled

    def _check_wanted(self, line: Line) -> None:
        if self._is_unwanted(line):
            raise Cancelled

    def _answer(
        self, line: Line, say: Say | None, question: str, out: str | None = None, **fields: Any
    ) -> Steps[dict[str, Any]]:
        target = out and path_of(out)
        picture, study, options = checked_request(ANSWER, *_taken(fields), target, **fields)
        on_text = (lambda piece: say("text", text=piece)) if say else None
        result = yield from self._together.answering(
            picture,
            question,
            **options,
            on_prompt=_on_prompt(say),
            on_text=on_text,
            stop=partial(self._is_unwanted, line),
        )
        self._check_wanted(line)
        if target is None or study is None:
            return result_fields(result)
        write_report(target, [(question, result.text)], study)
        return result_fields(result) | {"report": out}

    def _generate(
        self,
        line: Line,
        say: Say | None,
        instruction: str,
        out: str | None = None,
        previews: bool = False,
        **fields: Any,
    ) -> Steps[dict[str, Any]]:
        target = out and path_of(out)
        picture, study, options = checked_request(PICTURE, *_taken(fields), target, **fields)
        codes = self._session.bundle.manifest.codes
        total = codes.grid**2 if codes else None
        on_code = (lambda count: say("progress", tokens=count, codes=total)) if say else None
        on_preview = (lambda pixels, rows: say("preview", rows=rows, **_inline(pixels))) if say and previews else None
        result = yield from self._together.generating(
            picture,
            instruction,
            **options,
            on_prompt=_on_prompt(say),
            on_code=on_code,
            on_preview=on_preview,
            stop=partial(self._is_unwanted, line),
        )
        self._check_wanted(line)
        if target is None:
            return result_fields(result) | _inline(result.pixels)
        write_image(target, result.pixels, study)
        return result_fields(result) | {"image": out}

    def _cancel(self, line: Line) -> dict[str, Any]:
        """What a line that cancels is told in its turn; `_arrived` has done what it asks for."""
        if line.name is None:
            raise RequestError("cancel needs id, found none")
        return {"found": bool(line.found)}

    def _forget(self) -> dict[str, Any]:
        self._session.forget_pictures()
        return {}

    def _write_event(self, event: str, **fields: Any) -> None:
        self._channel.send(json.dumps({"event": event, **fields}, allow_nan=False))


def _on_prompt(say: Say | None) -> Callable[[int, int], None] | None:
    return (lambda read, of: say("prompt", tokens=read, of=of)) if say else None


def _taken(fields: dict[str, Any]) -> tuple[str | bytes | None, int | None, tuple[float, float] | None]:
    """Take out of `fields` where the picture is, a path or the bytes of a file, and what frame and window of it."""
    source: str | bytes | None = path_of(fields.pop("image")) if "image" in fields else None
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


def _failed(error: Exception) -> dict[str, Any]:
    if isinstance(error, HealthGPTError):
        kind, said = error.kind, in_one_line(error)
    elif isinstance(error, (OSError, MemoryError)):  # a peer that is gone is found gone by this line, too
        kind, said = "machine", in_one_line(error)
    else:  # ours, but the next request may be served; its text may hold what was asked
        kind, said = "internal", f"internal error: {type(error).__name__}{_place(error)}"
    return {"event": "error", "error": said, "kind": kind}


def _place(error: Exception) -> str:
    """Where an exception comes from."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""
