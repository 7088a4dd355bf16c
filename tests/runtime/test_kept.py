"""Kept pictures in a file: what comes back is what was kept, and a file that is anything else is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import run
from dicom_samples import real_file
from golden_cases import Case

from healthgpt_edge import load
from healthgpt_edge.errors import ExecutorError, KeptError
from healthgpt_edge.kept import MAX_HEADER_BYTES, MAX_PICTURES, read_kept, write_kept
from healthgpt_edge.prefixes import Prefix

COM = Case("m3_com_wide")
OTHER = Case("m3_com_square")
QUESTION = "What is in the image?"
LIMIT_BYTES = 64 << 20
MAGIC = b"healthgpt-edge kept pictures 1\n"


def keeping(golden_bundle, **options):
    options = {"tasks": ("comprehension",), "threads": 1, "keep_pictures_bytes": LIMIT_BYTES} | options
    return load(golden_bundle("m3"), **options)


@pytest.fixture(scope="module")
def session(golden_bundle):
    return keeping(golden_bundle)


@pytest.fixture(scope="module")
def kept(session, tmp_path_factory) -> bytes:
    """A file of one picture."""
    path = tmp_path_factory.mktemp("kept") / "kept"
    session.answer(COM.image, QUESTION, max_new_tokens=1)
    session.save_pictures(path)
    return path.read_bytes()


def refusal(session, path: Path) -> str:
    before = session.prefixes.kept()
    with pytest.raises(KeptError) as caught:
        session.restore_pictures(path)
    assert session.prefixes.kept() == before
    return str(caught.value)


# --- what comes back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", [True, False])
def test_another_session_goes_on_with_the_very_bits(golden_bundle, tmp_path, kernels):
    """Two pictures, the answers and every cached number."""
    first, second = (keeping(golden_bundle, kernels=kernels) for _ in range(2))
    for case in (COM, OTHER):
        first.answer(case.image, case.question, max_new_tokens=3)
    first.save_pictures(tmp_path / "kept")
    expected = [first.answer(case.image, QUESTION, max_new_tokens=20) for case in (COM, OTHER)]
    second.restore_pictures(tmp_path / "kept")
    answers = [second.answer(case.image, QUESTION, max_new_tokens=20) for case in (COM, OTHER)]
    assert [one.token_ids for one in answers] == [one.token_ids for one in expected]
    assert [one.reused_tokens for one in answers] == [one.reused_tokens for one in expected]
    assert all(one.reused_tokens > 0 and one.timings_ms["vision"] == 0 for one in answers)
    second.save_pictures(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "kept").read_bytes()


def test_a_file_is_written_whole_and_for_its_owner_alone(session, kept, tmp_path):
    path = tmp_path / "kept"
    path.touch(mode=0o644)
    session.save_pictures(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() == kept and list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeptError, match=r"'folder' cannot be written: Is a directory"):
        (tmp_path / "folder").mkdir()
        session.save_pictures(tmp_path / "folder")
    with pytest.raises(KeptError, match=r"'kept' cannot be written: No such file or directory"):
        session.save_pictures(tmp_path / "none" / "kept")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["folder", "kept"]


def test_a_command_keeps_a_picture_for_the_next(golden_bundle, tmp_path):
    words = ["answer", golden_bundle("m3"), "--image", COM.image, "--max-new-tokens", "8", "--threads", "1", "--json"]
    plain = run(*words, "--question", QUESTION).json
    keep = ["--question", QUESTION, "--keep", tmp_path / "kept"]
    answers = [run(*words, *keep).json for _ in range(2)]
    assert [one["token_ids"] for one in answers] == [plain["token_ids"]] * 2
    assert answers[0]["reused_tokens"] == 0 < answers[1]["reused_tokens"]
    assert list(tmp_path.iterdir()) == [tmp_path / "kept"]


def test_of_more_pictures_than_a_file_may_hold_the_last_are_written(session, kept, tmp_path, monkeypatch):
    """Otherwise it could not be read again."""
    manifest, executor = session.bundle.manifest, session.executor.name
    (tmp_path / "kept").write_bytes(kept)
    ((prefix, caches),) = read_kept(tmp_path / "kept", manifest, executor, LIMIT_BYTES)
    monkeypatch.setattr("healthgpt_edge.kept.MAX_PICTURES", 2)
    pictures = [(prefix._replace(pixels=digit * 64), caches) for digit in "0123"]
    write_kept(tmp_path / "many", manifest, executor, pictures)
    found = read_kept(tmp_path / "many", manifest, executor, LIMIT_BYTES)
    assert [prefix.pixels[0] for prefix, _ in found] == ["2", "3"]


def test_caches_that_are_not_those_of_the_prefix_are_not_written(session, kept, tmp_path):
    """Otherwise the file could not be read again."""
    manifest, executor = session.bundle.manifest, session.executor.name
    (tmp_path / "kept").write_bytes(kept)
    ((prefix, caches),) = read_kept(tmp_path / "kept", manifest, executor, LIMIT_BYTES)
    name, cache = next(iter(caches.items()))
    for wrong in (cache[..., :-1], cache.astype(np.float64)):
        expected = re.escape(f"cache {name} must be float32 {cache.shape}, found {wrong.dtype} {wrong.shape}")
        with pytest.raises(KeptError, match=expected):
            write_kept(tmp_path / "other", manifest, executor, [(prefix, {**caches, name: wrong})])
    assert list(tmp_path.iterdir()) == [tmp_path / "kept"]


def test_where_nothing_is_kept_nothing_is_written(golden_bundle, tmp_path):
    session = keeping(golden_bundle, keep_pictures_bytes=1)
    session.answer(COM.image, QUESTION, max_new_tokens=1)
    with pytest.raises(KeptError, match="no picture is kept, within keep_pictures_bytes=1"):
        session.save_pictures(tmp_path / "kept")
    assert not list(tmp_path.iterdir())


def test_a_command_says_that_a_picture_is_too_large_to_keep(golden_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("healthgpt_edge.commands.answer._ONE_PICTURE_BYTES", 1)
    words = ("--image", COM.image, "--question", QUESTION, "--max-new-tokens", 1, "--threads", 1)
    outcome = run("answer", golden_bundle("m3"), *words, "--keep", tmp_path / "kept")
    assert outcome.code == 0 and outcome.errors.startswith("note: nothing was kept: what was read of the picture takes")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_kept_costs_no_answer(golden_bundle, tmp_path, monkeypatch):
    def full(*arguments):
        raise KeptError("'kept' cannot be written: No space left on device")

    monkeypatch.setattr("healthgpt_edge.session.write_kept", full)
    study = real_file("CT_small.dcm")
    words = ("--image", study, "--question", QUESTION, "--max-new-tokens", 1, "--threads", 1, "--json")
    outcome = run("answer", golden_bundle("m3"), *words, "--keep", tmp_path / "kept", "--out", tmp_path / "report.dcm")
    assert (outcome.code, outcome.errors) == (2, "error: 'kept' cannot be written: No space left on device\n")
    assert outcome.json["report"] == str(tmp_path / "report.dcm") and (tmp_path / "report.dcm").is_file()


def test_a_session_without_the_task_takes_nothing(golden_bundle, kept, tmp_path):
    (tmp_path / "kept").write_bytes(kept)
    other = keeping(golden_bundle, tasks=("generation",))
    with pytest.raises(ExecutorError, match="opened for generation, not for comprehension"):
        other.restore_pictures(tmp_path / "kept")
    assert other.prefixes.kept() == []


# --- what is refused ------------------------------------------------------------------------------------------------


def edited(kept: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The file with another header, and a hash that fits."""
    start = len(MAGIC) + 8
    end = start + int.from_bytes(kept[len(MAGIC) : start], "little")
    fields = json.loads(kept[start:end])
    changed = change(fields)
    header = json.dumps(fields if changed is None else changed).encode()
    body = MAGIC + len(header).to_bytes(8, "little") + header + kept[end:-32]
    return body + hashlib.sha256(body).digest()


