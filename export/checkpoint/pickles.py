"""Tensors in torch's own files (pickles), read without running any code in them."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from healthgpt_edge.errors import CheckpointError

from .files import Entry, TensorSource, label, one_line, require_file, require_finite

# The pickle describes the tensors and holds none of their values. XL32's plugin needs about 200 kB.
MAX_PICKLE_BYTES = 64 << 20
# Mapped pages stay in memory once they are read, so the file is mapped anew after this many bytes.
RENEW_MAPPING_BYTES = 64 << 20

# Packages whose objects a Lightning file holds beside its weights: callbacks, schedulers, hyperparameters. None of them
# is imported.
TRAINING_PACKAGES = frozenset(
    {"argparse", "lightning", "lightning_fabric", "numpy", "omegaconf", "pathlib", "pytorch_lightning", "taming"}
)
TRAINING_TYPES = frozenset(
    {"typing.Any"} | {f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str")}
)


class Inert:
    """Stands in for an object of a training framework: accepts any arguments and state, does nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def empty(*_: object) -> dict[str, object]:
    """Stands in for collections.defaultdict, which omegaconf stores with every hyperparameter."""
    return {}


def stand_in(name: str) -> tuple[Callable[..., object], str] | None:
    """The stand-in for the global `name` of a Lightning file; None if such a file has no reason to name it."""
    if name == "collections.defaultdict":
        return empty, name
    if name.split(".")[0] not in TRAINING_PACKAGES and name not in TRAINING_TYPES:
        return None
    # Hyperparameters are a subclass of dict, but torch's reader sets items only on dict and OrderedDict.
    return (OrderedDict if name.endswith("Dict") else Inert), name


class PickleSource(TensorSource):
    """The tensors of a torch file's `section`, or of its top level. The file is mapped and read with weights_only.

    With `lightning`, objects of training frameworks become `Inert`, and nothing is imported. Any other global that
    torch does not allow raises a CheckpointError.
    """

    def __init__(self, path: Path, section: str | None = None, lightning: bool = False) -> None:
        self.path = path
        self._section = section
        self._lightning = lightning
        self._handed_out_bytes = 0
        check_archive(path)
        self._tensors: dict[str, torch.Tensor] | None = self._load()
        self.entries = {key: Entry(path, tuple(tensor.shape), tensor.dtype) for key, tensor in self._tensors.items()}

    def read(self, key: str) -> torch.Tensor:
        if self._tensors is None or self._handed_out_bytes > RENEW_MAPPING_BYTES:
            self._tensors = None
            self._tensors = self._load()
            self._handed_out_bytes = 0
        mapped = self._tensors[key]
        self._handed_out_bytes += mapped.numel() * mapped.element_size()
        # A copy: a view would keep the whole mapping alive.
        return require_finite(self.path, key, mapped.clone(memory_format=torch.contiguous_format))

    def close(self) -> None:
        self._tensors = None

    def _load(self) -> dict[str, torch.Tensor]:
        try:
            inert = []
            for name in sorted(get_unsafe_globals_in_checkpoint(str(self.path))):
                replacement = stand_in(name) if self._lightning else None
                if replacement is None:
                    raise CheckpointError(f"{label(self.path)}: expected tensors only, found the global {name}")
                inert.append(replacement)
            with safe_globals(inert):
                content = torch.load(str(self.path), map_location="cpu", weights_only=True, mmap=True)
        except CheckpointError:
            raise
        except Exception as error:  # a hostile or damaged file can make torch's reader raise anything
            raise CheckpointError(f"{label(self.path)}: expected a torch file, found {one_line(error)}") from error
        if self._section is not None:
            if not isinstance(content, dict) or self._section not in content:
                raise CheckpointError(f"{label(self.path)}: expected a {self._section}, found none")
            content = content[self._section]
        return require_tensors(self.path, content)


def check_archive(path: Path) -> None:
    """Refuse files that cannot be mapped (the legacy format, compressed entries) and pickles that are too large."""
    with require_file(path).open("rb") as file:
        is_archive = file.read(4) == b"PK\3\4"
    if not is_archive:
        raise CheckpointError(
            f"{label(path)}: expected a torch file as torch 1.6 and later save it, found another format"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{label(path)}: expected a whole torch file, found {one_line(error)}") from error
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise CheckpointError(
                f"{label(path)}: expected stored entries, found {entry.filename} compressed or encrypted"
            )
        if entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE_BYTES:
            raise CheckpointError(
                f"{label(path)}: expected {entry.filename} of at most {MAX_PICKLE_BYTES} bytes, found {entry.file_size}"
            )


def require_tensors(path: Path, content: object) -> dict[str, torch.Tensor]:
    """`content`, if it is a flat dictionary from names to dense tensors. Raises CheckpointError otherwise."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{label(path)}: expected a dictionary of tensors, found {type(content).__name__}")
    for key, tensor in content.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{label(path)}: expected tensor names, found a key of type {type(key).__name__}")
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{label(path)}: {key}: expected a tensor, found {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_nested:
            found = f"layout {'nested' if tensor.is_nested else tensor.layout} on {tensor.device.type}"
            raise CheckpointError(f"{label(path)}: {key}: expected a dense tensor, found {found}")
        # With strides of 0, a few bytes of a file can claim any size, and reading the tensor would allocate it.
        size_bytes, stored_bytes = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        if size_bytes > stored_bytes:
            raise CheckpointError(f"{label(path)}: {key}: expected {size_bytes} bytes of values, found {stored_bytes}")
    return {key: tensor.detach() for key, tensor in content.items()}
