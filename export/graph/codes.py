"""The `codes` graph: the VQGAN's decoder, from codes to a picture."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto

from .. import fold
from ..checkpoint import Checkpoint
from ..weights import WeightFile
from .builder import GraphBuilder
from .vq_blocks import VqBlocks


def build_codes(checkpoint: Checkpoint, own: WeightFile, picture: int) -> ModelProto:
    """codes int64 [B, h, w] -> image uint8 [B, H, W, 3] (RGB), at the config's grid and picture size.

    The reverse of `build_draft`; the convolution after the codebook is folded into it. Codes
    lie in [0, N): Gather refuses larger ones and counts negative ones from the end.
    """
    config = checkpoint.vq
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    top, side = len(widths) - 1, config.grid
    graph = GraphBuilder("codes")
    blocks = VqBlocks(checkpoint, graph, own, picture)

    codes = graph.input("codes", TensorProto.INT64, ["B", side, side])

    def codebook() -> np.ndarray:
        parts = ("quantize.embed.weight", "post_quant_conv.weight", "post_quant_conv.bias")
        return fold.convolved_codebook(*(blocks.tensor(part) for part in parts))

    with graph.scope("codebook"):
        table = blocks.weight("codebook", codebook)
        x = graph.op("Gather", table, codes, axis=0)
    x = blocks.convolution("decoder.conv_in", x)
    x = blocks.middle("decoder.mid", x, widths[top], side)
    for level in range(top, -1, -1):
        name, before = f"decoder.up.{level}", widths[min(level + 1, top)]
        x = blocks.level(name, x, before, widths[level], config.blocks + 1, side)
        if level:
            x = blocks.upsample(f"{name}.upsample", x)
            side *= 2
    x = blocks.norm_swish_convolution("decoder.norm_out", "decoder.conv_out", x)
    with graph.scope("levels"):
        low, high, two, full = (graph.constant(value, np.float32) for value in (-1, 1, 2, 255))
        unit = graph.op("Div", graph.op("Add", graph.op("Clip", x, low, high), high), two)
        # Cast truncates, as the original does.
        image = graph.op("Cast", graph.op("Mul", unit, full), to=TensorProto.UINT8)
    graph.output(image, "image", TensorProto.UINT8, ["B", config.image_size, config.image_size, 3])
    return graph.model()
