"""What a forward pass costs by its number of rows, measured on the passes that are made anyway."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

# A size costs the least of its last MOST_TIMES times, once it has _FEWEST: other processes only add to a time.
_FEWEST, MOST_TIMES = 3, 5
# A coarse clock may measure nothing at all.
_LEAST_SECONDS = 1e-9


class PassKind(NamedTuple):
    """What decides the cost of a pass besides its rows: sampling takes longer, and so do logits of all ids."""

    task: str
    sampled: bool = False
    full_vocabulary: bool = False


class RowCosts:
    """Seconds of a pass by its number of rows. A session keeps one for each kind of pass.

    in_tiles: a pass takes as long for a few rows as for one, and then jumps, as on a GPU.
    """

    def __init__(self, in_tiles: bool = False) -> None:
        self._in_tiles = in_tiles
        self._among = {1: self}
        self._samples: dict[int, deque[float]] = {}
        self._known: dict[int, float] = {}
        self._line: tuple[float, float] | None = None  # through the known sizes, made when first asked for

    def among(self, sequences: int) -> RowCosts:
        """Those of passes over so many sequences, each with that number of rows."""
        if sequences not in self._among:
            self._among[sequences] = RowCosts(self._in_tiles)
            self._among[sequences]._among = self._among
        return self._among[sequences]

    @property
    def most(self) -> int:
        """The largest number of rows whose cost is known; 0 before any is."""
        return max(self._known.copy(), default=0)  # requests on other threads add to it

    def record(self, rows: int, seconds: float) -> None:
        """Note the time of a pass."""
        self._samples.setdefault(rows, deque(maxlen=MOST_TIMES)).append(max(seconds, _LEAST_SECONDS))
        if len(self._samples[rows]) >= _FEWEST and (least := min(self._samples[rows])) != self._known.get(rows):
            self._known[rows] = least
            self._line = None

    def known(self, rows: int) -> float | None:
        """Seconds of a pass of `rows` rows; None if such passes were not timed often enough."""
        return self._known.get(rows)

    @property
    def plain_among_fewest(self) -> float:
        """Seconds of a pass of one row of each sequence, over as few sequences as were timed."""
        timed = [sequences for sequences, costs in self._among.copy().items() if costs.most]
        return self._among[min(timed, default=1)].plain

    @property
    def plain(self) -> float:
        """Seconds of a pass of one row; where it was not timed, those of the line."""
        return self._known.get(1) or sum(self.line())

    def seconds(self, rows: int) -> float:
        """What a pass of `rows` rows will take: what it took, where rows come in tiles; otherwise what the line says.

        On a processor the line is better: to take the best of many times would be to take the luckiest.
        """
        known = self._known.get(rows) if self._in_tiles else None
        if known is not None:
            return known
        fixed, each = self.line()
        return fixed + each * rows

    def line(self) -> tuple[float, float]:
        """Seconds of a pass without rows, and of each row: the line with the least relative errors for known sizes.

        A pass reads the weights once and computes for every row. Until two sizes are known, rows count as free.
        """
        line = self._line
        if line is None:
            line = self._line = _fit(self._known.copy())
        return line


def _fit(known: dict[int, float]) -> tuple[float, float]:
    """RowCosts.line through `known`, seconds by rows."""
    if len(known) < 2:
        return next(iter(known.values()), 1.0), 0.0
    # In plain Python: for a dozen sizes numpy would take longer than a row of a small model.
    weights = {rows: seconds**-2.0 for rows, seconds in known.items()}
    total = sum(weights.values())
    mean_rows = sum(weights[rows] * rows for rows in known) / total
    mean_seconds = sum(weights[rows] * seconds for rows, seconds in known.items()) / total
    spread = sum(weight * (rows - mean_rows) ** 2 for rows, weight in weights.items())
    slope = sum(weights[rows] * (rows - mean_rows) * seconds for rows, seconds in known.items()) / spread
    slope = min(max(slope, 0.0), mean_seconds / mean_rows)  # neither part takes less than 0
    return mean_seconds - slope * mean_rows, slope
