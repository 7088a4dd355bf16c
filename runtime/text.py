"""Text that a model wrote, on its way to something that would obey control characters in it."""

from __future__ import annotations

from unicodedata import category

# Embeddings, overrides and isolates of the bidirectional algorithm (UAX #9): what is shown would be in another order
# than what was written. Right-to-left scripts need none of them.
_BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def without_controls(text: str, allowed: str) -> str:
    """`text` with U+FFFD for each control that is not `allowed`: of ISO 6429, as is escape, or of text direction."""
    return "".join(letter if letter in allowed or not _is_control(letter) else "\ufffd" for letter in text)


def _is_control(letter: str) -> bool:
    return category(letter) == "Cc" or letter in _BIDI_CONTROLS
