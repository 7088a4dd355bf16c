"""`generate`: a picture from a picture, or from words alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .loading import load_session
from .options import (
    BundlePath,
    Certify,
    Device,
    ExecutorName,
    Frame,
    InputImage,
    Json,
    Kernels,
    Seed,
    Temperature,
    Threads,
    TopK,
    TopP,
    Verify,
    Window,
    parse_window,
    typed,
)
from .output import note_uncertified, print_json, progress_bar


def generate(
    bundle: BundlePath,
    instruction: Annotated[str, typer.Option(help="What to make.")],
    out: Annotated[Path, typer.Option(help="The file to write: PNG, or DICOM of the study of --image.")],
    image: InputImage = None,
    faithful: Annotated[bool, typer.Option("--faithful", help="Run free, as the original does.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens at most, or the run is cut; by default 76 more than codes.")
    ] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    frame: Frame = None,
    window: Window = None,
    draft: Annotated[str, typer.Option(help="Guess ahead: auto, input (its codes), jacobi or none.")] = "auto",
    certify: Certify = False,
    show_progress: Annotated[
        bool, typer.Option("--progress", help="Meanwhile write the picture so far to NAME.partial.png.")
    ] = False,
    executor: ExecutorName = "onnx",
    device: Device = None,
    threads: Threads = None,
    kernels: Kernels = True,
    verify: Verify = True,
    as_json: Json = False,
) -> None:
    """Make a picture from a picture, or from words alone."""
    from ..images import write_image
    from ..manifest import GENERATION
    from ..requests import PICTURE, checked_request, refuse_the_image, result_fields

    # Refused before the bundle is hashed and loaded, which takes a while.
    picture, study, options = checked_request(
        PICTURE,
        image,
        frame,
        parse_window(window),
        out,
        dashes="--",
        draft=draft,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        max_new_tokens=max_new_tokens,
        certify=certify,
        faithful=faithful,
    )
    partial = out.with_suffix(".partial.png")
    if show_progress:
        refuse_the_image(partial, image, "the file of --progress", "--")
    session = load_session(
        bundle,
        tasks=(GENERATION,),
        executor=executor,
        device=device,
        threads=threads,
        verify=verify,
        kernels=kernels,
    )
    try:
        with progress_bar() as progress:
            codes = session.bundle.manifest.codes
            total = codes.grid**2 if codes else 0
            bar = progress.add_task("prompt", total=None)
            result = session.generate(
                picture,
                typed(instruction),
                **options,
                on_prompt=lambda read, of: progress.update(bar, completed=read, total=of),
                # The end, and newlines between rows, are tokens and no codes.
                on_code=lambda count: progress.update(
                    bar, description="codes", completed=min(count, total), total=total
                ),
                on_preview=(lambda pixels, rows: write_image(partial, pixels)) if show_progress else None,
            )
    finally:
        if show_progress:
            partial.unlink(missing_ok=True)
    write_image(out, result.pixels, study)
    note_uncertified(result)
    if as_json:
        print_json(result_fields(result) | {"image": typed(str(out))})
    else:
        print(out)
