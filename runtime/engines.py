"""The record of the TensorRT engines in a bundle, `engines/<target>/engines.json`, and the checks before one is used.

An engine is a program for the GPU. So nothing of it reaches TensorRT before its record agrees with the bundle, with
the TensorRT that is installed and with the flags it was built with, and its bytes with the record. Like the bundle's
own hashes this finds what is stale or damaged, not forgery: take engines from whom you would take programs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .bundle import ENGINES, Bundle
from .errors import BundleError, ExecutorError
from .manifest import MAX_MANIFEST_BYTES, Manifest, parse

RECORD = "engines.json"
FORMAT = "healthgpt-edge engines"
VERSION = 1
# Raised whenever the graphs that TensorRT gets are made in another way: engines built before are stale.
LOWERING = 1
# Of the linear that our plugin launches (csrc/hlora_linear/rows.h), for engines that have the plugin.
PLUGIN_VERSION = 1
# The two TensorRTs, which share one Python API, by the name of their module, with what installs each.
MODULES = {
    "tensorrt-rtx": ("tensorrt_rtx", "pip install 'healthgpt-edge[tensorrt-rtx]'"),
    "tensorrt": ("tensorrt", "pip install tensorrt, from NVIDIA's package index"),
}
COMPUTE_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
LANGUAGE = "language"
MAX_ENGINE_BYTES = 1 << 38
_FILE_NAME = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.engine")
_CHUNK_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What a build was asked for.

    compute: type of the products (fp32, fp16, bf16). compute_capabilities: GPUs, as in "8.6"; none for the one at hand.
    max_context: tokens that the caches hold. max_rows: new tokens of a decode pass, and logits of any pass.
    prefill_rows: new tokens of any pass. plugin: whether the language engine's H-LoRA linears are our plugin.
    stream_weights: whether a pass may fetch the language engine's weights from the host's memory.
    """

    compute: str
    compute_capabilities: tuple[str, ...]
    max_context: int
    max_rows: int
    prefill_rows: int
    plugin: bool = False
    stream_weights: bool = False

    def __post_init__(self) -> None:
        if self.compute not in COMPUTE_TYPES:
            raise ExecutorError(f"compute must be one of {', '.join(COMPUTE_TYPES)}, found {self.compute!r:.40}")
        for text in self.compute_capabilities:
            if not re.fullmatch(r"[1-9]\d?\.\d", text):
                raise ExecutorError(f"a compute capability must be like 8.6, found {text!r:.40}")
        if not 1 <= self.max_rows <= self.prefill_rows <= self.max_context <= 1 << 20:
            raise ExecutorError(
                "1 <= max_rows <= prefill_rows <= max_context <= 1048576 must hold, found "
                f"{self.max_rows}, {self.prefill_rows}, {self.max_context}"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class EngineEntry:
    """One engine: size and SHA-256 of its file, what it was built from (see `ingredients`), and how long that took."""

    size: int
    sha256: str
    built_from: dict[str, str]
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class EngineRecord:
    """The engines of one target in a bundle, by the names of `engine_graphs`."""

    format: str
    version: int
    target: str
    tensorrt: str
    settings: Settings
    engines: dict[str, EngineEntry]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"


def engine_graphs(manifest: Manifest) -> dict[str, tuple[str, ...]]:
    """The engines of a bundle and the graph files that each is made of: one `language` for all tasks."""
    tasks = sorted(manifest.tasks)
    engines = {LANGUAGE: tuple(manifest.tasks[task].graphs[LANGUAGE] for task in tasks)}
    for task in tasks:
        for role, graph in sorted(manifest.tasks[task].graphs.items()):
            if role != LANGUAGE:
                engines[f"{task}.{role}"] = (graph,)
    return engines


def ingredients(manifest: Manifest, name: str, target: str, tensorrt: str, settings: Settings) -> dict[str, str]:
    """What engine `name` depends on, each with its hash or its value: another value of one makes the engine stale."""
    tasks = sorted(manifest.tasks) if name == LANGUAGE else [name.split(".")[0]]
    files = [*engine_graphs(manifest)[name], *manifest.weights(tasks)]
    flags = dataclasses.asdict(settings)
    # These change the language engine alone, and only where they are asked for.
    plugin, streams = flags.pop("plugin"), flags.pop("stream_weights")
    if name == LANGUAGE:
        flags |= {"plugin": PLUGIN_VERSION} if plugin else {}
        flags |= {"stream_weights": True} if streams else {}
    return (
        {file: manifest.files[file].sha256 for file in files}
        | {"target": target, "TensorRT": tensorrt, "lowering": str(LOWERING)}
        | {flag: str(value) for flag, value in flags.items()}
    )


def folder(bundle: Bundle, target: str) -> Path:
    """Where the engines of a target lie in a bundle."""
    return bundle.path / ENGINES / target


def import_tensorrt(target: str) -> Any:
    """The Python module of a target's TensorRT; raises ExecutorError where it is not installed."""
    if target not in MODULES:
        raise ExecutorError(f"target must be one of {', '.join(MODULES)}, found {target!r:.40}")
    name, install = MODULES[target]
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # its libraries may be missing, too
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ExecutorError(f"target {target} needs the module {name} ({reason:.100}): {install}") from error


def read_record(bundle: Bundle, target: str) -> EngineRecord:
    """The record of a target's engines; raises ExecutorError where there is none or it is malformed."""
    path = folder(bundle, target) / RECORD
    with _reading(RECORD):
        if path.is_symlink() or path.parent.is_symlink():
            raise ExecutorError(f"the engines of {target} must be part of the bundle, found a link")
        if not path.exists():
            raise ExecutorError(
                f"the bundle has no engines for {target}: healthgpt-edge build {bundle.path.name} --target {target}"
            )
        with path.open("rb") as file:
            text = file.read(MAX_MANIFEST_BYTES + 1)
    try:
        data = json.loads(text) if len(text) <= MAX_MANIFEST_BYTES else None
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
        raise ExecutorError(f"{RECORD} must be JSON of the format {FORMAT!r}, version {VERSION}: build again")
    try:
        record = parse(EngineRecord, data, RECORD)
    except BundleError as error:
        raise ExecutorError(str(error)) from error
    if record.target != target:
        raise ExecutorError(f"{RECORD} must be of the target {target}, found {record.target!r:.40}")
    return record


def check_fresh(bundle: Bundle, record: EngineRecord, name: str, tensorrt: str) -> EngineEntry:
    """The entry of engine `name`; raises ExecutorError where it is missing or built from something else."""
    entry = record.engines.get(name)
    if entry is None:
        raise ExecutorError(f"{RECORD} has no engine {name!r}, only {', '.join(sorted(record.engines))}: build again")
    expected = ingredients(bundle.manifest, name, record.target, tensorrt, record.settings)
    if entry.built_from != expected:
        raise ExecutorError(f"engine {name} is stale: {_difference(entry.built_from, expected)}; build again")
    return entry


def read_engine(bundle: Bundle, record: EngineRecord, name: str, tensorrt: str) -> np.ndarray:
    """The bytes of engine `name`, uint8, checked: what is returned is what was hashed. Raises ExecutorError."""
    entry = check_fresh(bundle, record, name, tensorrt)
    file_name = f"{name}.engine"
    path = folder(bundle, record.target) / file_name
    with _reading(file_name):
        if not _FILE_NAME.fullmatch(file_name) or path.is_symlink() or not path.is_file():
            raise ExecutorError(f"engine {name} must be a regular file of the bundle: build again")
        size = path.stat().st_size
        if size != entry.size or size > MAX_ENGINE_BYTES:
            raise ExecutorError(f"engine {name} is damaged: it must have {entry.size} bytes, found {size}; build again")
        data = np.empty(size, np.uint8)
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            for first in range(0, size, _CHUNK_BYTES):
                chunk = data[first : first + _CHUNK_BYTES]
                if file.readinto(chunk.data) != len(chunk):
                    raise ExecutorError(f"engine {name} is damaged: it ended while it was read; build again")
                digest.update(chunk.data)
    if digest.hexdigest() != entry.sha256:
        raise ExecutorError(
            f"engine {name} is damaged: SHA-256 must be {entry.sha256[:16]}..., found {digest.hexdigest()[:16]}...; "
            "build again"
        )
    return data


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """What the operating system refuses is an error of the file `name`."""
    try:
        yield
    except OSError as error:
        raise ExecutorError(f"{name} cannot be read: {error.strerror}") from error


def _difference(found: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """The first thing that an engine was built from and that is another now."""
    for name in sorted(expected.keys() | found.keys()):
        before, now = found.get(name, "nothing"), expected.get(name, "nothing")
        if before != now:
            return f"it was built from {name} {before:.16}, now it is {now:.16}"
    return "it was built from something else"
