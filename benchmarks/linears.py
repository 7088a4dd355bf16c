"""The cost of H-LoRA beside the base linears of a decoded token: the kernel with and without adapters, in turn.

    python -m benchmarks.linears --threads N [--repeat 5] [--layers 8] [--rows 1] [--instructions avx512 avx2 ...]

Times all four linears of several decoder layers at M3's sizes, int4 in blocks of 128, random and distinct, together
much larger than the cache. Threads wait in a loop between calls, as those of a session do between nodes. --rows 256 is
a pass of a prompt; --instructions takes these sets of the processor's in turn, instead of the one that the kernels use
by default.
"""

from __future__ import annotations

import argparse
import json
import time

import ml_dtypes
import numpy as np

from healthgpt_edge import _kernels
from healthgpt_edge.export.quantize import PANEL

from .systems import SYSTEMS

BLOCK_SIZE = 128


def random_matrix(random: np.random.Generator, inputs: int, outputs: int) -> _kernels.Matrix:
    """int4 weights with a spread of about 0.02, in panels where they can be."""
    values = np.frombuffer(random.bytes(inputs * outputs // 2), np.uint8)
    panels = outputs % PANEL == 0
    shape = [outputs // PANEL, inputs, PANEL] if panels else [inputs, outputs]
    scales = np.full([*shape[:-2], -(-inputs // BLOCK_SIZE), shape[-1]], 0.02 / 4.6, np.float32)
    if panels:
        scales = scales.astype(ml_dtypes.bfloat16).view(np.uint16)
    return _kernels.Matrix(values, scales, BLOCK_SIZE, shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--instructions", nargs="+", choices=_kernels.targets(), default=[None])
    arguments = parser.parse_args()
    system, random = SYSTEMS["m3"], np.random.default_rng(0)
    shapes = [(inputs, outputs) for _ in range(arguments.layers) for outputs, inputs in system.linears.values()]
    rows = {inputs: random.standard_normal((arguments.rows, inputs), np.float32) for inputs, _ in shapes}
    weights = [random_matrix(random, *shape) for shape in shapes]
    adapters = {
        task: [
            (random_matrix(random, inputs, rank + system.experts), random_matrix(random, rank, outputs))
            for inputs, outputs in shapes
        ]
        for task, rank in system.ranks.items()
    }

    threads = _kernels.Threads(arguments.threads)

    def every_linear(task: str, instructions: str | None) -> None:
        for index, ((inputs, _), weight) in enumerate(zip(shapes, weights, strict=True)):
            pair = adapters[task][index] if task in adapters else (None, None)
            experts = system.experts if task in adapters else 0
            result = _kernels.hlora_linear(rows[inputs], weight, None, *pair, experts, instructions, threads)
            assert np.isfinite(result).all()

    tasks = "base", *adapters
    samples: dict[tuple[str | None, str], list[float]] = {
        (instructions, task): [] for instructions in arguments.instructions for task in tasks
    }
    in_turn = [*samples.items()]
    for number in range(arguments.repeat + 1):
        first = number % len(in_turn)
        for (instructions, task), times in [*in_turn[first:], *in_turn[:first]]:
            begin = time.perf_counter()
            every_linear(task, instructions)
            if number:  # the first round warms up
                times.append((time.perf_counter() - begin) * 1e3)
    report = {
        "version": "healthgpt_edge._kernels",
        "note": f"the linears of {arguments.layers} distinct decoder layers, rows: {arguments.rows}, with and without "
        "adapters",
        "operations_of_base": 2 * arguments.rows * sum(inputs * outputs for inputs, outputs in shapes),
        "rows": [
            {
                "row": "linears",
                "task": task,
                "instructions": instructions or _kernels.instruction_set(),
                "samples_ms": times,
            }
            for (instructions, task), times in samples.items()
        ],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
