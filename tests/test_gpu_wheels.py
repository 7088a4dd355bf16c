"""Wheels that come to a machine without a network, some in parts."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu.wheels import is_for, unpack


def write_wheel(path: Path, module: str) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{module}.py", "value = 1\n")
    return path.read_bytes()


def test_wheels_are_joined_and_unpacked(tmp_path):
    folder, site = tmp_path / "wheels", tmp_path / "site"
    folder.mkdir()
    write_wheel(folder / "small-1-py3-none-any.whl", "small")
    write_wheel(folder / "other-1-cp311-cp311-linux_x86_64.whl", "other")
    (folder / "README").write_text("no wheel")
    name = "large-1-cp312-cp312-linux_x86_64.whl"
    data = write_wheel(tmp_path / name, "large")
    size = len(data) // 12
    for i in range(12):
        (folder / f"{name}.{i:02}").write_bytes(data[i * size : (i + 1) * size if i < 11 else None])
    assert list(unpack(folder, site, (3, 12))) == [name, "small-1-py3-none-any.whl"]
    assert {path.name for path in site.iterdir()} == {"large.py", "small.py"}
    (folder / f"{name}.11").unlink()
    with pytest.raises(SystemExit, match=f"{name} is damaged, or its last part is missing"):
        list(unpack(folder, site, (3, 12)))
    (folder / f"{name}.04").unlink()
    with pytest.raises(SystemExit, match=f"part 4 of {name} is missing, found {name}.05"):
        list(unpack(folder, site, (3, 12)))


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("a-1-py3-none-any.whl", True),
        ("a-1-py2.py3-none-any.whl", True),
        ("a-1-cp39-abi3-manylinux_2_28_x86_64.whl", True),
        ("a-1-cp312-cp312-manylinux_2_28_x86_64.whl", True),
        ("a-1-cp311-cp311-manylinux_2_28_x86_64.whl", False),
        ("a-1-cp312-cp312t-manylinux_2_28_x86_64.whl", False),
    ],
)
def test_which_wheels_are_for_a_python(name, fits):
    assert is_for(name, (3, 12)) == fits
