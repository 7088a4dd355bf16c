"""Unpack wheels into a folder to import from, on a machine without a network.

    python -m benchmarks.gpu.wheels WHEELS SITE

Wheels for other Pythons are skipped.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path


def is_for(name: str, version: tuple[int, int]) -> bool:
    """Whether a wheel of this name is for Python `version`."""
    pythons, abi, _ = name.removesuffix(".whl").split("-")[-3:]
    own = f"cp{version[0]}{version[1]}"
    return (pythons, abi) == (own, own) or "py3" in pythons.split(".") or (pythons.startswith("cp3") and abi == "abi3")


def unpack(folder: Path, site: Path, version: tuple[int, int]) -> Iterator[str]:
    """Unpack the wheels for Python `version` and yield their names. Raises SystemExit for a damaged one."""
    for path in sorted(folder.glob("*.whl")):
        if not is_for(path.name, version):
            continue
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(site)
        except zipfile.BadZipFile as error:
            sys.exit(f"{path.name} is damaged: {error}")
        yield path.name


def main() -> None:
    folder, site = map(Path, sys.argv[1:])
    for name in unpack(folder, site, sys.version_info[:2]):
        print(name)


if __name__ == "__main__":
    main()
