"""The VQGAN, a GumbelVQ of taming-transformers: model.yaml, and its tensors' names and shapes in last.ckpt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from healthgpt_edge.errors import CheckpointError

from .fields import Fields
from .files import label, read_text
from .language import MAX_WIDTH

TARGET = "taming.models.vqgan.GumbelVQ"
MAX_CODES, MAX_SIDE, MAX_LEVELS, MAX_BLOCKS = 1 << 20, 4096, 12, 64
MAX_YAML_BYTES = 1 << 20
# All settings that may occur. dropout only matters in training.
DDCONFIG_KEYS = (
    "attn_resolutions",
    "ch",
    "ch_mult",
    "double_z",
    "dropout",
    "in_channels",
    "num_res_blocks",
    "out_ch",
    "resolution",
    "z_channels",
)


@dataclass(frozen=True, slots=True)
class VqConfig:
    """The dimensions of the codebook and of the convolutional encoder and decoder around it."""

    codes: int
    embed_dim: int
    z_channels: int
    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    attention_resolutions: tuple[int, ...]
    resolution: int
    in_channels: int = 3
    out_channels: int = 3

    @property
    def grid(self) -> int:
        """The side of the code grid: a picture has grid * grid codes."""
        return self.resolution >> (len(self.multipliers) - 1)

    @property
    def image_size(self) -> int:
        """The side of the decoded picture, in pixels."""
        return self.resolution


def find_file(folder: Path, name: str) -> Path:
    """The path of model.yaml or last.ckpt: in `folder` itself, or in the subfolder of the published download."""
    published = folder / {"model.yaml": "configs", "last.ckpt": "checkpoints"}[name] / name
    return published if published.is_file() and not (folder / name).exists() else folder / name


def read_vqgan(folder: Path) -> VqConfig:
    """Read model.yaml. Raises CheckpointError for settings of taming that are not implemented here."""
    path = find_file(folder, "model.yaml")
    try:
        content = yaml.safe_load(read_text(path, MAX_YAML_BYTES))
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML raises the other errors for tagged scalars of a wrong form, such as `!!int ""`, or for deep nesting.
        raise CheckpointError(f"{label(path)}: expected YAML, found {type(error).__name__}") from error
    model = Fields(path, content).section("model")
    model.require("target", TARGET)
    params = model.section("params")
    ddconfig = params.section("ddconfig")
    params.require("remap", None, default=None)
    ddconfig.only(DDCONFIG_KEYS)
    ddconfig.require("double_z", False)
    multipliers = ddconfig.integers("ch_mult", 1, 1024, most=MAX_LEVELS)
    resolution = ddconfig.integer("resolution", 1, MAX_SIDE)
    if resolution % (1 << (len(multipliers) - 1)):
        raise ddconfig.error("resolution", f"a multiple of {1 << (len(multipliers) - 1)}", resolution)
    channels = ddconfig.integer("ch", 32, MAX_WIDTH)
    if channels % 32:
        raise ddconfig.error("ch", "a multiple of the 32 groups of its norms", channels)
    embed_dim = params.integer("embed_dim", 1, MAX_WIDTH)
    z_channels = ddconfig.integer("z_channels", 1, MAX_WIDTH)
    if embed_dim != z_channels:
        # taming builds the quantiser's projection for z_channels inputs, but its inputs have embed_dim channels.
        raise params.error("embed_dim", f"z_channels, {z_channels}", embed_dim)
    attention = ddconfig.values.get("attn_resolutions")
    return VqConfig(
        codes=params.integer("n_embed", 1, MAX_CODES),
        embed_dim=embed_dim,
        z_channels=z_channels,
        channels=channels,
        multipliers=multipliers,
        blocks=ddconfig.integer("num_res_blocks", 1, MAX_BLOCKS),
        attention_resolutions=()
        if attention == []
        else ddconfig.integers("attn_resolutions", 1, MAX_SIDE, most=MAX_LEVELS),
        resolution=resolution,
        in_channels=ddconfig.integer("in_channels", 3, 3),
        out_channels=ddconfig.integer("out_ch", 3, 3),
    )


def vqgan_shapes(config: VqConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of encoder, quantiser and decoder, by its key in the state_dict."""
    tensors = _Tensors()
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    last = len(widths) - 1

    tensors.convolution("encoder.conv_in", config.in_channels, config.channels, 3)
    width = config.channels
    for level, after in enumerate(widths):
        for block in range(config.blocks):
            tensors.residual(f"encoder.down.{level}.block.{block}", width, after)
            width = after
            if config.resolution >> level in config.attention_resolutions:
                tensors.attention(f"encoder.down.{level}.attn.{block}", width)
        if level != last:
            tensors.convolution(f"encoder.down.{level}.downsample.conv", width, width, 3)
    tensors.middle("encoder.mid", width)
    tensors.norm("encoder.norm_out", width)
    tensors.convolution("encoder.conv_out", width, config.z_channels, 3)

    tensors.convolution("quant_conv", config.z_channels, config.embed_dim, 1)
    tensors.convolution("quantize.proj", config.z_channels, config.codes, 1)
    tensors.shapes["quantize.embed.weight"] = (config.codes, config.embed_dim)
    tensors.convolution("post_quant_conv", config.embed_dim, config.z_channels, 1)

    tensors.convolution("decoder.conv_in", config.z_channels, width, 3)
    tensors.middle("decoder.mid", width)
    for level in range(last, -1, -1):
        for block in range(config.blocks + 1):
            tensors.residual(f"decoder.up.{level}.block.{block}", width, widths[level])
            width = widths[level]
            if config.resolution >> level in config.attention_resolutions:
                tensors.attention(f"decoder.up.{level}.attn.{block}", width)
        if level != 0:
            tensors.convolution(f"decoder.up.{level}.upsample.conv", width, width, 3)
    tensors.norm("decoder.norm_out", width)
    tensors.convolution("decoder.conv_out", width, config.out_channels, 3)
    return tensors.shapes


class _Tensors:
    """Collects names and shapes block by block."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}

    def convolution(self, name: str, before: int, after: int, kernel: int) -> None:
        self.shapes[f"{name}.weight"] = (after, before, kernel, kernel)
        self.shapes[f"{name}.bias"] = (after,)

    def norm(self, name: str, width: int) -> None:
        self.shapes[f"{name}.weight"] = self.shapes[f"{name}.bias"] = (width,)

    def residual(self, name: str, before: int, after: int) -> None:
        self.norm(f"{name}.norm1", before)
        self.convolution(f"{name}.conv1", before, after, 3)
        self.norm(f"{name}.norm2", after)
        self.convolution(f"{name}.conv2", after, after, 3)
        if before != after:
            self.convolution(f"{name}.nin_shortcut", before, after, 1)

    def attention(self, name: str, width: int) -> None:
        self.norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            self.convolution(f"{name}.{part}", width, width, 1)

    def middle(self, name: str, width: int) -> None:
        self.residual(f"{name}.block_1", width, width)
        self.attention(f"{name}.attn_1", width)
        self.residual(f"{name}.block_2", width, width)


def is_training_state(key: str) -> bool:
    """Whether only training needs this key: discriminator, perceptual loss, averages of weights. All are skipped."""
    return not key.startswith(("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv."))
