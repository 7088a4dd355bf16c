"""The native code as tests build it: one target, in a folder of theirs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pybind11

ROOT = Path(__file__).parents[2]
SANITIZED = ("-DSANITIZE=ON", "-DCMAKE_BUILD_TYPE=Debug")


def build(folder: Path, *targets: str, options: tuple[str, ...] = ()) -> None:
    """Configure the tree in `folder` and build targets; fails with what the compiler says."""
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    path = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in (configure, ["cmake", "--build", folder, "--target", *targets]):
        done = subprocess.run(command, env=path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
