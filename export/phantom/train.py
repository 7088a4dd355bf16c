"""Trains the phantom from scratch and writes it in the released layout.

    python -m healthgpt_edge.export.phantom --seed 0 --out DIR

The stages, all of them seeded:
1. the VQGAN;
2. the CLIP tower, on labelled phantoms;
3. the base language model, on text and on copying, never on pictures;
4. with all of these frozen, the comprehension plugin;
5. the generation plugin, first on pictures made from pictures, then also on pictures made from words.

Each stage's result is kept in DIR/work, so an interrupted run continues with the next stage. Progress is logged in
DIR/training.log; the figures on held-out phantoms are in DIR/metrics.json.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from healthgpt_edge.files import written_whole
from healthgpt_edge.phantoms import Phantom

from ..reference.model import HealthGPT
from ..reference.vqgan import Vqgan
from . import autoencoder, base, measure, plugins, release, vision
from .corpus import Words, write_tokenizer_files
from .pictures import training_phantoms

PICTURE_PHANTOMS = 800  # used to train generation
CODES_BATCH = 16
WORDS_SHARE = 0.6  # the share of the last stage's batches that draw from words


@dataclass(frozen=True, slots=True)
class Steps:
    """The length of each stage in batches, and the numbers of phantoms for training and for measuring."""

    vqgan: int = 1200
    vision: int = 1200
    base: int = 300
    comprehension: int = 1000
    generation: int = 1500
    drawing: int = 2000
    phantoms: int = 4000
    held_out: int = 100


class Training:
    """One run of all stages in the folder `out`."""

    def __init__(self, out: Path, seed: int, steps: Steps) -> None:
        self.out, self.seed, self.steps = out, seed, steps
        for name in ("base", "vision", "plugins", "vqgan", "work"):
            (out / name).mkdir(parents=True, exist_ok=True)
        self.started = time.time()
        self.subjects = training_phantoms(seed, steps.phantoms)
        write_tokenizer_files(out / "base")
        self.words = Words(out / "base")

    def report(self, line: str) -> None:
        line = f"{time.time() - self.started:6.0f} s  {line}"
        print(line, flush=True)
        with (self.out / "training.log").open("a") as log:
            log.write(line + "\n")

    def stage(self, name: str, train: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The state of a stage: read from DIR/work, or else trained and stored there with the seconds that it took.

        Compare `core_seconds`: elapsed seconds also depend on other programs on the machine.
        """
        path = self.out / "work" / f"{name}.pt"
        if not path.is_file():
            started, core_started = time.time(), time.process_time()
            state = train()
            spent = {"seconds": time.time() - started, "core_seconds": time.process_time() - core_started}
            with written_whole(path) as file:
                torch.save({"state": state, **spent}, file)
        return torch.load(path, weights_only=True)["state"]

    def spent(self, unit: str) -> dict[str, int]:
        """The `seconds` or `core_seconds` of each stage that has them."""
        kept = {path.stem: torch.load(path, weights_only=True) for path in sorted((self.out / "work").glob("*.pt"))}
        return {name: round(stage[unit]) for name, stage in kept.items() if unit in stage}

    def run(self) -> dict[str, Any]:
        """Run every stage and write all files. Returns the figures of metrics.json."""
        seed, steps, out = self.seed, self.steps, self.out
        vqgan = Vqgan(autoencoder.CONFIG)
        vqgan.load_state_dict(
            self.stage("vqgan", lambda: autoencoder.train(seed, steps.vqgan, self.report).state_dict())
        )
        vqgan.eval().requires_grad_(False)
        release.write_vqgan(out / "vqgan", vqgan, autoencoder.CONFIG)

        tower = self.stage("vision", lambda: vision.train(seed, steps.vision, self.subjects, self.report).state_dict())
        base_state = self.stage("base", lambda: base.train(seed, steps.base, self.words, self.report).state_dict())
        # The plugins are trained on the float16 weights of the base's file, as for a release.
        base_state = {name: value.half().float() for name, value in base_state.items()}

        answering = plugins.new_plugin(plugins.COMPREHENSION_TASK, base_state, tower)
        release.write_base(out / "base", answering)
        release.write_vision(out / "vision", answering)
        answering.load_state_dict(
            self.stage(
                "comprehension",
                lambda: plugins.train_comprehension(
                    seed, steps.comprehension, answering, self.words, self.subjects, self.report
                ).state_dict(),
            )
        )
        release.write_comprehension(out / "plugins", answering)

        drawing = plugins.new_plugin(plugins.GENERATION_TASK, base_state, tower)
        shown = self.subjects[:PICTURE_PHANTOMS]
        codes = self.stage("codes", lambda: {"codes": encode(vqgan, shown)})["codes"]
        draw = partial(self._train_generation, drawing, shown, codes)
        drawing.load_state_dict(self.stage("generation", lambda: draw(steps.generation, 0.0)))
        drawing.load_state_dict(self.stage("drawing", lambda: draw(steps.drawing, WORDS_SHARE)))
        release.write_generation(out / "plugins", drawing)
        return self._measure(answering, drawing, vqgan)

    def _train_generation(
        self, model: HealthGPT, subjects: list[Phantom], codes: Tensor, steps: int, words_share: float
    ) -> dict[str, Tensor]:
        return plugins.train_generation(
            self.seed,
            steps,
            model,
            self.words,
            subjects,
            codes,
            self.report,
            keep=lambda so_far: release.write_generation(self.out / "plugins", so_far),
            words_share=words_share,
        ).state_dict()

    def _measure(self, answering: HealthGPT, drawing: HealthGPT, vqgan: Vqgan) -> dict[str, Any]:
        """Measure the written model: weights rounded to float16, arithmetic in float32."""
        for model in (answering, drawing):
            model.requires_grad_(False).eval()
            plugin = {name: value.half().float() for name, value in model.state_dict().items() if "vision" not in name}
            model.load_state_dict(plugin, strict=False)
        steps, count = self.steps, self.steps.held_out
        metrics = {
            "seed": self.seed,
            "steps": asdict(steps),
            "seconds": self.spent("seconds"),
            "core_seconds": self.spent("core_seconds"),
            "held_out_phantoms": count,
            "answers": measure.answers(answering, self.words, count),
            "pictures": measure.pictures(drawing, vqgan, self.words, count),
            "drawings": measure.drawings(answering, drawing, vqgan, self.words, count),
        }
        (self.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        self.report(json.dumps(metrics))
        return metrics


@torch.no_grad()
def encode(vqgan: Vqgan, subjects: list[Phantom]) -> Tensor:
    """The codes of each subject's CT and MR, int64 [len(subjects), 2, 256]."""
    pictures = np.stack(vision.both(subjects))
    parts = [
        vqgan.encode(autoencoder.to_input(pictures[start : start + CODES_BATCH])).flatten(1)
        for start in range(0, len(pictures), CODES_BATCH)
    ]
    return torch.cat(parts).unflatten(0, (len(subjects), 2))


def train(out: Path, seed: int, steps: Steps | None = None, keep_work: bool = True) -> dict[str, Any]:
    """Train every stage and write the released layout to `out`. Returns the figures of metrics.json."""
    metrics = Training(out, seed, steps or Steps()).run()
    if not keep_work:
        shutil.rmtree(out / "work")
    return metrics
