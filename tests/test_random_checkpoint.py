"""Checkpoints of random weights (benchmarks.random_checkpoint) have the released keys and shapes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_cases import CHECKPOINTS
from safetensors import safe_open

from benchmarks import random_checkpoint
from benchmarks.full_size import layers_of
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
    write_base(tmp_path, small, Normal(0), random_layers=system.layers)
    write_plugins(tmp_path, small, Normal(0))
    assert base_shapes(tmp_path) == base_shapes(golden)
    for task in small.ranks:
        assert plugin_shapes(tmp_path / small.plugin(task)) == plugin_shapes(
            golden.parent / system.folder / system.plugin(task)
        )
    assert json.loads((tmp_path / "config.json").read_text()) == config


def test_matrices_of_later_layers_may_be_holes(tmp_path):
    """All else has the numbers of their own, or a token would be as fast for another reason."""
    small = replace(SYSTEMS["xl32"], hidden=64, layers=3, heads=4, kv_heads=2, intermediate=160, base_vocab=400)
    write_base(tmp_path, small, Normal(0), random_layers=1)
    with safe_open(tmp_path / "model-00001-of-00001.safetensors", "pt") as file:
        zero = {name for name in file.keys() if not file.get_tensor(name).any()}  # noqa: SIM118
    assert zero == {f"model.layers.{layer}.{name}.weight" for layer in (1, 2) for name in small.linears}
    assert layers_of(tmp_path) == (3, 1)


def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    """Whoever finds the folder takes it for one."""

    def stop(folder: Path) -> None:
        raise KeyboardInterrupt

    for name in ("write_base", "write_vision", "write_plugins"):
        monkeypatch.setattr(random_checkpoint, name, lambda folder, *_: (folder / "part").touch())
    monkeypatch.setattr(sys, "argv", ["random_checkpoint", str(tmp_path / "m3")])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(random_checkpoint, "write_vqgan", stop)
        random_checkpoint.main()
    assert not (tmp_path / "m3").exists()
    monkeypatch.setattr(random_checkpoint, "write_vqgan", lambda folder: (folder / "part").touch())
    random_checkpoint.main()
    assert [path.name for path in tmp_path.iterdir()] == ["m3"]
    assert len(list((tmp_path / "m3").rglob("part"))) == 4
    with pytest.raises(SystemExit, match="m3 exists already"):
        random_checkpoint.main()
