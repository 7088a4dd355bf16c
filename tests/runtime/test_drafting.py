"""Drafts: whatever is planted in them, the tokens are those of plain decoding; and what they cost and gain."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from itertools import pairwise
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from healthgpt_edge.decoding import CodeGrid, FreeText, Sampling, Selector, decode, decoding
from healthgpt_edge.drafting.costs import RowCosts
from healthgpt_edge.drafting.drafter import Drafter
from healthgpt_edge.drafting.jacobi import Jacobi
from healthgpt_edge.drafting.pace import MAX_ROWS, Pace
from healthgpt_edge.drafting.pictures import input_sources, own_sources
from healthgpt_edge.drafting.sources import Rule, Table
from healthgpt_edge.drafting.words import word_sources
from healthgpt_edge.errors import ExecutorError, GenerationError
from healthgpt_edge.invariance import rows_agree
from healthgpt_edge.steps import Passed, Seat

VOCABULARY = 9


class Model:
    """A sequence of a model whose logits depend on every token before: a wrong one left in the caches shows."""

    def __init__(self, prompt: list[int], capacity: int | None = None) -> None:
        self.ids, self.capacity = list(prompt), capacity
        self.passes: list[int] = []

    @property
    def length(self) -> int:
        return len(self.ids)

    @length.setter
    def length(self, length: int) -> None:
        assert length <= len(self.ids)
        del self.ids[length:]

    @property
    def room(self) -> int | None:
        return None if self.capacity is None else self.capacity - self.length

    def forward(self, token_ids: np.ndarray, last_positions: int = 1, full_vocabulary: bool = False) -> np.ndarray:
        assert token_ids.dtype == np.int64 and len(token_ids) == last_positions
        if self.room is not None and len(token_ids) > self.room:
            raise ExecutorError("no room")
        self.passes.append(len(token_ids))
        rows = []
        for token_id in token_ids.tolist():
            self.ids.append(token_id)
            rows.append(logits_after(self.ids))
        return np.stack(rows)


def logits_after(ids: list[int]) -> np.ndarray:
    return np.random.default_rng(ids).normal(size=VOCABULARY).astype(np.float32)


@dataclass
class Planted:
    """Drafts `plan[place]` at each place, up to `count` at a time, and remembers what it was told."""

    plan: list[int]
    count: int
    place: int = 0
    told: list[tuple[list[int], list[int], list[int]]] = field(default_factory=list)

    def draft(self, most: int, lead: int | None = None) -> list[int]:
        return self.plan[self.place : self.place + min(self.count, most)]

    def learn(
        self, ids: list[int], drafts: list[int], choices: list[int], seconds: float | None, sequences: int
    ) -> None:
        assert len(ids) + len(choices) == 1 + len(drafts)
        self.told.append((list(ids), list(drafts), list(choices)))
        self.place += len(ids)

    def catch_up(self) -> None:
        pass


PROMPT = [3, 1, 4]
GREEDY = Sampling()


def run(drafter=None, *, sampling=GREEDY, penalty=1.0, grid=None, stop_ids=frozenset(), limit=24, capacity=None):
    """Decode after PROMPT; returns the result, the model, and the grammar."""
    model = Model(PROMPT, capacity)
    # Codes 0 to 5, 6 ends, 7 is a new line, 8 is a word.
    grammar = CodeGrid(first=0, count=6, end=6, newline=7, total=grid) if grid else FreeText()
    done = decode(
        model,
        logits_after(PROMPT)[None],
        grammar,
        Selector(sampling, penalty, 0),
        stop_ids=stop_ids,
        max_new_tokens=limit,
        drafter=drafter,
    )
    assert len(done.by_pass) == 1 + len(model.passes) and sum(done.by_pass) == len(done.ids)
    return done, model, grammar


# --- whatever is drafted, the ids are those of plain decoding --------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    wrong=st.floats(0, 1),
    count=st.integers(1, 12),
    sampling=st.sampled_from([GREEDY, Sampling(1.0, 0.9, seed=7), Sampling(3.0, seed=8)]),
    penalty=st.sampled_from([1.0, 1.3]),
    grid=st.sampled_from([None, 16]),
    stop_ids=st.sampled_from([frozenset(), frozenset({8})]),
)
def test_planted_drafts_change_no_id(seed, wrong, count, sampling, penalty, grid, stop_ids):
    options = {"sampling": sampling, "penalty": penalty, "grid": grid, "stop_ids": stop_ids}
    plain, _, _ = run(**options)
    rng = np.random.default_rng(seed)
    plan = [int(rng.integers(VOCABULARY)) if rng.random() < wrong else token_id for token_id in plain.ids]
    drafted, _, grammar = run(Planted(plan, count), **options)
    assert drafted.ids == plain.ids
    assert len(drafted.by_pass) <= len(plain.by_pass)
    if grid:
        assert grammar.codes == [token_id for token_id in plain.ids if token_id < 6]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 12), wrong=st.floats(0, 0.5), seed=st.integers(0, 2**32), data=st.data())
def test_a_pass_may_leave_out_the_last_drafts(count, wrong, seed, data):
    """As those of a group do: what was left out is neither accepted nor forgotten from the caches."""
    plain, _, _ = run()
    rng = np.random.default_rng(seed)
    plan = [int(rng.integers(VOCABULARY)) if rng.random() < wrong else token_id for token_id in plain.ids]
    planted, model = Planted(plan, count), Model(PROMPT)
    options = {"stop_ids": frozenset(), "max_new_tokens": 24, "drafter": planted}
    steps = decoding(Seat(model), logits_after(PROMPT)[None], FreeText(), Selector(GREEDY, 1.0, 0), **options)
    passed, checked = None, [0]
    with pytest.raises(StopIteration) as end:
        while True:
            step = steps.send(passed)
            checked.append(data.draw(st.integers(1, len(step.token_ids))))
            passed = Passed(model.forward(step.token_ids[: checked[-1]], checked[-1]), 0.1, 2)
    assert end.value.value.ids == plain.ids
    assert [1 + len(drafts) for _, drafts, _ in planted.told] == [1, *checked[1 : len(planted.told)]]


def test_right_drafts_take_one_pass_for_all_rows():
    plain, _, _ = run(limit=25)
    drafted, model, _ = run(Planted(plain.ids, 8), limit=25)
    assert drafted.ids == plain.ids
    # One token from the prefill, then one more than is drafted; nothing behind the limit is.
    assert model.passes == [9, 9, 6]


def test_wrong_drafts_take_the_passes_of_plain_decoding():
    plain, _, _ = run()
    wrong = [(token_id + 1) % VOCABULARY for token_id in plain.ids]
    drafted, model, _ = run(Planted(wrong, 4))
    assert drafted == plain
    # Nothing wrong is left in the sequence, but the rows of the last pass.
    assert model.ids[: len(PROMPT) + len(plain.ids) - 1] == PROMPT + plain.ids[:-1]


@pytest.mark.parametrize("right", range(5))
def test_drafts_that_go_wrong_in_the_middle_of_a_row(right):
    """So many tokens are taken as were right, and the model's own next one."""
    plain, _, _ = run()
    plan = [token_id if place % 6 <= right else (token_id + 1) % VOCABULARY for place, token_id in enumerate(plain.ids)]
    planted = Planted(plan, 5)
    drafted, _, _ = run(planted)
    assert drafted.ids == plain.ids
    for ids, drafts, _ in planted.told[1:]:
        agreeing = next((n for n, (one, two) in enumerate(zip(ids, drafts, strict=False)) if one != two), len(drafts))
        assert len(ids) == agreeing + 1


