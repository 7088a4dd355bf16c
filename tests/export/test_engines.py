"""Engines built by TensorRT-RTX where there is no GPU: what it makes of our graphs, and when an engine is refused."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from command import run
from onnx import TensorProto, helper, numpy_helper

from healthgpt_edge import engines
from healthgpt_edge.bundle import Bundle
from healthgpt_edge.engines import LANGUAGE, check_fresh, engine_graphs, ingredients, read_engine, read_record
from healthgpt_edge.errors import ExecutorError
from healthgpt_edge.export.bundle import export_bundle
from healthgpt_edge.export.checkpoint import Checkpoint
from healthgpt_edge.export.demo import PHANTOM
from healthgpt_edge.export.engines.build import Compiler, default_settings, engine_model, new_folder
from healthgpt_edge.export.engines.graphs import location_of, read_graph, values_of
from healthgpt_edge.export.engines.lower import lower
from healthgpt_edge.export.engines.merge import merge
from healthgpt_edge.export.engines.plugin import DOMAIN, KERNEL, use_plugin
from healthgpt_edge.export.graph.builder import GraphBuilder
from healthgpt_edge.export.graph.functions import linear
from healthgpt_edge.export.phantom.release import released_files
from healthgpt_edge.export.quantize import quantise
from healthgpt_edge.export.weights import WeightFile

trt = pytest.importorskip("tensorrt_rtx")
TARGET, GPU = "tensorrt-rtx", "8.9"
BLOCK_SIZE, MAX_CONTEXT = 32, 512
NAMES = {"language", "comprehension.vision"} | {
    f"generation.{role}" for role in ("vision", "codes", "draft", "vocabulary")
}


def export(folder: Path, precision: str, cache: str | None = None, layout: str = "panels") -> Path:
    options: Any = {"precision": precision, "block_size": BLOCK_SIZE, "cache": cache, "layout": layout}
    with Checkpoint.open(**released_files(PHANTOM)) as checkpoint:
        export_bundle(checkpoint, folder / precision, **options)
    return folder / precision


def build(bundle: Path, *options: object):
    words = ["--target", TARGET, "--compute-capability", GPU, "--max-context", MAX_CONTEXT, *options]
    return run("build", bundle, *map(str, words))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """The int4 phantom without engines. Not to be written to."""
    return export(tmp_path_factory.mktemp("plain"), "int4")


@pytest.fixture(scope="module")
def built(plain, tmp_path_factory) -> Path:
    """The int4 phantom with its engines. Not to be written to."""
    bundle = tmp_path_factory.mktemp("built") / "int4"
    shutil.copytree(plain, bundle)
    outcome = build(bundle, "--json")
    assert outcome.code == 0, outcome.errors
    return bundle


@pytest.fixture
def copied(built, tmp_path) -> Path:
    """A bundle with engines, to be written to."""
    shutil.copytree(built, tmp_path / "int4")
    return tmp_path / "int4"


# --- the build ------------------------------------------------------------------------------------------------------


def test_every_engine_of_the_phantom_is_built_and_recorded(built):
    record = read_record(Bundle.open(built), TARGET)
    assert set(record.engines) == NAMES and record.tensorrt == trt.__version__
    folder = built / "engines" / TARGET
    assert {path.name for path in folder.iterdir()} == {"engines.json"} | {f"{name}.engine" for name in NAMES}
    assert [path.name for path in folder.parent.iterdir()] == [TARGET]
    for name, entry in record.engines.items():
        data = (folder / f"{name}.engine").read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.size, entry.sha256)
        assert entry.built_from["compute"] == "fp16" and entry.built_from["max_context"] == str(MAX_CONTEXT)
    # The bundle is what it was: engines are beside it.
    assert run("verify", built).code == 0


@pytest.mark.parametrize(
    "precision, compute, cache",
    [("fp32", None, None), ("fp16", "bf16", None), ("bf16", None, None), ("int8", None, "int8")],
)
def test_every_precision_is_built(tmp_path, precision, compute, cache):
    bundle = export(tmp_path, precision, cache)
    outcome = build(bundle, "--json", *(["--compute", compute] if compute else []))
    assert outcome.code == 0, outcome.errors
    settings = outcome.json["settings"]
    assert settings["compute"] == (compute or {"int8": "fp16"}.get(precision, precision))
    assert (settings["max_rows"], settings["prefill_rows"]) == (64, MAX_CONTEXT)
    assert set(outcome.json["engines"]) == NAMES


def test_a_build_needs_no_pytorch(plain, tmp_path):
    """Nor anything else of the extra `export`: engines are built where bundles are used."""
    shutil.copytree(plain, tmp_path / "int4")
    absent = ("torch", "transformers", "safetensors", "sentencepiece", "yaml")
    words = ["healthgpt-edge", "build", str(tmp_path / "int4"), "--target", TARGET, "--compute-capability", GPU]
    program = f"""
