"""What the graphs of a bundle take and give: executors hold them to it before they allocate by the manifest."""

from __future__ import annotations

from ..manifest import Manifest

Shape = list[int | str]


def graph_shapes(manifest: Manifest, task: str, role: str) -> dict[str, Shape]:
    """Name to shape of every input and output of a task's graph; letters stand for what a run chooses.

    B sequences or pictures, S new tokens, P image features, n positions asked for, M cache capacity.
    """
    language, vision, codes = manifest.language, manifest.vision, manifest.codes
    first_logit = manifest.tasks[task].first_logit
    hidden: Shape = ["B", "n", language.hidden]
    shapes: dict[str, Shape] = {}
    if role == "vision":
        shapes["pixels"] = ["B", vision.image_size, vision.image_size, 3]
        shapes["image_features"] = ["B", vision.patches, language.hidden]
    elif role == "language":
        shapes["token_ids"] = ["B", "S"]
        shapes["image_features"] = ["B", "P", language.hidden]
        shapes["past_length"] = ["B"]
        shapes["last_positions"] = [1]
        shapes["logits"] = ["B", "n", language.vocab - first_logit]
        if first_logit:
            shapes["hidden"] = hidden
        for layer in range(language.layers):
            for name in (f"key_values.{layer}.key", f"key_values.{layer}.value"):
                cache: Shape = ["B", language.kv_heads, "M", language.head_dim]
                shapes[f"past_{name}"] = shapes[f"present_{name}"] = cache
    elif role == "vocabulary":
        shapes["hidden"] = hidden
        shapes["logits"] = ["B", "n", first_logit]
    elif codes:
        shapes["codes"] = ["B", codes.grid, codes.grid]
        shapes["image" if role == "codes" else "pixels"] = ["B", codes.image_size, codes.image_size, 3]
    return shapes
