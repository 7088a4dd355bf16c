"""Bundles on disk: what is read of them, and the message of every way in which one can be wrong."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from command import run
from sealed import seal

from healthgpt_edge.bundle import Bundle
from healthgpt_edge.errors import BundleError, ExecutorError, HealthGPTError
from healthgpt_edge.executors.contract import graph_values
from healthgpt_edge.executors.onnx import OnnxExecutor, value_of
from healthgpt_edge.executors.onnx_context import first_line
from healthgpt_edge.manifest import MAX_MANIFEST_BYTES, Manifest
from healthgpt_edge.session import load

SYSTEMS = ("m3", "phi4", "qwen")
PICTURE = np.zeros((9, 7, 3), np.uint8)


def copy_of(source: Path, target: Path) -> Path:
    """A copy whose files may be replaced, but not changed in place: they are links to the original's."""
    return Path(shutil.copytree(source, target, copy_function=os.link))


@pytest.fixture
def bundle(golden_bundle, tmp_path) -> Path:
    """A copy of the golden M3 bundle, to be damaged."""
    return copy_of(golden_bundle("m3"), tmp_path / "bundle")


def replace_bytes(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def flip(path: Path, at: float = 0.5) -> None:
    """Turn one bit over, `at` of the way through the file."""
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 4
    replace_bytes(path, bytes(data))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another manifest, with the hash of what it says now."""
    data = json.loads((path / "bundle.json").read_bytes())
    change(data)
    seal(data)
    replace_bytes(path / "bundle.json", json.dumps(data).encode())


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(BundleError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the manifest ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifest_data(golden_bundle) -> dict[str, Any]:
    return json.loads((golden_bundle("m3") / "bundle.json").read_bytes())


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_manifest_survives_writing_and_reading(golden_bundle, system):
    text = (golden_bundle(system) / "bundle.json").read_bytes()
    manifest = Manifest.from_json(text)
    assert manifest.to_json().encode() == text
    assert Manifest.from_json(manifest.to_json().encode()) == manifest


def test_what_the_manifest_of_m3_says(golden_bundle):
    manifest = Bundle.open(golden_bundle("m3")).manifest
    assert (manifest.template, manifest.precision, manifest.cache_precision) == ("phi3", "fp32", "fp32")
    assert (manifest.language.layers, manifest.language.vocab, manifest.language.max_positions) == (3, 478, 4096)
    assert (manifest.vision.image_size, manifest.vision.patches, manifest.vision.background) == (
        56,
        16,
        (122, 116, 104),
    )
    codes = manifest.codes
    assert (codes.start, codes.first, codes.count, codes.end, codes.newline) == (411, 412, 64, 476, 477)
    assert (codes.grid, codes.image_size) == (32, 256)
    assert (manifest.decoding.stop_ids, manifest.decoding.repetition_penalty) == ((400, 401, 407), 1.0)
    shapes = {name: (task.rank, task.experts, task.alpha, task.first_logit) for name, task in manifest.tasks.items()}
    assert shapes == {"comprehension": (8, 4, 16.0, 0), "generation": (16, 4, 32.0, 412)}
    assert set(manifest.tasks["comprehension"].graphs) == {"vision", "language"}
    assert set(manifest.tasks["generation"].graphs) == {"vision", "language", "vocabulary", "codes", "draft"}
    # Names of what it was made from, without the paths of the machine that made it.
    assert "/tmp" not in manifest.to_json() and str(golden_bundle("m3").parent) not in manifest.to_json()


def setting(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """An edit that sets the key at `path`, its names separated by slashes."""

    def change(data: dict[str, Any]) -> None:
        *folders, last = path.split("/")
        for name in folders:
            data = data[name]
        data[last] = value

    return change


def without(path: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        *folders, last = path.split("/")
        for name in folders:
            data = data[name]
        del data[last]

    return change


def listing(name: str) -> Callable[[dict[str, Any]], None]:
    """An edit that lists one more file."""
    return lambda data: data["files"].update({name: {"size": 1, "sha256": "0" * 64}})


MANIFEST_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no format": (without("format"), "bundle.json must name the format 'healthgpt-edge bundle'"),
    "another format": (setting("format", "zip"), "bundle.json must name the format 'healthgpt-edge bundle'"),
    "version of yesterday": (setting("version", 1), "bundle format version must be 2 or 4, found 1"),
    "version of tomorrow": (setting("version", 5), "bundle format version must be 2 or 4, found 5"),
    "version as text": (setting("version", "2"), "bundle format version must be 2 or 4, found '2'"),
    "version as a truth": (setting("version", True), "bundle format version must be 2 or 4, found True"),
    "version as a fraction": (setting("version", 2.0), "bundle.json: version must be int, found float"),
    "unknown key": (setting("plugins", []), "bundle.json has unknown keys ['plugins'] and lacks []"),
    "unknown key inside": (
        setting("language/window", 3),
        "bundle.json: language has unknown keys ['window'] and lacks []",
    ),
    "unknown key in a task": (
        setting("tasks/generation/scale", 3),
        "bundle.json: tasks.generation has unknown keys ['scale'] and lacks []",
    ),
    "unknown key of a file": (
        setting("files/tokenizer.json/mode", 7),
        "bundle.json: files.tokenizer.json has unknown keys ['mode'] and lacks []",
    ),
    "missing key": (without("decoding"), "bundle.json has unknown keys [] and lacks ['decoding']"),
    "missing key inside": (without("vision/patches"), "bundle.json: vision has unknown keys [] and lacks ['patches']"),
    "text for a number": (setting("language/layers", "3"), "bundle.json: language: layers must be int, found str"),
    "truth for a number": (setting("language/layers", True), "bundle.json: language: layers must be int, found bool"),
    "fraction for a number": (
        setting("language/layers", 3.0),
        "bundle.json: language: layers must be int, found float",
    ),
    "null for a number": (
        setting("language/layers", None),
        "bundle.json: language: layers must be int, found NoneType",
    ),
    "list for an object": (setting("language", []), "bundle.json: language must be an object, found list"),
    "object for a list": (setting("decoding/stop_ids", {}), "bundle.json: decoding: stop_ids must be"),
    "text in a list": (
        setting("decoding/stop_ids", [1, "2"]),
        "bundle.json: decoding: stop_ids must be int, found str",
    ),
    "list for a task": (setting("tasks/generation", []), "bundle.json: tasks.generation must be an object, found list"),
    "number for a text": (setting("template", 3), "bundle.json: template must be str, found int"),
    "no precision of ours": (
        setting("precision", "int2"),
        "precision must be one of fp32, fp16, bf16, int8, int4, found 'int2'",
    ),
    "no cache precision of ours": (
        setting("cache_precision", "int4"),
        "cache_precision must be one of fp32, fp16, int8, found 'int4'",
    ),
    "no layers": (setting("language/layers", 0), "layers must be between 1 and 1048576, found 0"),
    "negative layers": (setting("language/layers", -1), "layers must be between 1 and 1048576, found -1"),
    "a million layers": (setting("language/layers", 1 << 20), "layers must be at most 1024, found 1048576"),
    "absurd head size": (setting("language/head_dim", 1 << 40), "head_dim must be between 1 and 1048576, found 10995"),
    "absurd picture": (
        setting("vision/image_size", 1 << 21),
        "image_size must be between 1 and 1048576, found 2097152",
    ),
    "no block": (setting("block_size", 0), "block_size must be between 1 and 1048576, found 0"),
    "no rank": (setting("tasks/comprehension/rank", 0), "rank of comprehension must be between 1 and 1048576, found 0"),
    "less than no expert": (
        setting("tasks/generation/experts", -1),
        "experts of generation must be between 1 and 1048576, found -1",
    ),
    "no grid": (setting("codes/grid", 0), "grid must be between 1 and 1048576, found 0"),
    "background of two": (
        setting("vision/background", [1, 2]),
        "background must be 3 levels from 0 to 255, found [1, 2]",
    ),
    "background too bright": (setting("vision/background", [1, 2, 256]), "background must be 3 levels from 0 to 255"),
    "stop id outside": (setting("decoding/stop_ids", [478]), "stop ids must be between 0 and 477, found 478"),
    "negative stop id": (setting("decoding/stop_ids", [-1]), "stop ids must be between 0 and 477, found -1"),
    "penalty of zero": (setting("decoding/repetition_penalty", 0), "repetition_penalty must be between 0.01 and 100"),
    "endless penalty": (setting("decoding/repetition_penalty", 1e999), "bundle.json must be JSON"),
    "codes beyond the rows": (setting("codes/count", 67), "ids of codes must be below 478, found 478"),
    "newline beyond the rows": (setting("codes/newline", 478), "ids of codes must be below 478, found 478"),
    "end among the codes": (setting("codes/end", 475), "end must not be one of the codes, found 475"),
    "newline among the codes": (setting("codes/newline", 412), "newline must not be one of the codes, found 412"),
    "no tasks": (setting("tasks", {}), "tasks must be some of comprehension, generation, found []"),
    "unknown task": (
        lambda data: data["tasks"].update(drawing=data["tasks"]["comprehension"]),
        "tasks must be some of comprehension, generation, found ['comprehension', 'drawing', 'generation']",
    ),
    "generation without codes": (setting("codes", None), "a bundle with generation must describe its codes"),
    "task without a graph": (
        without("tasks/comprehension/graphs/vision"),
        "comprehension must have the graphs ['language', 'vision'], found ['language']",
    ),
    "graph of no known role": (
        setting("tasks/comprehension/graphs/audio", "tokenizer.json"),
        "comprehension must have the graphs ['language', 'vision'], found ['audio', 'language', 'vision']",
    ),
    "logits behind the codes": (
        setting("tasks/generation/first_logit", 413),
        "first_logit of generation must be between 0 and 412, found 413",
    ),
    "logits behind the newline": (
        setting("codes/newline", 410),
        "first_logit of generation must be between 0 and 410, found 412",
    ),
    "words left out": (
        setting("tasks/comprehension/first_logit", 1),
        "first_logit of comprehension must be between 0 and 0, found 1",
    ),
    "vocabulary left out": (
        without("tasks/generation/graphs/vocabulary"),
        "generation needs a vocabulary graph above row 0, found ['codes', 'draft', 'language', 'vision']",
    ),
    "unlisted graph": (
        setting("tasks/comprehension/graphs/vision", "other.onnx"),
        "every file in use must be listed, found 'other.onnx' unlisted",
    ),
    "unlisted tokenizer": (
        setting("tokenizer/file", "../tokenizer.json"),
        "every file in use must be listed, found '../tokenizer.json' unlisted",
    ),
    "negative size": (setting("files/tokenizer.json/size", -1), "the size of tokenizer.json must be 0 or above"),
    "short hash": (setting("files/tokenizer.json/sha256", "00"), "tokenizer.json must have a SHA-256, found '00'"),
    "hash in capitals": (setting("files/tokenizer.json/sha256", "A" * 64), "tokenizer.json must have a SHA-256"),
}


@pytest.mark.parametrize("name", MANIFEST_FAULTS)
def test_a_wrong_manifest_is_refused(manifest_data, name):
    change, message = MANIFEST_FAULTS[name]
    data = copy.deepcopy(manifest_data)
    change(data)
    assert message in refusal(lambda: Manifest.from_json(json.dumps(data).encode()))


def test_one_is_size_enough(manifest_data):
    """A plain LoRA has one expert, and an attention of one key head is sound."""
    data = copy.deepcopy(manifest_data)
    for path in ("tasks/generation/experts", "tasks/generation/rank", "language/kv_heads", "block_size"):
        setting(path, 1)(data)
    seal(data)
    assert Manifest.from_json(json.dumps(data).encode()).tasks["generation"].experts == 1


@pytest.mark.parametrize(
    "name",
    [
        "../base.bin",
        "weights/../../base.bin",
        "/etc/passwd",
        "..",
        "weights/..",
        "./base.bin",
        "weights//base.bin",
        "a/b/base.bin",
        "weights\\base.bin",
        "C:base.bin",
        "~/base.bin",
        ".hidden",
        "weights/.bin",
        "base.bin\n",
        "ba\0se.bin",
        "Base.bin",
        "bäse.bin",
        "base",
        "base.bin ",
        "",
    ],
)
def test_no_file_name_leaves_the_bundle(manifest_data, name):
    data = copy.deepcopy(manifest_data)
    listing(name)(data)
    message = refusal(lambda: Manifest.from_json(json.dumps(data).encode()))
    assert message == f"bundle.json: file names must stay inside the bundle, found {name!r}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "bundle.json must be JSON"),
        (b"{", "bundle.json must be JSON"),
        (b"\xff\xfe\x00", "bundle.json must be JSON"),
        (b"[" * 200_000, "bundle.json must be JSON"),
        (b'{"a":' * 100_000, "bundle.json must be JSON"),
        (b'{"version": ' + b"9" * 5000 + b"}", "bundle.json must be JSON"),
        (b"[]", "bundle.json must name the format"),
        (b"null", "bundle.json must name the format"),
        (b"{}", "bundle.json must name the format"),
        (b" " * (MAX_MANIFEST_BYTES + 1), f"bundle.json must be at most {MAX_MANIFEST_BYTES} bytes, found 1048577"),
    ],
    ids=["empty", "cut", "not-text", "deep-lists", "deep-objects", "long-number", "list", "null", "object", "huge"],
)
def test_what_is_no_manifest(text, message):
    assert message in refusal(lambda: Manifest.from_json(text))


def test_a_key_twice_and_numbers_that_are_none(manifest_data):
    text = json.dumps(manifest_data)
    for wrong in (
        text.replace('"version": 2', '"version": 2, "version": 2', 1),
        text.replace('"rank": 8', '"rank": 8, "rank": 8', 1),
        text.replace('"alpha": 16.0', '"alpha": NaN', 1),
        text.replace('"alpha": 16.0', '"alpha": -Infinity', 1),
    ):
        assert wrong != text
        assert refusal(lambda wrong=wrong: Manifest.from_json(wrong.encode())) == (
            "bundle.json must be JSON, without NaN and no key twice"
        )


def test_a_flipped_bit_of_a_manifest_says_the_same_or_is_refused(golden_bundle):
    """Never another exception, never another manifest: one wrong stop id, and every answer goes on."""
    text = (golden_bundle("m3") / "bundle.json").read_bytes()
    sound = Manifest.from_json(text)
    choose = random.Random(0)
    refused = 0
    for _ in range(400):
        data = bytearray(text)
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        try:
            assert Manifest.from_json(bytes(data)) == sound
        except BundleError:
            refused += 1
    assert refused > 300


def test_damage_of_a_manifest_is_named(manifest_data):
    data = copy.deepcopy(manifest_data)
    data["decoding"]["stop_ids"][0] -= 1
    message = refusal(lambda: Manifest.from_json(json.dumps(data).encode()))
    assert message.startswith(f"bundle.json is damaged: SHA-256 must be {data['own_sha256'][:16]}..., found ")


def test_a_manifest_without_its_hash_is_refused(manifest_data):
    data = copy.deepcopy(manifest_data)
    del data["own_sha256"]
    assert refusal(lambda: Manifest.from_json(json.dumps(data).encode())) == (
        "bundle.json has unknown keys [] and lacks ['own_sha256']"
    )
    data["own_sha256"] = ""
    message = refusal(lambda: Manifest.from_json(json.dumps(data).encode()))
    assert message.startswith("bundle.json is damaged: SHA-256 must be ..., found ")


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_sound_bundle_opens(bundle):
    opened = Bundle.open(bundle)
    assert opened.file("weights/base.bin") == bundle / "weights/base.bin"
    assert opened.graph("generation", "codes") == bundle / "generation.codes.onnx"
    sizes = {name: (bundle / name).stat().st_size for name in opened.manifest.files}
    assert {name: entry.size for name, entry in opened.manifest.files.items()} == sizes
    told: list[tuple[int, int]] = []
    assert opened.verify(on_bytes=lambda *counts: told.append(counts)) == sum(sizes.values())
    assert told == sorted(told) and told[-1] == (sum(sizes.values()),) * 2
    assert opened.verify(skip=("weights/",)) == sum(size for name, size in sizes.items() if "/" not in name)


def test_what_a_bundle_does_not_have(bundle):
    opened = Bundle.open(bundle, verify=False)
    for name in ("weights/other.bin", "../bundle.json", "bundle.json"):
        assert refusal(lambda name=name: opened.file(name)) == f"the bundle has no file {name!r}"
    message = refusal(lambda: opened.graph("drawing", "vision"))
    assert message == "the bundle has no task 'drawing', only comprehension, generation"
    message = refusal(lambda: opened.graph("comprehension", "codes"))
    assert message == "task comprehension has no graph 'codes', only language, vision"


FILES = {
    "graph": "comprehension.vision.onnx",
    "tokenizer": "tokenizer.json",
    "base weights": "weights/base.bin",
    "task weights": "weights/generation.bin",
}


@pytest.mark.parametrize("at", [0.0, 0.4999, 0.99999])
@pytest.mark.parametrize("kind", FILES)
def test_a_flipped_bit_is_damage(bundle, kind, at):
    name = FILES[kind]
    flip(bundle / name, at)
    message = refusal(lambda: Bundle.open(bundle))
    assert re.fullmatch(
        rf"file {re.escape(name)} is damaged: SHA-256 must be [0-9a-f]{{16}}\.\.\., found [0-9a-f]{{16}}\.\.\.", message
    )
    # Without the weights' hashes, all that runs or is parsed is checked still.
    if name.startswith("weights/"):
        Bundle.open(bundle, verify=False)
    else:
        assert refusal(lambda: Bundle.open(bundle, verify=False)) == message


def test_nothing_of_a_bundle_is_run_before_all_of_it_is_hashed(bundle, monkeypatch):
    monkeypatch.setattr("healthgpt_edge.session.open_executor", lambda *_: pytest.fail("opened"))
    flip(bundle / "weights/base.bin")
    assert "file weights/base.bin is damaged" in refusal(lambda: load(bundle))


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_another_size(bundle, kind):
    name = FILES[kind]
    data = (bundle / name).read_bytes()
    for other in (data[:-1], data + b"\0", b""):
        replace_bytes(bundle / name, other)
        message = f"file {name} must be {len(data)} bytes, found {len(other)}"
        assert refusal(lambda: Bundle.open(bundle, verify=False)) == message


def test_a_manifest_that_lies_about_a_size(bundle):
    size = (bundle / "tokenizer.json").stat().st_size
    edit(bundle, setting("files/tokenizer.json/size", size + 1))
    assert refusal(lambda: Bundle.open(bundle)) == f"file tokenizer.json must be {size + 1} bytes, found {size}"


def test_of_a_manifest_no_more_is_read_than_it_may_have(bundle):
    replace_bytes(bundle / "bundle.json", b"{")
    os.truncate(bundle / "bundle.json", 1 << 38)  # sparse, and more than any memory
    assert "bundle.json must be at most 1048576 bytes, found 1048577" in refusal(lambda: Bundle.open(bundle))


def outside(bundle: Path) -> Path:
    """A file beside the bundle with the content of its tokenizer."""
    return Path(shutil.copyfile(bundle / "tokenizer.json", bundle.parent / "outside.json"))


def link_a_file(bundle: Path) -> None:
    target = outside(bundle)
    (bundle / "tokenizer.json").unlink()
    (bundle / "tokenizer.json").symlink_to(target)


def link_a_folder(bundle: Path) -> None:
    shutil.move(bundle / "weights", bundle.parent / "weights")
    (bundle / "weights").symlink_to(bundle.parent / "weights")


def link_the_manifest(bundle: Path) -> None:
    shutil.move(bundle / "bundle.json", bundle.parent / "bundle.json")
    (bundle / "bundle.json").symlink_to(bundle.parent / "bundle.json")


def in_place_of(make: Callable[[Path], object], name: str) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        (bundle / name).unlink()
        make(bundle / name)

    return change


LISTING_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing graph": (
        lambda bundle: (bundle / "generation.codes.onnx").unlink(),
        "the bundle lacks generation.codes.onnx",
    ),
    "missing folder": (
        lambda bundle: shutil.rmtree(bundle / "weights"),
        "the bundle lacks weights/base.bin and 2 more",
    ),
    "missing manifest": (
        lambda bundle: (bundle / "bundle.json").unlink(),
        "'bundle' is not a bundle: it has no regular file bundle.json",
    ),
    "extra file": (
        lambda bundle: (bundle / "extra.bin").write_bytes(b""),
        "the bundle holds 'extra.bin', which its manifest does not list",
    ),
    "extra file in a folder": (
        lambda bundle: (bundle / "weights/extra\x1b[2J.bin").write_bytes(b""),
        r"the bundle holds 'weights/extra\x1b[2J.bin', which its manifest does not list",
    ),
    "hidden file": (
        lambda bundle: (bundle / ".hidden").write_bytes(b""),
        "the bundle holds '.hidden', which its manifest does not list",
    ),
    "link to a file": (link_a_file, "tokenizer.json must be part of the bundle, found a link"),
    "link to a folder": (link_a_folder, "weights must be part of the bundle, found a link"),
    "link to the manifest": (link_the_manifest, "'bundle' is not a bundle: it has no regular file bundle.json"),
    "link to nothing": (
        lambda bundle: (bundle / "more").symlink_to(bundle / "nowhere"),
        "more must be part of the bundle, found a link",
    ),
    "link to engines": (
        lambda bundle: (bundle / "engines").symlink_to(bundle / "weights"),
        "engines must not be a link",
    ),
    "folder in place of a file": (in_place_of(Path.mkdir, "tokenizer.json"), "the bundle lacks tokenizer.json"),
    "folder in place of the manifest": (in_place_of(Path.mkdir, "bundle.json"), "it has no regular file bundle.json"),
    # Reading a pipe would wait for ever.
    "pipe in place of a file": (in_place_of(os.mkfifo, "tokenizer.json"), "tokenizer.json must be a regular file"),
    "pipe in place of the manifest": (in_place_of(os.mkfifo, "bundle.json"), "it has no regular file bundle.json"),
    "manifest that lists itself": (
        lambda bundle: edit(bundle, listing("bundle.json")),
        "the bundle lacks bundle.json",
    ),
    "file among the engines": (
        lambda bundle: edit(bundle, listing("engines/one.bin")),
        "the bundle lacks engines/one.bin",
    ),
}


@pytest.mark.parametrize("name", LISTING_FAULTS)
def test_a_bundle_is_exactly_what_its_manifest_lists(bundle, name):
    change, message = LISTING_FAULTS[name]
    change(bundle)
    assert message in refusal(lambda: Bundle.open(bundle, verify=False))


def test_built_engines_may_lie_beside(bundle):
    (bundle / "engines/target").mkdir(parents=True)
    (bundle / "engines/target/language.plan").write_bytes(b"built later")
    assert "engines/target/language.plan" not in Bundle.open(bundle).manifest.files


def test_a_bundle_may_be_moved_and_linked_to(bundle, tmp_path):
    moved = tmp_path / "a place" / "with [brackets]"
    moved.parent.mkdir()
    shutil.move(bundle, moved)
    (tmp_path / "link").symlink_to(moved)
    for path in (moved, tmp_path / "link", str(moved)):
        assert Bundle.open(path).manifest.template == "phi3"


def other_in_place_of(bundle: Path) -> None:
    """What an update does: another bundle under the same name, by renaming."""
    other = copy_of(bundle, bundle.with_name("other"))
    edit(other, lambda data: data.update(producer="another"))
    bundle.rename(bundle.with_name("old"))
    other.rename(bundle)


REPLACED = "bundle 'bundle' was replaced by another since it was opened: load it again"


def test_a_graph_that_is_opened_late_is_not_of_another_bundle(bundle):
    """A faithful run's vocabulary, say: with the head of another model the codes would be nobody's."""
    session = load(bundle, threads=1)
    other_in_place_of(bundle)
    assert session.answer(PICTURE, "Why?", max_new_tokens=2).token_ids
    assert refusal(lambda: session.generate(PICTURE, "Draw.", faithful=True, max_new_tokens=2)) == REPLACED


def test_a_bundle_that_is_replaced_while_it_is_loaded(bundle):
    """Before the first graph is opened, or after the last: the hashes are of what was there first."""

    def after_the_hashes(read: int, of: int) -> None:
        if read == of and not bundle.with_name("old").exists():
            other_in_place_of(bundle)

    assert refusal(lambda: load(bundle, threads=1, on_verified=after_the_hashes)) == REPLACED


def test_a_bundle_that_is_replaced_while_its_graphs_are_opened(bundle, monkeypatch):
    create = OnnxExecutor._create

    def replaced(self: OnnxExecutor, path: Path, *others: Any) -> Any:
        session = create(self, path, *others)
        if path.name == "generation.codes.onnx":
            other_in_place_of(bundle)
        return session

    monkeypatch.setattr(OnnxExecutor, "_create", replaced)
    assert refusal(lambda: load(bundle, tasks=("generation",), threads=1)) == REPLACED


def test_a_process_may_leave_the_folder_that_a_path_was_relative_to(bundle, monkeypatch):
    """As services do, which load what they need and go to the root."""
    monkeypatch.chdir(bundle.parent)
    (bundle.parent / "link").symlink_to("bundle")
    sessions = [load(path, threads=1) for path in ("bundle", "link")]
    (bundle.parent / "link").unlink()
    monkeypatch.chdir("/")
    for session in sessions:  # by a graph that is opened only now
        assert session.executor.draft(np.zeros((256, 256, 3), np.uint8)).ndim == 2


@pytest.mark.parametrize(("cores", "threads", "wanted"), [(2, 1, 2), (1, 8, 7)])
def test_where_the_system_starts_few_threads(bundle, monkeypatch, cores, threads, wanted):
    """For the hashes, which would end in a traceback; for ONNX Runtime, which would never end, deaf to signals."""
    start, before = threading.Thread.start, threading.active_count()

    def limited(thread: threading.Thread) -> None:
        if threading.active_count() > before:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    monkeypatch.setattr("healthgpt_edge.bundle.cores", lambda: cores)
    outcome = run("answer", bundle, "--question", "Why?", "--threads", threads)
    message = f"error: the system must start {wanted} more threads, found 1, by a limit on threads or memory\n"
    assert (outcome.code, outcome.output, outcome.errors) == (2, "", message)


def test_what_is_no_bundle(tmp_path):
    (tmp_path / "file").write_text("x")
    for name in ("file", "nothing"):
        assert (
            refusal(lambda name=name: Bundle.open(tmp_path / name))
            == f"a bundle is a directory, found none at {name!r}"
        )
    assert "File name too long" in refusal(lambda: Bundle.open(tmp_path / ("x" * 300)))
    assert "it has no regular file bundle.json" in refusal(lambda: Bundle.open(tmp_path))


@pytest.mark.parametrize("name", ["bundle.json", "tokenizer.json", "weights/base.bin", "weights"])
def test_a_file_that_may_not_be_read(golden_bundle, name):
    """In a process without root's rights, which files' modes do not bind."""
    with tempfile.TemporaryDirectory() as folder:  # others may go there, unlike into `tmp_path`
        bundle = Path(shutil.copytree(golden_bundle("qwen"), Path(folder, "bundle")))
        (bundle / name).chmod(0)
        Path(folder).chmod(0o755)
        said = opened_without_rights(Path(folder))
        (bundle / name).chmod(0o755)  # so that it can be removed
    assert said == f"bundle 'bundle' cannot be read: Permission denied: {Path(name).name}\n"


def opened_without_rights(folder: Path) -> str:
    """What a process that is not root's says of the bundle in a folder."""
    program = (
        "import os\n"
        "from healthgpt_edge.bundle import Bundle\n"
        "from healthgpt_edge.errors import BundleError\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "try: Bundle.open('bundle', verify=False)\n"
        "except BundleError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            "[ONNXRuntimeError] : 1 : FAIL : Deserialize tensor embed_tokens.weight failed.Secure opened-file "
            "canonicalization requires procfs at /proc/self/fd/3. Ensure /proc is mounted in the sandbox or chroot.",
            "it opens weights by way of /proc, found it not mounted",
        ),
        (
            "/onnxruntime_src/onnxruntime/core/platform/posix/env.cc:327 onnxruntime::{anonymous}::PosixThread::"
            "PosixThread(const char*, int) pthread_create failed, error code: 11 error msg: ",
            "the system starts no more threads, by a limit on them or on memory",
        ),
        (
            "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Non-zero status code returned while running "
            "ResidualConvolution node. Status Message: ResidualConvolution: std::bad_alloc",
            "there is not enough memory",
        ),
        (
            "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Non-zero status code returned while running Linear node. "
            "Name:'layers.0/attention/Linear' Status Message: Linear: /onnxruntime_src/onnxruntime/core/framework/"
            "bfc_arena.cc:360 void* onnxruntime::BFCArena::AllocateRawInternal(size_t, bool, onnxruntime::Stream*) "
            "Failed to allocate memory for requested buffer of size 7090176",
            "there is not enough memory",
        ),
        ("one line\nanother", "one line"),
        ("", ""),
    ],
)
def test_what_the_machine_refuses_onnxruntime_is_told_in_words(said, words):
    """Texts of ONNX Runtime 1.32, where /proc was hidden, threads were limited, and memory was."""
    assert first_line(RuntimeError(said)) == words


