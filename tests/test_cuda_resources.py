"""Reading the compiler's report on the CUDA kernels, which a machine without nvcc cannot make."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.cuda_resources import Kernel, parse, table

REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4edge_17HLoraLinearKernelILNS0_7StorageE4ELi2EEEvNS1_7ProductE' for 'sm_90'
ptxas info    : Function properties for _ZN4edge_17HLoraLinearKernelILNS0_7StorageE4ELi2EEEvNS1_7ProductE
    24 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 16708 bytes smem
ptxas info    : Compiling entry function '_ZN4edge_20TokenSelectionKernelENS0_9ArgumentsE' for 'sm_90'
ptxas info    : Function properties for _ZN4edge_20TokenSelectionKernelENS0_9ArgumentsE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 58 registers, used 0 barriers
"""


def test_registers_shared_memory_and_spills_are_read():
    kernels = parse(REPORT, "90")
    assert kernels == [
        Kernel("HLoraLinearKernel, int4, row tiles 2", "90", 168, 16708, 20),
        Kernel("TokenSelectionKernel", "90", 58, 0, 0),
    ]
    text = table(kernels)
    assert "Spills: HLoraLinearKernel, int4, row tiles 2 on sm_90, 20 bytes." in text
    assert "| TokenSelectionKernel | 0 | 58 |" in text
