"""Manifests that tests change: with the hash of what they say now."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def seal(data: dict[str, Any]) -> None:
    """Give the fields of a manifest their own hash, as Manifest.sealed does; whether they are a manifest or not."""
    data["own_sha256"] = ""
    text = json.dumps(data, indent=1, sort_keys=True) + "\n"
    data["own_sha256"] = hashlib.sha256(text.encode()).hexdigest()
