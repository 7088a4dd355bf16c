"""Whether an executor gives a token the same logits, to the last bit, however many tokens a pass has."""

from __future__ import annotations

import numpy as np

from ..executors import Executor

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
