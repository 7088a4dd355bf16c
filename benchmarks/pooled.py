"""Results of all turns: samples pooled by row and task, their percentiles, and their share of the machine's ceiling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from healthgpt_edge.bench import summary


@dataclass
class Entry:
    """One row of one contender for one task, over all turns."""

    row: str
    task: str
    samples_ms: list[float] = field(default_factory=list)
    turns: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        self.samples_ms += row["samples_ms"]
        self.turns.append(row)

    @property
    def median_ms(self) -> float:
        return float(summary(self.samples_ms)["p50_ms"])

    @property
    def share(self) -> float | None:
        """Each turn's median rate as a share of the higher ceiling measured around it; the median over the turns.

        Rates and ceilings drift together on a shared machine, so they are compared turn by turn.
        """
        shares = []
        for turn in self.turns:
            ceilings = [turn.get(f"ceiling_{when}") for when in ("before", "after")]
            if None in ceilings:
                return None
            shares.append(turn["cost"] / (float(np.median(turn["samples_ms"])) / 1e3) / max(ceilings))
        return float(np.median(shares)) if shares else None

    def to_json(self) -> dict[str, Any]:
        facts = [{key: value for key, value in turn.items() if key not in ("row", "task")} for turn in self.turns]
        return {"row": self.row, "task": self.task, **summary(self.samples_ms), "share": self.share, "turns": facts}


class Results:
    """The entries and facts of every contender, and why others are absent."""

    def __init__(self) -> None:
        self.entries: dict[str, dict[tuple[str, str], Entry]] = {}
        self.facts: dict[str, list[dict[str, Any]]] = {}
        self.absent: dict[str, str] = {}

    def add(self, name: str, report: dict[str, Any]) -> None:
        """One turn's report."""
        if "absent" in report:
            self.absent[name] = report["absent"]
            return
        entries = self.entries.setdefault(name, {})
        for row in report["rows"]:
            key = row["row"], row["task"]
            entries.setdefault(key, Entry(*key)).add(row)
        self.facts.setdefault(name, []).append({key: value for key, value in report.items() if key != "rows"})

    def find(self, name: str, kind: str, task: str, end: str = "") -> Entry | None:
        """The entry whose row begins with `kind` (pp, tg, img, vq, vit, load) and ends with `end`."""
        for entry in self.entries.get(name, {}).values():
            if entry.row.startswith(kind) and entry.row.endswith(end) and entry.task == task:
                return entry
        return None

    def median_ms(self, name: str, kind: str, task: str, end: str = "") -> float | None:
        entry = self.find(name, kind, task, end)
        return entry.median_ms if entry else None

    @classmethod
    def from_json(cls, contenders: dict[str, Any]) -> Results:
        """The reverse of `to_json`."""
        results = cls()
        for name, report in contenders.items():
            if "absent" in report:
                results.absent[name] = report["absent"]
                continue
            entries = [Entry(row["row"], row["task"]) for row in report["rows"]]
            for entry, row in zip(entries, report["rows"], strict=True):
                for turn in row["turns"]:
                    entry.add(turn)
            results.entries[name] = {(entry.row, entry.task): entry for entry in entries}
            results.facts[name] = report["turns"]
        return results

    def to_json(self) -> dict[str, Any]:
        return {
            name: {"rows": [entry.to_json() for entry in entries.values()], "turns": self.facts[name]}
            for name, entries in self.entries.items()
        } | {name: {"absent": reason} for name, reason in self.absent.items()}
