"""The GumbelVQ f8 autoencoder of taming-transformers in simple PyTorch.

A picture x [B,3,H,W] in [-1,1] becomes codes [B,H/8,W/8] (encoder, 1x1 convolution, argmax over the codebook's
logits), and codes become a picture (codebook rows, 1x1 convolution, decoder). Parameters are named as in taming's
`GumbelVQ`, so `load_state_dict` takes a released `last.ckpt` without its loss entries.
Source: Esser et al., "Taming Transformers for High-Resolution Image Synthesis", 2021 (arXiv 2012.09841).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from ..checkpoint import VqConfig

GROUPS = 32
EPSILON = 1e-6


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=EPSILON)


class ResidualBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))): [B,C,H,W] -> [B,O,H,W]."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(functional.silu(self.norm1(x)))
        hidden = self.conv2(functional.silu(self.norm2(hidden)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + hidden


class AttentionBlock(nn.Module):
    """x + single-head self-attention over all pixels, with 1x1 convolutions as projections."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (conv(normed).flatten(2) for conv in (self.q, self.k, self.v))  # [B, C, H*W]
        scores = query.transpose(1, 2) @ key * x.shape[1] ** -0.5  # [B, queries, keys]
        mixed = value @ scores.softmax(dim=2).transpose(1, 2)  # [B, C, queries]
        return x + self.proj_out(mixed.reshape_as(x))


class Downsample(nn.Module):
    """3x3 convolution of stride 2, padded with one row below and one column on the right, as in the original."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour x2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Residual, attention, residual at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if the configuration lists the resolution."""

    def __init__(self, channels: int, out_channels: int, blocks: int, attention: bool) -> None:
        super().__init__()
        inputs = [channels] + [out_channels] * (blocks - 1)
        self.block = nn.ModuleList(ResidualBlock(width, out_channels) for width in inputs)
        self.attn = nn.ModuleList(AttentionBlock(out_channels) for _ in inputs if attention)

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        return x


def level_resolutions(config: VqConfig) -> Iterator[int]:
    """The side of the picture at each level: the full resolution, then half of it, and so on."""
    for level in range(len(config.multipliers)):
        yield config.resolution >> level


class Encoder(nn.Module):
    """[B,3,H,W] -> [B,z,H/8,W/8]."""

    def __init__(self, config: VqConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level, resolution in enumerate(level_resolutions(config)):
            previous = widths[level - 1] if level else config.channels
            stage = Level(previous, widths[level], config.blocks, resolution in config.attention_resolutions)
            if level < len(widths) - 1:
                stage.downsample = Downsample(widths[level])
            self.down.append(stage)
        self.mid = Middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level, stage in enumerate(self.down):
            x = stage(x)
            if level < len(self.down) - 1:
                x = stage.downsample(x)
        return self.conv_out(functional.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """[B,z,H/8,W/8] -> [B,3,H,W], with one more residual block per level than the encoder and no final tanh."""

    def __init__(self, config: VqConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for level, resolution in enumerate(level_resolutions(config)):
            previous = widths[min(level + 1, len(widths) - 1)]
            stage = Level(previous, widths[level], config.blocks + 1, resolution in config.attention_resolutions)
            if level > 0:
                stage.upsample = Upsample(widths[level])
            self.up.append(stage)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(range(len(self.up))):
            x = self.up[level](x)
            if level > 0:
                x = self.up[level].upsample(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class GumbelQuantize(nn.Module):
    """A codebook with logits: `proj` scores every code, `embed` holds the codes' vectors."""

    def __init__(self, config: VqConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.z_channels, config.codes, 1)
        self.embed = nn.Embedding(config.codes, config.embed_dim)

    def forward(self, z: Tensor) -> Tensor:
        """[B,z,h,w] -> codes int64 [B,h,w]. Without the noise of training, a code is the argmax of its logits."""
        return self.proj(z).argmax(dim=1)

    def lookup(self, codes: Tensor) -> Tensor:
        """codes [B,h,w] -> their vectors [B,embed,h,w]."""
        return self.embed(codes).permute(0, 3, 1, 2)


class Vqgan(nn.Module):
    """GumbelVQ: encoder, quantiser, decoder."""

    def __init__(self, config: VqConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = GumbelQuantize(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def encode(self, x: Tensor) -> Tensor:
        """A picture [B,3,H,W] in [-1,1] -> its codes, int64 [B,H/8,W/8]."""
        return self.quantize(self.quant_conv(self.encoder(x)))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B,h,w] -> a picture [B,3,8h,8w], nominally in [-1,1]."""
        return self.decoder(self.post_quant_conv(self.quantize.lookup(codes)))


def to_uint8(picture: Tensor) -> Tensor:
    """[B,3,H,W] nominally in [-1,1] -> uint8 [B,H,W,3]. 255x is truncated, not rounded, as in the original."""
    unit = (picture.clamp(-1.0, 1.0) + 1.0) / 2.0
    return (255.0 * unit).to(torch.uint8).permute(0, 2, 3, 1)
