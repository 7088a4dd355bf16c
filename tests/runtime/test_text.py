"""What of a model's text reaches a terminal or a report."""

from __future__ import annotations

import pytest

from healthgpt_edge.text import without_controls


@pytest.mark.parametrize(
    "control",
    ["\0", "\r", "\x1b", "\x7f", "\x85", "\x9b", *map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A)))],
)
def test_controls_are_replaced_and_bidirectional_ones_too(control: str) -> None:
    """With U+202E "no{0}lamron si ti" would read "noit is normal"."""
    assert without_controls(f"no{control}lamron", "\t\n") == "no\ufffdlamron"


def test_other_text_stays() -> None:
    """Right-to-left letters, the marks that their text may need, and what the caller allows."""
    text = "Größe 3 mm\t骨折\n\u05e9\u05dc\u05d5\u05dd\u200f, \u0633\u0644\u0627\u0645 \u200e(1)"
    assert without_controls(text, "\t\n") == text
    assert without_controls(text, "\n") == text.replace("\t", "\ufffd")
