"""The TensorRT plugin's `enqueue` on the host's fibers, in the graphs that TensorRT gets of the trained phantom.

All but TensorRT and the time that things take is as on a GPU: the graph and its weights, the plugin made from a node's
fields, operands by address, and the kernels' own sources.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
from cmake_build import ROOT, build
from command import export_options, run
from engine_doubles import at
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from healthgpt_edge.bundle import Bundle
from healthgpt_edge.engines import LANGUAGE, engine_graphs
from healthgpt_edge.executors.hlora_plugin import creator
from healthgpt_edge.export.bundle import export_bundle
from healthgpt_edge.export.checkpoint import Checkpoint
from healthgpt_edge.export.engines.build import default_settings, engine_model
from healthgpt_edge.export.engines.graphs import attribute, rows_of, values_of
from healthgpt_edge.export.engines.plugin import DOMAIN
from healthgpt_edge.export.phantom.release import released_files
from healthgpt_edge.export.quantize import dequantise
from healthgpt_edge.export.weights import WeightFile

# Its Python has the classes of plugins, though its networks take none.
trt = pytest.importorskip("tensorrt_rtx")
PRECISIONS, TASKS = ("fp16", "int8", "int4"), ("comprehension", "generation")
BLOCK_SIZE, MAX_CONTEXT, MAX_ROWS = 32, 128, 8
# Of the largest result. Up to 64 rows x is the sum of two float16, above it is rounded to one.
FEW_ROWS, MANY_ROWS = 3e-6, 1e-3
# Of two whole graphs' results, by their norms (found at most 0.004, 0.020, 0.019): the bodies beside the plugin round
# every product to float16, and in int8 and int4 ONNX Runtime rounds what is multiplied to 8 bits.
GRAPHS = {"fp16": 8e-3, "int8": 4e-2, "int4": 4e-2}


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    (path,) = build("_cuda_host").rglob("_cuda_host*.so")
    spec = importlib.util.spec_from_file_location("_cuda_host", path)
    module = sys.modules["_cuda_host"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def language_graph(bundle: Bundle, plugin: bool) -> Path:
    """The language graph that TensorRT gets, written into the bundle."""
    settings = default_settings(bundle.manifest, max_context=MAX_CONTEXT, max_rows=MAX_ROWS, plugin=plugin)
    path = bundle.path / f"plugin-{plugin}.onnx"
    with WeightFile(path.with_suffix(".bin"), f"{path.stem}.bin") as stacked:
        model = engine_model(bundle, LANGUAGE, engine_graphs(bundle.manifest)[LANGUAGE], settings, stacked)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Gives the phantom's bundle in a precision, and its language graph for TensorRT with or without the plugin."""

    @cache
    def bundle(precision: str) -> Bundle:
        folder = tmp_path_factory.mktemp(precision) / "bundle"
        with Checkpoint.open(**released_files(ROOT / "phantom")) as checkpoint:
            export_bundle(checkpoint, folder, precision=precision, block_size=BLOCK_SIZE)
        return Bundle.open(folder)

    @cache
    def give(precision: str, plugin: bool) -> tuple[Bundle, Path]:
        return bundle(precision), language_graph(bundle(precision), plugin)

    return give


