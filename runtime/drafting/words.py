"""Sources for text: what followed the same words before, in the question or in the answer."""

from __future__ import annotations

from .sources import Source, Table


def word_sources() -> list[Source]:
    """Prompt lookup (Saxena, 2023) by the last three tokens and by the last two."""
    return [
        Table("three words", lambda ids, place: tuple(ids[place - 3 : place]) if place >= 3 else place),
        Table("two words", lambda ids, place: tuple(ids[place - 2 : place]) if place >= 2 else place),
    ]
