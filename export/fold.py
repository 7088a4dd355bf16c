"""Exact algebra done once at export. Every function is an identity up to float32 rounding, proved in test_fold.py."""

from __future__ import annotations

import numpy as np

# --- language ---------------------------------------------------------------------------------------------------


def take_norm(weight: np.ndarray, norm: np.ndarray | None) -> np.ndarray:
    """Fold the weight [C] of the preceding RMS norm into a linear weight [O, C]: W (norm * x) = (W * norm) x."""
    return weight if norm is None else weight * norm


def stack_router(reduce: np.ndarray, router: np.ndarray, norm: np.ndarray | None) -> np.ndarray:
    """Stack A [R, C] and the router [E, C] into one matrix [R + E, C]: both multiply the same x."""
    return take_norm(np.concatenate([reduce, router]), norm)


def scale_expansion(expand: np.ndarray, scaling: float) -> np.ndarray:
    """Fold the H-LoRA scaling, alpha / r * E, into B [O, R]."""
    return expand * np.float32(scaling)


# --- vision and VQGAN -------------------------------------------------------------------------------------------
# Sums of weights are taken in float64 and rounded once.


PIXEL_CENTRE = 128


def patch_matrix(weight: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """CLIP's patch convolution [O, 3, K, K] as a product with centred pixels: matrix [K*K*3, O] and bias [O].

    W * ((p / 255 - mean) / std) = V * (p - 128) + V * (128 - 255 mean), V = W / (255 std), for pixels p in 0..255 in
    the order (row, column, channel). The convolution has stride K and no padding, so the bias is the same for every
    patch. Centring is exact and halves the rounding error: product and bias no longer cancel.
    """
    channel = (1, -1, 1, 1)
    scaled = weight / (255.0 * np.asarray(std, np.float64).reshape(channel))
    shift = PIXEL_CENTRE - 255.0 * np.asarray(mean, np.float64).reshape(channel)
    matrix = scaled.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])
    return np.ascontiguousarray(matrix, np.float32), (scaled * shift).sum((1, 2, 3)).astype(np.float32)


def scale(values: np.ndarray, factor: float) -> np.ndarray:
    """Fold a factor into a weight or bias, such as attention's 1/sqrt(D) into the queries': q k / c = (q / c) k."""
    return (values.astype(np.float64) * factor).astype(np.float32)


def position_table(class_embedding: np.ndarray, positions: np.ndarray, patch_bias: np.ndarray) -> np.ndarray:
    """What is added to [0; patches W] to give CLIP's embeddings: the class token [O], positions [P+1, O], the bias."""
    table = positions.astype(np.float64)
    table[0] += class_embedding
    table[1:] += patch_bias
    return table.astype(np.float32)


def convolved_codebook(codebook: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Apply a 1x1 convolution [Z, D, 1, 1] to the codebook [N, D]: one lookup in the table [N, Z] replaces both."""
    return (codebook.astype(np.float64) @ weight[:, :, 0, 0].T + bias).astype(np.float32)


def chain_pointwise(
    first: np.ndarray, first_bias: np.ndarray, second: np.ndarray, second_bias: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Combine two consecutive 1x1 convolutions [M, C, 1, 1] and [O, M, 1, 1] into one matrix [C, O] and bias [O]."""
    outer = second[:, :, 0, 0].astype(np.float64)
    weight, bias = outer @ first[:, :, 0, 0], outer @ first_bias + second_bias
    return weight.T.astype(np.float32), bias.astype(np.float32)
