"""Lines of JSON from whoever asks: bounded, and read more strictly than Python's `json` would."""

from __future__ import annotations

import json
import math
import os
from typing import Any, NoReturn

from ..errors import RequestError

# Twice those of the longest question. Each might stand for a list, which takes twenty times the bytes of its text.
MAX_COMMAS = 1 << 18
# Integers of 64 bits, with a sign or without.
_INTEGERS = range(-(1 << 63), 1 << 64)


def parse(line: bytearray) -> dict[str, Any]:
    """The object on a line. Raises RequestError."""
    if line.count(b",") > MAX_COMMAS:
        raise RequestError(f"a line must have at most {MAX_COMMAS} commas, found more")
    try:
        value = json.loads(
            line.decode(), object_pairs_hook=_object, parse_constant=_refuse, parse_float=_finite, parse_int=_integer
        )
    except UnicodeDecodeError as error:
        raise RequestError(f"a line must be UTF-8, found another byte at {error.start}") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"a line must be a JSON object, at character {error.pos}: {error.msg}") from None
    except RecursionError:
        raise RequestError("a line must be a JSON object, found one nested too deep") from None
    if not isinstance(value, dict):
        raise RequestError(f"a line must be a JSON object, found {kind(value)}")
    return value


def path_of(name: str) -> str:
    """The path that a string of a line names: in UTF-8, as is all of a line, whatever the locale has paths in."""
    try:
        return os.fsdecode(name.encode("utf-8", "surrogateescape"))
    except UnicodeError:
        return name  # refused with all other paths that are none


def kind(value: Any) -> str:
    """What a value is in JSON, in words; of numbers the value, too."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    names: dict[type, str] = {str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), "null")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a field given twice most readers would take the last: one of two pictures."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise RequestError(f"{name!r:.40} must be given once, found it again")
        found[name] = value
    return found


def _refuse(word: str) -> NoReturn:
    raise RequestError(f"a number must be finite, found {word}")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise RequestError(f"a number must be finite, found {digits:.40}")
    return value


def _integer(digits: str) -> int:
    # By their length first: Python refuses thousands of digits in words of its own.
    if len(digits) > 20 or (value := int(digits)) not in _INTEGERS:
        raise RequestError(f"an integer must have at most 64 bits, found {digits:.40}")
    return value
