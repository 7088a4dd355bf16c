"""What `answer`, `generate` and `serve` share: a request's options, where its file goes, and what a result says."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from .decoding import Sampling
from .drafting import check_draft
from .errors import HealthGPTError
from .results import Answer, Picture


def checked_options(
    drafts: tuple[str, ...],
    *,
    draft: str = "auto",
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    **others: Any,
) -> dict[str, Any]:
    """Options of `Session.answer` and `Session.generate`; `drafts` are the kinds of draft that there are.

    Raises GenerationError, with no bundle loaded yet.
    """
    check_draft(draft, drafts)
    return {"draft": draft, "sampling": Sampling(temperature, top_p, seed), **others}


PICTURES, REPORTS = (".png", ".dcm"), (".dcm",)


def is_dicom_target(out: Path, suffixes: tuple[str, ...], has_image: bool, dashes: str = "") -> bool:
    """Whether `out` is to be DICOM, not PNG; HealthGPTError where it ends in none of `suffixes` or cannot be written.

    Known before the minutes that a picture may take. `dashes` stand before the names of options in messages.
    """
    as_dicom = out.suffix.lower() == ".dcm"
    if out.suffix.lower() not in suffixes:
        raise HealthGPTError(f"{dashes}out must be a {' or '.join(suffixes)} file, got {out.name!r}")
    if as_dicom and not has_image:
        raise HealthGPTError(f"{dashes}out as .dcm takes patient and study from {dashes}image, which is missing")
    try:
        usable = b"\0" not in os.fsencode(out)
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise HealthGPTError(f"{dashes}out must be a usable path, got {out.name!r}")
    if not out.parent.is_dir():
        raise HealthGPTError(f"the folder to hold {out.name!r} does not exist")
    if out.is_dir():
        raise HealthGPTError(f"{dashes}out must be a file, {out.name!r} is a folder")
    return as_dicom


def result_fields(result: Answer | Picture) -> dict[str, Any]:
    """What is said of a result in JSON: all but its pixels."""
    names = (field.name for field in dataclasses.fields(result))
    return {name: getattr(result, name) for name in names if name != "pixels"}
