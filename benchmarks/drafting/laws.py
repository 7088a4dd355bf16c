"""Simulate --draft auto on another machine, or with a larger model: real pictures, timed by a clock of given costs.

    python -m benchmarks.drafting.laws BUNDLE --rows FILE [--pictures 20] [--encoder-ms 250] [--out FILE]

Acceptance is that of the trained phantom BUNDLE; a pass takes the milliseconds that FILE, of benchmarks.rows, says of
so many rows, and the VQGAN's encoder --encoder-ms, assumed: a second at M3's size, and a phantom has a quarter of its
codes. Nothing is timed, so the figures are the same on every machine. Ids are compared with plain decoding; one that
differs ends the run with code 1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from healthgpt_edge import Picture, Session, decoding, load, steps
from healthgpt_edge.drafting import drafts
from healthgpt_edge.manifest import GENERATION

from ..commit import commit
from .ids import differing_ids
from .jobs import Job, jobs


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


def simulate(session: Session, count: int, pass_seconds: Callable[[int], float], encoder_seconds: float) -> dict:
    """Times as fast, times fewer passes and differing ids of `count` pictures of each task, by task."""
    clock, executor = Clock(), session.executor
    blank, context_of = np.zeros((1, 1, 3), np.uint8), executor.context
    executor.picture = lambda grid: blank
    executor.draft = clock.around(executor.draft, lambda pixels: encoder_seconds)

    def context(*arguments: Any) -> Any:
        made = context_of(*arguments)
        made.forward = clock.around(made.forward, lambda ids, *rest: pass_seconds(len(ids)))
        return made

    executor.context = context

    def make(job: Job, draft: str) -> tuple[Picture, float]:
        begin = clock.now
        picture = session.generate(job.image, job.words, sampling=job.sampling, draft=draft)
        return picture, clock.now - begin

    found: dict[str, list[tuple[float, ...]]] = {}
    with patch.object(decoding, "time", clock), patch.object(steps, "time", clock), patch.object(drafts, "time", clock):
        for job in jobs(count):
            (made, seconds), (plain, plain_seconds) = make(job, "auto"), make(job, "none")
            one = (plain_seconds / seconds, plain.forward_passes, made.forward_passes, differing_ids(made, plain))
            found.setdefault(job.task, []).append(one)
    return {
        task: {
            "pictures": len(ones),
            "differing_ids": int(sum(one[3] for one in ones)),
            "fewer_passes": sum(one[1] for one in ones) / sum(one[2] for one in ones),
            "median_speedup": float(np.median([one[0] for one in ones])),
            "least_speedup": min(one[0] for one in ones),
        }
        for task, ones in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rows", type=Path, required=True, help="costs by rows, a file of benchmarks.rows")
    parser.add_argument("--pictures", type=int, default=20, help="of each task")
    parser.add_argument("--encoder-ms", type=float, default=250.0)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    costs = json.loads(arguments.rows.read_text())
    sizes, medians_ms = [row["rows"] for row in costs["rows"]], [row["p50_ms"] for row in costs["rows"]]
    session = load(arguments.bundle, tasks=(GENERATION,), threads=1, verify=False)
    session.executor.rows_in_tiles = "gpu" in costs

    def pass_seconds(rows: int) -> float:
        return float(np.interp(rows, sizes, medians_ms)) / 1e3 if rows <= sizes[-1] else 0.0  # a prefill is no matter

    found = simulate(session, arguments.pictures, pass_seconds, arguments.encoder_ms / 1e3)
    print(
        "| task | pictures | differing ids | fewer passes | times as fast, median | least |\n|---|---|---|---|---|---|"
    )
    for task, one in found.items():
        cells = (f"{one['fewer_passes']:.2f}x", f"{one['median_speedup']:.2f}x", f"{one['least_speedup']:.2f}x")
        print(f"| {task} | {one['pictures']} | {one['differing_ids']} | {' | '.join(cells)} |")
    if arguments.out:
        report = {
            "commit": commit(),
            "acceptance_of": f"{arguments.bundle.resolve().name}, {session.executor.name}",
            "costs_of": {name: costs[name] for name in ("bundle", "machine", "threads", "context")},
            "encoder_ms": arguments.encoder_ms,
            "tasks": found,
        }
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    if any(one["differing_ids"] for one in found.values()):
        raise SystemExit("ids differ from those of plain decoding")


if __name__ == "__main__":
    main()
