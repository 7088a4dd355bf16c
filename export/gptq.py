"""Error-compensating quantisation: GPTQ (Frantar et al., 2022, arXiv 2210.17323).

The rounding error of each channel is compensated by the channels after it, as far as they are correlated with it in the
calibration inputs, which the second moments X^T X / n tell. The product with such inputs then changes less, at the same
size. C channels in, O out.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .quantize import round_to, scales_of

# Added to the diagonal of the moments, as a share of its mean: inputs that calibration has not seen matter, too.
DAMPING = 0.01


def quantise_for(weight: np.ndarray, moments: Tensor, data_type: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantise a float32 weight [O, C] into the form that `quantise` returns, for inputs with second moments [C, C].

    The scale of a block is chosen when rounding reaches it, from its channels as compensated so far.
    """
    rows = torch.from_numpy(np.array(weight.T, order="C"))  # [C, O], compensated for the channels already rounded
    channels, outputs = rows.shape
    spread = _spread(moments)
    values = np.empty((channels, outputs), np.int8)
    scales = np.empty((-(-channels // block_size), outputs), np.float32)
    for block, first in enumerate(range(0, channels, block_size)):
        end = min(first + block_size, channels)
        scale = scales[block] = scales_of(np.ascontiguousarray(rows[first:end].T.numpy()), data_type)
        errors = torch.empty(end - first, outputs)
        for channel in range(first, end):
            left = rows[channel]
            rounded = round_to(left.numpy()[:, None], scale, data_type)[:, 0]
            values[channel] = rounded
            error = errors[channel - first] = (left - torch.from_numpy(rounded * scale)) / spread[channel, channel]
            rows[channel + 1 : end].addr_(spread[channel, channel + 1 : end], error, alpha=-1)
        rows[end:].addmm_(spread[first:end, end:].T, errors, alpha=-1)
    return values, scales


def _spread(moments: Tensor) -> Tensor:
    """The upper triangular U [C, C] with U^T U = M^-1; row c distributes the error of channel c."""
    damped = moments.clone()
    damped.diagonal().add_(DAMPING * float(moments.diagonal().mean()) + float(torch.finfo(torch.float32).tiny))
    # The inverse of the Cholesky factor of the reversed moments is U reversed: the inverse itself is never factored.
    lower = torch.linalg.cholesky(damped.flip(0, 1))
    identity = torch.eye(len(lower), dtype=lower.dtype)
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
