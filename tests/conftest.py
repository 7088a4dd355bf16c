"""Golden bundles, exported once a run, and one thread for whatever computes here or in a child process."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

# Before torch is imported, which reads it once. The golden models are so small that a second thread only waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before a test imports onnxruntime itself, ahead of the package that does this for its users.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"


@pytest.fixture(scope="session")
def golden_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the fp32 bundle of a golden system (m3, phi4, qwen), exported by the command line. Not to be written to."""
    from command import export_options, run

    folder = tmp_path_factory.mktemp("golden-bundles")

    @cache
    def export(system: str) -> Path:
        outcome = run("export", *export_options(system), "--out", folder / system, "--json")
        assert outcome.code == 0, outcome.errors
        return folder / system

    return export
