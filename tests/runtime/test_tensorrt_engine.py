"""What is said of an engine that TensorRT does not take, or of no GPU. (Doubles stand in for TensorRT and for CUDA.)"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from healthgpt_edge.errors import ExecutorError
from healthgpt_edge.executors.cuda import CudaDevice
from healthgpt_edge.executors.tensorrt_engine import TensorRtEngine

DEVICE: Any = SimpleNamespace(name="a GPU", compute_capability="8.9")


def load(target: str, **runtime: Any) -> None:
    flags = SimpleNamespace(__members__={"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2})
    trt = SimpleNamespace(
        __version__="1.2",
        ILogger=object,
        Runtime=lambda logger: SimpleNamespace(**runtime),
        EngineValidity=SimpleNamespace(INVALID="invalid"),
        EngineInvalidityDiagnostics=flags,
    )
    TensorRtEngine(trt, target, "language", np.zeros(8, np.uint8), DEVICE, Path("no.jit"))


def test_an_engine_that_is_not_taken_is_named() -> None:
    with pytest.raises(ExecutorError, match=r"^tensorrt 1\.2 cannot load the engine language: it gave no reason$"):
        load("tensorrt", deserialize_cuda_engine=lambda data: None)


@pytest.mark.parametrize(("found", "reason"), [(2, "unsupported cc"), (0, "it gave no reason")])
def test_an_engine_of_another_gpu_is_refused_with_what_to_do(found: int, reason: str) -> None:
    message = (
        r"^the engine language does not run on a GPU \(compute capability 8\.9\) with tensorrt-rtx 1\.2: "
        rf"{reason}; build it for this GPU$"
    )
    with pytest.raises(ExecutorError, match=message):
        load("tensorrt-rtx", engine_header_size=4, get_engine_validity=lambda header: ("invalid", found))


def test_a_machine_without_cuda_or_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(
        ExecutorError, match=r"^device cuda needs the module cuda\.bindings: pip install 'healthgpt-edge"
    ):
        CudaDevice()
    runtime = SimpleNamespace(cudaError_t=SimpleNamespace(cudaSuccess=0), cudaGetDeviceCount=lambda: (0, 0))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(runtime=runtime))
    with pytest.raises(ExecutorError, match=r"^device cuda needs an NVIDIA GPU, found none$"):
        CudaDevice()
