"""CLIP's vision tower: its configuration, its preprocessing, and its tensors' names and shapes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .fields import Fields
from .files import TensorSource, read_json
from .language import MAX_LAYERS, MAX_WIDTH
from .pickles import PickleSource
from .shards import SafetensorsSource

MAX_IMAGE_SIZE = 4096
# Width, layers and patch size of both ViT-L/14 towers. The better known one is for pictures of 224 pixels.
VIT_LARGE = (1024, 24, 14)
PREFIX = "vision_model."


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The tower's dimensions. `mean` and `std` are for pixel values in [0, 1], in the order R, G, B."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    image_size: int
    patch_size: int
    epsilon: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def patches(self) -> int:
        """The number of an image's features."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def background(self) -> tuple[int, ...]:
        """The colour with which the original pads a picture: the mean, truncated to 8 bits."""
        return tuple(int(mean * 255) for mean in self.mean)


def read_vision(folder: Path) -> VisionConfig:
    """Read config.json and preprocessor_config.json. Missing values get the defaults of Hugging Face's CLIP."""
    fields = Fields(folder / "config.json", read_json(folder / "config.json"))
    if fields.require("model_type", "clip", "clip_vision_model") == "clip":
        fields = fields.section("vision_config")
    fields.require("num_channels", 3, default=3)
    fields.require("hidden_act", "quick_gelu", default="quick_gelu")
    hidden = fields.integer("hidden_size", 1, MAX_WIDTH)
    heads = fields.integer("num_attention_heads", 1, MAX_WIDTH)
    if hidden % heads:
        raise fields.error("num_attention_heads", f"a divisor of {hidden}", heads)
    image_size = fields.integer("image_size", 1, MAX_IMAGE_SIZE)
    patch_size = fields.integer("patch_size", 1, image_size)
    # hidden_states[-2] and hidden_states[1] must both exist.
    layers = fields.integer("num_hidden_layers", 2, MAX_LAYERS)
    if (hidden, layers, patch_size) == VIT_LARGE and image_size != 336:
        # No other check would notice the wrong tower: its features have the shape that the projector takes.
        raise fields.error("image_size", "336, as of the clip-vit-large-patch14-336 of every release", image_size)

    picture = Fields(folder / "preprocessor_config.json", read_json(folder / "preprocessor_config.json"))
    for step in ("do_resize", "do_center_crop", "do_normalize", "do_rescale"):
        picture.require(step, True, default=True)
    picture.require("resample", 3, default=3)
    picture.number("rescale_factor", 1 / 255 - 1e-9, 1 / 255 + 1e-9, default=1 / 255)
    for key, allowed in (
        ("size", (image_size, {"shortest_edge": image_size}, {"height": image_size, "width": image_size})),
        ("crop_size", (image_size, {"height": image_size, "width": image_size})),
    ):
        picture.require(key, *allowed)
    return VisionConfig(
        hidden=hidden,
        layers=layers,
        heads=heads,
        intermediate=fields.integer("intermediate_size", 1, MAX_WIDTH),
        image_size=image_size,
        patch_size=patch_size,
        epsilon=fields.number("layer_norm_eps", 1e-12, 1e-2, default=1e-5),
        mean=picture.numbers("image_mean", 3, 0, 1),
        std=picture.numbers("image_std", 3, 0.001, 1),
    )


def open_vision(folder: Path) -> TensorSource:
    """The tower's weights, from safetensors files if there are any, otherwise from pytorch_model.bin."""
    if (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file():
        return SafetensorsSource(folder)
    return PickleSource(folder / "pytorch_model.bin")


def vision_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the vision tower, by its released key."""
    width, patch = config.hidden, config.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": (config.patches + 1, width),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    linears: dict[str, tuple[int, int]] = {}
    for layer in range(config.layers):
        prefix = f"encoder.layers.{layer}"
        norms += [f"{prefix}.layer_norm1", f"{prefix}.layer_norm2"]
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linears[f"{prefix}.self_attn.{name}"] = (width, width)
        linears[f"{prefix}.mlp.fc1"] = (config.intermediate, width)
        linears[f"{prefix}.mlp.fc2"] = (width, config.intermediate)
    for name in norms:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)
    for name, shape in linears.items():
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]
    return {PREFIX + name: shape for name, shape in shapes.items()}


def is_other_half(key: str) -> bool:
    """Whether HealthGPT never uses this key: CLIP's text tower, its projections, and position ids (0, 1, 2, ...)."""
    return key.startswith(("text_model.", "text_projection.", "visual_projection.")) or key in (
        "logit_scale",
        "vision_model.embeddings.position_ids",
    )
