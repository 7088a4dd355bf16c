"""Sizes of the released systems' decoders, and small ones to rehearse with."""

from __future__ import annotations

from dataclasses import dataclass

from ..systems import SYSTEMS


@dataclass(frozen=True)
class Decoder:
    """Linears are (channels, outputs); head_rows are the logits that a step of a picture makes."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    head_rows: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Queries, keys and values as one matrix and gate and up as one, as Phi-3 has them."""
        width = self.heads * self.head_size
        return {
            "qkv": (self.hidden, width + 2 * self.kv_heads * self.head_size),
            "o": (width, self.hidden),
            "gate_up": (self.hidden, 2 * self.intermediate),
            "down": (self.intermediate, self.hidden),
        }


# Qwen's queries, keys and values are three matrices in the release: here as one, like its gate and up.
DECODERS = {
    name: Decoder(
        *(one.hidden, one.layers, one.heads, one.kv_heads, one.hidden // one.heads, one.intermediate),
        one.picture_rows or one.vocab,
    )
    for name, one in SYSTEMS.items()
}
TINY = Decoder(64, 2, 4, 2, 16, 96, 200)
