"""`answer`: words about a picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import HealthGPTError
from ..text import without_controls
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
from .output import note, note_uncertified, print_json, progress_of

# What several questions about one picture may keep of it: 0.7 GB for M3 after the longest answer.
_ONE_PICTURE_BYTES = 1 << 30


def answer(
    bundle: BundlePath,
    question: Annotated[list[str], typer.Option(help="The question; several are asked one after another.")],
    image: InputImage = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer is cut.")] = 1024,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    frame: Frame = None,
    window: Window = None,
    draft: Annotated[str, typer.Option(help="Guess ahead: auto, lookup (in the words so far) or none.")] = "auto",
    certify: Certify = False,
    keep: Annotated[
        Path | None, typer.Option(help="Keep what was read of pictures in this file, for questions to come.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write a DICOM structured report, too, in the study of --image (.dcm).")
    ] = None,
    executor: ExecutorName = "onnx",
    device: Device = None,
    threads: Threads = None,
    kernels: Kernels = True,
    verify: Verify = True,
    as_json: Json = False,
) -> None:
    """Answer a question about a picture; the text appears as it is written, a line for each question."""
    from ..images import write_report
    from ..manifest import COMPREHENSION
    from ..requests import ANSWER, check_target, checked_request, result_fields

    question = [typed(one) for one in question]
    if keep and not image:
        raise HealthGPTError("--keep needs a picture: give --image")
    # Refused before the bundle is hashed and loaded, which takes a while.
    if keep:
        check_target(keep, "--keep")
        if out and out.resolve() == keep.resolve():
            raise HealthGPTError("--keep and --out must be two files, found one")
    picture, study, options = checked_request(
        ANSWER,
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
    )
    session = load_session(
        bundle,
        tasks=(COMPREHENSION,),
        executor=executor,
        device=device,
        threads=threads,
        verify=verify,
        kernels=kernels,
        keep_pictures_bytes=_ONE_PICTURE_BYTES if len(question) > 1 or keep else 0,
    )
    if keep and keep.exists():
        session.restore_pictures(keep)

    def write(piece: str) -> None:
        # A terminal obeys control characters, whoever wrote them; files and programs get the text as it is.
        sys.stdout.write(without_controls(piece, "\t\n") if sys.stdout.isatty() else piece)
        sys.stdout.flush()

    results = []
    for one in question:
        with progress_of("prompt") as on_prompt:
            result = session.answer(picture, one, **options, on_prompt=on_prompt, on_text=None if as_json else write)
        note_uncertified(result)
        results.append(result_fields(result))
        if not as_json:
            print()
    written = {}
    if out and study:
        write_report(out, [(one, str(result["text"])) for one, result in zip(question, results, strict=True)], study)
        written["report"] = typed(str(out))
    if as_json:
        print_json((results[0] if len(results) == 1 else {"answers": results}) | written)
    # Last, for it is by far the largest: on a full disk it costs nobody the answers.
    if keep and not all(result["reused_tokens"] for result in results):
        if session.prefixes.kept():
            session.save_pictures(keep)
        else:
            note(f"nothing was kept: what was read of the picture takes more than {_ONE_PICTURE_BYTES >> 20} MiB")
