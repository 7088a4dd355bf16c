"""How commands load a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import note, progress_bar

if TYPE_CHECKING:
    from ..session import Session


def load_session(bundle: Path, *, executor: str, device: str | None, kernels: bool, **options: Any) -> Session:
    """A session; where the kernels are wanted but not built, one line says so, for answers then come slower."""
    from ..session import load

    with progress_bar(of_bytes=True) as progress:
        bar = progress.add_task("verify", total=None)
        session = load(
            bundle,
            executor=executor,
            device=device,
            kernels=kernels,
            on_verified=lambda read, total: progress.update(bar, completed=read, total=total),
            **options,
        )
    if kernels and session.executor.name == "onnx-cpu":
        note("the native kernels are not built; ONNX Runtime's own nodes run in their place, slower")
    return session
