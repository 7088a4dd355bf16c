"""What a bundle is worth: answers and pictures on held-out phantoms, beside chance and trivial baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .manifest import COMPREHENSION, GENERATION
from .phantoms import AnswerScore, PictureScore, Question, Task, held_out, questions, score_answers, score_pictures
from .phantoms import tasks as generation_tasks
from .session import Session

MAX_ANSWER_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores by question kind and by generation task; empty where the bundle lacks the plugin."""

    answers: dict[str, AnswerScore]
    pictures: dict[str, PictureScore]

    def to_json(self) -> dict[str, Any]:
        return {
            "answers": {
                kind: {
                    "correct": score.correct,
                    "total": score.total,
                    "accuracy": score.accuracy,
                    "chance": score.chance,
                }
                for kind, score in self.answers.items()
            },
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
        }


def evaluate(
    session: Session,
    *,
    answer_phantoms: int,
    picture_phantoms: int,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Ask every question about the first `answer_phantoms` held-out phantoms and run every generation task on the
    first `picture_phantoms`; the bundle should be one exported from the phantom checkpoint."""
    tasks = session.bundle.manifest.tasks
    asked: list[Question] = []
    wanted: list[Task] = []
    if COMPREHENSION in tasks and answer_phantoms:
        asked = [question for subject in held_out(answer_phantoms) for question in questions(subject)]
    if GENERATION in tasks and picture_phantoms:
        wanted = [task for subject in held_out(picture_phantoms) for task in generation_tasks(subject)]
    total = len(asked) + len(wanted)
    answers: list[str] = []
    pictures: list[np.ndarray] = []
    for question in asked:
        answers.append(session.answer(question.picture, question.text, max_new_tokens=MAX_ANSWER_TOKENS).text)
        on_step(len(answers), total)
    for task in wanted:
        pictures.append(session.generate(task.picture, task.instruction).pixels)
        on_step(len(answers) + len(pictures), total)
    return Evaluation(score_answers(asked, answers), score_pictures(wanted, pictures))
