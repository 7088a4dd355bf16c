"""The kernels' tests once more on a build with the address and undefined-behaviour sanitizers.

There an instruction set that this processor may not have is emulated: AVX-VNNI, or by `make avx512` AVX-512.
"""

import os
import platform
import shutil
import subprocess
import sys

import pytest
from cmake_build import ROOT, build

KERNELS = ("hlora_linear", "cached_attention", "packed_attention", "convolution")
TESTS = [ROOT / "tests" / "csrc" / f"test_{name}.py" for name in KERNELS]

# Runs pytest with the module at argv[1] in the place of the installed one.
RUN = """
import importlib.util, sys
import pytest
spec = importlib.util.spec_from_file_location("healthgpt_edge._kernels", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules[spec.name] = module
import healthgpt_edge
healthgpt_edge._kernels = module
sys.exit(pytest.main([*sys.argv[2:], "-x", "-p", "no:cacheprovider"]))
"""


@pytest.fixture(scope="module")
def sanitized():
    """The folder of a sanitized build."""
    return build("_kernels", "compare_targets", sanitized=True)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="emulates x86's instructions")
def test_emulated_instructions_do_what_they_stand_for(sanitized):
    build("check_emulation", sanitized=True)
    done = subprocess.run([sanitized / "check_emulation"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_instruction_sets_agree_under_sanitizers(sanitized):
    done = subprocess.run([sanitized / "compare_targets"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.skipif(shutil.which("g++") is None, reason="names GCC's sanitizer libraries")
def test_kernels_under_sanitizers(sanitized):
    (module,) = sanitized.glob("_kernels*.so")
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself keeps memory to its end
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(module), *map(str, TESTS)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "passed" in done.stdout and "failed" not in done.stdout
