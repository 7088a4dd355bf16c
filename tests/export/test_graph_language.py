"""The language graph in ONNX Runtime against the reference model, in every precision."""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from golden_cases import arguments, open_golden
from language_runs import (
    LanguageRun,
    Sequences,
    as_exported,
    case_of,
    features_of,
    reference_logits,
    spliced,
    write_graphs,
)
from onnx import TensorProto, helper
from tolerances import (
    LOGITS_8_BIT_LARGEST,
    LOGITS_8_BIT_MEAN,
    LOGITS_FLOAT16_CACHES,
    LOGITS_INT8_CACHES,
    LOGITS_SAME_ARITHMETIC,
)

from healthgpt_edge.bundle import Bundle
from healthgpt_edge.executors.onnx import OnnxExecutor
from healthgpt_edge.export.bundle import export_bundle
from healthgpt_edge.export.checkpoint import Checkpoint
from healthgpt_edge.export.graph.language import first_logit_row
from healthgpt_edge.export.quantize import Storage, is_quantised
from healthgpt_edge.export.reference.model import HealthGPT

TASKS = [("m3", "comprehension"), ("m3", "generation"), ("phi4", "comprehension"), ("qwen", "comprehension")]
each_task = pytest.mark.parametrize(("system", "task"), TASKS, ids=["-".join(pair) for pair in TASKS])


@cache
def model_of(system: str, task: str) -> HealthGPT:
    with open_golden(system) as checkpoint:
        return HealthGPT.load(checkpoint, task)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Gives the folder of a system's float32 language graphs."""

    @cache
    def write(system: str) -> Path:
        folder = tmp_path_factory.mktemp(system)
        with open_golden(system) as checkpoint:
            write_graphs(checkpoint, folder)
        return folder

    return write


def prompt(system: str, task: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """A golden prompt, the same as the graph takes it [1, S], and its features [1, P, C]."""
    case = case_of(system, task)
    features = features_of(case)
    ids = case.record["input_ids"]
    return ids, spliced(ids, model_of(system, task).language.vocab, features.shape[1]), features


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = LOGITS_SAME_ARITHMETIC) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


# --- float32 --------------------------------------------------------------------------------------------------------


@each_task
def test_logits_equal_the_reference(graphs, system, task):
    ids, token_ids, features = prompt(system, task)
    run = LanguageRun(graphs(system), task)
    found = run.forward(run.sequences(), token_ids, features, n=token_ids.shape[1])
    assert_close(found[0], reference_logits(model_of(system, task), ids, features))
    case = case_of(system, task)
    assert_close(found[0, -1], case.arrays["logits_step0"])


def test_language_and_vocabulary_graph_share_the_rows(graphs):
    _, token_ids, features = prompt("m3", "generation")
    run = LanguageRun(graphs("m3"), "generation")
    outputs = run.outputs(run.sequences(), token_ids, features, n=2)
    (others,) = run.vocabulary.run(None, {"hidden": outputs["hidden"]})
    with open_golden("m3") as checkpoint:
        first = first_logit_row(checkpoint, "generation")
        assert first == checkpoint.tokens.first_code
        # The codes, <end_index> and <pixel_newline>: all that a picture can hold.
        assert outputs["logits"].shape == (1, 2, checkpoint.tokens.codes + 2)
        assert first_logit_row(checkpoint, "comprehension") == 0
    assert others.shape == (1, 2, first)
    assert outputs["hidden"].shape == (1, 2, model_of("m3", "generation").language.hidden)


def test_without_an_image(graphs):
    ids = [5, 6, 7, 400, 9]
    run = LanguageRun(graphs("m3"), "comprehension")
    nothing = np.zeros((1, 1, 64), np.float32)
    found = run.forward(run.sequences(), np.array([ids]), nothing, n=5)
    assert_close(found[0], reference_logits(model_of("m3", "comprehension"), ids, None))


