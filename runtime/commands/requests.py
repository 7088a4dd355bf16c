"""What commands that run a bundle share: loading it, and the picture that is asked about."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PromptError
from .output import note

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..session import Session


def load_session(bundle: Path, *, executor: str, device: str | None, kernels: bool, **options: Any) -> Session:
    """A session; where the kernels are wanted but not built, one line says so, for answers then come slower."""
    from ..session import load

    session = load(bundle, executor=executor, device=device, kernels=kernels, **options)
    if kernels and session.executor.name == "onnx-cpu":
        note("the native kernels are not built; ONNX Runtime's own nodes run in their place, slower")
    return session


def read_picture(path: Path | None, frame: int | None, window: str | None) -> Image | None:
    """The picture at `path`, read before the bundle is: hashing and loading that takes a while, for nothing if not."""
    from ..images import read_if_any

    return read_if_any(path, frame, _window(window))


def _window(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        centre, width = (float(part) for part in text.split(","))
    except ValueError:
        raise PromptError(f"--window must be CENTRE,WIDTH, two numbers, got {text!r}") from None
    return centre, width
