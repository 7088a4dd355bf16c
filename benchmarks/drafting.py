"""What drafting gives on the trained phantom: passes, acceptance and time beside plain decoding, and equal ids.

    python -m benchmarks.drafting WORK_DIR [--pictures 500] [--compared 50] [--questions 100] [--threads 1] [--out DIR]

The codes of every picture are made plainly and with 16 rows in every pass, whatever that costs: so ids are compared
on every picture, and passes do not depend on the machine. Those of the first --compared of each task are also made with
64 rows, as --draft auto makes them here, and from one kind of draft alone; these whole pictures are timed, in turn, so
that all share what else the machine does. One id that differs ends the run with code 1.
Writes drafting.json, .md and .png (acceptance by the place on the grid); figures of one
precision replace those that are there. WORK_DIR keeps the exported bundles.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from healthgpt_edge import Picture, Sampling, Session, load, machine
from healthgpt_edge.drafting.costs import RowCosts
from healthgpt_edge.export.bundle import export_bundle
from healthgpt_edge.export.checkpoint import Checkpoint
from healthgpt_edge.export.phantom.release import released_files
from healthgpt_edge.phantoms import INSTRUCTIONS, held_out, questions, tasks
from healthgpt_edge.session import COMPREHENSION, GENERATION

from .drafting_report import differing_ids, markdown, plot

PHANTOM = Path(__file__).parents[1] / "phantom"
BLOCK_SIZE = 32  # the phantom is narrow: 128 would be most of a row
PRECISIONS = ("fp32", "int4")
PLAIN, AUTO = "none", "auto"
# auto as on a machine where rows cost nothing, up to so many.
EVERY, WIDEST = "auto, 16 free rows", "auto, 64 free rows"
PREFIX_CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class Job:
    """One picture to make; `ways` are kinds of draft to compare beside auto."""

    task: str
    image: np.ndarray | None
    words: str
    ways: tuple[str, ...] = ("input", "jacobi")
    sampling: Sampling | None = None


@dataclass
class Tally:
    """Pictures of one task made one way, and the plain ones made in turn with them."""

    passes: list[int] = field(default_factory=list)
    decode_ms: list[float] = field(default_factory=list)
    total_ms: list[float] = field(default_factory=list)
    plain_decode_ms: list[float] = field(default_factory=list)
    plain_total_ms: list[float] = field(default_factory=list)
    tokens: int = 0
    differing_ids: int = 0
    # How often the code at each place of the grid came from a draft.
    drafted: np.ndarray | None = None

    def add(self, made: Picture, plain: Picture, side: int, whole: bool) -> None:
        """Take a picture and its plain twin, made of codes if `whole`. Encoding the input is part of decoding here."""
        self.passes.append(made.forward_passes)
        self.tokens += len(made.token_ids)
        pairs = zip(made.token_ids, plain.token_ids, strict=False)
        self.differing_ids += sum(ours != theirs for ours, theirs in pairs)
        self.differing_ids += abs(len(made.token_ids) - len(plain.token_ids))
        for stages, decode, total in (
            (made.timings_ms, self.decode_ms, self.total_ms),
            (plain.timings_ms, self.plain_decode_ms, self.plain_total_ms),
        ):
            decode.append(stages["draft"] + stages["decode"])
            if whole:
                total.append(stages["total"])
        # The last token of a pass is the model's own, the others were drafted; a full grid's end is no code.
        own = np.cumsum(made.tokens_by_pass) - 1
        from_draft = np.ones(len(made.token_ids), np.int64)
        from_draft[own] = 0
        grid = from_draft[: side * side].reshape(side, side)
        self.drafted = grid if self.drafted is None else self.drafted + grid

    def to_json(self) -> dict[str, Any]:
        count = len(self.passes)
        plain_passes = self.tokens - count  # one for each code, the prefill's among them
        assert self.drafted is not None
        return {
            "pictures": count,
            "differing_ids": self.differing_ids,
            "forward_passes": float(np.mean(self.passes)),
            "fewer_passes": plain_passes / sum(self.passes),
            "accepted_per_pass": self.tokens / sum(self.passes),
            "decode_ms": float(np.median(self.decode_ms)),
            "plain_decode_ms": float(np.median(self.plain_decode_ms)),
            "decode_speedup": _speedup(self.plain_decode_ms, self.decode_ms),
            "total_ms": float(np.median(self.total_ms)),
            "plain_total_ms": float(np.median(self.plain_total_ms)),
            "total_speedup": _speedup(self.plain_total_ms, self.total_ms),
            "drafted_by_place": np.round(self.drafted / count, 3).tolist(),
        }


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
    """`count` pictures of each task, all different: phantoms that training never saw, and words that say nothing."""
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
        words = list(INSTRUCTIONS.values())[number % len(INSTRUCTIONS)]
        yield Job("from words", None, f"{words} {number}", ways=("jacobi",))


def draw(session: Session, count: int, compared: int) -> Iterator[dict[str, dict[str, Tally]]]:
    """Make all pictures; gives the tallies by task and way after each."""
    codes = session.bundle.manifest.codes
    assert codes is not None
    picture, blank = session.executor.picture, np.zeros((1, 1, 3), np.uint8)
    measured, free = session.drafts.costs[GENERATION], {EVERY: FreeRows(16), WIDEST: FreeRows(64)}
    tallies: dict[str, dict[str, Tally]] = {}

    def make(job: Job, draft: str, costs: RowCosts) -> Picture:
        session.drafts.costs[GENERATION] = costs
        return session.generate(job.image, job.words, sampling=job.sampling, draft=draft)

    for number, job in enumerate(jobs(count)):
        if not number:
            make(job, AUTO, measured)  # opens the encoder, compares the rows
        of_task = tallies.setdefault(job.task, {})
        ways = {EVERY: (AUTO, free[EVERY])}
        if len(of_task.get(EVERY, Tally()).passes) < compared:
            ways |= {way: (way, measured) for way in (AUTO, *job.ways)} | {WIDEST: (AUTO, free[WIDEST])}
        whole = len(ways) > 1
        session.executor.picture = picture if whole else lambda grid: blank  # ids are compared, not pixels
        plain = make(job, PLAIN, measured)
        for way, (draft, costs) in ways.items():
            of_task.setdefault(way, Tally()).add(make(job, draft, costs), plain, codes.grid, whole)
        yield tallies


def ask(path: Path, count: int, threads: int) -> dict[str, Any]:
    """Time to the first piece of an answer, of the first question about a picture and of the others; ids compared."""
    options = {"tasks": (COMPREHENSION,), "threads": threads, "verify": False}
    session = load(path, prefix_cache_bytes=PREFIX_CACHE_BYTES, **options)
    without = load(path, **options)
    first_ms: list[float] = []
    later_ms: list[float] = []
    differing = 0
    for phantom in held_out(count):
        for question in questions(phantom):
            moments: list[float] = []
            begin = time.perf_counter()
            answer = session.answer(
                question.picture,
                question.text,
                max_new_tokens=8,
                on_text=lambda piece, moments=moments: moments.append(time.perf_counter()),
            )
            (later_ms if answer.reused_tokens else first_ms).append((moments[0] - begin) * 1e3)
            plain = without.answer(question.picture, question.text, max_new_tokens=8)
            differing += answer.token_ids != plain.token_ids
    return {
        "answers": len(first_ms) + len(later_ms),
        "differing_answers": differing,
        "first_ms": float(np.median(first_ms)),
        "later_ms": float(np.median(later_ms)),
        "share": float(np.median(later_ms) / np.median(first_ms)),
    }


def _speedup(plain: list[float], drafted: list[float]) -> float:
    """The median of ratios of what was timed in turn."""
    return float(np.median(np.array(plain) / np.array(drafted)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="this one; may be repeated")
    parser.add_argument("--pictures", type=int, default=500, help="of each task")
    parser.add_argument("--compared", type=int, default=50, help="of them with every kind of draft")
    parser.add_argument("--questions", type=int, default=100, help="phantoms to ask about")
    parser.add_argument("--threads", type=int, default=1, help="the phantom is so small that a second one mostly waits")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="for drafting.{json,md,png}")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "drafting.json"
    report: dict[str, Any] = {
        "machine": machine.description(),
        "versions": {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__},
        "precisions": {},
    }
    if file.is_file():  # what is measured now replaces what it says of it; the rest stays, if it is of this machine
        kept = json.loads(file.read_text())
        if all(kept.get(name) == report[name] for name in ("machine", "versions")):
            report = kept
    for precision in arguments.precision or PRECISIONS:
        bundle = arguments.work / f"phantom-{precision}"
        if not bundle.exists():
            with Checkpoint.open(**released_files(PHANTOM)) as checkpoint:
                export_bundle(checkpoint, bundle, precision=precision, block_size=BLOCK_SIZE)
        session = load(bundle, tasks=(GENERATION,), threads=arguments.threads, verify=False)
        found = {"executor": session.executor.name, "threads": arguments.threads}
        found["second_question"] = ask(bundle, arguments.questions, arguments.threads)
        for done, tallies in enumerate(draw(session, arguments.pictures, arguments.compared), 1):
            if done % 250 and not all(len(ways[EVERY].passes) == arguments.pictures for ways in tallies.values()):
                continue
            print(f"{precision}: {done}", file=sys.stderr, flush=True)
            found["tasks"] = {task: {way: one.to_json() for way, one in ways.items()} for task, ways in tallies.items()}
            report["precisions"][precision] = found
            file.write_text(json.dumps(report, indent=1) + "\n")
    page = markdown(report)
    (arguments.out / "drafting.md").write_text(page)
    print(page)
    plot(report, arguments.out / "drafting.png")
    if any(differing_ids(found) for found in report["precisions"].values()):
        raise SystemExit("ids differ from those of plain decoding")


if __name__ == "__main__":
    main()
