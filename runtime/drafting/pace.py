"""How many rows the next pass should have."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Sequence

from .costs import MOST_TIMES, RowCosts

# Beyond this a pass is arithmetic on every machine, and drafts so far ahead are rarely right.
MAX_ROWS = 64
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, MAX_ROWS)
# The size that the expected exponent stands for before anything is measured, and the passes it counts for: Jacobi takes
# several to settle the first codes, while those behind them settle, too.
_FIRST_ROWS, _FIRST_PASSES = 8, 10
# Plain passes at the start of a request: what they cost must be known, as it is now, and the first is not typical, for
# the prefill left nothing in the processor's caches.
_PLAIN_PASSES = 2
# Before the model was asked, how many drafts it is taken to agree with, of how many.
_FIRST_AGREED = 4, 8
# The least weight of the newest pass in what is expected of the next.
_NEWEST = 0.05
# Drafting has work beside its passes, and its gain is an estimate: it must promise this much to be worth leaving.
_LEAST_GAIN = 1.1
# Where drafts do not pay, plain passes before they are tried anew; twice as many every time.
_FIRST_WAIT = 128
# Of the time of plain decoding, what passes with drafts may have taken more than plain ones for the same tokens.
_MAY_LOSE = 0.05
# Plain passes before it is asked anew what the request can afford: asking takes a tenth of a phantom's pass.
_LOOK_AGAIN = 16
# Sizes so near the best count as good as it, and the largest of them is taken: it teaches Jacobi the most.
_NEARLY = 0.95


class Pace:
    """Chooses the rows of a pass that give the most tokens per second.

    Tokens per pass are taken as rows ** exponent, the law that drafts of 4 to 32 rows follow on the trained phantom
    (docs/drafting.md). The exponent is measured in the request, the cost of rows on the machine. At exponent 0 drafts
    are never right and a pass has one row: plain decoding. The drafts that the model chooses, be it behind a wrong one,
    are the most that may be accepted. A pass tells of each of its drafts whether it is one of them, so where they are
    few two or three passes show it.

    The estimate may be wrong, so a pass is made only if the request could afford that all of its drafts are:
    `_MAY_LOSE` of what plain decoding takes for the tokens so far, or for all of the `expected` ones where their number
    is known. What drafts gained before adds as much again at most; what they cost before the first pass is `lost`.
    """

    def __init__(self, costs: RowCosts, exponent: float, expected: int = 0, lost: float = 0.0) -> None:
        self._costs, self._first, self._expected = costs, exponent, expected
        self._done, self._lost = 0, lost  # tokens, and seconds that drafts cost; below 0 they gained
        self._plain_left, self._wait = _PLAIN_PASSES, _FIRST_WAIT
        self._warm = False
        self._expect(exponent)

    def _expect(self, exponent: float) -> None:
        self._rows, self._tokens, self._passes = float(_FIRST_ROWS), _FIRST_ROWS**exponent, _FIRST_PASSES
        self._agreed, self._drafts = _FIRST_AGREED

    @property
    def exponent(self) -> float:
        return math.log(self._tokens) / math.log(self._rows)

    def rows(self) -> int:
        """Rows of the next pass, at most twice as many as it is known the cost of."""
        known = self._costs.most
        if self._plain_left or not known:
            self._plain_left = max(self._plain_left - 1, 0)
            return 1
        fixed, each = self._costs.line()
        plain, may_lose = self._costs.plain, self._allowance() - self._lost
        exponent, first = self.exponent, self._passes == _FIRST_PASSES
        rates: dict[int, float] = {}  # tokens a second, by the rows that can be afforded
        for rows in _SIZES[: bisect(_SIZES, max(4, 2 * known))]:
            seconds = fixed + each * rows
            if (seconds if known > 1 else plain * rows) - plain <= may_lose:
                rates[rows] = rows**exponent / seconds
        most = max(rates, default=1)
        if most == 1:
            self._plain_left = _LOOK_AGAIN
            return 1
        best = max(rates.values())
        rows = max(rows for rows, rate in rates.items() if rate >= _NEARLY * best)
        agreed = 1 + self._agreed / self._drafts * (rows - 1)
        if min(best, agreed / (fixed + each * rows)) >= _LEAST_GAIN / plain:
            return min(rows, _FIRST_ROWS) if first else rows
        self._plain_left, self._wait = self._wait, 2 * self._wait
        self._expect(self._first)
        # If only what rows cost speaks against drafts, a pass tells what they cost by now: an old cost must not stand.
        return min(_FIRST_ROWS, most) if first else 1

    def plain_passes(self) -> int:
        """How many passes from the next on will be plain, whatever is learnt; `rows` is not asked for them."""
        passes, self._plain_left = self._plain_left, 0
        return passes

    def _allowance(self) -> float:
        """Seconds that drafts may lose."""
        return _MAY_LOSE * max(self._done, self._expected) * self._costs.plain

    def learn(self, rows: int, tokens: int, agreed: int, seconds: float) -> None:
        """Note that a pass of `rows` took `seconds` and gave `tokens`; the model chose `agreed` of its drafts, all that
        were accepted and some behind a wrong one."""
        if self._warm and rows in _SIZES:  # other sizes end a grid, too rarely to be timed well
            self._costs.record(rows, seconds)
        self._warm = True
        self._done += tokens
        if rows > 1:
            # What such passes take, not what this one did: others on the machine are no loss by drafts.
            lost = (self._costs.known(rows) or seconds) - tokens * self._costs.plain
            self._lost = max(self._lost + lost, -self._allowance())
            self._passes += 1
            newest = max(_NEWEST, 1 / self._passes)
            self._rows += newest * (rows - self._rows)
            self._tokens += newest * (tokens - self._tokens)
            if self._passes > _FIRST_PASSES + 1:  # a first pass has drafts that the model had not seen
                self._agreed += agreed
                self._drafts += rows - 1

    def learn_plain(self, seconds: Sequence[float]) -> None:
        """Note what passes of one row took, of which each gave a token."""
        told = seconds[-1 - MOST_TIMES :]  # the first one of a session does not count, and of the others no more
        self._done += len(seconds) - len(told)
        self._warm |= len(seconds) > len(told)
        for one in told:
            self.learn(1, 1, 0, one)
