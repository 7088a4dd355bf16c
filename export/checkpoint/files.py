"""Reading released files: small text files, and tensors one at a time. No code in them is ever run."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from healthgpt_edge.errors import CheckpointError

# The largest text file of a release is Qwen2.5's vocabulary of 2.8 MB.
MAX_TEXT_BYTES = 32 << 20
LFS_POINTER = b"version https://git-lfs"
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def label(path: Path) -> str:
    """A file's name in messages: its folder and name, so that the base's config.json and CLIP's differ."""
    return str(Path(path.parent.name) / path.name)


def require_file(path: Path) -> Path:
    """`path`, if it is a readable file. Raises CheckpointError otherwise."""
    try:
        if not path.is_file():
            found = "a folder" if path.is_dir() else "something else" if path.exists() else "nothing"
            raise CheckpointError(f"{label(path)}: expected a file, found {found}")
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise CheckpointError(f"{label(path)}: expected the file, found a Git LFS pointer to it: git lfs pull")
    except OSError as error:
        raise CheckpointError(f"{label(path)}: cannot be read: {error.strerror}") from error
    return path


def read_bytes(path: Path, limit_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """The content of a small file."""
    size = require_file(path).stat().st_size
    if size > limit_bytes:
        raise CheckpointError(f"{label(path)}: expected at most {limit_bytes} bytes, found {size}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{label(path)}: cannot be read: {error.strerror}") from error


def read_text(path: Path, limit_bytes: int = MAX_TEXT_BYTES) -> str:
    """The content of a small UTF-8 file, with all line ends as newlines."""
    try:
        text = read_bytes(path, limit_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{label(path)}: expected readable UTF-8, found {type(error).__name__}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{label(path)}: expected JSON, found {type(error).__name__}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{label(path)}: expected a JSON object, found {type(value).__name__}")
    return value


@dataclass(frozen=True, slots=True)
class Entry:
    """A file's description of one tensor, known before any value is read."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str

    def describe(self) -> str:
        return f"{DTYPES.get(self.dtype, self.dtype)} {list(self.shape)}"


class TensorSource(ABC):
    """The named tensors of one part of a release. `entries` is known from the start; values are read on request."""

    path: Path
    entries: Mapping[str, Entry]

    @abstractmethod
    def read(self, key: str) -> torch.Tensor:
        """The tensor `key` in the file's dtype. Raises CheckpointError if a value is not finite."""

    @abstractmethod
    def close(self) -> None:
        """Close the files."""

    def require(
        self, expected: Mapping[str, tuple[int, ...]], ignored: Callable[[str], bool] = lambda key: False
    ) -> None:
        """Check that the file holds the `expected` tensors (shapes by key) and no others, except `ignored` ones."""
        missing = [key for key in expected if key not in self.entries]
        if missing:
            raise CheckpointError(
                f"{label(self.path)}: expected tensor {missing[0]} {list(expected[missing[0]])}, found nothing "
                f"({len(missing)} missing in all)"
            )
        extra = [key for key in self.entries if key not in expected and not ignored(key)]
        if extra:
            entry = self.entries[extra[0]]
            raise CheckpointError(
                f"{label(entry.path)}: expected no tensor {extra[0]}, found {entry.describe()} "
                f"({len(extra)} extra in all)"
            )
        for key, shape in expected.items():
            require_tensor(key, self.entries[key], shape)


def require_tensor(key: str, entry: Entry, shape: tuple[int, ...]) -> None:
    """Check a tensor's type and shape, without reading its values."""
    if entry.dtype not in DTYPES:
        allowed = ", ".join(DTYPES.values())
        raise CheckpointError(f"{label(entry.path)}: {key}: expected one of {allowed}, found {entry.dtype}")
    if entry.shape != shape:
        raise CheckpointError(f"{label(entry.path)}: {key}: expected shape {list(shape)}, found {list(entry.shape)}")


def require_finite(path: Path, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, if every value is finite. Raises CheckpointError otherwise.

    Minimum and maximum suffice, because NaN becomes both of them; they need no copy of the tensor.
    """
    if tensor.numel() and not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor)):
        raise CheckpointError(f"{label(path)}: {key}: expected finite values, found NaN or infinity")
    return tensor


def one_line(error: BaseException) -> str:
    """An error's class and the first line of its message."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]
