"""The TensorRT plugin as TensorRT meets it: found by its parser, made from fields, and refused without its kernels.

What it computes is in tests/csrc/test_tensorrt_plugin.py.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from engine_doubles import at
from onnx import TensorProto, helper

from healthgpt_edge.bundle import Bundle
from healthgpt_edge.engines import (
    FORMAT,
    LANGUAGE,
    PLUGIN_VERSION,
    RECORD,
    VERSION,
    EngineEntry,
    EngineRecord,
    Settings,
    ingredients,
)
from healthgpt_edge.errors import ExecutorError
from healthgpt_edge.executors import hlora_plugin, tensorrt
from healthgpt_edge.executors.hlora_plugin import NAME, NAMESPACE, Linear, creator, register

# Its Python has the classes of plugins and its parser knows them, though its networks take none.
trt = pytest.importorskip("tensorrt_rtx")
LINEAR = Linear("x,weight,weight_scale,adapter_in,adapter_out,expert_of", "int4", 32, 64, 8, 128, 64, 80)
KERNELS = SimpleNamespace(hlora_linear_version=PLUGIN_VERSION)


def fields(linear: Linear, end: bytes = b"") -> list:
    """As a node's attributes reach a plugin, texts with the parser's zero behind, if that is asked for."""
    return [
        trt.PluginField(name, value.encode() + end, trt.PluginFieldType.CHAR)
        if isinstance(value, str)
        else trt.PluginField(name, np.array([value], np.int32), trt.PluginFieldType.INT32)
        for name, value in dataclasses.asdict(linear).items()
    ]


def plugin_of(linear: Linear = LINEAR, module=trt):
    given = fields(linear, b"\0")
    return creator(module, KERNELS, at).create_plugin("", trt.PluginFieldCollection(given), trt.TensorRTPhase.BUILD)


@pytest.fixture
def registry(monkeypatch):
    """TensorRT's registry without our plugin, before and after."""
    monkeypatch.setattr(hlora_plugin, "_creators", [])
    registry = trt.get_plugin_registry()
    yield registry
    for one in hlora_plugin._creators:
        registry.deregister_creator(one)


def test_it_is_registered_once(registry):
    for _ in range(2):
        register(trt, KERNELS, at)
    (made,) = hlora_plugin._creators
    found = registry.get_creator(NAME, str(PLUGIN_VERSION), NAMESPACE)
    assert found is made and [field.name for field in found.field_names] == list(dataclasses.asdict(LINEAR))


def test_tensorrts_parser_finds_it_and_hands_it_the_nodes_fields(registry, monkeypatch):
    """The parser of TensorRT-RTX ends the process where it would add a plugin's layer, so none is made."""
    register(trt, KERNELS, at)
    made, seen = hlora_plugin._creators[0], []

    def create(name, collection, phase):
        seen.append((phase, type(made).create_plugin(made, name, collection, phase).linear))

    monkeypatch.setattr(made, "create_plugin", create, raising=False)
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "S", 64]) for name in ("x", "y")]
    node = helper.make_node(NAME, ["x"], ["y"], domain="healthgpt.plugin")
    attributes = {"plugin_namespace": NAMESPACE, "plugin_version": str(PLUGIN_VERSION)} | dataclasses.asdict(LINEAR)
    node.attribute.extend(helper.make_attribute(name, one) for name, one in attributes.items())
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("healthgpt.plugin", 1)]
    model = helper.make_model(helper.make_graph([node], "g", value[:1], value[1:]), opset_imports=opsets)
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert not trt.OnnxParser(network, logger).parse(model.SerializeToString())
    assert seen == [(trt.TensorRTPhase.BUILD, LINEAR)]


def test_an_engine_keeps_all_that_it_is():
    plugin = plugin_of()
    assert plugin.linear == plugin.clone().linear == plugin.attach_to_context(None).linear == LINEAR
    kept = plugin.get_fields_to_serialize()
    again = creator(trt, KERNELS, at).create_plugin("", kept, trt.TensorRTPhase.RUNTIME)
    assert again.linear == LINEAR
    assert (plugin.plugin_name, plugin.plugin_namespace, plugin.plugin_version) == (NAME, NAMESPACE, "1")
    for kind in trt.PluginCapabilityType.__members__.values():
        assert plugin.get_capability_interface(kind) is plugin


