"""A device whose locale is not UTF-8: words, names of files and text come and go as they were given."""

import json
import os
import shutil

import pytest
from command import run, run_process
from dicom_samples import real_file
from golden_cases import Case
from peer import ASK, line, process

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "Größe 骨.png"
    path.write_bytes(Case("m3_com_square").image.read_bytes())
    return path


def test_a_question_means_the_same_in_every_locale(golden_bundle, picture):
    words = ["answer", golden_bundle("m3"), "--question", "Größe der Läsion? 骨", "--image", picture]
    options = ["--max-new-tokens", "3", "--threads", "1", "--json"]
    outcome = run_process(*words, *options, **ASCII)
    assert outcome.errors == ""
    assert outcome.json["prompt_ids"] == run(*words, *options).json["prompt_ids"]


def test_an_instruction_means_the_same_in_every_locale(golden_bundle, picture, tmp_path):
    words = ["generate", golden_bundle("m3"), "--image", picture, "--out", tmp_path / "gemälde.png"]
    # Read and cut at once, for a whole picture takes its time.
    options = ["--instruction", "Größer! 骨", "--faithful", "--max-new-tokens", "1", "--threads", "1"]
    said = run_process(*words, *options, **ASCII).errors
    assert said == run(*words, *options).errors
    assert "needs exactly 1024 codes" in said


@pytest.mark.parametrize("name", [b"b\xc3\xbcndel", b"b\xfcndel"], ids=["UTF-8", "none"])
def test_a_bundle_may_lie_anywhere(golden_bundle, tmp_path, name):
    """Under a name that is no text in this locale, or in none."""
    path = tmp_path / os.fsdecode(name)
    shutil.copytree(golden_bundle("m3"), path)
    words = ["--question", "What?", "--max-new-tokens", "3", "--threads", "1", "--json"]
    outcome = run_process("answer", path, *words, **ASCII)
    assert outcome.errors == ""
    assert outcome.json["token_ids"] == run("answer", golden_bundle("m3"), *words).json["token_ids"]


def test_lines_of_json_name_files_in_utf8(golden_bundle, picture, tmp_path, monkeypatch):
    """A line is UTF-8, paths and all, whatever the locale."""
    for name, value in ASCII.items():
        monkeypatch.setenv(name, value)
    shutil.copy(real_file("CT_small.dcm"), tmp_path / "Größe.dcm")
    out = tmp_path / "Befund 骨.dcm"
    server = process(golden_bundle("m3"))
    output, errors = server.communicate(
        line(ASK | {"image": str(tmp_path / "Größe.dcm"), "out": str(out)}), timeout=120
    )
    assert (server.returncode, errors) == (0, b"")
    assert json.loads(output.splitlines()[-1])["report"] == str(out)
    assert out.is_file()

    cases = tmp_path / "cases.jsonl"
    cases.write_bytes(line(ASK | {"image": picture.name, "expected": "Yes"}))
    outcome = run_process("evaluate", golden_bundle("m3"), "--cases", cases, "--threads", "1", "--json", **ASCII)
    assert (outcome.code, outcome.errors) == (0, "")


def test_a_path_is_told_as_it_was_given(golden_bundle, tmp_path):
    """In the bytes that the shell gave, so that a script finds the file; in JSON, which is text, as text."""
    words = ["generate", golden_bundle("m3"), "--instruction", "Draw.", "--threads", "1"]
    out = tmp_path / "gemälde.png"
    assert run_process(*words, "--out", out, **ASCII).output == f"{out}\n"
    assert run_process(*words, "--out", out, "--json", **ASCII).json["image"] == str(out)
    latin = tmp_path / os.fsdecode(b"gem\xe4lde.png")
    assert run_process(*words, "--out", latin).output == f"{latin}\n"
    assert latin.exists()
