"""Tensors in safetensors files: a single file, or shards with an index."""

from __future__ import annotations

import reprlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from healthgpt_edge.errors import CheckpointError

from .files import Entry, TensorSource, label, one_line, read_json, require_file, require_finite

SAFETENSORS_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class SafetensorsSource(TensorSource):
    """A folder with one `model.safetensors`, or with shards and an index.

    A shard is opened anew for each tensor. Otherwise the mapped pages would add up to the whole model.
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
        """Does nothing: no file stays open."""


def shards(index: Path) -> dict[str, set[str]]:
    """The keys of each shard by file name, as the index lists them. Shards must be files in the index's folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{label(index)}: expected a weight_map, found {type(weight_map).__name__}")
    found: dict[str, set[str]] = {}
    for key, shard in weight_map.items():
        plain = isinstance(shard, str) and Path(shard).name == shard and "\\" not in shard
        if not plain or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{label(index)}: {key}: expected a .safetensors file of this folder, found {reprlib.repr(shard)}"
            )
        found.setdefault(shard, set()).add(key)
    return found
