"""What is done together is what each gives by itself, to the last id, whoever joins, leaves or fails meanwhile."""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from free_rows import FreeRows
from golden_cases import Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peer import ASK, Peer

from healthgpt_edge import Sampling, load, machine
from healthgpt_edge.drafting import TEXT_DRAFTS
from healthgpt_edge.errors import Cancelled, ExecutorError, ImageError, OptionError
from healthgpt_edge.executors.onnx_group import OnnxGroup
from healthgpt_edge.executors.onnx_memory import Memory
from healthgpt_edge.images import read_image
from healthgpt_edge.invariance import sequences_agree
from healthgpt_edge.together import MAX_TOGETHER, Done, Together

COM, SQUARE, TEXT, GEN = (Case(f"m3_{name}") for name in ("com_wide", "com_square", "com_text", "gen_wide"))


@pytest.fixture(scope="module")
def session(golden_bundle):
    return load(golden_bundle("m3"), threads=1)


@pytest.fixture(scope="module")
def free_session(golden_bundle):
    """Where drafts always pay."""
    session = load(golden_bundle("m3"), threads=1)
    session.drafts.costs = defaultdict(FreeRows)
    return session


@pytest.fixture
def passes(monkeypatch):
    """How many sequences each pass of a group is over."""
    counts: list[int] = []
    honest = OnnxGroup.forward

    def forward(self, token_ids, full_vocabulary):
        counts.append(len(token_ids))
        return honest(self, token_ids, full_vocabulary)

    monkeypatch.setattr(OnnxGroup, "forward", forward)
    return counts


def test_a_pass_has_as_many_rows_of_each_as_the_one_with_the_fewest(session):
    """And at most 64 of all: more would be a prompt's. Each has the bits that it gets by itself."""
    group = session.executor.group("comprehension", 3)
    with ExitStack() as seats:
        alone = {}
        for length in (3, 9, 30):
            context = session.executor.context("comprehension", None)
            context.forward(np.arange(length, 2 * length))
            alone[seats.enter_context(group.join(context))] = context
        for counts, expected in (((4, 2, 7), 2), ((30, 40, 25), 21), ((1, 64, 64), 1), ((3, 3, 3), 3)):
            ids = {member: member.length + np.arange(count) for member, count in zip(alone, counts, strict=True)}
            given = group.forward(ids, [])
            for member, context in alone.items():
                assert np.array_equal(given[member], context.forward(ids[member][:expected], expected))
                assert member.length == context.length
                member.length -= 1  # as of a draft that was wrong
                context.length -= 1


def test_a_pass_without_a_token_for_each_is_refused(session):
    group = session.executor.group("comprehension", 2)
    context = session.executor.context("comprehension", None)
    context.forward(np.array([1, 2]))
    with group.join(context) as member:
        with pytest.raises(ExecutorError, match=r"^each of 1 sequences needs tokens, got those of 0$"):
            group.forward({}, [])
        assert list(group.forward({member: np.array([3])}, [])) == [member]


def done(together: Together) -> dict[Any, Done]:
    """What became of each."""
    found = {one.name: one for one in together}
    assert len(together) == 0
    return found


def ask(together: Together, case: Case, **options: Any) -> None:
    options = {"max_new_tokens": len(case.record["output_ids"]), "draft": "none"} | options
    together.answer(case.name, case.image, case.question, **options)


def done_one(together: Together, name: str, **options: Any) -> Any:
    together.generate(name, GEN.image, GEN.question, **options)
    return done(together)[name].result


# --- the same ids ---------------------------------------------------------------------------------------------------


def test_answers_of_the_original(session, passes):
    """Each joins the next pass when its prompt is read, which gives its first token."""
    together = session.together()
    for case in (COM, SQUARE, TEXT):
        ask(together, case)
    session.group("comprehension", 2)  # compares, once
    passes.clear()
    found = done(together)
    for case in (COM, SQUARE, TEXT):
        answer = found[case.name].result
        assert answer.token_ids == case.record["output_ids"]
        assert answer.certified and answer.draft == "none" and answer.accepted_per_pass == 1
        assert answer.text == session.answer(case.image, case.question, max_new_tokens=len(answer.token_ids)).text
    spans = [(i, i + len(case.record["output_ids"]) - 1) for i, case in enumerate((COM, SQUARE, TEXT))]
    last = max(end for _, end in spans)
    assert passes == [sum(begin <= place < end for begin, end in spans) for place in range(last)]