# --- graphs against the manifest ------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_manifest_tells_the_types_and_shapes_of_every_graph(golden_bundle, system):
    opened = Bundle.open(golden_bundle(system))
    for task, entry in opened.manifest.tasks.items():
        for role in entry.graphs:
            session = onnxruntime.InferenceSession(opened.graph(task, role), providers=["CPUExecutionProvider"])
            values = {node.name: value_of(node) for node in [*session.get_inputs(), *session.get_outputs()]}
            assert values == graph_values(opened.manifest, task, role)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "language/layers",
            "language.onnx: past_key_values.3.key must be float32 ['B', 4, 'M', 16] by the manifest, found none",
        ),
        (
            "language/kv_heads",
            "past_key_values.0.key must be float32 ['B', 5, 'M', 16] by the manifest, found float32 ['B', 4, 'M', 16]",
        ),
        ("language/head_dim", "past_key_values.0.key must be float32 ['B', 4, 'M', 17] by the manifest"),
        (
            "language/hidden",
            "image_features must be float32 ['B', 'P', 65] by the manifest, found float32 ['B', 'P', 64]",
        ),
        ("language/vocab", "logits must be float32 ['B', 'n', 479] by the manifest, found float32 ['B', 'n', 478]"),
        (
            "vision/image_size",
            "vision.onnx: pixels must be uint8 ['B', 57, 57, 3] by the manifest, found uint8 ['B', 56, 56, 3]",
        ),
        ("vision/patches", "image_features must be float32 ['B', 17, 64] by the manifest, found float32 ['B', 16, 64]"),
        (
            "codes/grid",
            "generation.codes.onnx: codes must be int64 ['B', 33, 33] by the manifest, found int64 ['B', 32, 32]",
        ),
        ("codes/image_size", "image must be uint8 ['B', 257, 257, 3] by the manifest, found uint8 ['B', 256, 256, 3]"),
    ],
)
def test_numbers_that_the_graphs_contradict(bundle, manifest_data, key, message):
    part, name = key.split("/")
    edit(bundle, setting(key, manifest_data[part][name] + 1))
    with pytest.raises(ExecutorError) as caught:
        load(bundle, threads=1)
    assert message in str(caught.value)


