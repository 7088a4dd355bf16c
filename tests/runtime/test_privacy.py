"""What leaves the machine, and what is kept of a request: nothing."""

import subprocess
import sys

import pytest

QUESTION = "What is in the image?"


def files_at_home(home, *words):
    """What a process leaves in an empty home; in an environment of its own, for ONNX Runtime is silent under tests."""
    home.mkdir()
    done = subprocess.run([sys.executable, *map(str, words)], env={"HOME": str(home)}, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [path for path in home.rglob("*") if path.is_file()]


def test_onnxruntime_reports_to_nobody(golden_bundle, tmp_path):
    """Its telemetry would begin with an identifier of the machine and a store of events in the user's cache."""
    words = ("answer", golden_bundle("m3"), "--question", QUESTION, "--max-new-tokens", 4, "--threads", 1)
    assert files_at_home(tmp_path / "ours", "-m", "healthgpt_edge.cli", *words) == []
    if not files_at_home(tmp_path / "plain", "-c", "import onnxruntime"):
        pytest.skip("this ONNX Runtime keeps nothing, told or not")