@each_task
@pytest.mark.parametrize("pieces", [[20, 1, 13], [3, 16, 2], "one by one"], ids=str)
def test_prefill_in_pieces(graphs, system, task, pieces):
    """Also where a piece ends within the picture (patches begin at token 15, 84 and 45)."""
    _, token_ids, features = prompt(system, task)
    total = token_ids.shape[1]
    run = LanguageRun(graphs(system), task)
    whole = run.sequences()
    expected = run.forward(whole, token_ids, features)
    cuts = np.arange(1, total) if pieces == "one by one" else np.cumsum(pieces)
    parts = run.sequences()
    for piece in np.split(token_ids, cuts, axis=1):
        found = run.forward(parts, piece, features)
    assert_close(found, expected)
    assert parts.length.tolist() == whole.length.tolist() == [total]
    for name, cache_rows in parts.caches.items():
        assert_close(cache_rows[:, :, :total], whole.caches[name][:, :, :total])
        # Rows beyond the tokens were not touched.
        assert (cache_rows[:, :, total:] == 1e3).all()


def test_the_last_layer_goes_on_with_the_last_positions_alone(graphs, tmp_path):
    """Of the others it needs keys and values. What both of the last layers give is made an output."""
    _, token_ids, features = prompt("m3", "comprehension")
    shutil.copytree(graphs("m3"), tmp_path / "graphs")
    model = onnx.load(path := tmp_path / "graphs" / "comprehension.language.onnx", load_external_data=False)
    results = [node.output[0] for node in model.graph.node if "mlp.down_proj" in node.name][-2:]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in results)
    path.write_bytes(model.SerializeToString())
    run = LanguageRun(tmp_path / "graphs", "comprehension")
    outputs = run.outputs(run.sequences(), token_ids, features, n=3)
    assert [outputs[name].shape[1] for name in results] == [token_ids.shape[1], 3]


@pytest.mark.parametrize("n", [1, 2, 7, 47])
def test_logits_of_the_last_positions(graphs, n):
    _, token_ids, features = prompt("m3", "generation")
    assert token_ids.shape[1] == 47
    run = LanguageRun(graphs("m3"), "generation")
    every = run.forward(run.sequences(), token_ids, features, n=47)
    found = run.forward(run.sequences(), token_ids, features, n=n)
    assert found.shape == (1, n, every.shape[2])
    assert_close(found, every[:, 47 - n :])


@each_task
def test_a_batch_of_sequences_of_different_length(graphs, system, task):
    _, token_ids, features = prompt(system, task)
    other_features = features[:, ::-1].copy()
    run = LanguageRun(graphs(system), task)
    first, second = run.sequences(), run.sequences()
    run.forward(first, token_ids, features)
    run.forward(second, token_ids[:, :37], other_features)
    both = Sequences.together(first, second)
    both_features = np.concatenate([features, other_features])
    vocab = model_of(system, task).language.vocab
    # Text and patches; the same patch id means another row for each sequence.
    for new in ([[3, vocab + 2, 4]], [[7]]):
        expected = [
            run.forward(first, new, features, n=len(new[0])),
            run.forward(second, new, other_features, n=len(new[0])),
        ]
        found = run.forward(both, np.repeat(new, 2, axis=0), both_features, n=len(new[0]))
        assert_close(found, np.concatenate(expected))
        assert not np.allclose(*expected)
    assert both.length.tolist() == [token_ids.shape[1] + 4, 41]


