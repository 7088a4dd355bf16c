"""Cases done by a bundle, scored, and compared with what another bundle makes of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ..errors import BundleError, HealthGPTError, in_one_line
from ..images import prepare, read_image
from ..manifest import COMPREHENSION, GENERATION, Manifest
from ..results import Answer, Picture
from ..session import Session
from .cases import Case
from .divergence import next_tokens
from .scores import answer_scores, chance, picture_scores

OnStep = Callable[[str, int, int], None]


@dataclass(slots=True)
class Outcome:
    """What became of a case: the ids, and the text of an answer, or the error; and its scores by name.

    `pixels` of a picture, uint8 [H, W, 3], are here only until they have been compared.
    """

    case: Case
    token_ids: list[int] = field(default_factory=list)
    text: str | None = None
    error: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    pixels: np.ndarray | None = None

    def to_json(self) -> dict[str, Any]:
        found = {"id": self.case.name, "kind": self.case.kind, "text": self.text, "error": self.error}
        if self.case.task == COMPREHENSION:
            found["expected"] = self.case.expected
        return {name: value for name, value in found.items() if value is not None} | _finite(self.scores)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The outcome of every case, in their order."""

    outcomes: list[Outcome]

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.error is not None]

    def means(self, task: str) -> dict[str, dict[str, float]]:
        """The mean of every score by kind of case, of those that did not fail, and how many these are (`total`).

        For answers also `chance`, what the most frequent expected answer would get.
        """
        kinds: dict[str, list[Outcome]] = defaultdict(list)
        for outcome in self.outcomes:
            if outcome.case.task == task and outcome.error is None:
                kinds[outcome.case.kind].append(outcome)
        return {kind: _means(some) for kind, some in kinds.items()}

    def to_json(self) -> dict[str, Any]:
        by_task = {"answers": COMPREHENSION, "pictures": GENERATION}
        means = {name: {k: _finite(v) for k, v in self.means(task).items()} for name, task in by_task.items()}
        return {**means, "failed": len(self.failed)}


def evaluate(
    session: Session,
    cases: list[Case],
    *,
    against: Session | None = None,
    together: int = 1,
    on_step: OnStep = lambda stage, done, total: None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> Evaluation:
    """Do every case, greedily, and score it; `on_outcome` gets each as soon as that is done.

    Scores of answers are `exact` and `recall` (`scores.is_right` and `scores.recall`). Those of pictures are `psnr`
    (dB) and `ssim` beside the expected picture, which is made square and resized as inputs are, and `baseline_psnr` and
    `baseline_ssim`, where the case has a baseline.

    With `against`, another bundle of the same model, there are also its own scores, `reference_exact` and so on;
    `same`, whether all token ids are those that it gives; `next_tokens` and `divergence` along its ids
    (`divergence.next_tokens`); and of pictures `levels`, by how many of 255 they differ on average.

    A case that cannot be done has an error and no scores. Up to `together` cases are done at a time. Raises BundleError
    where the bundles are not of one model.
    """
    if against:
        _check_comparable(session.bundle.manifest, against.bundle.manifest)
    outcomes = {}
    for number, outcome in _outcomes(session, cases, together, partial(on_step, "cases")):
        outcomes[number] = outcome
        if not against:
            outcome.pixels = None
            on_outcome(outcome)
    if against:
        for number, reference in _outcomes(against, cases, together, partial(on_step, "reference")):
            _compare(outcomes[number], reference, session, against)
            on_outcome(outcomes[number])
    return Evaluation([outcomes[number] for number in range(len(cases))])


def _check_comparable(found: Manifest, expected: Manifest) -> None:
    """Raise BundleError unless a token means the same to both."""
    for name in ("template", "tokenizer", "codes"):
        if getattr(found, name) != getattr(expected, name):
            raise BundleError(f"bundles that are compared must be of one model, found another {name}")
    file = found.tokenizer.file
    if found.files[file] != expected.files[file] or found.language.vocab != expected.language.vocab:
        raise BundleError("bundles that are compared must be of one model, found another vocabulary")
    for task in found.tasks.keys() & expected.tasks.keys():
        if found.tasks[task].first_logit != expected.tasks[task].first_logit:
            raise BundleError(f"bundles that are compared must be of one model, found another first logit of {task}")


def _outcomes(
    session: Session, cases: list[Case], together: int, on_step: Callable[[int, int], None]
) -> Iterator[tuple[int, Outcome]]:
    """What becomes of each case, by its number and in the order in which they are done."""
    doing = session.together(together)
    for number, case in enumerate(cases):
        options: dict[str, Any] = {"frame": case.frame, "window": case.window}
        if case.max_new_tokens is not None:
            options["max_new_tokens"] = case.max_new_tokens
        add = doing.answer if case.task == COMPREHENSION else doing.generate
        add(number, case.image, case.words, **options)
    on_step(0, len(cases))
    for done, (name, made, error) in enumerate(doing, start=1):
        assert isinstance(name, int)  # given above
        if error is None:
            yield name, _scored(cases[name], made, session)
        elif isinstance(error, HealthGPTError):
            yield name, Outcome(cases[name], error=in_one_line(error))
        else:
            raise error
        on_step(done, len(cases))


def _scored(case: Case, made: Answer | Picture, session: Session) -> Outcome:
    """The result of a case, and its scores beside what is expected."""
    outcome = Outcome(case, made.token_ids)
    if isinstance(made, Answer):
        outcome.text = made.text
        if case.expected is not None:
            outcome.scores = answer_scores(made.text, case.expected)
    else:
        outcome.pixels = made.pixels
        if case.expected is not None:
            target = prepare(read_image(case.expected), len(made.pixels), session.bundle.manifest.vision.background)
            outcome.scores = picture_scores(made.pixels, target, case.baseline)
    return outcome


def _compare(outcome: Outcome, reference: Outcome, session: Session, against: Session) -> None:
    """What the same case is by the other bundle, and how far from it."""
    if outcome.error is not None:
        return
    if reference.error is not None:
        outcome.error, outcome.scores = f"the other bundle: {reference.error}", {}
        return
    for name in ("exact", "recall", "psnr", "ssim"):
        if name in reference.scores:
            outcome.scores[f"reference_{name}"] = reference.scores[name]
    outcome.scores["same"] = float(outcome.token_ids == reference.token_ids)
    outcome.scores |= next_tokens(session, against, outcome.case, reference.token_ids)
    if outcome.pixels is not None and reference.pixels is not None:
        outcome.scores["levels"] = float(np.abs(outcome.pixels.astype(int) - reference.pixels).mean())
        outcome.pixels = None


def _means(outcomes: list[Outcome]) -> dict[str, float]:
    names = dict.fromkeys(name for outcome in outcomes for name in outcome.scores)
    means: dict[str, float] = {"total": len(outcomes)}
    for name in names:
        means[name] = float(np.mean([one.scores[name] for one in outcomes if name in one.scores]))
    if "exact" in names:
        means["chance"] = chance([one.case.expected for one in outcomes if one.case.expected is not None])
    return means


def _finite(scores: dict[str, float]) -> dict[str, float | None]:
    """As JSON has them, which has no infinity: equal pictures' PSNR is null."""
    return {name: value if math.isfinite(value) else None for name, value in scores.items()}