@pytest.mark.parametrize("system", ["phi4", "qwen"])
def test_answers_of_the_other_systems(golden_bundle, system):
    """Whose query heads share caches, and whose tokens see no more than a window."""
    session, case = load(golden_bundle(system), threads=1), Case(f"{system}_com")
    together = session.together()
    ask(together, case)
    together.answer("other", None, "What is a lesion?", max_new_tokens=30)
    expected = session.answer(None, "What is a lesion?", max_new_tokens=30, draft="none")
    found = done(together)
    assert found[case.name].result.token_ids == case.record["output_ids"]
    assert found["other"].result.token_ids == expected.token_ids


def test_pictures_of_the_original_beside_answers(session, passes):
    """Locked, free and sampled; a group for each task."""
    sampling = Sampling(0.9, 0.95, 3)
    expected = session.generate(GEN.image, GEN.question, sampling=sampling, draft="none")
    together = session.together(8)
    codes: list[int] = []
    together.generate("locked", GEN.image, GEN.question, on_code=codes.append, draft="none")
    together.generate("free", GEN.image, GEN.question, faithful=True, max_new_tokens=1025)
    together.generate("sampled", GEN.image, GEN.question, sampling=sampling)
    ask(together, COM)
    found = done(together)
    assert [one.error for one in found.values()] == [None] * 4
    for name in ("locked", "free"):
        assert found[name].result.codes == GEN.record["vq_indices"]
        assert np.array_equal(found[name].result.pixels, found["locked"].result.pixels)
    assert found["free"].result.token_ids == GEN.record["output_ids"]
    assert found["sampled"].result.token_ids == expected.token_ids
    assert found[COM.name].result.token_ids == COM.record["output_ids"]
    assert codes == list(range(1, 1026)) and max(passes) == 3


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    limit=st.integers(1, 5),
    asked=st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 40), st.booleans(), st.sampled_from(TEXT_DRAFTS)),
        min_size=1,
        max_size=8,
    ),
)
def test_whoever_comes_and_goes(free_session, limit, asked):
    """Prompts and answers of any length, greedy and sampled, with drafts and without, in a group of any size: each as
    by itself."""
    together = free_session.together(limit)
    expected = {}
    for name, (words, tokens, sampled, draft) in enumerate(asked):
        question = " ".join(["What", *["is"] * words])
        options = {"max_new_tokens": tokens, "sampling": Sampling(1.0, 0.9, name) if sampled else None}
        expected[name] = free_session.answer(None, question, draft="none", **options).token_ids
        together.answer(name, None, question, draft=draft, **options)
    assert {name: one.result.token_ids for name, one in done(together).items()} == expected


def test_pictures_done_together_are_drafted_for(free_session, passes):
    """Locked, free and compared: the original's ids, in fewer passes."""
    together = free_session.together()
    asked = {
        "locked": {},
        "input": {"draft": "input"},
        "compared": {"certify": True},
        "free": {"faithful": True, "max_new_tokens": 1025},
    }
    for name, options in asked.items():
        together.generate(name, GEN.image, GEN.question, **options)
    for name, one in done(together).items():
        assert one.result.codes == GEN.record["vq_indices"] and one.result.certified
        assert one.result.draft != "none" and one.result.forward_passes < 950
        assert (one.result.timings_ms["certify"] > 0) == (name == "compared")
    assert max(passes) == 4


def test_a_sampled_picture_among_others(free_session):
    """Few of its drafts are right."""
    sampling = Sampling(0.9, 0.95, 3)
    expected = free_session.generate(GEN.image, GEN.question, sampling=sampling, draft="none")
    together = free_session.together()
    together.generate("sampled", GEN.image, GEN.question, sampling=sampling)
    together.generate("greedy", GEN.image, GEN.question)
    found = done(together)
    assert found["sampled"].result.token_ids == expected.token_ids and found["sampled"].result.draft != "none"
    assert found["greedy"].result.codes == GEN.record["vq_indices"]


