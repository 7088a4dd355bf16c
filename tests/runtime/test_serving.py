"""`healthgpt-edge serve`: what a line gets is what the commands give, and no line ends the process."""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from command import run, run_closed
from dicom_samples import SECRET, dicom, real_file
from golden_cases import Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peer import ASK, QUESTION, line, process

from healthgpt_edge import load, read_study
from healthgpt_edge.commands.serve import serve
from healthgpt_edge.errors import (
    BundleError,
    Cancelled,
    ExecutorError,
    GenerationError,
    ImageError,
    OptionError,
    PromptError,
)
from healthgpt_edge.images import read_image
from healthgpt_edge.serving import Server, channel

COM, GEN = Case("m3_com_wide"), Case("m3_gen_wide")
TIMED = {"event", "id", "timings_ms"}


@pytest.fixture(scope="module")
def session(golden_bundle):
    return load(golden_bundle("m3"), threads=1)


def events(session, *requests: dict[str, Any] | bytes) -> list[dict[str, Any]]:
    """What the peer reads after the first line."""
    with tempfile.TemporaryFile(buffering=0) as source, tempfile.TemporaryFile() as target:
        source.write(b"".join(map(line, requests)))
        source.seek(0)
        Server(session, source.fileno(), target.fileno()).run()
        target.seek(0)
        *written, rest = target.read().split(b"\n")
    assert all(one.isascii() for one in written) and not rest
    ready, *others = map(json.loads, written)
    assert ready["event"] == "ready" and ready["executor"] == session.executor.name
    return others


def result(session, **request: Any) -> dict[str, Any]:
    (event,) = events(session, request)
    assert event["event"] == "result", event
    return event


def refusal(session, request: dict[str, Any] | bytes) -> str:
    """The error of a request that is between two good ones."""
    before, refused, after = events(session, {**ASK, "id": 1}, request, {**ASK, "id": 2})
    assert (before["event"], before["id"], after["event"], after["id"]) == ("result", 1, "result", 2)
    assert before["token_ids"] == after["token_ids"]
    assert set(refused) == {"event", "id", "error", "kind"} and refused["event"] == "error"
    assert refused["error"].isprintable()
    return refused["error"]


def encoded(path: Path | str) -> str:
    return base64.b64encode(Path(path).read_bytes()).decode()


# --- what requests give ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.8, "top_p": 0.9, "top_k": 5, "seed": 7}, {"image": str(COM.image), "certify": True}],
    ids=["words", "sampled", "certified"],
)
def test_an_answer_is_that_of_the_command(session, golden_bundle, options):
    options = {"question": COM.question, "max_new_tokens": 12, "draft": "none", **options}
    words = [(f"--{name.replace('_', '-')}", *([] if value is True else [value])) for name, value in options.items()]
    expected = run("answer", golden_bundle("m3"), "--threads", 1, "--json", *(word for one in words for word in one))
    found = result(session, task="answer", id="x", **options)
    assert found["id"] == "x"
    assert set(found) == set(expected.json) | {"event", "id"}
    assert all(found[name] == expected.json[name] for name in set(found) - TIMED)


def test_an_answer_is_the_original_s(session):
    asked = {"task": "answer", "question": COM.question, "max_new_tokens": COM.max_new_tokens}
    for image in ({"image": str(COM.image)}, {"image_base64": encoded(COM.image)}):
        assert result(session, **asked, **image)["token_ids"] == COM.record["output_ids"]


def test_a_picture_is_that_of_the_command(session, golden_bundle, tmp_path):
    words = ["--instruction", GEN.question, "--image", GEN.image, "--out", tmp_path / "cli.png", "--threads", 1]
    expected = run("generate", golden_bundle("m3"), *words, "--json").json
    asked = {"task": "generate", "instruction": GEN.question}
    inline = result(session, **asked, image=str(GEN.image))
    written = result(session, **asked, image_base64=encoded(GEN.image), out=str(tmp_path / "served.png"))
    assert expected["codes"] == inline["codes"] == written["codes"] == GEN.record["vq_indices"]
    assert set(written) == set(expected) | {"event", "id"}
    assert set(inline) == set(written) - {"image"} | {"image_base64"}
    png = (tmp_path / "cli.png").read_bytes()
    assert base64.b64decode(inline["image_base64"]) == (tmp_path / "served.png").read_bytes() == png
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cli.png", "served.png"]