import sys
sys.modules.update(dict.fromkeys({absent}))
sys.argv = {words}
from healthgpt_edge.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert set(read_record(Bundle.open(tmp_path / "int4"), TARGET).engines) == NAMES


def test_a_build_takes_the_place_of_the_one_before(copied):
    before = read_record(Bundle.open(copied), TARGET)
    assert build(copied, "--max-rows", 8, "--json").code == 0
    after = read_record(Bundle.open(copied), TARGET)
    assert (before.settings.max_rows, after.settings.max_rows) == (64, 8)
    assert [path.name for path in (copied / "engines").iterdir()] == [TARGET]


def test_a_build_that_fails_leaves_the_engines_that_were_there(copied):
    before = {path.name: path.read_bytes() for path in (copied / "engines" / TARGET).iterdir()}
    # Known to the compiler of engines, but it has no int4 there.
    outcome = run("build", copied, "--target", TARGET, "--compute-capability", "7.5")
    assert outcome.code == 2 and outcome.output == ""
    assert "cannot build the engine language" in outcome.errors and "int4" in outcome.errors
    assert {path.name: path.read_bytes() for path in (copied / "engines" / TARGET).iterdir()} == before
    assert [path.name for path in (copied / "engines").iterdir()] == [TARGET]


def test_a_build_that_is_stopped_at_its_very_end_leaves_them_too(plain, tmp_path, monkeypatch):
    bundle = Bundle(tmp_path, Bundle.open(plain).manifest)
    place = engines.folder(bundle, TARGET)
    place.mkdir(parents=True)
    (place / "before").touch()
    rename = Path.rename

    def stop(path: Path, target: Path) -> Path:
        if target == place and not path.name.endswith(".old"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt), new_folder(bundle, TARGET) as work:
        (work / "after").touch()
    assert sorted(path.name for path in place.parent.rglob("*")) == ["before", TARGET]


def test_engines_that_cannot_be_written_are_an_error(plain, tmp_path):
    bundle = Bundle(tmp_path / "m3", Bundle.open(plain).manifest)
    message = f"^cannot write the engines of {TARGET}: {os.strerror(errno.ENOSPC)}$"
    bundle.path.mkdir()
    with pytest.raises(ExecutorError, match=message), new_folder(bundle, TARGET):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list((bundle.path / "engines").iterdir()) == []
    (bundle.path / "engines").rmdir()
    (bundle.path / "engines").touch()
    with (
        pytest.raises(ExecutorError, match=r"^cannot write engines into 'm3': File exists$"),
        new_folder(bundle, TARGET),
    ):
        pass


def test_settings_that_contradict_each_other(plain):
    manifest = dataclasses.replace(Bundle.open(plain).manifest, precision="bf16")
    with pytest.raises(ExecutorError, match=r"^the plugin multiplies float16: compute must be fp16, got bf16$"):
        default_settings(manifest, plugin=True)
    settings = default_settings(manifest, compute_capabilities=(GPU,))
    message = r"^the full TensorRT builds for the GPU at hand: compute capabilities are tensorrt-rtx's$"
    with pytest.raises(ExecutorError, match=message):
        Compiler(trt, "tensorrt", settings)


def test_a_machine_where_tensorrt_cannot_build(plain):
    """pybind11 gives a TypeError for the null pointer that TensorRT returns."""

    def no_builder(logger):
        raise TypeError("pybind11::init(): factory function returned nullptr")

    broken = SimpleNamespace(__version__="11.4", ILogger=object, Builder=no_builder)
    bundle = Bundle.open(plain)
    compiler = Compiler(broken, TARGET, default_settings(bundle.manifest))
    with pytest.raises(ExecutorError, match=rf"^{TARGET} 11\.4 cannot build here: it gave no reason$"):
        compiler.parse(LANGUAGE, onnx.ModelProto(), bundle)


def test_engines_are_on_the_disk_before_they_take_their_place(plain, tmp_path, monkeypatch):
    bundle = Bundle(tmp_path, Bundle.open(plain).manifest)
    flushed: set[Path] = set()
    monkeypatch.setattr("os.fsync", lambda descriptor: flushed.add(Path(f"/proc/self/fd/{descriptor}").readlink()))
    with new_folder(bundle, TARGET) as work:
        (work / "language.engine").touch()
    assert flushed == {work, work / "language.engine"}