def test_a_stop_or_the_limit_inside_a_draft_ends_the_run():
    plain, _, _ = run(limit=24)
    place = next(place for place, token_id in enumerate(plain.ids) if token_id not in plain.ids[:place] and place > 2)
    stopped, _, _ = run(Planted(plain.ids, 12), stop_ids=frozenset({plain.ids[place]}))
    assert stopped.ids == plain.ids[: place + 1]
    for limit in range(1, 8):
        assert run(Planted(plain.ids, 12), limit=limit)[0].ids == plain.ids[:limit]


def test_drafts_end_where_the_caches_do():
    """An answer that just fits is not refused for what was drafted behind its end."""
    plain, _, _ = run(limit=24)
    place = next(place for place, token_id in enumerate(plain.ids) if token_id not in plain.ids[:place] and place > 2)
    stop, capacity = frozenset({plain.ids[place]}), len(PROMPT) + place
    assert run(Planted(plain.ids, 12), stop_ids=stop, capacity=capacity)[0].ids == plain.ids[: place + 1]
    for drafter in (None, Planted(plain.ids, 12)):
        with pytest.raises(ExecutorError, match="no room"):
            run(drafter, stop_ids=stop, capacity=capacity - 1)


def test_sampled_choices_take_the_numbers_of_plain_sampling():
    """Not only the distribution: the very tokens of the seed, and another seed gives others."""
    sampling = Sampling(temperature=1.5, seed=3)
    plain, _, _ = run(sampling=sampling)
    assert plain.ids != run()[0].ids
    assert run(Planted(plain.ids, 6), sampling=sampling)[0].ids == plain.ids
    assert run(Planted(plain.ids, 6), sampling=Sampling(1.5, seed=4))[0].ids != plain.ids


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, 0.9, seed=2)], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_behind_a_wrong_draft_may_hold_anything(sampling, bad):
    """Plain decoding never sees them: only a row that counts stops the run when it is not finite."""
    plain, _, _ = run(limit=6, sampling=sampling)
    right = PROMPT + plain.ids

    class Poisoned(Model):
        def forward(self, token_ids, last_positions=1, full_vocabulary=False):
            start, rows = len(self.ids), super().forward(token_ids, last_positions)
            for row in range(len(rows)):
                if self.ids[: start + row + 1] != right[: start + row + 1]:
                    rows[row] = bad
            return rows

    def poisoned(first: np.ndarray) -> list[int]:
        wrong = Planted([(token_id + 1) % VOCABULARY for token_id in plain.ids], 3)
        options = {"stop_ids": frozenset(), "max_new_tokens": 6, "drafter": wrong}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return decode(Poisoned(PROMPT), first, FreeText(), Selector(sampling, 1.0, 0), **options).ids

    assert poisoned(logits_after(PROMPT)[None]) == plain.ids
    with pytest.raises(GenerationError, match="found 9 NaN or infinite of 9"):
        poisoned(np.full((1, VOCABULARY), bad, np.float32))


def test_a_drafter_is_told_the_later_choices_of_the_model():
    """What `choose` would give in those rows, by the numbers that it would draw."""
    for sampling in (GREEDY, Sampling(1.0, seed=5)):
        plain, _, _ = run(sampling=sampling)
        # Right but for the second draft: the fourth row follows one wrong token.
        plan = [*plain.ids[:2], (plain.ids[2] + 1) % VOCABULARY, *plain.ids[3:]]
        planted = Planted(plan, 4)
        run(planted, sampling=sampling, limit=6)
        ids, drafts, choices = planted.told[1]
        assert (ids, len(drafts), len(choices)) == (plain.ids[1:3], 4, 3)
        expected = Selector(sampling, 1.0, 0)
        for _ in plain.ids[:3]:
            expected.choose(logits_after(PROMPT), FreeText())
        later = [logits_after(PROMPT + plain.ids[:1] + drafts[:count]) for count in (2, 3, 4)]
        assert choices == [expected.choose(row, FreeText()) for row in later]


# --- where drafts come from -----------------------------------------------------------------------------------------


class Rows:
    """A pace of always so many rows."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.learnt: list[int | tuple[int, int]] = []  # sequences, from then on; rows and tokens

    def rows(self) -> int:
        return self._rows

    def plain_passes(self) -> int:
        return 0

    def among(self, sequences: int) -> None:
        self.learnt.append(sequences)

    def follow(self, rows: int) -> int:
        return min(rows, 5)

    def learn(self, rows: int, tokens: int, agreed: int, seconds: float) -> None:
        self.learnt.append((rows, tokens))

    def learn_plain(self, seconds: list[float]) -> None:
        self.learnt += [(1, 1)] * len(seconds)


def test_the_source_that_proved_right_is_followed():
    always = {"three": 3, "four": 4}
    sources = [Rule(name, lambda ids, token_id=token_id: token_id) for name, token_id in always.items()]
    drafter = Drafter("test", sources, Rows(3), jacobi=False)
    assert drafter.draft(10) == [3, 3]
    for _ in range(3):
        drafter.learn([4], drafter.draft(10), [4, 4], 0.1)
    assert drafter.draft(10) == [4, 4]
    assert drafter.acceptance["four"].rate > drafter.acceptance["three"].rate
    assert drafter.draft(1) == [4] and drafter.draft(0) == []


def test_a_drafter_asks_once_whether_it_may():
    asked: list[bool] = []

    def allowed(answer: bool) -> bool:
        asked.append(answer)
        return answer

    for answer in (True, False):
        source = Rule("three", lambda ids: 3 if len(ids) > 1 else None)
        drafter = Drafter("test", [source], Rows(3), allowed=lambda answer=answer: allowed(answer))
        assert drafter.draft(5) == [] and not drafter.drafted  # with nothing to draft there is nothing to ask
        drafter.learn([1, 2], [], [], None)
        for _ in range(2):
            assert drafter.draft(5) == ([3, 3] if answer else [])
        assert drafter.drafted is answer
    assert asked == [True, False]


def test_nothing_is_drafted_before_the_plain_tokens():
    drafter = Drafter("test", [Rule("three", lambda ids: 3)], Rows(2), plain=2)
    assert drafter.draft(5) == []
    drafter.learn([1], [], [], None)
    assert drafter.draft(5) == []
    drafter.learn([1], [], [], 0.1)
    assert drafter.draft(5) == [3]


def test_the_rows_of_the_first_in_a_group_are_drafted_for():
    """Whatever the request's own pace says, if it can afford them."""
    drafter = Drafter("test", [Rule("three", lambda ids: 3)], pace := Rows(2))
    drafter.learn([1], [], [], None)
    assert [len(drafter.draft(9, lead)) for lead in (None, 1, 2, 4, 9)] == [1, 0, 1, 3, 4]
    assert drafter.draft(2, 4) == [3, 3]
    with patch.object(pace, "plain_passes", lambda: 2):
        drafter.draft(9)
    assert [len(drafter.draft(9, lead)) for lead in (None, 4, None, None)] == [0, 3, 0, 1]


def test_passes_over_so_many_sequences_are_learnt_apart():
    drafter = Drafter("test", [Rule("three", lambda ids: 3)], pace := Rows(2))
    drafter.learn([1], [], [], None)
    for drafts, sequences in (([], 1), ([], 1), ([], 2), ([3], 2), ([], 1)):
        drafter.learn([1], drafts, [1] * len(drafts), 0.1, sequences)
    drafter.catch_up()
    assert pace.learnt == [(1, 1), (1, 1), 2, (1, 1), (2, 1), 1, (1, 1)]


def test_newlines_are_drafted_where_the_model_writes_them():
    """Sources see a picture without newlines; after a full row one is drafted, if the row before ended with one."""
    newline, width = 99, 2
    drafter = Drafter("test", [Rule("count", lambda ids: len(ids))], Rows(7), newline=newline, width=width)
    drafter.learn([0, 1], [], [], None)
    assert drafter.draft(9) == [2, 3, 4, 5, 6, 7]
    drafter.learn([newline, 2], [], [], 0.1)
    assert drafter.draft(9) == [3, newline, 4, 5, newline, 6]
    drafter.learn([3, newline], [], [], 0.1)
    assert drafter.draft(3) == [4, 5, newline]  # no second one
    drafter.learn([4, 5, 6], [], [], 0.1)
    assert drafter.draft(3) == [7, 8, 9]  # the model left one out


def test_tables_repeat_what_came_last():
    table = Table("left", (1,))
    assert table.guess([1]) is None
    table.learn([5, 1, 2])
    table.learn([5, 1, 2, 1, 3])
    assert (table.guess([]), table.guess([9, 1]), table.guess([2])) == (5, 3, 1)


@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 3), max_size=12), st.data())
def test_a_table_learns_in_parts_what_it_learns_token_by_token(ids, drawn, data):
    back = data.draw(st.lists(st.integers(1, 9), unique=True, min_size=0 if drawn else 1, max_size=3))
    followers = {}

    def surroundings(place):
        return *(ids[place - far] if far <= place else None for far in back), *drawn[place : place + 1]

    table, place = Table("", back, drawn), 0
    while place < len(ids):
        place = data.draw(st.integers(place + 1, len(ids)))
        table.learn(ids[:place])
    for place, token_id in enumerate(ids):
        followers[surroundings(place)] = token_id
    for place in range(len(ids) + 1):
        assert table.guess(ids[:place]) == followers.get(surroundings(place))


def test_sources_of_a_picture():
    grid = np.array([[0, 1, 2], [0, 1, 2]])
    sources = {source.name: source for source in [*input_sources(grid, first=100), *own_sources(width=3)]}
    ids = [200, 201, 202]
    for source in sources.values():
        source.learn(ids)
    guesses = {name: source.guess(ids) for name, source in sources.items()}
    assert guesses["input"] == 100 and guesses["above"] == 200 and guesses["left"] == 202
    assert guesses["input table"] == 200  # what code 0 became above
    assert guesses["input and left"] is None and guesses["left and above"] is None
    assert sources["input and left"].guess([200]) == 201
    assert sources["input"].guess([0] * 6) is None  # the grid is full
    assert sources["above"].guess([1, 2]) is None and sources["left"].guess([]) is None


def test_words_are_looked_up_in_the_prompt_and_the_answer():
    prompt = [10, 11, 12, 13, 14, 12, 13, 15]
    drafter = Drafter("lookup", word_sources(), Rows(4), prompt=prompt, jacobi=False)
    drafter.learn([11, 12, 13], [], [], None)
    # After 11 12 13 came 14, although after 12 13 last came 15.
    assert drafter.draft(9) == [14, 12, 13]
    drafter.learn([9, 9], drafter.draft(9), [], 0.1)
    assert drafter.draft(9) == []


def test_jacobi_keeps_the_choices_behind_a_wrong_draft():
    jacobi = Jacobi()
    assert jacobi.guess(4) is None
    jacobi.learn(4, drafts=[50, 60], choices=[51, 60, 70])
    assert [jacobi.guess(place) for place in (4, 5, 6, 7)] == [
        ("jacobi first new", 51),
        ("jacobi later same", 60),
        ("jacobi later new", 70),
        None,
    ]


def test_jacobi_alone_finds_what_depends_on_the_place():
    """A model that looks at nothing but the place is right everywhere after one pass over the window."""
    wanted = [int(value) for value in np.random.default_rng(0).integers(0, VOCABULARY, 64)]

    class ByPlace(Model):
        def forward(self, token_ids, last_positions=1, full_vocabulary=False):
            start = len(self.ids) - len(PROMPT) + 1
            super().forward(token_ids, last_positions)
            return np.eye(VOCABULARY, dtype=np.float32)[wanted[start : start + len(token_ids)]]

    model = ByPlace(PROMPT)
    drafter = Drafter("jacobi", own_sources(8), Rows(8), width=8)
    first = np.eye(VOCABULARY, dtype=np.float32)[wanted[:1]]
    options = {"stop_ids": frozenset(), "max_new_tokens": 60}
    done = decode(model, first, FreeText(), Selector(GREEDY, 1.0, 0), drafter=drafter, **options)
    assert done.ids == wanted[:60]
    assert len(done.by_pass) <= 20
    assert drafter.acceptance["jacobi later new"].rate > 0.8


# --- how far ahead --------------------------------------------------------------------------------------------------


def timed(fixed: float, each: float, *, noise: float = 0.0) -> RowCosts:
    rng, costs = np.random.default_rng(0), RowCosts()
    for rows in (1, 4, 8, 16, 32, 64):
        for _ in range(5):
            costs.record(rows, (fixed + each * rows) * (1 + (noise * rng.exponential() if rng.random() < 0.2 else 0)))
    return costs


def test_the_cost_of_rows_is_a_line_under_the_noise():
    np.testing.assert_allclose(timed(2.0, 0.25).line(), (2.0, 0.25))
    np.testing.assert_allclose(timed(2.0, 0.25, noise=5.0).line(), (2.0, 0.25), rtol=0.2)


def test_costs_that_fall_with_the_rows_are_flat():
    costs = RowCosts()
    for rows, seconds in ((1, 3.0), (8, 2.0)):
        for _ in range(4):
            costs.record(rows, seconds)
    fixed, each = costs.line()
    assert each == 0 and 2 <= fixed <= 3


def test_a_size_counts_after_three_passes():
    costs = RowCosts()
    assert (costs.most, costs.line(), costs.plain) == (0, (1.0, 0.0), 1.0)
    for most in (0, 0, 4):
        costs.record(4, 2.0)
        assert costs.most == most
    assert (costs.line(), costs.plain) == ((2.0, 0.0), 2.0)


def test_passes_over_more_sequences_have_costs_of_their_own():
    """Where a row of one sequence is cheap, and one of each of four is not."""
    costs = timed(1.0, 0.02)
    four = costs.among(4)
    for rows in (1, 8):
        for _ in range(5):
            four.record(rows, float(rows))
    assert costs.among(1) is four.among(1) is costs and costs.among(4) is four and costs.among(2).most == 0
    pace = started(costs, 0.6)
    alone = pace.rows()
    pace.among(4)
    assert pace.rows() == 1 < alone
    # A twentieth of a picture's 1024 passes may be lost.
    pace = Pace(costs, 0.6, 1024)
    pace.among(4)
    assert [pace.follow(rows) for rows in (8, 51, 53)] == [8, 51, 1]
    for _ in range(8):
        pace.learn(8, 1, 0, 8.0)
    assert pace.follow(8) == 1
    pace = Pace(costs, 0.6, 1024)
    pace.among(3)
    assert pace.follow(2) == 1  # of which nothing is known
    pace.among(4)
    for seconds in (0.3, 0.4, 0.5):  # the first two do not count
        pace.learn(1, 1, 0, seconds)
    assert (costs.known(1), four.known(1)) == (1.02, 0.5)


def test_the_first_pass_of_a_size_does_not_count():
    """In each request it binds its memory."""
    costs = timed(1.0, 0.1)
    for _ in range(10):
        Pace(costs, 0.6, 1024).learn(8, 1, 0, 0.5)
    assert costs.known(8) == pytest.approx(1.8)
    pace = Pace(costs, 0.6, 1024)
    for seconds in (0.5, 0.7):
        pace.learn(8, 1, 0, seconds)
    assert costs.known(8) == 0.7


def test_a_size_that_only_the_end_of_a_grid_has_tells_no_cost():
    costs = RowCosts()
    pace = Pace(costs, 0.6)
    for _ in range(5):
        for rows in (5, 6):
            pace.learn(rows, rows, rows - 1, 1.0)
    assert (costs.known(5), costs.known(6)) == (None, 1.0)


def started(costs: RowCosts, exponent: float) -> Pace:
    """A pace behind the plain passes of a request's start and a first one with drafts, which was as expected."""
    pace = Pace(costs, exponent, 1024)
    assert [pace.rows() for _ in range(3)] == [1, 1, 1]
    pace.learn(8, round(8**exponent), 7, sum(costs.line()))
    return pace


def test_rows_follow_their_cost_and_their_gain():
    assert started(timed(1.0, 0.0), 0.5).rows() == MAX_ROWS
    # (1 + 0.05 r) / sqrt(r) is least at 20, and at 32 not 5% more.
    assert started(timed(1.0, 0.05), 0.5).rows() == 32
    # Not worth it: twice, to see what it costs, then no more for a while.
    pace = Pace(timed(0.0, 1.0), 0.9, 1024)
    assert [pace.rows() for _ in range(135)] == [1, 1, 1, 8, 8, *[1] * 128, 8, 8]
    pace = Pace(timed(0.0, 1.0), 0.9, 1024)
    assert [(pace.rows(), pace.plain_passes()) for _ in range(3)] == [(1, 2), (8, 0), (8, 128)]
    dear, cheap = started(timed(1.0, 0.1), 0.6).rows(), started(timed(1.0, 0.02), 0.6).rows()
    assert 1 < dear < cheap


