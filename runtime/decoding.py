"""The token loop: one for every executor, for text and for codes, greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .errors import GenerationError
from .executors import Context


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn: greedily at temperature 0, else from the smallest set of tokens that holds `top_p`
    of the probability, by a generator seeded with `seed`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise GenerationError(f"temperature must be 0 or a positive number, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise GenerationError(f"top_p must be above 0 and at most 1, found {self.top_p}")
        if self.seed < 0:
            raise GenerationError(f"seed must be 0 or above, found {self.seed}")


class Grammar(Protocol):
    """What may come next."""

    def forced(self) -> int | None:
        """The only token that may come next, or None where the model chooses."""
        ...

    def restrict(self, scores: np.ndarray, first: int) -> np.ndarray:
        """The scores [rows], row 0 being id `first`, with -inf where a token may not come next."""
        ...

    def advance(self, token_id: int) -> None: ...


class FreeText:
    """Any token, at any time."""

    def forced(self) -> int | None:
        return None

    def restrict(self, scores: np.ndarray, first: int) -> np.ndarray:
        return scores

    def advance(self, token_id: int) -> None:
        pass


class CodeGrid:
    """Exactly `total` codes, then the end token; `<pixel_newline>` may stand anywhere and counts for nothing.

    Newlines stay allowed because the original ignores them: so the locked run follows every free run that is valid.
    """

    def __init__(self, first: int, count: int, end: int, newline: int, total: int) -> None:
        self.codes: list[int] = []
        self._first, self._count, self._end, self._newline, self._total = first, count, end, newline, total

    def forced(self) -> int | None:
        return self._end if len(self.codes) == self._total else None

    def restrict(self, scores: np.ndarray, first: int) -> np.ndarray:
        kept = np.full_like(scores, -np.inf)
        codes = slice(self._first - first, self._first - first + self._count)
        kept[codes] = scores[codes]
        kept[self._newline - first] = scores[self._newline - first]
        return kept

    def advance(self, token_id: int) -> None:
        if self._first <= token_id < self._first + self._count:
            self.codes.append(token_id - self._first)


class Selector:
    """Picks the next token from logits: penalty, grammar, then greedy or sampled."""

    def __init__(self, sampling: Sampling, repetition_penalty: float, first_logit: int) -> None:
        self._sampling, self._penalty, self._first = sampling, repetition_penalty, first_logit
        self._random = np.random.default_rng(sampling.seed)
        self._seen: set[int] = set()

    def choose(self, logits: np.ndarray, grammar: Grammar) -> int:
        """The next id for float32 logits [rows], row 0 being id `first_logit`.

        Raises GenerationError where a logit is not finite: a picture or an answer from NaN would look like one.
        """
        if not np.isfinite(logits).all():
            bad = int(np.count_nonzero(~np.isfinite(logits)))
            raise GenerationError(f"the model must give finite logits, found {bad} NaN or infinite of {logits.size}")
        scores = logits
        if self._penalty != 1.0 and self._seen:
            # As the original: only generated ids are penalised, for the prompt reaches it as embeddings.
            ids = np.fromiter(self._seen, np.int64) - self._first
            scores = logits.copy()
            scores[ids] = np.where(scores[ids] < 0, scores[ids] * self._penalty, scores[ids] / self._penalty)
        scores = grammar.restrict(scores, self._first)
        choice = int(scores.argmax()) if self._sampling.temperature == 0 else self._sample(scores)
        token_id = choice + self._first
        self._seen.add(token_id)
        return token_id

    def _sample(self, scores: np.ndarray) -> int:
        with np.errstate(over="ignore"):  # a temperature near 0 takes scores to -inf, which is right
            scaled = (scores.astype(np.float64) - float(scores.max())) / self._sampling.temperature
        order = np.argsort(-scaled, kind="stable")
        probabilities = np.exp(scaled[order])
        probabilities /= probabilities.sum()
        cumulative = np.cumsum(probabilities)
        kept = int(np.searchsorted(cumulative, self._sampling.top_p, side="left")) + 1
        kept = min(kept, len(order))
        return int(
            order[np.searchsorted(cumulative[:kept], self._random.random() * cumulative[kept - 1], side="right")]
        )


def decode(
    context: Context,
    logits: np.ndarray,
    grammar: Grammar,
    selector: Selector,
    *,
    stop_ids: frozenset[int],
    max_new_tokens: int,
    full_vocabulary: bool = False,
    on_token: Callable[[int], None] = lambda token_id: None,
) -> list[int]:
    """Decode until a stop id, a forced token, or `max_new_tokens`, from the `logits` [n, rows] of a prefill.

    Returns the new ids, the stop token included. `on_token` is called with each.
    """
    new_ids: list[int] = []
    while len(new_ids) < max_new_tokens:
        if (forced := grammar.forced()) is not None:
            # Nothing comes after a forced token, so it costs no forward pass.
            new_ids.append(forced)
            on_token(forced)
            break
        if new_ids:
            logits = context.forward(np.array(new_ids[-1:], np.int64), full_vocabulary=full_vocabulary)
        token_id = selector.choose(logits[-1], grammar)
        grammar.advance(token_id)
        new_ids.append(token_id)
        on_token(token_id)
        if token_id in stop_ids:
            break
    return new_ids