def test_the_language_engine_alone_may_stream_its_weights(plain, tmp_path):
    """TensorRT-RTX builds it, without a GPU; that it is smaller on one is not known yet."""
    manifest = Bundle.open(plain).manifest
    for asked in (False, True):
        settings = default_settings(manifest, (GPU,), max_context=MAX_CONTEXT, stream_weights=asked)
        compiler = Compiler(trt, TARGET, settings)
        builder = trt.Builder(compiler.log.logger)
        flags = {name: compiler.configure(name, builder).get_flag(trt.BuilderFlag.WEIGHT_STREAMING) for name in NAMES}
        assert flags == {name: asked and name == LANGUAGE for name in NAMES}
    shutil.copytree(plain, tmp_path / "int4")
    outcome = build(tmp_path / "int4", "--stream-weights", "--json")
    assert outcome.code == 0, outcome.errors
    assert outcome.json["settings"]["stream_weights"] is True
    assert outcome.json["engines"]["language"]["built_from"]["stream_weights"] == "True"


def test_inspect_tells_of_engines(built, plain):
    text = run("inspect", built).output
    assert f"TensorRT {trt.__version__}" in text and "language.engine" in text
    assert set(run("inspect", built, "--json").json["engines"][TARGET]["engines"]) == NAMES
    assert "engines" not in run("inspect", plain, "--json").json


@pytest.mark.parametrize(
    "options, message",
    [
        (["--target", "tensor"], "target must be one of tensorrt-rtx, tensorrt, found 'tensor'"),
        (["--target", TARGET, "--compute-capability", "9.0"], "builds for the compute capabilities 12.0, 12.1, 7.5"),
        (["--target", TARGET, "--compute-capability", "ada"], "a compute capability must be like 8.6, found 'ada'"),
        (["--target", TARGET, "--compute", "fp32"], "compute of a bundle in int4 must be fp16 or bf16, found 'fp32'"),
        (["--target", TARGET, "--compute", "fp8"], "compute of a bundle in int4 must be fp16 or bf16, found 'fp8'"),
        (["--target", TARGET, "--max-context", "99999"], "max_context must be at most the base's"),
        (["--target", TARGET, "--max-context", "10"], "1 <= max_rows <= prefill_rows <= max_context"),
        (["--target", "tensorrt"], "target tensorrt needs the module tensorrt"),
        (["--target", TARGET, "--plugin"], "TensorRT-RTX takes no plugins of others: --plugin goes with --target tens"),
        (["--target", "tensorrt", "--plugin", "--compute", "bf16"], "float16: compute must be fp16, got bf16"),
    ],
)
def test_what_cannot_be_built_is_one_line_and_leaves_nothing(plain, options, message):
    outcome = run("build", plain, *options)
    assert (outcome.code, outcome.output) == (2, "")
    assert message in outcome.errors and outcome.errors.count("\n") == 1
    assert not (plain / "engines").exists() or not list((plain / "engines").iterdir())


# --- what TensorRT makes of it --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(plain, tmp_path_factory):
    """TensorRT's network of the language engine, and what it was parsed from."""
    bundle = Bundle.open(plain)
    settings = default_settings(bundle.manifest, (GPU,), max_context=MAX_CONTEXT)
    compiler = Compiler(trt, TARGET, settings)
    work = tmp_path_factory.mktemp("network") / "int4"
    shutil.copytree(plain, work)
    with WeightFile(work / "stacked.bin", "stacked.bin") as stacked:
        model = engine_model(bundle, LANGUAGE, engine_graphs(bundle.manifest)[LANGUAGE], settings, stacked)
    opened = Bundle(work, bundle.manifest)
    builder, network = compiler.parse(LANGUAGE, model, opened)
    return bundle.manifest, network, (builder, compiler)


def layers_of(network, kind):
    found = [network.get_layer(index) for index in range(network.num_layers)]
    return [layer for layer in found if layer.type == kind]


def test_matrices_stay_as_they_are_stored(network):
    """int4 for the base and the adapters, once for both tasks; int8 for the two heads."""
    manifest, parsed, _ = network
    types = Counter(layer.get_input(0).dtype for layer in layers_of(parsed, trt.LayerType.DEQUANTIZE))
    linears = 4 * manifest.language.layers
    assert types == {trt.DataType.INT4: 3 * linears, trt.DataType.INT8: len(manifest.tasks)}


def test_products_and_attention_are_in_half_precision(network):
    """No float32 island but those that are meant: norms, gates, sums and rotations are no products."""
    _, parsed, _ = network
    products = layers_of(parsed, trt.LayerType.MATRIX_MULTIPLY)
    assert products and {layer.get_input(i).dtype for layer in products for i in (0, 1)} == {trt.DataType.HALF}
    attentions = layers_of(parsed, trt.LayerType.ATTENTION_INPUT)
    assert attentions and {layer.get_input(i).dtype for layer in attentions for i in range(3)} == {trt.DataType.HALF}
    softmaxes = layers_of(parsed, trt.LayerType.SOFTMAX)
    assert softmaxes and {layer.get_input(0).dtype for layer in softmaxes} == {trt.DataType.FLOAT}


