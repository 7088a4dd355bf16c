"""The `draft` graph: the VQGAN's encoder, from a picture to codes."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto

from .. import fold
from ..checkpoint import Checkpoint
from ..weights import WeightFile
from .builder import GraphBuilder
from .vq_blocks import VqBlocks

FLOAT = TensorProto.FLOAT


def build_draft(checkpoint: Checkpoint, own: WeightFile, picture: int) -> ModelProto:
    """pixels uint8 [B, H, W, 3] (RGB), at the config's picture size -> codes int64 [B, h, w].

    A code is the one of largest logit, the noise-free form of the Gumbel quantiser; the two 1x1 convolutions that
    give the logits are one.
    """
    config = checkpoint.vq
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    top, side = len(widths) - 1, config.image_size
    graph = GraphBuilder("draft")
    blocks = VqBlocks(checkpoint, graph, own, picture)

    pixels = graph.input("pixels", TensorProto.UINT8, ["B", side, side, 3])
    with graph.scope("levels"):
        half, one = graph.constant(127.5, np.float32), graph.constant(1, np.float32)
        x = graph.op("Sub", graph.op("Div", graph.op("Cast", pixels, to=FLOAT), half), one)
    x = blocks.convolution("encoder.conv_in", x)
    for level, width in enumerate(widths):
        name = f"encoder.down.{level}"
        x = blocks.level(name, x, widths[level - 1] if level else config.channels, width, config.blocks, side)
        if level < top:
            x = blocks.downsample(f"{name}.downsample", x)
            side //= 2
    x = blocks.middle("encoder.mid", x, widths[top], side)
    x = blocks.norm_swish_convolution("encoder.norm_out", "encoder.conv_out", x)

    def scores() -> tuple[np.ndarray, np.ndarray]:
        parts = ("quant_conv.weight", "quant_conv.bias", "quantize.proj.weight", "quantize.proj.bias")
        return fold.chain_pointwise(*(blocks.tensor(part) for part in parts))

    with graph.scope("codebook"):
        weight = blocks.weight("scores.weight", lambda: scores()[0])
        bias = blocks.weight("scores.bias", lambda: scores()[1])
        logits = graph.op("Add", graph.op("MatMul", x, weight), bias)
        codes = graph.op("ArgMax", logits, axis=-1, keepdims=0)
    graph.output(codes, "codes", TensorProto.INT64, ["B", config.grid, config.grid])
    return graph.model()
