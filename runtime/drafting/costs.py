"""What a forward pass of so many rows costs on this machine, learnt from the passes that are made anyway."""

from __future__ import annotations

from collections import deque

import numpy as np

# The least of the last few times counts, of these at least: others on the machine only ever add to one.
_FEWEST, _MOST = 3, 5


class RowCosts:
    """Seconds of a pass by its rows. Kept as long as the session, for each task."""

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._known: dict[int, float] = {}

    @property
    def most(self) -> int:
        """The most rows of which the cost is known; 0 before any is."""
        return max(list(self._known), default=0)

    def record(self, rows: int, seconds: float) -> None:
        """Note the time of a pass; the first of its size, which still allocates and unpacks, does not count."""
        if rows not in self._samples:
            self._samples[rows] = deque(maxlen=_MOST)
            return
        self._samples[rows].append(seconds)
        if len(self._samples[rows]) >= _FEWEST:
            self._known[rows] = min(self._samples[rows])

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
        known = dict(self._known)  # requests on other threads add to it
        if len(known) < 2:
            return next(iter(known.values()), 1.0), 0.0
        rows, seconds = np.array(list(known)), np.array(list(known.values()))
        weights = seconds**-2.0 / (seconds**-2.0).sum()
        mean_rows, mean_seconds = float(weights @ rows), float(weights @ seconds)
        slope = float((weights * (rows - mean_rows)) @ seconds / (weights @ (rows - mean_rows) ** 2))
        slope = min(max(slope, 0.0), mean_seconds / mean_rows)  # neither part of a pass takes less than no time
        return mean_seconds - slope * mean_rows, slope
