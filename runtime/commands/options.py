"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import PromptError
from ..together import MAX_TOGETHER

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A directory written by `export`.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
# Where it is computed.
Threads = Annotated[int | None, typer.Option("--threads", help="Threads to compute with; else one a usable core.")]
ExecutorName = Annotated[str, typer.Option("--executor", help="onnx, or tensorrt with the engines of `build`.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu or cuda; onnx runs on the CPU by default.", show_default=False)
]
Kernels = Annotated[bool, typer.Option("--kernels/--no-kernels", help="Native kernels, where they are built.")]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Check the hashes of the weights first.")]
Together = Annotated[
    int,
    typer.Option(
        "--together", min=1, max=MAX_TOGETHER, metavar="N", help="Do up to N at a time; each takes its own memory."
    ),
]
# What is asked.
InputImage = Annotated[Path | None, typer.Option("--image", help="PNG, JPEG or DICOM file; may be left out.")]
Frame = Annotated[int | None, typer.Option("--frame", help="Frame of a DICOM file, from 0; else the first.")]
Window = Annotated[
    str | None, typer.Option("--window", metavar="CENTRE,WIDTH", help="Window, of CT in HU; else the DICOM file's.")
]
Temperature = Annotated[float, typer.Option("--temperature", help="0 is greedy.")]
TopP = Annotated[float, typer.Option("--top-p", help="Sample from this share of the probability.")]
TopK = Annotated[int, typer.Option("--top-k", help="Sample from so many of the likeliest tokens; 0: from all.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the sampling.")]
Certify = Annotated[bool, typer.Option("--certify", help="Decode again without drafts, and fail if ids differ.")]


def parse_window(text: str | None) -> tuple[float, float] | None:
    """The numbers of `Window`. Raises PromptError."""
    if text is None:
        return None
    try:
        centre, width = (float(part) for part in text.split(","))
    except ValueError:
        raise PromptError(f"--window must be CENTRE,WIDTH, two numbers, got {text!r}") from None
    return centre, width


def typed(words: str) -> str:
    """`words` of the command line, in UTF-8 whatever the locale: where that is another, bytes come as surrogates.

    So do paths, which JSON has as text.
    """
    try:
        return words.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        return words  # refused with all other text that is none
