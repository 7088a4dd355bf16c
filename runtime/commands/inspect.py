"""`inspect`: what a bundle holds."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from rich.table import Table

from .options import BundlePath, Json
from .output import print_json, print_table

if TYPE_CHECKING:
    from ..bundle import Bundle
    from ..engines import EngineRecord


def inspect(bundle: BundlePath, as_json: Json = False) -> None:
    """Show what a bundle holds, without loading its weights."""
    from ..bundle import Bundle

    opened = Bundle.open(bundle, verify=False)
    manifest = opened.manifest
    if as_json:
        engines = {record.target: dataclasses.asdict(record) for record in _engine_records(opened)}
        print_json(json.loads(manifest.to_json()) | ({"engines": engines} if engines else {}))
        return
    table = Table("", "", title=str(bundle), show_header=False)
    language, vision = manifest.language, manifest.vision
    table.add_row("system", f"{language.architecture}, template {manifest.template}")
    blocks = f", blocks of {manifest.block_size}" if manifest.precision.startswith("int") else ""
    layout = ", in panels" if manifest.in_panels else ""
    table.add_row("precision", f"{manifest.precision}{blocks}{layout}; caches {manifest.cache_precision}")
    table.add_row("language", f"{language.layers} layers, hidden {language.hidden}, vocabulary {language.vocab}")
    table.add_row("vision", f"{vision.image_size} x {vision.image_size}, {vision.patches} patches")
    for name, task in sorted(manifest.tasks.items()):
        table.add_row(name, f"rank {task.rank}, {task.experts} experts, alpha {task.alpha:g}")
    if manifest.codes:
        codes = manifest.codes
        table.add_row("pictures", f"{codes.grid} x {codes.grid} of {codes.count} codes, {codes.image_size} px")
    for name, entry in sorted(manifest.files.items()):
        table.add_row(name, f"{entry.size:,} bytes")
    for record in _engine_records(opened):
        made = record.settings
        gpus = ", ".join(made.compute_capabilities) or "any GPU"
        held = f"{made.compute}{' with our plugin' if made.plugin else ''}, {made.max_context} tokens, for {gpus}"
        table.add_row(f"engines/{record.target}", f"TensorRT {record.tensorrt}; {held}")
        for name, engine in record.engines.items():
            table.add_row(f"engines/{record.target}/{name}.engine", f"{engine.size:,} bytes")
    print_table(table)


def _engine_records(bundle: Bundle) -> list[EngineRecord]:
    """The records of the engines in a bundle, of whichever TensorRT."""
    from ..engines import MODULES, folder, read_record

    return [read_record(bundle, target) for target in MODULES if folder(bundle, target).is_dir()]
