"""The vision graph in ONNX Runtime against the original's features."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from golden_cases import CASES, Case, open_golden
from language_runs import as_stored
from onnx import TensorProto
from tolerances import FEATURES, FEATURES_8_BIT, FEATURES_BFLOAT16, FEATURES_FLOAT16

from healthgpt_edge.errors import CheckpointError
from healthgpt_edge.export.checkpoint import Checkpoint
from healthgpt_edge.export.graph.vision import build_vision
from healthgpt_edge.export.reference.model import HealthGPT
from healthgpt_edge.export.weights import WeightFile
from healthgpt_edge.images import prepare, read_image

PICTURE_CASES = [case for case in CASES if case.image]


class Exported:
    """The vision graphs of a checkpoint's tasks in `folder`, as a bundle holds them."""

    def __init__(
        self, checkpoint: Checkpoint, folder: Path, storage: int = TensorProto.FLOAT, block_size: int = 128
    ) -> None:
        self.folder = folder
        (folder / "weights").mkdir()
        self.models: dict[str, onnx.ModelProto] = {}
        self.base_bytes: dict[str, int] = {}
        base = WeightFile(folder / "weights/base.bin", "weights/base.bin")
        for task in checkpoint.tasks:
            own = WeightFile(folder / f"weights/{task}.bin", f"weights/{task}.bin")
            self.models[task] = build_vision(checkpoint, task, base, own, storage, block_size)
            self.base_bytes[task] = base.size_bytes
            own.close()
            (folder / f"{task}.vision.onnx").write_bytes(self.models[task].SerializeToString())
        base.close()

    def features(self, task: str, pixels: np.ndarray, optimised: bool = True) -> np.ndarray:
        options = onnxruntime.SessionOptions()
        if not optimised:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            self.folder / f"{task}.vision.onnx", options, providers=["CPUExecutionProvider"]
        )
        return session.run(["image_features"], {"pixels": pixels})[0]


@pytest.fixture(scope="module", params=["m3", "phi4", "qwen"])
def exported(request, tmp_path_factory):
    with open_golden(request.param) as checkpoint:
        graphs = Exported(checkpoint, tmp_path_factory.mktemp(request.param))
    graphs.system = request.param
    return graphs


@pytest.fixture(scope="module")
def m3(tmp_path_factory):
    with open_golden("m3") as checkpoint:
        yield checkpoint, Exported(checkpoint, tmp_path_factory.mktemp("m3"))


def pixels_of(case: Case) -> np.ndarray:
    return prepare(read_image(case.image), 56)[None]


def test_features_of_every_golden_picture(exported):
    cases = [case for case in PICTURE_CASES if case.system == exported.system]
    assert cases
    for case in cases:
        features = exported.features(case.task, pixels_of(case))
        assert features.dtype == np.float32
        np.testing.assert_allclose(
            features, case.arrays["projected_features"], rtol=0, atol=FEATURES, err_msg=case.name
        )


def test_a_batch_gives_what_its_pictures_give(m3):
    _, graphs = m3
    pixels = np.concatenate([pixels_of(case) for case in PICTURE_CASES if case.system == "m3"])
    together = graphs.features("comprehension", pixels)
    for row, picture in zip(together, pixels, strict=True):
        np.testing.assert_allclose(row, graphs.features("comprehension", picture[None])[0], rtol=0, atol=FEATURES)


