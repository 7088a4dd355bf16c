"""What `answer`, `generate` and `serve` share: the check of a request, and what a result says."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .bundle import is_in_bundle
from .decoding import Sampling
from .drafting import PICTURE_DRAFTS, TEXT_DRAFTS, check_draft
from .errors import OptionError
from .images import read_if_any, read_study
from .results import Answer, Picture

if TYPE_CHECKING:
    from PIL.Image import Image

    from .dicom.study import Study


class Kind(NamedTuple):
    """A kind of request: the drafts it may name, and the endings its file may have."""

    drafts: tuple[str, ...]
    suffixes: tuple[str, ...]


ANSWER, PICTURE = Kind(TEXT_DRAFTS, (".dcm",)), Kind(PICTURE_DRAFTS, (".png", ".dcm"))


class Checked(NamedTuple):
    """What a request is about, with all wrong that can be known before the bundle is loaded and the work begins."""

    picture: Image | None
    study: Study | None  # of the picture, where the file to write is DICOM
    options: dict[str, Any]  # of Session.answer and Session.generate


def checked_request(
    kind: Kind,
    source: str | os.PathLike[str] | bytes | None,
    frame: int | None,
    window: tuple[float, float] | None,
    out: str | os.PathLike[str] | None,
    *,
    dashes: str = "",
    draft: str = "auto",
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    top_k: int = 0,
    **others: Any,
) -> Checked:
    """Check a request and read its picture; `others` are options that the session itself checks.

    `dashes` stand before the names of options in messages. Raises HealthGPTError.
    """
    as_dicom = out is not None and _is_dicom_target(Path(out), kind.suffixes, source is not None, dashes)
    check_draft(draft, kind.drafts)
    options = {"draft": draft, "sampling": Sampling(temperature, top_p, seed, top_k), **others}
    picture = read_if_any(source, frame, window)
    if out is not None:
        refuse_the_image(Path(out), source, f"{dashes}out", dashes)
    study = read_study(source, frame=frame) if as_dicom and source is not None else None
    return Checked(picture, study, options)


def check_target(target: Path, option: str) -> None:
    """Raise OptionError where `option` can write no file at `target`: before minutes are spent on what to write there.

    It would take the place of a device, too, and /dev/null is everybody's.
    """
    if not target.parent.is_dir():
        raise OptionError(f"the folder to hold {target.name!r} does not exist")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OptionError(f"the folder to hold {target.name!r} cannot be written to")
    if target.exists() and not target.is_file():
        found = "a folder" if target.is_dir() else "a device or pipe"
        raise OptionError(f"{option} must be a file, {target.name!r} is {found}")
    if is_in_bundle(target):
        raise OptionError(f"{option} must not lie in a bundle, whose files are all listed: got {target.name!r} there")


def refuse_the_image(target: Path, source: str | os.PathLike[str] | bytes | None, option: str, dashes: str) -> None:
    """Raise OptionError where `target`, which `option` would write, is the picture itself: a patient's is not lost.

    `source` could be read.
    """
    if source is not None and not isinstance(source, bytes) and target.exists() and target.samefile(source):
        raise OptionError(f"{option} must not be the file of {dashes}image, got {target.name!r} for both")


def _is_dicom_target(out: Path, suffixes: tuple[str, ...], has_image: bool, dashes: str) -> bool:
    """Whether `out` is to be DICOM, not PNG; OptionError where its ending is another or it cannot be written."""
    as_dicom = out.suffix.lower() == ".dcm"
    if out.suffix.lower() not in suffixes:
        raise OptionError(f"{dashes}out must be a {' or '.join(suffixes)} file, got {out.name!r}")
    if as_dicom and not has_image:
        raise OptionError(f"{dashes}out as .dcm takes patient and study from {dashes}image, which is missing")
    try:
        usable = b"\0" not in os.fsencode(out)
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise OptionError(f"{dashes}out must be a usable path, got {out.name!r}")
    check_target(out, f"{dashes}out")
    return as_dicom


def result_fields(result: Answer | Picture) -> dict[str, Any]:
    """What is said of a result in JSON: all but its pixels."""
    names = (field.name for field in dataclasses.fields(result))
    return {name: getattr(result, name) for name in names if name != "pixels"}
