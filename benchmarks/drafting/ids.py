"""Ids of drafted pictures beside those of plain decoding, over many pictures, in as many calls as it takes.

Every picture's codes are made plainly and with 16 rows in every pass, whatever that costs: so ids are compared on every
picture, and passes do not depend on the machine. What is done is written to a file now and then; the next call goes on
behind it.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from healthgpt_edge import Picture, Session

from .jobs import FreeRows, jobs

ROWS = 16
_WRITE_EVERY = 20


@dataclass
class Comparison:
    """Drafted pictures of one task and their plain twins."""

    pictures: int = 0
    differing_ids: int = 0
    tokens: int = 0
    forward_passes: int = 0
    # How many of the pictures had their code at each place of the grid from a draft.
    drafted: list[list[int]] = field(default_factory=list)

    def add(self, made: Picture, plain: Picture, side: int) -> None:
        self.pictures += 1
        self.differing_ids += differing_ids(made, plain)
        self.tokens += len(made.token_ids)
        self.forward_passes += made.forward_passes
        # The last token of a pass is the model's own, the others were drafted; a full grid's end is no code.
        own = np.cumsum(made.tokens_by_pass) - 1
        from_draft = np.ones(len(made.token_ids), np.int64)
        from_draft[own] = 0
        grid = from_draft[: side * side].reshape(side, side)
        self.drafted = (grid + np.array(self.drafted) if self.drafted else grid).tolist()

    def to_json(self) -> dict[str, Any]:
        return {
            "pictures": self.pictures,
            "differing_ids": self.differing_ids,
            "forward_passes": self.forward_passes / self.pictures,
            # Plain decoding takes one for each code, the prefill among them.
            "fewer_passes": (self.tokens - self.pictures) / self.forward_passes,
            "accepted_per_pass": self.tokens / self.forward_passes,
            "drafted_by_place": np.round(np.array(self.drafted) / self.pictures, 3).tolist(),
        }


def differing_ids(made: Picture, plain: Picture) -> int:
    pairs = zip(made.token_ids, plain.token_ids, strict=False)
    return sum(ours != theirs for ours, theirs in pairs) + abs(len(made.token_ids) - len(plain.token_ids))


def compare(session: Session, count: int, file: Path, minutes: float) -> bool:
    """Go on comparing `count` pictures of each task for some minutes; whether all are done. `file` is the state.

    Raises SystemExit if the state is that of another count, which orders the pictures differently.
    """
    codes = session.bundle.manifest.codes
    assert codes is not None
    state: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"count": count, "done": 0, "tasks": {}}
    if state["count"] != count:
        raise SystemExit(f"{file.name} compares {state['count']} pictures of each task, got --pictures {count}")
    tasks = {task: Comparison(**one) for task, one in state["tasks"].items()}
    blank = np.zeros((1, 1, 3), np.uint8)
    session.executor.picture = lambda grid: blank  # ids are compared, not pixels
    session.drafts.costs = defaultdict(lambda: FreeRows(ROWS))
    until, done = time.monotonic() + 60 * minutes, state["done"]

    def write() -> None:
        state.update(done=done, tasks={task: vars(one) for task, one in tasks.items()})
        unfinished = file.with_suffix(".writing")
        unfinished.write_text(json.dumps(state) + "\n")
        unfinished.replace(file)

    for number, job in enumerate(jobs(count)):
        if number < state["done"]:
            continue
        if time.monotonic() > until:
            write()
            return False
        made, plain = (
            session.generate(job.image, job.words, sampling=job.sampling, draft=draft) for draft in ("auto", "none")
        )
        tasks.setdefault(job.task, Comparison()).add(made, plain, codes.grid)
        done = number + 1
        if done % _WRITE_EVERY == 0:
            write()
            print(f"{file.name}: {done} pictures", file=sys.stderr, flush=True)
    write()
    return True


def read(file: Path) -> dict[str, Comparison]:
    """What `compare` wrote, by task; nothing if there is no such file."""
    if not file.is_file():
        return {}
    return {task: Comparison(**one) for task, one in json.loads(file.read_text())["tasks"].items()}
