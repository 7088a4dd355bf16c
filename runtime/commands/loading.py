"""How commands load a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import note, progress_of

if TYPE_CHECKING:
    from ..session import Session


def load_session(bundle: Path, *, executor: str, device: str | None, kernels: bool, **options: Any) -> Session:
    """A session; where the kernels are wanted but not built, one line says so, for answers then come slower."""
    from ..session import load

    with progress_of("verify", of_bytes=True) as on_verified:
        session = load(bundle, executor=executor, device=device, kernels=kernels, on_verified=on_verified, **options)
    if kernels and session.executor.name == "onnx-cpu":
        note("the native kernels are not built; ONNX Runtime's own nodes run in their place, slower")
    return session
