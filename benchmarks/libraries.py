"""Compare two builds of the kernels' library for ONNX Runtime on one bundle: prefill, tokens, drafts and vision.

    python -m benchmarks.libraries BUNDLE BEFORE.so AFTER.so --task comprehension [--repeat 2] [--threads 2]

The machine's speed drifts by more than a kernel changes, so each round runs both, and measures the ceilings. The second
run of a round can take a tenth longer, so their order alternates. `distance` compares the logits of both: the largest
difference relative to the largest logit.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.commit import commit
from healthgpt_edge import machine
from healthgpt_edge.bench import summary
from healthgpt_edge.bundle import Bundle
from healthgpt_edge.executors import onnx

PROMPT_TOKENS, DECODED_TOKENS = 600, 16
DRAFT_ROWS, DRAFT_PASSES = (4, 6, 8, 16), 4


def open_with(bundle: Bundle, library: Path, task: str, threads: int) -> onnx.OnnxExecutor:
    """The bundle's executor for one task, with the kernels of this library."""
    onnx.DEVICES["cpu"] = onnx.DEVICES["cpu"]._replace(library=library.resolve())
    return onnx.OnnxExecutor(bundle, (task,), threads=threads)


def timed_ms(work: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    begin = time.perf_counter()
    result = work()
    return (time.perf_counter() - begin) * 1e3, result


def one_round(executor: onnx.OnnxExecutor, task: str, ids: np.ndarray, pixels: np.ndarray) -> dict[str, Any]:
    """Milliseconds of each row, and the last logits."""
    features = timed_ms(lambda: executor.features(task, pixels))[0]
    context = executor.context(task, None)
    prefill, logits = timed_ms(lambda: context.forward(ids))
    tokens = []
    for token in ids[:DECODED_TOKENS]:
        took, logits = timed_ms(lambda token=token: context.forward(np.array([token])))  # type: ignore[misc]
        tokens.append(took)
    passes: dict[str, Any] = {f"rows{count}": [] for count in DRAFT_ROWS}
    for count in DRAFT_ROWS * DRAFT_PASSES:
        context.length = PROMPT_TOKENS
        took = timed_ms(lambda count=count: context.forward(ids[:count], last_positions=count))[0]  # type: ignore[misc]
        passes[f"rows{count}"].append(took)
    return {"vit": [features], "pp": [prefill], "tg": tokens, "logits": logits} | passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("libraries", type=Path, nargs=2)
    parser.add_argument("--task", required=True)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--threads", type=int, default=machine.cores())
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    random, size = np.random.default_rng(0), bundle.manifest.vision.image_size
    ids = random.integers(0, bundle.manifest.language.vocab, PROMPT_TOKENS)
    pixels = random.integers(0, 256, (size, size, 3), np.uint8)
    names = ("before", "after")
    executors = [open_with(bundle, one, arguments.task, arguments.threads) for one in arguments.libraries]
    samples: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in names}
    logits, ceilings = {}, []
    for turn in range(1 + arguments.repeat):  # the first warms up
        ceilings.append([machine.arithmetic_rate("int8", arguments.threads), machine.read_bandwidth(arguments.threads)])
        for name, executor in list(zip(names, executors, strict=True))[:: -1 if turn % 2 else 1]:
            times = one_round(executor, arguments.task, ids, pixels)
            logits[name] = times.pop("logits")
            for row, some in times.items():
                samples[name][row] += some if turn else []
    distance = float(np.abs(logits["after"] - logits["before"]).max() / np.abs(logits["before"]).max())
    report = {
        "commit": commit(),
        "machine": machine.description(),
        "task": arguments.task,
        "threads": arguments.threads,
        "rows": {"pp": f"{PROMPT_TOKENS} tokens", "tg": f"a token after {PROMPT_TOKENS}", "vit": "a picture"}
        | {f"rows{count}": f"a pass of so many rows after {PROMPT_TOKENS}" for count in DRAFT_ROWS},
        "distance": distance,
        "int8_rate_and_bandwidth": ceilings,
        "results": {name: {row: summary(some) | {"samples_ms": some} for row, some in rows.items()}
                    for name, rows in samples.items()},
    }  # fmt: skip
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
