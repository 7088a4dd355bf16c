"""What a caller's number is, before it is compared with anything: of another type it would fail late, or not at all."""

from __future__ import annotations

import math
import numbers
from typing import Any, TypeGuard


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether `value` is an integer, Python's or numpy's; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_real(value: Any) -> TypeGuard[float]:
    """Whether `value` is a number that is not complex; True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def as_float(value: Any) -> float:
    """`value` as a float; NaN, which is within no bounds, where it is no real number or too large."""
    try:
        return float(value) if is_real(value) else math.nan
    except OverflowError:
        return math.nan
