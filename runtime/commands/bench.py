"""`bench`: what a bundle takes on this machine."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from .options import BundlePath, Device, ExecutorName, Json, Kernels, Threads
from .output import print_json, print_table, progress_bar


def bench(
    bundle: BundlePath,
    rows: Annotated[
        str | None,
        typer.Option(
            help="ppN, tgN@C, img, img+draft, vq, vit or load, with commas between; by default "
            "load,pp600,tg64@700,img,vq,vit, of which a bundle that makes no pictures has no img and vq."
        ),
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, max=1000, help="Times each; a whole picture a fifth of it.")] = 5,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare with the standard bodies first.")] = True,
    executor: ExecutorName = "onnx",
    device: Device = None,
    kernels: Kernels = True,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time a bundle, after checking that it computes the same in every way it is timed."""
    from ..bench import parse_rows
    from ..bench import run as run_bench

    parsed = None if rows is None else parse_rows(rows)
    with progress_bar() as progress:
        bar = progress.add_task("bench", total=None)
        report = run_bench(
            bundle,
            parsed,
            executor=executor,
            device=device,
            threads=threads,
            kernels=kernels,
            repeat=repeat,
            check=check,
            on_step=lambda name: progress.update(bar, description=name),
        )
    if as_json:
        print_json(report)
        return
    settings = report["settings"]
    title = f"{bundle} on {report['machine']['processor']}, {settings['threads']} threads, {settings['executor']}"
    if settings["instruction_set"]:
        title += f" by {settings['instruction_set']}"
    table = Table("row", "task", "p50 ms", "p90 ms", "p99 ms", "samples", "work", "of the ceiling", title=title)
    for row in report["rows"]:
        work = f"{row['cost'] / 1e9:.3g} G {row['cost_unit']}" if "cost" in row else ""
        share = f"{row['share']:.0%}" if "share" in row else ""
        percentiles = (f"{row[name]:.2f}" for name in ("p50_ms", "p90_ms", "p99_ms"))
        table.add_row(row["row"], row["task"], *percentiles, str(row["count"]), work, share)
    print_table(table)
