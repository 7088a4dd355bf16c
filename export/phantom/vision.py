"""Pretrains the phantom's CLIP tower on labelled phantoms, in place of CLIP's training on captions.

The two layers that the plugins read are trained for the plugins' tasks. Generation reads the first layer: its features
must predict the pixels of each patch and its surroundings, in full detail even for a low-resolution input.
Comprehension reads the layer before the last: its features must show lesions patch by patch, and their average must
show the modality and the number of lesions, overall and per quadrant. Then the tower is frozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from healthgpt_edge import phantoms
from healthgpt_edge.phantoms import QUADRANTS, Phantom, Picture

from ..checkpoint import VisionConfig
from ..reference.clip import VisionTower
from .pictures import INPUT_SIDE, PATCH, enlarge, lesion_map, patch_places, patch_windows
from .precision import quick

CONFIG = VisionConfig(
    hidden=128,
    layers=4,
    heads=4,
    intermediate=256,
    image_size=INPUT_SIDE,
    patch_size=14,
    epsilon=1e-5,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
BATCH = 8
LEARNING_RATE = 1.5e-3
COMPREHENSION_LAYERS, GENERATION_LAYERS = CONFIG.layers - 1, 1


class Heads(nn.Module):
    """The prediction heads of the tower's training, discarded afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Linear(CONFIG.hidden, 4 * PATCH * PATCH)
        self.centres = nn.Linear(CONFIG.hidden, 1)
        self.counts = nn.Linear(CONFIG.hidden, len(phantoms.COUNT_WORDS))
        self.modality = nn.Linear(CONFIG.hidden, 2)
        self.quadrants = nn.Linear(CONFIG.hidden, len(QUADRANTS) * len(phantoms.COUNT_WORDS))


def train(seed: int, steps: int, subjects: list[Phantom], report: Callable[[str], None]) -> VisionTower:
    """A tower trained with `steps` batches of 8 pictures."""
    torch.manual_seed(seed)
    tower, heads = VisionTower(CONFIG), Heads()
    _start_informed(tower)
    rng = np.random.default_rng(seed)

    def losses(step: int) -> dict[str, Tensor]:
        batch = [subjects[i] for i in rng.integers(len(subjects), size=BATCH // 2)]
        pictures = both(batch)
        # Every fourth batch is shown at low resolution, as in super-resolution, but predicts the full pictures' pixels.
        shown = [phantoms.downsample(picture) for picture in pictures] if step % 4 == 3 else pictures
        first = tower(tower.normalise(enlarge(shown)), GENERATION_LAYERS)  # [B, 256, C]
        pixels = 4 * functional.mse_loss(heads.pixels(first), patch_windows(pictures))
        return {"pixels": pixels, **_late_losses(heads, batch, _late(tower, first))}

    _descend([*tower.parameters(), *heads.parameters()], steps, losses, report)
    return tower.eval()


def _descend(
    learned: Sequence[nn.Parameter],
    steps: int,
    losses: Callable[[int], dict[str, Tensor]],
    report: Callable[[str], None],
) -> None:
    """Minimise the sum of each step's losses with AdamW."""
    optimizer = torch.optim.AdamW(learned, LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        with quick():
            parts = losses(step)
        optimizer.zero_grad(set_to_none=True)
        sum(parts.values()).backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            report(f"vision {step}/{steps} " + ", ".join(f"{name} {loss.item():.3f}" for name, loss in parts.items()))


def _start_informed(tower: VisionTower) -> None:
    """Encode brightness and place from the start, which a small tower learns only slowly.

    All positions share a vector that is larger than a patch's own embedding. Without it, the norm before the layers
    would divide a uniform patch by its length and lose its brightness. Row and column are added to this vector.
    """
    places = patch_places()  # [256, 2]
    waves = torch.cat([places, (math.pi * places).sin(), (math.pi * places).cos()], dim=1)
    with torch.no_grad():
        tower.embeddings.patch_embedding.weight.mul_(0.5)
        positions = tower.embeddings.position_embedding.weight
        positions.copy_(torch.randn(CONFIG.hidden) + 0.1 * torch.randn_like(positions))
        positions[1:] += 0.35 * waves @ torch.randn(waves.shape[1], CONFIG.hidden)


def both(subjects: Sequence[Phantom]) -> list[Picture]:
    """The CT and the MR of each phantom."""
    return [picture for subject in subjects for picture in (subject.ct, subject.mr)]


def _late(tower: VisionTower, first: Tensor) -> Tensor:
    """Comprehension's features, computed from generation's."""
    for layer in tower.encoder.layers[GENERATION_LAYERS:COMPREHENSION_LAYERS]:
        first = layer(first)
    return first


def _in_quadrant(subject: Phantom, quadrant: str) -> int:
    return sum(lesion.quadrant == quadrant for lesion in subject.lesions)


def _late_losses(heads: Heads, subjects: Sequence[Phantom], late: Tensor) -> dict[str, Tensor]:
    """Losses of the lesion centres per patch, and of counts, quadrants and modality from the average feature."""
    centres = torch.from_numpy(np.stack([lesion_map(one) for one in subjects])).repeat_interleave(2, 0)
    counts = torch.tensor([len(one.lesions) for one in subjects]).repeat_interleave(2)
    places = torch.tensor([[_in_quadrant(one, name) for name in QUADRANTS] for one in subjects]).repeat_interleave(2, 0)
    modality = torch.tensor([0, 1] * len(subjects))
    pooled = late.mean(dim=1)
    quadrants = heads.quadrants(pooled).unflatten(1, (*places.shape[1:], -1)).flatten(0, 1)
    return {
        "centres": 256 / 8 * functional.binary_cross_entropy_with_logits(heads.centres(late)[..., 0], centres),
        "counts": 0.5 * functional.cross_entropy(heads.counts(pooled), counts),
        "quadrants": functional.cross_entropy(quadrants, places.flatten()),
        "modality": 0.2 * functional.cross_entropy(heads.modality(pooled), modality),
    }
