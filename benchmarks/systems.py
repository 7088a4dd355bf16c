"""Sizes of the released systems, for whoever makes random weights of them. Needs nothing but Python."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """Sizes of one released system (HEALTHGPT.md); `ranks` by task, named as the plugins' files are."""

    folder: str
    hidden: int
    layers: int
    heads: int
    intermediate: int
    base_vocab: int
    vocab: int
    ranks: dict[str, int]
    experts: int = 4

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Each Phi-3 linear's (outputs, inputs)."""
        hidden, intermediate = self.hidden, self.intermediate
        return {
            "self_attn.qkv_proj": (3 * hidden, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_up_proj": (2 * intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
        }


SYSTEMS = {"m3": System("HealthGPT-M3", 3072, 32, 32, 8192, 32064, 40206, {"com": 64, "gen": 256})}
