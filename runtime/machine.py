"""The machine: what it is, what this process may have of it, and what it can do at most."""

from __future__ import annotations

import importlib
import math
import os
import platform
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from . import control_group

_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
# Many times the largest common last-level cache, or the cache would be measured.
_BUFFER_MEBIBYTES = 512


def description() -> dict[str, Any]:
    """Processor, cores and bytes of memory that this process may use, operating system."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
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


def instruction_set() -> str | None:
    """The one that the native kernels use here, as "avx512 with amx"; None without the native module."""
    kernels = _native_module()
    return kernels.instruction_set() if kernels else None


def cores() -> int:
    """How many cores this process may use: those of its processors, of which a core may have two, as far as it is given
    their time. A thread that gets no time holds all others up; half a processor's is worse than none (a Zen 3)."""
    try:
        processors: Iterable[int] = os.sched_getaffinity(0)
    except (AttributeError, OSError):  # not Linux, or a sandbox that forbids to ask
        processors = range(os.cpu_count() or 1)
    found = len({_core(processor) for processor in processors})
    quota = control_group.processors()
    return found if quota is None else max(1, min(found, math.ceil(quota - 0.5)))


def memory_bytes() -> int | None:
    """The machine's memory, or what its control group lets this process have of it; None where nobody says."""
    return _least(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), control_group.memory())


def available_memory() -> int | None:
    """Bytes of `memory_bytes` that others leave, pages of files counted as free; None where the system hides it."""
    return _least(_kibibytes("/proc/meminfo", "MemAvailable:"), control_group.memory())


def proportional_memory() -> int | None:
    """Bytes of memory of this process, shared pages counted by their share (PSS); None where the kernel hides it."""
    return _kibibytes("/proc/self/smaps_rollup", "Pss:")


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


def _kibibytes(path: str, name: str) -> int | None:
    """The line of `path` that begins with `name`, in bytes."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


def _least(*bounds: int | None) -> int | None:
    return min((bound for bound in bounds if bound is not None), default=None)


def _core(processor: int) -> str:
    """A name for the core that a processor is of."""
    try:
        return Path(_TOPOLOGY.format(processor)).read_text()
    except OSError:
        return str(processor)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
