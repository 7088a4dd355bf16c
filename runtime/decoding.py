"""The token loop: one for every executor, for text and for codes, greedy or sampled."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np

from .checks import as_float, is_whole
from .drafting import Drafter
from .errors import GenerationError, OptionError
from .executors import Choice, Context, RunAhead
from .steps import Seat, Step, Steps, finish

# Tokens that a device decodes before the host looks: a row of codes; of text, where what comes after the end is lost.
_CODES_AHEAD, _WORDS_AHEAD = 32, 8


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn: greedily at temperature 0, else by a generator seeded with `seed`, from the `top_k`
    likeliest tokens (0: all) and of these from the smallest set that holds `top_p` of their probability."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0

    def __post_init__(self) -> None:
        temperature, top_p = as_float(self.temperature), as_float(self.top_p)
        if not 0 <= temperature < float("inf"):
            raise OptionError(f"temperature must be 0 or a positive number, found {self.temperature!r:.40}")
        if not 0 < top_p <= 1:
            raise OptionError(f"top_p must be above 0 and at most 1, found {self.top_p!r:.40}")
        if not (is_whole(self.seed) and self.seed >= 0):
            raise OptionError(f"seed must be 0 or above, found {self.seed!r:.40}")
        if not (is_whole(self.top_k) and self.top_k >= 0):
            raise OptionError(f"top_k must be 0 or above, found {self.top_k!r:.40}")
        # numpy takes a fraction, or an integer of more than 64 bits, for an object, which it cannot reckon with.
        object.__setattr__(self, "temperature", temperature)
        object.__setattr__(self, "top_p", top_p)


class Grammar(Protocol):
    """What may come next."""

    def forced(self) -> int | None:
        """The only token that may come next, or None where the model chooses."""
        ...

    def restrict(self, scores: np.ndarray, first: int) -> np.ndarray:
        """The scores [..., rows], row 0 being id `first`, with -inf where a token may not come next: the same tokens
        for as long as none is forced."""
        ...

    def advance(self, token_id: int) -> None: ...

    def left(self) -> int | None:
        """At most so many tokens that count come before one is forced; None where none will be."""
        ...


class FreeText:
    """Any token, at any time."""

    def forced(self) -> int | None:
        return None

    def restrict(self, scores: np.ndarray, first: int) -> np.ndarray:
        return scores

    def advance(self, token_id: int) -> None:
        pass

    def left(self) -> int | None:
        return None


class CodeGrid:
    """Exactly `total` codes, then the end token; `<pixel_newline>` may stand anywhere and counts for nothing.

    Newlines stay allowed because the original ignores them: so the locked run follows every free run that is valid.
    """

    def __init__(self, first: int, count: int, end: int, newline: int, total: int) -> None:
        self.codes: list[int] = []
        self._first, self._count, self._end, self._newline, self._total = first, count, end, newline, total
        self._allowed: dict[tuple[int, int], np.ndarray] = {}  # by the first id and the number of the scores

    def forced(self) -> int | None:
        return self._end if len(self.codes) == self._total else None

    def restrict(self, scores: np.ndarray, first: int) -> np.ndarray:
        sizes = first, scores.shape[-1]
        if sizes not in self._allowed:
            ids = first + np.arange(scores.shape[-1])
            is_code = (ids >= self._first) & (ids < self._first + self._count)
            self._allowed[sizes] = is_code | (ids == self._newline)
        return np.where(self._allowed[sizes], scores, np.float32(-np.inf))

    def advance(self, token_id: int) -> None:
        if self._first <= token_id < self._first + self._count:
            self.codes.append(token_id - self._first)

    def left(self) -> int | None:
        return self._total - len(self.codes)


class Selector:
    """Picks the next token from logits: penalty, grammar, then greedy or sampled."""

    def __init__(self, sampling: Sampling, repetition_penalty: float, first_logit: int) -> None:
        self._sampling, self._penalty, self._first = sampling, repetition_penalty, first_logit
        self._random = np.random.default_rng(sampling.seed)
        # For each token to come a time for each id: a guess at a later token takes those that its choice will take.
        self._times: deque[np.ndarray] = deque()
        self._seen: set[int] = set()

    def choose(self, logits: np.ndarray, grammar: Grammar) -> int:
        """The next id for float32 logits [rows], row 0 being id `first_logit`.

        Raises GenerationError where a logit is not finite: a picture or an answer from NaN would look like one.
        """
        return next(Choices(self, logits[None], grammar))

    def count(self, token_id: int) -> int:
        """Count an id that was chosen, and return it."""
        if self._times:
            self._times.popleft()
        self._seen.add(token_id)
        return token_id

    def choice(self, grammar: Grammar, rows: int) -> Choice | None:
        """How a device would choose; None where only `choose` can, which draws in float64."""
        if self._sampling.temperature != 0:
            return None
        seen = np.zeros(rows, np.bool_)
        seen[[token_id - self._first for token_id in self._seen]] = True
        return Choice(grammar.restrict(np.zeros(rows, np.float32), self._first) == 0, self._penalty, seen)

    def accept(self, token_id: int) -> int:
        """Count an id that a device has chosen, and return it; raises GenerationError as `choose` does."""
        if token_id < 0:
            raise GenerationError("the model must give finite logits, found NaN or infinite ones")
        return self.count(token_id)

    @property
    def foresees(self) -> bool:
        """Whether what `guess` gives does not depend on what is chosen before."""
        return self._penalty == 1.0

    def guess(self, logits: np.ndarray, grammar: Grammar) -> list[int]:
        """What `choose` would give for each of logits [n, rows] in turn, as far as can be told before it has."""
        scores = logits
        if self._penalty != 1.0 and self._seen:
            # As the original: only generated ids are penalised, for the prompt reaches it as embeddings.
            ids = np.fromiter(self._seen, np.int64) - self._first
            scores = logits.copy()
            seen = scores[:, ids]
            scores[:, ids] = np.where(seen < 0, seen * self._penalty, seen / self._penalty)
        scores = grammar.restrict(scores, self._first)
        if self._sampling.temperature == 0:
            return [choice + self._first for choice in scores.argmax(axis=-1).tolist()]
        return [choice + self._first for choice in self._sample(scores).tolist()]

    def _sample(self, scores: np.ndarray) -> np.ndarray:
        """The tokens [n] that the next n times draw from scores [n, rows].

        Exponential times, each divided by its token's weight, are a race that every token wins with its probability.
        Where weights differ a little, most races are won by the same token: so a guess that goes by wrong tokens before
        it is often right (Daliri et al., 2024, "Coupling without Communication and Drafter-Invariant Speculative
        Decoding").
        """
        # A temperature near 0 takes scores to -inf, which is right; rows behind a wrong draft may hold anything.
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = (scores.astype(np.float64) - scores.max(axis=-1, keepdims=True)) / self._sampling.temperature
        weights = np.exp(scaled)
        if 0 < self._sampling.top_k < weights.shape[-1]:
            least = np.partition(weights, -self._sampling.top_k, axis=-1)[:, -self._sampling.top_k, None]
            weights[weights < least] = 0
        if self._sampling.top_p < 1:
            order = np.argsort(-weights, axis=-1, kind="stable")
            ranked = np.take_along_axis(weights, order, axis=-1)
            held = ranked.cumsum(axis=-1)
            ranked[:, 1:][held[:, :-1] >= self._sampling.top_p * held[:, -1:]] = 0
            np.put_along_axis(weights, order, ranked, axis=-1)
        while len(self._times) < len(scores):
            # None is 0, with which a weight of 0 would win.
            self._times.append(self._random.standard_exponential(scores.shape[1:]) + np.finfo(np.float64).tiny)
        return np.asarray((weights / np.stack(list(islice(self._times, len(scores))))).argmax(axis=-1))


class Choices:
    """What `selector` chooses for each of logits [n, rows] in turn, as it is taken; and what it would for the others.

    Taking one raises GenerationError as `Selector.choose` does; rows behind the last one taken may hold anything.
    """

    def __init__(self, selector: Selector, logits: np.ndarray, grammar: Grammar) -> None:
        self._selector, self._logits, self._grammar = selector, logits, grammar
        self._are_finite = bool(np.isfinite(logits).all())
        self._guesses = selector.guess(logits, grammar) if selector.foresees else None
        self._taken = 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self._taken == len(self._logits):
            raise StopIteration
        logits = self._logits[self._taken]
        if not self._are_finite and (bad := int(np.count_nonzero(~np.isfinite(logits)))):
            raise GenerationError(f"the model must give finite logits, found {bad} NaN or infinite of {logits.size}")
        token_id = self._guesses[self._taken] if self._guesses else self._selector.guess(logits[None], self._grammar)[0]
        self._taken += 1
        return self._selector.count(token_id)

    def later(self) -> list[int]:
        """The choices that were not taken, as far as can be told."""
        if self._taken == len(self._logits):
            return []
        if self._guesses:
            return self._guesses[self._taken :]
        return self._selector.guess(self._logits[self._taken :], self._grammar)


class Decoded(NamedTuple):
    """New ids, the stop token included, and how many of them each forward pass gave, from the prefill on."""

    ids: list[int]
    by_pass: list[int]


def decode(context: Context, logits: np.ndarray, grammar: Grammar, selector: Selector, **options: Any) -> Decoded:
    """What `decoding` does, by itself."""
    return finish(decoding(Seat(context), logits, grammar, selector, **options))


def decoding(
    seat: Seat,
    logits: np.ndarray,
    grammar: Grammar,
    selector: Selector,
    *,
    stop_ids: frozenset[int],
    max_new_tokens: int,
    full_vocabulary: bool = False,
    drafter: Drafter | None = None,
    run_ahead: RunAhead | None = None,
    on_token: Callable[[int], None] = lambda token_id: None,
    on_pass: Callable[[], None] = lambda: None,
) -> Steps[Decoded]:
    """Decode until a stop id, a forced token, or `max_new_tokens`, from the `logits` [n, rows] of a prefill.

    Yields the passes it needs, each a Step, and is sent what they gave. `on_pass`, which is called before the host asks
    for passes, may seat it in a group, which has no `run_ahead`.

    With a `drafter` each pass has a row for every drafted token, too (Leviathan et al., 2023, "Fast Inference from
    Transformers via Speculative Decoding"); of a group's pass, maybe for the first of them only. A row counts if all
    drafts before it are what was chosen there, and the choice is made from it as ever, by the same random number: the
    ids are those of decoding without drafts, if the executor gives a row the same bits in every pass. Without one,
    `run_ahead` of the sequence may choose greedily for several passes. `on_token` is called with each new id; what it
    and `on_pass` raise ends the run.
    """
    new_ids: list[int] = []
    drafts: list[int] = []
    by_pass: list[int] = []
    seconds, sequences, lead = None, 1, None
    vocabulary = logits.shape[-1]
    passes = 1
    choices = Choices(selector, logits[-1:], grammar)
    chosen: Iterator[int] = choices
    while True:
        known, ended = len(new_ids), False
        for token_id, draft in zip(chosen, [*drafts, None], strict=True):
            grammar.advance(token_id)
            new_ids.append(token_id)
            on_token(token_id)
            ended = token_id in stop_ids or len(new_ids) == max_new_tokens
            if not ended and (forced := grammar.forced()) is not None:
                # Nothing comes after a forced token, so it costs no forward pass.
                new_ids.append(forced)
                on_token(forced)
                ended = True
            if ended or token_id != draft:
                break
        fresh = new_ids[known:]
        by_pass += _shared_out(len(fresh), passes)
        if ended:
            if drafter:
                drafter.catch_up()
            return Decoded(new_ids, by_pass)
        seat.sequence.length -= 1 + len(drafts) - len(fresh)  # forget what the wrong drafts left in the caches
        on_pass()
        begin, sequence = time.perf_counter(), seat.sequence
        left = min(max_new_tokens - len(new_ids), grammar.left() or max_new_tokens)
        if sequence.room is not None:
            # What looks ahead must not be what is refused: the run may end before the room does.
            left = min(left, max(1, sequence.room))
        choice = None
        if drafter:
            drafter.learn(fresh, drafts, choices.later(), seconds, sequences)
            drafts = drafter.draft(left - 1, lead)
        elif run_ahead and not full_vocabulary:
            choice = selector.choice(grammar, vocabulary)
        if run_ahead and choice:
            passes = min(left, _WORDS_AHEAD if grammar.left() is None else _CODES_AHEAD)
            ids = run_ahead(new_ids[-1], passes, choice).tolist()
            # What a pass gave went into the next one: drafts that are right.
            chosen, drafts = map(selector.accept, ids), ids[:-1]
            continue
        ids = np.array([new_ids[-1], *drafts], np.int64)
        here = time.perf_counter() - begin
        passed, passes = (yield Step(sequence, ids, len(ids), full_vocabulary, seat.group)), 1
        begin, sequences, lead = time.perf_counter(), passed.sequences, passed.lead
        drafts = drafts[: len(passed.logits) - 1]
        chosen = choices = Choices(selector, passed.logits, grammar)
        # What is done here, the others of a group do, too, one after another.
        seconds = passed.seconds + sequences * (here + time.perf_counter() - begin)


def _shared_out(tokens: int, passes: int) -> list[int]:
    """One token for each pass, none for those after the last, and what there is besides for the last pass."""
    counts = [int(place < tokens) for place in range(passes)]
    counts[-1] += max(0, tokens - passes)
    return counts
