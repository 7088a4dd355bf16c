"""What TensorRT-RTX compiled on a GPU: it is found again for the very same engine, and whole."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from healthgpt_edge.executors import tensorrt_engine
from healthgpt_edge.executors.tensorrt_engine import _JitCache

ENGINE = np.arange(100, dtype=np.uint8)


class RuntimeCache:
    """TensorRT-RTX's cache of what it compiled."""

    def __init__(self, compiled: bytes = b"") -> None:
        self.compiled = compiled
        self.given: bytes | None = None

    def serialize(self) -> bytes:
        return self.compiled

    def deserialize(self, blob: bytes) -> None:
        self.given = self.compiled = blob


class Config:
    def __init__(self, cache: RuntimeCache) -> None:
        self.create_runtime_cache = lambda: cache
        self.set_runtime_cache: Any = lambda cache: None


def opened(path: Path, compiled: bytes = b"", engine: np.ndarray = ENGINE) -> tuple[_JitCache, RuntimeCache]:
    """The cache of a start, in which so much was compiled already."""
    jit, cache = _JitCache(path, engine), RuntimeCache(compiled)
    jit.attach(Config(cache))
    return jit, cache


@pytest.fixture
def path(tmp_path) -> Path:
    """A file that a start has left."""
    opened(tmp_path / "language.8.9.jit", b"compiled")[0].save()
    return tmp_path / "language.8.9.jit"


def test_the_next_start_is_given_what_was_compiled(path):
    assert opened(path)[1].given == b"compiled"
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_it_is_written_where_it_has_grown_and_not_at_every_pass(path):
    jit, cache = opened(path)
    path.unlink()
    jit.save()
    assert not path.exists()
    cache.compiled += b" more"
    jit.save()
    assert opened(path)[1].given == b"compiled more"


@pytest.mark.parametrize("at", [0, 31, 32, -1])
def test_a_flipped_bit_is_compiled_anew(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert opened(path)[1].given is None


def test_what_was_compiled_of_another_engine_is_not_used(path):
    assert opened(path, engine=ENGINE + 1)[1].given is None


def test_a_link_and_what_is_too_large_are_not_read(path, monkeypatch):
    (path.parent / "link").symlink_to(path)
    assert opened(path.parent / "link")[1].given is None
    monkeypatch.setattr(tensorrt_engine, "MAX_JIT_CACHE_BYTES", path.stat().st_size - 1)
    assert opened(path)[1].given is None


def test_a_full_disk_leaves_the_old_file_and_nothing_else(path):
    before = path.read_bytes()
    jit, cache = opened(path)
    cache.compiled = bytes(10_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        jit.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and [one.name for one in path.parent.iterdir()] == [path.name]
