"""The comparison as a Markdown page and as a plot.

python -m benchmarks.report benchmarks/results/comparison.json      # draws its plot again
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from healthgpt_edge.bench import summary

from .contenders import OURS
from .goals import Goal, overheads
from .pooled import Entry, Results
from .tables import table

_PANELS_ACROSS = 2


def markdown(settings: dict[str, Any], results: Results, goals: list[Goal]) -> str:
    """Goals beside what was measured, then every row of everyone."""
    machine = settings["machine"]
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB" if machine["memory_bytes"] else "unknown"
    kernels = f"kernels by {settings['instruction_set']}" if settings["instruction_set"] else "no kernels built"
    lines = [
        f"# {settings['bundle']} and its peers",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {memory} of memory, {settings['threads']} threads, "
        f"{kernels}, {settings['rounds']} rounds in turn. Medians. `{settings['command']}`",
        "",
        *table(("goal", "limit", "measured", "met"), [goal.cells() for goal in goals]),
        "",
        *table(("contender", "row", "task", "p50 ms", "p90 ms", "p99 ms", "samples", "of the ceiling"), _rows(results)),
        "",
    ]
    if added := overheads(results):
        lines += [
            "What adapters add to a decoded token:",
            "",
            *table(("contender", "task", "added"), [(name, task, f"{share:+.0%}") for name, task, share in added]),
            "",
        ]
    lines += [
        f"* {name}: {turns[0]['version']}. {turns[0]['note']}."
        for name, turns in results.facts.items()
        if "note" in turns[0]
    ]
    lines += [f"* {name}: absent, {reason}." for name, reason in results.absent.items()]
    return "\n".join(lines) + "\n"


def plot(results: Results, path: Path) -> None:
    """One panel per row and task: everyone's median, with a whisker to the 90th percentile. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, str], list[tuple[str, Entry]]] = {}
    for name, entries in results.entries.items():
        for (row, task), entry in entries.items():
            # A peer's time without adapters belongs beside those with them.
            for shown in ("comprehension", "generation") if task == "base" else (task,):
                panels.setdefault((row, shown), []).append((f"{name}, no adapters" if task == "base" else name, entry))
    panels = {key: bars for key, bars in panels.items() if len(bars) > 1 and key[0] != "linears"}
    if not panels:
        return
    tallest, lines = max(len(bars) for bars in panels.values()), -(-len(panels) // _PANELS_ACROSS)
    size = (6 * _PANELS_ACROSS, (0.25 * tallest + 0.6) * lines)
    figure, grid = pyplot.subplots(lines, _PANELS_ACROSS, figsize=size, layout="constrained", squeeze=False)
    for axis in grid.flat[len(panels) :]:
        axis.set_visible(False)
    for ((row, task), bars), axis in zip(sorted(panels.items()), grid.flat, strict=False):
        bars = sorted(bars, key=lambda bar: bar[1].median_ms, reverse=True)
        unit, scale = ("s", 1e-3) if bars[-1][1].median_ms >= 1000 else ("ms", 1.0)
        for position, (name, entry) in enumerate(bars):
            figures = summary(entry.samples_ms)
            median, high = (float(figures[key]) * scale for key in ("p50_ms", "p90_ms"))
            colour = "tab:blue" if name == OURS else "lightgrey"
            axis.barh(position, median, color=colour, xerr=[[0], [high - median]], ecolor="grey")
            axis.text(0, position, f" {_number(median)}", va="center")
        axis.set_yticks(range(len(bars)), [name for name, _ in bars])
        axis.set_title(f"{_title(row)}, {task}, {unit}", loc="left", fontsize="medium")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _title(row: str) -> str:
    """A row's name (bench.py) in words."""
    number = re.search(r"\d+", row)
    count = number.group() if number else ""
    return {
        "pp": f"prefill of {count} tokens",
        "tg": f"a token at context {row.partition('@')[2]}",
        "img": "a whole picture",
        "vq": "codes to picture",
        "vit": "vision tower",
    }.get(row[: number.start()] if number else row, row)


def _rows(results: Results) -> list[tuple[str, ...]]:
    rows = []
    for name, entries in results.entries.items():
        for entry in entries.values():
            figures = summary(entry.samples_ms)
            percentiles = (_number(float(figures[key])) for key in ("p50_ms", "p90_ms", "p99_ms"))
            share = "" if entry.share is None else f"{entry.share:.0%}"
            rows.append((name, entry.row, entry.task, *percentiles, str(figures["count"]), share))
    return rows


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"expected a JSON file of results, found {len(sys.argv) - 1} arguments")
    source = Path(sys.argv[1])
    plot(Results.from_json(json.loads(source.read_text())["contenders"]), source.with_suffix(".png"))
