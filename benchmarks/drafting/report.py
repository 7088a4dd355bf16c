"""The drafting benchmark as a Markdown page and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..tables import table

# The goals that were set before drafts were written: times fewer forward passes, times less wall clock, share of the
# first question's time.
FEWER_PASSES = {
    "reconstruct": 4.0,
    "super-resolve": 3.0,
    "ct-to-mr": 2.0,
    "from words": 1.5,
    "from words, sampled": 1.5,
}
LESS_TIME = {"reconstruct": 2.5}
SECOND_QUESTION = 0.15
AUTO_COSTS = 1.05  # at most, where drafts do not pay
SIXTEEN = "auto, 16 free rows"


def markdown(report: dict[str, Any]) -> str:
    """Goals beside what was measured, the ids compared, then the timed pictures of every task and way."""
    precisions = report["precisions"]
    threads = sorted({str(found["threads"]) for found in precisions.values() if "threads" in found})
    lines = [
        "# Drafting on the trained phantom",
        "",
        f"{report['machine']['processor']}, kernels: {report['versions']['kernels']}, threads: {', '.join(threads)}. "
        "`python -m benchmarks.drafting WORK`: plain decoding and drafts in turn.",
        "",
        *table(
            ("precision", "goal", "limit", "auto, rows as dear as here", "16 free rows", "64 free rows", "met"),
            [(precision, *cells) for precision, found in precisions.items() for cells in _goals(found)],
        ),
        "",
        "Ids of plain decoding and of 16 rows in every pass. Accepted are tokens per forward pass, the prefill counted "
        "as one:",
        "",
        *table(
            ("precision", "task", "pictures", "differing ids", "passes", "fewer", "accepted"),
            [
                (precision, task, *_counts(one))
                for precision, found in precisions.items()
                for task, one in found.get("compared", {}).items()
            ],
        ),
        "",
        "Timed in turn. Decoding includes encoding the input:",
        "",
        *table(
            (
                *("precision", "task", "draft", "pictures", "differing ids", "passes", "fewer", "accepted"),
                *("decode ms", "plain", "times", "whole ms", "plain", "times"),
            ),
            [
                (precision, task, way, *_counts(one), *_times(one, "decode"), *_times(one, "total"))
                for precision, found in precisions.items()
                for task, ways in found.get("tasks", {}).items()
                for way, one in ways.items()
            ],
        ),
        "",
        "Time to the first piece of an answer:",
        "",
        *table(
            ("precision", "first question ms", "later ones ms", "share", "answers", "differing"),
            [
                (
                    *(precision, f"{one['first_ms']:.1f}", f"{one['later_ms']:.1f}", f"{one['share']:.1%}"),
                    *(str(one["answers"]), str(one["differing_answers"])),
                )
                for precision, found in precisions.items()
                if (one := found.get("second_question"))
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


def _goals(found: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    timed, compared = found.get("tasks", {}), found.get("compared", {})
    for task, limit in FEWER_PASSES.items():
        ways = timed.get(task, {})
        # Of more pictures where there are.
        ones = [ways.get("auto"), compared.get(task, ways.get(SIXTEEN)), ways.get("auto, 64 free rows")]
        measured = [one and one["fewer_passes"] for one in ones]
        met = ", ".join(_met(fewer >= limit) if fewer else "" for fewer in measured)
        rows.append(
            (f"{task}: fewer passes", f"{limit}x", *(f"{fewer:.2f}x" if fewer else "" for fewer in measured), met)
        )
    for task, limit in LESS_TIME.items() if timed else ():
        for stage, name in (("decode", "decoding"), ("total", "the whole picture")):
            speedups = [timed[task][way][f"{stage}_speedup"] for way in ("auto", SIXTEEN, "auto, 64 free rows")]
            met = _met(speedups[0] >= limit)
            rows.append((f"{task}: less time, {name}", f"{limit}x", *(f"{one:.2f}x" for one in speedups), met))
    if timed:
        least = min(ways["auto"]["decode_speedup"] for ways in timed.values())
        cells = (f"{1 / AUTO_COSTS:.2f}x", f"{least:.2f}x", "", "", _met(least >= 1 / AUTO_COSTS))
        rows.append(("the task that gains least: less time, decoding", *cells))
    if "second_question" in found:
        share = found["second_question"]["share"]
        cells = (f"{SECOND_QUESTION:.0%}", f"{share:.1%}", "", "", _met(share <= SECOND_QUESTION))
        rows.append(("second question: of the first's time", *cells))
    rows.append(("differing ids", "0", str(differing(found)), "", "", _met(not differing(found))))
    return rows


def differing(found: dict[str, Any]) -> int:
    """Ids of all pictures of a precision that are not those of plain decoding, and answers that are not."""
    timed = sum(way["differing_ids"] for ways in found.get("tasks", {}).values() for way in ways.values())
    compared = sum(one["differing_ids"] for one in found.get("compared", {}).values())
    return int(timed + compared + found.get("second_question", {}).get("differing_answers", 0))


def _met(met: bool) -> str:
    return "yes" if met else "**no**"


def _counts(one: dict[str, Any]) -> tuple[str, ...]:
    passes = (f"{one['forward_passes']:.1f}", f"{one['fewer_passes']:.2f}x", f"{one['accepted_per_pass']:.2f}")
    return (str(one["pictures"]), str(one["differing_ids"]), *passes)


def _times(one: dict[str, Any], stage: str) -> tuple[str, ...]:
    return (f"{one[f'{stage}_ms']:.1f}", f"{one[f'plain_{stage}_ms']:.1f}", f"{one[f'{stage}_speedup']:.2f}x")


def plot(report: dict[str, Any], path: Path) -> None:
    """How often the code at each place came from a draft, with 16 rows: one panel per precision and task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    precisions = {name: found["compared"] for name, found in report["precisions"].items() if found.get("compared")}
    if not precisions:
        return
    columns = list(next(iter(precisions.values())))
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
            one = found[task]
            image = axis.imshow(np.array(one["drafted_by_place"]), vmin=0, vmax=1, cmap="viridis")
            axis.set_title(
                f"{task}, {precision}\n{one['accepted_per_pass']:.2f} a pass, n={one['pictures']}", fontsize=9
            )
            axis.set_xticks([])
            axis.set_yticks([])
    figure.colorbar(image, ax=axes, label="share of codes that came from a draft", shrink=0.8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