def test_one_that_is_not_drafted_for_takes_the_others_with_it(free_session):
    """All rows of a pass are computed for each, and nobody is to wait for the drafts of others."""
    together = free_session.together()
    together.generate("plain", GEN.image, GEN.question, draft="none")
    together.generate("drafted", GEN.image, GEN.question)
    found = done(together)
    for name in ("plain", "drafted"):
        assert found[name].result.codes == GEN.record["vq_indices"]
    assert set(found["plain"].result.tokens_by_pass[:-1]) == {1} == set(found["drafted"].result.tokens_by_pass[5:1000])


def test_the_only_one_goes_on_in_the_group_when_another_comes(free_session, passes):
    """With what is right of its drafts in its caches, and with drafts."""
    session = free_session
    for task in ("comprehension", "generation"):
        session.group(task, 2)  # compares, once
    passes.clear()
    together = session.together()
    alone = done_one(together, "alone")
    assert alone.codes == GEN.record["vq_indices"] and alone.draft != "none"
    assert alone.forward_passes < 900 and passes == []

    def come(count: int) -> None:
        if count == 200:
            ask(together, COM)
            together.generate("late", GEN.image, GEN.question)

    together.generate("first", GEN.image, GEN.question, on_code=come)
    found = done(together)
    assert list(found) == [COM.name, "first", "late"] and max(passes) == 2
    assert found[COM.name].result.token_ids == COM.record["output_ids"]
    for name in ("first", "late"):
        assert found[name].result.codes == GEN.record["vq_indices"] and found[name].result.certified
    first, late = found["first"].result, found["late"].result
    assert first.draft == late.draft == alone.draft
    assert max(first.forward_passes, late.forward_passes) < 950


def test_caches_that_grow_while_others_are_in_them(session):
    """Caches get longer by steps of 256 tokens, of all that are in them."""
    together = session.together(3)
    for case in (SQUARE, TEXT):
        ask(together, case, max_new_tokens=300)
    long = {case.name: session.answer(case.image, case.question, max_new_tokens=300) for case in (SQUARE, TEXT)}
    found = done(together)
    for name, answer in long.items():
        assert found[name].result.token_ids == answer.token_ids
    assert max(len(answer.prompt_ids) + len(answer.token_ids) for answer in long.values()) > 256


def test_a_question_begins_with_a_picture_that_another_is_still_asked_about(golden_bundle):
    session = load(golden_bundle("m3"), tasks=("comprehension",), threads=1, keep_pictures_bytes=64 << 20)
    together = session.together()
    for name in range(3):
        together.answer(name, COM.image, f"{COM.question} {name}", max_new_tokens=8)
    found = done(together)
    reused = [found[name].result.reused_tokens for name in range(3)]
    assert reused[0] == 0 and reused[1] == reused[2] > 0
    plain = load(golden_bundle("m3"), tasks=("comprehension",), threads=1)
    for name in range(3):
        expected = plain.answer(COM.image, f"{COM.question} {name}", max_new_tokens=8)
        assert found[name].result.token_ids == expected.token_ids
    assert len(session.prefixes.kept()) == 1


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_what_fails_or_is_given_up_takes_nobody_with_it(session, tmp_path):
    def raises(piece: str) -> None:
        raise KeyError("the listener")

    asked = iter(range(100))
    together = session.together(5)
    together.answer("no picture", tmp_path / "none.png", "What?")
    together.answer("given up", SQUARE.image, SQUARE.question, stop=lambda: next(asked) >= 9)
    ask(together, SQUARE)
    together.answer("listener", TEXT.image, TEXT.question, on_text=raises)
    together.answer("never begun", None, "What?", stop=lambda: True)
    together.answer("too long", None, "What?", max_new_tokens=10**6)
    ask(together, COM)
    found = done(together)
    assert isinstance(found["no picture"].error, ImageError) and found["no picture"].result is None
    assert isinstance(found["given up"].error, Cancelled) and isinstance(found["never begun"].error, Cancelled)
    assert isinstance(found["listener"].error, KeyError)
    assert str(found["too long"].error).startswith("prompt and new tokens must fit")
    for case in (SQUARE, COM):
        assert found[case.name].error is None and found[case.name].result.token_ids == case.record["output_ids"]


