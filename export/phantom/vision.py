"""Pretrains the phantom's CLIP tower on labelled phantoms, as a stand-in for CLIP's own training on captions.

The features that the plugins will read are trained for what they will be asked: the first layer's (generation)
for the pixels of each patch and around it, in full detail even where a low-resolution picture is shown; those before
the last layer (comprehension) for where lesions are and, averaged, for modality and count (`train`), then for the
count in each quadrant (`train_late`, which leaves the first layer as it is). Then the tower is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from healthgpt_edge import phantoms
from healthgpt_edge.phantoms import Phantom, Picture

from ..checkpoint import VisionConfig
from ..reference.clip import VisionTower
from .corpus import QUADRANTS
from .pictures import INPUT_SIDE, PATCH, enlarge, lesion_map, patch_windows

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
    """What is asked of the features while the tower is trained, and thrown away afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Linear(CONFIG.hidden, 4 * PATCH * PATCH)
        self.centres = nn.Linear(CONFIG.hidden, 1)
        self.counts = nn.Linear(CONFIG.hidden, len(phantoms.COUNT_WORDS))
        self.modality = nn.Linear(CONFIG.hidden, 2)


def train(seed: int, steps: int, subjects: list[Phantom], report: Callable[[str], None]) -> VisionTower:
    """A tower trained for `steps` batches of 8 pictures."""
    torch.manual_seed(seed)
    tower, heads = VisionTower(CONFIG), Heads()
    _start_bright(tower)
    rng = np.random.default_rng(seed)

    def losses(step: int) -> dict[str, Tensor]:
        batch = [subjects[i] for i in rng.integers(len(subjects), size=BATCH // 2)]
        pictures = both(batch)
        # Every fourth batch is shown as super-resolution will show it, and asked for the full pictures' pixels.
        shown = [phantoms.downsample(picture) for picture in pictures] if step % 4 == 3 else pictures
        first = tower(tower.normalise(enlarge(shown)), GENERATION_LAYERS)  # [B, 256, C]
        pixels = 4 * functional.mse_loss(heads.pixels(first), patch_windows(pictures))
        return {"pixels": pixels, **_late_losses(heads, batch, _late(tower, first))}

    _descend([*tower.parameters(), *heads.parameters()], LEARNING_RATE, steps, losses, report)
    return tower.eval()


def train_late(
    seed: int, steps: int, tower: VisionTower, subjects: list[Phantom], report: Callable[[str], None]
) -> VisionTower:
    """Train the layers between the first and the last for `steps` more batches, on lesions by quadrant too."""
    torch.manual_seed(seed + 1)
    heads, places = Heads(), nn.Linear(CONFIG.hidden, 4 * len(phantoms.COUNT_WORDS))
    middle = tower.encoder.layers[GENERATION_LAYERS:COMPREHENSION_LAYERS]
    rng = np.random.default_rng(seed + 1)

    def losses(step: int) -> dict[str, Tensor]:
        batch = [subjects[i] for i in rng.integers(len(subjects), size=BATCH // 2)]
        with torch.no_grad():
            first = tower(tower.normalise(enlarge(both(batch))), GENERATION_LAYERS)
        late = _late(tower, first)
        counts = torch.tensor([[_in_quadrant(one, name) for name in QUADRANTS] for one in batch])  # [B/2, 4]
        guessed = places(late.mean(dim=1)).unflatten(1, (4, -1)).flatten(0, 1)
        quadrants = functional.cross_entropy(guessed, counts.repeat_interleave(2, 0).flatten())
        return {"quadrants": 2 * quadrants, **_late_losses(heads, batch, late)}

    learned = [*middle.parameters(), *heads.parameters(), *places.parameters()]
    _descend(learned, LEARNING_RATE, steps, losses, report)
    return tower.eval()


def _descend(
    learned: Sequence[nn.Parameter],
    learning_rate: float,
    steps: int,
    losses: Callable[[int], dict[str, Tensor]],
    report: Callable[[str], None],
) -> None:
    """AdamW on the sum of the losses of each step."""
    optimizer = torch.optim.AdamW(learned, learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            parts = losses(step)
        optimizer.zero_grad(set_to_none=True)
        sum(parts.values()).backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            report(f"vision {step}/{steps} " + ", ".join(f"{name} {loss.item():.3f}" for name, loss in parts.items()))


def _start_bright(tower: VisionTower) -> None:
    """Give every position a common vector, larger than what a patch adds to it.

    The norm in front of the layers divides by a patch's length: without this, how bright a flat patch is would be lost
    from the start, and is found again only slowly.
    """
    with torch.no_grad():
        tower.embeddings.patch_embedding.weight.mul_(0.5)
        positions = tower.embeddings.position_embedding.weight
        positions.copy_(torch.randn(CONFIG.hidden) + 0.1 * torch.randn_like(positions))


def both(subjects: Sequence[Phantom]) -> list[Picture]:
    """The CT and the MR of each."""
    return [picture for subject in subjects for picture in (subject.ct, subject.mr)]


def _late(tower: VisionTower, first: Tensor) -> Tensor:
    """The features that comprehension reads, from those that generation reads."""
    for layer in tower.encoder.layers[GENERATION_LAYERS:COMPREHENSION_LAYERS]:
        first = layer(first)
    return first


def _in_quadrant(subject: Phantom, quadrant: str) -> int:
    return sum(lesion.quadrant == quadrant for lesion in subject.lesions)


def _late_losses(heads: Heads, subjects: Sequence[Phantom], late: Tensor) -> dict[str, Tensor]:
    """Lesion centres patch by patch; their number and the modality from the average feature."""
    centres = torch.from_numpy(np.stack([lesion_map(subject) for subject in subjects])).repeat_interleave(2, 0)
    counts = torch.tensor([len(subject.lesions) for subject in subjects]).repeat_interleave(2)
    modality = torch.tensor([0, 1] * len(subjects))
    pooled = late.mean(dim=1)
    return {
        "centres": 256 / 8 * functional.binary_cross_entropy_with_logits(heads.centres(late)[..., 0], centres),
        "counts": 0.5 * functional.cross_entropy(heads.counts(pooled), counts),
        "modality": 0.2 * functional.cross_entropy(heads.modality(pooled), modality),
    }
