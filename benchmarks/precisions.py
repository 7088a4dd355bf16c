"""What each precision costs in accuracy: the phantom exported and evaluated at every one, as a Markdown table.

python -m benchmarks.precisions WORK_DIR [--answers 100] [--pictures 10] [--out results.json]
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import onnxruntime

from healthgpt_edge import load, machine
from healthgpt_edge.evaluate import evaluate
from healthgpt_edge.export.bundle import export_bundle
from healthgpt_edge.export.checkpoint import Checkpoint
from healthgpt_edge.export.phantom.release import released_files
from healthgpt_edge.manifest import PRECISIONS

PHANTOM = Path(__file__).parents[1] / "phantom"
BLOCK_SIZE = 32  # the phantom is narrow: 128 would be most of a row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--answers", type=int, default=100, help="held-out phantoms to ask about")
    parser.add_argument("--pictures", type=int, default=10, help="held-out phantoms to draw")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, object] = {
        "machine": {"processor": machine.description()["processor"], "python": platform.python_version()},
        "versions": {"onnxruntime": onnxruntime.__version__},
        "held_out": {"answers": arguments.answers, "pictures": arguments.pictures},
    }
    for precision in PRECISIONS:
        bundle = arguments.work / f"phantom-{precision}"
        with Checkpoint.open(**released_files(PHANTOM)) as checkpoint:
            summary = export_bundle(checkpoint, bundle, precision=precision, block_size=BLOCK_SIZE)
        score = evaluate(load(bundle), answer_phantoms=arguments.answers, picture_phantoms=arguments.pictures)
        results[precision] = {"bundle_bytes": summary.total_bytes, **score.to_json()}
        answers = " | ".join(f"{one.accuracy:.1%}" for one in score.answers.values())
        pictures = " | ".join(f"{one.psnr:.2f} / {one.ssim:.3f}" for one in score.pictures.values())
        print(f"| {precision} | {summary.total_bytes / 1e6:.1f} MB | {answers} | {pictures} |", flush=True)
    chance = " | ".join(f"{one.chance:.1%}" for one in score.answers.values())
    baseline = " | ".join(f"{one.baseline_psnr:.2f} / {one.baseline_ssim:.3f}" for one in score.pictures.values())
    print(f"| chance, trivial picture | | {chance} | {baseline} |")
    print("columns:", ", ".join([*score.answers, *score.pictures]))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
