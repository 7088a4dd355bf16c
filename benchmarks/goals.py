"""The goals set before the kernels were written, each with its measured value.

It is "not measured" where a part of it is missing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .contenders import BODIES, LINEARS, LLAMA, OURS
from .pooled import Results

COMPREHENSION, GENERATION = "comprehension", "generation"
# The lengths that the goals were set for.
PREFILL, CONTEXT = "pp600", "@700"


@dataclass(frozen=True)
class Goal:
    """`measured` in the goal's unit, or None; met where it is at least (or at most) the limit."""

    name: str
    measured: float | None
    limit: float
    at_least: bool
    unit: str

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def cells(self) -> tuple[str, str, str, str]:
        """Name, goal, measured and verdict, as text."""
        bound = "at least" if self.at_least else "at most"
        measured = "not measured" if self.measured is None else f"{self.measured:.3g}{self.unit}"
        verdict = {None: "", True: "yes", False: "**no**"}[self.met]
        return self.name, f"{bound} {self.limit:g}{self.unit}", measured, verdict


def goals(results: Results) -> list[Goal]:
    """All goals, in the order of the issue."""
    found = []
    for task, over_llama, over_bodies in ((COMPREHENSION, 1.4, 1.8), (GENERATION, 1.5, 2.0)):
        ours = results.find(OURS, "tg", task, CONTEXT)
        share = ours.share if ours else None
        llama = _ratio(results.median_ms(LLAMA, "tg", task, CONTEXT), results.median_ms(OURS, "tg", task, CONTEXT))
        bodies = _ratio(results.median_ms(BODIES, "tg", task, CONTEXT), results.median_ms(OURS, "tg", task, CONTEXT))
        found += [
            Goal(f"decode, {task}: times as fast as {LLAMA} + LoRA", llama, over_llama, True, "x"),
            Goal(f"decode, {task}: times as fast as ONNX Runtime alone", bodies, over_bodies, True, "x"),
            Goal(f"decode, {task}: of the read bandwidth", share and 100 * share, 87, True, "%"),
        ]
    for task, most in ((COMPREHENSION, 4), (GENERATION, 12)):
        added = _added(results, task)
        found.append(Goal(f"decode, {task}: added by H-LoRA to the base linears", added, most, False, "%"))
    for task in (COMPREHENSION, GENERATION):
        found.append(Goal(f"prefill, {task}", _seconds(results.median_ms(OURS, PREFILL, task)), 4.5, False, " s"))
    found.append(Goal("VQ decode", results.median_ms(OURS, "vq", GENERATION), 430, False, " ms"))
    found.append(Goal("vision tower, comprehension", results.median_ms(OURS, "vit", COMPREHENSION), 400, False, " ms"))
    picture = _ratio(results.median_ms(OURS, "img", GENERATION), results.median_ms(LLAMA, "img", GENERATION))
    found.append(Goal(f"whole picture: share of {LLAMA} + LoRA's prefill and tokens", picture, 0.62, False, ""))
    memory = [turn["memory"].values() for turn in results.facts.get(OURS, [])]
    peak = max((size for sizes in memory for size in sizes if size), default=None)
    found.append(Goal("memory, all tasks resident (PSS)", peak and peak / 1e9, 3.2, False, " GB"))
    load = results.find(OURS, "load", "all")
    stages = [turn["stages_ms"]["load"] for turn in load.turns] if load else []
    found.append(Goal("load, page cache warm, before the prefill", _seconds(_middle(stages)), 1.0, False, " s"))
    return found


def overheads(results: Results) -> list[tuple[str, str, float]]:
    """How much a contender's adapters add to its decode: (contender, task, share), where both were timed."""
    found = []
    for name in results.entries:
        for task in (COMPREHENSION, GENERATION):
            ratio = _ratio(results.median_ms(name, "tg", task), results.median_ms(name, "tg", "base"))
            if ratio is not None:
                found.append((name, task, ratio - 1))
    return found


def _added(results: Results, task: str) -> float | None:
    """What adapters add to the base linears, in percent: the median of what it was in each round, as both drift."""
    base, adapted = (results.find(LINEARS, "linears", one) for one in ("base", task))
    if not base or not adapted:
        return None
    return 100 * float(np.median(np.divide(adapted.samples_ms, base.samples_ms)) - 1)


def _ratio(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first / second


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _middle(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
