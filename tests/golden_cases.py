"""The golden cases as objects, and the golden checkpoints opened: shared by the tests of every part."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from healthgpt_edge.export.checkpoint import Checkpoint

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINTS = GOLDEN / "checkpoints"
# Argument of Checkpoint.open to the released path under checkpoints/<system>.
FILES = {
    "m3": {
        "base": "Phi-3-mini-4k-instruct",
        "vision": "clip-vit-large-patch14-336",
        "comprehension": "HealthGPT-M3/com_hlora_weights.bin",
        "generation": "HealthGPT-M3/gen_hlora_weights.bin",
        "fusion": "HealthGPT-M3/fusion_layer_weights.bin",
        "vqgan": "taming_transformers/ckpt",
    },
    "phi4": {
        "base": "phi-4",
        "vision": "clip-vit-large-patch14-336",
        "comprehension": "HealthGPT-L14/com_hlora_weights_phi4.bin",
    },
    "qwen": {
        "base": "Qwen2.5-32B-Instruct",
        "vision": "clip-vit-large-patch14-336",
        "comprehension": "HealthGPT-XL32/com_hlora_weights_QWEN_32B.bin",
    },
}
# What no file of a system tells: the original was given --vq_idx_nums 64 on its command line.
SETTINGS: dict[str, dict[str, Any]] = {"phi4": {"codes": 64}}


def arguments(system: str, root: Path | None = None) -> dict[str, Any]:
    """What Checkpoint.open takes for a golden system, or for its copy under `root`."""
    folder = CHECKPOINTS / system if root is None else root
    return {name: folder / path for name, path in FILES[system].items()}


def open_golden(system: str) -> Checkpoint:
    """A golden checkpoint with the original's settings."""
    return Checkpoint.open(**arguments(system), **SETTINGS.get(system, {}))


@dataclass(frozen=True)
class Case:
    """One run of the original: what it was asked and what it computed."""

    name: str

    def __str__(self) -> str:
        return self.name

    @cached_property
    def record(self) -> dict[str, Any]:
        return json.loads((GOLDEN / "expected" / f"{self.name}.json").read_text())

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / "expected" / f"{self.name}.npz") as file:
            return dict(file)

    @property
    def system(self) -> str:
        return self.record["variant"]

    @property
    def task(self) -> str:
        return {"com": "comprehension", "gen": "generation"}[self.record["task"]]

    @property
    def question(self) -> str:
        return self._argument("--question")

    @property
    def image(self) -> Path | None:
        if "pixel_values" not in self.arrays:
            return None
        return GOLDEN / "images" / self._argument("--img_path")

    @property
    def max_new_tokens(self) -> int:
        return int(self._argument("--max_new_tokens"))

    def _argument(self, name: str) -> str:
        argv = self.record["argv"]
        return argv[argv.index(name) + 1]


CASES = [Case(path.stem) for path in sorted((GOLDEN / "expected").glob("*.json"))]
