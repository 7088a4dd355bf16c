"""The base language model: its configuration, its generation settings, and its tensors' names and shapes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .fields import Fields
from .files import read_json

# Far above every released model, and too small to exhaust the memory on their own.
MAX_LAYERS, MAX_WIDTH, MAX_VOCABULARY, MAX_POSITIONS = 512, 1 << 18, 1 << 22, 1 << 24

Architecture = Literal["phi3", "qwen2"]
PHI3_LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
QWEN2_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
# Settings that greedy decoding of one sequence follows, or that do not affect it: sampling, beams, length limits.
GENERATION_KEYS = (
    "_from_model_config",
    "bos_token_id",
    "cache_implementation",
    "do_sample",
    "early_stopping",
    "eos_token_id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_p",
    "num_beams",
    "pad_token_id",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
    "transformers_version",
    "typical_p",
    "use_cache",
)


@dataclass(frozen=True, slots=True)
class LanguageConfig:
    """The decoder's dimensions.

    `base_vocab` is the number of the base's vocabulary rows; `vocab` is the number with the added tokens. With a
    `sliding_window` of w, a position sees itself and the w positions before it. `tied`: the base's head is its
    embedding.
    """

    architecture: Architecture
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    base_vocab: int
    rms_epsilon: float
    rope_theta: float
    sliding_window: int | None
    max_positions: int
    tied: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears of a decoder layer in the order of use. Each has an adapter."""
        return PHI3_LINEARS if self.architecture == "phi3" else QWEN2_LINEARS

    def linear_shape(self, linear: str) -> tuple[int, int]:
        """[O, C] of one of `linears`."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.qkv_proj": (queries + 2 * keys, self.hidden),
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
            "mlp.gate_up_proj": (2 * self.intermediate, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }[linear]

    def has_bias(self, linear: str) -> bool:
        """Whether a linear has a bias: only Qwen's q, k and v have one."""
        return linear in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """The base's settings that greedy decoding follows."""

    eos_ids: tuple[int, ...]
    repetition_penalty: float


def read_language(base: Path) -> LanguageConfig:
    """Read config.json of the base. Raises CheckpointError for settings that would need other arithmetic."""
    fields = Fields(base / "config.json", read_json(base / "config.json"))
    architecture: Architecture = fields.require("model_type", "phi3", "qwen2")
    fields.require("hidden_act", "silu")
    fields.require("quantization_config", None, default=None)
    fields.require("partial_rotary_factor", 1.0, 1, default=1.0)
    fields.require("attention_bias", False, default=False)
    fields.require("mlp_bias", False, default=False)
    fields.require("use_sliding_window", False, default=False)
    fields.require("use_mrope", False, default=False)
    hidden = fields.integer("hidden_size", 1, MAX_WIDTH)
    heads = fields.integer("num_attention_heads", 1, MAX_WIDTH)
    kv_heads = fields.integer("num_key_value_heads", 1, heads, default=heads)
    head_dim = fields.integer("head_dim", 2, MAX_WIDTH, default=hidden // heads)
    if head_dim * heads != hidden or head_dim % 2:
        raise fields.error("num_attention_heads", f"heads of equal even width in {hidden}", heads)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of {heads}", kv_heads)
    # Qwen has no window unless use_sliding_window is true, even if the file has a size.
    window = fields.values.get("sliding_window") if architecture == "phi3" else None
    if window is not None:
        window = fields.integer("sliding_window", 1, MAX_POSITIONS)
    base_vocab = fields.integer("vocab_size", 1, MAX_VOCABULARY)
    return LanguageConfig(
        architecture=architecture,
        layers=fields.integer("num_hidden_layers", 1, MAX_LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=fields.integer("intermediate_size", 1, MAX_WIDTH),
        vocab=base_vocab,
        base_vocab=base_vocab,
        rms_epsilon=fields.number("rms_norm_eps", 1e-12, 1e-2),
        rope_theta=_rope_theta(fields),
        sliding_window=window,
        max_positions=fields.integer("max_position_embeddings", 1, MAX_POSITIONS),
        tied=fields.require("tie_word_embeddings", True, False, default=False),
    )


def _rope_theta(fields: Fields) -> float:
    """The base of the rotary angles, which transformers 5 writes into `rope_parameters`. Scaling is refused."""
    place = fields
    for key in ("rope_scaling", "rope_parameters"):
        if fields.values.get(key) is not None:
            rope = fields.section(key)
            for kind in ("type", "rope_type"):
                rope.require(kind, "default", default="default")
            rope.require("partial_rotary_factor", 1.0, 1, default=1.0)
            rope.only(("type", "rope_type", "rope_theta", "partial_rotary_factor"))
            place = rope if "rope_theta" in rope.values else place
    return place.number("rope_theta", 1.0, 1e12)


def read_generation(base: Path, vocab: int) -> GenerationConfig:
    """Read generation_config.json of the base. Sampling settings are ignored, unknown settings refused."""
    fields = Fields(base / "generation_config.json", read_json(base / "generation_config.json"))
    fields.only(GENERATION_KEYS)
    return GenerationConfig(
        eos_ids=fields.integers("eos_token_id", 0, vocab - 1, most=64),
        repetition_penalty=fields.number("repetition_penalty", 0.01, 100.0, default=1.0),
    )


def language_shapes(config: LanguageConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the base, by its released key."""
    rows = (config.base_vocab, config.hidden)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": rows, "model.norm.weight": (config.hidden,)}
    if not config.tied:
        shapes["lm_head.weight"] = rows
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        shapes[f"{prefix}input_layernorm.weight"] = (config.hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (config.hidden,)
        for linear in config.linears:
            outputs, inputs = config.linear_shape(linear)
            shapes[f"{prefix}{linear}.weight"] = (outputs, inputs)
            if config.has_bias(linear):
                shapes[f"{prefix}{linear}.bias"] = (outputs,)
    return shapes
