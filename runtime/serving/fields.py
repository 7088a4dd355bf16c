"""The fields of a request: which there are, and of what type each is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..checks import is_real, is_whole
from ..errors import RequestError
from ..manifest import COMPREHENSION, GENERATION
from .lines import kind


class Type(NamedTuple):
    """What a field takes, and what that is called."""

    name: str
    holds: Callable[[Any], bool]


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_real, value))


STRING = Type("a string", lambda value: isinstance(value, str))
INTEGER = Type("an integer", is_whole)
NUMBER = Type("a number", is_real)
FLAG = Type("true or false", lambda value: isinstance(value, bool))
PAIR = Type("an array of two numbers", _is_pair)
NAME = Type("a string or a number", lambda value: isinstance(value, str) or is_real(value))

_BOTH = {
    "image": STRING,
    "image_base64": STRING,
    "frame": INTEGER,
    "window": PAIR,
    "max_new_tokens": INTEGER,
    "temperature": NUMBER,
    "top_p": NUMBER,
    "top_k": INTEGER,
    "seed": INTEGER,
    "draft": STRING,
    "certify": FLAG,
    "out": STRING,
    "stream": FLAG,
}
# What a peer calls a task, and what the runtime does.
TASKS = {"answer": COMPREHENSION, "generate": GENERATION}
# The fields of each task. The first, if there is any, must be there.
Tasks = dict[str, dict[str, Type]]
_SERVED: Tasks = {
    "answer": {"question": STRING, **_BOTH},
    "generate": {"instruction": STRING, **_BOTH, "faithful": FLAG, "previews": FLAG},
    "cancel": {},
    "forget": {},
}


def take_id(request: dict[str, Any]) -> str | float | None:
    """Take the `id` out of a request; None if it has none. Raises RequestError."""
    if "id" not in request:
        return None
    name: str | float = _checked("id", NAME, request.pop("id"))
    return name


def take_task(request: dict[str, Any], tasks: Tasks = _SERVED) -> str:
    """Take the `task` out of a request, whose other fields are then of that task, right in type and not too few.

    Raises RequestError.
    """
    known = ", ".join(tasks)
    if "task" not in request:
        raise RequestError(f"task must be one of {known}, found none")
    task: str = _checked("task", STRING, request.pop("task"))
    if task not in tasks:
        raise RequestError(f"task must be one of {known}, found {task!r:.40}")
    fields = tasks[task]
    for name, value in request.items():
        if name not in fields:
            raise RequestError(f"{task} takes {', '.join([*fields, 'id'])}, found {name!r:.40}")
        _checked(name, fields[name], value)
    for name in list(fields)[:1]:
        if name not in request:
            raise RequestError(f"{task} needs {name}, found none")
    if "image" in request and "image_base64" in request:
        raise RequestError("a request takes image or image_base64, found both")
    if request.get("previews") and not request.get("stream"):
        raise RequestError("previews come with stream, found them without it")
    return task


def _checked(name: str, expected: Type, value: Any) -> Any:
    if not expected.holds(value):
        raise RequestError(f"{name} must be {expected.name}, found {kind(value)}")
    return value
