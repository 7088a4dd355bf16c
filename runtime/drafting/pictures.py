"""Sources for pictures: the codes of the input picture, and the rows made so far."""

from __future__ import annotations

import numpy as np

from .sources import Rule, Source, Table


def input_sources(grid: np.ndarray, first: int) -> list[Source]:
    """Sources that start from `grid`, int64 [h, w]: the input picture's codes by the VQGAN's encoder.

    Where the task keeps the picture, the input's code is itself a guess. Where it changes how things look, tables learn
    what each code turns into, alone or with the new codes to the left and above. `first` is the id of code 0.
    """
    codes = [first + int(code) for code in grid.ravel()]
    width = grid.shape[1]
    return [
        Table("input, left and above", (1, width), codes),
        Table("input and left", (1,), codes),
        Rule("input", lambda ids: codes[len(ids)] if len(ids) < len(codes) else None),
        Table("input table", (), codes),
    ]


def own_sources(width: int) -> list[Source]:
    """Sources that know only the tokens so far, in rows of `width`."""
    return [
        Table("left and above", (1, width)),
        Table("two to the left", (1, 2)),
        Rule("above", lambda ids: ids[-width] if len(ids) >= width else None),
        Rule("left", lambda ids: ids[-1] if ids else None),
    ]
