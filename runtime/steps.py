"""A request as a generator: it yields each forward pass that it waits for and is sent what that gave.

So whoever drives it may make the passes of several requests as one (together.py).
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar, cast

import numpy as np

from .executors import Context, Group, Sequence

T = TypeVar("T")


@dataclass(slots=True)
class Seat:
    """Where the tokens of a request are: in a sequence of its own, and later maybe in one of a group."""

    sequence: Sequence
    group: Group | None = None


class Passed(NamedTuple):
    """What a pass gave: logits [n, rows]; its seconds, and over how many sequences it was.

    lead: how many rows the first sequence of a group wants of the next pass, for the others to want as many.
    """

    logits: np.ndarray
    seconds: float
    sequences: int = 1
    lead: int | None = None


class Step(NamedTuple):
    """A pass that appends token_ids int64 [S] to a sequence, in a group maybe the first n of them only.

    It gives logits [last_positions, rows], as Context.forward does, or [n, rows] as Group.forward.
    """

    sequence: Sequence
    token_ids: np.ndarray
    last_positions: int
    full_vocabulary: bool
    group: Group | None

    def alone(self) -> Passed:
        """Make the pass of a sequence that is in no group."""
        begin = time.perf_counter()
        logits = cast(Context, self.sequence).forward(self.token_ids, self.last_positions, self.full_vocabulary)
        return Passed(logits, time.perf_counter() - begin)


Steps = Generator[Step, Passed, T]


def finish(steps: Steps[T]) -> T:
    """Do what is left of a request by itself."""
    try:
        step = next(steps)
        while True:
            step = steps.send(step.alone())
    except StopIteration as end:
        result: T = end.value
        return result
