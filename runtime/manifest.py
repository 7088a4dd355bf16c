"""The manifest of a bundle, `bundle.json`, as dataclasses parsed without mercy.

Every key must be known and of its type; a value that is not is a BundleError that names it. Numbers that later size
an allocation are bounded here.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from typing import Any, TypeVar

from .errors import BundleError

FORMAT = "healthgpt-edge bundle"
VERSION = 1

MAX_MANIFEST_BYTES = 1 << 20
MAX_DIMENSION = 1 << 20
# One level of folders, plain characters: no name can leave the bundle or hide in a terminal.
FILE_NAME = re.compile(r"(?:[a-z0-9_-]+/)?[a-z0-9_-]+(?:\.[a-z0-9_-]+)+")
TASKS = ("comprehension", "generation")

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
    """Everything the runtime knows about a bundle before it opens another file of it."""

    format: str
    version: int
    producer: str
    template: str
    precision: str
    block_size: int
    adapter_precision: str
    language: Language
    vision: Vision
    tokenizer: Tokenizer
    decoding: Decoding
    codes: Codes | None
    tasks: dict[str, Task]
    provenance: dict[str, Any]
    files: dict[str, FileEntry]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: bytes) -> Manifest:
        """Parse and check `bundle.json`; raises BundleError."""
        if len(text) > MAX_MANIFEST_BYTES:
            raise BundleError(f"bundle.json must be at most {MAX_MANIFEST_BYTES} bytes, found {len(text)}")
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError("bundle.json is not valid JSON") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise BundleError(f"bundle.json must name the format {FORMAT!r}")
        if data.get("version") != VERSION:
            raise BundleError(f"bundle format version must be {VERSION}, found {data.get('version')!r}")
        manifest = _parse(cls, data, "bundle.json")
        _check(manifest)
        return manifest


def _check(manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        if not FILE_NAME.fullmatch(name):
            raise BundleError(f"file names must stay inside the bundle, found {name!r}")
        if entry.size < 0 or not re.fullmatch(r"[0-9a-f]{64}", entry.sha256):
            raise BundleError(f"file {name} must have a size and a SHA-256, found {entry.size} and {entry.sha256!r}")
    for part in (manifest.language, manifest.vision, manifest.codes):
        for field in dataclasses.fields(part) if part else ():
            value = getattr(part, field.name)
            if isinstance(value, int) and not 0 <= value <= MAX_DIMENSION:
                raise BundleError(f"{field.name} must be between 0 and {MAX_DIMENSION}, found {value}")
    if not manifest.tasks or not set(manifest.tasks) <= set(TASKS):
        raise BundleError(f"tasks must be some of {', '.join(TASKS)}, found {sorted(manifest.tasks)}")
    if "generation" in manifest.tasks and manifest.codes is None:
        raise BundleError("a bundle with generation must describe its codes")
    named = [manifest.tokenizer.file, *(g for task in manifest.tasks.values() for g in task.graphs.values())]
    for name in named:
        if name not in manifest.files:
            raise BundleError(f"{name!r} is used by the bundle but not among its files")


def _parse(cls: type[T], data: Any, where: str) -> T:
    """Build dataclass `cls` from parsed JSON, refusing unknown keys, missing keys and wrong types."""
    if not isinstance(data, dict):
        raise BundleError(f"{where} must be an object, found {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    unknown, missing = sorted(set(data) - set(hints)), sorted(set(hints) - set(data))
    if unknown or missing:
        raise BundleError(f"{where} has unknown keys {unknown} and lacks {missing}")
    return cls(**{key: _value(hint, data[key], f"{where}: {key}") for key, hint in hints.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _value(arguments[0], value, where)
    if dataclasses.is_dataclass(hint):
        return _parse(typing.cast(type, hint), value, where)
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
