"""The pictures for training the phantom's tower and plugins, and the contents of their patches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from healthgpt_edge import phantoms
from healthgpt_edge.phantoms import Phantom, Picture

INPUT_SIDE = 224
GRID = 16  # patches of 14 pixels, and codes of 8 pixels, per side: patch i and code i cover the same place
PATCH = phantoms.SIDE // GRID


def training_phantoms(seed: int, count: int) -> list[Phantom]:
    """`count` phantoms for a seed, none of which is held out."""
    rng = np.random.default_rng(seed)
    return [phantoms.phantom(int(one)) for one in rng.integers(phantoms.TRAINING_SEEDS, 2**31, count)]


def enlarge(pictures: Sequence[Picture]) -> Tensor:
    """Square grey pictures -> the tower's input uint8 [B,224,224,3]: bicubic, grey in RGB, as in the runtime."""
    size = (INPUT_SIDE, INPUT_SIDE)
    grey = np.stack([np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in pictures])
    return torch.from_numpy(grey)[..., None].expand(-1, -1, -1, 3)


def patch_windows(pictures: Sequence[Picture]) -> Tensor:
    """Grey pictures uint8 [128,128] -> every patch with a margin of half a patch, in [-1,1], [B,256,256].

    The VQGAN's codes depend on the surroundings of a patch, so features that predict codes must contain these too.
    """
    grey = torch.from_numpy(np.stack(pictures)).float()[:, None] / 127.5 - 1
    around = functional.pad(grey, [PATCH // 2] * 4, value=-1.0)
    return functional.unfold(around, 2 * PATCH, stride=PATCH).transpose(1, 2)


def patch_places() -> Tensor:
    """Row and column of the centre of each patch, in [-1,1], [256,2]."""
    axis = (torch.arange(GRID) + 0.5) * 2 / GRID - 1
    return torch.cartesian_prod(axis, axis)


def lesion_map(subject: Phantom) -> np.ndarray:
    """1 for each patch that contains the centre of a lesion, otherwise 0, float32 [256]."""
    centres = np.zeros((GRID, GRID), dtype=np.float32)
    for lesion in subject.lesions:
        centres[int(lesion.row) // PATCH, int(lesion.column) // PATCH] = 1
    return centres.reshape(-1)