def test_where_rows_come_in_tiles_a_full_tile_is_taken():
    """The times of M3 in int4 on an H200 (benchmarks/gpu.sh at a3b322b)."""
    times = {1: 2.6, 2: 2.87, 3: 3.07, 4: 2.88, 6: 5.17, 8: 5.09, 12: 8.13, 16: 8.54, 24: 11.61, 32: 15.52, 64: 30.28}
    rows = {}
    for in_tiles in (True, False):
        costs = RowCosts(in_tiles)
        for size, milliseconds in times.items():
            for _ in range(4):
                costs.record(size, milliseconds)
        fixed, each = costs.line()
        assert costs.seconds(4) == (2.88 if in_tiles else fixed + 4 * each)
        assert costs.seconds(48) == fixed + 48 * each  # was not timed
        rows[in_tiles] = started(costs, 0.6).rows()
    assert rows == {True: 4, False: 12}


def test_the_gain_is_learnt_from_the_passes():
    pace = started(timed(1.0, 0.1), 0.6)
    for _ in range(200):
        pace.learn(8, 8, 7, 1.8)
    assert pace.exponent == pytest.approx(1, abs=0.01) and pace.rows() == MAX_ROWS
    for _ in range(200):
        pace.learn(8, 1, 0, 1.8)
    assert pace.exponent < 0.01 and pace.rows() == 1


def test_few_drafts_that_the_model_agrees_with_are_enough_to_stop():
    """Passes without a right draft: what the model chose behind the first of them says whether one may come."""
    rows = {}
    for agreed in (0, 5):
        pace = Pace(timed(1.0, 0.15), 0.6, 1024)
        rows[agreed] = []
        for _ in range(9):
            rows[agreed].append(pace.rows())
            count = rows[agreed][-1]
            pace.learn(count, 1, min(agreed, count - 1), 1.0 + 0.15 * count)
    assert rows[0] == [1, 1, 1, 8, 16, 12, 1, 1, 1] and rows[5][:4] == [1, 1, 1, 8] and min(rows[5][3:]) > 1


def test_what_was_lost_before_the_first_pass_counts():
    costs = timed(1.0, 0.05)
    for lost, tries in ((0.0, True), (0.06 * 1024 * costs.plain, False)):
        pace = Pace(costs, 0.6, 1024, lost)
        assert (max(pace.rows() for _ in range(4)) > 1) is tries


def test_where_drafts_do_not_pay_they_are_tried_ever_more_rarely():
    pace = started(timed(1.0, 0.2), 0.6)
    rows = []
    for _ in range(1024):
        rows.append(pace.rows())
        pace.learn(rows[-1], 1, 0, 0.2 * rows[-1] + 1.0)
    starts = [place for place, count in enumerate(rows) if count > 1 and (place == 0 or rows[place - 1] == 1)]
    gaps = np.diff(starts)
    assert 3 <= len(starts) <= 4 and gaps[0] >= 128
    assert all(later >= 1.5 * sooner for sooner, later in pairwise(gaps))


@pytest.mark.parametrize("each", [0.0, 0.05, 0.14, 0.3, 1.0])
@pytest.mark.parametrize(("expected", "tokens"), [(256, 256), (1024, 1024), (0, 24), (0, 400)])
@pytest.mark.parametrize("agreed", [0, 1], ids=["and look wrong", "and look right"])
def test_drafts_that_are_never_right_cost_a_few_percent(each, expected, tokens, agreed):
    """Of a request: whatever rows cost, also in a session that does not know it yet."""
    for costs in (timed(1.0, each), RowCosts()):
        pace = Pace(costs, 0.9, expected)
        seconds = 0.0
        for _ in range(tokens):
            rows = pace.rows()
            seconds += 1.0 + each * rows
            pace.learn(rows, 1, agreed * (rows - 1), 1.0 + each * rows)
        assert seconds <= 1.055 * tokens * (1.0 + each)


