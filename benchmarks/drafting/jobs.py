"""The pictures that the drafting benchmarks generate, and the costs of a machine on which rows are free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from healthgpt_edge import Sampling
from healthgpt_edge.drafting.costs import RowCosts
from healthgpt_edge.phantoms import MODALITIES, drawings, held_out, tasks


@dataclass(frozen=True)
class Job:
    """One picture to make; `ways` are kinds of draft to compare beside auto."""

    task: str
    image: np.ndarray | None
    words: str
    ways: tuple[str, ...] = ("input", "jacobi")
    sampling: Sampling | None = None


class FreeRows(RowCosts):
    """Costs of a machine where a pass takes the same time for up to `rows`, and where more are not to be had."""

    plain = 1.0

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._rows = rows

    @property
    def most(self) -> int:
        return self._rows // 2  # a pass may have twice as many

    def known(self, rows: int) -> float | None:
        return 1.0

    def line(self) -> tuple[float, float]:
        return 1.0, 0.0


def jobs(count: int) -> Iterator[Job]:
    """`count` pictures of each task, all different: phantoms that training never saw, and words that describe them.

    Greedy pictures from equal words would be equal, so a number that says nothing follows the words.
    """
    made: dict[str, int] = {}
    for number, phantom in enumerate(held_out(count)):
        for task in tasks(phantom):
            found = [Job(task.kind, task.picture, task.instruction)]
            if task.kind == "reconstruct":
                sampling = Sampling(temperature=1.0, seed=number)
                found.append(Job("reconstruct, sampled", task.picture, task.instruction, sampling=sampling))
            for job in found:
                made[job.task] = made.get(job.task, 0) + 1
                if made[job.task] <= count:
                    yield job
        words = drawings(phantom)[number % len(MODALITIES)].instruction
        for task, sampling in (("from words", None), ("from words, sampled", Sampling(temperature=1.0, seed=number))):
            yield Job(task, None, f"{words} {number}", ways=("jacobi",), sampling=sampling)
