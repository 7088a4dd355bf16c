"""What a request gives: an answer or a picture, and how it was made."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class Made:
    """How a result was made.

    `token_ids` are the new ones, a stop token included; `timings_ms` say where the time went. `draft` is what was
    drafted from, "none" in plain decoding. `forward_passes` are the language model's, the prefill counted as one,
    `accepted_per_pass` the tokens that each gave on average, `tokens_by_pass` those that each gave. `certified`: the
    ids are known to be those of plain decoding, because they come from it, or were compared with it, or because passes
    of this executor were found to give a token the same bits whatever their number of rows. `reused_tokens` of the
    prompt, the picture's patches among them, were kept from an earlier question.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    timings_ms: dict[str, float]
    executor: str
    draft: str
    forward_passes: int
    accepted_per_pass: float
    tokens_by_pass: list[int]
    certified: bool
    reused_tokens: int


@dataclass(frozen=True, slots=True)
class Answer(Made):
    """An answer: its `text`, and how it was made."""

    text: str


@dataclass(frozen=True, slots=True)
class Picture(Made):
    """A generated picture: `pixels` uint8 [H, W, 3], its codes in reading order, and how it was made."""

    pixels: np.ndarray
    codes: list[int]


@dataclass(slots=True)
class Clock:
    """Milliseconds per stage."""

    stages_ms: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.stages_ms[name] = (time.perf_counter() - begin) * 1e3

    def report(self) -> dict[str, float]:
        stages = ("draft", "vision", "prefill", "decode", "certify", "codes")
        report = {name: round(self.stages_ms.get(name, 0.0), 3) for name in stages}
        return report | {"total": round((time.perf_counter() - self.started) * 1e3, 3)}
