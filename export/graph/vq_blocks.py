"""The blocks that the VQGAN's decoder (`codes`) and encoder (`draft`) are made of.

Names are those of taming-transformers (Esser et al., 2021, arXiv 2012.09841). Letters: B batch, C channels in, O
channels out. Values are channels-last, and all arithmetic is float32, as in the original: a wrong pixel level is
visible, a rounded feature is not. Only the weights of the 3x3 convolutions may be stored as float16.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from .. import fold
from ..checkpoint import Checkpoint
from ..folded import to_float
from ..weights import WeightFile
from . import functions
from .builder import GraphBuilder

GROUPS = 32


class VqBlocks:
    """Appends blocks to `graph`; values are [B, side, side, C], weights go to `file`.

    picture: the type of the 3x3 convolutions' weights, FLOAT or FLOAT16.
    """

    def __init__(self, checkpoint: Checkpoint, graph: GraphBuilder, file: WeightFile, picture: int) -> None:
        self.checkpoint, self.graph, self.file, self.picture = checkpoint, graph, file, picture

    def tensor(self, name: str) -> np.ndarray:
        """A tensor of the checkpoint in float32."""
        return to_float(self.checkpoint.vq_tensor(name))

    def weight(self, key: str, produce: Callable[[], np.ndarray], data_type: int = TensorProto.FLOAT) -> str:
        return self.graph.weight(self.file, f"vq/{key}", data_type, produce)

    def released(self, name: str) -> str:
        """A tensor of the checkpoint, stored as it is."""
        return self.weight(name, lambda: self.tensor(name))

    def kernel(self, name: str) -> tuple[str, str]:
        """A convolution's weight, stored as [3, 3, C, O], and its bias [O]."""
        key = f"{name}.weight"
        stored = self.weight(key, lambda: self.tensor(key).transpose(2, 3, 1, 0), self.picture)
        return stored, self.released(f"{name}.bias")

    def convolution(self, name: str, x: str) -> str:
        """A 3x3 convolution."""
        return str(self.graph.call(functions.convolution(self.picture), x, *self.kernel(name)))

    def norm_swish_convolution(self, norm: str, name: str, x: str, residual: str | None = None) -> str:
        """conv(swish(norm(x))), plus `residual` if there is one."""
        scale, shift = self.released(f"{norm}.weight"), self.released(f"{norm}.bias")
        inputs = [x, *self.kernel(name), scale, shift]
        if residual is None:
            function = functions.norm_swish_convolution(self.picture)
        else:
            function, inputs = functions.residual_convolution(self.picture), [*inputs, residual]
        return str(self.graph.call(function, *inputs, within=(functions.norm_swish(),), groups=GROUPS))

    def pointwise(self, name: str, x: str) -> str:
        """A 1x1 convolution: one matrix for all pixels."""
        weight = self.weight(f"{name}.weight", lambda: self.tensor(f"{name}.weight")[:, :, 0, 0].T)
        return str(self.graph.op("Add", self.graph.op("MatMul", x, weight), self.released(f"{name}.bias")))

    def residual(self, name: str, x: str, before: int, channels: int) -> str:
        """x + conv(swish(norm(conv(swish(norm(x)))))); a 1x1 convolution on x where the channels change."""
        with self.graph.scope(name):
            hidden = self.norm_swish_convolution(f"{name}.norm1", f"{name}.conv1", x)
            if before != channels:
                x = self.pointwise(f"{name}.nin_shortcut", x)
            return self.norm_swish_convolution(f"{name}.norm2", f"{name}.conv2", hidden, x)

    def norm(self, name: str, x: str, channels: int) -> str:
        """Group normalisation of rows [B, side * side, C]."""
        graph = self.graph
        grouped = graph.constant([0, -1, GROUPS, channels // GROUPS], np.int64)
        groups, axes = graph.op("Reshape", x, grouped), graph.constant([1, 3], np.int64)
        centred = graph.op("Sub", groups, graph.op("ReduceMean", groups, axes))
        variance = graph.op("ReduceMean", graph.op("Mul", centred, centred), axes)
        deviation = graph.op(
            "Sqrt", graph.op("Add", variance, graph.constant(functions.GROUP_NORM_EPSILON, np.float32))
        )
        normed = graph.op("Div", centred, deviation)
        rows = graph.op("Reshape", normed, graph.constant([0, -1, channels], np.int64))
        return str(
            graph.op("Add", graph.op("Mul", rows, self.released(f"{name}.weight")), self.released(f"{name}.bias"))
        )

    def attention(self, name: str, x: str, channels: int, side: int) -> str:
        """x + single-head attention over all positions, queries, keys and values from one matrix.

        Not the Attention operator: ONNX Runtime runs that on one thread per head, and there is one head. The scale
        1/sqrt(C) is in the query rows.
        """

        def packed(kind: str) -> np.ndarray:
            query, key, value = (self.tensor(f"{name}.{part}.{kind}") for part in "qkv")
            return np.concatenate([fold.scale(query, channels**-0.5), key, value])

        graph = self.graph
        with graph.scope(name):
            rows = graph.op("Reshape", x, graph.constant([0, side * side, channels], np.int64))
            rows = self.norm(f"{name}.norm", rows, channels)
            weight = self.weight(f"{name}.qkv.weight", lambda: packed("weight")[:, :, 0, 0].T)
            bias = self.weight(f"{name}.qkv.bias", lambda: packed("bias"))
            product = graph.op("Add", graph.op("MatMul", rows, weight), bias)
            query, key, value = graph.op("Split", product, outputs=3, axis=-1, num_outputs=3)
            scores = graph.op("MatMul", query, graph.op("Transpose", key, perm=[0, 2, 1]))
            mixed = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), value)
            mixed = self.pointwise(f"{name}.proj_out", mixed)
            image = graph.op("Reshape", mixed, graph.constant([0, side, side, channels], np.int64))
            return str(graph.op("Add", x, image))

    def middle(self, name: str, x: str, channels: int, side: int) -> str:
        """Residual, attention, residual at the lowest resolution."""
        x = self.residual(f"{name}.block_1", x, channels, channels)
        x = self.attention(f"{name}.attn_1", x, channels, side)
        return self.residual(f"{name}.block_2", x, channels, channels)

    def level(self, name: str, x: str, before: int, channels: int, blocks: int, side: int) -> str:
        """The residual blocks of one resolution, each followed by attention where the config asks for it there."""
        for block in range(blocks):
            x = self.residual(f"{name}.block.{block}", x, before if block == 0 else channels, channels)
            if side in self.checkpoint.vq.attention_resolutions:
                x = self.attention(f"{name}.attn.{block}", x, channels, side)
        return x

    def downsample(self, name: str, x: str) -> str:
        """A 3x3 convolution of stride 2, padded below and to the right only, as in the original."""
        graph = self.graph
        with graph.scope(name):
            columns = graph.op("Transpose", x, perm=[0, 3, 1, 2])
            weight, bias = self.released(f"{name}.conv.weight"), self.released(f"{name}.conv.bias")
            halved = graph.op("Conv", columns, weight, bias, strides=[2, 2], pads=[0, 0, 1, 1])
            return str(graph.op("Transpose", halved, perm=[0, 2, 3, 1]))

    def upsample(self, name: str, x: str) -> str:
        """Nearest x2 and a 3x3 convolution."""
        with self.graph.scope(name):
            return str(self.graph.call(functions.enlarged_convolution(self.picture), x, *self.kernel(f"{name}.conv")))