def test_caches_of_another_type_than_the_graph(bundle):
    edit(bundle, setting("cache_precision", "fp16"))
    with pytest.raises(ExecutorError) as caught:
        load(bundle, threads=1)
    assert str(caught.value) == (
        "comprehension.language.onnx: past_key_values.0.key must be float16 ['B', 4, 'M', 16] by the manifest, "
        "found float32 ['B', 4, 'M', 16]"
    )


def test_a_template_of_tomorrow(bundle):
    edit(bundle, setting("template", "phi5"))
    assert refusal(lambda: load(bundle)) == "template must be one of phi3, phi4, qwen, found 'phi5'"


def test_ids_beyond_the_vocabulary_are_not_taken_for_patches(bundle):
    edit(bundle, setting("tokenizer/options/begin", [480]))
    session = load(bundle, tasks=("comprehension",), threads=1)
    with pytest.raises(HealthGPTError, match=r"^the tokenizer must give ids below 478, found 480$"):
        session.answer(PICTURE, "What?")


def test_damaged_weights_never_become_a_picture(bundle, golden_bundle):
    """With the hashes skipped, a value that is no number is an error of the run."""
    data = bytearray((bundle / "weights/base.bin").read_bytes())
    data[:] = b"\xff\xff\xff\x7f" * (len(data) // 4)
    replace_bytes(bundle / "weights/base.bin", bytes(data))
    session = load(bundle, tasks=("generation",), threads=1, verify=False)
    with pytest.raises(HealthGPTError, match="the model must give finite logits, found 66 NaN or infinite of 66"):
        session.generate(PICTURE, "Reconstruct the image.")


# --- commands -------------------------------------------------------------------------------------------------------


def test_verify(bundle):
    files = Bundle.open(bundle).manifest.files
    total = sum(entry.size for entry in files.values())
    assert run("verify", bundle, "--json").json == {"ok": True, "files": len(files), "bytes": total}
    assert run("verify", bundle).output == f"ok: {len(files)} files, {total:,} bytes\n"
    flip(bundle / "weights/generation.bin")
    outcome = run("verify", bundle, "--json")
    assert (outcome.code, outcome.output) == (2, "")
    assert outcome.errors.startswith("error: file weights/generation.bin is damaged: SHA-256 must be ")


def test_inspect(bundle, manifest_data):
    assert run("inspect", bundle, "--json").json == manifest_data
    # It reads no weights, so it shows a bundle whose weights are damaged.
    flip(bundle / "weights/generation.bin")
    outcome = run("inspect", bundle)
    assert (outcome.code, outcome.errors) == (0, "")
    for line in (
        "phi3, template phi3",
        "fp32; caches fp32",
        "3 layers, hidden 64, vocabulary 478",
        "32 x 32 of 64 codes",
    ):
        assert line in outcome.output


def test_brackets_and_colons_in_a_path_are_no_markup(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a[").mkdir()
    shutil.move(bundle, "a[/bold]:eye:")
    outcome = run("inspect", "a[/bold]:eye:")
    assert (outcome.code, outcome.errors) == (0, "")
    assert "a[/bold]:eye:" in outcome.output
