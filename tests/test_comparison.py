"""The comparison keeps what it has measured, and says what the kernels ran on."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import __main__ as comparison
from benchmarks.contenders import Contender
from healthgpt_edge import machine

REPORT = {"version": "1", "note": "a double", "rows": [{"row": "linears", "task": "base", "samples_ms": [2.0]}]}
WORKS = Contender("works", lambda arguments, first: [sys.executable, "-c", f"print({json.dumps(REPORT)!r})"])
FAILS = Contender("fails", lambda arguments, first: [sys.executable, "-c", "raise SystemExit('no luck')"])


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the comparison of these contenders once, with these options, and returns the folder of its results."""

    def run(*contenders: Contender, options: tuple[str, ...] = ()) -> Path:
        monkeypatch.setattr(comparison, "CONTENDERS", contenders)
        monkeypatch.setattr(machine, "read_bandwidth", lambda threads: 1.0)
        words = ["benchmarks", str(tmp_path), "--bundle", str(tmp_path / "bundle"), "--rounds", "1", *options]
        monkeypatch.setattr("sys.argv", [*words, "--out", str(tmp_path)])
        comparison.main()
        return tmp_path

    return run


def test_an_interrupted_round_keeps_its_turns(compare, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="fails failed with code 1: no luck"):
        compare(WORKS, FAILS)
    (row,) = json.loads((tmp_path / "comparison.json").read_text())["contenders"]["works"]["rows"]
    assert row["p50_ms"] == 2
    assert "| works | linears | base | 2 |" in (tmp_path / "comparison.md").read_text()


def test_those_asked_for_run_in_the_order_of_asking(compare) -> None:
    others = [replace(WORKS, name=name) for name in ("first", "second")]
    folder = compare(*others, WORKS, options=("--only", "works", "--only", "first", "--only", "works"))
    assert list(json.loads((folder / "comparison.json").read_text())["contenders"]) == ["works", "first"]


@pytest.mark.parametrize(
    ("found", "said"), [("avx512 with amx", ", kernels by avx512 with amx,"), (None, ", no kernels built,")]
)
def test_the_page_says_what_the_kernels_ran_on(compare, monkeypatch: pytest.MonkeyPatch, found, said) -> None:
    monkeypatch.setattr(machine, "instruction_set", lambda: found)
    folder = compare(WORKS)
    assert said in (folder / "comparison.md").read_text()
    assert json.loads((folder / "comparison.json").read_text())["settings"]["instruction_set"] == found
