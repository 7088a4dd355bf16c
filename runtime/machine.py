"""The machine under a benchmark: what it is, and what it can do at most."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

# Many times the largest common last-level cache, or the cache would be measured.
_BUFFER_MEBIBYTES = 512


def description() -> dict[str, Any]:
    """Processor, cores this process may use, bytes of memory, operating system."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    return {
        "processor": _processor(),
        "cores": cores(),
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def version(package: str) -> str | None:
    """Of a package: what is imported says itself, or what is installed, which for a GPU has another name; else None."""
    imported = getattr(sys.modules.get(package), "__version__", None)
    if imported is not None:
        return str(imported)
    for installed in (package, f"{package}-gpu"):
        try:
            return metadata.version(installed)
        except metadata.PackageNotFoundError:
            continue
    return None


def instruction_sets() -> str:
    """Those of this processor that the native kernels are built for; empty without the native module."""
    kernels = _native_module()
    return " ".join(kernels.targets()) if kernels else ""


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def proportional_memory() -> int | None:
    """Bytes of memory of this process, shared pages counted by their share (PSS); None where the kernel hides it."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), None)


def read_bandwidth(threads: int) -> float | None:
    """Bytes per second that `threads` threads read from memory; None without the native module."""
    return _native("read_bandwidth", threads, _BUFFER_MEBIBYTES)


def arithmetic_rate(kind: str, threads: int) -> float | None:
    """Operations per second of `kind` (int8 or float32), operands in registers; None without the native module."""
    return _native(f"{kind}_rate", threads)


def _native(name: str, *arguments: int) -> float | None:
    kernels = _native_module()
    return float(getattr(kernels, name)(*arguments)) if kernels else None


def _native_module() -> Any:
    """The kernels for Python; None where they are not built."""
    try:
        return importlib.import_module("healthgpt_edge._kernels")
    except ImportError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
