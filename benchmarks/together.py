"""The gain of processing requests together: passes over 1 to 8 or more sequences, each with its own context.

    python -m benchmarks.together BUNDLE [--task generation] [--most 8] [--rows 1] [--repeat 5] [--threads N]
        [--out FILE]

With several --rows a pass also has so many rows of each sequence, for drafts. All sizes are timed in turn, in `repeat`
rounds, once the executor was found to give each sequence the bits that it gets alone. Any bundle will do, such as a
full-size one with random weights (benchmarks.full_size): the cost of a pass does not depend on its content. Each
sequence takes memory for its caches, with M3 0.4 MB per token.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from healthgpt_edge import load
from healthgpt_edge.bench import summary
from healthgpt_edge.executors import Group
from healthgpt_edge.session import Session

from .passes import options, run, save

SIZES = (1, 2, 3, 4, 6, 8, 12, 16)


def time_passes(
    session: Session,
    task: str,
    group: Group,
    context_tokens: int,
    sizes: list[int],
    repeat: int,
    rows: Sequence[int] = (1,),
) -> dict[tuple[int, int], list[float]]:
    """Milliseconds of passes by their sequences and the rows of each; the first pass of each size is not counted."""
    random, vocabulary = np.random.default_rng(0), session.bundle.manifest.language.vocab
    context = session.executor.context(task, None)
    context.forward(random.integers(0, vocabulary, context_tokens))
    samples_ms: dict[tuple[int, int], list[float]] = {(size, count): [] for size in sizes for count in rows}
    for turn in range(1 + repeat):
        for size in sizes:
            with ExitStack() as seats:
                members = [seats.enter_context(group.join(context)) for _ in range(size)]
                for count in rows:
                    for timed in (False, bool(turn)):  # the first pass binds its memory
                        tokens = {member: random.integers(0, vocabulary, count) for member in members}
                        for member in members:
                            member.length = context_tokens
                        begin = time.perf_counter()
                        group.forward(tokens, ())
                        if timed:
                            samples_ms[size, count].append((time.perf_counter() - begin) * 1e3)
    return samples_ms


def report(samples_ms: dict[tuple[int, int], list[float]]) -> list[dict[str, Any]]:
    """What time_passes found: the cost in passes of one row, rows a second, and a summary of the times."""
    medians_ms = {size: float(np.median(samples)) for size, samples in samples_ms.items()}
    return [
        {"sequences": size[0], "rows": size[1], "cost": ms / medians_ms[1, 1]}
        | {"rows_per_second": size[0] * size[1] / ms * 1e3, **summary(samples_ms[size])}
        for size, ms in medians_ms.items()
    ]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--most", type=int, default=8, help="sequences at most")
    parser.add_argument("--rows", type=int, nargs="+", default=[1], help="of each sequence, from 1 on")
    arguments = parser.parse_args()
    session = load(arguments.bundle, tasks=(arguments.task,), threads=arguments.threads, verify=False)
    sizes = [size for size in SIZES if size <= arguments.most]
    group = session.group(arguments.task, max(sizes))
    if group is None:
        sys.exit("sequences in a group must get the bits that they get by themselves, found others or no groups")
    rows = sorted({1, *arguments.rows})
    passes = report(time_passes(session, arguments.task, group, arguments.context, sizes, arguments.repeat, rows))
    print("| sequences | rows of each | ms a pass | of one row | rows a second | times as many |")
    print("|---|---|---|---|---|---|")
    for one in passes:
        size, count, cost, rate = one["sequences"], one["rows"], one["cost"], one["rows_per_second"]
        print(f"| {size} | {count} | {one['p50_ms']:.2f} | {cost:.2f} | {rate:.1f} | {size * count / cost:.2f} |")
    save(arguments, "passes", passes)


if __name__ == "__main__":
    run(main)
