"""Whether an executor gives a token the same logits, to the last bit, whatever else is in its pass."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from .executors import Executor, Sequence

# One pass of all these rows, then passes of each: sizes on both sides of where kernels change their ways.
_SIZES = (1, 3, 1, 4, 2, 13)


def rows_agree(executor: Executor, task: str) -> bool:
    """Compare the logits of some tokens in one pass with those of the same tokens in several."""
    ids = np.arange(sum(_SIZES), dtype=np.int64)
    context = executor.context(task, None)
    together = context.forward(ids, last_positions=len(ids))
    context.length = 0
    parts = np.split(ids, np.cumsum(_SIZES)[:-1])
    apart = np.concatenate([context.forward(part, last_positions=len(part)) for part in parts])
    return bool(np.array_equal(together, apart))


# Tokens of the sequences in a group when they join it, and rows of each in the passes that are compared.
_PROMPTS, _ROWS = (2, 9, 23), (1, 4, 1)


def sequences_agree(executor: Executor, task: str) -> bool:
    """Compare the logits of some sequences that go on in a group with those of the same ones by themselves."""
    group = executor.group(task, len(_PROMPTS))
    if group is None:
        return False
    with ExitStack() as seats:

        def begin(length: int) -> tuple[Sequence, list[np.ndarray]]:
            """One that has joined, and its logits by itself."""
            context = executor.context(task, None)
            context.forward(np.arange(length, 2 * length))  # other tokens than the others'
            member = seats.enter_context(group.join(context))
            return member, [context.forward(_next(context, rows), last_positions=rows) for rows in _ROWS]

        alone = dict(map(begin, _PROMPTS))  # one after another: each context takes memory
        for place, rows in enumerate(_ROWS):
            together = group.forward({member: _next(member, rows) for member in alone}, ())
            if not all(np.array_equal(alone[member][place], together[member]) for member in alone):
                return False
    return True


def _next(sequence: Sequence, count: int) -> np.ndarray:
    """Tokens that a sequence may go on with, others in each place."""
    return np.arange(sequence.length, sequence.length + count)
