"""Reading one released file at a time: where its tensors are, one tensor when asked, and nothing that runs code."""

from __future__ import annotations

import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from healthgpt_edge.errors import CheckpointError

# The largest real ones: 2.6 MB (the tokenizer configuration of phi-4 is 17 kB, the vocabulary of Qwen2.5 2.8 MB).
MAX_TEXT_BYTES = 32 << 20
# The pickled description of the tensors, without their values; XL32's plugin needs about 200 kB.
MAX_PICKLE_BYTES = 64 << 20
# A mapped page stays in the process's resident memory once touched, so a mapping is renewed after this many bytes.
RENEW_MAPPING_BYTES = 256 << 20

DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
SAFETENSORS_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# Training frameworks whose objects a Lightning file carries beside its weights; they are replaced by `Inert`.
LIGHTNING_PACKAGES = frozenset({"lightning", "lightning_fabric", "omegaconf", "pytorch_lightning", "taming"})


def label(path: Path) -> str:
    """A file as messages name it: its folder and name, enough to tell the base's config.json from CLIP's."""
    return f"{path.parent.name}/{path.name}"


def require_file(path: Path) -> Path:
    """`path` if it is a file, otherwise a CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{label(path)}: expected a file, found {'a folder' if path.is_dir() else 'nothing'}")
    return path


def read_text(path: Path) -> str:
    """A small UTF-8 file."""
    size = require_file(path).stat().st_size
    if size > MAX_TEXT_BYTES:
        raise CheckpointError(f"{label(path)}: expected at most {MAX_TEXT_BYTES} bytes, found {size}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{label(path)}: expected readable UTF-8, found {type(error).__name__}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON file that holds one object."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{label(path)}: expected JSON, found {type(error).__name__}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{label(path)}: expected a JSON object, found {type(value).__name__}")
    return value


@dataclass(frozen=True, slots=True)
class Entry:
    """What a file says about one tensor, before any of its values is read."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str

    def describe(self) -> str:
        return f"{DTYPES.get(self.dtype, self.dtype)} {list(self.shape)}"


class TensorSource(ABC):
    """Named tensors of one release part; `entries` is known at once, values only when read."""

    path: Path
    entries: Mapping[str, Entry]

    @abstractmethod
    def read(self, key: str) -> torch.Tensor:
        """The tensor `key` in the file's dtype; a CheckpointError if a value is not finite."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the files."""

    def require(
        self, expected: Mapping[str, tuple[int, ...]], ignored: Callable[[str], bool] = lambda key: False
    ) -> None:
        """Check that the file holds the `expected` tensors, key to shape, and no others except `ignored` ones."""
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
    """Check what a file says about one tensor against the shape it must have."""
    if entry.dtype not in DTYPES:
        allowed = ", ".join(DTYPES.values())
        raise CheckpointError(f"{label(entry.path)}: {key}: expected one of {allowed}, found {entry.dtype}")
    if entry.shape != shape:
        raise CheckpointError(f"{label(entry.path)}: {key}: expected shape {list(shape)}, found {list(entry.shape)}")


