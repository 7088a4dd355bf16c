"""Time a bundle: prefill, decode, vision, VQ decode, whole pictures, loading. Checked first, timed after.

Rows are named as llama-bench names them: `pp600` prefills 600 tokens, `tg64@700` decodes 64 tokens one by one after
700 others. Times do not depend on what is said, so prompts and pictures are random; but for `img+draft`, a picture with
drafts: how many of them are right does, and a random picture shows the least that drafting gives.
"""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import costs, machine
from .agreement import PROMPT_TOKENS, agree, decoding_agrees, outputs, random_grid, random_pixels
from .bundle import Bundle
from .decoding import CodeGrid, FreeText, Grammar, Sampling, Selector, decode
from .errors import BenchmarkError
from .executors import Context
from .inference import read_prompt
from .manifest import COMPREHENSION, GENERATION, Manifest
from .session import Session, load

# A whole picture takes minutes and is a thousand tokens already: it is drawn once for so many repeats of the rest.
REPEATS_PER_PICTURE = 5
_OF_GENERATION = ("img", "img+draft", "vq")
DEFAULT_ROWS = "load,pp600,tg64@700,img,vq,vit"
_ROW = re.compile(r"(pp)([1-9]\d{0,5})|(tg)([1-9]\d{0,5})@([1-9]\d{0,5})|(img\+draft|img|vq|vit|load)")


@dataclass(frozen=True, slots=True)
class Row:
    """What to time: `kind` is pp, tg, img, img+draft, vq, vit or load; `tokens` and `context` where it has them."""

    kind: str
    tokens: int = 0
    context: int = 0

    def label(self, manifest: Manifest) -> str:
        """The row's name; the size of the picture is in it where there is one."""
        codes_size = manifest.codes.image_size if manifest.codes else ""
        return {
            "pp": f"pp{self.tokens}",
            "tg": f"tg{self.tokens}@{self.context}",
            "vit": f"vit{manifest.vision.image_size}",
            "img+draft": f"img{codes_size}+draft",
            "load": "load",
        }.get(self.kind, f"{self.kind}{codes_size}")


@dataclass(slots=True)
class Timing:
    """The samples of one row for one task in ms; of tg, per token.

    `cost` is what `cost_unit` names: bytes per token (tg) or operations (pp). The ceiling is what the machine gives of
    it per second, just before and just after; `share` is what the median reaches of the higher one.
    """

    row: str
    task: str
    samples_ms: list[float] = field(default_factory=list)
    stages_ms: dict[str, float] = field(default_factory=dict)
    cost: int | None = None
    cost_unit: str = ""
    ceiling_before: float | None = None
    ceiling_after: float | None = None

    @property
    def share(self) -> float | None:
        if self.cost is None or self.ceiling_before is None or self.ceiling_after is None:
            return None
        return self.cost / (float(np.median(self.samples_ms)) / 1e3) / max(self.ceiling_before, self.ceiling_after)

    def to_json(self) -> dict[str, Any]:
        report = {"row": self.row, "task": self.task, **summary(self.samples_ms), "share": self.share, **asdict(self)}
        return {name: value for name, value in report.items() if value not in (None, "", {})}


def parse_rows(text: str) -> list[Row]:
    """Rows from `pp600,tg64@700,img,vq,vit,load`; raises BenchmarkError."""
    rows = []
    for word in text.split(","):
        match = _ROW.fullmatch(word)
        if not match:
            raise BenchmarkError(
                f"rows must be ppN, tgN@C, img, img+draft, vq, vit or load, with commas between, found {word!r:.40}"
            )
        kind, *numbers = (group for group in match.groups() if group)
        rows.append(Row(kind, *map(int, numbers)))
    return rows


def default_rows(manifest: Manifest) -> list[Row]:
    """DEFAULT_ROWS, without pictures where the bundle makes none."""
    makes_pictures = GENERATION in manifest.tasks
    return [row for row in parse_rows(DEFAULT_ROWS) if makes_pictures or row.kind not in _OF_GENERATION]


def summary(samples_ms: list[float]) -> dict[str, float | int]:
    """Count and percentiles, interpolated between samples."""
    percentiles = zip(("p50_ms", "p90_ms", "p99_ms"), np.percentile(samples_ms, (50, 90, 99)), strict=True)
    return {"count": len(samples_ms)} | {name: float(value) for name, value in percentiles}


