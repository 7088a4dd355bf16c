"""Measure drafting on the trained phantom: passes, acceptance and time compared with plain decoding, and equal ids.

    python -m benchmarks.drafting WORK_DIR [--pictures 500] [--timed 12] [--questions 40] [--threads 1]
        [--only ids|times] [--minutes N] [--out DIR] [--name drafting]

Two measurements in one command. The long one compares the ids of --pictures of each task (ids.py); it can be split into
calls of --minutes, each resuming where the last one stopped. The short one generates --timed pictures of each task
plainly, with --draft auto, with each kind of draft alone, and with 16 and 64 rows in every pass whatever they cost.
These are timed in turn, so that other load on the machine affects all of them, and their ids are compared, too. A
single differing id makes the exit code 1. Writes NAME.json, .md and .png (acceptance by the place on the grid); figures
of one precision and one run replace those that are there. WORK_DIR keeps the exported bundles and how far the long run
is.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from healthgpt_edge import Picture, Session, load, machine
from healthgpt_edge.drafting.costs import PassKind, RowCosts
from healthgpt_edge.manifest import COMPREHENSION, GENERATION
from healthgpt_edge.phantoms import held_out, questions

from ..commit import commit
from ..phantom import export
from . import ids
from .jobs import FreeRows, Job, jobs
from .report import differing, markdown, plot

PRECISIONS = ("fp32", "int4")
PLAIN, AUTO = "none", "auto"
# auto as on a machine where rows cost nothing, up to so many.
EVERY, WIDEST = "auto, 16 free rows", "auto, 64 free rows"
KEEP_PICTURES_BYTES = 64 << 20


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

    def add(self, made: Picture, plain: Picture) -> None:
        """Take a picture and its plain twin. Encoding the input is part of decoding here."""
        self.passes.append(made.forward_passes)
        self.tokens += len(made.token_ids)
        self.differing_ids += ids.differing_ids(made, plain)
        for stages, decode, total in (
            (made.timings_ms, self.decode_ms, self.total_ms),
            (plain.timings_ms, self.plain_decode_ms, self.plain_total_ms),
        ):
            decode.append(stages["draft"] + stages["decode"])
            total.append(stages["total"])

    def to_json(self) -> dict[str, Any]:
        count = len(self.passes)
        plain_passes = self.tokens - count  # one for each code, the prefill's among them
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
        }


def draw(session: Session, count: int) -> dict[str, dict[str, Tally]]:
    """Make `count` pictures of each task every way, in turn; gives the tallies by task and way."""
    measured = session.drafts.costs
    free = {way: defaultdict(lambda rows=rows: FreeRows(rows)) for way, rows in ((EVERY, 16), (WIDEST, 64))}
    tallies: dict[str, dict[str, Tally]] = {}

    def make(job: Job, draft: str, costs: dict[PassKind, RowCosts]) -> Picture:
        session.drafts.costs = costs
        return session.generate(job.image, job.words, sampling=job.sampling, draft=draft)

    for number, job in enumerate(jobs(count)):
        if not number:
            make(job, AUTO, measured)  # opens the encoder, compares the rows
        ways = {way: (way, measured) for way in (AUTO, *job.ways)} | {way: (AUTO, costs) for way, costs in free.items()}
        plain = make(job, PLAIN, measured)
        for way, (draft, costs) in ways.items():
            tallies.setdefault(job.task, {}).setdefault(way, Tally()).add(make(job, draft, costs), plain)
    return tallies


def ask(path: Path, count: int, threads: int) -> dict[str, Any]:
    """Time to the first piece of an answer, of the first question about a picture and of the others; ids compared."""
    options = {"tasks": (COMPREHENSION,), "threads": threads, "verify": False}
    session = load(path, keep_pictures_bytes=KEEP_PICTURES_BYTES, **options)
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
    parser.add_argument("--pictures", type=int, default=500, help="of each task, to compare ids")
    parser.add_argument("--timed", type=int, default=12, help="pictures of each task, to time")
    parser.add_argument("--questions", type=int, default=40, help="phantoms to ask about")
    parser.add_argument("--threads", type=int, default=1, help="the phantom is so small that a second one mostly waits")
    parser.add_argument("--only", choices=("ids", "times"), help="the long run or the short one")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop comparing ids then")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="for NAME.{json,md,png}")
    parser.add_argument("--name", default="drafting")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"{arguments.name}.json"
    report: dict[str, Any] = {
        "machine": machine.description(),
        "versions": {
            "python": platform.python_version(),
            "onnxruntime": onnxruntime.__version__,
            "kernels": machine.instruction_set() or "none",
        },
        "precisions": {},
    }
    if file.is_file():  # what is measured now replaces what it says of it; the rest stays, if it is of this machine
        kept = json.loads(file.read_text())
        if all(kept.get(name) == report[name] for name in ("machine", "versions")):
            report = kept
    for precision in arguments.precision or PRECISIONS:
        bundle = arguments.work / f"phantom-{precision}"
        if not bundle.exists():
            export(bundle, precision)
        found = report["precisions"].setdefault(precision, {})
        if arguments.only != "ids":
            session = load(bundle, tasks=(GENERATION,), threads=arguments.threads, verify=False)
            found |= {"commit": commit(), "executor": session.executor.name, "threads": arguments.threads}
            found["second_question"] = ask(bundle, arguments.questions, arguments.threads)
            tallies = draw(session, arguments.timed)
            found["tasks"] = {task: {way: one.to_json() for way, one in ways.items()} for task, ways in tallies.items()}
        if arguments.only != "times":
            session = load(bundle, tasks=(GENERATION,), threads=arguments.threads, verify=False)
            state = arguments.work / f"ids-{precision}.json"
            ids.compare(session, arguments.pictures, state, arguments.minutes)
            found["compared_commit"] = commit()
            found["compared"] = {task: one.to_json() for task, one in ids.read(state).items()}
        file.write_text(json.dumps(report, indent=1) + "\n")
    page = markdown(report)
    (arguments.out / f"{arguments.name}.md").write_text(page)
    print(page)
    plot(report, arguments.out / f"{arguments.name}.png")
    if any(differing(found) for found in report["precisions"].values()):
        raise SystemExit("ids differ from those of plain decoding")


if __name__ == "__main__":
    main()
