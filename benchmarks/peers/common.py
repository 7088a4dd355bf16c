"""What the peers share: options, clock and report. Needs only Python's standard library."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from ..systems import SYSTEMS, System

RANKS = SYSTEMS["m3"].ranks


def parse_arguments(description: str | None, **variants: Any) -> argparse.Namespace:
    """Parse the options that the driver passes to every peer. `variants` are those of the option --variant."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work", type=Path, required=True, help="where files of several gigabytes may stay")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--prefill", type=int, default=600)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--context", type=int, default=700)
    parser.add_argument("--layers", type=int, default=SYSTEMS["m3"].layers, help="fewer, for a quick look")
    parser.add_argument("--picture", action="store_true", help="a whole picture of 1024 codes too")
    parser.add_argument("--variant", **variants)
    return parser.parse_args()


def system(arguments: argparse.Namespace) -> System:
    return replace(SYSTEMS["m3"], layers=arguments.layers)


class Report:
    """Rows of samples, which are printed as one JSON object at the end."""

    def __init__(self, version: str, note: str) -> None:
        self._report: dict[str, Any] = {"version": version, "note": note, "checks": [], "rows": []}

    def check(self, name: str, distance: float, tolerance: float) -> None:
        """Record a distance. Exits if it is above the tolerance, before anything is timed."""
        self._report["checks"].append({"name": name, "distance": distance, "tolerance": tolerance})
        if not distance <= tolerance:
            raise SystemExit(f"{name} must agree to {tolerance:g}, found {distance:.3g}; nothing was timed")

    def row(self, name: str, task: str, samples_ms: list[float], **facts: Any) -> None:
        self._report["rows"].append({"row": name, "task": task, "samples_ms": samples_ms, **facts})

    def print(self) -> None:
        self._report["pss_bytes"] = proportional_memory()
        print(json.dumps(self._report))


def absent(reason: str) -> NoReturn:
    """Print the reason why the peer cannot run here, in place of a report, and exit."""
    print(json.dumps({"absent": reason}))
    sys.exit(0)


def milliseconds(action: Callable[[], object], count: int = 1) -> list[float]:
    samples = []
    for _ in range(count):
        begin = time.perf_counter()
        action()
        samples.append((time.perf_counter() - begin) * 1e3)
    return samples


def proportional_memory() -> int | None:
    """The PSS of this process in bytes; None if the system does not tell it."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), None)
