"""One call of every kernel on small operands that meet all its barriers, for the tests that plant faults."""

from __future__ import annotations

from typing import Any

import numpy as np


def hlora_linear(device: Any, storage: str) -> list[np.ndarray]:
    from test_linear import normal, operands, run

    stored, _, bias = operands(device, storage, (300, 200, 64, 4, 32, 0))
    x = normal(np.random.default_rng(1), 9, 300)
    return [run(device, x, stored, 4, bias=bias, epsilon=1e-5, outputs=200)]


OPERATIONS = {
    "linear-float16": lambda device: hlora_linear(device, "float16"),
    "linear-int4": lambda device: hlora_linear(device, "int4"),
}