def test_a_dicom_file_by_its_path_and_in_the_line(session, tmp_path, monkeypatch):
    path = tmp_path / "cine.dcm"
    path.write_bytes(dicom(np.arange(2 * 16 * 24, dtype=np.uint16).reshape(2, 16, 24)))
    shown = []
    answering = session.answering
    monkeypatch.setattr(
        session, "answering", lambda request, on_text: shown.append(request.image) or answering(request, on_text)
    )
    for image in ({"image": str(path)}, {"image_base64": encoded(path)}):
        result(session, **ASK, frame=1, window=[500, 300.5], **image)
    expected = np.asarray(read_image(path, frame=1, window=(500, 300.5)))
    assert not any(np.array_equal(expected, read_image(path, frame=frame)) for frame in (0, 1))
    assert all(np.array_equal(picture, expected) for picture in shown) and len(shown) == 2


def test_a_picture_may_belong_to_the_study_of_one_in_the_line(session, tmp_path):
    source, out = real_file("CT_small.dcm"), tmp_path / "out.dcm"
    made = result(session, task="generate", instruction="Make it.", image_base64=encoded(source), out=str(out))
    assert made["image"] == str(out)
    found, expected = (read_study(path).dataset for path in (out, source))
    assert found.StudyInstanceUID == expected.StudyInstanceUID


def test_an_answer_may_go_to_a_report_of_its_study(session, tmp_path):
    source, out = real_file("CT_small.dcm"), tmp_path / "report.dcm"
    said = result(session, **ASK, image_base64=encoded(source), out=str(out))
    assert said["report"] == str(out)
    report = pydicom.dcmread(out)
    assert report.StudyInstanceUID == read_study(source).dataset.StudyInstanceUID
    texts = [item.TextValue for item in report.ContentSequence[-1].ContentSequence]
    # A model of random weights writes control characters, too, which DICOM does not allow.
    assert texts == [ASK["question"], said["text"].replace("\x03", "\ufffd") or "(no words)"]


def test_pieces_come_before_the_result_and_are_its_text(session):
    asked = {"task": "answer", "question": COM.question, "image": str(COM.image), "max_new_tokens": 40}
    prompt, *pieces, last = events(session, {**asked, "id": 5, "stream": True})
    read = prompt["tokens"]
    assert prompt == {"event": "prompt", "id": 5, "tokens": read, "of": read} and read > len(last["prompt_ids"])
    assert len(pieces) > 5
    assert all(set(piece) == {"event", "id", "text"} for piece in pieces)
    assert {(piece["event"], piece["id"]) for piece in pieces} == {("text", 5)}
    assert "".join(piece["text"] for piece in pieces) == last["text"] == result(session, **asked)["text"]
    assert (last["event"], last["id"]) == ("result", 5)


def test_progress_of_a_picture(session):
    _, *steps, last = events(session, {"task": "generate", "instruction": GEN.question, "stream": True, "seed": 1})
    assert [step["tokens"] for step in steps] == list(range(1, len(last["token_ids"]) + 1))
    assert {(step["event"], step["id"], step["codes"]) for step in steps} == {("progress", None, 1024)}


@pytest.mark.parametrize("name", [7, -1, 2**64 - 1, 0.25, "", "ä\ud800\n"])
def test_an_id_comes_back_as_it_was(session, name):
    for request in (ASK, {"task": "answer"}):
        (event,) = events(session, {**request, "id": name})
        assert event["id"] == name and type(event["id"]) is type(name)


def test_lines_may_end_as_they_like(session):
    last = json.dumps(ASK).encode()
    found = events(session, last + b"\r\n", last + b" \n", last)
    assert [event["event"] for event in found] == ["result"] * 3
    assert events(session) == []


