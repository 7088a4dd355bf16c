"""Sources for text: what followed the same tokens before, in the prompt or in the answer."""

from __future__ import annotations

from .sources import Source, Table


def word_sources() -> list[Source]:
    """Prompt lookup (Saxena, 2023) by the last three tokens and by the last two."""
    return [Table("three words", (3, 2, 1)), Table("two words", (2, 1))]
