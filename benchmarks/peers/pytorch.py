"""The original's arithmetic in eager PyTorch, in bf16 or fp32: decoder with H-LoRA, CLIP tower, VQGAN decoder.

To save memory only some decoder layers are made. They have different weights and are together far larger than the
processor's caches; their time is scaled to the whole model. This peer runs in the project's own environment, because it
uses the towers of export/reference. The decoder is written here, because the reference keeps its caches in float32.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

from ..systems import SYSTEMS, System
from .common import RANKS, Report, absent, milliseconds, parse_arguments

try:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional

    from healthgpt_edge.export.checkpoint import LanguageConfig, TaskConfig, VisionConfig, VqConfig
    from healthgpt_edge.export.reference import language as reference
    from healthgpt_edge.export.reference.clip import VisionTower
    from healthgpt_edge.export.reference.vqgan import Vqgan, to_uint8
except ImportError as error:
    absent(f"{error.name} is not installed: pip install 'healthgpt-edge[export]'")

MADE_LAYERS = 4
POSITIONS = 2048
# With bf16 every intermediate result has 8 bits.
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}
EXPERTS, EPSILON = SYSTEMS["m3"].experts, 1e-5
VISION_LAYERS = {"comprehension": 23, "generation": 1}
HEAD_ROWS = {"comprehension": SYSTEMS["m3"].vocab, "generation": SYSTEMS["m3"].picture_rows}


class HLoraLinear(nn.Module):
    """W x + scaling * B (gate(R x) * A x), in the type of the weights except for the softmax; released names."""

    def __init__(self, outputs: int, inputs: int, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        # Uniform random numbers are much faster to make than normal ones.
        self.weight = nn.Parameter(_uniform(outputs, inputs, dtype))
        for name, shape in {
            "lora_A": (rank, inputs),
            "lora_B": (outputs, rank),
            "lora_route": (EXPERTS, inputs),
        }.items():
            linear = nn.Linear(1, 1, bias=False)
            linear.weight = nn.Parameter(_uniform(*shape, dtype))
            setattr(self, name, linear)
        self.repeats, self.scaling = rank // EXPERTS, 2.0 * EXPERTS

    def forward(self, x: Tensor) -> Tensor:
        gates = self.lora_route(x).softmax(dim=-1, dtype=torch.float32).to(x.dtype)
        low = self.lora_A(x) * gates.repeat_interleave(self.repeats, dim=-1)
        return functional.linear(x, self.weight) + self.lora_B(low) * self.scaling


class Layer(nn.Module):
    """A Phi-3 decoder layer with a cache written in place and PyTorch's fused attention."""

    def __init__(self, system: System, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.size = system.heads, system.hidden // system.heads
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name, (outputs, inputs) in system.linears.items():
            owner, attribute = name.split(".")
            setattr(getattr(self, owner), attribute, HLoraLinear(outputs, inputs, rank, dtype))
        self.input_layernorm = nn.RMSNorm(system.hidden, EPSILON, dtype=dtype)
        self.post_attention_layernorm = nn.RMSNorm(system.hidden, EPSILON, dtype=dtype)
        self.keys, self.values = torch.zeros(2, 1, self.heads, POSITIONS, self.size, dtype=dtype)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, past: int) -> Tensor:
        packed = self.self_attn.qkv_proj(self.input_layernorm(x)).unflatten(-1, (3, self.heads, self.size))
        query, key, value = (part.transpose(1, 2) for part in packed.unbind(2))
        query, key = (each * cosine + _turned(each) * sine for each in (query, key))
        end = past + x.shape[1]
        self.keys[:, :, past:end], self.values[:, :, past:end] = key, value
        attended = functional.scaled_dot_product_attention(
            query, self.keys[:, :, :end], self.values[:, :, :end], is_causal=x.shape[1] > 1
        )
        x = x + self.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        gate, up = self.mlp.gate_up_proj(self.post_attention_layernorm(x)).chunk(2, dim=-1)
        return x + self.mlp.down_proj(functional.silu(gate) * up)


