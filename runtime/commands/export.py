"""`export`: a released checkpoint becomes a bundle."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..errors import HealthGPTError, ImageError
from .options import Json
from .output import print_json, print_table, progress_bar


def export(
    base: Annotated[Path, typer.Option(help="Directory of the base model.")],
    vision: Annotated[Path, typer.Option(help="Directory of the CLIP vision tower.")],
    out: Annotated[Path, typer.Option(help="The new bundle directory.")],
    comprehension: Annotated[Path | None, typer.Option(help="com_hlora_weights*.bin")] = None,
    generation: Annotated[Path | None, typer.Option(help="gen_hlora_weights.bin")] = None,
    fusion: Annotated[Path | None, typer.Option(help="fusion_layer_weights.bin")] = None,
    vqgan: Annotated[Path | None, typer.Option(help="Directory with model.yaml and last.ckpt.")] = None,
    template: Annotated[str | None, typer.Option(help="phi3, phi4 or qwen; inferred when left out.")] = None,
    hlora_alpha: Annotated[float | None, typer.Option(help="H-LoRA alpha; twice the rank when left out.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, fp16, bf16, int8 or int4.")] = "fp32",
    block_size: Annotated[int, typer.Option(help="Block of int8 and int4: 32, 64 or 128.")] = 128,
    cache: Annotated[str | None, typer.Option(help="Keys and values: fp32, fp16 or int8; else by precision.")] = None,
    layout: Annotated[
        str, typer.Option(help="Of int8 and int4: panels, or rows, for ONNX Runtime without our kernels.")
    ] = "panels",
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Folder of pictures (PNG, JPEG, DICOM) to round int4 or int8 for; takes minutes."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn a released checkpoint into a bundle."""
    from ..machine import cores

    try:
        import torch

        from ..export.bundle import export_bundle
        from ..export.checkpoint import Checkpoint
    except ModuleNotFoundError as error:
        raise HealthGPTError(f"export needs {error.name}: pip install 'healthgpt-edge[export]'") from error
    torch.set_num_threads(min(torch.get_num_threads(), cores()))  # it knows nothing of a container's share
    with (
        Checkpoint.open(
            base=base,
            vision=vision,
            comprehension=comprehension,
            generation=generation,
            fusion=fusion,
            vqgan=vqgan,
            template=template,
            hlora_alpha=hlora_alpha,
        ) as checkpoint,
        progress_bar() as progress,
    ):
        bar = progress.add_task("export", total=None)
        summary = export_bundle(
            checkpoint,
            out,
            precision=precision,
            block_size=block_size,
            cache=cache,
            layout=layout,
            pictures=_files(calibrate) if calibrate else (),
            on_step=lambda name, done, total: progress.update(bar, description=name, completed=done, total=total),
        )
    if as_json:
        print_json({"bundle": str(out), **dataclasses.asdict(summary)})
        return
    table = Table("file", "part", "bytes", title=f"{out} ({precision})")
    table.columns[2].justify = "right"
    for part in summary.parts:
        table.add_row(part.file, part.part, f"{part.size_bytes:,}")
    table.add_row("total", "graphs, tokenizer and padding too", f"{summary.total_bytes:,}")
    print_table(table)
    print("\n".join(f"folded: {line}" for line in summary.folded))


def _files(folder: Path) -> list[Path]:
    """The files of a folder, by name."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if not files:
        raise ImageError(f"{folder.name[:100]!r} must hold pictures, found none")
    return files
