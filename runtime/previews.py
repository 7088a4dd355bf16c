"""Pictures of the codes so far, for who is watching a picture being made."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

# Of the time since the first code: decoding a picture takes as long as several codes, and watching must not.
_SHARE = 0.1


class Previews:
    """Shows the picture when a row of codes is full, as often as that takes a tenth of the time.

    `picture` decodes a grid int64 [h, w] to pixels uint8 [H, W, 3], `show` gets those and the number of full rows. The
    rows to come repeat the last one.
    """

    def __init__(
        self, side: int, picture: Callable[[np.ndarray], np.ndarray], show: Callable[[np.ndarray, int], None]
    ) -> None:
        self._side, self._picture, self._show = side, picture, show
        self._codes: list[int] = []
        self._started = time.perf_counter()
        self._spent = 0.0

    def add(self, code: int) -> None:
        """Take the next code in reading order."""
        self._codes.append(code)
        rows, rest = divmod(len(self._codes), self._side)
        begin = time.perf_counter()
        if rest or rows >= self._side or self._spent > _SHARE * (begin - self._started):
            return
        last = self._codes[-self._side :]
        grid = np.array(self._codes + last * (self._side - rows), np.int64).reshape(self._side, self._side)
        self._show(self._picture(grid), rows)
        self._spent += time.perf_counter() - begin
