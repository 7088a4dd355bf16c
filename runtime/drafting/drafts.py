"""Which drafter a request gets, and what a session knows of its machine."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

from PIL import Image

from ..errors import OptionError
from ..executors import Executor
from ..images import prepare
from ..invariance import rows_agree
from ..manifest import Manifest
from .costs import PassKind, RowCosts
from .drafter import Drafter
from .pace import Pace
from .pictures import input_sources, own_sources
from .words import word_sources

PICTURE_DRAFTS = ("auto", "input", "jacobi", "none")
TEXT_DRAFTS = ("auto", "lookup", "none")
# The exponent that Pace expects before the request has shown one.
_PICTURE_EXPONENT, _TEXT_EXPONENT = 0.6, 0.3
# Most answers are too short for drafting to pay.
_PLAIN_WORDS = 16
# The share of a plain run's time that encoding the picture may take: without it Jacobi finds nearly as much.
_ENCODER_SHARE = 0.03


class Drafts:
    """Makes the drafters of a session. Keeps the cost of rows for each kind of pass, and whether a task may be drafted
    for."""

    def __init__(self, executor: Executor, manifest: Manifest) -> None:
        self._executor, self.manifest = executor, manifest
        self.costs: dict[PassKind, RowCosts] = defaultdict(lambda: RowCosts(executor.rows_in_tiles))
        self._agreement: dict[str, bool] = {}
        self._encoder_seconds = 0.0

    def agree(self, task: str) -> bool:
        """Whether a token gets the same bits in passes of any number of rows; tested when first asked."""
        if task not in self._agreement:
            self._agreement[task] = rows_agree(self._executor, task)
        return self._agreement[task]

    def for_picture(self, mode: str, kind: PassKind, image: Image.Image | None) -> Drafter | None:
        """A drafter for a picture made from `image` (None: from words); None for plain decoding.

        Raises OptionError, and BundleError if `image` must be encoded and the bundle has no encoder.
        """
        check_draft(mode, PICTURE_DRAFTS)
        codes = self.manifest.codes
        if mode == "none" or codes is None:
            return None
        sources = own_sources(codes.grid)
        lost = 0.0  # an encoding that was asked for is no loss
        encoded = mode == "input" or (mode == "auto" and self._encoding_pays(kind, image))
        if encoded:
            if image is None:
                raise OptionError("drafts from the input need a picture, got none")
            begin = time.perf_counter()
            grid = self._executor.draft(prepare(image, codes.image_size, self.manifest.vision.background))
            self._encoder_seconds = time.perf_counter() - begin
            lost = self._encoder_seconds if mode == "auto" else 0.0
            sources = [*input_sources(grid, codes.first), *sources]
        return Drafter(
            "input" if encoded else "jacobi",
            sources,
            Pace(self.costs[kind], _PICTURE_EXPONENT, codes.grid**2, lost),
            allowed=lambda: mode != "auto" or self.agree(kind.task),
            jacobi=mode != "input",
            newline=codes.newline,
            width=codes.grid,
        )

    def for_text(self, mode: str, kind: PassKind, prompt: Sequence[int]) -> Drafter | None:
        """A drafter for the answer to `prompt`, token ids; None for plain decoding. Raises OptionError."""
        check_draft(mode, TEXT_DRAFTS)
        if mode == "none":
            return None
        return Drafter(
            "lookup",
            word_sources(),
            Pace(self.costs[kind], _TEXT_EXPONENT),
            allowed=lambda: mode != "auto" or self.agree(kind.task),
            jacobi=mode == "auto",
            prompt=prompt,
            plain=_PLAIN_WORDS,
        )

    def _encoding_pays(self, kind: PassKind, image: Image.Image | None) -> bool:
        """Whether there is a picture, the bundle has an encoder, and encoding did not prove too slow for this model."""
        codes = self.manifest.codes
        if image is None or codes is None or "draft" not in self.manifest.tasks[kind.task].graphs:
            return False
        plain_seconds = codes.grid**2 * self.costs[kind].plain_among_fewest
        return self._encoder_seconds <= _ENCODER_SHARE * plain_seconds


def check_draft(mode: str, known: tuple[str, ...]) -> None:
    """Raise OptionError unless `mode` is one of PICTURE_DRAFTS or TEXT_DRAFTS, whichever are `known`."""
    if mode not in known:
        raise OptionError(f"draft must be one of {', '.join(known)}, got {mode!r:.40}")
