"""A whole decode step of a decoder with random weights, by our kernels and by the original's arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from .device import Device
from .linears import EXPERTS, Linear, Original, workspace
from .matrices import Matrix, random_matrix
from .shapes import Decoder

EPSILON = 1e-5
STEPS = 1 << 20  # more than are ever replayed


@dataclass
class Layer:
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    keys: torch.Tensor
    values: torch.Tensor

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.o, self.gate_up, self.down


class DecodeStep:
    """A step of one sequence with a context of `past` tokens: embedding, layers, head and the choice of a token.

    With `new_tokens` every run lengthens the context, up to that many tokens. Without, every run is the same.
    """

    def __init__(
        self, device: Device, decoder: Decoder, rank: int, storage: str, past: int, new_tokens: int = 0
    ) -> None:
        self.device, self.decoder, self.storage = device, decoder, storage
        self.start, self.grows = past, new_tokens > 0
        capacity = past + 64 + new_tokens
        hidden, size = decoder.hidden, decoder.head_size
        cache = (1, decoder.kv_heads, capacity, size)
        half = torch.float16
        self.layers = [
            Layer(
                *(Linear.random(device, *shape, rank, storage) for shape in decoder.linears.values()),
                *(device.normal(*cache, dtype=half) for _ in range(2)),
            )
            for _ in range(decoder.layers)
        ]
        # As the exporter stores it (export/quantize.py): with a base of 4 bits, the head has 8.
        head_storage = "int8" if storage == "int4" else storage
        self.head: Matrix = random_matrix(device, hidden, decoder.head_rows, head_storage)
        self.table = device.normal(decoder.head_rows, hidden, dtype=half)
        long = torch.int64
        self.past = torch.full((1,), past, dtype=long, device=device.name)
        self.token, self.step = device.zeros(1, dtype=long), device.zeros(1, dtype=long)
        self.ids = device.zeros(STEPS, 1, dtype=long)
        angles = device.normal(1, 1, size // 2)
        self.cosine, self.sine = angles.cos(), angles.sin()
        self.hidden = device.poisoned(1, hidden)
        self.packed = device.poisoned(1, 1, decoder.linears["qkv"][1])
        self.attended = device.poisoned(1, 1, decoder.heads * size)
        self.gate_up = device.poisoned(1, decoder.linears["gate_up"][1])
        self.logits = device.poisoned(1, decoder.head_rows)
        # All linears share a workspace, as they run one after another. Attention has another number of counters.
        largest = max((workspace(device, one, 1) for one in self.layers[0].linears), key=torch.Tensor.numel)
        head_bytes = device.kernels.hlora_linear_workspace_bytes(1, self.head.kernel)
        self.memory = largest if largest.numel() >= head_bytes else device.zeros(head_bytes, dtype=torch.uint8)
        needed = device.kernels.cached_attention_workspace_bytes(1, 1, decoder.heads, decoder.kv_heads, size, capacity)
        self.attention_memory = device.zeros(needed, dtype=torch.uint8)

    @property
    def size_bytes(self) -> int:
        """The bytes that a step must read: the matrices, and the filled part of the caches."""
        cached = 2 * self.decoder.kv_heads * self.decoder.head_size * int(self.past) * 2 * len(self.layers)
        return self.head.size_bytes + cached + sum(one.size_bytes for layer in self.layers for one in layer.linears)

    def _linear(self, one: Linear, x: torch.Tensor, y: torch.Tensor, **more: Any) -> None:
        self.device.kernels.hlora_linear(
            x=x, y=y, workspace=self.memory, stream=self.device.stream, **one.kernels(), **more
        )

    def run(self) -> None:
        kernels, stream = self.device.kernels, self.device.stream
        kernels.gather_rows(self.token, self.table, self.hidden, "float16", True, stream)
        for layer in self.layers:
            self._linear(layer.qkv, self.hidden, self.packed.view(1, -1), epsilon=EPSILON)
            kernels.cached_attention(
                *(self.packed, self.cosine, self.sine, self.past, layer.keys, layer.values, self.attended),
                self.attention_memory,
                stream=stream,
            )
            self._linear(layer.o, self.attended.view(1, -1), self.hidden, residual=self.hidden)
            self._linear(layer.gate_up, self.hidden, self.gate_up, epsilon=EPSILON)
            self._linear(layer.down, self.gate_up, self.hidden, pair_input=True, residual=self.hidden)
        kernels.hlora_linear(
            x=self.hidden, weight=self.head.kernel, y=self.logits, workspace=self.memory, epsilon=EPSILON, stream=stream
        )
        past = self.past if self.grows else None
        kernels.token_selection(self.logits, self.step, self.ids, self.token, past_length=past, stream=stream)

    def expected(self, token: int) -> torch.Tensor:
        """The logits by PyTorch in float32, from a token and the present caches."""
        hidden = self.table[token][None].float()
        for layer in self.layers:
            attended = self._attend(_adapted(_normalised(hidden), layer.qkv), layer)
            hidden = hidden + _adapted(attended, layer.o)
            gate, up = _adapted(_normalised(hidden), layer.gate_up).chunk(2, -1)
            hidden = hidden + _adapted(functional.silu(gate) * up, layer.down)
        return _normalised(hidden) @ self.head.floats()

    def _attend(self, packed: torch.Tensor, layer: Layer) -> torch.Tensor:
        decoder, past = self.decoder, int(self.past)
        heads = packed.view(-1, decoder.head_size)
        query, key, value = heads.split([decoder.heads, decoder.kv_heads, decoder.kv_heads])
        query, key = (_rotate(one, self.cosine[0], self.sine[0]) for one in (query, key))
        keys, values = layer.keys[0].float(), layer.values[0].float()
        keys[:, past], values[:, past] = key.half().float(), value.half().float()
        group = decoder.heads // decoder.kv_heads
        seen = [one[:, : past + 1].repeat_interleave(group, dim=0) for one in (keys, values)]
        scores = (query[:, None] @ seen[0].mT * decoder.head_size**-0.5).softmax(-1)
        return (scores @ seen[1]).view(1, -1)


class OriginalStep:
    """The same step as in the original: launch by launch in float16."""

    def __init__(self, step: DecodeStep) -> None:
        self.step = step
        self.layers = [[Original(one, torch.float16) for one in layer.linears] for layer in step.layers]
        self.head = step.head.floats().T.contiguous().half()
        self.norm = torch.ones(step.decoder.hidden, dtype=torch.float16, device=step.device.name)

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return self.norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)).half()

    def run(self) -> torch.Tensor:
        step, decoder = self.step, self.step.decoder
        past = step.start
        hidden = functional.embedding(step.token, step.table)
        cosine, sine = (one[0].half() for one in (step.cosine, step.sine))
        for layer, (qkv, o, gate_up, down) in zip(step.layers, self.layers, strict=True):
            heads = qkv(self._norm(hidden)).view(-1, decoder.head_size)
            query, key, value = heads.split([decoder.heads, decoder.kv_heads, decoder.kv_heads])
            query, key = (_rotate(one, cosine, sine) for one in (query, key))
            # The original's cache grows by concatenation.
            keys = torch.cat([layer.keys[:, :, :past], key[None, :, None]], dim=2)
            values = torch.cat([layer.values[:, :, :past], value[None, :, None]], dim=2)
            group = decoder.heads // decoder.kv_heads
            keys, values = (one.repeat_interleave(group, dim=1) for one in (keys, values))
            attended = functional.scaled_dot_product_attention(query[None, :, None], keys, values)
            hidden = hidden + o(attended.reshape(1, -1))
            gate, up = gate_up(self._norm(hidden)).chunk(2, -1)
            hidden = hidden + down(functional.silu(gate) * up)
        return functional.linear(self._norm(hidden), self.head).float().argmax(-1)


def _normalised(x: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, x.shape[-1:], eps=EPSILON)


def _adapted(x: torch.Tensor, linear: Linear) -> torch.Tensor:
    out_of = linear.adapter_out.floats()
    rank, low = len(out_of), x @ linear.adapter_in.floats()
    gates = low[:, rank:].softmax(-1).repeat_interleave(rank // EXPERTS, dim=-1)
    return x @ linear.weight.floats() + (gates * low[:, :rank]) @ out_of


def _rotate(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
