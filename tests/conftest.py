"""Golden bundles, exported once a process; long tests first; one thread for what computes here or in a child."""

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

# What takes a minute or more begins first, in this order: at the end one process would work on it alone. Processes are
# given files in turn, so the two that build in one folder do not wait for each other.
LONG = ["test_sanitizers.py", "test_phantom_bundle.py", "test_cuda.py", "test_engines.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


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
