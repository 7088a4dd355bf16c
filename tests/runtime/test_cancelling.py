"""`serve` gives up what a peer cancels, and only that; what is read ahead of its turn stays within bounds."""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import tempfile
import tracemalloc
import weakref
from dataclasses import replace
from itertools import count
from threading import Event, Timer
from typing import Any

import numpy as np
import pytest
from dicom_samples import dicom, identified
from golden_cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from peer import ASK, SECONDS, Peer, line, process

from healthgpt_edge import Sampling, load
from healthgpt_edge.errors import Cancelled, GenerationError
from healthgpt_edge.serving import channel
from healthgpt_edge.serving.channel import Channel, Line

COM, GEN = Case("m3_com_wide"), Case("m3_gen_wide")
ANSWER = {"task": "answer", "question": COM.question, "image": str(COM.image), "max_new_tokens": 40, "draft": "none"}
PICTURE = {"task": "generate", "instruction": GEN.question, "image": str(GEN.image), "draft": "none"}
REQUESTS = {"answer": ANSWER, "picture": PICTURE}


def test_another_process_may_be_told():
    """By pickling: where it failed, a pool of `multiprocessing` would wait for ever."""
    told = pickle.loads(pickle.dumps(Cancelled()))
    assert type(told) is Cancelled and str(told) == "the request was cancelled"


@pytest.fixture(scope="module")
def session(golden_bundle):
    return load(golden_bundle("m3"), threads=1)


def cancelled(name: Any) -> dict[str, Any]:
    return {"event": "error", "id": name, "error": "the request was cancelled", "kind": "cancelled"}


def cancel(name: Any) -> dict[str, Any]:
    return {"task": "cancel", "id": name}


def told(name: Any, found: bool) -> dict[str, Any]:
    return {"event": "result", "id": name, "found": found}


class Gate:
    """Holds up the first request, when it asks for the `place`th time whether to stop, until it is opened."""

    def __init__(self, monkeypatch, session, place: int = 1) -> None:
        self._reached, self._opened, self._place = Event(), Event(), place
        self.begun = 0
        for name in ("answering", "generating"):
            monkeypatch.setattr(session, name, self._held(getattr(session, name)))

    def _held(self, do):
        def held(request, *callbacks):
            places = count(1)
            self.begun += 1

            def waits():
                if not self._reached.is_set() and next(places) == self._place:
                    self._reached.set()
                    assert self._opened.wait(SECONDS)
                return request.stop()

            return do(replace(request, stop=waits), *callbacks)

        return held

    def wait(self) -> None:
        assert self._reached.wait(SECONDS)

    def open(self) -> None:
        self._opened.set()


