"""The matrices of one H-LoRA linear as a bundle stores them, folded (fold.py), in float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from . import fold
from .checkpoint import Checkpoint

# The norm whose weight is folded into a linear; the others follow no norm.
_NORMS = dict.fromkeys(("qkv_proj", "q_proj", "k_proj", "v_proj"), "input_layernorm") | dict.fromkeys(
    ("gate_up_proj", "gate_proj", "up_proj"), "post_attention_layernorm"
)


@dataclass(frozen=True, slots=True)
class FoldedLinear:
    """One linear of one layer of a task; the keys are those of the weight files."""

    checkpoint: Checkpoint
    task: str
    layer: int
    linear: str

    @property
    def key(self) -> str:
        return f"layers.{self.layer}.{self.linear}"

    def base(self) -> np.ndarray:
        """W [O, C], the same for every task."""
        return fold.take_norm(to_float(self.checkpoint.base_tensor(f"{self.key}.weight")), self._norm())

    def adapter_in(self) -> np.ndarray:
        """A, then the router, [R + E, C]."""
        reduce, _, router = self.checkpoint.adapter(self.task, self.layer, self.linear)
        return fold.stack_router(to_float(reduce), to_float(router), self._norm())

    def adapter_out(self) -> np.ndarray:
        """B [O, R] with the H-LoRA scaling folded in."""
        _, expand, _ = self.checkpoint.adapter(self.task, self.layer, self.linear)
        return fold.scale_expansion(to_float(expand), self.checkpoint.tasks[self.task].scaling)

    def bias(self) -> np.ndarray:
        """[O]; zeros where the released linear has none."""
        if self.checkpoint.language.has_bias(self.linear):
            return to_float(self.checkpoint.base_tensor(f"{self.key}.bias"))
        return np.zeros(self.checkpoint.language.linear_shape(self.linear)[0], np.float32)

    def _norm(self) -> np.ndarray | None:
        norm = _NORMS.get(self.linear.split(".")[-1])
        return to_float(self.checkpoint.base_tensor(f"layers.{self.layer}.{norm}.weight")) if norm else None


def to_float(tensor: torch.Tensor) -> np.ndarray:
    """The tensor as float32; NaN and infinity were refused when the checkpoint was read."""
    return tensor.float().numpy()
