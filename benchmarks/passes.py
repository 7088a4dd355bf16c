"""What benchmarks of one bundle share: options, the file of results, and errors in one line."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from healthgpt_edge import HealthGPTError, Session, machine
from healthgpt_edge.errors import in_one_line
from healthgpt_edge.manifest import GENERATION

from .commit import commit


def options(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--task", default=GENERATION)
    parser.add_argument("--context", type=int, default=700, help="tokens of each sequence before the pass")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    return parser


def pass_timer(session: Session, task: str, context_tokens: int) -> Callable[[int], float]:
    """A function that makes a pass of so many rows behind `context_tokens` others, all random, and says its seconds.

    Every pass gives the logits of all its rows, and begins at the same place of one context.
    """
    random, vocabulary = np.random.default_rng(0), session.bundle.manifest.language.vocab
    context = session.executor.context(task, None)
    context.forward(random.integers(0, vocabulary, context_tokens))

    def seconds(rows: int) -> float:
        context.length = context_tokens
        token_ids = random.integers(0, vocabulary, rows)
        begin = time.perf_counter()
        context.forward(token_ids, last_positions=rows)
        return time.perf_counter() - begin

    return seconds


def save(arguments: argparse.Namespace, name: str, passes: list[dict[str, Any]]) -> None:
    """Write machine, settings and `passes`, under that name, to `--out` if there is one."""
    if not arguments.out:
        return
    report = {
        "commit": commit(),
        "machine": machine.description(),
        "versions": {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__},
        "bundle": arguments.bundle.resolve().name,
        **{setting: getattr(arguments, setting) for setting in ("task", "context", "threads")},
        name: passes,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def run(main: Callable[[], None]) -> None:
    """What is wrong with the bundle or an option ends `main` as it ends a command: by one line and exit code 2."""
    try:
        main()
    except (HealthGPTError, OSError) as error:
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        sys.exit(2)
