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
from healthgpt_edge.evaluation import Outcome, evaluate, phantom_cases
from healthgpt_edge.manifest import COMPREHENSION

from . import phantom
from .commit import commit

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


def mean_and_error(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), "standard_error": float(values.std(ddof=1) / len(values) ** 0.5)}


def bundle_of(work: Path, name: str) -> Path:
    return work / f"phantom-{name.replace(', ', '-').replace(' ', '-')}"


def measure(name: str, work: Path, answers: int, pictures: int) -> dict[str, Any]:
    """Export a row's bundle in place of an older one, and evaluate it."""
    bundle, reference = bundle_of(work, name), bundle_of(work, REFERENCE)
    shutil.rmtree(bundle, ignore_errors=True)
    size = export(bundle, **EXPORTS[name])
    if not reference.is_dir():
        raise SystemExit(f"measure the row {REFERENCE} first, in the same WORK_DIR")
    session = load(bundle)
    answered = evaluate(session, phantom_cases(session.bundle.manifest, answers, 0)).means(COMPREHENSION)
    drawn = evaluate(session, phantom_cases(session.bundle.manifest, 0, pictures), against=load(reference))
    return {"bundle_bytes": size, "answers": answered, "pictures": compared(drawn.outcomes)}


def compared(outcomes: list[Outcome]) -> dict[str, Any]:
    """By kind of picture: PSNR, SSIM, and how far from float32's."""
    kinds = {}
    for kind in phantoms.INSTRUCTIONS:
        some = [outcome.scores for outcome in outcomes if outcome.case.kind == kind]
        psnr, ssim, reference, nats = (
            np.array([scores[name] for scores in some]) for name in ("psnr", "ssim", "reference_psnr", "divergence")
        )
        kinds[kind] = {
            "psnr": float(psnr.mean()),
            "ssim": float(ssim.mean()),
            "psnr_from_fp32": mean_and_error(psnr - reference),
            "divergence_from_fp32": mean_and_error(nats),
        }
    return kinds


def table_row(name: str, result: dict[str, Any]) -> str:
    cells = [name, f"{result['bundle_bytes'] / 1e6:.1f} MB"]
    cells += [f"{one['exact']:.1%}" for one in result["answers"].values()]
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
    for name in arguments.row or EXPORTS:
        results[name] = {"commit": commit()}
        results[name] |= measure(name, arguments.work, arguments.answers, arguments.pictures)
        print(table_row(name, results[name]), flush=True)
    print("columns:", ", ".join(["bytes", *phantoms.QUESTIONS, *phantoms.INSTRUCTIONS]))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        rows = {name: results[name] for name in EXPORTS if name in results}
        arguments.out.write_text(json.dumps(settings | rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