def test_what_is_kept_of_pictures_can_be_forgotten(golden_bundle):
    session = load(golden_bundle("m3"), tasks=("comprehension",), threads=1, keep_pictures_bytes=64 << 20)
    asked = {**ASK, "image": str(COM.image)}
    *first, forgotten, last = events(session, asked, asked, {"task": "forget", "id": 3}, asked)
    assert forgotten == {"event": "result", "id": 3}
    assert [event["reused_tokens"] > 0 for event in (*first, last)] == [False, True, False]


def test_previews_are_those_of_the_session(session, monkeypatch):
    monkeypatch.setattr("healthgpt_edge.previews._SHARE", float("inf"))
    shown: dict[int, np.ndarray] = {}
    made = session.generate(GEN.image, GEN.question, on_preview=lambda pixels, rows: shown.update({rows: pixels}))
    asked = {"task": "generate", "instruction": GEN.question, "image": str(GEN.image), "stream": True}
    _, *steps, last = events(session, {**asked, "id": 1, "previews": True})
    previews = [step for step in steps if step["event"] == "preview"]
    assert all(set(step) == {"event", "id", "rows", "image_base64"} and step["id"] == 1 for step in previews)
    assert [step["rows"] for step in previews] == list(shown) == list(range(1, 32))
    for step in previews:
        assert np.array_equal(read_image(base64.b64decode(step["image_base64"])), shown[step["rows"]])
    assert np.array_equal(read_image(base64.b64decode(last["image_base64"])), made.pixels)
    # Each comes when its row is full, and the other lines are as ever.
    others = [step for step in steps if step["event"] != "preview"]
    assert [step["tokens"] for step in others] == list(range(1, len(last["token_ids"]) + 1))
    assert steps.index(previews[0]) == others[31]["tokens"]


def test_previews_have_the_limit_of_others(session, monkeypatch):
    monkeypatch.setattr("healthgpt_edge.previews._SHARE", 0)
    asked = {"task": "generate", "instruction": GEN.question, "stream": True, "previews": True}
    assert sum(step["event"] == "preview" for step in events(session, asked)) == 1


def test_nothing_of_a_request_is_kept_while_the_next_is_waited_for(session, monkeypatch):
    alive: list[Any] = []
    answering, receive = session.answering, channel.Channel.receive
    asked = [line({**ASK, "image": str(COM.image)})] * 2
    source, peer = os.pipe()

    def remember(request, *callbacks):
        alive.append(weakref.ref(request.image))
        return answering(request, *callbacks)

    def watched(self, wait):
        assert [one() for one in alive] == [None] * len(alive)
        frame = sys._getframe(1)
        while Path(frame.f_code.co_filename).parent.name == "serving":
            assert QUESTION not in repr(frame.f_locals)
            frame = frame.f_back
        assert QUESTION not in repr(vars(self))
        os.write(peer, asked.pop()) if asked else os.close(peer)
        return receive(self, wait)

    monkeypatch.setattr(session, "answering", remember)
    monkeypatch.setattr(channel.Channel, "receive", watched)
    with Path(os.devnull).open("wb") as target:
        Server(session, source, target.fileno()).run()
    os.close(source)
    assert len(alive) == 2


# --- lines that are no requests -------------------------------------------------------------------------------------

