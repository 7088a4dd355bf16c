"""What an export did: the bytes of each part of the model, and the algebra that was folded away."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .checkpoint import Checkpoint
from .graph.language import first_logit_row
from .weights import WeightFile

# What a weight key belongs to, by what it holds; the first match decides.
_PARTS = (
    ("vision/", "vision tower"),
    ("vq/", "VQGAN"),
    ("mm_projector.", "projector"),
    ("embed_tokens.", "embedding"),
    ("lm_head.", "head"),
    (".adapter_", "H-LoRA adapters"),
    ("layers.", "base linears"),
)


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one part of the model inside one weight file, which may go on in others."""

    file: str
    part: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Summary:
    """The parts by file, the total size of the bundle, and one sentence per fold."""

    parts: tuple[Part, ...]
    total_bytes: int
    folded: tuple[str, ...]


def parts_of(file: WeightFile) -> list[Part]:
    """The bytes of each part in a weight file, and those it goes on in, largest first."""
    sizes: Counter[str] = Counter()
    for key, stored in file.stored.items():
        sizes[next(part for mark, part in _PARTS if mark in key)] += stored.length
    return [Part(str(file.first_location), part, size) for part, size in sizes.most_common()]


def folds_of(checkpoint: Checkpoint) -> list[str]:
    """What the graphs of this checkpoint no longer compute (the identities are in fold.py)."""
    language, vision = checkpoint.language, checkpoint.vision
    linears = language.layers * len(language.linears) * len(checkpoint.tasks)
    folded = [
        f"{linears} routers stacked on A, {linears} scalings taken into B",
        f"{2 * language.layers + 1} RMS norm weights taken into the matrices that follow",
        "pixel normalisation taken into the patch embedding",
    ]
    for name, task in sorted(checkpoint.tasks.items()):
        folded.append(f"{name}: {task.vision_layers} of {vision.layers} vision layers kept")
        if first := first_logit_row(checkpoint, name):
            folded.append(f"{name}: {language.vocab - first} of {language.vocab} head rows read per token")
    if checkpoint.vq is not None and "generation" in checkpoint.tasks:
        folded.append("post_quant_conv taken into the codebook")
    return folded
