"""The manifest of a bundle, `bundle.json`, as dataclasses parsed without mercy.

Every key must be known and of its type; a value that is not is a BundleError that names it. Numbers that later size
an allocation are bounded here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

from .errors import BundleError

FORMAT = "healthgpt-edge bundle"
VERSION, VERSION_IN_PANELS = 2, 4  # older versions of this software read those without panels

MAX_MANIFEST_BYTES = 1 << 20
MAX_DIMENSION = 1 << 20
MAX_LAYERS = 1 << 10
MAX_PENALTY = 100.0
# One level of folders, plain characters: no name can leave the bundle or hide in a terminal.
FILE_NAME = re.compile(r"(?:[a-z0-9_-]+/)?[a-z0-9_-]+(?:\.[a-z0-9_-]+)+")
COMPREHENSION, GENERATION = TASKS = ("comprehension", "generation")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
# How keys and values are kept, with numpy's name of the type; int8 with a float32 scale per row.
CACHE_TYPES = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
# Every task has the first two graphs, generation the codes; the others are there or not.
ROLES = ("vision", "language", "codes", "vocabulary", "draft")

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class FileEntry:
    """Size and SHA-256 of one file of the bundle."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True, slots=True)
class Language:
    """Dimensions of the language model that the runtime allocates by."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int


@dataclasses.dataclass(frozen=True, slots=True)
class Vision:
    """The square the vision tower takes, the patches it gives, and the colour that pads a picture to a square."""

    image_size: int
    patches: int
    background: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Tokenizer:
    """`options` are those of healthgpt_edge.prompt.Tokenizer."""

    file: str
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Codes:
    """Token ids of the picture codes and the grid they fill, row by row."""

    start: int
    first: int
    count: int
    end: int
    newline: int
    grid: int
    image_size: int


@dataclasses.dataclass(frozen=True, slots=True)
class Decoding:
    """What the base's generation_config.json asks for."""

    stop_ids: tuple[int, ...]
    repetition_penalty: float


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One H-LoRA plugin: its shape, its graphs by role, and the token id of its first logit column."""

    rank: int
    experts: int
    alpha: float
    first_logit: int
    graphs: dict[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """Everything the runtime knows about a bundle before it opens another file of it.

    own_sha256: of all the rest of it, given by `sealed`.
    """

    format: str
    version: int
    producer: str
    template: str
    precision: str
    block_size: int
    cache_precision: str
    language: Language
    vision: Vision
    tokenizer: Tokenizer
    decoding: Decoding
    codes: Codes | None
    tasks: dict[str, Task]
    provenance: dict[str, Any]
    files: dict[str, FileEntry]
    own_sha256: str

    @property
    def in_panels(self) -> bool:
        """Whether the decoder's linears lie in panels, one after the other (export/quantize.py)."""
        return self.version == VERSION_IN_PANELS

    def weights(self, tasks: Iterable[str]) -> dict[str, FileEntry]:
        """The files of weights that these tasks read: the base's and their own."""
        name_of_one = re.compile(rf"weights/({'|'.join(['base', *tasks])})(-\d+)?\.bin")
        return {name: entry for name, entry in self.files.items() if name_of_one.fullmatch(name)}

    def sealed(self) -> Manifest:
        """This manifest with the hash of itself."""
        unsealed = dataclasses.replace(self, own_sha256="")
        return dataclasses.replace(self, own_sha256=hashlib.sha256(unsealed.to_json().encode()).hexdigest())

    def to_json(self) -> str:
        """The text of `bundle.json`: the same for equal manifests."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: bytes) -> Manifest:
        """Parse and check `bundle.json`; raises BundleError."""
        if len(text) > MAX_MANIFEST_BYTES:
            raise BundleError(f"bundle.json must be at most {MAX_MANIFEST_BYTES} bytes, found {len(text)}")
        try:
            data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise BundleError("bundle.json must be JSON, without NaN and no key twice") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise BundleError(f"bundle.json must name the format {FORMAT!r}")
        if data.get("version") not in (VERSION, VERSION_IN_PANELS):
            expected = f"{VERSION} or {VERSION_IN_PANELS}"
            raise BundleError(f"bundle format version must be {expected}, found {data.get('version')!r}")
        manifest = parse(cls, data, "bundle.json")
        _check(manifest)
        if manifest != manifest.sealed():
            expected, found = manifest.own_sha256[:16], manifest.sealed().own_sha256[:16]
            raise BundleError(f"bundle.json is damaged: SHA-256 must be {expected}..., found {found}...")
        return manifest


def _check(manifest: Manifest) -> None:
    """What types cannot say: names, ranges, and that the parts fit each other."""
    for name, entry in manifest.files.items():
        _require(FILE_NAME.fullmatch(name), "file names must stay inside the bundle", repr(name))
        _require(entry.size >= 0, f"the size of {name} must be 0 or above", entry.size)
        _require(re.fullmatch(r"[0-9a-f]{64}", entry.sha256), f"{name} must have a SHA-256", repr(entry.sha256))
    for name, known in (("precision", PRECISIONS), ("cache_precision", CACHE_TYPES)):
        value = getattr(manifest, name)
        _require(value in known, f"{name} must be one of {', '.join(known)}", repr(value))
    for part in (manifest.language, manifest.vision, manifest.codes):
        for field in dataclasses.fields(part) if part else ():
            value = getattr(part, field.name)
            if isinstance(value, int):
                _require_size(field.name, value)
    _require_size("block_size", manifest.block_size)
    layers, background = manifest.language.layers, manifest.vision.background
    _require(layers <= MAX_LAYERS, f"layers must be at most {MAX_LAYERS}", layers)
    _require(
        len(background) == 3 and all(0 <= level <= 255 for level in background),
        "background must be 3 levels from 0 to 255",
        list(background),
    )
    _check_tokens(manifest)
    _check_tasks(manifest)


def _check_tokens(manifest: Manifest) -> None:
    vocab, decoding, codes = manifest.language.vocab, manifest.decoding, manifest.codes
    for token_id in decoding.stop_ids:
        _require(0 <= token_id < vocab, f"stop ids must be between 0 and {vocab - 1}", token_id)
    penalty = decoding.repetition_penalty
    _require(1 / MAX_PENALTY <= penalty <= MAX_PENALTY, "repetition_penalty must be between 0.01 and 100", penalty)
    if codes:
        last = codes.first + codes.count - 1
        for token_id in (codes.start, last, codes.end, codes.newline):
            _require(token_id < vocab, f"ids of codes must be below {vocab}", token_id)
        for name, token_id in (("end", codes.end), ("newline", codes.newline)):
            _require(not codes.first <= token_id <= last, f"{name} must not be one of the codes", token_id)


def _check_tasks(manifest: Manifest) -> None:
    tasks, codes = manifest.tasks, manifest.codes
    _require(tasks and set(tasks) <= set(TASKS), f"tasks must be some of {', '.join(TASKS)}", sorted(tasks))
    for name, task in tasks.items():
        roles, needed = set(task.graphs), {"vision", "language"} | ({"codes"} if name == "generation" else set())
        _require(needed <= roles <= set(ROLES), f"{name} must have the graphs {sorted(needed)}", sorted(roles))
        lowest = 0
        if name == "generation":
            if codes is None:
                raise BundleError("a bundle with generation must describe its codes")
            lowest = min(codes.first, codes.newline)
        first = task.first_logit
        _require(0 <= first <= lowest, f"first_logit of {name} must be between 0 and {lowest}", first)
        for size, value in (("rank", task.rank), ("experts", task.experts)):
            _require_size(f"{size} of {name}", value)
        _require((first > 0) == ("vocabulary" in roles), f"{name} needs a vocabulary graph above row 0", sorted(roles))
    graphs = (graph for task in tasks.values() for graph in task.graphs.values())
    for file in (manifest.tokenizer.file, *graphs):
        _require(file in manifest.files, "every file in use must be listed", f"{file!r} unlisted")


def _require(condition: object, expected: str, found: object) -> None:
    if not condition:
        raise BundleError(f"bundle.json: {expected}, found {found}")


def _require_size(name: str, value: int) -> None:
    _require(1 <= value <= MAX_DIMENSION, f"{name} must be between 1 and {MAX_DIMENSION}", value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError
    return data


def _no_constant(name: str) -> None:
    raise ValueError


def parse(cls: type[T], data: Any, where: str) -> T:
    """Build dataclass `cls` from parsed JSON, refusing unknown keys, missing keys without a default and wrong types."""
    if not isinstance(data, dict):
        raise BundleError(f"{where} must be an object, found {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    needed = {field.name for field in dataclasses.fields(typing.cast(Any, cls)) if field.default is dataclasses.MISSING}
    unknown, missing = sorted(set(data) - set(hints)), sorted(needed - set(data))
    if unknown or missing:
        raise BundleError(f"{where} has unknown keys {unknown} and lacks {missing}")
    return cls(**{key: _value(hint, data[key], f"{where}: {key}") for key, hint in hints.items() if key in data})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _value(arguments[0], value, where)
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast(type, hint), value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_value(arguments[0], item, where) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is Any:
        return value
    if hint is float and type(value) is int:
        return float(value)
    if origin is None and type(value) is hint:
        return value
    raise BundleError(f"{where} must be {getattr(hint, '__name__', hint)}, found {type(value).__name__}")
