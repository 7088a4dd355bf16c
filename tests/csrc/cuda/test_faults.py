"""That running on the host finds what it is there to find: every kernel with faults planted, and without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from operations import OPERATIONS

SCHEDULES = [("forward", 0), ("reverse", 0), ("shuffled", 1), ("shuffled", 2)]
each_operation = pytest.mark.parametrize("name", OPERATIONS)


def outcomes(device, name):
    """What comes out by each schedule: bytes, or the error that was raised."""
    found = []
    for order, seed in SCHEDULES:
        device.kernels.schedule(order, seed)
        try:
            found.append(b"".join(array.tobytes() for array in OPERATIONS[name](device)))
        except RuntimeError as error:
            found.append(str(error))
    return found


@each_operation
def test_no_schedule_changes_a_bit(device, host, name):
    found = outcomes(device, name)
    assert isinstance(found[0], bytes)
    assert found == [found[0]] * len(SCHEDULES)
    assert all(np.isfinite(array.astype(np.float64)).all() for array in OPERATIONS[name](device))


@each_operation
def test_every_barrier_is_missed(device, host, name):
    host.barriers_met()
    expected = outcomes(device, name)[0]
    barriers = host.barriers_met()
    unnoticed = []
    for barrier in range(barriers):
        host.mutate(drop_barrier=barrier)
        if outcomes(device, name) == [expected] * len(SCHEDULES):
            unnoticed.append(barrier)
        host.mutate()
    assert not unnoticed, f"of {barriers}"


@each_operation
def test_a_missing_block_is_missed(device, host, name):
    (expected,) = set(outcomes(device, name))
    host.mutate(drop_block=0)
    assert expected not in outcomes(device, name)


@each_operation
def test_a_shifted_index_ends_the_program(device, host, name):
    """By the address sanitizer, or, where all memory is still within bounds, by what comes out."""
    (expected,) = set(outcomes(device, name))
    program = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from device import Device
from operations import OPERATIONS
device = Device(Path({os.environ["HEALTHGPT_CUDA_MODULE"]!r}))
device.kernels.mutate(shift_threads=1)
sys.stdout.write(b"".join(array.tobytes() for array in OPERATIONS[{name!r}](device)).hex())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode != 0 or done.stdout != expected.hex()
