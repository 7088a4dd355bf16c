"""The native code as tests build it: in folders that the next run finds again, to build only what has changed."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pybind11

ROOT = Path(__file__).parents[2]
# The target whose instructions are emulated under sanitizers, for which `make avx512` asks for Avx512.
EMULATED = os.environ.get("EMULATED", "AvxVnni")


def build(*targets: str, sanitized: bool = False) -> Path:
    """Build targets, with sanitizers or without, and give the folder they are in; fails with what the compiler says."""
    folder = ROOT / "build" / (f"tests-sanitized-{EMULATED.lower()}" if sanitized else "tests")
    folder.mkdir(parents=True, exist_ok=True)
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja"]
    configure += ["-DSANITIZE=ON", f"-DEMULATED={EMULATED}", "-DCMAKE_BUILD_TYPE=Debug"] if sanitized else []
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    path = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        for command in (configure, ["cmake", "--build", folder, "--target", *targets]):
            done = subprocess.run(command, env=path, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder
