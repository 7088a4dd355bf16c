"""Weights of a TensorRT engine that the GPU has no room for: as many as fit stay there, a pass fetches the others.

Not run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

from ..errors import ExecutorError

# For what CUDA, kernels and copies take beside what is counted.
MARGIN_BYTES = 256 << 20
_MIB = 1 << 20
# The scratch memory depends on the budget and the budget on the scratch memory.
_ROUNDS = 4


def workspace_bytes(engine: Any) -> int:
    """What a pass of an engine (TensorRT's) needs beside tensors and weights, of any profile."""
    profiles = range(engine.num_optimization_profiles)
    return max(int(engine.get_device_memory_size_for_profile_v2(one)) for one in profiles)


def stream_weights(engine: Any, free_bytes: int) -> bool:
    """Keep as many of an engine's weights on the GPU as `free_bytes` hold beside its workspace, and stream the others.

    Before it has a context, for then TensorRT takes no other budget. Returns whether any are streamed. Raises
    ExecutorError where there is no room even for streaming all.
    """
    everything = int(engine.streamable_weights_size)

    def lacking(budget: int) -> int:
        engine.weight_streaming_budget_v2 = budget
        return budget + workspace_bytes(engine) - free_bytes

    budget = everything
    for _ in range(_ROUNDS):
        missing = lacking(budget)
        if missing <= 0:
            return budget < everything
        budget = max(0, budget - missing)
    if (missing := lacking(0)) <= 0:
        return True
    needed, found = -(-(free_bytes + missing) // _MIB), max(0, free_bytes) // _MIB
    raise ExecutorError(
        f"streaming weights needs {needed} MiB of the GPU beside caches and other engines, found {found}: "
        "build with a smaller --max-context or --max-rows"
    )
