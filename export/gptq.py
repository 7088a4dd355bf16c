"""Rounding that makes up for itself: GPTQ (Frantar et al., 2022, arXiv 2210.17323).

What one channel of a matrix loses by rounding, the channels that come after it take on, as far as they carry the same
in the inputs seen: that is what the second moments of the inputs, X^T X / n, tell. The product with such inputs then
changes less, in the same bytes. C channels in, O out.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .quantize import round_to, scales_of

# Added to the diagonal of the moments, as a share of its mean: inputs not seen count for something, too.
DAMPING = 0.01


def quantise_for(weight: np.ndarray, moments: Tensor, data_type: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Round a float32 weight [O, C] to what `quantise` returns, for inputs of second moments [C, C].

    The scale of a block is set when the rounding reaches it, for what its channels have become by then.
    """
    rows = torch.from_numpy(np.array(weight.T, order="C"))  # [C, O]: with what the channels before have handed on
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
    """The upper triangle U [C, C] of U^T U = M^-1: row c says where the error of channel c goes."""
    damped = moments.clone()
    damped.diagonal().add_(DAMPING * float(moments.diagonal().mean()) + float(torch.finfo(torch.float32).tiny))
    # The lower triangle of the moments in reverse order, inverted, is U in reverse order: no inverse is factored again.
    lower = torch.linalg.cholesky(damped.flip(0, 1))
    identity = torch.eye(len(lower), dtype=lower.dtype)
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
