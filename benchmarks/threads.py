"""What more threads give: a token and a pass over a piece of a prompt, on 1 thread to as many as there are cores.

    python -m benchmarks.threads BUNDLE [--task generation] [--context 700] [--repeat 5] [--threads N] [--out FILE]

A session for each number of threads, up to N, all timed in turn in `repeat` rounds. Before and after, so many threads
read memory as fast as they can, which is what bounds a token. Any bundle will do, such as a full-size one with random
weights (benchmarks.full_size). The logits must be the same on any number of threads, to the last bit.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from healthgpt_edge import costs, load, machine
from healthgpt_edge.bench import summary

from .passes import options, run, save

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
PROMPT_TOKENS = 256


def main() -> None:
    arguments = options(__doc__).parse_args()
    sizes = sorted({size for size in SIZES if size < arguments.threads} | {arguments.threads})
    random, length = np.random.default_rng(0), arguments.context
    contexts, tokens_ms, prompts_ms, bandwidths = {}, {}, {}, {}
    for size in sizes:
        session = load(arguments.bundle, tasks=(arguments.task,), threads=size, verify=False)
        contexts[size] = session.executor.context(arguments.task, None)
        tokens_ms[size], prompts_ms[size], bandwidths[size] = [], [], [machine.read_bandwidth(size)]
    manifest = session.bundle.manifest
    passes = [random.integers(0, manifest.language.vocab, count) for count in (length, 1, PROMPT_TOKENS)]
    for context in reversed(contexts.values()):
        context.forward(passes[0])
    for turn in range(1 + arguments.repeat):  # the first is not counted
        found = []
        for size, context in contexts.items():
            for token_ids, samples in zip(passes[1:], (tokens_ms[size], prompts_ms[size]), strict=True):
                context.length = length
                begin = time.perf_counter()
                found.append(context.forward(token_ids))
                if turn:
                    samples.append((time.perf_counter() - begin) * 1e3)
        if any((one != found[at % 2]).any() for at, one in enumerate(found)):
            sys.exit("logits must be the same on any number of threads, found others")
    report: list[dict[str, Any]] = []
    print("| threads | ms a token | times as fast | of the bandwidth | ms a prompt's pass | times as fast |")
    print("|---|---|---|---|---|---|")
    for size in sizes:
        before = bandwidths[size][0]
        bandwidth = None if before is None else max(before, machine.read_bandwidth(size) or 0.0)
        token, prompt = summary(tokens_ms[size]), summary(prompts_ms[size])
        read = costs.token_bytes(manifest, arguments.task, length) / token["p50_ms"] * 1e3
        report.append({"threads": size, "bandwidth": bandwidth, "read": read, "token": token, "prompt": prompt})
        gains = [report[0][name]["p50_ms"] / one["p50_ms"] for name, one in (("token", token), ("prompt", prompt))]
        share = f"{read / bandwidth:.0%}" if bandwidth else ""
        token_ms, prompt_ms = token["p50_ms"], prompt["p50_ms"]
        print(f"| {size} | {token_ms:.1f} | {gains[0]:.2f} | {share} | {prompt_ms:.0f} | {gains[1]:.2f} |")
    save(arguments, "passes", report)


if __name__ == "__main__":
    run(main)
