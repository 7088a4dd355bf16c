"""Synthetic CT-like and MR-like slices with known answers: the yardstick of the small trained model.

A phantom is an elliptic head (skin, skull, tissue, ventricles, nuclei) with zero to three lesions, drawn twice from
one anatomy: as CT and as MR, so that CT -> MR has a ground truth. Everything follows from an integer seed. Seeds
below HELD_OUT_SEEDS are kept for evaluation; training starts at TRAINING_SEEDS.

Pictures are grey, uint8 [128, 128]; left and right are those of the picture, not of a patient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

SIDE = 128
HELD_OUT_SEEDS = 10_000
TRAINING_SEEDS = 10_000  # the first seed that training may use
LOW_RESOLUTION = 32  # the side of a super-resolution input
MAX_ANSWER_TOKENS = 32  # where an answer about a phantom is cut

Picture = npt.NDArray[np.uint8]
Field = npt.NDArray[np.float64]

LESION_COUNT_ODDS = (0.4, 0.3, 0.15, 0.15)

# Brightness of each tissue in [0, 1]: (CT, MR).
AIR = (0.02, 0.02)
SKIN = (0.30, 0.80)
BONE = (0.95, 0.10)
TISSUE = (0.48, 0.45)
FLUID = (0.30, 0.15)
NUCLEUS = (0.60, 0.62)
LESION = (0.78, 0.98)

QUESTIONS = {
    "modality": "Which modality is this image?",
    "lesion": "Is there a lesion?",
    "count": "How many lesions are there?",
    "where": "Where is the lesion?",
}
MODALITIES = ("CT", "MR")
QUADRANTS = ("upper left", "upper right", "lower left", "lower right")
COUNT_WORDS = ("None", "One", "Two", "Three")
LESION_WORDS = ("no lesion", "one lesion", "two lesions", "three lesions")

# The small model aligns codes with patches by their distance, so its instructions share one length in tokens.
INSTRUCTIONS = {
    "reconstruct": "Reconstruct the image.",
    "ct-to-mr": "Translate to MR.",
    "super-resolve": "Upscale the image.",
}


@dataclass(frozen=True, slots=True)
class Lesion:
    """A bright disc; row and column of its centre and its radius, in pixels."""

    row: float
    column: float
    radius: float

    @property
    def quadrant(self) -> str:
        vertical = "upper" if self.row < SIDE / 2 else "lower"
        return f"{vertical} {'left' if self.column < SIDE / 2 else 'right'}"


@dataclass(frozen=True, slots=True)
class Phantom:
    """One anatomy seen as CT and as MR, each uint8 [128, 128], and its lesions."""

    seed: int
    ct: Picture
    mr: Picture
    lesions: tuple[Lesion, ...]

    @property
    def quadrants(self) -> tuple[str, ...]:
        """Where the lesions are, in the order of QUADRANTS."""
        return tuple(sorted((lesion.quadrant for lesion in self.lesions), key=QUADRANTS.index))


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one picture, uint8 [128, 128], with the exact answer expected."""

    kind: str
    text: str
    picture: Picture
    answer: str


@dataclass(frozen=True, slots=True)
class Task:
    """A generation task: instruction and input picture, the target, and a trivial answer to beat, all uint8."""

    kind: str
    instruction: str
    picture: Picture  # [128, 128], or [32, 32] for super-resolve
    target: Picture  # [128, 128]
    baseline: Picture  # [128, 128]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture wanted from words alone: of "CT" or "MR", with a lesion in each of `quadrants`."""

    modality: str
    quadrants: tuple[str, ...]

    @property
    def instruction(self) -> str:
        article = "an" if self.modality.startswith("M") else "a"
        lesions = LESION_WORDS[len(self.quadrants)]
        return f"Draw {article} {self.modality} image with {', '.join([lesions, *self.quadrants])}."

    def questions(self, picture: Picture) -> list[Question]:
        """What a picture that shows what was wanted is asked, with the answers it should get."""
        answers = right_answers(self.modality, self.quadrants)
        return [Question(kind, QUESTIONS[kind], picture, answer) for kind, answer in answers.items()]


