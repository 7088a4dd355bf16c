"""Pretrains the phantom's CLIP tower on labelled phantoms, as a stand-in for CLIP's own training on captions.

The features that the plugins will read are trained for what they will be asked: the first layer's (generation)
for the pixels of each patch and around it, in full detail even where a low-resolution picture is shown; those before
the last layer (comprehension) for where lesions are and, averaged, for modality and count. Then the tower is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from healthgpt_edge import phantoms
from healthgpt_edge.phantoms import Phantom

from ..checkpoint import VisionConfig
from ..reference.clip import VisionTower
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
    learned = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(learned, LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for step, chosen in enumerate(_choices(seed, steps, len(subjects))):
        with torch.autocast("cpu", torch.bfloat16):
            losses, found = _losses(tower, heads, [subjects[i] for i in chosen], step % 4 == 3)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            told = ", ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
            report(f"vision {step}/{steps} {told}, counts right {found:.2f}")
    return tower.eval()


def _start_bright(tower: VisionTower) -> None:
    """Give every position a common vector, larger than what a patch adds to it.

    The norm in front of the layers divides by a patch's length: without this, how bright a flat patch is would be lost
    from the start, and is found again only slowly.
    """
    with torch.no_grad():
        tower.embeddings.patch_embedding.weight.mul_(0.5)
        positions = tower.embeddings.position_embedding.weight
        positions.copy_(torch.randn(CONFIG.hidden) + 0.1 * torch.randn_like(positions))


def _choices(seed: int, steps: int, count: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        yield rng.integers(count, size=BATCH // 2)


def _losses(tower: VisionTower, heads: Heads, subjects: list[Phantom], low: bool) -> tuple[dict[str, Tensor], float]:
    """The losses of one batch, and the share of pictures whose lesions were counted right.

    low: show enlarged low-resolution pictures, as super-resolution does, and ask for the full ones' pixels.
    """
    pictures = [picture for subject in subjects for picture in (subject.ct, subject.mr)]
    shown = [phantoms.downsample(picture) for picture in pictures] if low else pictures
    first = tower(tower.normalise(enlarge(shown)), GENERATION_LAYERS)  # [B, 256, C]
    losses = {"pixels": 4 * functional.mse_loss(heads.pixels(first), patch_windows(pictures))}
    late = first
    for layer in tower.encoder.layers[GENERATION_LAYERS:COMPREHENSION_LAYERS]:
        late = layer(late)
    centres = torch.from_numpy(np.stack([lesion_map(subject) for subject in subjects])).repeat_interleave(2, 0)
    counts = torch.tensor([len(subject.lesions) for subject in subjects]).repeat_interleave(2)
    modality = torch.tensor([0, 1] * len(subjects))
    pooled = late.mean(dim=1)
    guessed = heads.counts(pooled)
    losses["centres"] = 256 / 8 * functional.binary_cross_entropy_with_logits(heads.centres(late)[..., 0], centres)
    losses["counts"] = 0.5 * functional.cross_entropy(guessed, counts)
    losses["modality"] = 0.2 * functional.cross_entropy(heads.modality(pooled), modality)
    return losses, float((guessed.argmax(dim=1) == counts).float().mean())
