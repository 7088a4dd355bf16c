"""Drafts the next tokens from several sources, each trusted as far as it has proved right in this request."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import eq

from .jacobi import Jacobi
from .pace import Pace
from .sources import Source


@dataclass(slots=True)
class Acceptance:
    """How often a source's guesses were right; counts as half the time before the first."""

    right: int = 1
    tried: int = 2

    @property
    def rate(self) -> float:
        return self.right / self.tried


_UNTRIED = Acceptance().rate


class Drafter:
    """Drafts of one request: `draft` says what a pass should check, `learn` takes what came of it.

    `name`: what the drafts come from. `sources`: the first wins a tie. `allowed`: whether drafting is safe, asked once,
    before the first draft. `jacobi`: also follow the model's own choices for later tokens. `prompt`: tokens that
    sources learn from beforehand. `plain`: tokens to decode before the first draft. `newline`: the token that stands
    for nothing between rows of `width` codes.
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
        # The last guess at each place, with its source, until the token there is known.
        self._guesses: dict[int, tuple[str, int]] = {}
        # Passes not yet learnt from: during plain passes nothing needs what they teach.
        self._told: list[tuple[Sequence[int], Sequence[int], Sequence[int], float | None, int]] = []
        self._told_tokens, self._plain_passes, self._sequences = 0, 0, 1

    def draft(self, most: int, lead: int | None = None) -> list[int]:
        """Up to `most` tokens that may come next, in order; none where a plain pass is better.

        In a group whose pass will have `lead` rows of another sequence, as many if this request can afford it.
        """
        drafts: list[int] = []
        if self._told_tokens < self._plain or lead == 1:
            return drafts
        if self._plain_passes and lead is None:
            self._plain_passes -= 1
            return drafts
        self.catch_up()
        if lead is None:
            count, self._plain_passes = self.pace.rows() - 1, self.pace.plain_passes()
        else:
            count = self.pace.follow(lead) - 1
        count = min(count, most)
        if count < 1:
            return drafts
        known = len(self._ids)
        for source in self._sources:
            source.learn(self._ids)
        rates = defaultdict(lambda: _UNTRIED, ((name, one.rate) for name, one in self.acceptance.items()))
        trusted = [(rates[source.name], source) for source in self._sources]
        trusted.sort(key=lambda one: -one[0])
        last = self._last
        for _ in range(count):
            due = self._breaks_after(last)
            token_id = self._newline if due else self._guess(self._place + len(drafts), rates, trusted)
            if token_id is None:
                break
            drafts.append(token_id)
            last = token_id
            if token_id != self._newline:
                self._ids.append(token_id)
        del self._ids[known:]
        if drafts and not self.drafted:
            self.drafted = self._allowed()
            self._plain = self._plain if self.drafted else sys.maxsize
        return drafts if self.drafted else []

    def learn(
        self,
        ids: Sequence[int],
        drafts: Sequence[int],
        choices: Sequence[int],
        seconds: float | None,
        sequences: int = 1,
    ) -> None:
        """Take the new `ids` of a pass over `sequences` that checked `drafts` in `seconds` (None for a prefill).

        `choices` are what the remaining rows chose: what the model would put after `ids` if the rest of `drafts` were
        right. They reach one token further than `drafts`.
        """
        self._told.append((ids, drafts, choices, seconds, sequences))
        self._told_tokens += len(ids)

    def catch_up(self) -> None:
        """Learn from all passes so far. Call it at the end, too: the costs of passes outlive the request."""
        plain_seconds: list[float] = []
        for ids, drafts, choices, seconds, sequences in self._told:
            if sequences != self._sequences:
                self.pace.learn_plain(plain_seconds)
                plain_seconds, self._sequences = [], sequences
                self.pace.among(sequences)
            for token_id in ids:
                self._take(token_id)
            if self._jacobi and choices:
                self._jacobi.learn(self._place, drafts[len(ids) :], choices)
            if seconds is None:
                continue
            if not drafts:
                plain_seconds.append(seconds)
                continue
            self.pace.learn_plain(plain_seconds)
            plain_seconds = []
            agreed = len(ids) - 1 + sum(map(eq, drafts[len(ids) :], choices))
            self.pace.learn(1 + len(drafts), len(ids), agreed, seconds)
        self.pace.learn_plain(plain_seconds)
        self._told = []

    def _take(self, token_id: int) -> None:
        """Take the next token, and count whether the guesses at it were right: the one followed, and the model's."""
        followed = self._guesses.pop(self._place, None)
        own = self._jacobi.guess(self._place) if self._jacobi else None
        for guess in (followed, own if own != followed else None):
            if guess:
                acceptance = self.acceptance[guess[0]]
                acceptance.tried += 1
                acceptance.right += guess[1] == token_id
        if token_id == self._newline:
            self._breaks = True
        else:
            self._breaks &= not self._breaks_after(self._last)
            self._ids.append(token_id)
        self._last = token_id
        self._place += 1

    def _guess(self, place: int, rates: dict[str, float], trusted: Sequence[tuple[float, Source]]) -> int | None:
        """The most trusted guess at the token at `place`, which follows `self._ids`; None where there is none."""
        guess = self._jacobi.guess(place) if self._jacobi else None
        trust = rates[guess[0]] if guess else 0.0
        for rate, source in trusted:
            if rate <= trust:
                break
            if (token_id := source.guess(self._ids)) is not None:
                guess = source.name, token_id
                break
        if guess is None:
            return None
        self._guesses[place] = guess
        return guess[1]

    def _breaks_after(self, last: int | None) -> bool:
        """Whether a newline is due: behind a full row, once the model has written one and until it leaves one out."""
        return self._breaks and last != self._newline and len(self._ids) > 0 and len(self._ids) % self._width == 0
