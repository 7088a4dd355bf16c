"""That running on the host finds what it is there to find: every kernel with faults planted, and without."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
from operations import OPERATIONS

SCHEDULES = [("forward", 0), ("reverse", 0), *(("shuffled", seed) for seed in range(400))]
each_operation = pytest.mark.parametrize("name", OPERATIONS)


def outcome(device, name, schedule=SCHEDULES[0]):
    """What comes out by a schedule: bytes, or the error that was raised."""
    device.kernels.schedule(*schedule)
    try:
        return b"".join(array.tobytes() for array in OPERATIONS[name](device))
    except RuntimeError as error:
        return str(error)


def is_noticed(device, name, expected, **mutation):
    """Whether any schedule gives something else with a fault planted, or ends the process that tries it."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status) != 0
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    device.kernels.mutate(**mutation)
    os._exit(0 if all(outcome(device, name, schedule) == expected for schedule in SCHEDULES) else 1)


@each_operation
def test_no_schedule_changes_a_bit(device, host, name):
    expected = outcome(device, name)
    assert isinstance(expected, bytes)
    for schedule in SCHEDULES[1:5]:
        assert outcome(device, name, schedule) == expected
    assert all(np.isfinite(array.astype(np.float64)).all() for array in OPERATIONS[name](device))


@each_operation
def test_every_barrier_is_missed(device, host, name):
    host.barriers_met()
    expected = outcome(device, name)
    barriers = host.barriers_met()
    assert [one for one in barriers if not is_noticed(device, name, expected, drop_barrier=one)] == []


@each_operation
def test_a_missing_block_is_missed(device, host, name):
    assert is_noticed(device, name, outcome(device, name), drop_block=0)


@each_operation
def test_a_shifted_index_is_missed(device, host, name):
    """By the address sanitizer, or, where all memory is still within bounds, by what comes out."""
    assert is_noticed(device, name, outcome(device, name), shift_threads=1)
