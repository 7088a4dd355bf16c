"""The results of benchmarks/gpu.sh as tables: `python -m benchmarks.gpu.report benchmarks/results/gpu.json`.

A share is the bytes that must be read, divided by the time and by the best bandwidth measured in the same run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..tables import table

Results = dict[str, Any]


def text(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(table(head, rows)) + "\n"


def milliseconds(result: Results, name: str) -> str:
    return f"{result[name]['p50_ms']:.4f}" if "p50_ms" in result.get(name, {}) else ""


def share(result: Results, name: str, bandwidth: float) -> str:
    return f"{result['bytes'] / (result[name]['p50_ms'] / 1e3) / bandwidth:.0%}"


def steps(results: Results, bandwidth: float) -> str:
    rows = [
        [
            f"{result['storage']}, rank {result['rank']}",
            milliseconds(result, "ours_graph"),
            share(result, "ours_graph", bandwidth),
            milliseconds(result, "original_eager"),
            milliseconds(result, "original_graph"),
        ]
        for name, part in results.items()
        if name.startswith("m3 decode step")
        for result in part
    ]
    return text(["M3 decode step, ms", "ours", "share", "original, eager", "original, graph"], rows)


def linears(results: Results, bandwidth: float) -> str:
    rows = [
        [
            f"{result['system']} {result['linear']}, {result['storage']}, rank {result['rank']}, {result['rows']} rows",
            milliseconds(result, "ours"),
            share(result, "ours", bandwidth),
            f"{result['ours']['p50_ms'] / result['ours_base']['p50_ms'] - 1:+.0%}",
            milliseconds(result, "cublas_base"),
            milliseconds(result, "original_eager"),
            milliseconds(result, "original_graph"),
            milliseconds(result, "original_compiled_graph"),
        ]
        for name, part in results.items()
        if "linears" in name
        for result in part
    ]
    head = ["linear, ms", "ours", "share", "over its base", "cuBLAS, base only"]
    return text([*head, "original, eager", "original, graph", "original, compiled"], rows)


def others(results: Results) -> str:
    kinds = {
        "attention": ("{system}, context {past}", ("ours", "", "torch_attention")),
        "attention of a prompt": ("{system}, {tokens} tokens", ("ours", "", "torch_attention")),
        "picture": ("1024 codes", ("ours_graph", "torch_eager", "torch_graph")),
        "m3 prefill, rank 64": ("{linear}, {storage}, {rows} rows", ("ours", "original_eager", "original_graph")),
    }
    rows = [
        [f"{name}: {title.format(**result)}", *(milliseconds(result, column) for column in columns)]
        for name, (title, columns) in kinds.items()
        for result in results.get(name, ())  # results may be older than a part
        if "absent" not in result
    ]
    rows += [
        [f"{result['codes']} codes one by one, {result['storage']}", f"{result['codes_seconds'] * 1e3:.0f}", "", ""]
        for result in results["whole picture"]
    ]
    return text(["ms", "ours", "PyTorch, eager", "PyTorch, graph"], rows)


def report(results: Results) -> str:
    """All tables as Markdown."""
    machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items() if value is not None)
    lines = [f"# CUDA kernels\n\n{machine}; commit {results['commit']}.\n"]
    if results["ceilings"]:
        ceiling = results["ceilings"][0]
        bandwidth, rate = ceiling["bytes_per_second"], ceiling["float16_operations_per_second"]
        passes = ", ".join(f"{name} {one / 1e9:.0f}" for name, one in ceiling["bytes_per_second_of"].items())
        lines.append(
            f"GB/s of passes over memory, read and written both counted: {passes}. Shares are of the best, "
            f"{ceiling['bytes_per_second_by']}. A float16 product runs at {rate / 1e12:.0f} TFLOP/s.\n"
        )
        lines += [steps(results, bandwidth), linears(results, bandwidth), others(results)]
    for kind in ("not_reached", "failed"):
        if results[kind]:
            lines.append(f"{kind.replace('_', ' ')}: {results[kind]}\n")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"expected a JSON file of results, found {len(sys.argv) - 1} arguments")
    print(report(json.loads(Path(sys.argv[1]).read_text())))