def require_finite(path: Path, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` if every value is finite. The extremes decide: a NaN spreads to both, and no copy is made."""
    if tensor.numel() and not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor)):
        raise CheckpointError(f"{label(path)}: {key}: expected finite values, found NaN or infinity")
    return tensor


class SafetensorsSource(TensorSource):
    """A folder of safetensors: one `model.safetensors`, or the shards that an index names.

    A shard is opened for each tensor and closed again: its mapped pages would otherwise add up to the whole model.
    """

    def __init__(self, folder: Path) -> None:
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        self.entries: dict[str, Entry] = {}
        if single.is_file():
            self.path = single
            self._add(single, None)
            return
        if not index.is_file():
            raise CheckpointError(
                f"{label(folder)}: expected model.safetensors or model.safetensors.index.json, found neither"
            )
        self.path = index
        for shard, keys in shards(index).items():
            self._add(folder / shard, keys)

    def _add(self, path: Path, expected: set[str] | None) -> None:
        try:
            with safe_open(require_file(path), framework="pt") as file:
                keys = set(file.keys())
                if expected is not None and keys != expected:
                    key = min(keys ^ expected)
                    found, wanted = ("a tensor", "none") if key in keys else ("none", "a tensor")
                    raise CheckpointError(f"{label(path)}: {key}: the index expects {wanted}, the shard has {found}")
                for key in keys:
                    view = file.get_slice(key)
                    dtype = view.get_dtype()
                    self.entries[key] = Entry(path, tuple(view.get_shape()), SAFETENSORS_DTYPES.get(dtype, dtype))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{label(path)}: expected a safetensors file, found {one_line(error)}") from error

    def read(self, key: str) -> torch.Tensor:
        path = self.entries[key].path
        try:
            with safe_open(path, framework="pt") as file:
                return require_finite(path, key, file.get_tensor(key))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{label(path)}: {key}: expected a tensor, found {one_line(error)}") from error

    def close(self) -> None:
        """Nothing stays open."""


def shards(index: Path) -> dict[str, set[str]]:
    """Shard file name to the keys that the index promises in it; names must be plain files of the same folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{label(index)}: expected a weight_map, found {type(weight_map).__name__}")
    found: dict[str, set[str]] = {}
    for key, shard in weight_map.items():
        if (
            not isinstance(shard, str)
            or Path(shard).name != shard
            or "\\" in shard
            or not shard.endswith(".safetensors")
        ):
            raise CheckpointError(
                f"{label(index)}: {key}: expected a .safetensors file of this folder, found {shard!r}"
            )
        found.setdefault(shard, set()).add(key)
    return found


class Inert:
    """Stands for an object of a training framework: takes any arguments and any state, does nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


class PickleSource(TensorSource):
    """A torch file read with weights_only and mapped; the tensors of `section`, or of the top level.

    With `lightning`, classes of the training frameworks are read as `Inert` objects without importing anything; every
    other global that torch does not allow, in any file, is a CheckpointError.
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
        return require_finite(self.path, key, mapped.clone())

    def close(self) -> None:
        self._tensors = None

    def _load(self) -> dict[str, torch.Tensor]:
        try:
            unknown = get_unsafe_globals_in_checkpoint(str(self.path))
            inert = [name for name in unknown if self._lightning and name.split(".")[0] in LIGHTNING_PACKAGES]
            refused = sorted(set(unknown) - set(inert))
            if refused:
                raise CheckpointError(f"{label(self.path)}: expected tensors only, found the global {refused[0]}")
            with safe_globals([(Inert, name) for name in inert]) if inert else nullcontext():
                content = torch.load(str(self.path), map_location="cpu", weights_only=True, mmap=True)
        except CheckpointError:
            raise
        except Exception as error:  # whatever a hostile or damaged file makes the reader raise, it is the file's fault
            raise CheckpointError(f"{label(self.path)}: expected a torch file, found {one_line(error)}") from error
        if self._section is not None:
            if not isinstance(content, dict) or self._section not in content:
                raise CheckpointError(f"{label(self.path)}: expected a {self._section}, found none")
            content = content[self._section]
        return require_tensors(self.path, content)


def check_archive(path: Path) -> None:
    """Refuse what mapping cannot read: the legacy torch format, compressed entries, an oversized description."""
    if not zipfile.is_zipfile(require_file(path)):
        raise CheckpointError(
            f"{label(path)}: expected a torch file in zip format (torch 1.6 or later), found another or a truncated one"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{label(path)}: expected a torch file, found {one_line(error)}") from error
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
    """`content` if it is a flat dictionary of names to plain dense tensors."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{label(path)}: expected a dictionary of tensors, found {type(content).__name__}")
    for key, tensor in content.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{label(path)}: expected tensor names, found a key of type {type(key).__name__}")
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{label(path)}: {key}: expected a tensor, found {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise CheckpointError(
                f"{label(path)}: {key}: expected a dense contiguous tensor, found layout {tensor.layout}, "
                f"strides {list(tensor.stride()) if tensor.layout == torch.strided else '-'} on {tensor.device.type}"
            )
    return {key: tensor.detach() for key, tensor in content.items()}


def one_line(error: BaseException) -> str:
    """The first line of an error, with its class."""
    lines: Iterable[str] = str(error).splitlines()
    return f"{type(error).__name__}: {next(iter(lines), '')}"[:300]
