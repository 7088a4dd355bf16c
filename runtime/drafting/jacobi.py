"""The model's own choices for later tokens, made while it checked a draft: the draft for the next pass."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

# [whether the token stands behind the first choice][whether the choice is what was drafted]
_NAMES = (("jacobi first new", "jacobi first same"), ("jacobi later new", "jacobi later same"))


class Jacobi:
    """The parallel fixed point of the next tokens (Santilli et al., 2023, "Accelerating Transformer Inference for
    Translation via Parallel Decoding", algorithm 2).

    Behind the first wrong token of a draft the model's choices rest on a wrong token. Yet most of them are right
    already: a code depends more on the picture than on its neighbours.
    """

    def __init__(self) -> None:
        self._choices: dict[int, tuple[str, int]] = {}

    def guess(self, place: int) -> tuple[str, int] | None:
        """The name to count the guess under, and the token at `place` (0: the first new one); None if unknown."""
        return self._choices.get(place)

    def learn(self, place: int, drafts: Sequence[int], choices: Sequence[int]) -> None:
        """Take the model's `choices` for the tokens from `place` on, where the pass had `drafts`, one fewer.

        A choice equal to its draft is at the fixed point, given the tokens before it. The first choice follows a draft
        that was wrong. Both are right at rates of their own, so they are counted apart.
        """
        for index, (draft, choice) in enumerate(zip_longest(drafts, choices)):
            name = _NAMES[index > 0][draft == choice]
            self._choices[place + index] = (name, choice)
