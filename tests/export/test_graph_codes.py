"""The codes and draft graphs in ONNX Runtime against the original's picture and the reference autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from golden_cases import Case, open_golden
from onnx import TensorProto
from tolerances import IMAGE_LEVELS, IMAGE_SHARE

from healthgpt_edge.executors.onnx import DEVICES
from healthgpt_edge.export.checkpoint import VqConfig
from healthgpt_edge.export.graph.codes import build_codes
from healthgpt_edge.export.graph.draft import build_draft
from healthgpt_edge.export.reference.vqgan import Vqgan, to_uint8
from healthgpt_edge.export.weights import WeightFile

GOLDEN = Case("m3_gen_wide")
# Small and uneven: fewer levels, channels that change or stay, attention at two resolutions or at none.
SMALL = [
    VqConfig(11, 8, 8, 32, (1, 2), 1, (8, 16), 16),
    VqConfig(64, 4, 4, 32, (2, 2, 3), 2, (), 24),
    VqConfig(5, 16, 16, 64, (1,), 1, (10,), 10),
]
each_small = pytest.mark.parametrize("config", SMALL, ids=lambda config: f"{config.resolution}px")


@dataclass
class Autoencoder:
    """A reference autoencoder of random weights that answers as a checkpoint does."""

    vq: VqConfig

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.reference = Vqgan(self.vq).eval().requires_grad_(False)
        for name, parameter in self.reference.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) / 4)
        self.state = self.reference.state_dict()

    def vq_tensor(self, name: str) -> torch.Tensor:
        return self.state[name]


class Exported:
    """The codes and draft graphs of a checkpoint in `folder`, 3x3 convolutions of type `picture`."""

    def __init__(self, checkpoint, folder: Path, picture: int = TensorProto.FLOAT) -> None:
        (folder / "weights").mkdir()
        own = WeightFile(folder / "weights/generation.bin", "weights/generation.bin")
        self.paths = {"codes": folder / "codes.onnx", "draft": folder / "draft.onnx"}
        self.models = {
            "codes": build_codes(checkpoint, own, picture),
            "draft": build_draft(checkpoint, own, picture),
        }
        own.close()
        for name, model in self.models.items():
            self.paths[name].write_bytes(model.SerializeToString())

    def run(self, name: str, values: np.ndarray, kernels: bool = False) -> np.ndarray:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        if kernels:
            options.register_custom_ops_library(str(DEVICES["cpu"].library))
        session = onnxruntime.InferenceSession(self.paths[name], options, providers=["CPUExecutionProvider"])
        return session.run(None, {"codes" if name == "codes" else "pixels": values})[0]


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    with open_golden("m3") as checkpoint:
        exported = Exported(checkpoint, tmp_path_factory.mktemp("m3"))
        exported.reference = Vqgan(checkpoint.vq).eval().requires_grad_(False)
        state = exported.reference.state_dict()
        exported.reference.load_state_dict({name: checkpoint.vq_tensor(name).float() for name in state})
    return exported


def golden_codes() -> np.ndarray:
    return np.array(GOLDEN.record["vq_indices"], np.int64).reshape(1, 32, 32)


def as_input(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1.0


def assert_same_picture(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= IMAGE_LEVELS
    assert (difference > 0).mean() <= IMAGE_SHARE


each_executor = pytest.mark.parametrize("kernels", [False, True], ids=["body", "kernels"])


@each_executor
def test_the_golden_picture(golden, kernels):
    assert_same_picture(golden.run("codes", golden_codes(), kernels)[0], GOLDEN.arrays["image_uint8"])


@each_executor
def test_the_codes_of_the_golden_picture(golden, kernels):
    pixels = GOLDEN.arrays["image_uint8"][None]
    codes = golden.run("draft", pixels, kernels)
    assert codes.dtype == np.int64
    assert np.array_equal(codes, golden.reference.encode(as_input(pixels)).numpy())
    assert len(np.unique(codes)) > 8


@each_executor
@each_small
def test_pictures_of_random_codes(config, kernels, tmp_path):
    autoencoder = Autoencoder(config)
    codes = np.random.default_rng(1).integers(0, config.codes, (3, config.grid, config.grid))
    expected = to_uint8(autoencoder.reference.decode(torch.from_numpy(codes))).numpy()
    assert expected.std() > 8
    assert_same_picture(Exported(autoencoder, tmp_path).run("codes", codes, kernels), expected)


@each_executor
@each_small
def test_codes_of_random_pictures(config, kernels, tmp_path):
    autoencoder = Autoencoder(config)
    side = config.image_size
    pixels = np.random.default_rng(2).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    expected = autoencoder.reference.encode(as_input(pixels)).numpy()
    assert len(np.unique(expected)) > 1
    assert np.array_equal(Exported(autoencoder, tmp_path).run("draft", pixels, kernels), expected)


@each_executor
def test_convolutions_of_float16(kernels, tmp_path):
    """As the reference whose 3x3 convolutions are rounded; how far that is from the released one is in the README."""
    autoencoder = Autoencoder(SMALL[0])
    (tmp_path / "half").mkdir()
    exported = Exported(autoencoder, tmp_path / "half", TensorProto.FLOAT16)
    for name, weight in autoencoder.state.items():
        if weight.ndim == 4 and weight.shape[-1] == 3 and "downsample" not in name:
            weight.copy_(weight.half().float())
    codes = np.random.default_rng(1).integers(0, 11, (3, 8, 8))
    expected = to_uint8(autoencoder.reference.decode(torch.from_numpy(codes))).numpy()
    assert_same_picture(exported.run("codes", codes, kernels), expected)
    pixels = np.random.default_rng(2).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    expected = autoencoder.reference.encode(as_input(pixels)).numpy()
    assert np.array_equal(exported.run("draft", pixels, kernels), expected)
    stored = {tensor.data_type for tensor in exported.models["codes"].graph.initializer if tensor.external_data}
    assert stored == {TensorProto.FLOAT, TensorProto.FLOAT16}


def test_levels_are_clamped_and_truncated(tmp_path):
    autoencoder = Autoencoder(SMALL[0])
    # With no weights in the last convolution a channel is its bias: 0.999 * 255 = 254.7, and beyond both ends.
    autoencoder.state["decoder.conv_out.weight"].zero_()
    autoencoder.state["decoder.conv_out.bias"].copy_(torch.tensor([0.998, 1.5, -1.5]))
    image = Exported(autoencoder, tmp_path).run("codes", np.zeros((1, 8, 8), np.int64))
    assert image.reshape(-1, 3).tolist() == [[254, 255, 0]] * 16 * 16


def test_a_code_outside_of_the_codebook_is_an_error(tmp_path):
    exported = Exported(Autoencoder(SMALL[0]), tmp_path)
    with pytest.raises(Exception, match="idx=11 must be within the inclusive range"):
        exported.run("codes", np.full((1, 8, 8), 11))


def test_the_graphs_are_float32_and_well_formed(golden):
    for name, model in golden.models.items():
        stored = {tensor.data_type for tensor in model.graph.initializer if tensor.external_data}
        assert stored == {TensorProto.FLOAT}
        onnx.checker.check_model(golden.paths[name], full_check=True)
