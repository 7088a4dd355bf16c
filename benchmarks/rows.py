"""The time of forward passes of 1 to 64 rows, and the speed-up of drafts at that cost.

    python -m benchmarks.rows BUNDLE [--task generation] [--context 700] [--repeat 5] [--threads N] [--out FILE]

All sizes are timed in turn, in `repeat` rounds, on one context that is rewound after each pass. Any bundle will do,
such as a full-size one with random weights (benchmarks.full_size): the cost of rows does not depend on their content.
How many drafts are accepted does, so it is assumed: a power of the rows, 0.5 to 0.7 on the trained phantom
(docs/drafting.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from healthgpt_edge import Session, load
from healthgpt_edge.bench import summary

from .passes import options, pass_timer, run, save

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
EXPONENTS = (0.5, 0.6, 0.7)


def time_rows(session: Session, task: str, context_tokens: int, repeat: int) -> dict[int, list[float]]:
    """Milliseconds of passes by their rows; the first pass of each size is not counted."""
    seconds = pass_timer(session, task, context_tokens)
    samples_ms: dict[int, list[float]] = {rows: [] for rows in SIZES}
    for turn in range(1 + repeat):
        for rows in SIZES:
            taken = seconds(rows)
            if turn:
                samples_ms[rows].append(taken * 1e3)
    return samples_ms


def report(samples_ms: dict[int, list[float]]) -> list[dict[str, Any]]:
    """What time_rows found: by rows, the cost in passes of one, the gain of drafts, and a summary of the times."""
    medians_ms = {rows: float(np.median(samples)) for rows, samples in samples_ms.items()}
    found = []
    for rows, median_ms in medians_ms.items():
        cost = median_ms / medians_ms[1]
        gains = {str(power): rows**power / cost for power in EXPONENTS}
        found.append({"rows": rows, "cost": cost, "gain_by_exponent": gains, **summary(samples_ms[rows])})
    return found


def main() -> None:
    arguments = options(__doc__).parse_args()
    session = load(arguments.bundle, tasks=(arguments.task,), threads=arguments.threads, verify=False)
    found = report(time_rows(session, arguments.task, arguments.context, arguments.repeat))
    print(f"| rows | ms | of one row | {' | '.join(f'times as fast at rows^{power}' for power in EXPONENTS)} |")
    print("|" + "---|" * (3 + len(EXPONENTS)))
    for one in found:
        gains = " | ".join(f"{gain:.2f}" for gain in one["gain_by_exponent"].values())
        print(f"| {one['rows']} | {one['p50_ms']:.2f} | {one['cost']:.2f} | {gains} |")
    save(arguments, "rows", found)


if __name__ == "__main__":
    run(main)
