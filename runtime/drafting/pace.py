"""How many rows the next pass should have."""

from __future__ import annotations

import math
from bisect import bisect
from collections import Counter
from collections.abc import Sequence

from .costs import MOST_TIMES, RowCosts

# Beyond this a pass is arithmetic on every machine, and drafts so far ahead are rarely right.
MAX_ROWS = 64
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, MAX_ROWS)
# Before anything is measured the expected exponent stands for passes of this size, and counts as so many of them:
# Jacobi takes several to settle the first codes, and those behind them settle meanwhile.
_FIRST_ROWS, _FIRST_PASSES = 8, 10
# Plain passes at the start of a request, to know what they cost now, which the last of them shows: the prefill left
# nothing in the processor's caches for the others.
_PLAIN_PASSES = 3
# How many drafts the model is assumed to agree with, of how many, before any pass has shown it.
_FIRST_AGREED = 4, 8
# The least weight that the newest pass has in the running averages.
_NEWEST = 0.05
# How much faster than plain decoding drafts must promise to be: the gain is an estimate, and drafting costs work, too.
_LEAST_GAIN = 1.1
# Plain passes before drafts are tried again where they did not pay; twice as many every time.
_FIRST_WAIT = 128
# How much longer than plain decoding passes with drafts may take for the same tokens, as a share.
_MAY_LOSE = 0.05
# Plain passes before asking again what the request can afford: asking takes a tenth of a phantom's pass.
_LOOK_AGAIN = 16
# Sizes so near to the best count as equally good, and the largest of them is taken: it teaches Jacobi the most.
_NEARLY = 0.95


class Pace:
    """Chooses the rows of a pass that give the most tokens per second.

    Tokens per pass are modelled as rows ** exponent, the law that drafts of 4 to 32 rows follow on the trained phantom
    (docs/drafting.md). The exponent is measured in the request, the cost of rows on the machine. At exponent 0 drafts
    are never right, and plain decoding is best.

    A pass shows for every draft whether the model chooses it, even behind a wrong one. No more drafts can be accepted
    than are chosen, so where few are, two or three passes are enough to give up.

    The estimate may be wrong, so a pass is made only if the request could afford all of its drafts to be wrong. It can
    afford `_MAY_LOSE` of the time of plain decoding: for the tokens so far, or for the `expected` ones where their
    number is known. Earlier gains add as much again at most. `lost` is what drafting cost before the first pass, in
    seconds.
    """

    def __init__(self, costs: RowCosts, exponent: float, expected: int = 0, lost: float = 0.0) -> None:
        self._costs, self._first, self._expected = costs, exponent, expected
        self._done, self._lost = 0, lost  # tokens so far, and seconds that drafts cost (below 0: gained)
        self._plain_left, self._wait = _PLAIN_PASSES, _FIRST_WAIT
        self._made: Counter[int] = Counter()  # passes of this request by their size
        self._measured_again = 0  # the size of the next pass, where that is to measure what it costs
        self._expect(exponent)

    def _expect(self, exponent: float) -> None:
        self._rows, self._tokens, self._passes = float(_FIRST_ROWS), _FIRST_ROWS**exponent, _FIRST_PASSES
        self._agreed, self._drafts = _FIRST_AGREED

    def among(self, sequences: int) -> None:
        """From now on passes are over so many sequences, with as many rows of each."""
        self._costs = self._costs.among(sequences)

    @property
    def exponent(self) -> float:
        return math.log(self._tokens) / math.log(self._rows)

    def rows(self) -> int:
        """Rows of the next pass: at most twice as many as the largest size of known cost."""
        known = self._costs.most
        again, self._measured_again = self._measured_again, 0
        if again and self._affords(again):
            return again
        if self._plain_left or not known:
            self._plain_left = max(self._plain_left - 1, 0)
            return 1
        costs, plain = self._costs, self._costs.plain
        exponent, first = self.exponent, self._passes == _FIRST_PASSES
        sizes = filter(self._affords, _SIZES[: bisect(_SIZES, max(4, 2 * known))])
        rates = {rows: rows**exponent / costs.seconds(rows) for rows in sizes}  # tokens a second
        most = max(rates, default=1)
        if most == 1:
            self._plain_left = _LOOK_AGAIN
            return 1
        best = max(rates.values())
        rows = max(rows for rows, rate in rates.items() if rate >= _NEARLY * best)
        agreed = 1 + self._agreed / self._drafts * (rows - 1)
        if min(best, agreed / costs.seconds(rows)) >= _LEAST_GAIN / plain:
            return min(rows, _FIRST_ROWS) if first else rows
        self._plain_left, self._wait = self._wait, 2 * self._wait
        self._expect(self._first)
        # If only the cost of rows speaks against drafts, it is measured anew, for it may be out of date: by two passes,
        # because the first of a size does not count.
        if first:
            self._measured_again = min(_FIRST_ROWS, most)
        return self._measured_again or 1

    def follow(self, rows: int) -> int:
        """Rows of the next pass where another sequence has so many: as many, or 1 where that is too much."""
        return rows if self._costs.most and self._affords(rows) else 1

    def _affords(self, rows: int) -> bool:
        """Whether the request may lose what such a pass costs if all of its drafts are wrong."""
        costs = self._costs
        seconds = costs.seconds(rows) if costs.most > 1 else costs.plain * rows
        return seconds - costs.plain <= self._allowance() - self._lost

    def plain_passes(self) -> int:
        """How many passes, from the next on, are plain whatever is learnt meanwhile; do not ask `rows` for them."""
        if self._measured_again:
            return 0
        passes, self._plain_left = self._plain_left, 0
        return passes

    def _allowance(self) -> float:
        """Seconds that drafts may cost over the whole request."""
        return _MAY_LOSE * max(self._done, self._expected) * self._costs.plain

    def learn(self, rows: int, tokens: int, agreed: int, seconds: float) -> None:
        """Note that a pass of `rows` took `seconds` and gave `tokens`.

        The model chose `agreed` of its drafts: the accepted ones, and some behind a wrong one.
        """
        # The first of a size binds its memory, which takes as long as a phantom's pass.
        is_usual = self._made[rows] >= (1 if rows > 1 else _PLAIN_PASSES - 1)
        if is_usual and rows in _SIZES:  # other sizes only end a grid
            self._costs.record(rows, seconds)
        self._made[rows] += 1
        self._done += tokens
        if rows > 1:
            # What such passes cost at their best, not what this one took: other processes are no loss by drafts.
            cost = self._costs.known(rows) if is_usual else None
            lost = (cost or seconds) - tokens * self._costs.plain
            self._lost = max(self._lost + lost, -self._allowance())
            self._passes += 1
            newest = max(_NEWEST, 1 / self._passes)
            self._rows += newest * (rows - self._rows)
            self._tokens += newest * (tokens - self._tokens)
            if self._passes > _FIRST_PASSES + 1:  # the model had not seen the drafts of a first pass
                self._agreed += agreed
                self._drafts += rows - 1

    def learn_plain(self, seconds: Sequence[float]) -> None:
        """Note the `seconds` of passes of one row, each of which gave one token."""
        told = seconds[-MOST_TIMES:]  # no others count
        self._done += len(seconds) - len(told)
        self._made[1] += len(seconds) - len(told)
        for one in told:
            self.learn(1, 1, 0, one)
