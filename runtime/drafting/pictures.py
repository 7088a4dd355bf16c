"""Sources for pictures: the codes of the picture that goes in, and the rows that came out so far."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .sources import Rule, Source, Table


def input_sources(grid: np.ndarray, first: int) -> list[Source]:
    """Sources that start from `grid`, int64 [h, w]: the codes that the VQGAN's encoder gives of the picture.

    The code itself is a guess where the task keeps the picture; where it changes what things look like, a table
    learns what each code turns into, also by the codes that came out to the left of it and above. `first` is the id
    of code 0.
    """
    codes = [first + int(code) for code in grid.ravel()]
    width = grid.shape[1]

    def drawn(place: int) -> int | None:
        return codes[place] if place < len(codes) else None

    return [
        Table("input, left and above", lambda ids, place: (drawn(place), _left(ids, place), _above(ids, place, width))),
        Table("input and left", lambda ids, place: (drawn(place), _left(ids, place))),
        Rule("input", lambda ids: drawn(len(ids))),
        Table("input table", lambda ids, place: drawn(place)),
    ]


def own_sources(width: int) -> list[Source]:
    """Sources that know nothing but the tokens so far, in rows of `width`."""
    return [
        Table("left and above", lambda ids, place: (_left(ids, place), _above(ids, place, width))),
        Table("two to the left", lambda ids, place: (_left(ids, place), _left(ids, place - 1))),
        Rule("above", lambda ids: _above(ids, len(ids), width)),
        Rule("left", lambda ids: _left(ids, len(ids))),
    ]


def _left(ids: Sequence[int], place: int) -> int | None:
    return ids[place - 1] if place > 0 else None


def _above(ids: Sequence[int], place: int, width: int) -> int | None:
    return ids[place - width] if place >= width else None
