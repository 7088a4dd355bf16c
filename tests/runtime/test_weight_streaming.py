"""How many of an engine's weights stay on a GPU that is too small for them, and what TensorRT is told and when."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engine_doubles import host_executor

from healthgpt_edge.bundle import Bundle
from healthgpt_edge.engines import FORMAT, LANGUAGE, VERSION, EngineEntry, EngineRecord
from healthgpt_edge.errors import ExecutorError
from healthgpt_edge.executors.tensorrt import kept_bytes
from healthgpt_edge.executors.tensorrt_context import caches_bytes
from healthgpt_edge.executors.tensorrt_engine import TensorRtEngine
from healthgpt_edge.executors.weight_streaming import MARGIN_BYTES, stream_weights
from healthgpt_edge.export.engines.build import default_settings

MIB = 1 << 20
WEIGHTS, SCRATCH = 1000 * MIB, (30 * MIB, 50 * MIB)  # of a profile; a pass that fetches weights needs 20 MiB more


class StreamingEngine:
    """TensorRT's engine as far as weights go; says what it was asked in which order."""

    num_io_tensors, num_optimization_profiles, streamable_weights_size = 0, 2, WEIGHTS

    def __init__(self) -> None:
        self.events: list[Any] = []
        self._budget = WEIGHTS

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        assert budget >= 0 and "context" not in self.events, "TensorRT refuses that"
        self._budget = budget
        self.events.append("budget")

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return SCRATCH[profile] + (20 * MIB if self._budget < WEIGHTS else 0)

    def create_execution_context(self, strategy: str) -> Any:
        self.events.append("context")
        return SimpleNamespace(
            set_optimization_profile_async=lambda profile, stream: True,
            set_device_memory=lambda address, size: self.events.append(size),
            execute_async_v3=lambda stream: True,
        )


@pytest.mark.parametrize(
    ("free", "budget"),
    [
        (2000, 1000),
        (1050, 1000),
        (1049, 979),
        (500, 430),
        (70, 0),
    ],
)
def test_as_many_weights_stay_as_fit_beside_the_workspace(free, budget):
    engine = StreamingEngine()
    assert stream_weights(engine, free * MIB) is (budget < 1000)
    assert engine.weight_streaming_budget_v2 == budget * MIB


@pytest.mark.parametrize(("free", "found"), [(69, 69), (0, 0), (-5, 0)])
def test_no_room_even_for_streaming_is_named(free, found):
    message = rf"streaming weights needs 70 MiB of the GPU beside caches and other engines, found {found}: build with"
    with pytest.raises(ExecutorError, match=message):
        stream_weights(StreamingEngine(), free * MIB)


class Device:
    """A GPU of so much free memory that captures no graph."""

    name, stream, compute_capability = "a GPU", 0, "8.9"

    def __init__(self, free_bytes: int) -> None:
        self.free_bytes = free_bytes
        self.captures = 0

        def call(name: str, *arguments: Any) -> int:
            self.captures += name == "cudaStreamBeginCapture"
            return 0

        self.call, modes = call, SimpleNamespace(cudaStreamCaptureModeThreadLocal=0)
        self.runtime = SimpleNamespace(cudaStreamCaptureMode=modes)


def load(
    free: int, kept: int | None, engine: StreamingEngine | None = None
) -> tuple[TensorRtEngine, StreamingEngine, Device]:
    engine, device = engine or StreamingEngine(), Device(free * MIB)
    trt = SimpleNamespace(
        __version__="11.4",
        ILogger=object,
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda data: engine),
        DataType=SimpleNamespace(FLOAT=0, HALF=1, BF16=2, INT64=3, UINT8=4),
        TensorIOMode=SimpleNamespace(INPUT=0),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=2),
    )
    kept_bytes = None if kept is None else kept * MIB
    loaded = TensorRtEngine(trt, "tensorrt", LANGUAGE, np.zeros(1, np.uint8), device, Path("no.jit"), kept_bytes)
    return loaded, engine, device


