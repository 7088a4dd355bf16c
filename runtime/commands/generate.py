"""`generate`: a picture from a picture, or from words alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from ..errors import HealthGPTError
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
    TopP,
    Verify,
    Window,
)
from .output import note_uncertified, print_json, progress_bar
from .requests import load_session, read_picture


def generate(
    bundle: BundlePath,
    instruction: Annotated[str, typer.Option(help="What to make.")],
    out: Annotated[Path, typer.Option(help="The file to write: PNG, or DICOM of the study of --image.")],
    image: InputImage = None,
    faithful: Annotated[bool, typer.Option("--faithful", help="Run free, as the original does.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
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
    from ..decoding import Sampling
    from ..drafting import PICTURE_DRAFTS, check_draft
    from ..images import read_study, write_image
    from ..session import GENERATION

    as_dicom = out.suffix.lower() == ".dcm"
    if not as_dicom and out.suffix.lower() != ".png":
        raise HealthGPTError(f"--out must be a .png or .dcm file, got {out.name!r}")
    if as_dicom and image is None:
        raise HealthGPTError("--out as .dcm takes patient and study from --image, which is missing")
    # Known before the bundle is loaded, and before the minutes that a picture may take.
    if not out.parent.is_dir():
        raise HealthGPTError(f"the folder to hold {out.name!r} does not exist")
    if out.is_dir():
        raise HealthGPTError(f"--out must be a file, {out.name!r} is a folder")
    check_draft(draft, PICTURE_DRAFTS)
    sampling = Sampling(temperature, top_p, seed)
    picture = read_picture(image, frame, window)
    study = read_study(image, frame=frame) if image and as_dicom else None
    session = load_session(
        bundle,
        tasks=(GENERATION,),
        executor=executor,
        device=device,
        threads=threads,
        verify=verify,
        kernels=kernels,
    )
    partial = out.with_suffix(".partial.png")
    try:
        with progress_bar() as progress:
            codes = session.bundle.manifest.codes
            bar = progress.add_task("codes", total=codes.grid**2 if codes else None)
            result = session.generate(
                picture,
                instruction,
                faithful=faithful,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                draft=draft,
                certify=certify,
                on_code=lambda count: progress.update(bar, completed=count),
                on_preview=(lambda pixels, rows: write_image(partial, pixels)) if show_progress else None,
            )
    finally:
        if show_progress:
            partial.unlink(missing_ok=True)
    write_image(out, result.pixels, study)
    note_uncertified(result)
    if as_json:
        fields = dataclasses.fields(result)
        values = {field.name: getattr(result, field.name) for field in fields if field.name != "pixels"}
        print_json(values | {"image": str(out)})
    else:
        print(out)
