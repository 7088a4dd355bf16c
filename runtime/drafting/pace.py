"""How many rows the next pass should have."""

from __future__ import annotations

import math

import numpy as np

from .costs import RowCosts

# Beyond this a pass is arithmetic on every machine, and drafts so far ahead are rarely right.
MAX_ROWS = 64
_SIZES = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, MAX_ROWS])
# The size that the expected exponent stands for before anything is measured.
_FIRST_ROWS = 8
# Weight of the newest pass in what is expected of the next.
_NEWEST = 0.05
# Where drafts do not pay, one pass in so many has a second row all the same, to see whether they do by now.
_PROBE_EVERY = 16


class Pace:
    """Chooses the rows of a pass that give the most tokens per second.

    Tokens per pass are taken as rows ** exponent, the law that drafts of 4 to 32 rows follow on the trained phantom
    (docs/drafting.md). The exponent is measured in the request, the cost of rows on the machine. At exponent 0 drafts
    are never right and a pass has one row: plain decoding.
    """

    def __init__(self, costs: RowCosts, exponent: float) -> None:
        self._costs = costs
        self._rows, self._tokens = float(_FIRST_ROWS), _FIRST_ROWS**exponent
        self._plain_passes = 0

    @property
    def exponent(self) -> float:
        return math.log(self._tokens) / math.log(self._rows)

    def rows(self) -> int:
        """Rows of the next pass, at most twice as many as it is known the cost of."""
        known = self._costs.most
        if not known:
            return 1  # what plain decoding costs must be known before it is left
        sizes = _SIZES[: np.searchsorted(_SIZES, max(4, 2 * known), side="right")]
        fixed, each = self._costs.line()
        best = int(sizes[np.argmax(sizes**self.exponent / (fixed + each * sizes))])
        if best > 1:
            return best
        self._plain_passes += 1
        return 2 if self._plain_passes % _PROBE_EVERY == 0 else 1

    def learn(self, rows: int, tokens: int, seconds: float) -> None:
        """Note that a pass of `rows` took `seconds` and gave `tokens`."""
        self._costs.record(rows, seconds)
        if rows > 1:
            self._rows += _NEWEST * (rows - self._rows)
            self._tokens += _NEWEST * (tokens - self._tokens)