class FailingEngine(StreamingEngine):
    """Cannot do one thing: its contexts refuse a profile, or a pass."""

    def __init__(self, refuses: str) -> None:
        super().__init__()
        self._refuses = refuses

    def create_execution_context(self, strategy: str) -> Any:
        context = super().create_execution_context(strategy)
        setattr(context, self._refuses, lambda *arguments: False)
        return context


def test_a_profile_or_a_pass_that_tensorrt_refuses_is_an_error():
    with pytest.raises(ExecutorError, match=r"^tensorrt 11\.4 cannot run the engine language: it gave no reason$"):
        load(2000, None, FailingEngine("set_optimization_profile_async"))
    loaded, _, _ = load(2000, None, FailingEngine("execute_async_v3"))
    with pytest.raises(ExecutorError, match=r"^tensorrt 11\.4 failed in the engine language: it gave no reason$"):
        passes(loaded)


def passes(loaded: TensorRtEngine) -> None:
    workspace: Any = SimpleNamespace(address=256, size_bytes=loaded.workspace_bytes)
    for _ in range(3):
        loaded.run(0, {}, workspace)


def test_a_budget_is_set_before_there_are_contexts_and_its_workspace_is_given():
    loaded, engine, device = load(free=900, kept=300)
    assert loaded.streams and engine.weight_streaming_budget_v2 == 530 * MIB
    passes(loaded)
    assert engine.events[-5:] == ["context", "context", *[70 * MIB] * 3]
    assert device.captures == 0


@pytest.mark.parametrize("kept", [300, None])
def test_where_all_weights_fit_or_none_may_be_streamed_nothing_is(kept):
    loaded, engine, device = load(free=1350, kept=kept)
    assert not loaded.streams and engine.weight_streaming_budget_v2 == WEIGHTS
    assert (kept is None) == ("budget" not in engine.events)
    passes(loaded)
    assert engine.events[-1] == 50 * MIB and device.captures == 1


def test_what_is_kept_free_is_for_caches_and_for_engines_that_come_later(golden_bundle):
    manifest = Bundle.open(golden_bundle("m3")).manifest
    settings = default_settings(manifest, max_context=512, stream_weights=True)
    sizes = {"language": 1, "comprehension.vision": 2, "generation.vision": 4, "generation.codes": 8}
    sizes |= {"generation.draft": 16, "generation.vocabulary": 32}
    entries = {name: EngineEntry(size, "", {}, 0.0) for name, size in sizes.items()}
    record = EngineRecord(FORMAT, VERSION, "tensorrt", "11.4", settings, entries)
    language = manifest.language
    caches = 2 * language.layers * language.kv_heads * 512 * language.head_dim * 4  # float32 in this bundle
    assert caches_bytes(manifest, settings) == caches
    assert kept_bytes(manifest, record, ("comprehension", "generation")) == caches + 16 + 32 + MARGIN_BYTES
    assert kept_bytes(manifest, record, ("comprehension",)) == caches + MARGIN_BYTES
    plain = dataclasses.replace(record, settings=dataclasses.replace(settings, stream_weights=False))
    assert kept_bytes(manifest, plain, ("comprehension",)) is None


def test_the_language_engine_is_opened_last_and_a_result_says_that_it_streams(golden_bundle, tmp_path):
    bundle = Bundle.open(golden_bundle("m3"))
    settings = default_settings(bundle.manifest, max_context=512, max_rows=8)
    executor, _ = host_executor(bundle, ("comprehension",), settings, tmp_path)
    assert executor.name == "tensorrt"
    opened: list[str] = []

    def streaming(name: str) -> Any:
        opened.append(name)
        engine = executor.engine(name)
        engine.streams = name == LANGUAGE
        return engine

    again = type(executor)(bundle, ("comprehension",), executor.device, settings, streaming)
    assert opened == ["comprehension.vision", LANGUAGE] and again.name == "tensorrt+streaming"
