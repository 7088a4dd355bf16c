"""Standard streams: which may be closed, and what a terminal is spared that files and programs get."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from command import run, run_closed
from golden_cases import Case


def on_a_terminal(*words, kind="xterm"):
    """What a terminal of a kind gets of `healthgpt-edge WORDS`, its line ends as they were written."""
    ours, theirs = pty.openpty()
    try:
        command = [sys.executable, "-m", "healthgpt_edge.cli", *map(str, words)]
        child = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": kind})
        os.close(theirs)
        said = b""
        while piece := _read(ours):
            said += piece
        assert child.wait(60) == 0
    finally:
        os.close(ours)
    return said.decode().replace("\r\n", "\n")


def _read(terminal):
    try:
        return os.read(terminal, 4096)
    except OSError:  # how Linux says that nobody writes to a terminal any more
        return b""


def test_control_characters_of_an_answer_are_not_for_a_terminal(golden_bundle):
    case = Case("m3_com_square")
    words = ["answer", golden_bundle("m3"), "--question", case.question, "--image", case.image, "--threads", "1"]
    text = run(*words, "--json").json["text"]
    assert run(*words).output == text + "\n"
    controls = {letter for letter in text if ord(letter) < 32 or 127 <= ord(letter) < 160} - set("\t\n")
    assert controls, "random weights write some; otherwise this test needs another question"
    shown = on_a_terminal(*words)
    for letter in controls:
        text = text.replace(letter, "\ufffd")
    # Behind what bars of progress leave, which are on stderr and on the same terminal here.
    bars = shown.removesuffix(text + "\n")
    assert bars != shown and "verify" in bars and "prompt" in bars


def test_progress_ends_where_the_codes_do(golden_bundle, tmp_path):
    words = ["generate", golden_bundle("m3"), "--instruction", "Draw.", "--out", tmp_path / "made.png"]
    shown = on_a_terminal(*words, "--threads", "1")
    assert "1024/1024" in shown and "1025/" not in shown


def test_a_terminal_that_cannot_redraw_a_line_gets_no_progress(golden_bundle):
    words = ["verify", golden_bundle("m3")]
    assert on_a_terminal(*words, kind="dumb") == run(*words).output


@pytest.mark.parametrize("words", [["inspect"], ["verify", "--json"], ["answer", "--question", "Why?"]])
def test_results_need_a_stdout(golden_bundle, words):
    outcome = run_closed(1, words[0], golden_bundle("m3"), *words[1:])
    assert (outcome.code, outcome.output, outcome.errors) == (2, "", "error: results go to stdout, found it closed\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])  # what prints a line may see the error, or nobody until the end
@pytest.mark.parametrize("words", [["inspect"], ["inspect", "--json"], ["answer", "--question", "Why?"]])
def test_a_stdout_that_takes_no_results_is_one_line(golden_bundle, words, unbuffered):
    command = [sys.executable, "-m", "healthgpt_edge.cli", words[0], golden_bundle("m3"), *words[1:]]
    readable, unread = os.pipe()
    os.close(readable)
    disk = os.open("/dev/full", os.O_WRONLY)
    for stdout, message in ((unread, "Broken pipe"), (disk, "No space left on device")):
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=environment, timeout=60)
        os.close(stdout)
        assert (done.returncode, done.stderr.decode()) == (2, f"error: {message}\n")


def with_stderr_full(*words):
    """Exit code and stdout of `healthgpt-edge WORDS` where the disk that stderr goes to is full."""
    command = [sys.executable, "-m", "healthgpt_edge.cli", *map(str, words)]
    with Path("/dev/full").open("wb", buffering=0) as disk:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=disk, timeout=60)
    return done.returncode, done.stdout.decode()


def test_a_stderr_that_takes_nothing_changes_no_exit_code(tmp_path):
    assert with_stderr_full("inspect", tmp_path) == (2, "")
    assert with_stderr_full("inspect") == (2, "")


def test_a_note_that_nobody_takes_costs_no_result(golden_bundle):
    code, output = with_stderr_full("serve", golden_bundle("m3"), "--no-kernels", "--together", 2, "--threads", 1)
    assert code == 0 and '"event": "ready"' in output and '"together": 1' in output


def test_without_stderr_errors_go_nowhere_and_not_to_stdout(golden_bundle, tmp_path):
    outcome = run_closed(2, "inspect", tmp_path)
    assert (outcome.code, outcome.output, outcome.errors) == (2, "", "")
    assert run_closed(2, "verify", golden_bundle("m3"), "--json").json["ok"]
