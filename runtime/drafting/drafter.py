"""Drafts the next tokens from several sources, each trusted as far as it has proved right in this request."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from .jacobi import Jacobi
from .pace import Pace
from .sources import Source


@dataclass(slots=True)
class Acceptance:
    """How often the last guess of a source at a token was right; half the time before the first."""

    right: int = 1
    tried: int = 2

    @property
    def rate(self) -> float:
        return self.right / self.tried


class Drafter:
    """Drafts of one request: `draft` says what a pass should check, `learn` is told what came of it.

    `name` says what the drafts come from, and the first of `sources` wins a tie. `allowed` is asked once, before the
    first draft. `jacobi` adds the model's own choices for later tokens. `prompt` is what sources may learn from before
    the first token, `plain` the tokens before the first draft. `newline` is the token that counts for nothing between
    rows of `width` codes.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[Source],
        pace: Pace,
        *,
        allowed: Callable[[], bool] = lambda: True,
        jacobi: bool = True,
        prompt: Sequence[int] = (),
        plain: int = 0,
        newline: int | None = None,
        width: int = 1,
    ) -> None:
        self.name, self.pace = name, pace
        self.drafted = False
        self.acceptance: dict[str, Acceptance] = defaultdict(Acceptance)
        self._sources, self._jacobi = sources, Jacobi() if jacobi else None
        self._allowed, self._plain = allowed, plain
        self._newline, self._width, self._breaks = newline, width, False
        self._last: int | None = None
        self._ids = list(prompt)  # right tokens without newlines
        self._place = 0  # of the next token among all new ones
        # The last guess at each place and its source, until it is known what stands there.
        self._guesses: dict[int, tuple[str, int]] = {}

    def draft(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next, in order; none where a plain pass pays best."""
        known = len(self._ids)
        drafts: list[int] = []
        count = min(self.pace.rows() - 1, most) if self._place >= self._plain else 0
        if count < 1:
            return drafts
        for source in self._sources:
            source.learn(self._ids)
        ranked = sorted(self._sources, key=lambda source: -self.acceptance[source.name].rate)
        for _ in range(count):
            last = drafts[-1] if drafts else self._last
            token_id = self._newline if self._breaks_after(last) else self._guess(self._place + len(drafts), ranked)
            if token_id is None:
                break
            drafts.append(token_id)
            if token_id != self._newline:
                self._ids.append(token_id)
        del self._ids[known:]
        if drafts and not self.drafted:
            self.drafted = self._allowed()
            self._plain = self._plain if self.drafted else sys.maxsize
        return drafts if self.drafted else []

    def learn(self, ids: Sequence[int], drafts: Sequence[int], choices: Sequence[int], seconds: float | None) -> None:
        """Take the new `ids` that a pass gave, which checked `drafts` in `seconds`; a prefill's time is None.

        `choices` are what the model would put after `ids`, going by the rest of `drafts`: one for each row that is
        left, so that `drafts` end one before them.
        """
        for token_id in ids:
            self._score(token_id)
            if token_id == self._newline:
                self._breaks = True
            else:
                self._breaks &= not self._breaks_after(self._last)
                self._ids.append(token_id)
            self._last = token_id
            self._place += 1
        if self._jacobi and choices:
            self._jacobi.learn(self._place, drafts[len(ids) :], choices)
        if seconds is not None:
            self.pace.learn(1 + len(drafts), len(ids), seconds)

    def _score(self, token_id: int) -> None:
        """Count for and against the guesses at the next place: the one followed, and the model's own in any case."""
        followed = self._guesses.pop(self._place, None)
        own = self._jacobi.guess(self._place) if self._jacobi else None
        for guess in {followed, own} - {None}:
            name, guessed = cast(tuple[str, int], guess)
            self.acceptance[name].tried += 1
            self.acceptance[name].right += guessed == token_id

    def _guess(self, place: int, ranked: Sequence[Source]) -> int | None:
        """The most trusted guess at the token at `place`, which follows `self._ids`; None where there is none."""
        guess = self._jacobi.guess(place) if self._jacobi else None
        trust = self.acceptance[guess[0]].rate if guess else 0.0
        for source in ranked:
            if self.acceptance[source.name].rate <= trust:
                break
            if (token_id := source.guess(self._ids)) is not None:
                guess = source.name, token_id
                break
        if guess is None:
            return None
        self._guesses[place] = guess
        return guess[1]

    def _breaks_after(self, last: int | None) -> bool:
        """Whether a newline is due: behind a full row, once the model wrote one there and until it leaves one out."""
        return self._breaks and last != self._newline and len(self._ids) > 0 and len(self._ids) % self._width == 0