def test_a_pass_that_fails_is_what_became_of_all_that_were_in_it(session, monkeypatch):
    together = session.together()
    for case in (COM, TEXT):
        ask(together, case)
    assert together.step() == []
    monkeypatch.setattr(OnnxGroup, "forward", lambda *_: (_ for _ in ()).throw(MemoryError))
    assert {one.name: type(one.error) for one in together} == {COM.name: MemoryError, TEXT.name: MemoryError}
    monkeypatch.undo()
    ask(together, COM)  # there is nobody left in the group
    assert done(together)[COM.name].result.token_ids == COM.record["output_ids"]


@pytest.mark.parametrize("place", ["pass", "listener"])
def test_an_interrupt_ends_those_in_the_pass_and_nobody_else(session, passes, monkeypatch, place):
    """One has its prompt read alone meanwhile, and one waits for a place."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    together = session.together(2)
    for case in (COM, TEXT):
        ask(together, case, **({"on_text": interrupted} if place == "listener" and case is COM else {}))
    ask(together, SQUARE)
    with monkeypatch.context() as patch:
        if place == "pass":
            patch.setattr(OnnxGroup, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(together)
    found = done(together)
    broken_off = [name for name, one in found.items() if one.error]
    assert COM.name in broken_off and SQUARE.name not in broken_off and len(found) == 3
    for name in broken_off:
        assert isinstance(found[name].error, Cancelled)
        assert str(found[name].error) == "the request was broken off by KeyboardInterrupt"
    assert found[SQUARE.name].result.token_ids == SQUARE.record["output_ids"]


def test_what_is_done_is_told_after_a_break(session):
    """Two are done by one pass; whoever leaves the loop at the first finds the second when he comes back."""
    together = session.together()
    for name in range(2):  # the second begins a pass later
        together.answer(name, None, "What?", max_new_tokens=5 - name, draft="none")
    told = []
    while together:
        told.append([next(iter(together)).name, len(together)])
    assert told == [[0, 1], [1, 0]]


def test_what_is_broken_off_takes_no_memory(session, passes):
    """Nor waits for the collector, which may not come for long: each request has caches."""
    together = session.together(2)
    for case in (COM, TEXT):
        ask(together, case)
    while not passes:
        together.step()
    left = weakref.ref(together)
    gc.disable()
    try:
        del together
        assert left() is None
    finally:
        gc.enable()


def test_nothing_is_left_of_what_was_done(session):
    pictures = [read_image(COM.image) for _ in range(3)]
    alive = [weakref.ref(picture) for picture in pictures]
    together = session.together()
    for name, picture in enumerate(pictures):
        together.answer(name, picture, COM.question, stop=(lambda: True) if name == 1 else None)
    del pictures, picture
    gc.disable()
    try:
        errors = [type(one.error) for one in done(together).values()]
        assert sorted(map(str, errors)) == sorted(map(str, [Cancelled, type(None), type(None)]))
        assert [one() for one in alive] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("limit", [0, MAX_TOGETHER + 1, True, 2.0, "4", None])
def test_how_many_is_checked(session, limit):
    with pytest.raises(OptionError, match=r"^limit must be from 1 to 64 requests, got "):
        session.together(limit)


def test_an_answer_cannot_be_faithful(session):
    together = session.together()
    together.answer("words", None, "What?", faithful=True, max_new_tokens=4)
    (one,) = done(together).values()
    assert isinstance(one.error, OptionError) and str(one.error) == "faithful is for pictures, got it with a question"


# --- where there are no groups --------------------------------------------------------------------------------------


def test_an_executor_whose_sequences_would_not_agree_does_them_one_by_one(session, monkeypatch, passes):
    """As one does whose products round by the number of rows, or whose members mix up their caches."""
    expected = session.answer(COM.image, COM.question).token_ids
    assert sequences_agree(session.executor, "comprehension")
    honest = OnnxGroup.forward

    def mixed(self, token_ids, full_vocabulary):
        given = honest(self, token_ids, full_vocabulary)
        return dict(zip(given, reversed(given.values()), strict=True))

    with monkeypatch.context() as patch:
        patch.setattr(OnnxGroup, "forward", mixed)
        assert not sequences_agree(session.executor, "comprehension")
    monkeypatch.setattr("healthgpt_edge.session.sequences_agree", lambda executor, task: False)
    monkeypatch.setattr(session, "_groups_agree", {})
    passes.clear()
    together = session.together()
    for name in range(2):
        together.answer(name, COM.image, COM.question)
    assert [one.result.token_ids for one in done(together).values()] == [expected] * 2
    assert passes == []


def test_an_executor_without_groups_does_them_one_by_one(session, monkeypatch):
    monkeypatch.setattr(session, "_groups_agree", {})
    monkeypatch.setattr(session.executor, "group", lambda task, sequences: None)
    together = session.together()
    ask(together, COM, draft="lookup")
    assert done(together)[COM.name].result.token_ids == COM.record["output_ids"]


# --- memory ---------------------------------------------------------------------------------------------------------


def test_places_that_nobody_takes_take_no_memory(session):
    """Nor do those that all have left; a group has memory for as many as are in it, and gives it back."""
    before = machine.proportional_memory()
    group = session.executor.group("generation", 64)
    contexts = [session.executor.context("generation", None) for _ in range(2)]
    for context in contexts:
        context.forward(np.arange(250))
    with group.join(contexts[0]) as first, group.join(contexts[1]) as second:
        for token_id in range(300):  # so that the caches grow
            group.forward({first: np.array([token_id]), second: np.array([token_id])}, ())
        places = group._caches.size_bytes
        assert machine.proportional_memory() - before < places / 8
    assert group._caches.size_bytes == 0


def test_a_group_without_memory_for_longer_caches_begins_anew(session, monkeypatch):
    """It loses the sequences that are in it: some of its caches would be longer than others."""
    group, context = session.executor.group("comprehension", 2), session.executor.context("comprehension", None)
    context.forward(np.arange(256))
    seven = np.array([7])
    plain, left = Memory.buffer, iter(range(3))

    def buffer(self, shape, dtype):
        if shape[2] > 256 and next(left, None) is None:
            raise MemoryError
        return plain(self, shape, dtype)

    with group.join(context) as member, monkeypatch.context() as patch:
        patch.setattr(Memory, "buffer", buffer)
        with pytest.raises(ExecutorError, match=r"^no memory for caches of 512 tokens: there is not enough memory$"):
            group.forward({member: seven}, ())
        assert group._caches.size_bytes == 0
        with pytest.raises(ExecutorError, match=r"^the caches are gone, because there was no memory for longer ones$"):
            group.forward({member: seven}, ())
    with group.join(context) as member:
        assert np.array_equal(group.forward({member: seven}, ())[member], context.forward(seven))


# --- for a peer -----------------------------------------------------------------------------------------------------


def test_a_peer_is_told_of_each_when_it_is_done(session, passes):
    """The short ones do not wait for the long one; and one of them is given up."""
    asked = [{**ASK, "id": name, "max_new_tokens": tokens} for name, tokens in (("long", 300), ("short", 5))]
    with Peer(session, together=3) as peer:
        peer.ask(*asked, {**ASK, "id": "lost", "max_new_tokens": 900, "stream": True})
        assert peer.event()["id"] in ("short", "lost")
        peer.ask({"task": "cancel", "id": "lost"}, {**ASK, "id": "late"}, {"task": "forget", "id": "all"})
        events = [event for event in peer.end() if event["event"] != "text"]
    assert sorted(event["event"] for event in events if event["id"] == "lost") == ["error", "result"]
    ended = {event["id"]: event for event in events}
    assert events[-1]["id"] == "long" and len(events[-1]["token_ids"]) == 300
    assert ended["all"]["event"] == "result"
    expected = session.answer(None, ASK["question"], max_new_tokens=300, draft="none").token_ids
    assert events[-1]["token_ids"] == expected and ended["late"]["token_ids"] == expected[:4]
    assert max(passes) == 3