def picture(**fields: object) -> Callable[[bytes], bytes]:
    return lambda kept: edited(kept, lambda header: header["pictures"][0].update(fields))


def header(**fields: object) -> Callable[[bytes], bytes]:
    return lambda kept: edited(kept, lambda header: header.update(fields))


def flipped(kept: bytes, at: int) -> bytes:
    return kept[:at] + bytes([kept[at] ^ 1]) + kept[at + 1 :]


LISTS = "'kept': the header must name bundle, executor and pictures, found something else"
REFUSED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda kept: b"", "'kept' must begin with 'healthgpt-edge kept pictures 1'"),
    "another kind": (lambda kept: b"\x80\x04" + kept, "'kept' must begin with 'healthgpt-edge kept pictures 1'"),
    "another version": (
        lambda kept: kept.replace(b"pictures 1\n", b"pictures 2\n", 1),
        "'kept' must begin with 'healthgpt-edge kept pictures 1'",
    ),
    "header too large": (
        lambda kept: MAGIC + (1 << 62).to_bytes(8, "little") + kept[len(MAGIC) + 8 :],
        f"'kept': the header must be at most {MAX_HEADER_BYTES} bytes, found {1 << 62}",
    ),
    "no JSON": (lambda kept: flipped(kept, len(MAGIC) + 8), LISTS),
    "deep JSON": (lambda kept: MAGIC + (100_000).to_bytes(8, "little") + b"[" * 100_000, LISTS),
    "a list": (lambda kept: edited(kept, lambda fields: []), LISTS),
    "no pictures": (lambda kept: edited(kept, lambda fields: fields.pop("pictures") and None), LISTS),
    "pictures of a kind": (header(pictures={}), LISTS),
    "a picture of a kind": (header(pictures=["x"]), LISTS),
    "an unknown field": (picture(path="/"), LISTS),
    "another bundle": (header(bundle="0" * 64), "'kept' was kept by another bundle than this one"),
    "another executor": (
        header(executor="tensorrt\n"),
        "'kept' must be kept by onnx-cpu+kernels of healthgpt-edge 0.1.0, onnxruntime ",
    ),
    "another processor": (
        lambda kept: edited(kept, lambda fields: fields.update(executor=fields["executor"] + " sve")),
        "'kept' must be kept by onnx-cpu+kernels of healthgpt-edge 0.1.0, onnxruntime ",
    ),
    "too many": (
        lambda kept: edited(kept, lambda fields: fields.update(pictures=fields["pictures"] * (MAX_PICTURES + 2))),
        f"'kept' must hold at most {MAX_PICTURES} pictures, found {MAX_PICTURES + 2}",
    ),
    "unknown task": (picture(task="training"), "'kept': a picture's task must be comprehension or generation"),
    "task of a kind": (picture(task=[1]), "'kept': a picture's task must be comprehension or generation"),
    "no hash": (
        picture(pixels="../" * 21 + "x"),
        "'kept': a picture must be named by two SHA-256 of 64 digits, found something else",
    ),
    "no tokens": (picture(length=0), "'kept': a picture must have 1 to 4096 tokens, found 0"),
    "too many tokens": (picture(length=1 << 40), f"'kept': a picture must have 1 to 4096 tokens, found {1 << 40}"),
    "half a token": (picture(length=1.5), "'kept': a picture must have 1 to 4096 tokens, found 1.5"),
    "truth for a number": (picture(length=True), "'kept': a picture must have 1 to 4096 tokens, found True"),
    "cut": (lambda kept: kept[:-1], "'kept' must be {size} bytes, found {less}"),
    "more behind": (lambda kept: kept + b"x", "'kept' must be {size} bytes, found {more}"),
    "damaged": (lambda kept: flipped(kept, len(kept) - 100), "'kept' is damaged: its SHA-256 must be "),
    "damaged hash": (lambda kept: flipped(kept, len(kept) - 1), "'kept' is damaged: its SHA-256 must be "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_not_as_it_was_written_is_refused(session, kept, tmp_path, name):
    change, message = REFUSED[name]
    (tmp_path / "kept").write_bytes(change(kept))
    sizes = {"size": len(kept), "less": len(kept) - 1, "more": len(kept) + 1}
    assert refusal(session, tmp_path / "kept").startswith(message.format(**sizes) if "{size}" in message else message)


def test_every_flipped_bit_is_found(session, kept, tmp_path):
    """Wherever it is; but where it makes another picture of it, that is only found by its hash."""
    rng = np.random.default_rng(0)
    for at in [*range(0, 600, 7), *rng.integers(0, len(kept), 40).tolist()]:
        (tmp_path / "kept").write_bytes(flipped(kept, at))
        assert refusal(session, tmp_path / "kept")


def test_files_that_cannot_be_read(session, tmp_path):
    assert refusal(session, tmp_path / "none") == "'none' cannot be read: No such file or directory"
    assert refusal(session, tmp_path) == f"{tmp_path.name!r} cannot be read: Is a directory"
    assert refusal(session, Path("a\0b")) == "'a\\x00b' cannot be read: not a usable path"
    os.mkfifo(tmp_path / "pipe")
    assert refusal(session, tmp_path / "pipe") == "'pipe' must be a regular file"


def test_a_file_larger_than_what_may_be_kept_is_refused(golden_bundle, kept, tmp_path):
    (tmp_path / "kept").write_bytes(kept)
    small = keeping(golden_bundle, keep_pictures_bytes=1000)
    assert refusal(small, tmp_path / "kept").startswith("'kept' must fit keep_pictures_bytes=1000, found ")


def test_nothing_is_allocated_for_what_a_file_only_claims(session, kept, tmp_path, monkeypatch):
    def empty(*arguments):
        raise AssertionError("allocated before the size was checked")

    monkeypatch.setattr("healthgpt_edge.kept.np.empty", empty)
    (tmp_path / "kept").write_bytes(picture(length=4096)(kept))
    assert "must be" in refusal(session, tmp_path / "kept")


def test_many_short_pictures_take_no_more_than_the_limit(golden_bundle, tmp_path, monkeypatch):
    """Each gets a whole context, of which such a picture fills little."""
    session = keeping(golden_bundle, keep_pictures_bytes=2 << 20)
    manifest, executor = session.bundle.manifest, session.executor
    context = executor.context("comprehension", None)
    context.forward(np.arange(4))
    prefixes = [Prefix("comprehension", f"{number:064x}", "0" * 64, 4) for number in range(40)]
    write_kept(tmp_path / "kept", manifest, executor.name, [(prefix, context.caches(4)) for prefix in prefixes])
    made: weakref.WeakSet[Any] = weakref.WeakSet()
    open_context, most = executor.context, 0

    def counted(*arguments: Any) -> Any:
        nonlocal most
        made.add(opened := open_context(*arguments))
        most = max(most, len(made))
        return opened

    monkeypatch.setattr(executor, "context", counted)
    session.restore_pictures(tmp_path / "kept")
    kept = session.prefixes.kept()
    assert [prefix for prefix, _ in kept] == prefixes[-len(kept) :]
    assert sum(one.memory_bytes for _, one in kept) <= 2 << 20 and most <= len(kept) + 1 < len(prefixes)


def test_a_bundle_is_known_by_its_manifest(session, kept, tmp_path):
    (tmp_path / "kept").write_bytes(kept)
    manifest = session.bundle.manifest
    other = replace(manifest, decoding=replace(manifest.decoding, repetition_penalty=1.5))
    assert len(read_kept(tmp_path / "kept", manifest, session.executor.name, LIMIT_BYTES)) == 1
    with pytest.raises(KeptError, match="another bundle"):
        read_kept(tmp_path / "kept", other, session.executor.name, LIMIT_BYTES)