class Anatomy:
    """Draws smooth-edged ellipses of both modalities at once."""

    def __init__(self, rng: np.random.Generator) -> None:
        axis = (np.arange(SIDE) + 0.5) / SIDE * 2 - 1
        self.y, self.x = np.meshgrid(axis, axis, indexing="ij")
        self.angle = rng.uniform(-0.15, 0.15)
        self.ct = np.full((SIDE, SIDE), AIR[0])
        self.mr = np.full((SIDE, SIDE), AIR[1])

    def ellipse(self, row: float, column: float, height: float, width: float, values: tuple[float, float]) -> Field:
        """Fill an ellipse (centre and half axes in units of half the picture); returns its mask in [0, 1]."""
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        x, y = self.x - column, self.y - row
        distance = np.hypot((cos * x + sin * y) / width, (cos * y - sin * x) / height)
        edge_pixels = (1 - distance) * min(height, width) * SIDE / 2
        mask: Field = np.clip(edge_pixels + 0.5, 0.0, 1.0)
        self.ct += mask * (values[0] - self.ct)
        self.mr += mask * (values[1] - self.mr)
        return mask


def phantom(seed: int) -> Phantom:
    """The phantom of `seed`: the same pictures for the same seed, on every machine with the same numpy."""
    rng = np.random.default_rng((20_250, seed))
    anatomy = Anatomy(rng)
    row, column = rng.uniform(-0.05, 0.05, 2)
    height, width = rng.uniform(0.80, 0.92), rng.uniform(0.66, 0.84)
    skin, bone = rng.uniform(0.04, 0.09), rng.uniform(0.06, 0.11)
    body = anatomy.ellipse(row, column, height, width, SKIN)
    anatomy.ellipse(row, column, height - skin, width - skin, BONE)
    height, width = height - skin - bone, width - skin - bone
    anatomy.ellipse(row, column, height, width, TISSUE)
    _draw_inside(anatomy, rng, row, column)
    lesions = _place_lesions(rng, row, column, height, width)
    for lesion in lesions:
        half = lesion.radius / (SIDE / 2)
        centre = (lesion.row / (SIDE / 2) - 1, lesion.column / (SIDE / 2) - 1)
        anatomy.ellipse(*centre, half, half, LESION)
    # The same slow texture in both modalities, a coil's shading only in MR, and each its own noise.
    texture = 1 + 0.08 * _smooth_field(rng, 8) * body
    shading = 1 + 0.10 * _smooth_field(rng, 2)
    ct = anatomy.ct * texture + rng.normal(0, 0.012, (SIDE, SIDE))
    mr = np.hypot(anatomy.mr * texture * shading + rng.normal(0, 0.012, (SIDE, SIDE)), 0.012)
    return Phantom(seed, _to_picture(ct), _to_picture(mr), tuple(lesions))


def _draw_inside(anatomy: Anatomy, rng: np.random.Generator, row: float, column: float) -> None:
    """Two mirrored ventricles and two mirrored nuclei, with small differences between the sides."""
    gap, lift = rng.uniform(0.07, 0.12), rng.uniform(-0.15, 0.0)
    tall, wide = rng.uniform(0.16, 0.28), rng.uniform(0.04, 0.09)
    drop, spread, size = rng.uniform(0.22, 0.36), rng.uniform(0.16, 0.30), rng.uniform(0.07, 0.12)
    for side in (-1, 1):
        scale = rng.uniform(0.9, 1.1)
        anatomy.ellipse(row + lift, column + side * gap, tall * scale, wide * scale, FLUID)
        anatomy.ellipse(row + drop, column + side * spread, size * scale, 1.3 * size * scale, NUCLEUS)


