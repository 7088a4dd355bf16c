"""Unpack wheels into a folder to import from: on a machine without a network, all that pip would fetch came along.

    python -m benchmarks.gpu.wheels WHEELS SITE

A large wheel may lie in parts, as `split -d -b 60M NAME.whl NAME.whl.` cuts it. Wheels for other Pythons are passed
over.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path


def wheels(folder: Path) -> dict[str, list[Path]]:
    """Each wheel's name, and the files that make it, in order; raises SystemExit where a part is missing."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        name = re.fullmatch(r"(.+\.whl)(?:\.(\d+))?", path.name)
        if name is None:
            continue
        found.setdefault(name[1], []).append(path)
        if name[2] is not None and int(name[2]) != len(found[name[1]]) - 1:
            sys.exit(f"part {len(found[name[1]]) - 1} of {name[1]} is missing, found {path.name}")
    return found


def is_for(name: str, version: tuple[int, int]) -> bool:
    """Whether a wheel of this name is for Python `version`."""
    pythons, abi, _ = name.removesuffix(".whl").split("-")[-3:]
    own = f"cp{version[0]}{version[1]}"
    return (pythons, abi) == (own, own) or "py3" in pythons.split(".") or (pythons.startswith("cp3") and abi == "abi3")


def unpack(folder: Path, site: Path, version: tuple[int, int]) -> Iterator[str]:
    """Unpack what is for Python `version`; yields names. Raises SystemExit for what is no wheel."""
    for name, parts in wheels(folder).items():
        if not is_for(name, version):
            continue
        with tempfile.TemporaryFile() as whole:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole)
            try:
                with zipfile.ZipFile(whole) as archive:
                    archive.extractall(site)
            except zipfile.BadZipFile as error:
                sys.exit(f"{name} is damaged, or its last part is missing: {error}")
        yield name


def main() -> None:
    folder, site = map(Path, sys.argv[1:])
    for name in unpack(folder, site, sys.version_info[:2]):
        print(name)


if __name__ == "__main__":
    main()
