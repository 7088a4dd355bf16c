"""The cost of H-LoRA beside the base linears of a decoded token: the kernel with and without adapters, in turn.

    python -m benchmarks.linears --threads N [--repeat 5] [--layers 8]

Times all four linears of several decoder layers at M3's sizes, int4 in blocks of 128, random and distinct, together
much larger than the cache. Every call starts its own threads, with adapters and without.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from healthgpt_edge import _kernels

from .systems import SYSTEMS

BLOCK_SIZE = 128


def random_matrix(random: np.random.Generator, inputs: int, outputs: int) -> _kernels.Matrix:
    """int4 weights with a spread of about 0.02."""
    values = np.frombuffer(random.bytes(inputs * outputs // 2), np.uint8)
    scales = np.full((-(-inputs // BLOCK_SIZE), outputs), 0.02 / 4.6, np.float32)
    return _kernels.Matrix(values, scales, BLOCK_SIZE, [inputs, outputs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8)
    arguments = parser.parse_args()
    system, random = SYSTEMS["m3"], np.random.default_rng(0)
    shapes = [(inputs, outputs) for _ in range(arguments.layers) for outputs, inputs in system.linears.values()]
    rows = {inputs: random.standard_normal((1, inputs), np.float32) for inputs, _ in shapes}
    weights = [random_matrix(random, *shape) for shape in shapes]
    adapters = {
        task: [
            (random_matrix(random, inputs, rank + system.experts), random_matrix(random, rank, outputs))
            for inputs, outputs in shapes
        ]
        for task, rank in system.ranks.items()
    }

    def token(task: str) -> None:
        for index, ((inputs, _), weight) in enumerate(zip(shapes, weights, strict=True)):
            pair = adapters[task][index] if task in adapters else (None, None)
            experts = system.experts if task in adapters else 0
            result = _kernels.hlora_linear(rows[inputs], weight, None, *pair, experts, None, arguments.threads)
            assert np.isfinite(result).all()

    samples: dict[str, list[float]] = {task: [] for task in ("base", *adapters)}
    for number in range(arguments.repeat + 1):
        for task, times in samples.items():
            begin = time.perf_counter()
            token(task)
            if number:  # the first round warms up
                times.append((time.perf_counter() - begin) * 1e3)
    report = {
        "version": "healthgpt_edge._kernels",
        "note": f"the linears of {arguments.layers} distinct decoder layers, one token, with and without adapters",
        "rows": [{"row": "linears", "task": task, "samples_ms": times} for task, times in samples.items()],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
