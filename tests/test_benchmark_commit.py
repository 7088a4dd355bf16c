"""Results say what code they are of: in a clone, where git is not, and where only the package is."""

from __future__ import annotations

import argparse
import json
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks import __main__ as comparison
from benchmarks import commit as commit_module
from benchmarks import passes
from benchmarks.commit import commit
from benchmarks.pooled import Results


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=somebody", "-c", "user.email=somebody")
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """In the place of the repository's."""
    monkeypatch.delenv("COMMIT", raising=False)
    monkeypatch.setattr(commit_module, "ROOT", tmp_path)
    return tmp_path


def test_a_clone_says_its_head(root: Path) -> None:
    git(root, "init", "--quiet")
    git(root, "commit", "--quiet", "--allow-empty", "--message", "first")
    assert commit() == git(root, "rev-parse", "HEAD").strip()


def test_what_the_environment_says_comes_first(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMIT", "139d897")
    assert commit() == "139d897"


def test_without_a_clone_it_is_the_package(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = f"healthgpt-edge {metadata.version('healthgpt-edge')}"
    assert commit() == installed
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert commit() == installed


def test_results_of_the_cpu_hold_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMIT", "0123abc")
    options = {"bundle": root / "bundle", "threads": 1, "out": root, "work": root, "peers_python": None}
    arguments = argparse.Namespace(**options, repeat=1)
    comparison.write(arguments, 1, [], Results())
    assert json.loads((root / "comparison.json").read_text())["settings"]["commit"] == "0123abc"
    arguments = argparse.Namespace(**options | {"out": root / "rows.json"}, task="generation", context=1)
    passes.save(arguments, "rows", [])
    assert json.loads((root / "rows.json").read_text())["commit"] == "0123abc"
