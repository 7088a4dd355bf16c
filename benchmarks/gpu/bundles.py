"""Whole bundles by ONNX Runtime's CUDA provider: checked, then timed. `benchmarks/gpu.sh --bundles` calls this.

    python -m benchmarks.gpu.bundles WORK --out FILE [--seconds N] [--rehearse LIBRARY]

The trained phantom must give the ids that the CPU's kernels give; it is timed, and so is a full-size M3 with random
weights, by `healthgpt_edge.bench`. Results are written after every bundle. To rehearse, LIBRARY holds the CUDA nodes
for the host's fibers (the target healthgpt_onnxruntime_cuda_host), the phantom is all, and times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # before onnxruntime: it brings the CUDA libraries and cuDNN along  # noqa: F401

from benchmarks import full_size
from healthgpt_edge import bench, load, phantoms
from healthgpt_edge.executors.onnx import DEVICES
from healthgpt_edge.export.bundle import export_bundle
from healthgpt_edge.export.checkpoint import Checkpoint
from healthgpt_edge.export.phantom.release import released_files

PHANTOM = Path(__file__).parents[2] / "phantom"
# A full-size M3 takes so long to write, export and time, in seconds.
FULL_SIZE_SECONDS = 150
ROWS = {"phantom": "vit,pp300,tg64@300,vq,img", "m3": "vit,pp600,tg64@700,vq,img"}
REHEARSED_ROWS = "pp3,tg2@3"


class WrongAnswer(Exception):
    """A bundle gives other ids on the GPU than on the CPU."""


def phantom(work: Path, precision: str, cache: str | None, new_tokens: int) -> Path:
    """The trained phantom, which must give the CPU's ids for every kind of question."""
    bundle = work / f"phantom-{precision}"
    shutil.rmtree(bundle, ignore_errors=True)  # of a run before
    with Checkpoint.open(**released_files(PHANTOM)) as checkpoint:
        export_bundle(checkpoint, bundle, precision=precision, cache=cache, block_size=32)
    sessions = [load(bundle, tasks=("comprehension",), device=device) for device in ("cuda", "cpu")]
    for question in list(phantoms.questions(phantoms.held_out(1)[0]))[: 1 if new_tokens < 8 else None]:
        found, expected = (one.answer(question.picture, question.text, max_new_tokens=new_tokens) for one in sessions)
        if found.token_ids != expected.token_ids:
            raise WrongAnswer(f"the phantom in {precision} must say {expected.token_ids}, said {found.token_ids}")
    return bundle


def full_size_m3(work: Path, precision: str) -> Path:
    checkpoint = work / "m3"
    if not checkpoint.exists():
        subprocess.run([sys.executable, "-m", "benchmarks.random_checkpoint", str(checkpoint)], check=True)
    full_size.export(checkpoint, work / f"m3-{precision}", precision)
    return work / f"m3-{precision}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--rehearse", type=Path, metavar="LIBRARY")
    arguments = parser.parse_args()
    end, work = time.monotonic() + arguments.seconds, arguments.work
    work.mkdir(parents=True, exist_ok=True)
    todo: dict[str, Callable[[], Path]] = {
        "phantom fp16": lambda: phantom(work, "fp16", None, 20),
        "phantom int4, int8 caches": lambda: phantom(work, "int4", "int8", 20),
        "m3 int4": lambda: full_size_m3(work, "int4"),
        "m3 fp16": lambda: full_size_m3(work, "fp16"),
    }
    if arguments.rehearse:
        here = {"provider": "CPUExecutionProvider", "memory": "cpu", "library": arguments.rehearse, "step_tokens": 320}
        DEVICES["cuda"] = DEVICES["cuda"]._replace(**here)
        todo = {"phantom fp16": lambda: phantom(work, "fp16", None, 3)}
    results: dict[str, Any] = {"not_reached": [], "failed": {}}
    if arguments.rehearse:
        results["rehearsal"] = "the host's fibers: the times mean nothing"
    for name, make in todo.items():
        if time.monotonic() + (FULL_SIZE_SECONDS if name.startswith("m3") else 0) > end:
            results["not_reached"].append(name)
            continue
        rows = bench.parse_rows(REHEARSED_ROWS if arguments.rehearse else ROWS[name.split()[0]])
        try:
            results[name] = bench.run(make(), rows, device="cuda", repeat=1 if arguments.rehearse else 5)
            print(name, json.dumps({f"{row['task']} {row['row']}": row["p50_ms"] for row in results[name]["rows"]}))
        except Exception as error:  # the other bundles may still have something to say
            results["failed"][name] = f"{type(error).__name__}: {error}"
            print(f"{name}: {results['failed'][name]}")
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    if results["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