# --- what a session does --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"draft": "none"}, {"certify": True}, {"draft": "none", "sampling": Sampling(0.8, 0.9, 7)}],
    ids=["drafted", "plain", "certified", "sampled"],
)
@pytest.mark.parametrize("task", ["answer", "generate"])
def test_a_session_stops_wherever_it_asks(session, task, options):
    """And gives afterwards what it gave before."""
    words = (COM.image, COM.question) if task == "answer" else (GEN.image, GEN.question)
    options = options | ({"max_new_tokens": 40} if task == "answer" else {})
    call = getattr(session, task)
    asked: list[int] = []
    before = call(*words, **options, stop=lambda: asked.append(1))
    # Before the picture is looked at; before each pass; before codes are drawn.
    expected = 1 + before.forward_passes + (task == "generate")
    assert len(asked) >= expected if options.get("certify") else len(asked) == expected
    # How many passes drafts save depends on the time they take.
    late = {len(asked) // 2, len(asked)} if "draft" in options else set()
    for last in sorted({1, 2, 3, 8} | late):
        places = count(1)
        with pytest.raises(Cancelled, match=r"^the request was cancelled$"):
            call(*words, **options, stop=lambda last=last, places=places: next(places) >= last)
        assert next(places) == last + 1
    assert call(*words, **options).token_ids == before.token_ids


def test_a_comparison_with_plain_decoding_is_given_up_too(session):
    def stop() -> bool:
        return len(counts) == 1024 + 1 and next(passes) >= 100

    counts: list[int] = []
    passes = count()
    with pytest.raises(Cancelled):
        session.generate(GEN.image, GEN.question, draft="input", certify=True, on_code=counts.append, stop=stop)


def test_a_picture_that_was_read_is_kept_when_its_answer_is_cancelled(golden_bundle):
    session = load(golden_bundle("m3"), tasks=("comprehension",), threads=1, keep_pictures_bytes=64 << 20)
    expected = session.answer(COM.image, COM.question, max_new_tokens=12).token_ids
    session.forget_pictures()
    # Before the picture is looked at, before and after it is read; and when it is kept, before and after the question.
    for places, kept in ((1, 0), (2, 0), (3, 1), (1, 1), (2, 1), (3, 1)):
        left = iter(range(places - 1))
        with pytest.raises(Cancelled):
            session.answer(COM.image, COM.question, max_new_tokens=12, stop=lambda left=left: next(left, None) is None)
        assert len(session.prefixes.kept()) == kept
    found = session.answer(COM.image, COM.question, max_new_tokens=12)
    assert found.reused_tokens > 0 and found.token_ids == expected


# --- what a peer is told --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [1, 2, 6])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("request_", REQUESTS)
def test_what_is_being_done_is_cancelled(session, monkeypatch, tmp_path, request_, stream, place):
    gate = Gate(monkeypatch, session, place)
    asked = {**REQUESTS[request_], "id": "a", "stream": stream}
    if request_ == "picture":
        asked["out"] = str(tmp_path / "out.png")
    with Peer(session) as peer:
        peer.ask(asked)
        gate.wait()
        peer.ask(cancel("a"), {**ASK, "id": "b"})
        gate.open()
        events = peer.end()
    *pieces, lost, answer, last = events
    assert lost == cancelled("a") and answer == told("a", True)
    assert (last["event"], last["id"]) == ("result", "b")
    assert {piece["event"] for piece in pieces} <= {"prompt", "text", "progress"} and len(pieces) < 7
    assert bool(pieces) == (stream and place == 6)
    assert list(tmp_path.iterdir()) == []
    assert gate.begun == 2


def test_what_waits_is_cancelled_before_it_begins(session, monkeypatch):
    gate = Gate(monkeypatch, session)
    with Peer(session) as peer:
        peer.ask({**ASK, "id": 1})
        gate.wait()
        peer.ask(*({**ASK, "id": name} for name in (2, 3, 2.0, "2")), cancel(2), {"task": "forget", "id": 4}, cancel(4))
        gate.open()
        first, second, third, again, other, answer, forgotten, last = peer.end()
    assert [one["id"] for one in (first, third, other)] == [1, 3, "2"]
    assert {one["event"] for one in (first, third, other)} == {"result"}
    # Of one id there may be several.
    assert second == again == cancelled(2) and answer == told(2, True)
    assert forgotten == cancelled(4) and last == told(4, True)
    assert gate.begun == 3


def test_what_is_read_with_its_cancel_does_not_begin(session, monkeypatch):
    gate = Gate(monkeypatch, session)
    with Peer(session) as peer:
        peer.ask(line({**ASK, "id": 1}) + line(cancel(1)))
        assert [peer.last(), peer.last()] == [cancelled(1), told(1, True)]
    assert gate.begun == 0


def test_what_is_done_or_was_never_asked_is_not_found(session):
    with Peer(session) as peer:
        peer.ask(cancel("x"))
        assert peer.last() == told("x", False)
        peer.ask({**ASK, "id": "x"})
        assert peer.last()["event"] == "result"
        peer.ask(cancel("x"), {**ASK, "id": "x"})
        assert peer.last() == told("x", False)
        # An id may be used again; and a cancel is for what was sent before it.
        assert peer.last()["event"] == "result"
        peer.ask(ASK, cancel(""), cancel(0))
        assert [peer.last()["event"], peer.last(), peer.last()] == ["result", told("", False), told(0, False)]


def test_cancelled_twice(session, monkeypatch):
    gate = Gate(monkeypatch, session, 4)
    with Peer(session) as peer:
        peer.ask({**ANSWER, "id": 1})
        gate.wait()
        peer.ask(cancel(1), cancel(1))
        gate.open()
        assert [peer.last() for _ in range(3)] == [cancelled(1), told(1, True), told(1, True)]
        peer.ask(cancel(1), {**ASK, "id": 1})
        assert peer.last() == told(1, False)
        assert peer.last()["event"] == "result"


def test_a_cancel_without_an_id_cancels_nothing(session, monkeypatch):
    gate = Gate(monkeypatch, session, 4)
    bad = [{"task": "cancel"}, {"task": "cancel", "id": None}, {"task": "cancel", "id": 1, "question": "x"}]
    with Peer(session) as peer:
        peer.ask({**ASK, "id": 1})
        gate.wait()
        peer.ask(ASK, *bad)
        gate.open()
        assert [peer.last()["event"] for _ in range(5)] == ["result"] * 2 + ["error"] * 3


@pytest.mark.parametrize("request_", ["forget", "too long", "no JSON", "refused"])
def test_lines_that_fail_can_be_cancelled_if_they_have_an_id(session, monkeypatch, request_):
    monkeypatch.setattr(channel, "MAX_LINE_BYTES", 1000)
    gate = Gate(monkeypatch, session)
    given = {
        "forget": {"task": "forget", "id": 2},
        "too long": {**ASK, "id": 2, "question": "x" * 1000},
        "no JSON": b'{"id": 2\n',
        "refused": {"task": "answer", "id": 2},
    }
    with Peer(session) as peer:
        peer.ask({**ASK, "id": 1})
        gate.wait()
        peer.ask(given[request_], cancel(2))
        gate.open()
        _, found, answer = peer.end()
    has_id = request_ in ("forget", "refused")
    assert answer == told(2, has_id)
    assert (found == cancelled(2)) == has_id and found["event"] == "error"


@pytest.mark.parametrize("fails", [False, True])
def test_a_cancel_that_comes_with_the_last_piece(session, monkeypatch, fails):
    """What it is told holds: the request is cancelled, though it was all but done, or about to fail."""
    answering = session.answering
    sent, said = Event(), Event()

    def late(request, on_text):
        result = yield from answering(replace(request, stop=None))
        if not sent.is_set():
            said.set()
            assert sent.wait(SECONDS)
            on_text("the rest " * 20_000)  # more than a pipe takes
            if fails:
                raise GenerationError("failed")
        return result

    monkeypatch.setattr(session, "answering", late)
    with Peer(session) as peer:
        peer.ask({**ASK, "id": 1, "stream": True})
        assert said.wait(SECONDS)
        peer.ask(cancel(1))
        sent.set()
        assert [peer.event()["event"] for _ in range(2)] == ["prompt", "text"]
        assert [peer.last(), peer.last()] == [cancelled(1), told(1, True)]


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_cancel_that_comes_after_the_last_pass_leaves_no_file(session, monkeypatch, tmp_path, request_):
    """Nobody asks a last time whether to stop; the file must not be written all the same."""
    study = tmp_path / "source.dcm"
    study.write_bytes(dicom(np.zeros((8, 8), np.uint8), **identified()))
    name = {"answer": "answering", "picture": "generating"}[request_]
    work = getattr(session, name)
    done, cancels = Event(), Event()

    def late(request, *callbacks):
        result = yield from work(replace(request, stop=None), *callbacks)
        done.set()
        assert cancels.wait(SECONDS)
        return result

    monkeypatch.setattr(session, name, late)
    out = tmp_path / "out.dcm"
    with Peer(session) as peer:
        peer.ask({**REQUESTS[request_], "image": str(study), "id": 1, "out": str(out)})
        assert done.wait(SECONDS)
        peer.ask(cancel(1))
        cancels.set()
        assert [peer.last(), peer.last()] == [cancelled(1), told(1, True)]
    assert list(tmp_path.iterdir()) == [study]


def test_a_cancel_while_stdout_is_not_read(session, monkeypatch):
    """A preview is more than a pipe takes, so that the server waits until its lines are read."""
    monkeypatch.setattr("healthgpt_edge.previews._SHARE", float("inf"))
    with Peer(session) as peer:
        peer.ask({**PICTURE, "id": 1, "stream": True, "previews": True})
        assert peer.event()["event"] == "prompt"
        while peer.event()["tokens"] < 32:
            pass
        peer.ask(cancel(1))
        events = peer.end()
    assert events[-2:] == [cancelled(1), told(1, True)]
    assert len(events) < 500 and events[0]["event"] == "preview"


def test_a_cancel_while_the_result_is_written_is_too_late(session, monkeypatch):
    """The server waits for its line to be read, and has begun it."""
    made = session.generate(GEN.image, GEN.question)

    def generating(*_):
        return made
        yield

    monkeypatch.setattr(session, "generating", generating)
    with Peer(session) as peer:
        peer.ask({**PICTURE, "id": 1})
        assert select.select([peer._told], [], [], SECONDS)[0]
        peer.ask(cancel(1))
        assert peer.last()["codes"] == made.codes
        assert peer.last() == told(1, False)


def test_the_end_of_stdin_cancels_nothing(session, monkeypatch):
    gate = Gate(monkeypatch, session, 4)
    with Peer(session) as peer:
        peer.ask({**ANSWER, "id": 1})
        gate.wait()
        peer.ask({**ASK, "id": 2}, {**ASK, "id": 3}, cancel(2), json.dumps({**ASK, "id": 4}).encode())
        os.close(peer._asks)
        peer._asks = -1
        gate.open()
        events = peer.end()
    assert [(event["event"], event["id"]) for event in events] == [
        ("result", 1),
        ("error", 2),
        ("result", 3),
        ("result", 2),
        ("result", 4),
    ]
    assert events[0]["token_ids"] == COM.record["output_ids"][:40]


def test_nothing_is_left_of_what_was_cancelled(session, monkeypatch):
    pictures: list[Any] = []
    answering, receive = session.answering, Channel.receive

    def remember(request, *callbacks):
        pictures.append(weakref.ref(request.image))
        return answering(replace(request, stop=lambda: request.stop() or True), *callbacks)

    def watched(self, wait):
        assert [one() for one in pictures] == [None] * len(pictures)
        return receive(self, wait)

    monkeypatch.setattr(session, "answering", remember)
    monkeypatch.setattr(Channel, "receive", watched)
    with Peer(session) as peer:
        peer.ask(ANSWER, ANSWER)
        events = peer.end()
    assert [event["error"] for event in events] == ["the request was cancelled"] * 2
    assert len(pictures) == 2


# --- what is read ahead ---------------------------------------------------------------------------------------------


def test_a_peer_may_write_before_it_reads(session):
    """More than both pipes take: it would wait for the server, which would wait for it."""
    asked = [{**ASK, "id": number, "image_base64": "A" * 400_001} for number in range(20)]
    with Peer(session) as peer:
        peer.ask({**PICTURE, "draft": "auto"}, *asked)
        first, *others = peer.end()
    assert first["codes"] == GEN.record["vq_indices"]
    assert [(event["event"], event["id"]) for event in others] == [("error", number) for number in range(20)]


def test_a_cancel_behind_more_than_may_wait_is_not_seen(session, monkeypatch):
    monkeypatch.setattr(channel, "MAX_WAITING", 2)
    gate = Gate(monkeypatch, session, 3)
    with Peer(session) as peer:
        peer.ask({**ASK, "id": 1})
        gate.wait()
        peer.ask(*({**ASK, "id": name} for name in (2, 3, 4)), cancel(1), cancel(4))
        gate.open()
        events = peer.end()
    assert [event["id"] for event in events] == [1, 2, 3, 4, 1, 4]
    assert [event["event"] for event in events] == ["result"] * 3 + ["error"] + ["result"] * 2
    assert events[-2:] == [told(1, False), told(4, True)]


def reading(content: bytes, arrived=lambda one: None) -> Channel:
    """A channel from a file of that content."""
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(content)
        file.seek(0)
        return Channel(os.dup(file.fileno()), -1, arrived)


def received(source: Channel) -> list[Line]:
    return list(iter(source.receive, None))


@pytest.mark.parametrize(("length", "most"), [(1, channel.MAX_WAITING), (100, 11), (999, 2), (1000, 2)])
def test_what_waits_is_bounded(monkeypatch, length, most):
    monkeypatch.setattr(channel, "MAX_LINE_BYTES", 1000)
    arrived: list[Line] = []
    content = b"x" * (length - 1) + b"\n"
    source = reading(content * 5000, arrived.append)
    for _ in range(3):
        source.look()
        assert len(source.waiting) == len(arrived) == most
    while source.receive():
        source.look()
        assert len(source.waiting) <= most
    assert [one.content for one in arrived] == [content] * 5000


def test_a_line_that_does_not_end_is_not_kept(monkeypatch):
    monkeypatch.setattr(channel, "MAX_LINE_BYTES", 1 << 20)
    source = reading(b"x" * (32 << 20))
    tracemalloc.start()
    (found,) = received(source)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(found.error) == "a line must have at most 1048576 bytes, found more; give the path of the picture"
    assert not found.content and peak_bytes < 4 << 20


def test_a_pipe_that_does_not_block_is_waited_for():
    """As a peer's may be that reads and writes its own end so."""
    pipe, peer = os.pipe()
    os.set_blocking(pipe, False)
    later = Timer(0.2, os.write, (peer, b"x\n"))
    later.start()
    found = Channel(pipe, -1, lambda one: None).receive()
    later.join()
    assert found and found.content == b"x\n"


def test_a_line_in_small_pieces_takes_no_more_memory():
    """A peer may write a byte at a time: what is kept of each must be that byte."""
    pipe, peer = os.pipe()
    source = Channel(pipe, -1, lambda one: None)
    tracemalloc.start()
    for _ in range(50_000):
        os.write(peer, b"xy")
        source.look()
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    os.close(peer)
    (found,) = received(source)
    os.close(pipe)
    assert found.content == b"xy" * 50_000 and peak_bytes < 400_000


def test_what_was_cancelled_takes_no_room(monkeypatch):
    monkeypatch.setattr(channel, "MAX_LINE_BYTES", 1000)
    source = reading(b"x" * 999 + b"\n" + b"y" * 999 + b"\n" + b"z\n", lambda one: None)
    source.look()
    assert len(source.waiting) == 2
    source.waiting[0].give_up(Cancelled())
    source.look()
    assert len(source.waiting) == 3


def test_too_little_memory_for_a_line_is_its_error_alone(monkeypatch):
    class Small(bytearray):
        def __iadd__(self, piece):
            if len(self) + len(piece) > 100:
                raise MemoryError
            return super().__iadd__(piece)

    source = reading(b"a\n" + b"b" * 200 + b"\nc\n")
    begin = Line.__init__
    monkeypatch.setattr(Line, "__init__", lambda self, content: begin(self, Small(content)))
    source._begun = Line(bytearray())
    first, second, third = received(source)
    assert (first.content, third.content, second.content) == (b"a\n", b"c\n", b"")
    assert isinstance(second.error, MemoryError)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=40).map(lambda found: found.replace(b"a", b"\n"))))
