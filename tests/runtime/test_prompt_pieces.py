"""A prompt that is read in pieces is the prompt; and between two of them others go on, or it is given up."""

from __future__ import annotations

import time

import numpy as np
import pytest
from golden_cases import Case
from peer import ASK, Peer

from healthgpt_edge import load
from healthgpt_edge.errors import Cancelled
from healthgpt_edge.executors.onnx import DEVICES
from healthgpt_edge.executors.onnx_context import OnnxContext
from healthgpt_edge.executors.onnx_group import OnnxGroup
from healthgpt_edge.executors.onnx_memory import Caches
from healthgpt_edge.inference import pieces

CASES = {"m3": "m3_com_wide", "phi4": "phi4_com", "qwen": "qwen_com"}
PIECE = 5


@pytest.fixture
def in_pieces(monkeypatch):
    monkeypatch.setitem(DEVICES, "cpu", DEVICES["cpu"]._replace(prompt_tokens=PIECE))


@pytest.fixture
def session(golden_bundle, in_pieces):
    return load(golden_bundle("m3"), threads=1)


@pytest.mark.parametrize("system", CASES)
def test_answers_of_the_original(golden_bundle, in_pieces, system):
    case, told = Case(CASES[system]), []
    options = {"max_new_tokens": len(case.record["output_ids"]), "on_prompt": lambda *counts: told.append(counts)}
    for kept in (0, 64 << 20):  # where the picture is kept, the prompt is cut behind it, too
        session = load(golden_bundle(system), tasks=("comprehension",), threads=1, keep_pictures_bytes=kept)
        for _ in range(2):
            told.clear()
            answer = session.answer(case.image, case.question, **options)
            assert answer.token_ids == case.record["output_ids"] and answer.certified
            reads, totals = np.array([(answer.reused_tokens, told[0][1]), *told]).T
            assert np.diff(reads).min() >= 1 and np.diff(reads).max() <= PIECE
            assert set(totals) == {reads[-1]} and reads[-1] > len(answer.prompt_ids)
        assert bool(answer.reused_tokens) == bool(kept)


def test_a_picture_of_the_original_run_free(session):
    case = Case("m3_gen_wide")
    picture = session.generate(case.image, case.question, faithful=True, max_new_tokens=1025)
    assert picture.token_ids == case.record["output_ids"]


def test_it_is_the_same_bits(session):
    ids = np.arange(3 * PIECE - 1)
    whole = session.executor.context("comprehension", None).forward(ids)
    context = session.executor.context("comprehension", None)
    *_, logits = [context.forward(piece) for piece in pieces(session.executor, ids)]
    assert np.array_equal(logits, whole)


def test_the_caches_grow_once_for_it(golden_bundle, monkeypatch):
    monkeypatch.setitem(DEVICES, "cpu", DEVICES["cpu"]._replace(prompt_tokens=PIECE, step_tokens=PIECE))
    session, case = load(golden_bundle("m3"), tasks=("comprehension",), threads=1), Case("m3_com_wide")
    grown: list[int] = []
    told: list[tuple[int, int]] = []
    honest = Caches.grow

    def grow(self, length, kept, sequences=1):
        grown.append(length)
        honest(self, length, kept, sequences)

    monkeypatch.setattr(Caches, "grow", grow)
    session.answer(
        case.image, case.question, max_new_tokens=1, draft="none", on_prompt=lambda *counts: told.append(counts)
    )
    assert len(told) > 3 and grown == [told[-1][1]]


def test_without_the_kernels_or_on_a_gpu_it_is_one_piece(golden_bundle):
    """Products there round by how many rows they are of; and a GPU reads a prompt in no time."""
    assert load(golden_bundle("m3"), threads=1).executor.prompt_tokens == DEVICES["cpu"].prompt_tokens
    assert load(golden_bundle("m3"), threads=1, kernels=False).executor.prompt_tokens is None
    assert DEVICES["cuda"].prompt_tokens is None


def test_it_is_given_up_between_two_pieces(session):
    case, told = Case("m3_com_wide"), []
    with pytest.raises(Cancelled):
        session.answer(
            case.image,
            case.question,
            on_prompt=lambda read, of: told.append((read, of)),
            stop=lambda: len(told) == 3,
        )
    assert told[-1][0] < told[-1][1] and len(told) == 3


def test_others_go_on_between_two_pieces(session, monkeypatch):
    """And are done before a long prompt is read."""
    happened: list[str] = []
    honest = OnnxGroup.forward

    def forward(self, token_ids, full_vocabulary):
        happened.append(f"pass of {len(token_ids)}")
        return honest(self, token_ids, full_vocabulary)

    session.group("comprehension", 2)  # compares, once
    monkeypatch.setattr(OnnxGroup, "forward", forward)
    together = session.together(3)
    case = Case("m3_com_wide")
    together.answer("short", None, "What?", max_new_tokens=6)
    together.answer("long", case.image, case.question, on_prompt=lambda *_: happened.append("piece"))
    done = {one.name: one.result for one in together}
    assert list(done) == ["short", "long"]
    assert done["long"].token_ids == case.record["output_ids"]
    assert done["short"].token_ids == session.answer(None, "What?", max_new_tokens=6, draft="none").token_ids
    pieces = happened.count("piece")
    assert pieces > 6 and happened[:11] == ["pass of 1", *["piece", "pass of 1"] * 4, "piece", "piece"]
    assert happened[-1] == "piece"  # then it is the only one, and goes on by itself


def test_a_peer_is_told_how_far_it_is_and_may_cancel_it(session, monkeypatch):
    forward = OnnxContext.forward

    def slowly(*arguments, **options):  # or a quick machine has answered before it reads of the cancelling
        time.sleep(0.05)
        return forward(*arguments, **options)

    monkeypatch.setattr(OnnxContext, "forward", slowly)
    asked = {**ASK, "image": str(Case("m3_com_wide").image), "stream": True}
    with Peer(session) as peer:
        peer.ask({**asked, "id": 1})
        first, second = peer.event(), peer.event()
        peer.ask({"task": "cancel", "id": 1})
        events = peer.end()
    assert first == {"event": "prompt", "id": 1, "tokens": first["tokens"], "of": first["of"]}
    assert first["tokens"] < second["tokens"] < second["of"] == first["of"]
    assert events[-2]["kind"] == "cancelled" and events[-1]["found"]
