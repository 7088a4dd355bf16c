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


# Tokens of the sequences in a group when they join it, and passes that are compared.
_PROMPTS, _PASSES = (2, 9, 23), 3


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
            return member, [context.forward(np.array([context.length])) for _ in range(_PASSES)]

        alone = dict(map(begin, _PROMPTS))  # one after another: each context takes memory
        for place in range(_PASSES):
            together = group.forward({member: member.length for member in alone}, ())
            if not all(np.array_equal(alone[member][place], together[member]) for member in alone):
                return False
    return True
