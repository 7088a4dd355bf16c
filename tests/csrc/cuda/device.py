"""The kernels, and arrays where they look for them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np


def load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Device:
    """The kernels, and arrays where they look for them."""

    def __init__(self, path: Path) -> None:
        self.is_host = path.name.startswith("_cuda_host")
        self.kernels: Any = load(path, "_cuda_host" if self.is_host else "_cuda")

    def put(self, array: np.ndarray) -> Any:
        if self.is_host:
            return np.array(array, order="C")  # of its own: the sanitizer knows its end
        import torch

        return torch.from_numpy(np.ascontiguousarray(array)).cuda()

    def get(self, array: Any) -> np.ndarray:
        return array if self.is_host else array.cpu().numpy()

    def claiming(self, array: Any, shape: tuple[int, ...]) -> Any:
        """The array under a shape larger than its memory, for what must refuse the shape before it reads."""
        name = "__array_interface__" if self.is_host else "__cuda_array_interface__"
        interface = getattr(array, name) | {"shape": shape, "strides": None}
        return SimpleNamespace(**{name: interface}, owner=array)

    def poisoned(self, *shape: int, dtype: Any = np.float32) -> Any:
        """An output nobody has written yet."""
        return self.put(np.full(shape, np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else np.nan, dtype))

    def workspace(self, size_bytes: int, counters: int) -> Any:
        """Working memory: it begins with so many counters, which start at zero; the rest nobody has written yet."""
        memory = np.full(size_bytes, 255, np.uint8)
        memory[: 4 * counters] = 0
        return self.put(memory)
