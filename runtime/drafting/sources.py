"""Where guesses at the next token come from: rules that are fixed, and tables that learn."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol


class Source(Protocol):
    """Guesses one token at a time; `name` is what its acceptance is measured under."""

    name: str

    def guess(self, ids: Sequence[int]) -> int | None:
        """The token that may follow `ids`, all tokens so far, right or drafted; of pictures without newlines."""
        ...

    def learn(self, ids: Sequence[int]) -> None:
        """Note that `ids`, all tokens so far, are right."""
        ...


class Rule:
    """Guesses what a function of the tokens so far says."""

    def __init__(self, name: str, rule: Callable[[Sequence[int]], int | None]) -> None:
        self.name, self.guess = name, rule

    def learn(self, ids: Sequence[int]) -> None:
        pass


class Table:
    """Guesses what came last in the same surroundings; `surroundings(ids, place)` are those of the token at `place`."""

    def __init__(self, name: str, surroundings: Callable[[Sequence[int], int], Hashable]) -> None:
        self.name, self._surroundings = name, surroundings
        self._followers: dict[Hashable, int] = {}
        self._learnt = 0

    def guess(self, ids: Sequence[int]) -> int | None:
        return self._followers.get(self._surroundings(ids, len(ids)))

    def learn(self, ids: Sequence[int]) -> None:
        for place in range(self._learnt, len(ids)):
            self._followers[self._surroundings(ids, place)] = ids[place]
        self._learnt = len(ids)
