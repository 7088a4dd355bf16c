"""What a forward pass of so many rows costs on this machine, learnt from the passes that are made anyway."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

# The least of the last few times counts, of these at least: others on the machine only ever add to one.
_FEWEST, MOST_TIMES = 3, 5
# A clock may stand still between two of its ticks.
_LEAST_SECONDS = 1e-9


class PassKind(NamedTuple):
    """What else decides what a pass takes: choosing by chance takes longer, and so do logits of all ids."""

    task: str
    sampled: bool = False
    full_vocabulary: bool = False


class RowCosts:
    """Seconds of a pass by its rows. Kept as long as the session, for each kind of pass."""

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._known: dict[int, float] = {}
        self._line: tuple[float, float] | None = None  # through the known sizes, once it was asked for

    @property
    def most(self) -> int:
        """The most rows of which the cost is known; 0 before any is."""
        return max(self._known.copy(), default=0)  # requests on other threads add to it

    def record(self, rows: int, seconds: float) -> None:
        """Note the time of a pass; the first of its size, which still allocates and unpacks, does not count."""
        if rows not in self._samples:
            self._samples[rows] = deque(maxlen=MOST_TIMES)
            return
        self._samples[rows].append(max(seconds, _LEAST_SECONDS))
        if len(self._samples[rows]) >= _FEWEST and (least := min(self._samples[rows])) != self._known.get(rows):
            self._known[rows] = least
            self._line = None

    def known(self, rows: int) -> float | None:
        """Seconds of a pass of so many rows; None if it was not timed often enough."""
        return self._known.get(rows)

    @property
    def plain(self) -> float:
        """Seconds of a pass of one row; by the line where it was not timed."""
        return self._known.get(1) or sum(self.line())

    def line(self) -> tuple[float, float]:
        """Seconds of a pass, and of each of its rows: the line with the least relative errors for the known sizes.

        A pass reads the weights once and computes for every row. Until two sizes are known rows are free.
        """
        line = self._line
        if line is None:
            line = self._line = _fit(self._known.copy())
        return line


def _fit(known: dict[int, float]) -> tuple[float, float]:
    """RowCosts.line through seconds by rows."""
    if len(known) < 2:
        return next(iter(known.values()), 1.0), 0.0
    # In plain Python: for a dozen sizes numpy would take longer than a row of a small model.
    weights = {rows: seconds**-2.0 for rows, seconds in known.items()}
    total = sum(weights.values())
    mean_rows = sum(weights[rows] * rows for rows in known) / total
    mean_seconds = sum(weights[rows] * seconds for rows, seconds in known.items()) / total
    spread = sum(weight * (rows - mean_rows) ** 2 for rows, weight in weights.items())
    slope = sum(weights[rows] * (rows - mean_rows) * seconds for rows, seconds in known.items()) / spread
    slope = min(max(slope, 0.0), mean_seconds / mean_rows)  # neither part of a pass takes less than no time
    return mean_seconds - slope * mean_rows, slope