def run(
    path: Path,
    rows: list[Row] | None = None,
    *,
    executor: str = "onnx",
    device: str | None = None,
    threads: int | None = None,
    kernels: bool = True,
    repeat: int = 5,
    check: bool = True,
    on_step: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Time `rows` of the bundle at `path` (by default `default_rows`), `repeat` times each, and return the report that
    `bench --json` prints.

    Each task must decode to what it prefills to, and with `check` the kernels or engines must give what the graphs'
    standard bodies give on the CPU. Raises BenchmarkError where they do not, before anything is timed.
    """
    manifest = Bundle.open(path, verify=False).manifest
    rows = default_rows(manifest) if rows is None else rows
    _check_fit(manifest, rows)

    def open_session() -> Session:
        return load(path, executor=executor, device=device, threads=threads, verify=False, kernels=kernels)

    expected = None
    plain = executor == "onnx" and device in (None, "cpu") and not kernels
    if check and not plain:
        on_step("standard bodies")
        expected = outputs(load(path, threads=threads, verify=False, kernels=False))
    on_step("load")
    loading = Timing("load", "all")
    session = _time_loads(open_session, repeat, loading) if Row("load") in rows else open_session()
    memory = {"pss_after_load_bytes": machine.proportional_memory()}
    on_step("check")
    agreements = decoding_agrees(session)
    if expected is not None:
        agreements += agree(manifest, outputs(session), expected)
    bench = _Bench(session, threads or machine.cores(), repeat)
    timings = []
    for row in rows:
        on_step(row.label(manifest))
        timings += [loading] if row.kind == "load" else bench.time(row)
    memory["pss_at_end_bytes"] = machine.proportional_memory()
    return {
        "bundle": {
            "name": path.resolve().name,
            "precision": manifest.precision,
            "block_size": manifest.block_size,
            "cache_precision": manifest.cache_precision,
            "language": asdict(manifest.language),
            "ranks": {name: task.rank for name, task in manifest.tasks.items()},
        },
        "machine": machine.description(),
        "versions": {"python": platform.python_version()}
        | {name: machine.version(name) for name in ("healthgpt-edge", "numpy", "onnxruntime")},
        "settings": {
            "executor": session.executor.name,
            # In use, not only asked for: they may not be built.
            "kernels": "+kernels" in session.executor.name,
            "instruction_set": machine.instruction_set() if session.executor.name == "onnx-cpu+kernels" else None,
            "threads": bench.threads,
            "repeat": repeat,
            "weights_verified": False,
        },
        "checks": [asdict(one) for one in agreements],
        "memory": memory,
        "rows": [timing.to_json() for timing in timings],
    }


class _Bench:
    """A loaded session and how to time it."""

    def __init__(self, session: Session, threads: int, repeat: int) -> None:
        self.session, self.threads, self.repeat = session, threads, repeat
        self.manifest = session.bundle.manifest
        self._random = np.random.default_rng(0)

    def time(self, row: Row) -> list[Timing]:
        """Time one row for each task that has it."""
        method = {"pp": self._prefill, "tg": self._decode, "vq": self._codes, "vit": self._vision}
        method |= dict.fromkeys(("img", "img+draft"), self._picture)
        tasks = [GENERATION] if row.kind in _OF_GENERATION else sorted(self.manifest.tasks)
        timings = [Timing(row.label(self.manifest), task) for task in tasks]
        for timing in timings:
            method[row.kind](row, timing)
        return timings

    def _ceiling(self, measure: Callable[..., float | None], *arguments: Any) -> float | None:
        """What the processor gives at most; None where a GPU computes (benchmarks/gpu measures those)."""
        return measure(*arguments) if self.session.executor.name.startswith("onnx-cpu") else None

    def _prefill(self, row: Row, timing: Timing) -> None:
        kind = "int8" if self.manifest.precision.startswith("int") else "float32"
        timing.cost = costs.prefill_operations(self.manifest, timing.task, row.tokens)
        timing.cost_unit = f"{kind} op"
        ids = self._ids(row.tokens)
        timing.ceiling_before = self._ceiling(machine.arithmetic_rate, kind, self.threads)
        timing.samples_ms = _times(lambda: self._read(timing.task, ids), self.repeat)
        timing.ceiling_after = self._ceiling(machine.arithmetic_rate, kind, self.threads)

    def _read(self, task: str, ids: np.ndarray) -> None:
        executor = self.session.executor
        read_prompt(executor, executor.context(task, None), ids)

    def _decode(self, row: Row, timing: Timing) -> None:
        # The caches grow with the context; this is the middle of the row.
        timing.cost = costs.token_bytes(self.manifest, timing.task, row.context + row.tokens // 2)
        timing.cost_unit = "bytes"
        context = self.session.executor.context(timing.task, None)
        logits = context.forward(self._ids(row.context))
        timing.ceiling_before = self._ceiling(machine.read_bandwidth, self.threads)
        for _ in range(self.repeat):
            context.length = row.context
            timing.samples_ms += self._token_times(context, logits, timing.task, row.tokens)
        timing.ceiling_after = self._ceiling(machine.read_bandwidth, self.threads)

    def _token_times(self, context: Context, logits: np.ndarray, task: str, count: int) -> list[float]:
        """Milliseconds of each of `count` tokens in the loop that users get, selection and all."""
        codes = self.manifest.codes
        grammar: Grammar = FreeText()
        if task != COMPREHENSION and codes is not None:
            grammar = CodeGrid(codes.first, codes.count, codes.end, codes.newline, count + 1)
        first_logit = self.manifest.tasks[task].first_logit
        selector = Selector(Sampling(), self.manifest.decoding.repetition_penalty, first_logit)
        moments: list[float] = []
        # One token more than is timed: the first comes from the prefill's logits.
        decode(
            context,
            logits,
            grammar,
            selector,
            stop_ids=frozenset(),
            max_new_tokens=count + 1,
            on_token=lambda token_id: moments.append(time.perf_counter()),
        )
        return [float(gap) * 1e3 for gap in np.diff(moments)]

    def _vision(self, row: Row, timing: Timing) -> None:
        pixels = random_pixels(self.manifest)
        timing.samples_ms = _times(lambda: self.session.executor.features(timing.task, pixels), self.repeat)

    def _codes(self, row: Row, timing: Timing) -> None:
        grid = random_grid(self.manifest)
        timing.samples_ms = _times(lambda: self.session.executor.picture(grid), self.repeat)

    def _picture(self, row: Row, timing: Timing) -> None:
        source = random_pixels(self.manifest)
        draft = "auto" if row.kind == "img+draft" else "none"
        stages: list[dict[str, float]] = []
        timing.samples_ms = _times(
            lambda: stages.append(self.session.generate(source, "Reconstruct the image.", draft=draft).timings_ms),
            -(-self.repeat // REPEATS_PER_PICTURE),
        )
        timing.stages_ms = _medians(stages)

    def _ids(self, count: int) -> np.ndarray:
        return self._random.integers(0, self.manifest.language.vocab, count)


def _time_loads(open_session: Callable[[], Session], repeat: int, timing: Timing) -> Session:
    """Load all tasks `repeat` times, each time to the first token of a short prompt; returns the last session."""
    stages = []
    session = open_session()  # the page cache is warm after it
    for _ in range(repeat):
        del session  # two at a time may not fit
        begin = time.perf_counter()
        session = open_session()
        loaded = time.perf_counter()
        session.executor.context(next(iter(session.bundle.manifest.tasks)), None).forward(np.arange(PROMPT_TOKENS))
        end = time.perf_counter()
        timing.samples_ms.append((end - begin) * 1e3)
        stages.append({"load": (loaded - begin) * 1e3, f"prefill of {PROMPT_TOKENS}": (end - loaded) * 1e3})
    timing.stages_ms = _medians(stages)
    return session


def _check_fit(manifest: Manifest, rows: list[Row]) -> None:
    most = manifest.language.max_positions
    for row in rows:
        if row.tokens + row.context > most:
            raise BenchmarkError(f"row {row.label(manifest)} must fit the {most} positions of the bundle")
        if row.kind in _OF_GENERATION and GENERATION not in manifest.tasks:
            raise BenchmarkError(f"row {row.kind} needs a bundle with generation, this one has none")


def _times(action: Callable[[], object], count: int) -> list[float]:
    samples = []
    for _ in range(count):
        begin = time.perf_counter()
        action()
        samples.append((time.perf_counter() - begin) * 1e3)
    return samples


def _medians(stages: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.median([one[name] for one in stages])) for name in stages[0]}
