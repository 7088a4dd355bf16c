"""Check and then time whole bundles with ONNX Runtime's CUDA provider. `benchmarks/gpu.sh` calls this.

    python -m benchmarks.gpu.bundles WORK --export [--rehearse LIBRARY]
    python -m benchmarks.gpu.bundles WORK --out FILE [--seconds N] [--rehearse LIBRARY]

The first command writes the bundles, without a GPU. The second checks and times them: the trained phantom must give the
same ids as on the CPU, and requests done together those of requests done alone; a full-size M3 with random weights must
pass the checks of `healthgpt_edge.bench`. Then passes of several rows and over several sequences are timed. Results are
written after every bundle, M3's cost of rows also to FILE's name with -rows, for `benchmarks.drafting.laws`. With
--rehearse, LIBRARY is the host build of the CUDA nodes (the target healthgpt_onnxruntime_cuda_host); it runs only a
phantom, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch  # before onnxruntime, because it loads the CUDA libraries and cuDNN

from benchmarks import full_size, phantom, together
from benchmarks import rows as by_rows
from benchmarks.commit import commit
from benchmarks.systems import SYSTEMS
from healthgpt_edge import bench, load, machine, phantoms
from healthgpt_edge.executors.onnx import DEVICES
from healthgpt_edge.export.bundle import export_bundle
from healthgpt_edge.export.checkpoint import Checkpoint
from healthgpt_edge.session import Session

NEW_TOKENS = 20
REHEARSED_TOKENS = 3
ROWS = {"phantom": "vit,pp300,tg64@300,vq,img", "m3": "vit,pp600,tg64@700,vq,img"}
REHEARSED_ROWS = "pp3,tg2@3"
# Sequences of a pass, rows of each, and passes of each size.
TOGETHER, ROWS_OF_EACH, PASSES = [1, 2, 4, 8], (1, 2, 4), 20
REHEARSED_TOGETHER = [1, 2]


class WrongAnswer(Exception):
    """A bundle gives different ids on the GPU and on the CPU, or done together and alone."""


class Case(NamedTuple):
    """A bundle: its model, its precision, its caches, and the seconds that checking and timing it take."""

    model: str
    precision: str
    cache: str | None
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.model}-{self.precision}"

    def export(self, work: Path) -> None:
        bundle = work / self.name
        shutil.rmtree(bundle, ignore_errors=True)  # from an earlier run
        if self.model == "phantom":
            phantom.export(bundle, self.precision, cache=self.cache)
            return
        with Checkpoint.open(**full_size.released(work / "m3", SYSTEMS["m3"])) as checkpoint:
            export_bundle(checkpoint, bundle, precision=self.precision, cache=self.cache)


CASES = [
    Case("phantom", "fp16", None, 20),
    Case("phantom", "fp32", None, 20),
    Case("phantom", "bf16", None, 20),
    Case("phantom", "int4", "int8", 20),
    Case("m3", "int4", None, 60),
]


def check_phantom(bundle: Path, new_tokens: int) -> None:
    """Check that the trained phantom gives the CPU's ids for every kind of question, and done together its own."""
    # On the CPU by the standard bodies: our CPU kernels quantise activations to 8 bits, the CUDA kernels do not.
    sessions = [
        load(bundle, device="cuda"),
        load(bundle, tasks=("comprehension",), device="cpu", kernels=False),
    ]
    for question in list(phantoms.questions(phantoms.held_out(1)[0]))[: 1 if new_tokens < 8 else None]:
        found, expected = (one.answer(question.picture, question.text, max_new_tokens=new_tokens) for one in sessions)
        if found.token_ids != expected.token_ids:
            raise WrongAnswer(f"the phantom must say {expected.token_ids}, said {found.token_ids}: {bundle.name}")
    check_together(sessions[0], new_tokens)


def check_together(session: Session, new_tokens: int) -> None:
    """Check that the trained phantom's answers, and its pictures, are the same where they are done together."""
    (subject,), together, alone = phantoms.held_out(1), session.together(3), []
    asked = [(question.picture, question.text) for question in phantoms.questions(subject)]
    if new_tokens < 8:  # a rehearsal, in which a picture takes long
        asked = [(None, words) for _, words in asked[:2]]
    for picture, words in asked:
        together.answer(len(alone), picture, words, max_new_tokens=new_tokens)
        alone.append(session.answer(picture, words, max_new_tokens=new_tokens, draft="none"))
    for drawing in phantoms.drawings(subject) if new_tokens >= 8 else []:
        together.generate(len(alone), None, drawing.instruction)
        alone.append(session.generate(None, drawing.instruction, draft="none"))
    for place, made, error in together:
        if error is not None:
            raise error
        if made.token_ids != alone[place].token_ids:
            raise WrongAnswer(f"alone it gives {alone[place].token_ids}, together with others {made.token_ids}")


