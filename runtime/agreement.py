"""What a benchmark checks before it times: that different ways to the same result agree."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .errors import BenchmarkError
from .manifest import GENERATION, Manifest
from .session import Session

PROMPT_TOKENS = 16
# How far two results may be apart, as a share of their spread, for each root of a layer: roundings are independent.
# With integer matrices the activations are rounded to 8 bits, where the last bit of a sum can move a whole step
# (measured: 0.005 for 4 trained layers, up to 0.031 for 32 random ones); a wrong kernel is off by its full size. A CPU
# multiplies bf16 in float32, as fp16; products in bfloat16, as engines make them, were off by 0.002.
TOLERANCES = {"fp32": 5e-4, "fp16": 1e-2, "bf16": 1e-2, "int8": 4e-2, "int4": 4e-2}


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two results were apart, and how far they might be."""

    name: str
    distance: float
    tolerance: float


def outputs(session: Session) -> dict[str, np.ndarray]:
    """Some of everything that the graphs compute, the same for every session of a bundle."""
    manifest, executor = session.bundle.manifest, session.executor
    results = {}
    for task in sorted(manifest.tasks):
        results[f"{task} prefill"] = executor.context(task, None).forward(np.arange(PROMPT_TOKENS))
        results[f"{task} vision"] = executor.features(task, random_pixels(manifest))
    if GENERATION in manifest.tasks:
        results["picture"] = executor.picture(random_grid(manifest))
    return results


def agree(manifest: Manifest, found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> list[Agreement]:
    """Compare results by name; raises BenchmarkError where they are further apart than rounding takes them."""
    tolerance = TOLERANCES[manifest.precision] * math.sqrt(manifest.language.layers)
    agreements = []
    for name, reference in expected.items():
        reference = reference.astype(np.float64)
        distance = float(np.linalg.norm(found[name] - reference) / np.linalg.norm(reference - reference.mean()))
        if not distance <= tolerance:  # a NaN neither
            raise BenchmarkError(f"{name} must agree to {tolerance:.2g}, found {distance:.3g}; nothing was timed")
        agreements.append(Agreement(name, distance, tolerance))
    return agreements


def decoding_agrees(session: Session) -> list[Agreement]:
    """That each task's last logits are the same whether its prompt's second half is decoded or prefilled."""
    agreements = []
    for task in sorted(session.bundle.manifest.tasks):
        ids = np.arange(PROMPT_TOKENS)
        half = PROMPT_TOKENS // 2
        context = session.executor.context(task, None)
        logits = context.forward(ids[:half])
        for token_id in ids[half:]:
            logits = context.forward(np.array([token_id]))
        name = f"{task} decode and prefill"
        prefilled = session.executor.context(task, None).forward(ids)
        agreements += agree(session.bundle.manifest, {name: logits}, {name: prefilled})
    return agreements


def random_pixels(manifest: Manifest) -> np.ndarray:
    """A picture for the vision tower."""
    size = manifest.vision.image_size
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)


def random_grid(manifest: Manifest) -> np.ndarray:
    """A grid of codes; the bundle must have generation."""
    assert manifest.codes is not None
    grid = manifest.codes.grid
    return np.random.default_rng(0).integers(0, manifest.codes.count, (grid, grid))
