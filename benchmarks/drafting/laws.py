"""Simulate --draft auto on another machine, or with a larger model: real pictures, timed by a clock of given costs.

    python -m benchmarks.drafting.laws BUNDLE --rows FILE [--pictures 20] [--encoder-ms 250] [--out FILE]
    python -m benchmarks.drafting.laws BUNDLE --together FILE ...
    python -m benchmarks.drafting.laws BUNDLE --passes-of OTHER [--context 700] [--threads N] ...

Acceptance is that of the trained phantom BUNDLE; a pass takes the milliseconds that FILE, of benchmarks.rows, says of
so many rows, and the VQGAN's encoder --encoder-ms, assumed: a second at M3's size, and a phantom has a quarter of its
codes. Nothing is timed then, so the figures are the same on every machine. Ids are compared with plain decoding; one
that differs ends the run with code 1.

With --together FILE, of benchmarks.together, pictures of one task are made together, as many at a time as FILE knows.
With --passes-of OTHER, such as a full-size bundle, passes are not simulated: OTHER makes each, too, with as many rows
behind --context tokens, and the pass takes the time that took.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from healthgpt_edge import Picture, Session, decoding, load, machine, steps, together
from healthgpt_edge.drafting import drafts
from healthgpt_edge.executors.onnx_context import MOST_STEP_ROWS
from healthgpt_edge.manifest import GENERATION

from ..commit import commit
from ..passes import pass_timer, run
from .ids import differing_ids
from .jobs import Job, jobs

# The seconds of a pass over so many sequences, with so many rows of each.
Cost = Callable[[int, int], float]


class Clock:
    """Seconds that pass only where they are added."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def around(self, function: Callable[..., Any], seconds: Callable[..., float]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            self.now += seconds(*arguments)
            return function(*arguments, **options)

        return timed


@contextmanager
def simulated(session: Session, cost: Cost, encoder_seconds: float) -> Iterator[Clock]:
    """A session whose passes take what `cost` says, by a clock of their own."""
    clock, executor = Clock(), session.executor
    blank, context_of, group_of = np.zeros((1, 1, 3), np.uint8), executor.context, executor.group
    encode = clock.around(executor.draft, lambda pixels: encoder_seconds)

    def context(*arguments: Any) -> Any:
        made = context_of(*arguments)
        made.forward = clock.around(made.forward, lambda ids, *rest: cost(1, len(ids)))
        return made

    def group(*arguments: Any) -> Any:
        made = group_of(*arguments)
        made.forward = clock.around(made.forward, lambda ids, whole: cost(len(ids), min(map(len, ids.values()))))
        return made

    with ExitStack() as patches:
        changes = {"picture": lambda grid: blank, "draft": encode, "context": context, "group": group}
        patches.enter_context(patch.multiple(executor, **changes))
        for module in (decoding, steps, together, drafts):
            patches.enter_context(patch.object(module, "time", clock))
        yield clock


def summary(ones: list[tuple[float, int, int, int]]) -> dict[str, Any]:
    """Of pictures: times as fast, passes without drafts and with them, differing ids."""
    return {
        "pictures": len(ones),
        "differing_ids": int(sum(one[3] for one in ones)),
        "fewer_passes": sum(one[1] for one in ones) / sum(one[2] for one in ones),
        "median_speedup": float(np.median([one[0] for one in ones])),
        "least_speedup": min(one[0] for one in ones),
    }


def one_by_one(session: Session, count: int, clock: Clock) -> dict[str, dict[str, Any]]:
    """What drafts do for `count` pictures of each task, by task."""

    def make(job: Job, draft: str) -> tuple[Picture, float]:
        begin = clock.now
        picture = session.generate(job.image, job.words, sampling=job.sampling, draft=draft)
        return picture, clock.now - begin

    found: dict[str, list[tuple[float, int, int, int]]] = {}
    for job in jobs(count):
        (made, seconds), (plain, plain_seconds) = make(job, "auto"), make(job, "none")
        one = (plain_seconds / seconds, plain.forward_passes, made.forward_passes, differing_ids(made, plain))
        found.setdefault(job.task, []).append(one)
    return {task: summary(ones) for task, ones in found.items()}


def side_by_side(session: Session, count: int, clock: Clock, at_a_time: int) -> dict[str, dict[str, Any]]:
    """The same of pictures that are made together, so many at a time; their speed-up is that of all of them."""
    by_task: dict[str, list[Job]] = {}
    for job in jobs(count):
        by_task.setdefault(job.task, []).append(job)
    session.group(GENERATION, at_a_time)  # compares, once

    def make(some: list[Job], draft: str) -> tuple[list[Picture], float]:
        begin, group = clock.now, session.together(at_a_time)
        for place, job in enumerate(some):
            group.generate(place, job.image, job.words, sampling=job.sampling, draft=draft)
        made = {place: picture for place, picture, _ in group}
        return [made[place] for place in range(len(some))], clock.now - begin

    found: dict[str, dict[str, Any]] = {}
    for task, some in by_task.items():
        (made, seconds), (plain, plain_seconds) = make(some, "auto"), make(some, "none")
        found[task] = summary(
            [
                (plain_seconds / seconds, two.forward_passes, one.forward_passes, differing_ids(one, two))
                for one, two in zip(made, plain, strict=True)
            ]
        )
    return found


