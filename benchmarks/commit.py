"""What code a result is of."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def commit() -> str | None:
    """COMMIT of the environment, for machines without git or its history; else HEAD of this clone; else the version of
    the installed package; None without any."""
    if told := os.environ.get("COMMIT"):
        return told
    if shutil.which("git"):
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        if head:
            return head
    try:
        return f"healthgpt-edge {metadata.version('healthgpt-edge')}"
    except metadata.PackageNotFoundError:
        return None
