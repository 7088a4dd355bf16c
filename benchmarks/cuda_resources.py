"""Registers and shared memory of each CUDA kernel, from the compiler's report, as a table in benchmarks/results/.

    python -m benchmarks.cuda_resources [--architecture 90 ...] [--out benchmarks/results/cuda-resources.md]

Needs nvcc and no GPU. Fails if a kernel spills registers.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("75", "80", "86", "87", "89", "90", "100", "120")
# What a kernel's second parameter counts.
_ROWS = {
    "HLoraLinearKernel": "row tiles {}",
    "CachedAttentionKernel": "rows at once {}",
    "AttentionPrefillKernel": "head size up to {}",
}
_STORAGES = ("float32", "float16", "bfloat16", "int8", "int4")


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture: registers and spills per thread, shared memory per block."""

    name: str
    architecture: str
    registers: int
    shared_bytes: int
    spill_bytes: int


def compile_report(source: Path, architecture: str) -> list[Kernel]:
    """ptxas' words on every kernel of a source."""
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", f"-gencode={target}", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
        command += ["-cubin", str(source), "-o", f"{folder}/kernels.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return list(parse(done.stderr, architecture))


def parse(report: str, architecture: str) -> list[Kernel]:
    """The kernels of one report of `ptxas -v`."""
    pattern = re.compile(
        r"Compiling entry function '(?P<symbol>\w+)'.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill "
        r"loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    kernels = []
    for found in pattern.finditer(report):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        spills = int(found["stores"]) + int(found["loads"])
        kernels.append(
            Kernel(
                name_of(found["symbol"]),
                architecture,
                int(found["registers"]),
                int(shared[1]) if shared else 0,
                spills,
            )
        )
    return kernels


def name_of(symbol: str) -> str:
    """A kernel's name and what it is made for, from its mangled symbol."""
    name = re.search(r"\d([A-Za-z]+Kernel)", symbol)
    assert name is not None, symbol
    made_for = symbol[name.end() :]
    storage = re.match(r"ILNS0_7StorageE(\d)E(?:Li(\d+)E)?", made_for)
    if storage:
        rows = "" if storage[2] is None else f", {_ROWS[name[1]].format(int(storage[2]))}"
        return f"{name[1]}, {_STORAGES[int(storage[1])]}{rows}"
    arguments = re.match(r"I((?:NS0_\d+[A-Za-z]+\d*E|f|S\d_|5uint4)+)E", made_for)
    if not arguments:
        return name[1]
    words = {"NS0_4HalfE": "float16", "NS0_8BFloat16E": "bfloat16", "f": "float32", "5uint4": "16 bytes"}
    given = re.findall(r"NS0_4HalfE|NS0_8BFloat16E|5uint4|S\d_|f", arguments[1])
    # S2_ and the like repeat a type named before.
    kinds = [words.get(one) or words[given[0]] for one in given]
    return f"{name[1]}, {' to '.join(kinds)}"


def table(kernels: list[Kernel]) -> str:
    """Markdown: a row per kernel, registers by architecture."""
    architectures = list(dict.fromkeys(kernel.architecture for kernel in kernels))
    rows: dict[str, dict[str, Kernel]] = {}
    for kernel in kernels:
        rows.setdefault(kernel.name, {})[kernel.architecture] = kernel
    spills = [f"{one.name} on sm_{one.architecture}, {one.spill_bytes} bytes" for one in kernels if one.spill_bytes]
    lines = [
        "# What the CUDA kernels take of a multiprocessor",
        "",
        "Registers per thread by architecture, and bytes of shared memory per block, by `ptxas -v`. Spills: "
        f"{', '.join(spills) or 'none'}.",
        "Written by `python -m benchmarks.cuda_resources`, which compiles and runs nothing.",
        "",
        "| kernel | shared bytes | " + " | ".join(f"sm_{one}" for one in architectures) + " |",
        "|---" * (2 + len(architectures)) + "|",
    ]
    for name, found in sorted(rows.items()):
        shared = sorted({kernel.shared_bytes for kernel in found.values()})
        registers = " | ".join(str(found[one].registers) for one in architectures)
        lines.append(f"| {name} | {' or '.join(map(str, shared))} | {registers} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", action="append", choices=ARCHITECTURES)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cuda-resources.md")
    arguments = parser.parse_args()
    sources = [path for path in sorted((ROOT / "csrc").rglob("*.cu")) if "__global__" in path.read_text()]
    kernels = [
        kernel
        for architecture in arguments.architecture or ARCHITECTURES
        for source in sources
        for kernel in compile_report(source, architecture)
    ]
    arguments.out.write_text(table(kernels))
    print(arguments.out.read_text())
    if any(kernel.spill_bytes for kernel in kernels):
        sys.exit("a kernel spills registers")


if __name__ == "__main__":
    main()