def test_lines_do_not_depend_on_how_they_come(pieces):
    pipe, peer = os.pipe()
    source = Channel(pipe, -1, lambda one: None)
    for piece in pieces:
        os.write(peer, piece)
        source.look()
    os.close(peer)
    found = [bytes(one.content) for one in received(source)]
    os.close(pipe)
    *ended, rest = b"".join(pieces).split(b"\n")
    assert found == [one + b"\n" for one in ended] + [rest] * bool(rest)


# --- the process ----------------------------------------------------------------------------------------------------


def test_a_process_is_cancelled_and_goes_on(golden_bundle, tmp_path):
    out = tmp_path / "out.png"
    with process(golden_bundle("m3")) as serving:
        assert json.loads(serving.stdout.readline())["event"] == "ready"
        serving.stdin.write(line({**PICTURE, "id": 1, "stream": True, "out": str(out)}))
        serving.stdin.flush()
        assert [json.loads(serving.stdout.readline())["event"] for _ in range(2)] == ["prompt", "progress"]
        serving.stdin.write(line(cancel(1)) + line({**ASK, "id": 2, "image": str(COM.image)}))
        serving.stdin.close()
        *steps, lost, answer, last = map(json.loads, serving.stdout.read().splitlines())
        assert (serving.wait(SECONDS), serving.stderr.read()) == (0, b"")
    assert (lost, answer) == (cancelled(1), told(1, True))
    assert len(steps) < 1000
    assert last["token_ids"] == COM.record["output_ids"][:4]
    assert list(tmp_path.iterdir()) == []


def test_a_signal_ends_the_process_that_works_and_has_more_to_do(golden_bundle, tmp_path):
    with process(golden_bundle("m3")) as serving:
        assert json.loads(serving.stdout.readline())["event"] == "ready"
        asked = {**PICTURE, "stream": True, "previews": True, "out": str(tmp_path / "out.png")}
        serving.stdin.write(line(asked) * 3)
        serving.stdin.flush()
        assert [json.loads(serving.stdout.readline())["event"] for _ in range(2)] == ["prompt", "progress"]
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(SECONDS) == 128 + signal.SIGTERM
        assert serving.stderr.read() == b"error: interrupted\n"
    assert list(tmp_path.iterdir()) == []
