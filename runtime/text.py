"""Text that a model wrote, on its way to something that would obey control characters in it."""

from __future__ import annotations

from unicodedata import category


def without_controls(text: str, allowed: str) -> str:
    """`text` with U+FFFD for each control character (those of ISO 6429, escape among them) that is not `allowed`."""
    return "".join(letter if category(letter) != "Cc" or letter in allowed else "\ufffd" for letter in text)
