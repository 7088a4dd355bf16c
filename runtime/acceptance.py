"""Whether one executor computes what another does: the test that an appliance repeats after every change of its driver.

Both get the same pictures and tokens. Compared are features, keys and values of a few layers, logits, the tokens that
would follow, codes and pictures. What cannot be compared, or is not finite, has failed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .agreement import TOLERANCES, random_grid
from .errors import HealthGPTError
from .executors import Context
from .images import prepare, read_image
from .manifest import GENERATION
from .phantoms import held_out, questions
from .session import Session

PHANTOMS, NEW_TOKENS = 4, 16
# The least that the cosine of two results may be, and how far their norms may be apart. The share of tokens that must
# agree leaves room for near ties; levels are counted that are more than MAX_LEVELS of 255 apart. One layer's rounding
# is independent of another's, so the distance of logits may grow with the root of their number (see agreement.py).
# Products in bfloat16 took the cosine of a trained model's fourth layer to 0.9999, which 64 layers may do 16 times.
COSINES = {"fp32": 0.99999, "fp16": 0.999, "bf16": 0.995, "int8": 0.995, "int4": 0.99}
NORM_RATIO = 0.03
TOKEN_SHARES = {"fp32": 1.0, "fp16": 0.97, "bf16": 0.95, "int8": 0.9, "int4": 0.9}
MAX_LEVELS, LEVELS_SHARE, CODES_SHARE = 4, 0.01, 0.98


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison: what was found, and in words what it must be."""

    name: str
    found: float
    bound: str
    passed: bool


@dataclass(slots=True)
class Report:
    """All comparisons of two executors."""

    executor: str
    against: str
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def first_failure(self) -> str:
        for check in self.checks:
            if not check.passed:
                return f"{check.name} must be {check.bound}, found {check.found:.5g}"
        return "nothing was compared"

    def to_json(self) -> dict[str, Any]:
        # JSON has no NaN: what is none is null.
        checks = [asdict(one) | {"found": one.found if math.isfinite(one.found) else None} for one in self.checks]
        return {"executor": self.executor, "against": self.against, "checks": checks}

    def at_least(self, name: str, found: float, bound: float) -> None:
        self.checks.append(Check(name, found, f"at least {bound:g}", bool(found >= bound)))

    def at_most(self, name: str, found: float, bound: float) -> None:
        self.checks.append(Check(name, found, f"at most {bound:g}", bool(found <= bound)))

    def alike(self, name: str, found: np.ndarray, expected: np.ndarray, cosine: float) -> None:
        """By direction and by length, as vectors."""
        if found.shape != expected.shape:
            raise HealthGPTError(f"{name} must have the shape {expected.shape}, found {found.shape}")
        ours, theirs = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
        lengths = np.linalg.norm(ours), np.linalg.norm(theirs)
        with np.errstate(invalid="ignore", divide="ignore"):
            self.at_least(f"{name}: cosine", float(ours @ theirs / (lengths[0] * lengths[1])), cosine)
            self.at_most(f"{name}: norm ratio from 1", float(abs(lengths[0] / lengths[1] - 1)), NORM_RATIO)


def compare(found: Session, expected: Session, on_step: Callable[[str], None] = lambda name: None) -> Report:
    """What the executor of `found` computes beside that of `expected`, two sessions of one bundle.

    Raises HealthGPTError where one cannot compute at all, or gives another shape.
    """
    report = Report(found.executor.name, expected.executor.name)
    manifest = expected.bundle.manifest
    cosine = COSINES[manifest.precision]
    for task in sorted(manifest.tasks):
        agreed = total = 0
        for index, subject in enumerate(held_out(PHANTOMS)):
            on_step(f"{task}, picture {index + 1} of {PHANTOMS}")
            asked = next(iter(questions(subject)))
            pixels = prepare(read_image(asked.picture), manifest.vision.image_size, manifest.vision.background)
            _, ids = expected.prompt(task, asked.text, has_image=True)
            features = [session.executor.features(task, pixels) for session in (found, expected)]
            if index == 0:
                report.alike(f"{task} features", features[0], features[1], cosine)
            # The same features for both: what is compared from here on is the language model.
            contexts = [session.executor.context(task, features[1]) for session in (found, expected)]
            logits = [context.forward(ids) for context in contexts]
            if index == 0:
                _compare_layers(report, task, contexts[0], contexts[1], cosine)
                distance = np.linalg.norm(logits[0] - logits[1]) / np.linalg.norm(logits[1] - logits[1].mean())
                bound = TOLERANCES[manifest.precision] * manifest.language.layers**0.5
                report.at_most(f"{task} logits: distance", float(distance), bound)
            first_logit = manifest.tasks[task].first_logit
            for _ in range(NEW_TOKENS):
                chosen = [int(one[-1].argmax()) for one in logits]
                finite = all(np.isfinite(one).all() for one in logits)
                agreed, total = agreed + (finite and chosen[0] == chosen[1]), total + 1
                # Both go on with the same token, so that one near tie counts once.
                following = np.array([first_logit + chosen[1]])
                logits = [context.forward(following) for context in contexts]
        report.at_least(f"{task} next tokens that agree", agreed / total, TOKEN_SHARES[manifest.precision])
    if GENERATION in manifest.tasks:
        on_step("pictures")
        _compare_pictures(report, found, expected)
    return report


def _compare_layers(report: Report, task: str, found: Context, expected: Context, cosine: float) -> None:
    """Keys and values of the first, the middle and the last layer: they tell where two executors part ways."""
    ours, theirs = (_floats(context.caches(context.length)) for context in (found, expected))
    layers = len(theirs) // 2
    for layer in sorted({0, layers // 2, layers - 1}):
        for kind in ("key", "value"):
            name = f"key_values.{layer}.{kind}"
            report.alike(f"{task} layer {layer} {kind}s", ours[name], theirs[name], cosine)


def _floats(caches: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Keys and values in float32, whatever they are kept in."""
    values = {name: cache.astype(np.float32) for name, cache in caches.items() if not name.endswith("_scale")}
    return {name: value * caches.get(f"{name}_scale", np.float32(1)) for name, value in values.items()}


def _compare_pictures(report: Report, found: Session, expected: Session) -> None:
    manifest = expected.bundle.manifest
    assert manifest.codes is not None  # a manifest with generation has them
    ours, theirs = (session.executor.picture(random_grid(manifest)).astype(int) for session in (found, expected))
    far = float((np.abs(ours - theirs) > MAX_LEVELS).mean())
    report.at_most(f"levels more than {MAX_LEVELS} apart", far, LEVELS_SHARE)
    if "draft" in manifest.tasks[GENERATION].graphs:
        subject = next(iter(questions(held_out(1)[0])))
        pixels = prepare(read_image(subject.picture), manifest.codes.image_size, manifest.vision.background)
        ours, theirs = (session.executor.draft(pixels) for session in (found, expected))
        report.at_least("codes of a picture that agree", float((ours == theirs).mean()), CODES_SHARE)
