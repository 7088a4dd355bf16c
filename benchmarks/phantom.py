"""Bundles of the trained phantom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from healthgpt_edge.export.bundle import export_bundle
from healthgpt_edge.export.checkpoint import Checkpoint
from healthgpt_edge.export.phantom.release import released_files

PHANTOM = Path(__file__).parents[1] / "phantom"
BLOCK_SIZE = 32  # the phantom is narrow: 128 would be most of a row


def export(bundle: Path, precision: str, **options: Any) -> int:
    """Export the phantom, with options of `export_bundle`; returns its bytes."""
    with Checkpoint.open(**released_files(PHANTOM)) as checkpoint:
        return export_bundle(checkpoint, bundle, precision=precision, block_size=BLOCK_SIZE, **options).total_bytes
