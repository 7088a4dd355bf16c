"""The CUDA kernels on this machine's CPU: tests/csrc/cuda, run on a sanitized build of the same sources."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from cmake_build import ROOT, build


@pytest.fixture(scope="module")
def environment():
    """The environment of a process that can load the sanitized module, which HEALTHGPT_CUDA_MODULE names."""
    (module,) = build("_cuda_host", sanitized=True).rglob("_cuda_host*.so")
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return os.environ | {
        "HEALTHGPT_CUDA_MODULE": str(module),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself keeps memory to its end
    }


@pytest.mark.skipif(shutil.which("g++") is None, reason="names GCC's sanitizer libraries")
def test_kernels_on_the_host_under_sanitizers(environment):
    command = [sys.executable, "-m", "pytest", ROOT / "tests" / "csrc" / "cuda", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    assert "passed" in done.stdout and "failed" not in done.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="names GCC's sanitizer libraries")
def test_the_gpu_benchmark_is_rehearsed(environment, tmp_path):
    """As far as a few seconds take it: what comes first is checked against PyTorch; the rest is named."""
    out = tmp_path / "rehearsal.json"
    command = [sys.executable, "-m", "benchmarks.gpu", environment["HEALTHGPT_CUDA_MODULE"], "--out", out]
    done = subprocess.run([*command, "--seconds", "0.5"], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads(out.read_text())
    assert results["machine"]["rehearsal"].startswith("the host's fibers")
    (step,) = results["m3 decode step, float16"]
    assert step["error"] < 1e-4 and step["original_eager"]["n"] == 1
    assert "attention" in results["not_reached"] and results["attention"] == []
