"""Drafts of the next tokens, which one forward pass of the model then checks all at once.

The tokens are those of plain decoding, greedy or sampled (docs/drafting.md).
"""

from .costs import PassKind
from .drafter import Drafter
from .drafts import PICTURE_DRAFTS, TEXT_DRAFTS, Drafts, check_draft

__all__ = ["PICTURE_DRAFTS", "TEXT_DRAFTS", "Drafter", "Drafts", "PassKind", "check_draft"]
