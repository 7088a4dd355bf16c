"""`build`: a bundle's TensorRT engines."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer
from rich.table import Table

from ..errors import HealthGPTError
from .options import BundlePath, Json
from .output import print_json, print_table, progress_bar


def build(
    bundle: BundlePath,
    target: Annotated[str, typer.Option(help="tensorrt-rtx (needs no GPU), or tensorrt for the GPU at hand.")],
    compute_capability: Annotated[
        str | None, typer.Option(metavar="8.6,8.9,...", help="GPUs to build for; all of TensorRT-RTX's when left out.")
    ] = None,
    compute: Annotated[str | None, typer.Option(help="fp16 or bf16; of an fp32 or bf16 bundle its own.")] = None,
    max_context: Annotated[
        int | None, typer.Option(min=1, help="Tokens the caches hold; at most 4096 by default.")
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="New tokens of a decode pass, as drafts need.")] = 64,
    plugin: Annotated[bool, typer.Option("--plugin", help="Our H-LoRA kernel in the full TensorRT.")] = False,
    stream_weights: Annotated[
        bool, typer.Option("--stream-weights", help="For a GPU too small for the weights: keep there what fits.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build a bundle's TensorRT engines into it, in place of older ones of the same target."""
    from ..bundle import Bundle

    try:
        from ..export.engines.build import build_engines, default_settings
    except ModuleNotFoundError as error:
        raise HealthGPTError(f"build needs {error.name}: pip install 'healthgpt-edge[engines]'") from error
    opened = Bundle.open(bundle)
    capabilities = tuple(compute_capability.split(",")) if compute_capability else ()
    settings = default_settings(opened.manifest, capabilities, compute, max_context, max_rows, plugin, stream_weights)
    with progress_bar() as progress:
        bar = progress.add_task("build", total=None)
        record = build_engines(
            opened,
            target,
            settings,
            on_step=lambda name, done, total: progress.update(bar, description=name, completed=done, total=total),
        )
    if as_json:
        print_json({"bundle": str(bundle), **dataclasses.asdict(record)})
        return
    table = Table("engine", "bytes", "seconds", title=f"{bundle}: {target} {record.tensorrt}, {settings.compute}")
    for name, entry in record.engines.items():
        table.add_row(name, f"{entry.size:,}", f"{entry.seconds:.1f}")
    print_table(table)
