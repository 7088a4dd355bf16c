"""One call of every kernel on small operands that meet all its barriers, for the tests that plant faults."""

from __future__ import annotations

from typing import Any

import numpy as np


def hlora_linear(device: Any) -> list[np.ndarray]:
    from test_linear import EXPERT_OF, SILENT, normal, operands, run

    stored, _, bias = operands(device, "int4", (200, 136, 32, 5, 32, 0))
    x = normal(np.random.default_rng(1), 9, 200)
    router = {"expert_of": EXPERT_OF, "route_bias": SILENT["first"].astype(np.float32)}
    return [run(device, x, stored, 5, bias=bias, epsilon=1e-5, outputs=136, **router)]


def hlora_prefill(device: Any) -> list[np.ndarray]:
    from test_linear import ROUTERS, SHARED, normal, operands
    from test_prefill import prefill

    stored, _, bias = operands(device, "int4", SHARED)
    x = normal(np.random.default_rng(1), 40, SHARED[0])
    return [prefill(device, x, stored, SHARED[3], SHARED[1], bias, epsilon=0.1, **ROUTERS["first"])]


def cached_attention(device: Any, cache: str, tokens: int = 8, heads: int = 4) -> list[np.ndarray]:
    from test_attention import operands, run

    given = operands(1, tokens, heads, 2, 36, 230, [200], cache)
    output, *caches = run(device, *given, 0, cache)
    return [output, *(one[:, :, : 200 + tokens] for one in caches)]


def attention_prefill(device: Any, cache: str) -> list[np.ndarray]:
    """Two tiles of tokens, and three chunks of positions, the first of which no token of the second tile sees."""
    from test_attention import operands, run

    given = operands(1, 68, 2, 1, 36, 140, [70], cache)
    output, *caches = run(device, *given, 66, cache, by="cached_attention_prefill")
    return [output, *(one[:, :, :138] for one in caches)]


def token_selection(device: Any, temperature: float) -> list[np.ndarray]:
    from test_tokens import Selection

    random, top_p = np.random.default_rng(0), 0.9
    # Few different logits: to the last byte of its key, what a token is found by weighs much.
    logits = random.integers(0, 3, (2, 900)).astype(np.float32)
    logits[1, 777] = 3  # found by another warp than the one that writes
    # Of the tokens of top_p the last wins, and would lose to the next: one token more or less is another answer.
    times = random.standard_exponential((1, 2, 900)).astype(np.float32)
    for row, time in zip(logits, times[0], strict=True):
        falling = np.argsort(-row, kind="stable")
        masses = np.cumsum(np.exp((row[falling] - row.max()) / (temperature or 1)))
        last = np.searchsorted(masses, top_p * masses[-1])
        time[falling[last : last + 2]] = 1e-6, 1e-9
    seen = device.put(np.zeros((2, 900), np.uint8))
    settings = {"temperature": temperature, "top_p": top_p, "times": device.put(times), "seen": seen, "penalty": 1.5}
    selection = Selection(device, 2, 1, **settings)
    selection.choose(logits)
    return [device.get(one) for one in (selection.ids, selection.token, selection.past, seen)]


def gather_rows(device: Any) -> list[np.ndarray]:
    table = np.random.default_rng(0).standard_normal((9, 301)).astype(np.float16)
    output = device.poisoned(3, 301)
    device.kernels.gather_rows(device.put(np.array([8, 0, 3])), device.put(table), output, "float16", True)
    return [device.get(output)]


def group_norm(device: Any) -> list[np.ndarray]:
    x = np.random.default_rng(0).standard_normal((2, 200, 96)).astype(np.float16)
    row, y = device.put(np.ones(96, np.float32)), device.poisoned(2, 200, 96, dtype=np.float16)
    workspace = device.workspace(device.kernels.group_norm_workspace_bytes(2), 2)
    device.kernels.group_norm(device.put(x), row, row, y, workspace)
    return [device.get(y)]


def pixels(device: Any) -> list[np.ndarray]:
    phases = np.random.default_rng(0).standard_normal((1, 4, 6, 2, 2, 3)).astype(np.float16)
    image = device.poisoned(1, 6, 10, 3, dtype=np.float16)
    levels = device.put(np.full((1, 6, 10, 3), 77, np.uint8))
    device.kernels.phase_interleave(device.put(phases), image)
    device.kernels.image_levels(image, levels)
    return [device.get(image), device.get(levels)]


OPERATIONS = {
    "hlora_linear": hlora_linear,
    "hlora_prefill": hlora_prefill,
    "attention": lambda device: cached_attention(device, "float16"),
    "attention, int8": lambda device: cached_attention(device, "int8"),
    "attention of one row": lambda device: cached_attention(device, "float16", tokens=1, heads=2),
    "attention of a prompt": lambda device: attention_prefill(device, "float16"),
    "attention of a prompt, int8": lambda device: attention_prefill(device, "int8"),
    "greedy": lambda device: token_selection(device, 0.0),
    "sampling": lambda device: token_selection(device, 0.8),
    "gather_rows": gather_rows,
    "group_norm": group_norm,
    "pixels": pixels,
}
