"""The blocks that the VQGAN's decoder (`codes`) and encoder (`draft`) are made of.

Names are those of taming-transformers (Esser et al., 2021, arXiv 2012.09841). Letters: B batch, C channels. All
weights are float32: the original decodes in float32, and a wrong level in a picture is visible where one in a
feature is not.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from .. import fold
from ..checkpoint import Checkpoint
from ..weights import WeightFile
from .builder import GraphBuilder

GROUPS = 32
EPSILON = 1e-6


class VqBlocks:
    """Appends blocks to `graph`; values are [B, C, side, side], weights go to `file`."""

    def __init__(self, checkpoint: Checkpoint, graph: GraphBuilder, file: WeightFile) -> None:
        self.checkpoint, self.graph, self.file = checkpoint, graph, file

    def tensor(self, name: str) -> np.ndarray:
        """A tensor of the checkpoint in float32."""
        return self.checkpoint.vq_tensor(name).float().numpy()

    def weight(self, key: str, produce: Callable[[], np.ndarray]) -> str:
        return self.graph.weight(self.file, f"vq/{key}", TensorProto.FLOAT, produce)

    def released(self, name: str) -> str:
        """A tensor of the checkpoint, stored as it is."""
        return self.weight(name, lambda: self.tensor(name))

    def convolution(self, name: str, x: str, stride: int = 1, pads: tuple[int, int, int, int] = (1, 1, 1, 1)) -> str:
        """A convolution with its bias; pads are top, left, bottom, right."""
        weight, bias = self.released(f"{name}.weight"), self.released(f"{name}.bias")
        return str(self.graph.op("Conv", x, weight, bias, strides=[stride, stride], pads=list(pads)))

    def norm(self, name: str, x: str, channels: int, side: int) -> str:
        """Group normalisation.

        Spelled out as an instance normalisation of the groups: ONNX Runtime has no CPU kernel for GroupNormalization
        and takes 1.7 times as long over its standard body.
        """

        def column(part: str) -> str:
            return self.weight(f"{name}.{part}", lambda: self.tensor(f"{name}.{part}").reshape(-1, 1, 1))

        graph = self.graph
        groups = graph.op("Reshape", x, graph.constant([0, GROUPS, -1], np.int64))
        one, zero = graph.constant(np.ones(GROUPS), np.float32), graph.constant(np.zeros(GROUPS), np.float32)
        groups = graph.op("InstanceNormalization", groups, one, zero, epsilon=EPSILON)
        normed = graph.op("Reshape", groups, graph.constant([0, channels, side, side], np.int64))
        return str(graph.op("Add", graph.op("Mul", normed, column("weight")), column("bias")))

    def norm_swish(self, name: str, x: str, channels: int, side: int) -> str:
        normed = self.norm(name, x, channels, side)
        return str(self.graph.op("Mul", normed, self.graph.op("Sigmoid", normed)))

    def residual(self, name: str, x: str, before: int, channels: int, side: int) -> str:
        """x + conv(swish(norm(conv(swish(norm(x)))))); a 1x1 convolution on x where the channels change."""
        with self.graph.scope(name):
            hidden = self.convolution(f"{name}.conv1", self.norm_swish(f"{name}.norm1", x, before, side))
            hidden = self.convolution(f"{name}.conv2", self.norm_swish(f"{name}.norm2", hidden, channels, side))
            if before != channels:
                x = self.convolution(f"{name}.nin_shortcut", x, pads=(0, 0, 0, 0))
            return str(self.graph.op("Add", x, hidden))

    def attention(self, name: str, x: str, channels: int, side: int) -> str:
        """x + single-head attention over all positions, queries, keys and values from one matrix.

        Not the Attention operator: ONNX Runtime runs that on one thread per head, and there is one head. The scale
        1/sqrt(C) is in the query rows.
        """

        def packed_weight() -> np.ndarray:
            query, key, value = (self.tensor(f"{name}.{part}.weight")[:, :, 0, 0] for part in "qkv")
            return np.concatenate([fold.scale(query, channels**-0.5), key, value]).T

        def packed_bias() -> np.ndarray:
            query, key, value = (self.tensor(f"{name}.{part}.bias") for part in "qkv")
            return np.concatenate([fold.scale(query, channels**-0.5), key, value])

        def out_weight() -> np.ndarray:
            return self.tensor(f"{name}.proj_out.weight")[:, :, 0, 0].T

        graph = self.graph
        with graph.scope(name):
            normed = self.norm(f"{name}.norm", x, channels, side)
            columns = graph.op("Reshape", normed, graph.constant([0, channels, side * side], np.int64))
            rows = graph.op("Transpose", columns, perm=[0, 2, 1])
            weight = self.weight(f"{name}.qkv.weight", packed_weight)
            bias = self.weight(f"{name}.qkv.bias", packed_bias)
            packed = graph.op("Add", graph.op("MatMul", rows, weight), bias)
            query, key, value = graph.op("Split", packed, outputs=3, axis=-1, num_outputs=3)
            scores = graph.op("MatMul", query, graph.op("Transpose", key, perm=[0, 2, 1]))
            mixed = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), value)
            mixed = graph.op("MatMul", mixed, self.weight(f"{name}.proj_out.weight", out_weight))
            mixed = graph.op("Add", mixed, self.released(f"{name}.proj_out.bias"))
            columns = graph.op("Transpose", mixed, perm=[0, 2, 1])
            image = graph.op("Reshape", columns, graph.constant([0, channels, side, side], np.int64))
            return str(graph.op("Add", x, image))

    def middle(self, name: str, x: str, channels: int, side: int) -> str:
        """Residual, attention, residual at the lowest resolution."""
        x = self.residual(f"{name}.block_1", x, channels, channels, side)
        x = self.attention(f"{name}.attn_1", x, channels, side)
        return self.residual(f"{name}.block_2", x, channels, channels, side)

    def level(self, name: str, x: str, before: int, channels: int, blocks: int, side: int) -> str:
        """The residual blocks of one resolution, each followed by attention where the config asks for it there."""
        for block in range(blocks):
            x = self.residual(f"{name}.block.{block}", x, before if block == 0 else channels, channels, side)
            if side in self.checkpoint.vq.attention_resolutions:
                x = self.attention(f"{name}.attn.{block}", x, channels, side)
        return x

    def downsample(self, name: str, x: str) -> str:
        """A 3x3 convolution of stride 2, padded below and to the right only, as in the original."""
        with self.graph.scope(name):
            return self.convolution(f"{name}.conv", x, stride=2, pads=(0, 0, 1, 1))

    def upsample(self, name: str, x: str, channels: int, side: int) -> str:
        """Nearest x2 and a 3x3 convolution, computed on the small image (see fold.upsample_kernel).

        Two Transposes interleave the phases, first along rows, then whole rows: in ONNX Runtime on a CPU they take
        half the time of one DepthToSpace, which moves single numbers through six dimensions.
        """
        graph, grown = self.graph, side + 1
        with graph.scope(name):
            kernel = self.weight(
                f"{name}.conv.phases", lambda: fold.upsample_kernel(self.tensor(f"{name}.conv.weight"))
            )
            bias = self.weight(f"{name}.conv.phases_bias", lambda: np.repeat(self.tensor(f"{name}.conv.bias"), 4))
            phases = graph.op("Conv", x, kernel, bias, pads=[1, 1, 1, 1])
            pairs = graph.op("Reshape", phases, graph.constant([0, 2 * channels, 2, grown * grown], np.int64))
            rows = graph.op("Transpose", pairs, perm=[0, 1, 3, 2])
            rows = graph.op("Reshape", rows, graph.constant([0, channels, 2, grown, 2 * grown], np.int64))
            rows = graph.op("Transpose", rows, perm=[0, 1, 3, 2, 4])
            image = graph.op("Reshape", rows, graph.constant([0, channels, 2 * grown, 2 * grown], np.int64))
            first, last, axes = (graph.constant(values, np.int64) for values in ([1, 1], [-1, -1], [2, 3]))
            return str(graph.op("Slice", image, first, last, axes))
