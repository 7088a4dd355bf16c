"""H-LoRA plugins: the adapters, the projector and possibly vocabulary rows of a task, in one or two files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from healthgpt_edge.errors import CheckpointError

from .files import Entry, label, require_tensor
from .language import LanguageConfig
from .pickles import PickleSource
from .vision import VisionConfig

Task = Literal["comprehension", "generation"]
PREFIX = "base_model.model."
ROWS = ("embed_tokens.weight", "lm_head.weight")
PARTS = ("lora_A", "lora_B", "lora_route")
MAX_RANK = 4096
_ADAPTER = re.compile(r"model\.layers\.(\d{1,4})\.(\w+\.\w+)\.(lora_A|lora_B|lora_route)\.weight")


def released_key(name: str) -> str:
    """The key in a plugin file for a name as in Checkpoint.task_tensor."""
    return PREFIX + name if name.startswith("lm_head.") else f"{PREFIX}model.{name}"


def adapter_key(layer: int, linear: str, part: str) -> str:
    """The key in a plugin file for one matrix of an adapter."""
    return f"{PREFIX}model.layers.{layer}.{linear}.{part}.weight"


@dataclass(frozen=True, slots=True)
class TaskConfig:
    """The adapter sizes of a task. `vision_layers` is the number of CLIP layers that compute its features."""

    name: Task
    rank: int
    experts: int
    alpha: float
    vision_layers: int

    @property
    def scaling(self) -> float:
        """The factor of the adapter's output: alpha / rank * experts."""
        return self.alpha / self.rank * self.experts


class Plugin:
    """The union of a task's files. If both have a key, the later file is used, as in the original."""

    def __init__(self, task: Task, adapters: Path, fusion: Path | None = None) -> None:
        self.task = task
        self.sources: list[PickleSource] = []
        self._owner: dict[str, PickleSource] = {}
        other = {"comprehension": "gen_", "generation": "com_"}[task]
        if adapters.name.startswith(other):
            raise CheckpointError(f"{label(adapters)}: expected the {task} plugin, found the other task's by its name")
        for path in (adapters, fusion):
            if path is not None:
                source = PickleSource(path)
                self.sources.append(source)
                self._owner.update(dict.fromkeys(source.entries, source))

    def owns(self, name: str) -> bool:
        return released_key(name) in self._owner

    def entry(self, key: str) -> Entry:
        return self._owner[key].entries[key]

    def read(self, key: str) -> torch.Tensor:
        return self._owner[key].read(key)

    def rows(self) -> dict[str, int]:
        """The number of vocabulary rows of each tensor with such rows, by key."""
        keys = [released_key(name) for name in ROWS if self.owns(name)]
        return {key: self.entry(key).shape[0] for key in keys if len(self.entry(key).shape) == 2}

    def sizes(self) -> tuple[int, int]:
        """Rank and number of experts, from the shapes of the first adapter."""
        first = self.sources[0]
        keys = {part: next((key for key in first.entries if f".{part}." in key), None) for part in PARTS}
        for part, key in keys.items():
            if key is None:
                raise CheckpointError(f"{label(first.path)}: expected tensors {part}, found none")
        rank, experts = first.entries[keys["lora_A"]].shape[:1], first.entries[keys["lora_route"]].shape[:1]
        if not rank or not experts or not 0 < rank[0] <= MAX_RANK or not experts[0] > 0 or rank[0] % experts[0]:
            raise CheckpointError(
                f"{label(first.path)}: expected a rank of at most {MAX_RANK} that the number of experts divides, "
                f"found rank {list(rank)} and experts {list(experts)}"
            )
        return rank[0], experts[0]

    def require(self, language: LanguageConfig, vision: VisionConfig, rank: int, experts: int) -> None:
        """Check every tensor of the files against the shapes that follow from the base and CLIP."""
        expected: dict[str, tuple[int, ...]] = {}
        for layer in range(language.layers):
            for linear in language.linears:
                outputs, inputs = language.linear_shape(linear)
                shapes = {"lora_A": (rank, inputs), "lora_B": (outputs, rank), "lora_route": (experts, inputs)}
                expected |= {adapter_key(layer, linear, part): shape for part, shape in shapes.items()}
        first = self.sources[0].path
        for key, shape in expected.items():
            if key not in self.sources[0].entries:
                raise CheckpointError(f"{label(first)}: expected tensor {key} {list(shape)}, found nothing")
        hidden = language.hidden
        needed: dict[str, tuple[int, ...]] = {
            "mm_projector.0.weight": (hidden, vision.hidden),
            "mm_projector.0.bias": (hidden,),
            "mm_projector.2.weight": (hidden, hidden),
            "mm_projector.2.bias": (hidden,),
        }
        rows = dict.fromkeys(ROWS, (language.vocab, hidden))
        if self.task == "generation":
            # Comprehension can use mean rows instead, but with mean rows all codes would be equally likely.
            needed |= rows
        for name, shape in needed.items():
            if not self.owns(name):
                files = " or ".join(label(source.path) for source in self.sources)
                if self.task == "generation" and len(self.sources) == 1:
                    files += " or a fusion file"
                raise CheckpointError(f"{files}: expected tensor {released_key(name)} {list(shape)}, found nothing")
            expected[released_key(name)] = shape
        expected |= {released_key(name): shape for name, shape in rows.items()}
        for source in self.sources:
            for key, entry in source.entries.items():
                if key.endswith("rotary_emb.inv_freq"):
                    continue
                if key not in expected:
                    raise CheckpointError(
                        f"{label(entry.path)}: expected no tensor {key}, found {entry.describe()}{_hint(key, language)}"
                    )
                require_tensor(key, entry, expected[key])

    def close(self) -> None:
        for source in self.sources:
            source.close()


def _hint(key: str, language: LanguageConfig) -> str:
    """The reason why an adapter does not fit, if its key shows it."""
    match = _ADAPTER.fullmatch(key.removeprefix(PREFIX))
    if match is None:
        return ""
    if int(match[1]) >= language.layers:
        return f" (the base has {language.layers} layers)"
    return f" (the base is {language.architecture})"