def test_a_sliding_window_hides_what_lies_before_it(tmp_path):
    """A window of 5: every position sees itself and the 5 before it."""
    release = Path(shutil.copytree(arguments("m3")["base"].parent, tmp_path / "m3"))
    config = release / "Phi-3-mini-4k-instruct/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sliding_window": 5}))
    with Checkpoint.open(**arguments("m3", release)) as checkpoint:
        model = HealthGPT.load(checkpoint, "comprehension")
        (tmp_path / "graphs").mkdir()
        write_graphs(checkpoint, tmp_path / "graphs")
    ids, token_ids, features = prompt("m3", "comprehension")
    expected = reference_logits(model, ids, features)
    run = LanguageRun(tmp_path / "graphs", "comprehension")
    sequences = run.sequences()
    assert_close(run.forward(sequences, token_ids[:, :30], features, n=30)[0], expected[:30])
    for position in range(30, len(expected)):
        assert_close(run.forward(sequences, token_ids[:, position : position + 1], features)[0, 0], expected[position])
    unlimited = reference_logits(model_of("m3", "comprehension"), ids, features)
    # Up to the sixth position nothing is hidden.
    assert_close(expected[:6], unlimited[:6])
    assert np.abs(expected[6:] - unlimited[6:]).max(axis=1).min() > 100 * LOGITS_SAME_ARITHMETIC


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", LOGITS_SAME_ARITHMETIC), ("fp16", LOGITS_FLOAT16_CACHES)]
)
def test_the_executor_grows_its_caches_and_keeps_what_they_hold(tmp_path, precision, tolerance):
    """Over the steps of 256 tokens, in pieces and one by one; and back again."""
    with open_golden("m3") as checkpoint:
        export_bundle(checkpoint, tmp_path / "bundle", precision=precision)
        model = as_exported(HealthGPT.load(checkpoint, "comprehension"), precision, 128)
    executor = OnnxExecutor(Bundle.open(tmp_path / "bundle"), ("comprehension",), threads=1)
    ids = np.random.default_rng(0).integers(3, 400, 520)
    expected = reference_logits(model, ids.tolist(), None, Storage.of(precision).cache)
    context = executor.context("comprehension", None)
    assert_close(context.forward(ids[:250], last_positions=3), expected[247:250], tolerance)
    for position in range(250, 262):
        assert_close(context.forward(ids[position : position + 1])[0], expected[position], tolerance)
    assert_close(context.forward(ids[262:520])[0], expected[519], tolerance)
    context.length = 255
    assert_close(context.forward(ids[255:258], last_positions=3), expected[255:258], tolerance)
    # A new context starts from nothing, whatever the others hold.
    assert_close(executor.context("comprehension", None).forward(ids[:9])[0], expected[8], tolerance)


def test_the_executor_gives_the_whole_vocabulary_when_asked(golden_bundle):
    executor = OnnxExecutor(Bundle.open(golden_bundle("m3")), ("generation",), threads=1)
    ids = np.arange(3, 20)
    expected = reference_logits(model_of("m3", "generation"), ids.tolist(), None)
    first = executor.bundle.manifest.tasks["generation"].first_logit
    every = executor.context("generation", None).forward(ids, last_positions=4, full_vocabulary=True)
    assert_close(every, expected[-4:])
    assert_close(executor.context("generation", None).forward(ids), expected[-1:, first:])


# --- other precisions -----------------------------------------------------------------------------------------------

STORED = [("fp16", 128), ("bf16", 128)]
STORED += [(precision, block) for precision in ("int8", "int4") for block in (32, 64, 128)]


@pytest.fixture(scope="module", params=STORED, ids=lambda stored: f"{stored[0]}-{stored[1]}")
def stored(request, tmp_path_factory):
    """A precision, a block size, and the folders of the systems' graphs in them."""
    folders = {}
    for system in ("m3", "phi4", "qwen"):
        folders[system] = tmp_path_factory.mktemp(system)
        with open_golden(system) as checkpoint:
            write_graphs(checkpoint, folders[system], *request.param)
    return (*request.param, folders)


