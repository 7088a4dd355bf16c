"""Where guesses at the next token come from: fixed rules, and tables that learn."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain, repeat
from typing import Protocol


class Source(Protocol):
    """Guesses one token at a time. Its acceptance is counted under `name`."""

    name: str

    def guess(self, ids: Sequence[int]) -> int | None:
        """The token that may follow `ids`: all tokens so far, right or drafted; of pictures without newlines."""
        ...

    def learn(self, ids: Sequence[int]) -> None:
        """Note that `ids`, all tokens so far, are right."""
        ...


class Rule:
    """Guesses by a fixed function of the tokens so far."""

    def __init__(self, name: str, rule: Callable[[Sequence[int]], int | None]) -> None:
        self.name, self.guess = name, rule

    def learn(self, ids: Sequence[int]) -> None:
        pass


class Table:
    """Guesses what came last in the same surroundings.

    Surroundings are the tokens at the distances `back`, and the input's code at the place itself, of `drawn`, if that
    is given. None stands for what is not there.
    """

    def __init__(self, name: str, back: Sequence[int] = (), drawn: Sequence[int] = ()) -> None:
        self.name, self._back, self._drawn = name, back, drawn
        self._followers: dict[Hashable, int] = {}
        self._learnt = 0

    def guess(self, ids: Sequence[int]) -> int | None:
        place = len(ids)
        near: list[int | None] = [ids[place - distance] if distance <= place else None for distance in self._back]
        if self._drawn:
            near.append(self._drawn[place] if place < len(self._drawn) else None)
        return self._followers.get(tuple(near))

    def learn(self, ids: Sequence[int]) -> None:
        # Column by column: a row of a picture costs little more than one token.
        first, self._learnt = self._learnt, len(ids)
        columns: list[Iterable[int | None]] = [
            chain(repeat(None, min(distance, self._learnt) - first), ids[max(0, first - distance) :])
            for distance in self._back
        ]
        if self._drawn:
            columns.append(chain(self._drawn[first:], repeat(None)))
        self._followers.update(zip(zip(*columns, strict=False), ids[first:], strict=False))
