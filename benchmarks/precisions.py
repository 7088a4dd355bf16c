"""The accuracy of each precision: exports and evaluates the phantom at every one, and prints a Markdown table.

    python -m benchmarks.precisions WORK_DIR [--answers 100] [--pictures 40] [--row NAME]... [--out results.json]

Pictures differ far more from each other than between precisions, so PSNR is compared with float32's picture by picture:
the mean difference and its standard error. More sensitive is the Kullback-Leibler divergence of the next code's
distribution from float32's, in nats per code, when both follow float32's codes: it does not depend on which code is
drawn.

With `--row` only some rows are measured and the others in the file are kept; measure fp32, the reference, first.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from healthgpt_edge import load, machine, phantoms
from healthgpt_edge.evaluate import evaluate
from healthgpt_edge.images import prepare, read_image
from healthgpt_edge.manifest import GENERATION
from healthgpt_edge.prompt import prompt_ids, with_patches
from healthgpt_edge.session import Session

from . import phantom

CALIBRATED_WITH = 6  # phantoms, a CT and an MR slice of each, behind those that are evaluated
DRAWN_FROM = 200  # the held-out phantoms, of which the first are evaluated
REFERENCE = "fp32"  # what the others are compared with
EXPORTS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "bf16"},
    "int8, caches fp16": {"precision": "int8", "cache": "fp16"},
    "int8, caches int8": {"precision": "int8", "cache": "int8"},
    "int4, caches fp16": {"precision": "int4", "cache": "fp16"},
    "int4, caches int8": {"precision": "int4", "cache": "int8"},
    "int4 calibrated, caches fp16": {"precision": "int4", "cache": "fp16", "calibrated": True},
    "int4 calibrated, caches int8": {"precision": "int4", "cache": "int8", "calibrated": True},
}


def export(bundle: Path, precision: str, cache: str | None = None, calibrated: bool = False) -> int:
    """Export the phantom; returns its bytes."""
    spare = phantoms.held_out(DRAWN_FROM)[-CALIBRATED_WITH:] if calibrated else []
    pictures = [picture for subject in spare for picture in (subject.ct, subject.mr)]
    return phantom.export(bundle, precision, cache=cache, pictures=pictures)


def draw(session: Session, tasks: list[phantoms.Task]) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """PSNR, SSIM and token ids of every task's picture."""
    made = [session.generate(task.picture, task.instruction) for task in tasks]
    psnr, ssim = (
        np.array([score(one.pixels, task.target) for one, task in zip(made, tasks, strict=True)])
        for score in (phantoms.psnr, phantoms.ssim)
    )
    return psnr, ssim, [one.token_ids for one in made]


def log_shares(session: Session, task: phantoms.Task, ids: list[int]) -> np.ndarray:
    """The logarithm of the probability of each next code [codes, rows] along the given ones."""
    manifest = session.bundle.manifest
    picture = prepare(read_image(task.picture), manifest.vision.image_size, manifest.vision.background)
    prompt = prompt_ids(session.tokenizer, manifest.template, task.instruction, True, True)
    spliced = with_patches(prompt, manifest.language.vocab, manifest.vision.patches)
    context = session.executor.context(GENERATION, session.executor.features(GENERATION, picture))
    logits = context.forward(np.array([*spliced, *ids[:-1]], np.int64), last_positions=len(ids)).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))


def mean_and_error(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), "standard_error": float(values.std(ddof=1) / len(values) ** 0.5)}