@each_task
def test_the_body_computes_with_the_dequantised_weights(stored, system, task):
    precision, block_size, folders = stored
    ids, token_ids, features = prompt(system, task)
    with open_golden(system) as checkpoint:
        model = as_exported(HealthGPT.load(checkpoint, task), precision, block_size)
    expected = reference_logits(model, ids, features, Storage.of(precision).cache)
    run = LanguageRun(folders[system], task, optimised=False)
    found = run.forward(run.sequences(), token_ids, features, n=len(expected))[0]
    assert_close(found, expected, LOGITS_FLOAT16_CACHES)
    # Caches are rounded as the reference rounds them.
    assert np.abs(found - reference_logits(model, ids, features)).max() > LOGITS_FLOAT16_CACHES
    # The weights are others than the released ones, so the comparison says something.
    released = reference_logits(model_of(system, task), ids, features)
    assert np.abs(expected - released).max() > 10 * LOGITS_SAME_ARITHMETIC

    run = LanguageRun(folders[system], task)
    found = run.forward(run.sequences(), token_ids, features, n=len(expected))[0]
    if not is_quantised(Storage.of(precision).linear):
        assert_close(found, expected, LOGITS_FLOAT16_CACHES)
        return
    # ONNX Runtime multiplies packed weights with activations rounded to 8 bits, by itself.
    difference = np.abs(found - expected)
    assert difference.max() < LOGITS_8_BIT_LARGEST
    assert difference.mean() < LOGITS_8_BIT_MEAN


@each_task
@pytest.mark.parametrize("optimised", [False, True])
def test_int8_caches_keep_what_the_reference_rounds_to(tmp_path, system, task, optimised):
    """All at once, and in two calls of which the second reads rounded rows."""
    ids, token_ids, features = prompt(system, task)
    with open_golden(system) as checkpoint:
        write_graphs(checkpoint, tmp_path, cache="int8")
    run = LanguageRun(tmp_path, task, optimised=optimised)
    expected = reference_logits(model_of(system, task), ids, features, TensorProto.INT8)
    found = run.forward(run.sequences(), token_ids, features, n=token_ids.shape[1])
    assert_close(found[0], expected, LOGITS_INT8_CACHES)
    sequences, half = run.sequences(), token_ids.shape[1] // 2
    run.forward(sequences, token_ids[:, :half], features)
    assert_close(run.forward(sequences, token_ids[:, half:], features)[0, 0], expected[-1], LOGITS_INT8_CACHES)
    released = reference_logits(model_of(system, task), ids, features)
    assert np.abs(expected - released).max() > 50 * LOGITS_INT8_CACHES


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_onnxruntime_keeps_every_quantised_matrix_packed(tmp_path, precision, block_size):
    with open_golden("m3") as checkpoint:
        write_graphs(checkpoint, tmp_path, precision, block_size)
    optimised = tmp_path / "optimised.onnx"
    LanguageRun(tmp_path, "generation", save_as=optimised)
    nodes = Counter(node.op_type for node in onnx.load(optimised, load_external_data=False).graph.node)
    # Three matrices in each of the four linears of three layers, and the head.
    assert nodes["MatMulNBits"] == 3 * 4 * 3 + 1
    assert nodes["DequantizeLinear"] == 0
    assert nodes["MatMul"] == 0


# --- the files ------------------------------------------------------------------------------------------------------


@each_task
def test_what_a_kernel_is_told(golden_bundle, system, task):
    """Attributes that the standard bodies ignore are there for kernels, which do not see the mask or the blocks."""
    model = onnx.load(golden_bundle(system) / f"{task}.language.onnx", load_external_data=False)
    config = model_of(system, task).language
    told = defaultdict(list)
    for node in model.graph.node:
        if node.domain == "healthgpt":
            attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
            told[node.op_type].append(attributes)
    linear = {"block_size": 128, "experts": 4}
    attention = {"heads": config.heads, "kv_heads": config.kv_heads, "window": config.sliding_window or 0}
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    if system == "qwen":  # whose linears are not packed
        layer = {"HLoraLinear": [linear] * 5, "ResidualHLoraLinear": [linear] * 2, "CachedAttention": [attention]}
    else:
        layer = {
            "NormHLoraLinear": [linear | {"epsilon": pytest.approx(config.rms_epsilon)}] * 2,
            "PackedCachedAttention": [attention | {"sizes": [query, key, key]}],
            "ResidualHLoraLinear": [linear],
            "SwigluResidualHLoraLinear": [linear],
        }
    expected = {name: nodes * config.layers for name, nodes in layer.items()}
    assert told == expected | {"Linear": [{"block_size": 128}]}
    assert attention["window"] == (2047 if system == "m3" else 0)
    # It writes to the buffers that the caller binds, with nothing in between.
    caches = {node.name for node in model.graph.output if node.name.startswith("present_")}
    written = {name for node in model.graph.node if "Attention" in node.op_type for name in node.output[1:]}
    assert caches == written and len(caches) == 2 * config.layers