class Stack:
    """Some decoder layers on random hidden states, with the rotary tables of all positions."""

    def __init__(self, system: System, layers: int, rank: int, dtype: torch.dtype) -> None:
        self.system, self.dtype = system, dtype
        self.layers = [Layer(system, rank, dtype) for _ in range(layers)]
        config = SimpleNamespace(head_dim=system.hidden // system.heads, rope_theta=10000.0)
        self.tables = [table.to(dtype) for table in reference.rotary_tables(config, torch.arange(POSITIONS))]

    def forward(self, x: Tensor, past: int) -> Tensor:
        cosine, sine = (table[past : past + x.shape[1]] for table in self.tables)
        for layer in self.layers:
            x = layer(x, cosine, sine, past)
        return x

    def random(self, tokens: int) -> Tensor:
        return torch.randn(1, tokens, self.system.hidden).to(self.dtype)


def check_layer(report: Report, stack: Stack, task: str, rank: int, name: str) -> None:
    """Check the first layer against the reference's in float32 with the same weights."""
    system = stack.system
    config = LanguageConfig(
        *("phi3", 1, system.hidden, system.heads, system.heads, system.hidden // system.heads, system.intermediate),
        *(system.vocab, system.base_vocab, EPSILON, 10000.0, None, POSITIONS),
    )
    layer = reference.DecoderLayer(config, TaskConfig(task, rank, EXPERTS, 2.0 * rank, 1))
    layer.load_state_dict({key: value.float() for key, value in stack.layers[0].state_dict().items()})
    x = stack.random(8)
    tables = reference.rotary_tables(config, torch.arange(8))
    expected = layer(x.float(), tables, reference.visible(config, 0, 8), None, 0)
    cosine, sine = (table[:8] for table in stack.tables)
    found = stack.layers[0](x, cosine, sine, 0).float()
    report.check(f"{task} layer and reference", float((found - expected).norm() / expected.norm()), TOLERANCES[name])


def time_language(report: Report, arguments, dtype: torch.dtype) -> None:
    system = SYSTEMS["m3"]
    made = min(MADE_LAYERS, arguments.layers)
    scale = arguments.layers / made
    for task, rank in RANKS.items():
        stack = Stack(system, made, rank, dtype)
        check_layer(report, stack, task, rank, arguments.variant)
        head = _uniform(HEAD_ROWS[task], system.hidden, dtype)

        def step(tokens: int, past: int, stack: Stack = stack, head: Tensor = head) -> float:
            """Milliseconds for the whole model: the layers' scaled time and the head's."""
            x = stack.random(tokens)
            layers = milliseconds(lambda: stack.forward(x, past))[0]
            return layers * scale + milliseconds(lambda: functional.linear(x[:, -1], head))[0]

        step(1, 0)
        facts = {"made_layers": made, "scaled_to_layers": arguments.layers}
        prefills = [step(arguments.prefill, 0) for _ in range(arguments.repeat)]
        report.row(f"pp{arguments.prefill}", task, prefills, **facts)
        steps = [step(1, arguments.context + i) for _ in range(arguments.repeat) for i in range(arguments.decode)]
        report.row(f"tg{arguments.decode}@{arguments.context}", task, steps, **facts)


def time_pictures(report: Report, arguments, dtype: torch.dtype) -> None:
    """Time the VQGAN decoder, channels-last, and the vision tower. Both are checked against themselves in float32."""
    codes = torch.randint(0, 8192, (1, 32, 32))
    vqgan = Vqgan(VqConfig(8192, 256, 256, 128, (1, 1, 2, 4), 2, (32,), 256)).eval()
    expected = vqgan.decode(codes)
    vqgan = vqgan.to(dtype=dtype, memory_format=torch.channels_last)
    distance = (vqgan.decode(codes).float() - expected).norm() / expected.norm()
    report.check("vq and float32", float(distance), TOLERANCES[arguments.variant])
    report.row("vq256", "generation", milliseconds(lambda: to_uint8(vqgan.decode(codes).float()), arguments.repeat))

    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    tower = VisionTower(VisionConfig(1024, 24, 16, 4096, 336, 14, 1e-5, mean, deviation)).eval()
    picture = torch.randint(0, 256, (1, 336, 336, 3), dtype=torch.uint8)
    expected = tower(tower.normalise(picture), 1)
    tower = copy.deepcopy(tower).to(dtype)
    for task, layers in VISION_LAYERS.items():

        def features(layers: int = layers) -> Tensor:
            return tower(tower.normalise(picture).to(dtype), layers)

        if layers == 1:
            distance = (features().float() - expected).norm() / expected.norm()
            report.check("vit and float32", float(distance), TOLERANCES[arguments.variant])
        features()
        report.row("vit336", task, milliseconds(features, arguments.repeat))


def _uniform(outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(outputs, inputs, dtype=dtype).uniform_(-0.02, 0.02)


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def main() -> None:
    arguments = parse_arguments(__doc__, choices=["bf16", "fp32"], required=True)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[arguments.variant]
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    report = Report(
        f"torch {torch.__version__}",
        f"eager, {arguments.variant}; {min(MADE_LAYERS, arguments.layers)} distinct decoder layers timed and scaled to "
        f"{arguments.layers}; attention by scaled_dot_product_attention, caches of fixed size written in place",
    )
    with torch.inference_mode():
        time_language(report, arguments, dtype)
        time_pictures(report, arguments, dtype)
    report.print()


if __name__ == "__main__":
    main()
