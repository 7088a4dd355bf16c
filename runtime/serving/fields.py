"""The fields of a request: which there are, and of what type each is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..checks import is_real, is_whole
from ..errors import RequestError
from .lines import kind


class _Type(NamedTuple):
    name: str
    holds: Callable[[Any], bool]


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_real, value))


_STRING = _Type("a string", lambda value: isinstance(value, str))
_INTEGER = _Type("an integer", is_whole)
_NUMBER = _Type("a number", is_real)
_FLAG = _Type("true or false", lambda value: isinstance(value, bool))
_PAIR = _Type("an array of two numbers", _is_pair)
_NAME = _Type("a string or a number", lambda value: isinstance(value, str) or is_real(value))

_BOTH = {
    "image": _STRING,
    "image_base64": _STRING,
    "frame": _INTEGER,
    "window": _PAIR,
    "max_new_tokens": _INTEGER,
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "seed": _INTEGER,
    "draft": _STRING,
    "certify": _FLAG,
    "out": _STRING,
    "stream": _FLAG,
}
# The first field of a task, if it has any, must be there.
_TASKS = {
    "answer": {"question": _STRING, **_BOTH},
    "generate": {"instruction": _STRING, **_BOTH, "faithful": _FLAG, "previews": _FLAG},
    "cancel": {},
    "forget": {},
}


def take_id(request: dict[str, Any]) -> str | float | None:
    """Take the `id` out of a request; None if it has none. Raises RequestError."""
    if "id" not in request:
        return None
    name: str | float = _checked("id", _NAME, request.pop("id"))
    return name


def take_task(request: dict[str, Any]) -> str:
    """Take the `task` out of a request, whose other fields are then of that task, right in type and not too few.

    Raises RequestError.
    """
    known = ", ".join(_TASKS)
    if "task" not in request:
        raise RequestError(f"task must be one of {known}, found none")
    task: str = _checked("task", _STRING, request.pop("task"))
    if task not in _TASKS:
        raise RequestError(f"task must be one of {known}, found {task!r:.40}")
    fields = _TASKS[task]
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


def _checked(name: str, expected: _Type, value: Any) -> Any:
    if not expected.holds(value):
        raise RequestError(f"{name} must be {expected.name}, found {kind(value)}")
    return value
