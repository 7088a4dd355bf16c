"""What the model said about later tokens while it checked a draft: the draft for the next pass."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

# By whether the token stands behind the first choice, and whether the choice is what was drafted.
_NAMES = (("jacobi first new", "jacobi first same"), ("jacobi later new", "jacobi later same"))


class Jacobi:
    """The parallel fixed point of the next tokens (Santilli et al., 2023, "Accelerating Transformer Inference for
    Translation via Parallel Decoding", algorithm 2).

    Behind the first wrong token of a draft the model's choices rest on something wrong, yet most of them are right
    already: a code depends more on the picture than on its neighbours.
    """

    def __init__(self) -> None:
        self._choices: dict[int, tuple[str, int]] = {}

    def guess(self, place: int) -> tuple[str, int] | None:
        """The token at `place`, counted from the first new one, and the name to measure it under; None if unknown."""
        return self._choices.get(place)

    def learn(self, place: int, drafts: Sequence[int], choices: Sequence[int]) -> None:
        """Take the model's `choices` for the tokens from `place` on, where `drafts` had stood in the pass.

        There is one choice more than drafts. One equal to its draft is at the fixed point as far as it can see, and
        the first one follows a draft that was wrong: so they are measured apart.
        """
        for index, (draft, choice) in enumerate(zip_longest(drafts, choices)):
            name = _NAMES[index > 0][draft == choice]
            self._choices[place + index] = (name, choice)
