"""What a bundle is worth: answers and pictures on held-out phantoms, beside chance and trivial baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .phantoms import (
    AnswerScore,
    Drawing,
    PictureScore,
    Question,
    Task,
    drawings,
    held_out,
    questions,
    score_answers,
    score_pictures,
)
from .phantoms import tasks as generation_tasks
from .session import COMPREHENSION, GENERATION, Session

MAX_ANSWER_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores by question kind and by generation task; empty where the bundle lacks the plugin.

    drawings: what the bundle itself says of pictures that it drew from words, as if they showed what was wanted.
    """

    answers: dict[str, AnswerScore]
    pictures: dict[str, PictureScore]
    drawings: dict[str, AnswerScore]

    def to_json(self) -> dict[str, Any]:
        return {
            "answers": _answers_json(self.answers),
            "pictures": {
                kind: {
                    "psnr": score.psnr,
                    "ssim": score.ssim,
                    "baseline_psnr": score.baseline_psnr,
                    "baseline_ssim": score.baseline_ssim,
                    "total": score.total,
                }
                for kind, score in self.pictures.items()
            },
            "drawings": _answers_json(self.drawings),
        }


def _answers_json(scores: dict[str, AnswerScore]) -> dict[str, Any]:
    return {
        kind: {"correct": score.correct, "total": score.total, "accuracy": score.accuracy, "chance": score.chance}
        for kind, score in scores.items()
    }


def evaluate(
    session: Session,
    *,
    answer_phantoms: int,
    picture_phantoms: int,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Ask every question about the first `answer_phantoms` held-out phantoms, run every generation task on the first
    `picture_phantoms` and draw from the words that describe these; the bundle should be one of the phantom."""
    tasks = session.bundle.manifest.tasks
    asked: list[Question] = []
    wanted: list[Task] = []
    described: list[Drawing] = []
    if COMPREHENSION in tasks and answer_phantoms:
        asked = [question for subject in held_out(answer_phantoms) for question in questions(subject)]
    if GENERATION in tasks and picture_phantoms:
        subjects = held_out(picture_phantoms)
        wanted = [task for subject in subjects for task in generation_tasks(subject)]
        if COMPREHENSION in tasks:
            # Many are described alike, and one of each is drawn.
            described = list(dict.fromkeys(drawing for subject in subjects for drawing in drawings(subject)))
    total = len(asked) + len(wanted) + len(described)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        on_step(done, total)

    def answer(question: Question) -> str:
        return session.answer(question.picture, question.text, max_new_tokens=MAX_ANSWER_TOKENS).text

    answers: list[str] = []
    pictures: list[np.ndarray] = []
    for question in asked:
        answers.append(answer(question))
        step()
    for task in wanted:
        pictures.append(session.generate(task.picture, task.instruction).pixels)
        step()
    asked_of_drawings: list[Question] = []
    for drawing in described:
        asked_of_drawings += drawing.questions(session.generate(None, drawing.instruction).pixels)
        step()
    return Evaluation(
        score_answers(asked, answers),
        score_pictures(wanted, pictures),
        score_answers(asked_of_drawings, [answer(question) for question in asked_of_drawings]),
    )
