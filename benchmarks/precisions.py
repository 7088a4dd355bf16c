"""What each precision costs in accuracy: the phantom exported and evaluated at every one, as a Markdown table.

    python -m benchmarks.precisions WORK_DIR [--answers 100] [--pictures 40] [--out results.json]

Pictures differ far more from each other than from precision to precision, so PSNR is compared picture by picture with
float32's: the mean difference and its standard error. Finer still is how far the model's idea of the next code is from
float32's when both follow float32's codes: the Kullback-Leibler divergence, in nats per code, without a picture's luck.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from healthgpt_edge import load, machine, phantoms
from healthgpt_edge.evaluate import evaluate
from healthgpt_edge.export.bundle import export_bundle
from healthgpt_edge.export.checkpoint import Checkpoint
from healthgpt_edge.export.phantom.release import released_files
from healthgpt_edge.images import prepare, read_image
from healthgpt_edge.prompt import prompt_ids
from healthgpt_edge.session import GENERATION, Session

PHANTOM = Path(__file__).parents[1] / "phantom"
BLOCK_SIZE = 32  # the phantom is narrow: 128 would be most of a row
CALIBRATED_WITH = 6  # phantoms, a CT and an MR slice of each, behind those that are evaluated
DRAWN_FROM = 200  # the held-out phantoms, of which the first are evaluated
# The first is what the others are compared with.
EXPORTS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp16": {"precision": "fp16"},
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
    with Checkpoint.open(**released_files(PHANTOM)) as checkpoint:
        options = {"precision": precision, "block_size": BLOCK_SIZE, "cache": cache, "pictures": pictures}
        return export_bundle(checkpoint, bundle, **options).total_bytes


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
    patches = range(manifest.language.vocab, manifest.language.vocab + manifest.vision.patches)
    spliced = [token for one in prompt for token in (patches if one < 0 else (one,))]
    context = session.executor.context(GENERATION, session.executor.features(GENERATION, picture))
    logits = context.forward(np.array(spliced + ids[:-1], np.int64), last_positions=len(ids)).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))


def mean_and_error(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), "standard_error": float(values.std(ddof=1) / len(values) ** 0.5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--answers", type=int, default=100, help="held-out phantoms to ask about")
    parser.add_argument("--pictures", type=int, default=40, help="held-out phantoms to draw, at least 2")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "machine": {"processor": machine.description()["processor"], "python": platform.python_version()},
        "versions": {"onnxruntime": onnxruntime.__version__},
        "held_out": {"answers": arguments.answers, "pictures": arguments.pictures},
    }
    tasks = [task for subject in phantoms.held_out(arguments.pictures) for task in phantoms.tasks(subject)]
    kinds = list(phantoms.INSTRUCTIONS)
    of_kind = {kind: [number for number, task in enumerate(tasks) if task.kind == kind] for kind in kinds}
    reference: tuple[np.ndarray, list[list[int]], Session] | None = None
    for name, options in EXPORTS.items():
        bundle = arguments.work / f"phantom-{name.replace(', ', '-').replace(' ', '-')}"
        size = export(bundle, **options)
        session = load(bundle)
        answers = evaluate(session, answer_phantoms=arguments.answers, picture_phantoms=0).to_json()["answers"]
        psnr, ssim, ids = draw(session, tasks)
        reference = reference or (psnr, ids, session)
        divergence = np.empty(len(tasks))
        for number, (task, codes) in enumerate(zip(tasks, reference[1], strict=True)):
            expected, found = (log_shares(one, task, codes) for one in (reference[2], session))
            divergence[number] = (np.exp(expected) * (expected - found)).sum(axis=-1).mean()
        pictures = {
            kind: {
                "psnr": float(psnr[rows].mean()),
                "ssim": float(ssim[rows].mean()),
                "psnr_from_fp32": mean_and_error((psnr - reference[0])[rows]),
                "divergence_from_fp32": mean_and_error(divergence[rows]),
            }
            for kind, rows in of_kind.items()
        }
        results[name] = {"bundle_bytes": size, "answers": answers, "pictures": pictures}
        cells = [f"{one['accuracy']:.1%}" for one in answers.values()]
        for one in pictures.values():
            change, apart = one["psnr_from_fp32"], one["divergence_from_fp32"]
            cells.append(
                f"{one['psnr']:.2f} / {one['ssim']:.3f}, {change['mean']:+.2f} ± {change['standard_error']:.2f} dB, "
                f"{apart['mean']:.4f} nats"
            )
        print(f"| {name} | {size / 1e6:.1f} MB | {' | '.join(cells)} |", flush=True)
    print("columns:", ", ".join(["bytes", *answers, *kinds]))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
