"""The `vision` graph: pixels in, image features of the language model's width out.

CLIP's tower up to the layer that the task reads, then the task's projector. Letters: B batch, P patches, T = P + 1
tokens, K patch side, C tower width, H heads, D head size.
Sources: Radford et al., 2021 (arXiv 2103.00020). Of HealthGPT (arXiv 2502.09838): comprehension reads the last layer
but one, generation the first; the projector is two linears with an exact GELU between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto

from healthgpt_edge.errors import CheckpointError

from .. import fold
from ..checkpoint import Checkpoint
from ..folded import to_float
from ..weights import WeightFile
from .builder import GraphBuilder
from .functions import packed_attention
from .matrices import stored_linear

FLOAT = TensorProto.FLOAT


def build_vision(
    checkpoint: Checkpoint, task: str, base: WeightFile, own: WeightFile, storage: int, block_size: int = 128
) -> ModelProto:
    """The vision graph of `task`: pixels uint8 [B, S, S, 3] (RGB) -> image_features float [B, P, language hidden].

    The tower goes to `base`, where the tasks share it, the projector to `own`. `storage` (an onnx.TensorProto type) is
    how the large matrices are stored, in blocks of `block_size` where it is an integer type; everything is computed
    in float32. Raises CheckpointError.
    """
    return _VisionGraph(checkpoint, task, base, own, storage, block_size).build()


class _VisionGraph:
    """The parts of one vision graph."""

    def __init__(
        self, checkpoint: Checkpoint, task: str, base: WeightFile, own: WeightFile, storage: int, block_size: int
    ) -> None:
        self.checkpoint, self.task, self.base, self.own = checkpoint, task, base, own
        self.storage, self.block_size = storage, block_size
        self.config = checkpoint.vision
        if self.config.image_size % self.config.patch_size:
            raise CheckpointError(
                f"image_size must be a multiple of patch_size, {self.config.patch_size}, got {self.config.image_size}"
            )
        self.graph = GraphBuilder(f"{task}.vision")

    def build(self) -> ModelProto:
        graph, config = self.graph, self.config
        pixels = graph.input("pixels", TensorProto.UINT8, ["B", config.image_size, config.image_size, 3])
        with graph.scope("embeddings"):
            hidden = self._embed(pixels)
        hidden = self._norm("pre_layrnorm", hidden)
        for layer in range(self.checkpoint.tasks[self.task].vision_layers):
            with graph.scope(f"layers.{layer}"):
                hidden = self._layer(f"encoder.layers.{layer}", hidden)
        first, end, axis = (graph.constant([value], np.int64) for value in (1, config.patches + 1, 1))
        hidden = graph.op("Slice", hidden, first, end, axis)  # without the class token
        with graph.scope("projector"):
            hidden = graph.op("Gelu", self._projector("mm_projector.0", hidden))
            hidden = self._projector("mm_projector.2", hidden)
        graph.output(hidden, "image_features", FLOAT, ["B", config.patches, self.checkpoint.language.hidden])
        return graph.model()

    def _embed(self, pixels: str) -> str:
        """[B, S, S, 3] -> [B, T, C]: the patches behind an empty row, times one matrix, plus one table."""
        graph, config, side = self.graph, self.config, self.config.patch_size
        rows = config.image_size // side
        split = graph.constant([0, rows, side, rows, side, 3], np.int64)
        values = graph.op("Sub", graph.op("Cast", pixels, to=FLOAT), graph.constant(fold.PIXEL_CENTRE, np.float32))
        values = graph.op("Reshape", values, split)
        values = graph.op("Transpose", values, perm=[0, 1, 3, 2, 4, 5])
        patches = graph.op("Reshape", values, graph.constant([0, rows * rows, side * side * 3], np.int64))
        patches = graph.op("Pad", patches, graph.constant([0, 1, 0, 0, 0, 0], np.int64))

        def folded() -> tuple[np.ndarray, np.ndarray]:
            return fold.patch_matrix(self._tower("embeddings.patch_embedding.weight"), config.mean, config.std)

        def table() -> np.ndarray:
            class_embedding = self._tower("embeddings.class_embedding")
            return fold.position_table(
                class_embedding, self._tower("embeddings.position_embedding.weight"), folded()[1]
            )

        # Always float32: divided by 255 std, most of the patch weights would be subnormal numbers in float16. So no
        # `Linear` either, whose body is for one type per graph.
        matrix = graph.weight(self.base, "vision/patches", FLOAT, lambda: folded()[0])
        positions = graph.weight(self.base, "vision/positions", FLOAT, table)
        return str(graph.op("Add", graph.op("MatMul", patches, matrix), positions))

    def _layer(self, name: str, hidden: str) -> str:
        graph = self.graph
        with graph.scope("attention"):
            packed = self._linear(f"{name}.self_attn", "qkv", self._norm(f"{name}.layer_norm1", hidden))
            attended = graph.call(packed_attention(), packed, heads=self.config.heads)
            hidden = self._linear(f"{name}.self_attn", "out_proj", attended, residual=hidden)
        with graph.scope("mlp"):
            wide = self._linear(f"{name}.mlp", "fc1", self._norm(f"{name}.layer_norm2", hidden))
            return self._linear(f"{name}.mlp", "fc2", wide, residual=hidden, quick_gelu=True)

    def _linear(self, block: str, name: str, x: str, **around: Any) -> str:
        """A linear of the tower; `qkv` is its three projections in one matrix. around: as of `stored_linear`."""
        parts = [f"{block}.{part}_proj" for part in name] if name == "qkv" else [f"{block}.{name}"]

        def read(kind: str) -> np.ndarray:
            return np.concatenate([self._tower(f"{part}.{kind}") for part in parts])

        return self._product(self.base, f"vision/{block}.{name}", x, read, **around)

    def _projector(self, name: str, x: str) -> str:
        def read(kind: str) -> np.ndarray:
            return to_float(self.checkpoint.task_tensor(self.task, f"{name}.{kind}"))

        return self._product(self.own, name, x, read)

    def _product(self, file: WeightFile, key: str, x: str, read: Callable[[str], np.ndarray], **around: Any) -> str:
        """x W + b, where `read` gives the "weight" [O, C] and the "bias" [O]. around: as of `stored_linear`."""
        bias = self.graph.weight(file, f"{key}.bias", FLOAT, lambda: read("bias"))
        return stored_linear(
            self.graph, x, file, f"{key}.weight", self.storage, self.block_size, lambda: read("weight"), bias, **around
        )

    def _norm(self, name: str, x: str) -> str:
        def weight(part: str) -> str:
            return self.graph.weight(self.base, f"vision/{name}.{part}", FLOAT, lambda: self._tower(f"{name}.{part}"))

        scale, bias = weight("weight"), weight("bias")
        return str(self.graph.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=self.config.epsilon))

    def _tower(self, name: str) -> np.ndarray:
        return to_float(self.checkpoint.vision_tensor(name))
