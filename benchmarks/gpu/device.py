"""Where the benchmark runs: on a GPU, timed by events, or rehearsed on the host's fibers, whose times mean nothing."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def summary(samples: list[float]) -> dict[str, float]:
    """The percentiles of samples in milliseconds."""
    ordered = sorted(samples)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 6)

    return {"p50_ms": at(0.5), "p90_ms": at(0.9), "p99_ms": at(0.99), "n": len(ordered)}


class Device:
    """The kernels, and the timing of calls."""

    def __init__(self, module: Path) -> None:
        self.rehearses = module.name.startswith("_cuda_host")
        self.name = "cpu" if self.rehearses else "cuda"
        spec = importlib.util.spec_from_file_location("_cuda_host" if self.rehearses else "_cuda", module)
        assert spec is not None and spec.loader is not None
        self.kernels: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.kernels)
        self.generator = torch.Generator(self.name).manual_seed(0)

    @property
    def stream(self) -> int:
        return 0 if self.rehearses else torch.cuda.current_stream().cuda_stream

    def description(self) -> dict[str, Any]:
        facts = {"torch": torch.__version__, "cuda": torch.version.cuda}
        if self.rehearses:
            return {"rehearsal": "the host's fibers: the times mean nothing", **facts}
        properties = torch.cuda.get_device_properties(0)
        return {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            **facts,
        }

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.name).mul_(scale).to(dtype)

    def integers(self, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.name, dtype=dtype)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.name)

    def poisoned(self, *shape: int) -> torch.Tensor:
        return torch.full(shape, torch.nan, device=self.name)

    def copies(self, size_bytes: int) -> int:
        """How many sets of operands to use in turn, so that none is read from the L2 cache."""
        if self.rehearses:
            return 2
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        return max(2, min(64, -(-4 * cache // size_bytes)))

    def captured(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call as a CUDA graph, captured after a first call to warm up."""
        if self.rehearses:
            return call
        torch.cuda.synchronize()  # the other stream does not wait until the operands are made
        with torch.cuda.stream(torch.cuda.Stream()):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def seconds(self, call: Callable[[], Any]) -> float:
        """The elapsed time of a call, from an idle device to an idle device."""
        self.synchronize()
        begin = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - begin

    def synchronize(self) -> None:
        if not self.rehearses:
            torch.cuda.synchronize()

    def measure(self, calls: list[Callable[[], Any]], graph: bool = True, samples: int = 30) -> dict[str, float]:
        """Milliseconds per call of `calls`, made in turn, as a CUDA graph or as separate launches."""

        def run_all() -> None:
            for call in calls:
                call()

        if self.rehearses:
            return summary([self.seconds(run_all) * 1e3 / len(calls)])
        replay = self.captured(run_all) if graph else run_all
        for _ in range(3):
            replay()
        times = []
        for _ in range(samples):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / len(calls))
        return summary(times)


class WrongResult(Exception):
    """An operation to be timed gives a wrong result."""


def check(name: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> float:
    """The largest difference relative to the largest expected value. Raises WrongResult if it is too large or NaN."""
    error = float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
    if not error <= tolerance:
        raise WrongResult(f"{name} is wrong by {error:.2e}, allowed are {tolerance:.0e}")
    return error
