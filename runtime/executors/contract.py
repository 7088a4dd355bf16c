"""What the graphs of a bundle take and give: executors hold them to it before they allocate by the manifest."""

from __future__ import annotations

from typing import NamedTuple

from ..manifest import CACHE_TYPES, Manifest

Shape = list[int | str]


class Value(NamedTuple):
    """An input or output of a graph; `type` is numpy's name of its elements' type."""

    type: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.type} {self.shape}"


def cache_values(manifest: Manifest) -> dict[str, Value]:
    """What a sequence keeps, by what follows `past_` and `present_` in the language graph's inputs and outputs."""
    language, kind = manifest.language, CACHE_TYPES[manifest.cache_precision]
    rows = Value(kind, ["B", language.kv_heads, "M", language.head_dim])
    scales = Value("float32", ["B", language.kv_heads, "M", 1])
    layer = {"key": rows, "value": rows} | ({"key_scale": scales, "value_scale": scales} if kind == "int8" else {})
    return {f"key_values.{i}.{name}": value for i in range(language.layers) for name, value in layer.items()}


def graph_values(manifest: Manifest, task: str, role: str) -> dict[str, Value]:
    """Every input and output of a task's graph by name; letters in shapes stand for what a run chooses.

    B sequences or pictures, S new tokens, P image features, n positions asked for, M cache capacity.
    """
    language, vision, codes = manifest.language, manifest.vision, manifest.codes
    first_logit = manifest.tasks[task].first_logit
    hidden = Value("float32", ["B", "n", language.hidden])
    values: dict[str, Value] = {}
    if role == "vision":
        values["pixels"] = Value("uint8", ["B", vision.image_size, vision.image_size, 3])
        values["image_features"] = Value("float32", ["B", vision.patches, language.hidden])
    elif role == "language":
        values["token_ids"] = Value("int64", ["B", "S"])
        values["image_features"] = Value("float32", ["B", "P", language.hidden])
        values["past_length"] = Value("int64", ["B"])
        values["last_positions"] = Value("int64", [1])
        values["logits"] = Value("float32", ["B", "n", language.vocab - first_logit])
        if first_logit:
            values["hidden"] = hidden
        for name, cache in cache_values(manifest).items():
            values[f"past_{name}"] = values[f"present_{name}"] = cache
    elif role == "vocabulary":
        values["hidden"] = hidden
        values["logits"] = Value("float32", ["B", "n", first_logit])
    elif codes:
        values["codes"] = Value("int64", ["B", codes.grid, codes.grid])
        picture = Value("uint8", ["B", codes.image_size, codes.image_size, 3])
        values["image" if role == "codes" else "pixels"] = picture
    return values
