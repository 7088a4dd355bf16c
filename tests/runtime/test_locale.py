"""A device whose locale is not UTF-8: words, names of files and text come and go as they were given."""

import os
import shutil

import pytest
from command import run, run_process
from golden_cases import Case

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
