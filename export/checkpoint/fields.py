"""Typed access to the values of a configuration file, with checks of their bounds."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from healthgpt_edge.errors import CheckpointError

from .files import label

REQUIRED: Any = object()
# Keys come from the file and can have any length.
MAX_NAME_LETTERS = 200


class _Repr(reprlib.Repr):
    """Shortens values in messages: written out in full, a YAML file of aliases can have a billion values."""

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write very long integers in decimal. YAML can contain them in hexadecimal.
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"an integer of {x.bit_length()} bits"


_repr = _Repr().repr


class Fields:
    """One object of a configuration file. Every method raises CheckpointError with file and key for a wrong value."""

    def __init__(self, path: Path, values: object, prefix: str = "") -> None:
        self.path, self.prefix = path, prefix
        if not isinstance(values, Mapping):
            raise self.error("", "an object", values)
        self.values: Mapping[str, Any] = values

    def error(self, key: str, expected: str, found: object) -> CheckpointError:
        name = (self.prefix + key).rstrip(".")[:MAX_NAME_LETTERS]
        return CheckpointError(f"{label(self.path)}: {name}: expected {expected}, found {_repr(found)}")

    def section(self, key: str) -> Fields:
        """The nested object `key`."""
        return Fields(self.path, self.values.get(key), f"{self.prefix}{key}.")

    def integer(self, key: str, low: int, high: int, default: int = REQUIRED) -> int:
        value = self._get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}", value)
        return value

    def number(self, key: str, low: float, high: float, default: float = REQUIRED) -> float:
        value = self._get(key, default)
        if not _is_number(value, low, high):
            raise self.error(key, f"a number from {low} to {high}", value)
        return float(value)

    def numbers(self, key: str, count: int, low: float, high: float) -> tuple[float, ...]:
        """A list of exactly `count` numbers."""
        value = self._get(key, REQUIRED)
        if not isinstance(value, list) or len(value) != count or not all(_is_number(item, low, high) for item in value):
            raise self.error(key, f"{count} numbers from {low} to {high}", value)
        return tuple(float(item) for item in value)

    def integers(self, key: str, low: int, high: int, most: int) -> tuple[int, ...]:
        """A list of 1 to `most` integers. A single integer counts as a list of one."""
        value = self._get(key, REQUIRED)
        items = value if isinstance(value, list) else [value]
        if not 1 <= len(items) <= most or not all(type(item) is int and low <= item <= high for item in items):
            raise self.error(key, f"1 to {most} integers from {low} to {high}", value)
        return tuple(items)

    def require(self, key: str, *allowed: object, default: object = REQUIRED) -> Any:
        """The value of `key`, which must be one of `allowed`. Others would change the model's arithmetic."""
        value = self._get(key, default)
        if not any(type(value) is type(item) and value == item for item in allowed):
            raise self.error(key, " or ".join(map(repr, allowed)), value)
        return value

    def only(self, known: Iterable[str]) -> None:
        """Refuse keys that are not `known`."""
        for key in self.values:
            if key not in known:
                raise self.error(str(key), "no such setting (its meaning is not implemented)", self.values[key])

    def _get(self, key: str, default: Any) -> Any:
        if key in self.values:
            return self.values[key]
        if default is REQUIRED:
            raise self.error(key, "a value", None)
        return default


def _is_number(value: object, low: float, high: float) -> bool:
    """Whether a value is a number within the bounds. NaN and integers too large for a float are not."""
    return type(value) in (int, float) and low <= value <= high
