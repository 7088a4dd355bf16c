"""The drafting benchmark as a Markdown page and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

# Issue 6: times fewer forward passes, times less wall clock, share of the first question's time.
FEWER_PASSES = {"reconstruct": 4.0, "super-resolve": 3.0, "ct-to-mr": 2.0, "from words": 1.5}
LESS_TIME = {"reconstruct": 2.5}
SECOND_QUESTION = 0.15


def markdown(report: dict[str, Any]) -> str:
    """Goals beside what was measured, then every task and way."""
    lines = [
        "# Drafting on the trained phantom",
        "",
        f"{report['machine']['processor']}. `python -m benchmarks.drafting WORK`: plain decoding and drafts in turn, "
        f"threads: {', '.join(sorted({str(found['threads']) for found in report['precisions'].values()}))}.",
        "",
        "| precision | goal | limit | auto, rows as dear as here | 16 free rows | 64 free rows | met |",
        "|---|---|---|---|---|---|---|",
    ]
    for precision, found in report["precisions"].items():
        lines += [f"| {precision} | {' | '.join(cells)} |" for cells in _goals(found)]
    lines += [
        "",
        "Decoding includes encoding the input. Accepted are tokens per forward pass, the prefill counted as one.",
        "",
        "| precision | task | draft | pictures | differing ids | passes | fewer | accepted "
        "| decode ms | plain | times | whole ms | plain | times |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for precision, found in report["precisions"].items():
        for task, ways in found["tasks"].items():
            lines += [f"| {precision} | {task} | {way} | {_cells(one)} |" for way, one in ways.items()]
    lines += [
        "",
        "Time to the first piece of an answer:",
        "",
        "| precision | first question ms | later ones ms | share | answers | differing |",
        "|---|---|---|---|---|---|",
    ]
    for precision, found in report["precisions"].items():
        one = found["second_question"]
        lines.append(
            f"| {precision} | {one['first_ms']:.1f} | {one['later_ms']:.1f} | {one['share']:.1%} | {one['answers']} | "
            f"{one['differing_answers']} |"
        )
    return "\n".join(lines) + "\n"


def _goals(found: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for task, limit in FEWER_PASSES.items():
        ways = ("auto", "auto, 16 free rows", "auto, 64 free rows")
        measured = [found["tasks"][task][way]["fewer_passes"] for way in ways]
        met = ", ".join(_met(one >= limit) for one in measured)
        rows.append((f"{task}: fewer passes", f"{limit}x", *(f"{one:.2f}x" for one in measured), met))
    for task, limit in LESS_TIME.items():
        for stage, name in (("decode", "decoding"), ("total", "the whole picture")):
            speedup = found["tasks"][task]["auto"][f"{stage}_speedup"]
            rows.append((f"{task}: less time, {name}", f"{limit}x", f"{speedup:.2f}x", "", "", _met(speedup >= limit)))
    share = found["second_question"]["share"]
    met = _met(share <= SECOND_QUESTION)
    rows.append(("second question: of the first's time", f"{SECOND_QUESTION:.0%}", f"{share:.1%}", "", "", met))
    differing = differing_ids(found)
    rows.append(("differing ids", "0", str(differing), "", "", _met(not differing)))
    return rows


def differing_ids(found: dict[str, Any]) -> int:
    """Ids of all pictures of a precision that are not those of plain decoding, and answers that are not."""
    pictures = sum(way["differing_ids"] for ways in found["tasks"].values() for way in ways.values())
    return int(pictures + found["second_question"]["differing_answers"])


def _met(met: bool) -> str:
    return "yes" if met else "**no**"


def _cells(one: dict[str, Any]) -> str:
    return (
        f"{one['pictures']} | {one['differing_ids']} | {one['forward_passes']:.1f} | {one['fewer_passes']:.2f}x | "
        f"{one['accepted_per_pass']:.2f} | {one['decode_ms']:.1f} | {one['plain_decode_ms']:.1f} | "
        f"{one['decode_speedup']:.2f}x | {one['total_ms']:.1f} | {one['plain_total_ms']:.1f} | "
        f"{one['total_speedup']:.2f}x"
    )


def plot(report: dict[str, Any], path: Path) -> None:
    """How often the code at each place came from a draft, with 16 rows: one panel per precision and task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    precisions = report["precisions"]
    columns = list(next(iter(precisions.values()))["tasks"])
    figure, axes = pyplot.subplots(
        len(precisions),
        len(columns),
        figsize=(2.4 * len(columns), 2.6 * len(precisions)),
        layout="constrained",
        squeeze=False,
    )
    image = None
    for row, (precision, found) in enumerate(precisions.items()):
        for column, task in enumerate(columns):
            axis = axes[row, column]
            one = found["tasks"][task]["auto, 16 free rows"]
            image = axis.imshow(np.array(one["drafted_by_place"]), vmin=0, vmax=1, cmap="viridis")
            axis.set_title(f"{task}, {precision}\n{one['accepted_per_pass']:.2f} a pass", fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
    figure.colorbar(image, ax=axes, label="share of codes that came from a draft", shrink=0.8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
