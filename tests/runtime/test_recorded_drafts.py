"""The drafts of every pass of some requests, as they were recorded, by a clock of given costs.

To record them anew, after a change of what is drafted: `python tests/runtime/test_recorded_drafts.py`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from healthgpt_edge import decoding, steps
from healthgpt_edge.decoding import CodeGrid, FreeText, Sampling, Selector, decode
from healthgpt_edge.drafting.costs import RowCosts
from healthgpt_edge.drafting.drafter import Drafter
from healthgpt_edge.drafting.pace import Pace
from healthgpt_edge.drafting.pictures import input_sources, own_sources
from healthgpt_edge.drafting.words import word_sources

RECORD = Path(__file__).parents[1] / "data" / "recorded_drafts.json"
WIDTH, CODES, NEWLINE, END = 16, 40, 40, 41
# Milliseconds of a pass, and of each of its rows.
COSTS = {"free": (1.0, 0.0), "cheap": (0.9, 0.1), "near": (0.5, 0.12), "dear": (0.1, 0.9)}


class Clock:
    """Seconds that pass only where they are added."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Painter:
    """Logits for pictures that go by the input's code, the tokens before, and chance; or for text that repeats."""

    room = None

    def __init__(self, clock: Clock, cost: tuple[float, float], surprise: float, newlines: bool, text: bool) -> None:
        self.clock, self.cost, self.surprise, self.newlines, self.text = clock, cost, surprise, newlines, text
        self.ids: list[int] = []

    @property
    def length(self) -> int:
        return len(self.ids)

    @length.setter
    def length(self, length: int) -> None:
        del self.ids[length:]

    def forward(self, token_ids: np.ndarray, last_positions: int = 1, full_vocabulary: bool = False) -> np.ndarray:
        self.clock.now += (self.cost[0] + self.cost[1] * len(token_ids)) / 1e3
        rows = []
        for token_id in token_ids.tolist():
            self.ids.append(token_id)
            rows.append(self.logits())
        return np.stack(rows)

    def logits(self) -> np.ndarray:
        rng = np.random.default_rng([len(self.ids), *self.ids[-2:]])
        logits = rng.normal(size=END + 1).astype(np.float32)
        codes = [token_id for token_id in self.ids if token_id < CODES]
        if self.text:
            favourite = (len(self.ids) * 7) % 23 if len(self.ids) % 60 < 50 else int(rng.integers(CODES))
        elif self.newlines and codes and len(codes) % WIDTH == 0 and self.ids[-1] != NEWLINE:
            favourite = NEWLINE
        else:
            above = codes[-WIDTH] if len(codes) >= WIDTH else 3
            favourite = (self.drawn(len(codes)) + (above % 3 == 0)) % CODES
        if rng.random() >= self.surprise:
            logits[favourite] += 12
        return logits

    @staticmethod
    def drawn(place: int) -> int:
        """The input's code: patches of four."""
        return (place % WIDTH // 4 * 5 + place // WIDTH // 4 * 11) % CODES


def requests() -> dict[str, list[dict]]:
    """By the name of a cost of rows, what requests that follow each other in a session draft and get."""
    recorded = {}
    grid = np.array([Painter.drawn(place) for place in range(WIDTH * WIDTH)]).reshape(WIDTH, WIDTH)
    for name, cost in COSTS.items():
        clock, costs, told = Clock(), RowCosts(), []
        for number in range(8):
            kind = ("input", "jacobi", "newlines", "text")[number % 4]
            context = Painter(clock, cost, (0.05, 0.6)[number // 4], kind == "newlines", kind == "text")
            drafted: list[list[int]] = []
            sources = word_sources() if kind == "text" else own_sources(WIDTH)
            sources = [*input_sources(grid, 0), *sources] if kind == "input" else sources
            pace = Pace(costs, 0.3) if kind == "text" else Pace(costs, 0.6, WIDTH * WIDTH)
            options = {"prompt": [1, 2, 3], "plain": 16} if kind == "text" else {"newline": NEWLINE, "width": WIDTH}
            drafter = Drafter(kind, sources, pace, **options)
            honest = drafter.draft

            def draft(most: int, lead: None, honest=honest, drafted=drafted) -> list[int]:
                drafted.append(list(honest(most)))
                return drafted[-1]

            drafter.draft = draft
            with patch.object(decoding, "time", clock), patch.object(steps, "time", clock):
                done = decode(
                    context,
                    context.logits()[None],
                    FreeText() if kind == "text" else CodeGrid(0, CODES, END, NEWLINE, WIDTH * WIDTH),
                    Selector(Sampling(0.3, seed=number) if number == 5 else Sampling(), 1.0, 0),
                    stop_ids=frozenset(),
                    max_new_tokens=300,
                    drafter=drafter,
                )
            digest = hashlib.sha256(json.dumps([drafted, done.ids]).encode()).hexdigest()
            told.append({"kind": kind, "tokens_by_pass": done.by_pass, "drafts_and_ids_sha256": digest})
        recorded[name] = told
    return recorded


@pytest.fixture(scope="module")
def made() -> dict[str, list[dict]]:
    return requests()


@pytest.mark.parametrize("cost", COSTS)
def test_requests_are_drafted_for_as_recorded(made, cost):
    assert made[cost] == json.loads(RECORD.read_text())[cost]


def test_what_is_recorded_drafts_and_does_not():
    fewer = {
        cost: [len(one["tokens_by_pass"]) < 0.6 * sum(one["tokens_by_pass"]) for one in told]
        for cost, told in json.loads(RECORD.read_text()).items()
    }
    assert sum(fewer["free"]) >= 4 and any(fewer["near"]) and not any(fewer["dear"])


if __name__ == "__main__":
    RECORD.write_text(json.dumps(requests()) + "\n")
