"""How a signal ends the process where a library stands between it and the command line."""

import importlib
import os
import signal
import sys
import threading
import time
from unittest import mock

import pytest
from command import run

from healthgpt_edge.stopping import stopping_cleanly

# As many libraries have it for what they can do without.
TOLERANT = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)
except BaseException:
    raise ImportError("initialization failed")
"""


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers():
    """Those of a command in a terminal; behind `&` or `nohup` the tests themselves ignore some.

    The tests' own are back after each: what is stopped ends, and goes on ignoring signals.
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield usual
    for number, handler in before.items():
        signal.signal(number, handler)


def test_only_a_signal_changes_how_the_next_is_taken(handlers):
    with stopping_cleanly(ends_process=True):
        pass
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers


def test_a_second_signal_does_not_cut_the_end_short():
    with pytest.raises(SystemExit) as caught, stopping_cleanly(ends_process=True):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert caught.value.code == 130
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)


@pytest.mark.parametrize("ends_process", [False, True])
def test_signals_that_come_together_are_one_without_a_word(ends_process):
    told = []
    with mock.patch.object(sys, "unraisablehook", told.append):
        with pytest.raises(SystemExit) as caught, stopping_cleanly(ends_process):
            # As during a long pass: Python hears of both when it is over. To this thread, because others block nothing.
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                for number in (signal.SIGTERM, signal.SIGHUP):
                    signal.pthread_kill(threading.get_ident(), number)
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            time.sleep(0.05)
        signal.pthread_sigmask(signal.SIG_BLOCK, ())  # for Python to look for what is left
    assert caught.value.code in (128 + signal.SIGTERM, 128 + signal.SIGHUP)
    assert not told


def test_a_signal_during_an_import_comes_after_it(tmp_path, monkeypatch):
    (tmp_path / "interrupted.py").write_text(TOLERANT)
    monkeypatch.syspath_prepend(tmp_path)
    imported = False
    with pytest.raises(SystemExit) as caught, stopping_cleanly():
        importlib.import_module("interrupted")
        imported = True
        while True:
            pass
    assert imported and caught.value.code == 143


class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)


def test_a_signal_where_nothing_can_be_raised_comes_again():
    with pytest.raises(SystemExit) as caught, stopping_cleanly():
        Finalized()
        while True:
            pass
    assert caught.value.code == 143


def test_other_errors_of_finalizers_are_told_as_ever():
    class Wrong:
        def __del__(self):
            raise ValueError("told")

    before, told = sys.unraisablehook, []
    with mock.patch.object(sys, "unraisablehook", told.append), stopping_cleanly():
        Wrong()
    assert [str(one.exc_value) for one in told] == ["told"] and sys.unraisablehook is before


def test_a_library_that_cannot_be_imported_is_one_line(tmp_path):
    with mock.patch.dict(sys.modules, {"healthgpt_edge.bundle": None}):
        outcome = run("inspect", tmp_path)
    assert (outcome.code, outcome.output) == (2, "")
    assert outcome.errors == "error: import of healthgpt_edge.bundle halted; None in sys.modules\n"
