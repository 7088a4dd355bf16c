"""Checkpoints of random weights (benchmarks.random_checkpoint) have the released keys and shapes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_cases import CHECKPOINTS
from safetensors import safe_open

from benchmarks.random_checkpoint import Normal, write_base, write_plugins
from benchmarks.systems import SYSTEMS

RANKS = {"comprehension": 8, "generation": 16}  # of the golden plugins


def base_shapes(folder: Path) -> dict[str, list[int]]:
    shapes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return shapes


def plugin_shapes(path: Path) -> dict[str, list[int]]:
    """Of the decoder's parts: the projector's depend on the vision tower."""
    tensors = torch.load(path, weights_only=True)
    return {name: list(tensor.shape) for name, tensor in tensors.items() if "layers" in name}


@pytest.mark.parametrize("name", SYSTEMS)
def test_keys_and_shapes_are_those_of_the_golden_checkpoint(name: str, tmp_path: Path) -> None:
    system = SYSTEMS[name]
    golden = CHECKPOINTS / system.small_base
    config = json.loads((golden / "config.json").read_text())
    small = replace(
        system,
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        intermediate=config["intermediate_size"],
        base_vocab=config["vocab_size"],
        ranks={task: RANKS[task] for task in system.ranks},
    )
    write_base(tmp_path, small, Normal(0))
    write_plugins(tmp_path, small, Normal(0))
    assert base_shapes(tmp_path) == base_shapes(golden)
    for task in small.ranks:
        assert plugin_shapes(tmp_path / small.plugin(task)) == plugin_shapes(
            golden.parent / system.folder / system.plugin(task)
        )
    assert json.loads((tmp_path / "config.json").read_text()) == config
