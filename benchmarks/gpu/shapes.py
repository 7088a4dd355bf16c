"""Sizes of the released systems' decoders (HEALTHGPT.md), and small ones to rehearse with."""

from __future__ import annotations

from dataclasses import dataclass


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


DECODERS = {
    "m3": Decoder(3072, 32, 32, 32, 96, 8192, 8194),
    "l14": Decoder(5120, 40, 40, 10, 128, 17920, 100352),
    # Qwen's queries, keys and values are three matrices in the release: here as one, like its gate and up.
    "xl32": Decoder(5120, 64, 40, 8, 128, 27648, 152064),
}
TINY = Decoder(64, 2, 4, 2, 16, 96, 200)
