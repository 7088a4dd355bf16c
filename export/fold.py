"""Exact algebra done once at export. Every function is an identity up to float32 rounding, proved in test_fold.py."""

from __future__ import annotations

import numpy as np

# --- language ---------------------------------------------------------------------------------------------------


def input_major(weight: np.ndarray, norm: np.ndarray | None = None) -> np.ndarray:
    """A linear weight [O, C] as the right operand [C, O] of x W, an RMS norm's weight [C] taken in.

    (x * norm) W^T = x (diag(norm) W^T).
    """
    transposed = weight.T
    return np.ascontiguousarray(transposed if norm is None else transposed * norm[:, None])


def stack_router(reduce: np.ndarray, router: np.ndarray, norm: np.ndarray | None = None) -> np.ndarray:
    """A [R, C] and the router [E, C] as one right operand [C, R + E]: both read the same x, so one product serves."""
    return input_major(np.concatenate([reduce, router]), norm)


def scale_expansion(expand: np.ndarray, scaling: float) -> np.ndarray:
    """B [O, R] as the right operand [R, O] with the H-LoRA scaling (alpha / r * E) taken in."""
    return np.ascontiguousarray(expand.T * np.float32(scaling))