@pytest.mark.parametrize(
    ("storage", "tolerance"), [(TensorProto.FLOAT16, FEATURES_FLOAT16), (TensorProto.BFLOAT16, FEATURES_BFLOAT16)]
)
def test_stored_in_16_bits(tmp_path, storage, tolerance):
    case = Case("m3_com_wide")
    with open_golden("m3") as checkpoint:
        graphs = Exported(checkpoint, tmp_path, storage)
    types = {tensor.name: tensor.data_type for tensor in graphs.models["comprehension"].graph.initializer}
    matrices = {name for name, data_type in types.items() if data_type == storage}
    # 4 layers of 4 matrices and the projector's two; norms, biases, positions and the patch matrix stay float32.
    assert len(matrices) == 4 * 4 + 2
    assert all(name.endswith(".weight") and "norm" not in name for name in matrices)
    found = graphs.features(case.task, pixels_of(case))
    np.testing.assert_allclose(found, case.arrays["projected_features"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("block_size", [32, 128])
def test_stored_in_int8_blocks(tmp_path, block_size):
    """The standard body equals the reference on the dequantised matrices."""
    case = Case("m3_com_wide")
    with open_golden("m3") as checkpoint:
        graphs = Exported(checkpoint, tmp_path, TensorProto.INT8, block_size)
        model = HealthGPT.load(checkpoint, case.task)
    onnx.checker.check_model(tmp_path / f"{case.task}.vision.onnx", full_check=True)
    for part in (model.vision_tower.encoder, model.model.mm_projector):
        for linear in (module for module in part.modules() if isinstance(module, torch.nn.Linear)):
            linear.weight.copy_(as_stored(linear.weight, TensorProto.INT8, block_size))
    expected = model.features(torch.from_numpy(case.arrays["pixel_values"])).numpy()
    found = graphs.features(case.task, pixels_of(case), optimised=False)
    np.testing.assert_allclose(found, expected, rtol=0, atol=FEATURES)
    assert np.abs(found - case.arrays["projected_features"]).max() > 10 * FEATURES
    # ONNX Runtime rounds activations to 8 bits as well.
    found = graphs.features(case.task, pixels_of(case))
    np.testing.assert_allclose(found, expected, rtol=0, atol=FEATURES_8_BIT)


def test_onnxruntime_keeps_every_quantised_matrix_packed(tmp_path):
    with open_golden("m3") as checkpoint:
        Exported(checkpoint, tmp_path, TensorProto.INT8, 32)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(tmp_path / "comprehension.vision.onnx", options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(options.optimized_model_filepath, load_external_data=False)
    nodes = Counter(node.op_type for node in optimised.graph.node)
    assert nodes["MatMulNBits"] == 4 * 4 + 2
    assert nodes["DequantizeLinear"] == 0
    # Of the patches, which are always float32.
    assert nodes["MatMul"] == 1


def test_a_task_runs_only_the_layers_it_reads(m3):
    checkpoint, graphs = m3
    for task, model in graphs.models.items():
        layers = {tensor.name.split(".")[2] for tensor in model.graph.initializer if ".layers." in tensor.name}
        assert layers == {str(layer) for layer in range(checkpoint.tasks[task].vision_layers)}
    assert checkpoint.tasks["generation"].vision_layers == 1
    assert checkpoint.tasks["comprehension"].vision_layers == checkpoint.vision.layers - 1


def test_tasks_share_one_tower(m3):
    _, graphs = m3
    assert graphs.base_bytes["comprehension"] == graphs.base_bytes["generation"]
    locations = {
        entry.value
        for tensor in graphs.models["generation"].graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert locations == {"weights/base.bin", "weights/generation.bin"}


def test_the_graph_is_standard_and_well_formed(m3):
    _, graphs = m3
    for task, model in graphs.models.items():
        # A node is standard, or carries its body.
        named = {node.op_type for node in model.graph.node if node.domain == "healthgpt"}
        assert named == {"Linear", "ResidualLinear", "QuickGeluResidualLinear", "PackedAttention"}
        assert {node.domain for node in model.graph.node} == {"", "healthgpt"}
        assert {function.name for function in model.functions} == named
        onnx.checker.check_model(graphs.folder / f"{task}.vision.onnx", full_check=True)


def test_a_picture_of_another_size_is_refused(m3):
    _, graphs = m3
    with pytest.raises(Exception, match="Got invalid dimensions for input: pixels"):
        graphs.features("generation", np.zeros((1, 55, 56, 3), np.uint8))


def test_patches_must_fill_the_picture(m3):
    checkpoint, _ = m3
    uneven = SimpleNamespace(vision=replace(checkpoint.vision, image_size=57))
    with pytest.raises(CheckpointError, match=r"^image_size must be a multiple of patch_size, 14, got 57$"):
        build_vision(uneven, "generation", None, None, TensorProto.FLOAT)