def _place_lesions(rng: np.random.Generator, row: float, column: float, height: float, width: float) -> list[Lesion]:
    """Zero to three discs inside the tissue, apart from each other and from the picture's two middle lines."""
    lesions: list[Lesion] = []
    wanted = rng.choice(len(LESION_COUNT_ODDS), p=LESION_COUNT_ODDS)
    half = SIDE / 2
    while len(lesions) < wanted:
        radius = rng.uniform(0.07, 0.12)
        y, x = rng.uniform(-0.7, 0.7, 2)
        inside = np.hypot((y - row) / (height - radius), (x - column) / (width - radius)) < 0.92
        clear = min(abs(x), abs(y)) > 0.13
        candidate = Lesion((y + 1) * half, (x + 1) * half, radius * half)
        if inside and clear and all(_gap(candidate, other) > 5 for other in lesions):
            lesions.append(candidate)
    return lesions


def _gap(first: Lesion, second: Lesion) -> float:
    """Pixels between the rims of two lesions."""
    centres = np.hypot(first.row - second.row, first.column - second.column)
    return float(centres - first.radius - second.radius)


def _smooth_field(rng: np.random.Generator, cells: int) -> Field:
    """A random field of about unit range, bicubic between cells x cells random values."""
    values = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(values).resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float64)


def _to_picture(values: Field) -> Picture:
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


def held_out(count: int) -> list[Phantom]:
    """The first `count` phantoms that training never sees."""
    if not 0 < count <= HELD_OUT_SEEDS:
        raise ValueError(f"expected 1 to {HELD_OUT_SEEDS} held-out phantoms, got {count}")
    return [phantom(seed) for seed in range(count)]


def right_answers(modality: str, quadrants: Sequence[str]) -> dict[str, str]:
    """The answer to each kind of question about a slice with these lesions; `where` only if there is exactly one."""
    count = len(quadrants)
    answers = {"modality": modality, "lesion": "Yes" if count else "No", "count": COUNT_WORDS[count]}
    return answers | ({"where": quadrants[0]} if count == 1 else {})


def questions(subject: Phantom) -> list[Question]:
    """Every question about both pictures of a phantom."""
    pictures = (subject.ct, subject.mr)
    return [q for drawing, picture in zip(drawings(subject), pictures, strict=True) for q in drawing.questions(picture)]


def drawings(subject: Phantom) -> list[Drawing]:
    """A phantom's CT and MR as words could ask for them."""
    return [Drawing(modality, subject.quadrants) for modality in MODALITIES]


def tasks(subject: Phantom) -> list[Task]:
    """The generation tasks of a phantom: reconstruct and super-resolve in both modalities, and CT -> MR.

    Baselines: the mean training picture of the modality (reconstruct, ct-to-mr), bicubic enlargement (super-resolve).
    """
    result = []
    for modality, picture in (("ct", subject.ct), ("mr", subject.mr)):
        kind = "reconstruct"
        result.append(Task(kind, INSTRUCTIONS[kind], picture, picture, mean_picture(modality)))
        kind, small = "super-resolve", downsample(picture)
        result.append(Task(kind, INSTRUCTIONS[kind], small, picture, enlarge(small)))
    kind = "ct-to-mr"
    result.append(Task(kind, INSTRUCTIONS[kind], subject.ct, subject.mr, mean_picture("mr")))
    return result


def downsample(picture: Picture) -> Picture:
    """[128, 128] -> [32, 32], each pixel the mean of a 4x4 square."""
    return np.asarray(Image.fromarray(picture).resize((LOW_RESOLUTION, LOW_RESOLUTION), Image.Resampling.BOX))


def enlarge(picture: Picture) -> Picture:
    """[32, 32] -> [128, 128], bicubic."""
    return np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


_mean_pictures: dict[str, Picture] = {}


def mean_picture(modality: str) -> Picture:
    """The mean of 100 training pictures of "ct" or "mr", uint8 [128, 128]."""
    if not _mean_pictures:
        sample = [phantom(TRAINING_SEEDS + index) for index in range(100)]
        _mean_pictures["ct"] = _to_picture(np.mean([one.ct for one in sample], axis=0) / 255)
        _mean_pictures["mr"] = _to_picture(np.mean([one.mr for one in sample], axis=0) / 255)
    return _mean_pictures[modality]