class Comparison:
    """Pictures and codes of float32, and what others make of the same; kept in `work` for calls to come."""

    def __init__(self, work: Path, pictures: int) -> None:
        self.tasks = [task for subject in phantoms.held_out(pictures) for task in phantoms.tasks(subject)]
        self._bundle, self._drawn = bundle_of(work, REFERENCE), work / f"{REFERENCE}-{pictures}.npz"

    def keep(self, psnr: np.ndarray, ids: list[list[int]]) -> None:
        np.savez(self._drawn, psnr=psnr, ids=np.array(ids))

    def pictures(self, session: Session, psnr: np.ndarray, ssim: np.ndarray) -> dict[str, Any]:
        """By kind of picture: PSNR, SSIM, and how far from float32's."""
        if not self._drawn.is_file():
            raise SystemExit(f"measure the row {REFERENCE} of as many pictures first, in the same WORK_DIR")
        with np.load(self._drawn) as kept:
            reference, ids = kept["psnr"], kept["ids"]
        expecting, divergence = load(self._bundle), np.empty(len(self.tasks))
        for number, (task, codes) in enumerate(zip(self.tasks, ids, strict=True)):
            expected, found = (log_shares(one, task, codes.tolist()) for one in (expecting, session))
            divergence[number] = (np.exp(expected) * (expected - found)).sum(axis=-1).mean()
        kinds = {}
        for kind in phantoms.INSTRUCTIONS:
            rows = [number for number, task in enumerate(self.tasks) if task.kind == kind]
            kinds[kind] = {
                "psnr": float(psnr[rows].mean()),
                "ssim": float(ssim[rows].mean()),
                "psnr_from_fp32": mean_and_error((psnr - reference)[rows]),
                "divergence_from_fp32": mean_and_error(divergence[rows]),
            }
        return kinds


def bundle_of(work: Path, name: str) -> Path:
    return work / f"phantom-{name.replace(', ', '-').replace(' ', '-')}"


def measure(name: str, work: Path, comparison: Comparison, answers: int) -> dict[str, Any]:
    """Export a row's bundle in place of an older one, and evaluate it."""
    bundle = bundle_of(work, name)
    shutil.rmtree(bundle, ignore_errors=True)
    size = export(bundle, **EXPORTS[name])
    session = load(bundle)
    answered = evaluate(session, answer_phantoms=answers, picture_phantoms=0).to_json()["answers"]
    psnr, ssim, ids = draw(session, comparison.tasks)
    if name == REFERENCE:
        comparison.keep(psnr, ids)
    return {"bundle_bytes": size, "answers": answered, "pictures": comparison.pictures(session, psnr, ssim)}


def table_row(name: str, result: dict[str, Any]) -> str:
    cells = [name, f"{result['bundle_bytes'] / 1e6:.1f} MB"]
    cells += [f"{one['accuracy']:.1%}" for one in result["answers"].values()]
    for one in result["pictures"].values():
        change, apart = one["psnr_from_fp32"], one["divergence_from_fp32"]
        cells.append(
            f"{one['psnr']:.2f} / {one['ssim']:.3f}, {change['mean']:+.2f} ± {change['standard_error']:.2f} dB, "
            f"{apart['mean']:.4f} nats"
        )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--answers", type=int, default=100, help="held-out phantoms to ask about")
    parser.add_argument("--pictures", type=int, default=40, help="held-out phantoms to draw, at least 2")
    parser.add_argument("--row", action="append", choices=EXPORTS, help="measure this one; may be repeated")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "machine": {"processor": machine.description()["processor"], "python": platform.python_version()},
        "versions": {"onnxruntime": onnxruntime.__version__},
        "held_out": {"answers": arguments.answers, "pictures": arguments.pictures},
    }
    results: dict[str, Any] = {}
    if arguments.row and arguments.out and arguments.out.is_file():
        results = json.loads(arguments.out.read_text())
        if any(results[name] != setting for name, setting in settings.items()):
            raise SystemExit(f"{arguments.out} was measured with other settings: measure all rows")
    comparison = Comparison(arguments.work, arguments.pictures)
    for name in arguments.row or EXPORTS:
        results[name] = measure(name, arguments.work, comparison, arguments.answers)
        print(table_row(name, results[name]), flush=True)
    print("columns:", ", ".join(["bytes", *phantoms.QUESTIONS, *phantoms.INSTRUCTIONS]))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        rows = {name: results[name] for name in EXPORTS if name in results}
        arguments.out.write_text(json.dumps(settings | rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