def test_caches_are_updated_in_place(network):
    """Each cache goes in, through one update, and out: TensorRT binds both ends of that to one address."""
    manifest, parsed, _ = network
    updates = layers_of(parsed, trt.LayerType.KV_CACHE_UPDATE)
    ends = {(layer.get_input(0).name, layer.get_output(0).name) for layer in updates}
    names = [f"key_values.{i}.{kind}" for i in range(manifest.language.layers) for kind in ("key", "value")]
    assert ends == {(f"past_{name}", f"present_{name}") for name in names}
    outputs = {parsed.get_output(index).name for index in range(parsed.num_outputs)}
    assert {f"present_{name}" for name in names} <= outputs
    shapes = {tuple(layer.get_input(0).shape)[2] for layer in updates}
    assert shapes == {MAX_CONTEXT}


def test_attention_knows_how_much_of_the_cache_is_filled(network):
    _, parsed, _ = network
    for layer in layers_of(parsed, trt.LayerType.ATTENTION_INPUT):
        layer.__class__ = trt.IAttentionInputLayer
        assert layer.attention.decomposable
        assert layer.attention.key_value_lengths.dtype == trt.DataType.INT32
        assert layer.attention.mask is not None


def test_an_int4_matrix_is_int4_in_the_engine(tmp_path):
    """2048 x 4096 in blocks of 128 with scales of both signs: 4 MiB of int4 and a little, not 16 MiB of float16."""
    channels, outputs, block = 2048, 4096, 128
    weight = np.random.default_rng(0).standard_normal((outputs, channels), np.float32)
    values, scales = quantise(weight, TensorProto.INT4, block)
    assert (scales < 0).any() and (scales > 0).any()
    graph = GraphBuilder("wide")
    x = graph.input("x", TensorProto.FLOAT, [1, 1, channels])
    with WeightFile(tmp_path / "wide.bin", "wide.bin") as file:
        stored = graph.weight(file, "w", TensorProto.INT4, lambda: values)
        scale = graph.weight(file, "s", TensorProto.FLOAT, lambda: scales)
        y = graph.call(linear(TensorProto.INT4, False), x, stored, scale, "", block_size=block)
    graph.output(y, "y", TensorProto.FLOAT, [1, 1, outputs])
    model = lower(graph.model(), TensorProto.FLOAT16)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    parsed = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(parsed, logger).parse(model.SerializeToString(), str(tmp_path / "wide.onnx"))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    plan = builder.build_serialized_network(parsed, config)
    assert channels * outputs // 2 < plan.nbytes < channels * outputs * 0.6


# --- graphs that are not what they should be -------------------------------------------------------------------------


def edited(plain: Path, folder: Path, file: str, data: bytes) -> Bundle:
    """The bundle with another graph in the place of `file`, as whoever makes a bundle can make it."""
    shutil.copytree(plain, folder / "bundle")
    (folder / "bundle" / file).write_bytes(data)
    return Bundle(folder / "bundle", Bundle.open(plain).manifest)


def model_of(bundle: Bundle, name: str, folder: Path) -> onnx.ModelProto:
    settings = default_settings(bundle.manifest, max_context=MAX_CONTEXT)
    with WeightFile(folder / "stacked.bin", "stacked.bin") as stacked:
        return engine_model(bundle, name, engine_graphs(bundle.manifest)[name], settings, stacked)


@pytest.mark.parametrize("file, name", [("generation.language.onnx", LANGUAGE), ("generation.codes.onnx", None)])
@pytest.mark.parametrize(
    "place, message",
    [
        ({"location": "../secret.bin"}, "lie in a file of the bundle, found '../secret.bin'"),
        ({"location": "{folder}/secret.bin"}, "lie in a file of the bundle, found '/"),
        ({"location": ""}, "lie in a file of the bundle, found ''"),
        ({"location": "bundle.json"}, "lie in a file of the bundle, found 'bundle.json'"),
        ({"offset": str(1 << 40)}, " bytes of weights/generation.bin, found 1099511627776 to 1099511"),
        ({"offset": "-1"}, "have its offset and length, once each, found '-1' and '"),
        ({"length": "9" * 5000}, "have its offset and length, once each, found '"),
        ({"length": "1"}, " bytes, found 1"),
        ({"length": None}, "have its offset and length, once each, found '"),
    ],
)
def test_weights_that_do_not_lie_in_the_bundle_are_refused(plain, tmp_path, file, name, place, message):
    """Neither we nor TensorRT's parser may read them: it follows the same paths."""
    (tmp_path / "secret.bin").write_bytes(bytes(1 << 20))
    model = onnx.load(plain / file, load_external_data=False)
    tensor = next(one for one in model.graph.initializer if location_of(one)["location"] == "weights/generation.bin")
    changed = location_of(tensor) | {key: value and value.format(folder=tmp_path) for key, value in place.items()}
    del tensor.external_data[:]
    for key, value in changed.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    bundle = edited(plain, tmp_path, file, model.SerializeToString())
    with pytest.raises(ExecutorError) as caught:
        model_of(bundle, name or "generation.codes", tmp_path)
    assert f"{file}: {tensor.name} must " in str(caught.value) and message in str(caught.value)
    assert len(str(caught.value)) < 300


