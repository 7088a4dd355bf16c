"""`evaluate`: the score of a bundle of the phantom model."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from .loading import load_session
from .options import BundlePath, Device, ExecutorName, Json, Kernels, Threads
from .output import print_json, print_table, progress_bar


def evaluate(
    bundle: BundlePath,
    answer_phantoms: Annotated[int, typer.Option(min=0, max=10_000, help="Phantoms to ask about.")] = 100,
    picture_phantoms: Annotated[int, typer.Option(min=0, max=10_000, help="Phantoms to make pictures of.")] = 10,
    executor: ExecutorName = "onnx",
    device: Device = None,
    threads: Threads = None,
    kernels: Kernels = True,
    as_json: Json = False,
) -> None:
    """Score a bundle of the phantom model on slices it has never seen."""
    from ..evaluate import evaluate as run

    session = load_session(bundle, executor=executor, device=device, threads=threads, kernels=kernels)
    with progress_bar() as progress:
        bar = progress.add_task("evaluate", total=None)
        result = run(
            session,
            answer_phantoms=answer_phantoms,
            picture_phantoms=picture_phantoms,
            on_step=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    if as_json:
        print_json(result.to_json())
        return
    table = Table("question", "exact", "chance", "of")
    for kind, score in result.answers.items():
        table.add_row(kind, f"{score.accuracy:.1%}", f"{score.chance:.1%}", str(score.total))
    print_table(table)
    table = Table("picture", "PSNR dB", "SSIM", "baseline PSNR", "baseline SSIM", "of")
    for kind, made in result.pictures.items():
        table.add_row(
            kind,
            f"{made.psnr:.2f}",
            f"{made.ssim:.3f}",
            f"{made.baseline_psnr:.2f}",
            f"{made.baseline_ssim:.3f}",
            str(made.total),
        )
    print_table(table)