BAD_LINES = {
    "empty": (b"\n", "a line must be a JSON object, at character 1: Expecting value"),
    "words": (b"answer me\n", "a line must be a JSON object, at character 0: Expecting value"),
    "cut short": (b'{"task": "answer"\n', "a line must be a JSON object, at character 18: Expecting ',' delimiter"),
    "two objects": (b"{} {}\n", "a line must be a JSON object, at character 3: Extra data"),
    "an array": (b"[{}]\n", "a line must be a JSON object, found an array"),
    "a string": (b'"answer"\n', "a line must be a JSON object, found a string"),
    "a number": (b"3\n", "a line must be a JSON object, found 3"),
    "null": (b"null\n", "a line must be a JSON object, found null"),
    "a control character": (b'{"task": "\0"}\n', "at character 10: Invalid control character at"),
    "not UTF-8": (b'{"task": "\xff"}\n', "a line must be UTF-8, found another byte at 10"),
    "UTF-16": ('{"task": 1}'.encode("utf-16-be") + b"\n", "a line must be a JSON object, at character 0"),
    "a byte order mark": (b"\xef\xbb\xbf{}\n", "at character 0: Unexpected UTF-8 BOM"),
    "deep": (b"[" * 200_000 + b"\n", "a line must be a JSON object, found one nested too deep"),
    "deep in a field": (b'{"id": ' + b'{"a":' * 200_000 + b"\n", "found one nested too deep"),
    "many values": (b'{"id": [' + b"[]," * (1 << 18) + b"[],[]]}\n", "a line must have at most 262144 commas"),
    "given twice": (b'{"task": "answer", "task": "generate"}\n', "'task' must be given once, found it again"),
    "not a number": (b'{"temperature": NaN}\n', "a number must be finite, found NaN"),
    "endless": (b'{"temperature": -Infinity}\n', "a number must be finite, found -Infinity"),
    "too large a number": (b'{"temperature": 1e999}\n', "a number must be finite, found 1e999"),
    "too large an integer": (
        b'{"seed": 18446744073709551616}\n',
        "must have at most 64 bits, found 18446744073709551616",
    ),
    "thousands of digits": (b'{"seed": ' + b"1" * 9999 + b"}\n", "must have at most 64 bits, found 1111"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_that_is_no_request(session, name):
    given, message = BAD_LINES[name]
    found = refusal(session, given)
    assert message in found and len(found) < 200
    (event,) = events(session, given)
    assert event["id"] is None


def test_a_line_that_is_too_long(session, monkeypatch):
    """The line after it is read from its start; one that just fits is no error."""
    monkeypatch.setattr(channel, "MAX_LINE_BYTES", 1000)
    fits = json.dumps(ASK).encode().ljust(999) + b"\n"
    longer = json.dumps(ASK).encode().ljust(1000) + b"\n"
    found = events(session, fits, longer, longer.strip() * 50 + b"\n", fits, b"x" * 5000)
    assert [event["event"] for event in found] == ["result", "error", "error", "result", "error"]
    assert refusal(session, longer) == "a line must have at most 1000 bytes, found more; give the path of the picture"


_NAMES = [
    "id",
    "task",
    "question",
    "instruction",
    "image_base64",
    "frame",
    "window",
    "seed",
    "temperature",
    "stream",
    "previews",
]
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["answer", "generate", "cancel"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
_REQUESTS = st.dictionaries(st.sampled_from(_NAMES) | st.text(), _VALUES).map(line)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=_REQUESTS | st.binary().map(lambda found: found.replace(b"\n", b"") + b"\n"))
def test_whatever_a_line_is_it_gets_one_clear_error(session, monkeypatch, asked):
    def refuse(*_: object, **__: object) -> None:
        raise GenerationError("refused")

    with monkeypatch.context() as patch:
        patch.setattr(session, "answering", refuse)
        patch.setattr(session, "generating", refuse)
        (event,) = events(session, asked)
    assert event["event"] == "error" and event["error"].isprintable() and len(event["error"]) < 300
    assert not event["error"].startswith("internal error")


REFUSED = {
    "no task": ({}, "task must be one of answer, generate, cancel, forget, found none"),
    "unknown task": ({"task": "diagnose"}, "task must be one of answer, generate, cancel, forget, found 'diagnose'"),
    "task of no type": ({"task": 1}, "task must be a string, found 1"),
    "unknown field": ({**ASK, "min_p": 0.1}, "answer takes question, image, image_base64, frame, "),
    "field of another task": ({**ASK, "faithful": True}, "certify, out, stream, id, found 'faithful'"),
    "field of none": ({"task": "forget", "image": "a.png"}, "forget takes id, found 'image'"),
    "cancel of none": ({"task": "cancel"}, "cancel needs id, found none"),
    "cancel with more": ({"task": "cancel", "stream": True}, "cancel takes id, found 'stream'"),
    "previews of an answer": ({**ASK, "previews": True}, "out, stream, id, found 'previews'"),
    "previews alone": (
        {"task": "generate", "instruction": QUESTION, "previews": True},
        "previews come with stream, found them without it",
    ),
    "no question": ({"task": "answer"}, "answer needs question, found none"),
    "no instruction": ({"task": "generate"}, "generate needs instruction, found none"),
    "id: null": ({**ASK, "id": None}, "id must be a string or a number, found null"),
    "id: a boolean": ({**ASK, "id": True}, "id must be a string or a number, found true"),
    "id: an object": ({**ASK, "id": {}}, "id must be a string or a number, found an object"),
    "question: a list": ({**ASK, "question": [QUESTION]}, "question must be a string, found an array"),
    "question: empty": ({**ASK, "question": " "}, "the question must hold words, got none"),
    "question: not unicode": ({**ASK, "question": "\ud800"}, "text must be valid Unicode, got half a surrogate pair"),
    "seed: a fraction": ({**ASK, "seed": 1.0}, "seed must be an integer, found 1.0"),
    "seed: a boolean": ({**ASK, "seed": False}, "seed must be an integer, found false"),
    "seed: negative": ({**ASK, "seed": -1}, "seed must be 0 or above, found -1"),
    "temperature: in words": ({**ASK, "temperature": "hot"}, "temperature must be a number, found a string"),
    "temperature: negative": ({**ASK, "temperature": -1}, "temperature must be 0 or a positive number, found -1"),
    "top_p: zero": ({**ASK, "top_p": 0}, "top_p must be above 0 and at most 1, found 0"),
    "top_k: negative": ({**ASK, "top_k": -1}, "top_k must be 0 or above, found -1"),
    "limit: zero": ({**ASK, "max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    "limit: beyond": ({**ASK, "max_new_tokens": 2**63}, "prompt and new tokens must fit 4096 positions, got "),
    "draft": ({**ASK, "draft": "input"}, "draft must be one of auto, lookup, none, got 'input'"),
    "draft of a picture": (
        {"task": "generate", "instruction": QUESTION, "draft": "lookup"},
        "draft must be one of auto, input, jacobi, none, got 'lookup'",
    ),
    "stream": ({**ASK, "stream": "yes"}, "stream must be true or false, found a string"),
    "certify": ({**ASK, "certify": 1}, "certify must be true or false, found 1"),
    "window: words": ({**ASK, "window": "40,400"}, "window must be an array of two numbers, found a string"),
    "window: three": ({**ASK, "window": [1, 2, 3]}, "window must be an array of two numbers, found an array"),
    "window: without a picture": ({**ASK, "window": [1, 2]}, "frame and window need an image, got none"),
    "window: of a PNG": (
        {**ASK, "image": str(COM.image), "window": [1, 2]},
        "wide.png: window applies to DICOM and 16-bit grey pictures only",
    ),
    "image: missing": ({**ASK, "image": "/x/no.png"}, "no.png: cannot be opened: No such file or directory"),
    "image: no path": ({**ASK, "image": "a\0b"}, "cannot be opened: not a usable path"),
    "image: not unicode": ({**ASK, "image": "\ud800"}, "cannot be opened: not a usable path"),
    "image: a pipe": ({**ASK, "image": "/dev/zero"}, "zero: expected a file, found a device or pipe"),
    "image: twice": (
        {**ASK, "image": str(COM.image), "image_base64": ""},
        "a request takes image or image_base64, found both",
    ),
    "base64: empty": ({**ASK, "image_base64": ""}, "picture: expected a picture, found an empty file"),
    "base64: other characters": ({**ASK, "image_base64": "AB-_"}, "image_base64 must be base64 without line breaks"),
    "base64: a line break": (
        {**ASK, "image_base64": "AAAA\nAAAA"},
        "image_base64 must be base64 without line breaks",
    ),
    "base64: beyond ASCII": ({**ASK, "image_base64": "ÄÄÄÄ"}, "image_base64 must be base64 without line breaks"),
    "base64: cut short": ({**ASK, "image_base64": "AAA"}, "image_base64 must be base64 without line breaks"),
    "base64: no picture": (
        {**ASK, "image_base64": "AAAA"},
        "picture: expected PNG, JPEG or DICOM, found another format",
    ),
    "base64: half a PNG": (
        {**ASK, "image_base64": encoded(COM.image)[:400]},
        "picture: cannot be read as PNG: ",
    ),
    "picture: free, and too few tokens": (
        {"task": "generate", "instruction": QUESTION, "max_new_tokens": 3, "faithful": True},
        "a picture needs exactly 1024 codes, the model gave 2",
    ),
    "picture: too few tokens": (
        {"task": "generate", "instruction": QUESTION, "max_new_tokens": 9},
        "max_new_tokens must be at least 1025 for 1024 codes, got 9",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_is_refused(session, name):
    request, message = REFUSED[name]
    assert message in refusal(session, request)


OUTS = {
    "jpg": ("out.jpg", "out must be a .png or .dcm file, got 'out.jpg'"),
    "of no picture": ("out.dcm", "out as .dcm takes patient and study from image, which is missing"),
    "no folder": ("none/out.png", "the folder to hold 'out.png' does not exist"),
    "a folder": ("folder.png", "out must be a file, 'folder.png' is a folder"),
    "no path": ("a\0b.png", "out must be a usable path, got 'a\\x00b.png'"),
    "not unicode": ("\ud800.png", "out must be a usable path, got '\\ud800.png'"),
}


@pytest.mark.parametrize("name", OUTS)
def test_an_out_that_cannot_be_written_is_refused_before_the_work(session, tmp_path, monkeypatch, name):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(session, "generating", None)
    out, message = OUTS[name]
    request = {"task": "generate", "instruction": QUESTION, "out": f"{tmp_path}/{out}"}
    assert refusal(session, request) == message
    request = {"task": "answer", "question": QUESTION, "out": f"{tmp_path}/out.png"}
    assert refusal(session, request) == "out must be a .dcm file, got 'out.png'"
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_an_error_of_ours_names_its_place_and_not_what_was_asked(session, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise KeyError(SECRET)

    with monkeypatch.context() as patch:
        patch.setattr(session, "generating", fail)
        message = refusal(session, {"task": "generate", "instruction": SECRET})
    assert message.startswith("internal error: KeyError at test_serving.py:")
    assert SECRET not in message


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OptionError("x"), "request"),
        (PromptError("x"), "words"),
        (ImageError("x"), "picture"),
        (GenerationError("x"), "model"),
        (BundleError("x"), "bundle"),
        (ExecutorError("x"), "machine"),
        (MemoryError(), "machine"),
        (OSError(28, "No space left on device"), "machine"),
        (Cancelled(), "cancelled"),
        (KeyError("x"), "internal"),
    ],
)
def test_errors_have_a_kind_for_programs(session, monkeypatch, error, kind):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(session, "generating", fail)
    (said,) = events(session, {"task": "generate", "instruction": "x"})
    assert (said["event"], said["kind"]) == ("error", kind)


@pytest.mark.parametrize(
    ("place", "error", "kind", "message"),
    [
        ("files.os.fsync", OSError(28, "No space left on device"), "machine", "cannot be written: No space left"),
        ("files.os.fsync", OSError(1, "Operation not permitted"), "picture", "cannot be written: Operation not"),
        ("images.stat.S_ISREG", OSError(24, "Too many open files"), "machine", "cannot be opened: Too many open files"),
        ("images._to_rgb", OSError(5, "Input/output error"), "machine", "cannot be read as PNG: Input/output error"),
        ("images._to_rgb", OSError("truncated"), "picture", "cannot be read as PNG: damaged or cut short"),
        ("images._to_rgb", MemoryError(), "machine", "there is not enough memory to read it"),
    ],
)
def test_what_the_machine_lacks_is_not_the_pictures_fault(session, tmp_path, monkeypatch, place, error, kind, message):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(f"healthgpt_edge.{place}", fail)
    request = {"task": "generate", "instruction": "x", "image": str(GEN.image), "out": f"{tmp_path}/out.png"}
    (said,) = events(session, request)
    assert said["kind"] == kind and message in said["error"]


def test_too_little_memory_is_an_error_of_that_request(session, monkeypatch):
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(session, "generating", exhausted)
    assert refusal(session, {"task": "generate", "instruction": "x"}) == "there is not enough memory"


# --- the process ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [True, False])
def test_requests_that_cannot_be_done_together_are_not_without_a_word(golden_bundle, monkeypatch, capsys, grouped):
    """Said once, before the first request; stdout stays the peer's."""
    monkeypatch.setattr(
        "healthgpt_edge.session.sequences_agree", lambda executor, task: grouped or task == "generation"
    )
    monkeypatch.setattr("healthgpt_edge.serving.Server.run", lambda server: None)
    with Path(os.devnull).open() as source, Path(os.devnull).open("w") as target:
        monkeypatch.setattr(sys, "stdin", source)
        monkeypatch.setattr(sys, "stdout", target)
        serve(golden_bundle("m3"), together=2, threads=1, verify=False)
    said = capsys.readouterr().err
    assert ("requests are done one by one" in said) == (not grouped)


def test_drafts_are_tested_before_the_first_request(golden_bundle, monkeypatch):
    """Not in the midst of somebody's answer."""
    tested: list[str] = []
    monkeypatch.setattr("healthgpt_edge.drafting.drafts.rows_agree", lambda executor, task: not tested.append(task))
    monkeypatch.setattr("healthgpt_edge.serving.Server.run", lambda server: tested.append("ready"))
    with Path(os.devnull).open() as source, Path(os.devnull).open("w") as target:
        monkeypatch.setattr(sys, "stdin", source)
        monkeypatch.setattr(sys, "stdout", target)
        serve(golden_bundle("m3"), threads=1, verify=False)
    assert sorted(tested[:-1]) == ["comprehension", "generation"] and tested[-1] == "ready"


def test_the_process_ends_with_its_requests(golden_bundle):
    """With 0; and its stderr says nothing of what it was asked, however wrong that is."""
    broken = dicom(np.zeros((8, 8), np.uint16), PatientName=SECRET)[:-60]
    requests = [
        {**ASK, "id": 1, "image": str(COM.image)},
        {**ASK, "question": SECRET, "image_base64": base64.b64encode(broken).decode()},
        {**ASK, "question": SECRET, SECRET: 1},
        f'{{"question": "{SECRET}'.encode() + b"\n",
    ]
    done = process(golden_bundle("m3"), "--keep-pictures", "64")
    output, errors = done.communicate(b"".join(map(line, requests)), timeout=120)
    assert (done.returncode, errors) == (0, b"")
    ready, first, *others = map(json.loads, output.splitlines())
    assert ready == {
        "event": "ready",
        "protocol": 1,
        "version": ready["version"],
        "executor": "onnx-cpu+kernels",
        "tasks": ["answer", "generate"],
        "together": 1,
    }
    assert first["token_ids"] == COM.record["output_ids"][:4]
    assert [event["event"] for event in others] == ["error"] * 3
    assert [event["kind"] for event in others] == ["picture", "request", "request"]
    assert SECRET not in others[0]["error"]


def test_without_stdin(tmp_path):
    outcome = run_closed(0, "serve", tmp_path)
    assert (outcome.code, outcome.output) == (2, "")
    assert outcome.errors == "error: serve reads requests from stdin, found it closed\n"


def test_a_signal_ends_the_process_that_waits(golden_bundle):
    with process(golden_bundle("m3")) as waiting:
        assert json.loads(waiting.stdout.readline())["event"] == "ready"
        waiting.send_signal(signal.SIGTERM)
        assert waiting.wait(60) == 128 + signal.SIGTERM
        assert (waiting.stdout.read(), waiting.stderr.read()) == (b"", b"error: interrupted\n")


def test_a_peer_that_is_gone_ends_the_process(golden_bundle):
    with process(golden_bundle("m3")) as left:
        assert json.loads(left.stdout.readline())["event"] == "ready"
        left.stdout.close()
        left.stdin.write(line({**ASK, "stream": True}) * 2)
        left.stdin.flush()
        assert left.wait(60) == 0
        assert left.stderr.read() == b""