def test_shapes_and_types_are_those_of_the_kernel():
    module = SimpleNamespace(**{name: getattr(trt, name) for name in dir(trt) if name[0] != "_"})
    module.DimsExprs = list  # TensorRT makes such expressions alone
    plugin = plugin_of(module=module)
    builder = SimpleNamespace(constant=lambda size: f"constant {size}")
    assert plugin.get_output_shapes([["one", "tokens", "channels"], ["n"]], [], builder) == [
        ["one", "tokens", "constant 32"]
    ]
    float32, int32, half = trt.DataType.FLOAT, trt.DataType.INT32, trt.DataType.HALF
    assert plugin.get_output_data_types([]) == [float32]
    expected = [float32, int32, float32, int32, int32, int32, float32]
    assert accepted(plugin) == [{kind} for kind in expected]
    assert accepted(plugin_of(dataclasses.replace(LINEAR, storage="float16"))) == [
        {half if name in ("weight", "adapter_in", "adapter_out") else kind}
        for name, kind in zip([*LINEAR.operands.split(","), "y"], expected, strict=True)
    ]


def accepted(plugin) -> list:
    """By place: the types that are taken without gaps, row by row; in no other format any is."""
    count = len(plugin.names) + 1

    def takes(place, kind, layout) -> bool:
        desc = SimpleNamespace(desc=SimpleNamespace(type=kind, format=layout))
        return plugin.supports_format_combination(place, [desc] * count, count - 1)

    kinds = trt.DataType.__members__.values()
    assert not any(takes(place, kind, trt.TensorFormat.CHW32) for place in range(count) for kind in kinds)
    return [{kind for kind in kinds if takes(place, kind, trt.TensorFormat.LINEAR)} for place in range(count)]


# --- without its kernels ---------------------------------------------------------------------------------------------

REFUSALS = [
    (None, r"the plugin needs our CUDA kernels: HEALTHGPT_CUDA=1 pip install \."),
    (SimpleNamespace(), "built with cuBLASLt, found some without"),
    (SimpleNamespace(hlora_linear_version=99), "CUDA kernels of version 1, found 99: build them from this source"),
]


@pytest.mark.parametrize(("kernels", "message"), REFUSALS)
def test_other_kernels_are_refused_before_an_engine_is_read(golden_bundle, tmp_path, monkeypatch, kernels, message):
    """The record is right and TensorRT is there; of the engine itself not a byte is looked at."""
    shutil.copytree(golden_bundle("qwen"), tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    settings = Settings("fp16", (), 64, 8, 64, plugin=True)
    entries = {
        name: EngineEntry(1, "0" * 64, ingredients(bundle.manifest, name, "tensorrt", "11.4", settings), 1.0)
        for name in (LANGUAGE, "comprehension.vision")
    }
    folder = bundle.path / "engines" / "tensorrt"
    folder.mkdir(parents=True)
    record = EngineRecord(FORMAT, VERSION, "tensorrt", "11.4", settings, entries)
    (folder / RECORD).write_text(record.to_json())
    monkeypatch.setattr(tensorrt, "import_tensorrt", lambda target: SimpleNamespace(__version__="11.4"))
    monkeypatch.setattr(tensorrt, "CudaDevice", lambda: SimpleNamespace(kernels=kernels, array=at))
    with pytest.raises(ExecutorError, match=message):
        tensorrt.TensorRtExecutor.open(bundle, ("comprehension",))
    # Without the plugin the engine, which is not there, is what comes next.
    plain = dataclasses.replace(settings, plugin=False)
    changed = dataclasses.replace(record, settings=plain).to_json()
    (folder / RECORD).write_text(changed)
    with pytest.raises(ExecutorError, match="engine language is stale: it was built from plugin 1, now it is nothing"):
        tensorrt.TensorRtExecutor.open(bundle, ("comprehension",))
    assert json.loads(changed)["settings"]["plugin"] is False