def time_passes(bundle: Path, context_tokens: int, sizes: list[int], passes: int) -> dict[str, Any]:
    """Passes of several rows, and over several sequences, with both tasks loaded, and what these take of the GPU."""
    task, free = "generation", free_bytes()
    session = load(bundle, device="cuda", verify=False)
    found: dict[str, Any] = {"gpu_bytes_after_load": free - free_bytes(), "together": []}
    group = session.group(task, max(sizes))
    if group:  # else requests are done one by one
        rows = ROWS_OF_EACH if passes > 1 else (1,)
        samples_ms = together.time_passes(session, task, group, context_tokens, sizes, passes, rows)
        found["together"] = together.report(samples_ms)
    if passes > 1:  # a rehearsal takes too long with many rows
        found["by_rows"] = by_rows.report(by_rows.time_rows(session, task, context_tokens, passes))
        found["encoder_ms"] = time_encoder(session, passes)
    found["gpu_bytes_after_passes"] = free - free_bytes()
    return found


def free_bytes() -> int:
    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0


def time_encoder(session: Session, count: int) -> float:
    """The median milliseconds in which the VQGAN's encoder makes drafts of a picture."""
    codes = session.bundle.manifest.codes
    assert codes
    pixels = np.random.default_rng(0).integers(0, 256, (codes.image_size, codes.image_size, 3), np.uint8)
    session.executor.draft(pixels)  # opens it
    samples = []
    for _ in range(count):
        begin = time.perf_counter()
        session.executor.draft(pixels)
        samples.append((time.perf_counter() - begin) * 1e3)
    return float(np.median(samples))


def save_rows(out: Path, bundle: str, context_tokens: int, found: dict[str, Any]) -> None:
    """The cost of rows, and of those of several sequences, beside `out`, as benchmarks.rows and together write them."""
    settings = {"task": "generation", "context": context_tokens, "threads": machine.cores()}
    report = {"commit": commit(), "gpu": torch.cuda.get_device_name(), "machine": machine.description()}
    report |= {"bundle": bundle, **settings, "encoder_ms": found["encoder_ms"]}
    report |= {"rows": found["by_rows"], "passes": found["together"]}
    out.with_name(f"{out.stem}-rows.json").write_text(json.dumps(report, indent=1) + "\n")


def export(cases: list[Case], work: Path) -> None:
    if any(case.model == "m3" for case in cases):
        full_size.make_checkpoint(work / "m3")
    for case in cases:
        begin = time.monotonic()
        case.export(work)
        print(f"{case.name}: exported in {time.monotonic() - begin:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--export", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--rehearse", type=Path, metavar="LIBRARY")
    arguments = parser.parse_args()
    end, work = time.monotonic() + arguments.seconds, arguments.work
    cases, sizes = CASES, TOGETHER
    if arguments.rehearse:
        here = {"provider": "CPUExecutionProvider", "memory": "cpu", "library": arguments.rehearse, "step_tokens": 320}
        DEVICES["cuda"] = DEVICES["cuda"]._replace(**here)
        cases, sizes = CASES[:1], REHEARSED_TOGETHER
    if arguments.export:
        export(cases, work)
        return
    results: dict[str, Any] = {"commit": commit(), "not_reached": [], "failed": {}}
    if arguments.rehearse:
        results["rehearsal"] = "the host's fibers: the times mean nothing"
    else:
        results["gpu"], results["cuda"] = torch.cuda.get_device_name(), torch.version.cuda
    for case in cases:
        if time.monotonic() + case.seconds > end:
            results["not_reached"].append(case.name)
            continue
        rows = bench.parse_rows(REHEARSED_ROWS if arguments.rehearse else ROWS[case.model])
        context_tokens = next(row.context for row in rows if row.kind == "tg")
        try:
            if case.model == "phantom":
                check_phantom(work / case.name, REHEARSED_TOKENS if arguments.rehearse else NEW_TOKENS)
            results[case.name] = bench.run(work / case.name, rows, device="cuda", repeat=1 if arguments.rehearse else 5)
            times = {f"{row['task']} {row['row']}": row["p50_ms"] for row in results[case.name]["rows"]}
            print(case.name, results[case.name]["settings"]["executor"], json.dumps(times), flush=True)
            passes = time_passes(work / case.name, context_tokens, sizes, 1 if arguments.rehearse else PASSES)
            results[case.name] |= passes
            for kind in ("together", "by_rows"):
                sizes_ms = {(one.get("sequences", 1), one["rows"]): one["p50_ms"] for one in passes.get(kind, [])}
                medians = {f"{sequences} x {rows}": round(ms, 2) for (sequences, rows), ms in sizes_ms.items()}
                print(case.name, kind, medians, flush=True)
            if case.model == "m3" and arguments.out:
                save_rows(arguments.out, case.name, context_tokens, passes)
        except Exception as error:  # continue with the other bundles
            results["failed"][case.name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    if results["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
