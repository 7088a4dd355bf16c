"""Measures the trained phantom on held-out phantoms, by the PyTorch reference with batched greedy decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from healthgpt_edge import phantoms
from healthgpt_edge.evaluation.cases import question_case, task_case
from healthgpt_edge.evaluation.evaluate import Evaluation, Outcome
from healthgpt_edge.evaluation.scores import answer_scores, picture_scores
from healthgpt_edge.manifest import COMPREHENSION, GENERATION
from healthgpt_edge.phantoms import Drawing, Picture, Question, Task, questions

from ..reference.language import KeyValueCache
from ..reference.model import HealthGPT
from ..reference.vqgan import Vqgan, to_uint8
from .autoencoder import to_input
from .base import CODES
from .corpus import END, Words
from .pictures import GRID, enlarge
from .plugins import NEW_TOKENS, prompt_embeddings

BATCH = 20
ANSWER_TOKENS = 8
Item = TypeVar("Item")


def chunks(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


@torch.no_grad()
def greedy(model: HealthGPT, prompts: Tensor, pictures: Sequence[Picture], new_tokens: int) -> Tensor:
    """Greedy ids [B, new_tokens] for prompts [B,T] and their pictures, if any. No row stops early."""
    if pictures:
        features = model.image_features(model.vision_tower.normalise(enlarge(pictures)))
        embeddings = prompt_embeddings(model, prompts, features)
    else:
        embeddings = model.model.embed_tokens(prompts)
    cache = KeyValueCache(model.language, embeddings.shape[1] + new_tokens, len(prompts))
    chosen = []
    for _ in range(new_tokens):
        chosen.append(model.lm_head(model.model(embeddings, cache)[:, -1]).argmax(dim=1))
        embeddings = model.model.embed_tokens(chosen[-1][:, None])
    return torch.stack(chosen, dim=1)


def answers(model: HealthGPT, words: Words, count: int) -> dict[str, Any]:
    """Exact match and chance level by question kind, on `count` held-out phantoms."""
    return ask(model, words, [question for subject in phantoms.held_out(count) for question in questions(subject)])


def ask(model: HealthGPT, words: Words, asked: Sequence[Question]) -> dict[str, Any]:
    """Exact match and chance level by question kind."""
    given: dict[int, str] = {}
    for kind, text in phantoms.QUESTIONS.items():
        prompt = torch.tensor([words.prompt(text)])
        for some in chunks([i for i, question in enumerate(asked) if question.kind == kind]):
            ids = greedy(model, prompt.expand(len(some), -1), [asked[i].picture for i in some], ANSWER_TOKENS)
            for index, row in zip(some, ids.tolist(), strict=True):
                stop = row.index(END) if END in row else len(row)
                given[index] = words.tokenizer.decode(row[:stop])
    outcomes = [Outcome(question_case(one), scores=answer_scores(given[i], one.answer)) for i, one in enumerate(asked)]
    return {
        kind: {"accuracy": round(s["exact"], 4), "chance": round(s["chance"], 4), "questions": s["total"]}
        for kind, s in Evaluation(outcomes).means(COMPREHENSION).items()
    }


@torch.no_grad()
def drawings(answering: HealthGPT, drawing: HealthGPT, vqgan: Vqgan, words: Words, count: int) -> dict[str, Any]:
    """Exact match and chance level by question kind, for questions about pictures that the model drew from words.

    The comprehension task answers the questions. The instructions are the distinct ones for the first `count` held-out
    phantoms.
    """
    by_length: dict[int, list[tuple[Drawing, list[int]]]] = {}
    for wanted in dict.fromkeys(one for subject in phantoms.held_out(count) for one in phantoms.drawings(subject)):
        prompt = [*words.without_picture(wanted.instruction), NEW_TOKENS.start]
        by_length.setdefault(len(prompt), []).append((wanted, prompt))
    asked: list[Question] = []
    for alike in by_length.values():
        for some in chunks(alike):
            codes = greedy(drawing, torch.tensor([prompt for _, prompt in some]), [], CODES) - NEW_TOKENS.first_code
            drawn = _decode(vqgan, codes.clamp(0, NEW_TOKENS.codes - 1))
            for (wanted, _), picture in zip(some, drawn, strict=True):
                asked += wanted.questions(picture)
    return ask(answering, words, asked)


@torch.no_grad()
def pictures(model: HealthGPT, vqgan: Vqgan, words: Words, count: int) -> dict[str, Any]:
    """PSNR and SSIM by task on `count` held-out phantoms, for the model, a ceiling and a trivial baseline.

    The ceiling is the target after the VQGAN's encoder and decoder. `valid_free_runs` is the share of unconstrained
    greedy runs that give exactly 256 codes, <end_index> and <|end|>.
    """
    wanted = [task for subject in phantoms.held_out(count) for task in phantoms.tasks(subject)]
    prompts = {kind: torch.tensor([*ids, NEW_TOKENS.start]) for kind, ids in words.instructions().items()}
    drawn: list[Picture] = []
    valid = 0
    for some in chunks(wanted):
        asked = torch.stack([prompts[task.kind] for task in some])
        ids = greedy(model, asked, [task.picture for task in some], CODES + 2)
        codes = ids[:, :CODES] - NEW_TOKENS.first_code
        good = ((codes >= 0) & (codes < NEW_TOKENS.codes)).all(dim=1)
        good &= (ids[:, CODES] == NEW_TOKENS.end) & (ids[:, CODES + 1] == END)
        valid += int(good.sum())
        drawn += _decode(vqgan, codes.clamp(0, NEW_TOKENS.codes - 1))
    best = _scores(wanted, _roundtrip(vqgan, wanted))
    result: dict[str, Any] = {}
    for kind, score in _scores(wanted, drawn).items():
        result[kind] = {
            "psnr": round(score["psnr"], 2),
            "ssim": round(score["ssim"], 4),
            "ceiling_psnr": round(best[kind]["psnr"], 2),
            "ceiling_ssim": round(best[kind]["ssim"], 4),
            "baseline_psnr": round(score["baseline_psnr"], 2),
            "baseline_ssim": round(score["baseline_ssim"], 4),
            "pictures": score["total"],
        }
    return {**result, "valid_free_runs": round(valid / len(wanted), 4)}


def _scores(wanted: Sequence[Task], drawn: Sequence[Picture]) -> dict[str, dict[str, float]]:
    """The mean scores of pictures by kind."""
    pairs = zip(wanted, drawn, strict=True)
    outcomes = [Outcome(task_case(t), scores=picture_scores(p, t.target, t.baseline)) for t, p in pairs]
    return Evaluation(outcomes).means(GENERATION)


def _decode(vqgan: Vqgan, codes: Tensor) -> list[Picture]:
    return list(to_uint8(vqgan.decode(codes.unflatten(1, (GRID, GRID)))).float().mean(dim=3).round().byte().numpy())


def _roundtrip(vqgan: Vqgan, wanted: Sequence[Task]) -> list[Picture]:
    drawn: list[Picture] = []
    for some in chunks(wanted):
        drawn += _decode(vqgan, vqgan.encode(to_input(np.stack([task.target for task in some]))).flatten(1))
    return drawn
