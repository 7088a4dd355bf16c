"""Benchmarks of a bundle that somebody names say what is wrong with it as the commands do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "words", [["rows"], ["together"], ["threads"], ["drafting.laws", "--rows", "benchmarks/results/rows-m3.json"]]
)
def test_a_bundle_that_is_not_there(tmp_path, words):
    name, *options = words
    command = [sys.executable, "-m", f"benchmarks.{name}", tmp_path / "none", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: a bundle is a directory, found none at 'none'\n"
