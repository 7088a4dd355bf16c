"""What the control groups of this process (cgroups, by which containers are bounded) let it have of the machine.

Both versions are read, as the kernel's documentation has them ("Control Group v2", "CFS Bandwidth Control"). A group is
bounded by those above it, too. In a container these are hidden, and its own group is the root of what is mounted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_MOUNT = Path("/sys/fs/cgroup")
_GROUPS = Path("/proc/self/cgroup")
# How version 1 writes that there is no limit: the largest number of pages, in bytes.
_NO_MEMORY_LIMIT = 1 << 62


def processors() -> float | None:
    """How many processors' time this process may take, such as 1.5; None where nothing bounds it."""
    quotas = []
    for folder, version in _groups("cpu"):
        if version == 2:
            quota, period = [*_words(folder / "cpu.max"), "", ""][:2]
        else:
            quota, period = (" ".join(_words(folder / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal():  # not "max", "-1" or nothing
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory() -> int | None:
    """How many bytes of memory this process may have, with the pages of files that it reads; None where unbounded."""
    limits = []
    for folder, version in _groups("memory"):
        words = _words(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
        limits += [int(word) for word in words if word.isdecimal() and int(word) < _NO_MEMORY_LIMIT]
    return min(limits, default=None)


def _groups(controller: str) -> Iterator[tuple[Path, int]]:
    """The folder of this process's group and of each above it, and which version's files are there."""
    for line in _lines(_GROUPS):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            mount, version = _MOUNT, 2
        elif controller in controllers.split(","):
            mount, version = _MOUNT / controller, 1
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        if ".." in group.parts:  # above what is mounted
            group = PurePosixPath()
        yield from ((mount / above, version) for above in (group, *group.parents))


def _words(path: Path) -> list[str]:
    return [word for line in _lines(path) for word in line.split()]


def _lines(path: Path) -> list[str]:
    """None where there is no such file, or the system hides it."""
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeError):
        return []
