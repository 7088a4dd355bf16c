"""`healthgpt-edge demo`: export the phantom, ask it, draw with it, and hold every id to the PyTorch reference.

Inputs are held-out phantoms, where the right answer is known, and real DICOM files that come inside PyPI packages,
where it is not: the phantom model has never seen a patient, and its words about one mean nothing.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from textwrap import wrap
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pydicom.data import get_testdata_file
from rich.console import Console
from rich.table import Table

from healthgpt_edge import Answer, Session, load, phantoms
from healthgpt_edge.errors import HealthGPTError
from healthgpt_edge.evaluation.scores import is_right
from healthgpt_edge.images import prepare, read_image, write_image
from healthgpt_edge.prompt import prompt_ids

from .bundle import export_bundle
from .checkpoint import Checkpoint
from .phantom.release import released_files
from .reference.model import HealthGPT

PHANTOM = Path(__file__).resolve().parents[1] / "phantom"
PRECISIONS = ("fp32", "int4")
STAGES = ("vision", "prefill", "decode", "codes", "total")
HELD_OUT = 2
DICOM_FILES = ("CT_small.dcm", "MR_small.dcm", "RG1_UNCR.dcm")
QUESTIONS = tuple(phantoms.QUESTIONS.values())[:3]
TILE, MARGIN, LINE, COLUMNS = 128, 8, 14, 3
LETTERS = 26  # of a line beside a tile


@dataclass(frozen=True, slots=True)
class Job:
    """A picture, or none, with a question or instruction; `expected` is the right answer where there is one."""

    name: str
    picture: Any
    words: str
    generates: bool
    expected: str | None = None
    drawing: phantoms.Drawing | None = None  # what the words of a job without a picture ask for


@dataclass(frozen=True, slots=True)
class Row:
    """What one job gave at one precision, and how the reference compares."""

    name: str
    precision: str
    words: str
    generates: bool
    answer: str
    ids_equal_reference: bool
    timings_ms: dict[str, float]
    reference_ms: float
    tokens: int


@dataclass(slots=True)
class Result:
    """All rows, and where the files are."""

    sheet: Path
    rows: list[Row] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"contact_sheet": str(self.sheet), "rows": [asdict(row) for row in self.rows]}

    def print_tables(self, console: Console) -> None:
        said = Table("picture", "question or instruction", *PRECISIONS, title="what the phantom model says")
        for index in range(0, len(self.rows), len(PRECISIONS)):
            rows = self.rows[index : index + len(PRECISIONS)]
            said.add_row(rows[0].name, rows[0].words, *(row.answer for row in rows))
        console.print(said)
        table = Table("medians, ms", *STAGES, "per token", "PyTorch", "ids = PyTorch", title="latency")
        for precision in PRECISIONS:
            for kind, generates in (("answer", False), ("picture", True)):
                rows = [row for row in self.rows if row.precision == precision and row.generates == generates]
                stages = [f"{median(row.timings_ms[stage] for row in rows):.1f}" for stage in STAGES]
                per_token = median(row.timings_ms["decode"] / max(1, row.tokens - 1) for row in rows)
                reference = median(row.reference_ms for row in rows)
                equal = f"{sum(row.ids_equal_reference for row in rows)} of {len(rows)}"
                table.add_row(f"{kind} {precision}", *stages, f"{per_token:.2f}", f"{reference:.0f}", equal)
        console.print(table)
        console.print(
            "total: from the file to the text or the pixels. PyTorch: the reference in float32, without codes."
        )
        console.print(f"contact sheet: {self.sheet}")


def run(out: Path, on_step: Callable[[int, int], None] = lambda done, total: None) -> Result:
    """Run the demo into the directory `out`; raises HealthGPTError, also where fp32 ids leave the reference.

    `on_step(done, total)` reports progress in jobs.
    """
    if not PHANTOM.is_dir():
        raise HealthGPTError(
            "the demo needs the phantom checkpoint of a source checkout, found none beside the package"
        )
    out.mkdir(parents=True, exist_ok=True)
    result = Result(out / "contact-sheet.png")
    jobs = list_jobs()
    shown: list[tuple[Job, str, np.ndarray | None]] = []
    with Checkpoint.open(**released_files(PHANTOM)) as checkpoint:
        sessions = {precision: _export(checkpoint, out, precision) for precision in PRECISIONS}
        references = {task: HealthGPT.load(checkpoint, task) for task in checkpoint.tasks}
        for index, job in enumerate(jobs):
            on_step(index, len(jobs))
            expected_ids, reference_ms = _reference(references, sessions["fp32"], job)
            for precision, session in sessions.items():
                row, made = _run(session, job, precision, expected_ids, reference_ms)
                result.rows.append(row)
                if precision == "fp32":
                    shown.append((job, row.answer, made))
    write_image(result.sheet, contact_sheet(shown))
    if wrong := [row.name for row in result.rows if row.precision == "fp32" and not row.ids_equal_reference]:
        raise HealthGPTError(f"fp32 token ids must equal the PyTorch reference, they differ for {', '.join(wrong)}")
    return result


def list_jobs() -> list[Job]:
    """Questions and instructions for held-out phantoms and for DICOM files."""
    jobs: list[Job] = []
    for subject in phantoms.held_out(HELD_OUT):
        for question in phantoms.questions(subject):
            modality = "CT" if question.picture is subject.ct else "MR"
            name = f"phantom {subject.seed} {modality}"
            jobs.append(Job(name, question.picture, question.text, False, question.answer))
        for task in phantoms.tasks(subject):
            jobs.append(Job(f"phantom {subject.seed} {task.kind}", task.picture, task.instruction, True))
    for modality in phantoms.MODALITIES:
        drawing = phantoms.Drawing(modality, ())
        jobs.append(Job(f"{modality} from words", None, drawing.instruction, True, drawing=drawing))
    for file in DICOM_FILES:
        path = get_testdata_file(file, download=False)
        if path is None:
            raise HealthGPTError(
                f"the demo needs {file} of pydicom and pydicom-data: pip install 'healthgpt-edge[test]'"
            )
        jobs += [Job(file, Path(path), question, False) for question in QUESTIONS]
        jobs.append(Job(file, Path(path), phantoms.INSTRUCTIONS["reconstruct"], True))
    return jobs


def _export(checkpoint: Checkpoint, out: Path, precision: str) -> Session:
    bundle = out / f"phantom-{precision}"
    if bundle.exists():
        shutil.rmtree(bundle)
    export_bundle(checkpoint, bundle, precision=precision, block_size=32)
    return load(bundle)


def _run(
    session: Session, job: Job, precision: str, expected_ids: list[int], reference_ms: float
) -> tuple[Row, np.ndarray | None]:
    made = None
    if job.generates:
        picture = session.generate(job.picture, job.words)
        ids, answer, timings, made = picture.codes, "(picture)", picture.timings_ms, picture.pixels
        if job.drawing:  # the model judges what it drew itself
            asked = job.drawing.questions(picture.pixels)
            answer = ", ".join(_judged(_ask(session, one.picture, one.text).text, one.answer) for one in asked)
    else:
        said = _ask(session, job.picture, job.words)
        ids, answer, timings = said.token_ids, said.text, said.timings_ms
        if job.expected is not None:
            answer = _judged(answer, job.expected)
    row = Row(
        job.name, precision, job.words, job.generates, answer, ids == expected_ids, timings, reference_ms, len(ids)
    )
    return row, made


def _ask(session: Session, picture: Any, question: str) -> Answer:
    return session.answer(picture, question, max_new_tokens=phantoms.MAX_ANSWER_TOKENS)


def _judged(answer: str, expected: str) -> str:
    return answer + (" (right)" if is_right(answer, expected) else f" (is: {expected})")


def _reference(references: dict[str, HealthGPT], session: Session, job: Job) -> tuple[list[int], float]:
    """The ids of the PyTorch model in float32 (codes for pictures), and its milliseconds, codes to pixels left out."""
    model = references["generation" if job.generates else "comprehension"]
    manifest = session.bundle.manifest
    shown = job.picture is not None
    ids = prompt_ids(session.tokenizer, manifest.template, job.words, shown, job.generates)
    vision = manifest.vision
    pixels = prepare(read_image(job.picture), vision.image_size, vision.background) if shown else None
    begin = time.perf_counter()
    values = model.vision_tower.normalise(torch.from_numpy(pixels)[None]) if pixels is not None else None
    if job.generates and manifest.codes:
        new_ids = model.generate(ids, values, manifest.codes.grid**2)
        new_ids = [token_id - manifest.codes.first for token_id in new_ids]
    else:
        new_ids = model.generate(ids, values, phantoms.MAX_ANSWER_TOKENS)
    return new_ids, (time.perf_counter() - begin) * 1e3


def contact_sheet(shown: list[tuple[Job, str, np.ndarray | None]]) -> np.ndarray:
    """What was asked and made of each picture on one page, uint8 [H, W, 3].

    shown: jobs with the answer in words or the picture made. Answers about one picture stand in one cell; a picture
    drawn from words stands beside these and what the model says of it.
    """
    cells: list[tuple[Job, list[str], np.ndarray | None]] = []
    for job, answer, made in shown:
        if made is None and cells and cells[-1][2] is None and cells[-1][0].name == job.name:
            cells[-1][1].extend((job.words, f"  {answer}"))
        elif job.picture is None:
            cells.append((job, [*wrap(job.words, LETTERS), "", *answer.split(", ")], made))
        else:
            cells.append((job, [job.words, f"  {answer}"] if made is None else [], made))
    width, height = 2 * TILE + 4 * MARGIN, TILE + LINE + 2 * MARGIN
    lines = -(-len(cells) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * width + MARGIN, lines * height + MARGIN), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(10)
    for index, (job, words, made) in enumerate(cells):
        left, top = MARGIN + index % COLUMNS * width, MARGIN + index // COLUMNS * height
        shown_at_left = read_image(made if job.picture is None else job.picture)
        page.paste(Image.fromarray(prepare(shown_at_left, TILE)), (left, top))
        if words:
            draw.multiline_text((left + TILE + MARGIN, top), "\n".join(words), fill="black", font=font, spacing=3)
        elif made is not None:
            page.paste(Image.fromarray(made).resize((TILE, TILE), Image.Resampling.BICUBIC), (left + TILE, top))
        caption = job.name if words else f"{job.name}: {job.words}"
        draw.text((left, top + TILE + 2), caption, fill="black", font=font)
    return np.asarray(page)
