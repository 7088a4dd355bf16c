"""The time of forward passes of 1 to 64 rows, and the speed-up of drafts at that cost.

    python -m benchmarks.rows BUNDLE [--task generation] [--context 700] [--repeat 5] [--threads N] [--out FILE]

All sizes are timed in turn, in `repeat` rounds, on one context that is rewound after each pass. Any bundle will do,
such as a full-size one with random weights (benchmarks.full_size): the cost of rows does not depend on their content.
How many drafts are accepted does, so it is assumed: a power of the rows, 0.5 to 0.7 on the trained phantom
(docs/drafting.md).
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from healthgpt_edge import load
from healthgpt_edge.bench import summary

from .passes import options, save

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
EXPONENTS = (0.5, 0.6, 0.7)


def time_rows(path: Path, task: str, context_tokens: int, repeat: int, threads: int) -> dict[int, list[float]]:
    """Milliseconds of passes by their rows; the first pass of each size is not counted."""
    session = load(path, tasks=(task,), threads=threads, verify=False)
    random, vocabulary = np.random.default_rng(0), session.bundle.manifest.language.vocab
    context = session.executor.context(task, None)
    context.forward(random.integers(0, vocabulary, context_tokens))
    samples_ms: dict[int, list[float]] = {rows: [] for rows in SIZES}
    for turn in range(1 + repeat):
        for rows in SIZES:
            context.length = context_tokens
            token_ids = random.integers(0, vocabulary, rows)
            begin = time.perf_counter()
            context.forward(token_ids, last_positions=rows)
            if turn:
                samples_ms[rows].append((time.perf_counter() - begin) * 1e3)
    return samples_ms


def main() -> None:
    arguments = options(__doc__).parse_args()
    samples_ms = time_rows(arguments.bundle, arguments.task, arguments.context, arguments.repeat, arguments.threads)
    medians = {rows: float(np.median(samples)) for rows, samples in samples_ms.items()}
    print(f"| rows | ms | of one row | {' | '.join(f'times as fast at rows^{power}' for power in EXPONENTS)} |")
    print("|" + "---|" * (3 + len(EXPONENTS)))
    rows_json = []
    for rows, median_ms in medians.items():
        cost = median_ms / medians[1]
        gains = {str(power): rows**power / cost for power in EXPONENTS}
        print(f"| {rows} | {median_ms:.2f} | {cost:.2f} | {' | '.join(f'{gain:.2f}' for gain in gains.values())} |")
        rows_json.append({"rows": rows, "cost": cost, "gain_by_exponent": gains, **summary(samples_ms[rows])})
    save(arguments, "rows", rows_json)


if __name__ == "__main__":
    main()
