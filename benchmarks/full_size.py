"""Export a full-size system with random weights, then answer and generate with it: time, peak memory, bytes.

    python -m benchmarks.full_size WORK_DIR [--system m3|l14|xl32] [--layers N] [--random-layers N]
        [--precision fp16 --precision int4] [--cache int8] [--run int4 --run int4-int8] [--out results.json]

Writes the checkpoint to WORK_DIR/SYSTEM unless it is there (M3 11 GB, L14 31, XL32 67; on disk a gigabyte less for each
of XL32's layers that is not random), the bundles beside it. Peak memory is the kernel's high-water mark of the
exporting process (mapped file pages included), and of the running one also the anonymous part.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import onnxruntime

from healthgpt_edge import machine

from .commit import commit
from .systems import SYSTEMS, System


def released(checkpoint: Path, system: System) -> dict[str, Path]:
    """The files of a checkpoint by `export`'s options."""
    files = {"base": "base", "vision": "vision"}
    files |= {task: f"{system.folder}/{system.plugin(task)}" for task in system.ranks}
    if "generation" in system.ranks:
        files |= {"fusion": f"{system.folder}/fusion_layer_weights.bin", "vqgan": "vqgan"}
    return {name: checkpoint / file for name, file in files.items()}


def memory_mb() -> dict[str, int]:
    """Memory of this process in MiB: its high-water mark, what is file-backed and anonymous now, and the PSS.

    Tasks map the base each for itself, so all but the PSS count its pages once per task.
    """
    wanted = {"VmHWM": "peak", "RssFile": "file", "RssAnon": "anonymous"}
    lines = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    memory = {wanted[name]: int(value.split()[0]) // 1024 for name, value in lines if name in wanted}
    return memory | {"proportional": (machine.proportional_memory() or 0) >> 20}


def memory_parts() -> dict[str, int]:
    """The PSS of this process in MiB by what is mapped: the name of the file, or `anonymous`."""
    parts: Counter[str] = Counter()
    name = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # the first line of a mapping, with a path in its last columns
            name = Path(words[5]).name if len(words) > 5 and words[5].startswith("/") else "anonymous"
        elif words[0] == "Pss:":
            parts[name] += int(words[1])
    return {name: kib >> 10 for name, kib in parts.most_common() if kib >> 10}


def export(
    checkpoint: Path,
    bundle: Path,
    precision: str,
    cache: str | None = None,
    system: System = SYSTEMS["m3"],
    layout: str = "panels",
) -> dict[str, object]:
    """Run the export command as a user does; returns seconds, peak MiB and bytes per part."""
    if bundle.exists():
        shutil.rmtree(bundle)
    options = [item for name, path in released(checkpoint, system).items() for item in (f"--{name}", str(path))]
    command = [sys.executable, "-m", "healthgpt_edge.cli", "export", *options, "--precision", precision]
    command += ["--layout", layout, *(["--cache", cache] if cache else [])]
    begin = time.perf_counter()
    process = subprocess.Popen([*command, "--out", str(bundle), "--json"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"export failed with code {process.returncode}")
    summary = json.loads(output)
    return {
        "seconds": round(time.perf_counter() - begin, 1),
        "peak_mib": usage.ru_maxrss // 1024,
        "bundle_bytes": summary["total_bytes"],
        "parts": {f"{part['file']}: {part['part']}": part["size_bytes"] for part in summary["parts"]},
    }


def run(bundle: Path, answer_tokens: int, threads: int | None) -> dict[str, object]:
    """Load all tasks, answer once, generate one picture if it can; returns times and memory."""
    import numpy as np

    from healthgpt_edge import load

    begin = time.perf_counter()
    session = load(bundle, threads=threads)
    result: dict[str, object] = {"load_s": round(time.perf_counter() - begin, 1), "after_load_mib": memory_mb()}
    picture = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    answer = session.answer(picture, "What is in the image?", max_new_tokens=answer_tokens)
    result["answer"] = answer.timings_ms | {"tokens": len(answer.token_ids)}
    result["after_answer_mib"] = memory_mb()
    if "generation" not in session.bundle.manifest.tasks:
        return result | {"after_answer_parts_mib": memory_parts()}
    # A random model takes few drafts; what a pass of more rows costs is benchmarks.rows' to say.
    made = session.generate(picture, "Reconstruct the image.", draft="none")
    result["generate"] = made.timings_ms | {"tokens": len(made.token_ids), "image": list(made.pixels.shape)}
    result["after_generate_mib"] = memory_mb()
    result["after_generate_parts_mib"] = memory_parts()
    return result


def make_checkpoint(
    folder: Path, system: str = "m3", layers: int | None = None, random_layers: int | None = None
) -> None:
    """Write the random checkpoint unless it is there, in a process of its own, which takes its memory along."""
    if folder.exists():
        return
    command = [sys.executable, "-m", "benchmarks.random_checkpoint", str(folder), "--system", system]
    command += ["--layers", str(layers)] if layers else []
    command += ["--random-layers", str(random_layers)] if random_layers else []
    subprocess.run(command, check=True)


def layers_of(base: Path) -> tuple[int, int]:
    """How many layers a random checkpoint's base has, and in how many of them all matrices are random."""
    layers: int = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    metadata = json.loads((base / "model.safetensors.index.json").read_text())["metadata"]
    return layers, metadata.get("random_layers", layers)


def run_apart(bundle: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """`run` in a process of its own, so that its high-water mark is its own."""
    command = [sys.executable, "-m", "benchmarks.full_size", str(arguments.work), "--run-bundle", str(bundle)]
    command += ["--answer-tokens", str(arguments.answer_tokens)]
    command += ["--threads", str(arguments.threads)] if arguments.threads else []
    result: dict[str, object] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return result


def settings(system: str, layers: int, random_layers: int | None = None) -> dict[str, object]:
    """What figures must share to stand in one file."""
    processor = machine.description()["processor"]
    return {
        "system": system,
        "layers": layers,
        **({"random_layers": random_layers} if random_layers else {}),
        "machine": {"processor": processor, "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {"onnxruntime": onnxruntime.__version__},
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--system", choices=sorted(SYSTEMS), default="m3")
    parser.add_argument("--layers", type=int, help="fewer decoder layers, where there is no room for all")
    parser.add_argument("--random-layers", type=int, help="matrices of later layers are zeros that take no disk")
    parser.add_argument("--precision", action="append", default=[], help="export this one; may be repeated")
    parser.add_argument("--cache", help="type of the caches of what is exported, if not the precision's own")
    parser.add_argument("--run", action="append", default=[], help="answer and generate with this one")
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--run-bundle", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.run_bundle:
        print(json.dumps(run(arguments.run_bundle, arguments.answer_tokens, arguments.threads)))
        return
    system, checkpoint = SYSTEMS[arguments.system], arguments.work / arguments.system
    layers = arguments.layers or system.layers
    if arguments.precision:
        make_checkpoint(checkpoint, arguments.system, arguments.layers, arguments.random_layers)
        expected, found = (layers, arguments.random_layers or layers), layers_of(checkpoint / "base")
        if found != expected:
            raise SystemExit(
                f"{checkpoint.name} must have {expected[0]} layers, {expected[1]} of them random, "
                f"found a checkpoint of {found[0]}, {found[1]} of them random"
            )
    bundles = "bundle" if arguments.system == "m3" else f"bundle-{arguments.system}"
    # What is measured now replaces what the file says of it; the rest stays, if it is of the same system and machine.
    results = settings(arguments.system, layers, arguments.random_layers)
    if arguments.out and arguments.out.is_file():
        kept = json.loads(arguments.out.read_text())
        if all(kept.get(name) == results[name] for name in results):
            results = kept
    for precision in arguments.precision:
        name = f"{precision}-{arguments.cache}" if arguments.cache else precision
        bundle = arguments.work / f"{bundles}-{name}"
        results[f"export {name}"] = {
            "commit": commit(),
            **export(checkpoint, bundle, precision, arguments.cache, system),
        }
        print(name, json.dumps(results[f"export {name}"]), flush=True)
    for precision in arguments.run:
        bundle = arguments.work / f"{bundles}-{precision}"
        results[f"run {precision}"] = {"commit": commit(), **run_apart(bundle, arguments)}
        print(precision, json.dumps(results[f"run {precision}"]), flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
