"""Sizes of the released systems, for whoever makes random weights of them. Needs nothing but Python."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """Sizes of one released system (HealthGPT, arXiv 2502.09838, and its bases); `ranks` by task."""

    folder: str
    plugin_suffix: str  # of the names of the plugins' files
    small_base: str  # the directory in tests/golden/checkpoints of the same base, but for sizes and vocabulary
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    base_vocab: int
    vocab: int
    ranks: dict[str, int]
    experts: int = 4
    picture_rows: int = 0  # of the head, those that a picture can hold
    splits_linears: bool = False  # q, k, v, gate and up are linears of their own, the first three with biases

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Each linear's (outputs, inputs)."""
        hidden, intermediate = self.hidden, self.intermediate
        cached = hidden // self.heads * self.kv_heads
        if self.splits_linears:
            inner = {"self_attn.q_proj": hidden, "self_attn.k_proj": cached, "self_attn.v_proj": cached}
            wide = {"mlp.gate_proj": intermediate, "mlp.up_proj": intermediate}
        else:
            inner, wide = {"self_attn.qkv_proj": hidden + 2 * cached}, {"mlp.gate_up_proj": 2 * intermediate}
        return {
            **{name: (outputs, hidden) for name, outputs in inner.items()},
            "self_attn.o_proj": (hidden, hidden),
            **{name: (outputs, hidden) for name, outputs in wide.items()},
            "mlp.down_proj": (hidden, intermediate),
        }

    def plugin(self, task: str) -> str:
        """The name of a task's plugin file."""
        return f"{task[:3]}_hlora_weights{self.plugin_suffix}.bin"

    @property
    def biases(self) -> dict[str, int]:
        """Outputs of the linears that have a bias."""
        return {
            name: outputs
            for name, (outputs, _) in self.linears.items()
            if name.endswith((".q_proj", ".k_proj", ".v_proj"))
        }


SYSTEMS = {
    "m3": System(
        "HealthGPT-M3",
        "",
        "m3/Phi-3-mini-4k-instruct",
        hidden=3072,
        layers=32,
        heads=32,
        kv_heads=32,
        intermediate=8192,
        base_vocab=32064,
        vocab=40206,
        ranks={"comprehension": 64, "generation": 256},
        picture_rows=8194,
    ),
    "l14": System(
        "HealthGPT-L14",
        "_phi4",
        "phi4/phi-4",
        hidden=5120,
        layers=40,
        heads=40,
        kv_heads=10,
        intermediate=17920,
        base_vocab=100352,
        vocab=100352,
        ranks={"comprehension": 32},
    ),
    "xl32": System(
        "HealthGPT-XL32",
        "_QWEN_32B",
        "qwen/Qwen2.5-32B-Instruct",
        hidden=5120,
        layers=64,
        heads=40,
        kv_heads=8,
        intermediate=27648,
        base_vocab=152064,
        vocab=152064,
        ranks={"comprehension": 32},
        splits_linears=True,
    ),
}
