"""How commands load a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import note, progress_of

if TYPE_CHECKING:
    from ..session import Session


def load_session(bundle: Path, *, executor: str, device: str | None, kernels: bool, **options: Any) -> Session:
    """A session; a line for each reason for which answers will come slower: kernels are wanted but not built, weights
    are laid out for kernels that are not used, or there is less memory than weights."""
    from ..machine import available_memory
    from ..session import load

    with progress_of("verify", of_bytes=True) as on_verified:
        session = load(bundle, executor=executor, device=device, kernels=kernels, on_verified=on_verified, **options)
    if kernels and session.executor.name == "onnx-cpu":
        note("the native kernels are not built; ONNX Runtime's own nodes run in their place, slower")
    if session.bundle.manifest.in_panels and session.executor.name in ("onnx-cpu", "onnx-cuda"):
        note(
            "the weights lie in panels, which ONNX Runtime's own nodes widen for every token, dozens of times slower; "
            "for them there is export --layout rows"
        )
    if session.executor.name.startswith("onnx-cpu"):
        manifest, memory = session.bundle.manifest, available_memory()
        weights = sum(entry.size for entry in manifest.weights(options.get("tasks") or manifest.tasks).values())
        if memory is not None and memory < weights:
            note(
                f"the weights are {weights / 1e9:.1f} GB and this process may have {memory / 1e9:.1f} GB of memory: "
                "for every token they may be read from the disk again"
            )
    return session
