"""The sizes of the released systems' decoders, and of a small one for rehearsals."""

from __future__ import annotations

from dataclasses import dataclass

from ..systems import SYSTEMS


@dataclass(frozen=True)
class Decoder:
    """Linears are (channels, outputs). head_rows is the number of logits in a step of a picture."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    head_rows: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """As in Phi-3, queries, keys and values are one matrix, and gate and up are one matrix."""
        width = self.heads * self.head_size
        return {
            "qkv": (self.hidden, width + 2 * self.kv_heads * self.head_size),
            "o": (width, self.hidden),
            "gate_up": (self.hidden, 2 * self.intermediate),
            "down": (self.intermediate, self.hidden),
        }


# Qwen's release has three matrices for queries, keys and values, and two for gate and up. Here they are joined.
DECODERS = {
    name: Decoder(
        *(one.hidden, one.layers, one.heads, one.kv_heads, one.hidden // one.heads, one.intermediate),
        one.picture_rows or one.vocab,
    )
    for name, one in SYSTEMS.items()
}
TINY = Decoder(64, 2, 4, 2, 16, 96, 200)
