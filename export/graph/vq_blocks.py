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

    def norm(self, name: str, x: str) -> str:
        scale, bias = self.released(f"{name}.weight"), self.released(f"{name}.bias")
        return str(self.graph.op("GroupNormalization", x, scale, bias, num_groups=GROUPS, epsilon=EPSILON))

    def norm_swish(self, name: str, x: str) -> str:
        normed = self.norm(name, x)
        return str(self.graph.op("Mul", normed, self.graph.op("Sigmoid", normed)))

    def residual(self, name: str, x: str, widen: bool) -> str:
        """x + conv(swish(norm(conv(swish(norm(x)))))); `widen` where the number of channels changes."""
        with self.graph.scope(name):
            hidden = self.convolution(f"{name}.conv1", self.norm_swish(f"{name}.norm1", x))
            hidden = self.convolution(f"{name}.conv2", self.norm_swish(f"{name}.norm2", hidden))
            shortcut = self.convolution(f"{name}.nin_shortcut", x, pads=(0, 0, 0, 0)) if widen else x
            return str(self.graph.op("Add", shortcut, hidden))

    def attention(self, name: str, x: str, channels: int, side: int) -> str:
        """x + single-head attention over all positions, queries, keys and values from one matrix."""

        def matrix(*parts: str) -> np.ndarray:
            return fold.input_major(
                np.concatenate([self.tensor(f"{name}.{part}.weight")[:, :, 0, 0] for part in parts])
            )

        graph = self.graph
        with graph.scope(name):
            flat = graph.op("Reshape", self.norm(f"{name}.norm", x), graph.constant([0, channels, -1], np.int64))
            rows = graph.op("Transpose", flat, perm=[0, 2, 1])
            projection = self.weight(f"{name}.qkv.weight", lambda: matrix("q", "k", "v"))
            bias = self.weight(
                f"{name}.qkv.bias", lambda: np.concatenate([self.tensor(f"{name}.{part}.bias") for part in "qkv"])
            )
            packed = graph.op("Add", graph.op("MatMul", rows, projection), bias)
            query, key, value = graph.op("Split", packed, outputs=3, axis=-1, num_outputs=3)
            mixed = graph.op("Attention", query, key, value, q_num_heads=1, kv_num_heads=1)
            out = self.weight(f"{name}.proj_out.weight", lambda: matrix("proj_out"))
            mixed = graph.op("Add", graph.op("MatMul", mixed, out), self.released(f"{name}.proj_out.bias"))
            columns = graph.op("Transpose", mixed, perm=[0, 2, 1])
            image = graph.op("Reshape", columns, graph.constant([0, channels, side, side], np.int64))
            return str(graph.op("Add", x, image))

    def middle(self, name: str, x: str, channels: int, side: int) -> str:
        """Residual, attention, residual at the lowest resolution."""
        x = self.residual(f"{name}.block_1", x, widen=False)
        x = self.attention(f"{name}.attn_1", x, channels, side)
        return self.residual(f"{name}.block_2", x, widen=False)

    def level(self, name: str, x: str, before: int, channels: int, blocks: int, side: int) -> str:
        """The residual blocks of one resolution, each followed by attention where the config asks for it there."""
        for block in range(blocks):
            x = self.residual(f"{name}.block.{block}", x, widen=block == 0 and before != channels)
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
