"""The token loop: what is drawn, what is allowed, where it stops, and how often the model is run."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import pytest

from healthgpt_edge.decoding import CodeGrid, FreeText, Sampling, Selector, decode
from healthgpt_edge.errors import GenerationError, OptionError
from healthgpt_edge.executors import Choice

GREEDY = Sampling()


@dataclass
class FakeContext:
    """A model that gives the next of its prepared rows of logits, and remembers what it was asked."""

    rows: list[list[float]]
    asked: list[tuple[list[int], bool]] = field(default_factory=list)
    length: int = 0
    capacity: int | None = None

    @property
    def room(self) -> int | None:
        return None if self.capacity is None else self.capacity - self.length

    def forward(self, token_ids: np.ndarray, last_positions: int = 1, full_vocabulary: bool = False) -> np.ndarray:
        assert token_ids.dtype == np.int64 and last_positions == 1
        self.asked.append((token_ids.tolist(), full_vocabulary))
        return logits(self.rows[len(self.asked) - 1])


def logits(row: list[float]) -> np.ndarray:
    """Logits [1, rows] of one position."""
    return np.array([row], np.float32)


def peaks(*ids: int, rows: int = 8) -> list[list[float]]:
    """Rows of logits of which the greatest are at `ids`."""
    return [[1.0 if column == token_id else 0.0 for column in range(rows)] for token_id in ids]


def run(rows, grammar=None, selector=None, **options):
    """Decode from a prefill that gave rows[0]; returns the new ids and the context."""
    context = FakeContext(rows[1:])
    options = {"stop_ids": frozenset(), "max_new_tokens": len(rows)} | options
    done = decode(context, logits(rows[0]), grammar or FreeText(), selector or Selector(GREEDY, 1.0, 0), **options)
    assert len(done.by_pass) == 1 + len(context.asked) and sum(done.by_pass) == len(done.ids)
    return done.ids, context


def draw(scores: list[float], count: int, sampling: Sampling, first: int = 0) -> np.ndarray:
    selector = Selector(sampling, 1.0, first)
    return np.array([selector.choose(np.array(scores, np.float32), FreeText()) for _ in range(count)])


# --- what sampling may be asked for ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [Fraction(5, 2), np.float32(2.5)])
def test_any_real_number_is_as_good_as_its_float(temperature):
    given, plain = (draw([0.0, 1.0, 2.0], 50, Sampling(one, Fraction(9, 10))) for one in (temperature, 2.5))
    assert np.array_equal(given, plain)
    assert np.ptp(draw([0.0, 0.0], 50, Sampling(2**70))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or a positive number, found -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 or a positive number, found nan"),
        ({"temperature": float("inf")}, "temperature must be 0 or a positive number, found inf"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, found 0.0"),
        ({"top_p": 1.01}, "top_p must be above 0 and at most 1, found 1.01"),
        ({"top_p": float("nan")}, "top_p must be above 0 and at most 1, found nan"),
        ({"seed": -1}, "seed must be 0 or above, found -1"),
        ({"temperature": "1"}, "temperature must be 0 or a positive number, found '1'"),
        ({"temperature": 10**400}, "temperature must be 0 or a positive number, found 1" + 39 * "0"),
        ({"top_p": None}, "top_p must be above 0 and at most 1, found None"),
        ({"seed": 1.5}, "seed must be 0 or above, found 1.5"),
        ({"top_k": -1}, "top_k must be 0 or above, found -1"),
        ({"top_k": 2.0}, "top_k must be 0 or above, found 2.0"),
        ({"seed": True}, "seed must be 0 or above, found True"),
    ],
)
def test_sampling_is_checked(options, message):
    with pytest.raises(OptionError) as caught:
        Sampling(**options)
    assert str(caught.value) == message


def test_greedy_takes_the_greatest_and_of_equals_the_first():
    assert draw([0.0, 3.0, 1.0, 3.0], 3, GREEDY).tolist() == [1, 1, 1]
    assert draw([0.0, 3.0, 1.0, 3.0], 1, GREEDY, first=412).tolist() == [413]


# --- what is drawn --------------------------------------------------------------------------------------------------

SCORES = [2.0, -1.0, 0.5, 0.5, -3.0, 1.0]
DRAWS = 4000


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """The smallest set of the likeliest tokens that holds `top_p`, renormalised."""
    kept = np.zeros_like(probabilities)
    for token in sorted(range(len(probabilities)), key=lambda token: -probabilities[token]):
        kept[token] = probabilities[token]
        if kept.sum() >= top_p:
            break
    return kept / kept.sum()


# The third and the fourth likeliest are equal: three of the likeliest are four.
@pytest.mark.parametrize(("top_k", "left_out"), [(0, []), (1, [1, 2, 3, 4, 5]), (3, [1, 4]), (5, [4]), (99, [])])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [0.2, 0.75, 0.95, 1.0])
def test_tokens_come_with_their_probabilities(temperature, top_p, top_k, left_out):
    kept = np.array(SCORES)
    kept[left_out] = -np.inf
    expected = nucleus(softmax(kept / temperature), top_p)
    sampling = Sampling(temperature, top_p, seed=5, top_k=top_k)
    found = np.bincount(draw(SCORES, DRAWS, sampling), minlength=len(SCORES))
    assert found[expected == 0].sum() == 0
    often = DRAWS * expected >= 5  # of rarer ones the statistic is no chi-square
    statistic = (np.square(found - DRAWS * expected)[often] / (DRAWS * expected[often])).sum()
    # Chi-square of 5 degrees of freedom or fewer lies above 20.5 once in a thousand; the seed is fixed.
    assert statistic < 20.5


def test_a_share_that_is_met_exactly_takes_no_more_tokens():
    assert set(draw([1.0, 1.0, -100.0], 50, Sampling(1.0, top_p=0.5))) == {0}


def test_the_statistic_above_would_notice_another_temperature():
    expected = softmax(np.array(SCORES))
    found = np.bincount(draw(SCORES, DRAWS, Sampling(1.15, 1.0, seed=5)), minlength=len(SCORES))
    assert (np.square(found - DRAWS * expected) / (DRAWS * expected)).sum() > 20.5


def test_a_seed_gives_the_same_tokens_and_another_seed_others():
    sampling = Sampling(temperature=1.0, seed=11)
    assert (draw(SCORES, 50, sampling) == draw(SCORES, 50, sampling)).all()
    assert (draw(SCORES, 50, sampling) != draw(SCORES, 50, Sampling(temperature=1.0, seed=12))).any()


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_guess_by_other_scores_is_often_right(top_p):
    """At least as often as Daliri et al. prove for drafters that do not talk, (1 - d) / (1 + d) at distance d; what is
    drawn by one number from the sums of sorted probabilities agrees a fifth of the time here."""
    rng = np.random.default_rng(3)
    selector, right, least = Selector(Sampling(1.0, top_p, seed=2), 1.0, 0), 0, 0.0
    for _ in range(2000):
        scores = rng.normal(size=(1, 64)).astype(np.float32)
        near = scores + rng.normal(scale=0.3, size=scores.shape).astype(np.float32)
        (guess,) = selector.guess(near, FreeText())
        right += guess == selector.choose(scores[0], FreeText())
        distance = np.abs(np.subtract(*(nucleus(softmax(one[0]), top_p) for one in (scores, near)))).sum() / 2
        least += (1 - distance) / (1 + distance)
    assert right >= least > 1400


@pytest.mark.parametrize("sampling", [Sampling(1e-320, 1.0), Sampling(1e-6, 1.0), Sampling(1.0, 1e-12)], ids=str)
def test_near_zero_sampling_is_greedy(sampling):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(draw([0.0, 3.0, -1e30, 2.999], 20, sampling)) == {1}


def test_sampling_never_leaves_what_the_grammar_allows():
    grid = CodeGrid(first=12, count=3, end=15, newline=16, total=100)
    selector = Selector(Sampling(temperature=5.0, seed=1), 1.0, first_logit=10)
    # Ids 10 to 16, of which 10, 11 and 15 are not allowed and by far the likeliest.
    scores = np.array([50, 50, 0, 0, 0, 50, 0], np.float32)
    assert {selector.choose(scores, grid) for _ in range(300)} == {12, 13, 14, 16}


# --- repetition penalty ---------------------------------------------------------------------------------------------


def test_generated_ids_are_penalised_by_their_sign():
    selector = Selector(GREEDY, 2.0, first_logit=0)
    # 4 halved is below 3; then -1 doubled is below -1.5; at last nothing is left unseen.
    assert selector.choose(np.array([4.0, 3.0], np.float32), FreeText()) == 0
    assert selector.choose(np.array([4.0, 3.0], np.float32), FreeText()) == 1
    assert selector.choose(np.array([4.0, 3.0], np.float32), FreeText()) == 0
    fresh = Selector(GREEDY, 2.0, first_logit=7)
    assert fresh.choose(np.array([-1.0, -1.5], np.float32), FreeText()) == 7
    assert fresh.choose(np.array([-1.0, -1.5], np.float32), FreeText()) == 8


def test_a_penalty_below_one_is_a_reward():
    selector = Selector(GREEDY, 0.5, first_logit=0)
    assert selector.choose(np.array([2.0, 1.0], np.float32), FreeText()) == 0
    assert selector.choose(np.array([2.0, 3.0], np.float32), FreeText()) == 0


def test_a_penalty_counts_once_however_often_an_id_came():
    selector = Selector(GREEDY, 1.5, first_logit=0)
    for _ in range(5):
        assert selector.choose(np.array([9.0, 1.0], np.float32), FreeText()) == 0
    # 9 / 1.5 = 6, still above 5.9.
    assert selector.choose(np.array([9.0, 5.9], np.float32), FreeText()) == 0


def test_the_logits_given_are_left_alone():
    selector = Selector(GREEDY, 2.0, first_logit=0)
    given = np.array([4.0, 3.0], np.float32)
    selector.choose(given, FreeText())
    selector.choose(given, CodeGrid(first=0, count=1, end=9, newline=1, total=5))
    assert given.tolist() == [4.0, 3.0]


# --- logits that are no numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_stop_the_run(bad):
    rows = [*peaks(1, 2), [0.0, bad, 0.0, bad]]
    seen: list[int] = []
    with pytest.raises(GenerationError) as caught:
        run(rows, on_token=seen.append)
    assert str(caught.value) == "the model must give finite logits, found 2 NaN or infinite of 4"
    assert seen == [1, 2]


def test_they_stop_a_locked_run_too_wherever_they_stand():
    grid = CodeGrid(first=0, count=2, end=2, newline=3, total=4)
    with pytest.raises(GenerationError, match="found 1 NaN or infinite of 5"):
        run([[1.0, 0.0, 0.0, 0.0, float("nan")]], grid)


# --- the loop -------------------------------------------------------------------------------------------------------


def test_the_loop_stops_behind_a_stop_id():
    seen: list[int] = []
    ids, context = run(peaks(1, 2, 5, 3), stop_ids=frozenset({5, 6}), on_token=seen.append)
    assert ids == seen == [1, 2, 5]
    # The prefill gave the first token; a token is run only when another follows.
    assert context.asked == [([1], False), ([2], False)]


def test_before_each_pass_the_run_may_be_ended():
    seen: list[int] = []
    told: list[list[int]] = []
    _, context = run(
        peaks(1, 2, 5, 3), stop_ids=frozenset({5}), on_token=seen.append, on_pass=lambda: told.append([*seen])
    )
    assert told == [[1], [1, 2]] and len(context.asked) == 2

    def stop() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        run(peaks(1, 2), on_token=seen.append, on_pass=stop)
    assert seen == [1, 2, 5, 1]


def test_a_stop_id_at_once():
    ids, context = run(peaks(6), stop_ids=frozenset({6}), max_new_tokens=100)
    assert (ids, context.asked) == ([6], [])


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_loop_stops_at_the_limit(limit):
    ids, context = run(peaks(1, 2, 3, 4), max_new_tokens=limit)
    assert ids == [1, 2, 3][:limit]
    assert len(context.asked) == limit - 1


def test_the_whole_vocabulary_is_asked_for_at_every_step():
    _, context = run(peaks(1, 2, 3), full_vocabulary=True)
    assert context.asked == [([1], True), ([2], True)]


def test_the_last_row_of_a_prefill_counts():
    context = FakeContext([])
    prefill = np.array(peaks(1, 7), np.float32)
    selector = Selector(GREEDY, 1.0, 0)
    done = decode(context, prefill, FreeText(), selector, stop_ids=frozenset(), max_new_tokens=1)
    assert done == ([7], [1])


# --- the grammar of a picture ---------------------------------------------------------------------------------------

# Logits begin at id 10; 12 to 14 are codes, 15 ends, 16 is a new line.
FIRST, CODES, END, NEWLINE = 12, 3, 15, 16


def grid_of(total: int) -> CodeGrid:
    return CodeGrid(first=FIRST, count=CODES, end=END, newline=NEWLINE, total=total)


def locked(wanted: list[int], total: int, **options):
    """A locked run of a model whose greatest logits are those of `wanted`."""
    rows = [row[10:] for row in peaks(*wanted, rows=17)]
    grid = grid_of(total)
    ids, context = run(rows, grid, Selector(GREEDY, 1.0, 10), **{"max_new_tokens": 100} | options)
    return ids, grid, context


def test_a_full_grid_is_ended_without_running_the_model():
    ids, grid, context = locked([13, 12, 14, 14], total=4)
    assert ids == [13, 12, 14, 14, END]
    assert grid.codes == [1, 0, 2, 2]
    assert [asked for asked, _ in context.asked] == [[13], [12], [14]]


def test_new_lines_count_for_nothing():
    ids, grid, _ = locked([NEWLINE, 13, NEWLINE, NEWLINE, 12], total=2)
    assert ids == [NEWLINE, 13, NEWLINE, NEWLINE, 12, END]
    assert grid.codes == [1, 0]


@pytest.mark.parametrize("early", [END, 10, 11])
def test_neither_an_end_nor_a_word_comes_early(early):
    """Where the model would rather end or say something, the likeliest code follows instead."""
    ids, grid, _ = locked([13, early, 14], total=3, stop_ids=frozenset({early}))
    assert ids == [13, FIRST, 14, END]
    assert grid.codes == [1, 0, 2]


def test_the_limit_may_cut_a_grid_short():
    ids, grid, _ = locked([13, NEWLINE, 12], total=4, max_new_tokens=3)
    assert (ids, grid.codes) == ([13, NEWLINE, 12], [1, 0])


def test_the_limit_may_leave_no_room_for_the_end():
    ids, grid, _ = locked([13, 12], total=2, max_new_tokens=2)
    assert (ids, grid.codes) == ([13, 12], [1, 0])


def test_the_end_is_told_like_every_token():
    seen: list[int] = []
    locked([13], total=1, on_token=seen.append)
    assert seen == [13, END]


def test_what_a_grid_allows():
    scores = np.arange(7, dtype=np.float32)
    kept = grid_of(4).restrict(scores, 10)
    assert kept.dtype == np.float32
    assert kept.tolist() == [-np.inf, -np.inf, 2, 3, 4, -np.inf, 6]
    assert scores.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_free_text_allows_everything():
    scores = np.arange(7, dtype=np.float32)
    grammar = FreeText()
    grammar.advance(3)
    assert grammar.forced() is None
    assert grammar.restrict(scores, 10) is scores


# --- tokens that a device chooses ------------------------------------------------------------------------------------


class Ahead:
    """A device that gives prepared ids, and remembers what it was asked."""

    def __init__(self, context: FakeContext, ids: list[int]) -> None:
        self.context, self.ids = context, ids
        self.asked: list[tuple[int, int]] = []
        self.choices: list[Choice] = []

    def __call__(self, token_id: int, count: int, choice: Choice) -> np.ndarray:
        self.asked.append((token_id, count))
        self.choices.append(choice)
        given, self.ids = self.ids[:count], self.ids[count:]
        self.context.length += count
        return np.array(given + [0] * (count - len(given)), np.int64)


def run_on_device(first: int, ids: list[int], grammar=None, selector=None, rows: int = 8, room=None, **options):
    """Decode from a prefill whose greatest logit is at `first`, row 0 being id 0."""
    context = FakeContext([], capacity=room)
    ahead = Ahead(context, ids)
    options = {"stop_ids": frozenset(), "max_new_tokens": 100} | options
    selector = selector or Selector(GREEDY, 1.0, 0)
    (row,) = peaks(first, rows=rows)
    done = decode(context, logits(row), grammar or FreeText(), selector, run_ahead=ahead, **options)
    assert not context.asked
    return done, ahead, context


def test_a_device_chooses_until_a_stop_id():
    done, ahead, context = run_on_device(3, [4, 5, 6, 7, 1, 2, 3, 4, 5, 2, 6, 6], stop_ids=frozenset({2}))
    assert done.ids == [3, 4, 5, 6, 7, 1, 2]
    assert ahead.asked == [(3, 8)]
    # Two passes came after the end.
    assert done.by_pass == [1, 1, 1, 1, 1, 1, 1, 0, 0]
    assert context.length == 8


def test_a_device_goes_on_from_its_last_id_and_no_further_than_the_limit():
    done, ahead, context = run_on_device(3, [4, 5, 6, 7] * 3, max_new_tokens=12)
    assert done.ids == [3, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6] and done.by_pass == [1] * 12
    assert ahead.asked == [(3, 8), (7, 3)] and context.length == 11


def test_a_device_goes_no_further_than_its_caches():
    """Where they are full it is asked for one more, and refuses that as it would the host."""
    done, ahead, _ = run_on_device(3, [4, 5, 6, 7, 1, 2, 3, 4, 5, 7, 6, 2], stop_ids=frozenset({2}), room=10)
    assert done.ids == [3, 4, 5, 6, 7, 1, 2] and ahead.asked == [(3, 8)]
    done, ahead, _ = run_on_device(3, [4, 5, 6, 7, 1, 5, 3, 4, 5, 7, 2], stop_ids=frozenset({2}), room=10)
    assert done.ids[-3:] == [5, 7, 2] and ahead.asked == [(3, 8), (4, 2), (7, 1)]


def test_a_device_chooses_codes_row_by_row_and_the_end_costs_no_pass():
    grid = CodeGrid(first=2, count=4, end=6, newline=7, total=40)
    codes = [2, 3, 4, 5] * 9 + [7, 2, 3, 4, 5]
    done, ahead, _ = run_on_device(2, codes, grid)
    assert done.ids == [2, *codes[:-1], 6] and len(grid.codes) == 40
    # The newline is one of the 32, so one more code is asked for.
    assert ahead.asked == [(2, 32), (5, 7), (3, 1)]
    assert done.by_pass == [1] * 40 + [2]
    assert ahead.choices[0].allowed.tolist() == [False, False, True, True, True, True, False, True]


def test_a_device_is_told_what_came_before():
    _, ahead, _ = run_on_device(3, [4, 4, 5, 5, 5, 5, 5, 6, 1], selector=Selector(GREEDY, 1.5, 0), max_new_tokens=10)
    assert [np.flatnonzero(choice.seen).tolist() for choice in ahead.choices] == [[3], [3, 4, 5, 6]]
    assert {choice.penalty for choice in ahead.choices} == {1.5}


def test_a_device_that_met_no_finite_logits_is_an_error():
    with pytest.raises(GenerationError, match="the model must give finite logits, found NaN or infinite ones"):
        run_on_device(3, [4, -1, 4, 4, 4, 4, 4, 4])


@pytest.mark.parametrize(("temperature", "free"), [(0.0, True), (1.0, False)])
def test_the_host_chooses_where_a_device_cannot(temperature, free):
    def chosen(ahead):
        selector = Selector(Sampling(temperature), 1.0, 0)
        return run(peaks(3, 4, 5), selector=selector, full_vocabulary=free, run_ahead=ahead)

    ahead = Ahead(FakeContext([]), [])
    (ids, context), (again, _) = chosen(None), chosen(ahead)
    assert again == ids and len(context.asked) == 2 and not ahead.asked
