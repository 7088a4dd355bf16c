"""The named nodes `Linear` and `CachedAttention`, each alone in a graph, by their standard bodies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from language_runs import as_stored
from onnx import TensorProto

from healthgpt_edge.export.graph.builder import GraphBuilder
from healthgpt_edge.export.graph.functions import cached_attention
from healthgpt_edge.export.graph.matrices import stored_linear
from healthgpt_edge.export.weights import WeightFile

FLOAT, FLOAT16, INT64, BOOL = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.BOOL


def run(graph: GraphBuilder, folder: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """All outputs, as the nodes are written: nothing optimised."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    path = folder / "graph.onnx"
    path.write_bytes(graph.model().SerializeToString())
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)


@pytest.mark.parametrize("data_type", [FLOAT, FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.INT4])
@pytest.mark.parametrize("shape", [[5, 70], [2, 3, 70]], ids=["rank-2", "rank-3"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["without-bias", "with-bias"])
def test_linear(tmp_path, data_type, shape, has_bias):
    """Also where the last block is not full."""
    random = np.random.default_rng(0)
    x, weight, bias = (random.standard_normal(size).astype(np.float32) for size in (shape, (24, 70), 24))
    graph = GraphBuilder("linear")
    with WeightFile(tmp_path / "weights.bin", "weights.bin") as file:
        added = graph.weight(file, "bias", FLOAT, lambda: bias) if has_bias else ""
        y = stored_linear(graph, graph.input("x", FLOAT, shape), file, "weight", data_type, 32, lambda: weight, added)
    graph.output(y, "y", FLOAT, [*shape[:-1], 24])
    (found,) = run(graph, tmp_path, {"x": x})
    expected = x @ as_stored(torch.from_numpy(weight), data_type, 32).numpy().T + (bias if has_bias else 0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def attend(folder: Path, cache_type: int, values: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Output, present keys and present values [B, K, M, D] of a node with caches of `cache_type`."""
    graph = GraphBuilder("attention")
    types = {"past_length": INT64, "visible": BOOL, "past_key": cache_type, "past_value": cache_type}
    inputs = [graph.input(name, types.get(name, FLOAT), list(value.shape)) for name, value in values.items()]
    last = ["present_key", "present_value"]
    output, *_ = graph.call(cached_attention(cache_type), *inputs, last=last, heads=4, kv_heads=2, window=0)
    graph.output(output, "output", FLOAT, list(values["query"].shape))
    for name in last:
        graph.output(name, name, cache_type, list(values["past_key"].shape))
    dtype = np.float16 if cache_type == FLOAT16 else np.float32
    return run(graph, folder, values | {name: values[name].astype(dtype) for name in ("past_key", "past_value")})


@pytest.fixture
def step() -> dict[str, np.ndarray]:
    """Two sequences of 3 and 1 tokens get 2 new ones: 4 heads of 8 numbers on 2 of keys and values, room for 6."""
    random = np.random.default_rng(0)
    sizes = {"query": (2, 2, 32), "key": (2, 2, 16), "value": (2, 2, 16), "angles": (2, 2, 4), "past": (2, 2, 2, 6, 8)}
    drawn = {name: random.standard_normal(size).astype(np.float16).astype(np.float32) for name, size in sizes.items()}
    angles, past = drawn.pop("angles"), drawn.pop("past")
    length = np.array([3, 1])
    visible = np.arange(6) <= length[:, None, None, None] + np.arange(2)[:, None]
    turn = {"cosine": np.cos(angles), "sine": np.sin(angles)}
    return drawn | turn | {"past_length": length, "visible": visible, "past_key": past[0], "past_value": past[1]}


def test_a_float16_cache_holds_the_rounded_rows(tmp_path, step):
    _, keys, values = attend(tmp_path, FLOAT, step)
    _, found_keys, found_values = attend(tmp_path, FLOAT16, step)
    assert found_keys.dtype == found_values.dtype == np.float16
    np.testing.assert_array_equal(found_keys, keys.astype(np.float16))
    np.testing.assert_array_equal(found_values, values.astype(np.float16))
    assert (found_keys != keys).any()
    for row, length in enumerate(step["past_length"]):
        kept = np.delete(np.arange(6), [length, length + 1])
        np.testing.assert_array_equal(found_keys[row][:, kept], step["past_key"][row][:, kept])


def test_attention_over_a_float16_cache_is_float32_arithmetic(tmp_path, step):
    """Where float16 holds every key and value, the type of the cache changes nothing."""
    step |= {"cosine": np.ones_like(step["cosine"]), "sine": np.zeros_like(step["sine"])}
    expected = attend(tmp_path, FLOAT, step)
    for found, same in zip(attend(tmp_path, FLOAT16, step), expected, strict=True):
        np.testing.assert_array_equal(found.astype(np.float32), same)
    # And rounding is seen at all.
    step["value"] = step["value"] * np.float32(1.0001)
    assert (attend(tmp_path, FLOAT16, step)[0] != attend(tmp_path, FLOAT, step)[0]).any()
