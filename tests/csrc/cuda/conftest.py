"""Where the CUDA kernels run: the module that HEALTHGPT_CUDA_MODULE names, on the host's fibers or on a GPU.

`tests/csrc/test_cuda.py` builds the host's module with sanitizers and runs this folder with it; `benchmarks/gpu.sh`
does so with the GPU's. Without the variable there is nothing to run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from device import Device

MODULE = os.environ.get("HEALTHGPT_CUDA_MODULE")
collect_ignore_glob = [] if MODULE else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> Device:
    assert MODULE is not None
    return Device(Path(MODULE))


@pytest.fixture
def host(device: Device) -> Any:
    """The kernels on the host's fibers, forward and without faults again afterwards."""
    if not device.is_host:
        pytest.skip("faults are planted on the host alone")
    yield device.kernels
    device.kernels.schedule("forward")
    device.kernels.mutate()