def test_weights_of_a_constant_that_do_not_lie_in_the_bundle_are_refused(plain, tmp_path):
    file = "generation.codes.onnx"
    model = onnx.load(plain / file, load_external_data=False)
    tensor = TensorProto(name="hidden", data_type=TensorProto.UINT8, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    constant = helper.make_node("Constant", [], ["hidden"], value=tensor)
    branch = helper.make_graph([constant], "branch", [], [helper.make_tensor_value_info("hidden", 2, [4])])
    for node in (constant, helper.make_node("If", ["yes"], ["out"], then_branch=branch, else_branch=branch)):
        other = onnx.ModelProto()
        other.CopyFrom(model)
        other.functions[0].node.append(node)
        shutil.rmtree(tmp_path / "bundle", ignore_errors=True)
        bundle = edited(plain, tmp_path, file, other.SerializeToString())
        with pytest.raises(ExecutorError, match="hidden must lie in a file of the bundle, found '/etc/passwd'"):
            model_of(bundle, "generation.codes", tmp_path)


@pytest.mark.parametrize("data", [b"", b"nothing that onnx knows"])
def test_a_file_that_is_no_graph_is_refused(plain, tmp_path, data):
    bundle = edited(plain, tmp_path, "generation.codes.onnx", data)
    with pytest.raises(ExecutorError, match=r"^generation\.codes\.onnx must be an ONNX graph, found "):
        model_of(bundle, "generation.codes", tmp_path)


@pytest.mark.parametrize("inputs", [3, 7])
def test_a_linear_without_its_matrices_is_refused(plain, tmp_path, inputs):
    file = "generation.language.onnx"
    model = onnx.load(plain / file, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "NormHLoraLinear")
    del node.input[inputs - 1 :]
    bundle = edited(plain, tmp_path, file, model.SerializeToString())
    with pytest.raises(ExecutorError, match=f"the linear of {node.input[1]} must have an H-LoRA linear's matrices"):
        model_of(bundle, LANGUAGE, tmp_path)


def test_a_language_graph_that_cuts_no_positions_is_refused(plain, tmp_path):
    file = "generation.language.onnx"
    model = onnx.load(plain / file, load_external_data=False)
    cut = next(node for node in model.graph.node if "last_positions" in node.input)
    cut.op_type = "Add"
    bundle = edited(plain, tmp_path, file, model.SerializeToString())
    message = "the language graph must cut last_positions and norm them, found no cut or no norm"
    with pytest.raises(ExecutorError, match=f"^{message}$"):
        model_of(bundle, LANGUAGE, tmp_path)


# --- one graph for both tasks ---------------------------------------------------------------------------------------


def test_the_base_is_in_the_merged_graph_once(plain, tmp_path):
    bundle = Bundle.open(plain)
    graphs = {task: read_graph(bundle, bundle.graph(task, "language").name) for task in bundle.manifest.tasks}
    with WeightFile(tmp_path / "stacked.bin", "stacked.bin") as stacked:
        merged = merge(graphs, plain, stacked)
    names = [tensor.name for tensor in merged.graph.initializer]
    assert len(names) == len(set(names))
    for layer in range(bundle.manifest.language.layers):
        assert sum(name.startswith(f"layers.{layer}.mlp.down_proj.weight") for name in names) == 2  # and its scales
    linears = [node for node in merged.graph.node if node.op_type == "HLoraLinear"]
    assert len(linears) == 4 * bundle.manifest.language.layers
    rank = sum(task.rank for task in bundle.manifest.tasks.values())
    experts = sum(task.experts for task in bundle.manifest.tasks.values())
    stored = {tensor.name: list(tensor.dims) for tensor in merged.graph.initializer}
    for node in linears:
        assert stored[node.input[4]][1] == rank + experts and stored[node.input[6]][0] == rank
    inputs = {entry.name for entry in merged.graph.input}
    assert {"task", "last_positions.comprehension", "last_positions.generation", "token_ids"} <= inputs


# --- our plugin -------------------------------------------------------------------------------------------------------


def language_model(bundle: Bundle, work: Path, plugin: bool) -> onnx.ModelProto:
    settings = default_settings(bundle.manifest, max_context=MAX_CONTEXT, plugin=plugin)
    with WeightFile(work / f"{plugin}.bin", f"{plugin}.bin") as stacked:
        return engine_model(bundle, LANGUAGE, engine_graphs(bundle.manifest)[LANGUAGE], settings, stacked)


def test_without_its_kernels_an_engine_with_the_plugin_is_not_begun(plain, monkeypatch):
    """TensorRT-RTX stands in for the full TensorRT, as far as to the plugin."""
    monkeypatch.setitem(engines.MODULES, "tensorrt", engines.MODULES[TARGET])
    monkeypatch.setattr("healthgpt_edge.export.engines.build.own_kernels", lambda: None)
    outcome = run("build", plain, "--target", "tensorrt", "--plugin")
    assert (outcome.code, outcome.output) == (2, "") and outcome.errors.count("\n") == 1
    assert "the plugin needs our CUDA kernels: HEALTHGPT_CUDA=1 pip install ." in outcome.errors
    assert not (plain / "engines").exists() or not list((plain / "engines").iterdir())


def test_every_hlora_linear_becomes_the_plugin_and_nothing_else_does(plain, tmp_path):
    bundle = Bundle.open(plain)
    with_plugin, without = (language_model(bundle, tmp_path, plugin).graph for plugin in (True, False))
    linears = 4 * bundle.manifest.language.layers
    nodes = [node for node in with_plugin.node if node.domain == DOMAIN]
    assert len(nodes) == linears and not any(node.domain for node in without.node)
    assert {node.domain for node in with_plugin.node} == {"", DOMAIN}
    counts, before = (Counter(node.op_type for node in graph.node) for graph in (with_plugin, without))
    # Three products of each are in it; the two heads' stay, and so does all that is no product.
    assert before["MatMul"] - counts["MatMul"] == before["DequantizeLinear"] - counts["DequantizeLinear"] == 3 * linears
    assert counts["MatMul"] == len(bundle.manifest.tasks)
    assert before["Attention"] == counts["Attention"] and before["TensorScatter"] == counts["TensorScatter"]
    for name in ("input", "output"):
        assert getattr(with_plugin, name) == getattr(without, name)


@pytest.mark.parametrize("plugin", [True, False])
def test_panels_become_rows(plain, tmp_path, plugin):
    """TensorRT gets the same matrices of either layout. Those in panels are in the file of what is made for it."""

    def matrices(path: Path, work: Path) -> dict[str, tuple[Any, ...]]:
        work.mkdir()
        graph = language_model(Bundle.open(path), work, plugin).graph
        used, found = {name for node in graph.node for name in node.input}, {}
        for tensor in (one for one in graph.initializer if one.name in used):
            place = location_of(tensor)
            values = values_of(tensor, work if place.get("location") == f"{plugin}.bin" else path)
            found[tensor.name] = (list(tensor.dims), tensor.data_type, values.tobytes())
        return found

    assert Bundle.open(plain).manifest.in_panels
    in_rows = export(tmp_path, "int4", layout="rows")
    assert matrices(plain, tmp_path / "of panels") == matrices(in_rows, tmp_path / "of rows")


def test_the_plugins_matrices_are_the_bundles_bytes(tmp_path):
    """The base where it lies, as words; the adapters side by side, padded to what the kernel takes, and once only."""
    bundle = Bundle.open(export(tmp_path, "int4", layout="rows"))
    graph = language_model(bundle, tmp_path, True).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    used = {name for node in graph.node for name in node.input}
    assert stored.keys() <= used
    assert {stored[name].data_type for name in stored} == {
        getattr(TensorProto, name) for name in ("FLOAT", "INT32", "INT64", "INT8", "FLOAT16")
    }
    tasks = [bundle.manifest.tasks[task] for task in sorted(bundle.manifest.tasks)]
    for node in (node for node in graph.node if node.domain == DOMAIN):
        found = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        inputs = dict(zip(found["operands"].decode().split(","), node.input, strict=True))
        base = location_of(stored[inputs["weight"]])
        assert base["location"] == "weights/base.bin"
        assert list(stored[inputs["weight"]].dims) == [int(base["length"]) // 4]
        assert found["rank"] == sum(-(-task.rank // 32) * 32 for task in tasks) and found["rank_block_size"] == 32
        assert found["experts"] == sum(task.experts for task in tasks) and found["storage"] == b"int4"
        columns = found["rank"] + found["experts"]
        assert 0 <= found["adapter_in_stride"] - columns < 16 and found["adapter_in_stride"] % 16 == 0
        expert_of = numpy_helper.to_array(stored[inputs["expert_of"]])
        # A padding column is its task's last expert's.
        own = [np.minimum(np.arange(-(-task.rank // 32) * 32) * task.experts // task.rank, 3) for task in tasks]
        np.testing.assert_array_equal(expert_of, np.concatenate([own[0], own[1] + tasks[0].experts]))


def test_what_the_plugin_does_not_take_is_named(plain, tmp_path):
    bundle = Bundle.open(plain)
    graphs = {task: read_graph(bundle, bundle.graph(task, "language").name) for task in bundle.manifest.tasks}
    with WeightFile(tmp_path / "stacked.bin", "stacked.bin") as stacked:
        merged = merge(graphs, plain, stacked, KERNEL)
    node = next(node for node in merged.graph.node if node.op_type == "HLoraLinear")
    weight = next(tensor for tensor in merged.graph.initializer if tensor.name == node.input[1])
    for change, message in (
        ({"dims": [128, 40]}, "takes matrices of whole 16 columns, found 40"),
        ({"data_type": TensorProto.FLOAT}, "float16, int8 or int4, all three alike, found FLOAT, INT4"),
    ):
        other = onnx.ModelProto()
        other.CopyFrom(merged)
        tensor = next(tensor for tensor in other.graph.initializer if tensor.name == weight.name)
        tensor.MergeFrom(TensorProto(data_type=change.get("data_type", tensor.data_type)))
        tensor.dims[:] = change.get("dims", list(tensor.dims))
        with pytest.raises(ExecutorError, match=message):
            use_plugin(other)


# --- before an engine is used ---------------------------------------------------------------------------------------


def stale(bundle: Bundle, record, name=LANGUAGE, version=trt.__version__) -> str:
    with pytest.raises(ExecutorError) as caught:
        check_fresh(bundle, record, name, version)
    return str(caught.value)


def test_a_fresh_engine_is_read(built):
    bundle = Bundle.open(built)
    record = read_record(bundle, TARGET)
    for name in NAMES:
        data = read_engine(bundle, record, name, trt.__version__)
        assert data.tobytes() == (built / "engines" / TARGET / f"{name}.engine").read_bytes()


def test_every_ingredient_makes_an_engine_stale(built, monkeypatch):
    """Each file that it was made of, TensorRT's version, the target, every flag, and how graphs are lowered."""
    bundle = Bundle.open(built)
    record = read_record(bundle, TARGET)
    check_fresh(bundle, record, LANGUAGE, trt.__version__)
    parts = ingredients(bundle.manifest, LANGUAGE, TARGET, trt.__version__, record.settings)
    files = {"comprehension.language.onnx", "generation.language.onnx"}
    files |= {f"weights/{name}.bin" for name in ("base", "comprehension", "generation")}
    settings = {field.name for field in dataclasses.fields(record.settings)} - {"plugin", "stream_weights"}
    assert set(parts) == files | settings | {"target", "TensorRT", "lowering"}
    for file in files:
        entries = dict(bundle.manifest.files)
        entries[file] = dataclasses.replace(entries[file], sha256="0" * 64)
        other = Bundle(bundle.path, dataclasses.replace(bundle.manifest, files=entries))
        assert f"built from {file} " in stale(other, record)
    changed = {
        "compute": "bf16",
        "compute_capabilities": ("8.6",),
        "max_context": 600,
        "max_rows": 9,
        "prefill_rows": 99,
    }
    assert set(changed) == settings
    for name, value in changed.items():
        other = dataclasses.replace(record, settings=dataclasses.replace(record.settings, **{name: value}))
        assert f"built from {name} " in stale(bundle, other)
    streaming = dataclasses.replace(record, settings=dataclasses.replace(record.settings, stream_weights=True))
    assert "built from stream_weights nothing, now it is True;" in stale(bundle, streaming)
    check_fresh(bundle, streaming, "generation.vision", trt.__version__)
    with_plugin = dataclasses.replace(record.settings, plugin=True)
    assert "built from plugin nothing, now it is 1;" in stale(bundle, dataclasses.replace(record, settings=with_plugin))
    check_fresh(bundle, dataclasses.replace(record, settings=with_plugin), "generation.vision", trt.__version__)
    assert "built from TensorRT 1." in stale(bundle, record, version="99.0")
    assert "built from target " in stale(bundle, dataclasses.replace(record, target="tensorrt"))
    parts = ingredients(bundle.manifest, LANGUAGE, TARGET, trt.__version__, with_plugin)
    built_with = dataclasses.replace(record.engines[LANGUAGE], built_from=parts)
    other = dataclasses.replace(record, settings=with_plugin, engines={LANGUAGE: built_with})
    check_fresh(bundle, other, LANGUAGE, trt.__version__)
    monkeypatch.setattr(engines, "PLUGIN_VERSION", engines.PLUGIN_VERSION + 1)
    assert "built from plugin 1, now it is 2; build again" in stale(bundle, other)
    monkeypatch.setattr(engines, "LOWERING", engines.LOWERING + 1)
    assert "built from lowering 1, now it is 2; build again" in stale(bundle, record)


def test_engines_from_before_there_were_these_flags_are_still_good(copied):
    path = copied / "engines" / TARGET / "engines.json"
    record = json.loads(path.read_text())
    assert record["settings"].pop("plugin") is record["settings"].pop("stream_weights") is False
    path.write_text(json.dumps(record))
    bundle = Bundle.open(copied)
    check_fresh(bundle, read_record(bundle, TARGET), LANGUAGE, trt.__version__)


def test_an_engine_is_refused_before_tensorrt_gets_it(copied):
    bundle = Bundle.open(copied)
    record = read_record(bundle, TARGET)
    path = copied / "engines" / TARGET / "language.engine"
    data = path.read_bytes()

    def refusal() -> str:
        with pytest.raises(ExecutorError) as caught:
            read_engine(bundle, record, LANGUAGE, trt.__version__)
        return str(caught.value)

    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "language is damaged: SHA-256 must be" in refusal()
    path.write_bytes(data + b"\0")
    assert f"must have {len(data)} bytes, found {len(data) + 1}" in refusal()
    path.unlink()
    assert "must be a regular file" in refusal()
    path.symlink_to(copied / "bundle.json")
    assert "must be a regular file" in refusal()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda record: record.update(version=9), "must be JSON of the format"),
        (lambda record: record.update(target="tensorrt"), "must be of the target tensorrt-rtx, found 'tensorrt'"),
        (lambda record: record.update(surprise=1), "unknown keys ['surprise']"),
        (lambda record: record["settings"].pop("max_rows"), "lacks ['max_rows']"),
        (lambda record: record["settings"].update(max_rows=0), "1 <= max_rows <= prefill_rows <= max_context"),
        (lambda record: record["settings"].update(compute="int1"), "compute must be one of"),
        (lambda record: record["engines"]["language"].update(size="9"), "size must be int, found str"),
        (lambda record: record["engines"].pop("language"), "has no engine 'language'"),
    ],
)
def test_a_record_that_lies_is_refused(copied, damage, message):
    path = copied / "engines" / TARGET / "engines.json"
    record = json.loads(path.read_text())
    damage(record)
    path.write_text(json.dumps(record))
    outcome = run("answer", copied, "--question", "?", "--executor", "tensorrt")
    assert outcome.code == 2 and message in outcome.errors and outcome.errors.count("\n") == 1


def test_without_engines_or_without_a_gpu_the_reason_is_one_line(plain, built, tmp_path):
    outcome = run("answer", plain, "--question", "?", "--executor", "tensorrt")
    assert outcome.code == 2
    assert "has no engines for tensorrt-rtx: healthgpt-edge build int4 --target tensorrt-rtx" in outcome.errors
    outcome = run("answer", built, "--question", "?", "--executor", "tensorrt", "--device", "cpu")
    assert outcome.code == 2 and "executor tensorrt runs on device cuda, found 'cpu'" in outcome.errors
    for words in (("--threads", 2), ("--no-kernels",)):
        outcome = run("answer", built, "--question", "?", "--executor", "tensorrt", *words)
        assert outcome.code == 2 and "threads and kernels are options of onnx" in outcome.errors
    if not Path("/dev/nvidia0").exists():
        outcome = run("answer", built, "--question", "?", "--executor", "tensorrt")
        assert outcome.code == 2 and "CUDA failed in cudaGetDeviceCount" in outcome.errors


def test_a_record_that_cannot_be_read_is_an_error_of_ours(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "int4")
    (tmp_path / "int4" / "engines" / TARGET / "engines.json").mkdir(parents=True)
    with pytest.raises(ExecutorError, match=r"engines\.json cannot be read: Is a directory"):
        read_record(Bundle.open(tmp_path / "int4"), TARGET)


def test_a_record_behind_a_link_is_refused(copied, tmp_path):
    folder = copied / "engines" / TARGET
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    outcome = run("inspect", copied)
    assert outcome.code == 2 and "must be part of the bundle, found a link" in outcome.errors


def test_a_graph_that_tensorrt_cannot_read_is_named(plain):
    bundle = Bundle.open(plain)
    compiler = Compiler(trt, TARGET, default_settings(bundle.manifest, (GPU,), max_context=MAX_CONTEXT))
    node = helper.make_node("Nothing", ["x"], ["y"])
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    model = helper.make_model(helper.make_graph([node], "g", value[:1], value[1:]))
    with pytest.raises(ExecutorError, match=r"tensorrt-rtx .* cannot read the graph strange: "):
        compiler.parse("strange", model, bundle)