def run_plugin(kernels: ModuleType, fields: dict[str, str | int], inputs: list[np.ndarray]) -> np.ndarray:
    """What a plugin that is made from a node's fields, as TensorRT's parser gives them, orders for these inputs."""
    kinds = trt.PluginFieldType
    given = [
        trt.PluginField(name, value.encode() + b"\0", kinds.CHAR)
        if isinstance(value, str)
        else trt.PluginField(name, np.array([value], np.int32), kinds.INT32)
        for name, value in fields.items()
    ]
    made = creator(trt, kernels, at).create_plugin("", trt.PluginFieldCollection(given), trt.TensorRTPhase.BUILD)
    # What is written into an engine makes it again.
    again = creator(trt, kernels, at).create_plugin("", made.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    plugin = again.attach_to_context(None)
    described = trt.PluginTensorDesc()
    described.dims = trt.Dims(inputs[0].shape)
    held = [np.ascontiguousarray(one) for one in inputs]
    y = np.full((*inputs[0].shape[:-1], plugin.linear.outputs), np.nan, np.float32)
    plugin.enqueue([described], [None], [one.ctypes.data for one in held], [y.ctypes.data], 0, 0)
    return y


def fields_of(node: onnx.NodeProto) -> dict[str, str | int]:
    values = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
    return {
        name: value.decode() if isinstance(value, bytes) else value
        for name, value in values.items()
        if not name.startswith("plugin_")
    }


class TaskLinear:
    """One linear of one task's own graph in the bundle, by the formula in float64."""

    def __init__(self, bundle: Bundle, task: str, plugin: onnx.NodeProto) -> None:
        graph = onnx.load(bundle.graph(task, LANGUAGE), load_external_data=False).graph
        weight = plugin.input[1].removesuffix("/words")
        (node,) = (one for one in graph.node if weight in one.input)  # the linear, whatever stands around it
        stored = {tensor.name: tensor for tensor in graph.initializer}
        block_size, self.experts = attribute(node, "block_size"), attribute(node, "experts")

        def matrix(index: int) -> np.ndarray:
            values = rows_of(stored[node.input[index]], bundle.path).astype(np.float64)
            scales = node.input[index + 1]
            return dequantise(values, rows_of(stored[scales], bundle.path), block_size) if scales else values

        self.weight, self.adapter_in, self.adapter_out = (matrix(index) for index in (1, 4, 6))
        self.bias = values_of(stored[node.input[3]], bundle.path) if node.input[3] else None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        rank = len(self.adapter_out)
        low = x.astype(np.float64) @ self.adapter_in
        routes = np.exp(low[..., rank:] - low[..., rank:].max(-1, keepdims=True))
        gate = np.repeat(routes / routes.sum(-1, keepdims=True), rank // self.experts, axis=-1)
        y = x @ self.weight + (gate * low[..., :rank]) @ self.adapter_out
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rows", [1, 7, 40, 70])
def test_every_linear_is_that_of_the_task_alone(graphs, kernels, precision, rows):
    """Both tasks in the one node that holds the plugins of both; few rows, two launches of them, and a prefill's."""
    bundle, path = graphs(precision, True)
    graph = onnx.load(path, load_external_data=False).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.domain == DOMAIN]
    silence = values_of(stored["silence_of_task"], path.parent)
    assert len(nodes) == 4 * bundle.manifest.language.layers
    for node in nodes[:4] + nodes[-1:]:  # the four of a layer, and the last of all
        fields = fields_of(node)
        for task in TASKS:
            expected = TaskLinear(bundle, task, node)
            x = np.random.default_rng(rows).standard_normal((1, rows, len(expected.weight))).astype(np.float32)
            known = {node.input[0]: x, "silence": silence[TASKS.index(task)][None]}
            inputs = [known[name] if name in known else values_of(stored[name], path.parent) for name in node.input]
            found, wanted = run_plugin(kernels, fields, inputs), expected(x)
            tolerance = (FEW_ROWS if rows <= 64 else MANY_ROWS) * np.abs(wanted).max()
            np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)
            # The task makes a difference that would be seen.
            inputs[-1] = silence[1 - TASKS.index(task)][None]
            assert np.abs(run_plugin(kernels, fields, inputs) - wanted).max() > 10 * tolerance


@pytest.mark.parametrize("rows", [2, 66])
def test_linears_of_one_task_and_with_a_bias(kernels, tmp_path, rows):
    """A system with comprehension alone: nothing is silent, the rank of 8 is filled up, some linears have a bias."""
    outcome = run("export", *export_options("qwen"), "--precision", "fp16", "--out", tmp_path / "qwen")
    assert outcome.code == 0, outcome.errors
    bundle = Bundle.open(tmp_path / "qwen")
    path = language_graph(bundle, True)
    graph = onnx.load(path, load_external_data=False).graph
    stored, biases = {tensor.name: tensor for tensor in graph.initializer}, 0
    for node in (node for node in graph.node if node.domain == DOMAIN):
        expected, fields = TaskLinear(bundle, "comprehension", node), fields_of(node)
        x = np.random.default_rng(rows).standard_normal((1, rows, len(expected.weight))).astype(np.float32)
        inputs = [x, *(values_of(stored[name], path.parent) for name in node.input[1:])]
        found, wanted = run_plugin(kernels, fields, inputs), expected(x)
        tolerance = (FEW_ROWS if rows <= 64 else MANY_ROWS) * np.abs(wanted).max()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)
        biases += expected.bias is not None
    assert biases > 0


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rows", [3, 70])
def test_a_whole_graph_gives_the_logits_of_the_one_without(graphs, kernels, precision, rows):
    class HLoraLinear(OpRun):
        op_domain = DOMAIN

        def _run(self, *inputs, **attributes):
            fields = {name: value for name, value in attributes.items() if not name.startswith("plugin_")}
            return (run_plugin(kernels, fields, list(inputs)),)

    (_, with_plugin), (bundle, without) = graphs(precision, True), graphs(precision, False)
    evaluator = ReferenceEvaluator(str(with_plugin), new_ops=[HLoraLinear])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(without), options)
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    for index, task in enumerate(TASKS):
        feeds = {
            node.name: np.zeros([size if isinstance(size, int) else 1 for size in node.shape], types[node.type])
            for node in session.get_inputs()
        }
        random = np.random.default_rng(index)
        feeds["token_ids"] = random.integers(0, bundle.manifest.language.vocab, (1, rows))
        feeds["task"][0], feeds[f"last_positions.{task}"][0] = index, min(rows, MAX_ROWS)
        names = [f"logits.{task}", f"present_key_values.{bundle.manifest.language.layers - 1}.key"]
        for found, expected in zip(evaluator.run(names, feeds), session.run(names, feeds), strict=True):
            assert found.shape == expected.shape and math.prod(found.shape) > 0
            distance = np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64))
            assert distance < GRAPHS[precision]