def _on_line(rows: int, timed: dict[int, float]) -> float:
    """Seconds of so many rows: on a line between the two sizes around them, or through the two largest."""
    sizes = list(timed)
    above = next((size for size in sizes[1:] if size >= rows), sizes[-1])
    below = sizes[sizes.index(above) - 1]
    return timed[below] + (rows - below) * (timed[above] - timed[below]) / (above - below)


def cost_of(passes: list[dict[str, Any]]) -> Cost:
    """The seconds of a pass by its sequences and the rows of each, on lines through those that were timed."""
    by_size: dict[int, dict[int, float]] = {}
    for one in passes:
        by_size.setdefault(one.get("sequences", 1), {})[one.get("rows", 1)] = one["p50_ms"] / 1e3
    if any(len(timed) < 2 for timed in by_size.values()):
        raise SystemExit("costs must be of several numbers of rows, found one")

    def cost(sequences: int, rows: int) -> float:
        if rows > MOST_STEP_ROWS:
            return 0.0  # a prefill is no matter
        return float(np.interp(sequences, list(by_size), [_on_line(rows, timed) for timed in by_size.values()]))

    return cost


def passes_of(bundle: Path, context_tokens: int, threads: int) -> tuple[Cost, dict[str, Any]]:
    """The seconds of passes that are made by another bundle, for want of costs in a file; and what they are of."""
    seconds = pass_timer(load(bundle, tasks=(GENERATION,), threads=threads, verify=False), GENERATION, context_tokens)

    def cost(sequences: int, rows: int) -> float:
        return seconds(rows) if rows <= MOST_STEP_ROWS else 0.0  # a prefill is no matter

    made_by = {"bundle": bundle.resolve().name, "machine": machine.description()}
    return cost, made_by | {"threads": threads, "context": context_tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    costs_of = parser.add_mutually_exclusive_group(required=True)
    costs_of.add_argument("--rows", type=Path, help="costs by rows, a file of benchmarks.rows")
    costs_of.add_argument("--together", type=Path, help="costs by sequences and rows, a file of benchmarks.together")
    costs_of.add_argument("--passes-of", type=Path, metavar="OTHER", help="make each pass by this bundle, too")
    parser.add_argument("--context", type=int, default=700, help="tokens before each pass of --passes-of")
    parser.add_argument("--threads", type=int, default=machine.cores(), help="of --passes-of")
    parser.add_argument("--pictures", type=int, default=20, help="of each task")
    parser.add_argument("--encoder-ms", type=float, default=250.0)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    if arguments.passes_of:
        cost, costs = passes_of(arguments.passes_of, arguments.context, arguments.threads)
    else:
        costs = json.loads((arguments.rows or arguments.together).read_text())
        passes = costs["rows" if arguments.rows else "passes"]
        cost = cost_of(passes)
    session = load(arguments.bundle, tasks=(GENERATION,), threads=1, verify=False)
    session.executor.rows_in_tiles = "gpu" in costs
    report: dict[str, Any] = {
        "commit": commit(),
        "acceptance_of": f"{arguments.bundle.resolve().name}, {session.executor.name}",
        "costs_of": {name: costs[name] for name in ("bundle", "machine", "threads", "context")},
        "encoder_ms": arguments.encoder_ms,
    }
    with simulated(session, cost, arguments.encoder_ms / 1e3) as clock:
        if not arguments.together:
            found = {1: one_by_one(session, arguments.pictures, clock)}
            report["tasks"] = found[1]
        else:
            sizes = sorted({one["sequences"] for one in passes} - {1})
            found = {size: side_by_side(session, arguments.pictures, clock, size) for size in sizes}
            report["together"] = found
    print("| at a time | task | pictures | differing ids | fewer passes | times as fast, median | least |")
    print("|---|---|---|---|---|---|---|")
    for size, tasks in found.items():
        for task, one in tasks.items():
            cells = (f"{one['fewer_passes']:.2f}x", f"{one['median_speedup']:.2f}x", f"{one['least_speedup']:.2f}x")
            print(f"| {size} | {task} | {one['pictures']} | {one['differing_ids']} | {' | '.join(cells)} |")
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    if any(one["differing_ids"] for tasks in found.values() for one in tasks.values()):
        raise SystemExit("ids differ from those of plain decoding")


if __name__ == "__main__":
    run(main)
