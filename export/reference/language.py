"""The decoder of Phi-3, phi-4 and Qwen2 with H-LoRA on every linear, in simple PyTorch.

Parameters have the released files' names: base weights as in Hugging Face's models, adapters as in the plugins.
B batch, S new tokens, T tokens so far, H heads, D head width, C channels in, O channels out, R rank, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checkpoint import LanguageConfig, TaskConfig


class HLoraLinear(nn.Module):
    """y = W x + b + scaling * B (repeat(softmax(R x), r/E) * (A x)): the router R weighs the experts for each token.

    A [R,C], B [O,R], router [E,C], W [O,C]. Source: Lin et al., "HealthGPT", 2025 (arXiv 2502.09838).
    """

    def __init__(self, outputs: int, inputs: int, bias: bool, task: TaskConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        nn.init.normal_(self.weight, std=inputs**-0.5)
        self.lora_A = nn.Linear(inputs, task.rank, bias=False)
        self.lora_B = nn.Linear(task.rank, outputs, bias=False)
        self.lora_route = nn.Linear(inputs, task.experts, bias=False)
        nn.init.zeros_(self.lora_B.weight)  # so that a new adapter changes nothing
        self.repeats = task.rank // task.experts
        self.scaling = task.scaling

    def forward(self, x: Tensor) -> Tensor:
        gates = self.lora_route(x).float().softmax(dim=-1).repeat_interleave(self.repeats, dim=-1)  # [..., R]
        return functional.linear(x, self.weight, self.bias) + self.lora_B(gates * self.lora_A(x) * self.scaling)


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.epsilon))


class KeyValueCache:
    """Keys and values of the tokens so far, in buffers of a fixed capacity [B, kv_heads, capacity, D] per layer."""

    def __init__(self, config: LanguageConfig, capacity: int, batch: int = 1) -> None:
        shape = (config.layers, batch, config.kv_heads, capacity, config.head_dim)
        self._keys, self._values = torch.zeros(shape), torch.zeros(shape)
        self.length = 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' [B, kv_heads, S, D] and return those of all T tokens. `advance` updates `length`."""
        end = self.length + key.shape[2]
        self._keys[layer, :, :, self.length : end] = key
        self._values[layer, :, :, self.length : end] = value
        return self._keys[layer, :, :, :end], self._values[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        self.length += tokens


def rotary_tables(config: LanguageConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, D] for positions [S]. Both halves of D have the same angles."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    # A product with the inverse, as in the original: rounded otherwise, angles of far positions differ by thousandths.
    angles = positions.float()[:, None] * (1.0 / config.rope_theta**exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding of x [B,H,S,D], with pairs across the halves of D (Su et al., arXiv 2104.09864)."""
    cosine, sine = tables
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


def visible(config: LanguageConfig, past: int, new: int) -> Tensor:
    """Which of the T tokens each new token attends to, bool [S, T]: itself and those before it within the window."""
    queries = torch.arange(past, past + new)[:, None]
    keys = torch.arange(past + new)[None, :]
    seen = keys <= queries
    if config.sliding_window is not None:
        seen &= queries - keys <= config.sliding_window
    return seen


class Attention(nn.Module):
    """Causal attention. Each key-value head is shared by a group of query heads."""

    def __init__(self, config: LanguageConfig, task: TaskConfig) -> None:
        super().__init__()
        self.config = config
        for name in config.linears:
            if name.startswith("self_attn."):
                setattr(self, name.removeprefix("self_attn."), adapted_linear(config, task, name))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B,H,S,D], keys and values [B,kv_heads,S,D]. Phi-3 has one linear for all three."""
        config = self.config
        if config.architecture == "phi3":
            keys = config.kv_heads * config.head_dim
            parts = self.qkv_proj(x).split([config.heads * config.head_dim, keys, keys], dim=-1)
        else:
            parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        query, key, value = (part.unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for part in parts)
        return query, key, value

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor, cache: KeyValueCache | None, layer: int
    ) -> Tensor:
        query, key, value = self.project(x)
        query, key = rotate(query, tables), rotate(key, tables)
        if cache is not None:
            key, value = cache.extend(layer, key, value)
        group = self.config.heads // self.config.kv_heads
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        scores = query @ key.transpose(-1, -2) * self.config.head_dim**-0.5  # [B, H, S, T]
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1)
        return self.o_proj((scores @ value).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x)). Phi-3 has one linear for gate and up, in this order."""

    def __init__(self, config: LanguageConfig, task: TaskConfig) -> None:
        super().__init__()
        self.fused = config.architecture == "phi3"
        for name in config.linears:
            if name.startswith("mlp."):
                setattr(self, name.removeprefix("mlp."), adapted_linear(config, task, name))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1) if self.fused else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(functional.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Attention and MLP, each with a norm before it and a residual connection."""

    def __init__(self, config: LanguageConfig, task: TaskConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config, task)
        self.mlp = Mlp(config, task)
        self.input_layernorm = RmsNorm(config.hidden, config.rms_epsilon)
        self.post_attention_layernorm = RmsNorm(config.hidden, config.rms_epsilon)

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor, cache: KeyValueCache | None, layer: int
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), tables, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, decoder layers, norm, and the projector from CLIP's features to embeddings."""

    def __init__(self, config: LanguageConfig, task: TaskConfig, vision_hidden: int) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(DecoderLayer(config, task) for _ in range(config.layers))
        self.norm = RmsNorm(config.hidden, config.rms_epsilon)
        self.mm_projector = nn.Sequential(
            nn.Linear(vision_hidden, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.hidden)
        )
        nn.init.normal_(self.embed_tokens.weight, std=0.02)

    def layer_outputs(self, embeddings: Tensor, cache: KeyValueCache | None = None) -> list[Tensor]:
        """Embeddings [B,S,hidden] -> the outputs [B,S,hidden] of every layer, then of the norm."""
        past, new = 0 if cache is None else cache.length, embeddings.shape[1]
        tables = rotary_tables(self.config, torch.arange(past, past + new))
        mask = visible(self.config, past, new)
        outputs, hidden = [], embeddings
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, tables, mask, cache, index)
            outputs.append(hidden)
        if cache is not None:
            cache.advance(new)
        return [*outputs, self.norm(hidden)]

    def forward(self, embeddings: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Embeddings [B,S,hidden] -> normalised hidden states [B,S,hidden]."""
        return self.layer_outputs(embeddings, cache)[-1]


def adapted_linear(config: LanguageConfig, task: TaskConfig, name: str) -> HLoraLinear:
    """The linear `name` of a layer, in the shape that the configuration gives it."""
    outputs, inputs = config.linear_shape(name)
    return HLoraLinear(outputs, inputs, config.has_bias(name), task)