def external(path: Path) -> dict[str, dict[str, str]]:
    """Location, offset and length of a graph's external tensors, by name."""
    model = onnx.load(path, load_external_data=False)
    assert not any(attribute.HasField("t") for node in model.graph.node for attribute in node.attribute)
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }


@pytest.mark.parametrize("system", ["m3", "phi4", "qwen"])
def test_every_graph_of_a_bundle_is_well_formed(golden_bundle, system, tmp_path):
    # A copy: the checker refuses hard links, by which other tests copy the same bundle.
    paths = sorted(shutil.copytree(golden_bundle(system), tmp_path / system).glob("*.onnx"))
    assert len(paths) == {"m3": 7, "phi4": 2, "qwen": 2}[system]
    for path in paths:
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path, load_external_data=False)
        assert model.ir_version == 11
        assert {entry.domain: entry.version for entry in model.opset_import}.items() <= {"": 24, "healthgpt": 1}.items()
        # A node is standard, or carries its body.
        bodies = {function.name for function in model.functions}
        for node in model.graph.node:
            assert node.domain == "" or (node.domain == "healthgpt" and node.op_type in bodies)
        assert len({node.name for node in model.graph.node}) == len(model.graph.node)


def test_quantised_graphs_are_well_formed(stored):
    _, _, folders = stored
    for folder in folders.values():
        for path in folder.glob("*.onnx"):
            onnx.checker.check_model(path, full_check=True)


def test_every_large_tensor_lies_in_the_bundles_own_files(golden_bundle):
    folder = golden_bundle("m3")
    for path in folder.glob("*.onnx"):
        task = path.name.split(".")[0]
        for place in external(path).values():
            assert place["location"] in ("weights/base.bin", f"weights/{task}.bin")
            assert int(place["offset"]) % 4096 == 0
            assert int(place["offset"]) + int(place["length"]) <= (folder / place["location"]).stat().st_size


def test_both_tasks_read_one_copy_of_the_base(golden_bundle):
    folder = golden_bundle("m3")
    for role in ("language", "vision"):
        comprehension, generation = (
            {
                name: place
                for name, place in external(folder / f"{task}.{role}.onnx").items()
                if place["location"] == "weights/base.bin"
            }
            for task in ("comprehension", "generation")
        )
        shared = comprehension.keys() & generation.keys()
        assert shared
        assert all(comprehension[name] == generation[name] for name in shared)
        if role == "language":
            # Embeddings and head rows come from the generation's fusion file, or differ in their range.
            linears = {
                f"layers.{layer}.{linear}.weight"
                for layer in range(3)
                for linear in model_of("m3", "generation").language.linears
            }
            assert shared == linears
    # Nothing is stored twice, and nothing lies between.
    places = {
        (int(place["offset"]), int(place["length"]))
        for path in folder.glob("*.onnx")
        for place in external(path).values()
        if place["location"] == "weights/base.bin"
    }
    end = 0
    for offset, length in sorted(places):
        assert 0 <= offset - end < 4096
        end = offset + length
    assert end == (folder / "weights/base.bin").stat().st_size
