"""Every kernel once, for compute-sanitizer to look on: `compute-sanitizer python run_operations.py`."""

from __future__ import annotations

import os
from pathlib import Path

from device import Device
from operations import OPERATIONS

if __name__ == "__main__":
    device = Device(Path(os.environ["HEALTHGPT_CUDA_MODULE"]))
    for name, operation in OPERATIONS.items():
        operation(device)
        print(name)
