"""What a forward pass of so many rows costs on this machine, learnt from the passes that are made anyway."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

# The least of the last few times counts, and of at least two: others on the machine only ever add to one.
_FEWEST, _MOST = 2, 5


class RowCosts:
    """Seconds of a pass by its rows. Kept as long as the session, for each task."""

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}

    @property
    def most(self) -> int:
        """The most rows that any pass had so far; 0 before the first."""
        return max(self._samples, default=0)

    def knows(self, rows: int) -> bool:
        """Whether enough passes of `rows` were timed."""
        return len(self._samples.get(rows, ())) >= _FEWEST

    def record(self, rows: int, seconds: float) -> None:
        """Note the time of a pass; the first of its size, which still allocates and unpacks, does not count."""
        if rows in self._samples:
            self._samples[rows].append(seconds)
        else:
            self._samples[rows] = deque(maxlen=_MOST)

    def estimate(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Seconds of passes of `rows` [n]: on the line between the sizes known beside it, or on beyond them.

        What more rows were done in, fewer can be done in.
        """
        sizes = sorted(size for size in self._samples if self.knows(size))
        if not sizes:
            return np.ones(len(rows))
        least = np.array([min(self._samples[size]) for size in sizes])
        seconds = np.minimum.accumulate(least[::-1])[::-1]
        slope = (seconds[-1] - seconds[0]) / max(sizes[-1] - sizes[0], 1)
        beyond = np.maximum(np.asarray(rows) - sizes[-1], 0)
        return np.asarray(np.interp(rows, sizes, seconds) + slope * beyond)