def test_drafts_that_turn_wrong_lose_little_of_what_they_gained():
    pace = Pace(timed(1.0, 0.1), 0.6, 256)
    gained, most = 0.0, 0.0
    for place in range(400):
        rows = pace.rows()
        tokens = 4 if rows > 4 and place < 50 else 1
        pace.learn(rows, tokens, rows - 1, 1.0 + 0.1 * rows)
        gained += tokens * 1.1 - (1.0 + 0.1 * rows)
        most = max(most, gained)
        assert most - gained <= 2 * 0.05 * 1.1 * (256 + 200)
    assert most > 2 * 0.05 * 1.1 * (256 + 200)  # there was more to lose


def test_another_process_that_takes_the_machine_is_no_loss_by_drafts():
    pace = started(timed(1.0, 0.05), 0.6)
    for _ in range(30):
        rows = pace.rows()
        pace.learn(rows, 6, 5, 1.0 + 0.05 * rows)
    pace.learn(rows, 6, 5, 1000.0)
    assert pace.rows() > 8


def test_no_pass_is_of_more_than_twice_the_rows_known():
    costs = RowCosts()
    seen = []
    for _ in range(3):  # requests
        pace = Pace(costs, 0.9, 1024)
        for _ in range(20):
            known = costs.most
            seen.append(pace.rows())
            assert seen[-1] <= max(4, 2 * known) and (known or seen[-1] == 1)
            pace.learn(seen[-1], seen[-1], seen[-1] - 1, 1.0)
    assert seen[-1] == MAX_ROWS


def test_an_old_cost_does_not_stand_for_good():
    """Measured while the machine was busy, a size looks too dear; it is timed anew, and then taken."""
    costs = timed(1.0, 5.0)
    for _ in range(12):  # requests
        pace = Pace(costs, 0.6, 1024)
        for _ in range(256):
            rows = pace.rows()
            pace.learn(rows, round(rows**0.6), round(rows**0.6) - 1, 1.0 + 0.01 * rows)
    assert costs.plain == pytest.approx(1.01) and pace.rows() > 8


def test_a_requests_first_pass_is_not_timed():
    costs = RowCosts()
    for _ in range(4):
        pace = Pace(costs, 0.5)
        pace.learn(1, 1, 0, 100.0)
        pace.learn(1, 1, 0, 1.0)
    assert costs.plain == 1.0


@pytest.mark.parametrize("count", [0, 1, 3, 6, 7, 40])
def test_plain_passes_are_learnt_together_as_one_by_one(count):
    costs, paces = (RowCosts(), RowCosts()), []
    times = np.random.default_rng(count).uniform(1.0, 2.0, count).tolist()
    for together, own in enumerate(costs):
        paces.append(Pace(own, 0.6, 300))
        if together:
            paces[-1].learn_plain(times)
        for seconds in [] if together else times:
            paces[-1].learn(1, 1, 0, seconds)
    (one_by_one, first), (at_once, second) = ((vars(pace).copy(), pace) for pace in paces)
    assert one_by_one.pop("_costs")._samples == at_once.pop("_costs")._samples
    assert one_by_one == at_once and [first.rows() for _ in range(4)] == [second.rows() for _ in range(4)]


# --- whether it may -------------------------------------------------------------------------------------------------


class Rounding:
    """An executor whose logits are off by `error` in passes of several rows."""

    def __init__(self, error: float) -> None:
        self._error = error

    def context(self, task: str, image_features: np.ndarray | None) -> Model:
        error = self._error

        class Context(Model):
            def forward(self, token_ids, last_positions=1, full_vocabulary=False):
                rows = super().forward(token_ids, last_positions)
                return rows + np.float32(error * (len(token_ids) > 3))

        return Context([])


def test_an_executor_that_rounds_by_the_size_of_a_pass_is_found_out():
    assert rows_agree(Rounding(0.0), "generation") is True
    assert rows_agree(Rounding(1e-6), "generation") is False
