"""Engines that run the graphs of a bundle, behind one protocol."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import numpy as np

from ..bundle import Bundle
from ..errors import ExecutorError


class Choice(NamedTuple):
    """How a device is to choose tokens, the most likely one each time (decoding.Selector at temperature 0).

    allowed: bool [rows], what may come next, until the host says otherwise. seen: bool [rows], what came before, whose
    logits the penalty lowers.
    """

    allowed: np.ndarray
    penalty: float
    seen: np.ndarray


class RunAhead(Protocol):
    """Appends a token and then each one that a pass gives, but for the last of `count`.

    Returns what the passes gave, ids int64 [count]; -1 where a logit was not finite.
    """

    def __call__(self, token_id: int, count: int, choice: Choice) -> np.ndarray: ...


class Sequence(Protocol):
    """The tokens of a request, as far as they are in caches. Setting `length` back forgets the rest."""

    length: int

    @property
    def room(self) -> int | None:
        """How many tokens it takes before a pass refuses more; None where the caches grow."""
        ...


class Context(Sequence, Protocol):
    """A sequence with caches of its own."""

    def forward(self, token_ids: np.ndarray, last_positions: int = 1, full_vocabulary: bool = False) -> np.ndarray:
        """Append token_ids int64 [S] and return float32 logits [last_positions, rows].

        Row 0 is the task's `first_logit` id, or id 0 with `full_vocabulary`.
        """
        ...

    def expect(self, tokens: int) -> None:
        """Have room for so many more tokens, which are sure to come: to grow piece by piece copies the caches."""
        ...

    @property
    def memory_bytes(self) -> int:
        """Bytes that its caches hold."""
        ...

    @property
    def run_ahead(self) -> RunAhead | None:
        """Decodes without a word with the host between tokens; None where the host chooses every one."""
        ...

    def caches(self, length: int) -> dict[str, np.ndarray]:
        """What its first `length` tokens left in the caches, [1, K, length, ...] each, by the graph's names."""
        ...

    def restore(self, caches: dict[str, np.ndarray]) -> None:
        """Begin, while it is empty, with what `caches` of another context of the task gave."""
        ...


class Group(Protocol):
    """Sequences of one task to each of which a pass appends as many tokens."""

    def join(self, context: Context) -> AbstractContextManager[Sequence]:
        """Go on with the sequence of `context`, which stays as it is, until the block is left."""
        ...

    def forward(
        self, token_ids: Mapping[Sequence, np.ndarray], full_vocabulary: Collection[Sequence]
    ) -> dict[Sequence, np.ndarray]:
        """Append the first n of token_ids int64 [S] to each sequence that has joined; logits [n, rows] of each, as of
        Context.forward.

        S may differ; n is the least of them, or what a pass takes at most.
        """
        ...


class Executor(Protocol):
    """Runs the graphs of the tasks it was opened with."""

    name: str
    # A prompt is read in passes of at most so many tokens, which give its logits the same bits; None: in one pass.
    prompt_tokens: int | None
    # Whether a pass takes as long for a few rows as for one, and then jumps.
    rows_in_tiles: bool

    def features(self, task: str, pixels: np.ndarray) -> np.ndarray:
        """Image features float32 [P, C] of one picture, uint8 [H, W, 3]."""
        ...

    def context(self, task: str, image_features: np.ndarray | None) -> Context:
        """A new, empty sequence; token id V + p in it stands for row p of `image_features`."""
        ...

    def group(self, task: str, sequences: int) -> Group | None:
        """For up to so many sequences; None where a pass takes one only."""
        ...

    def picture(self, codes: np.ndarray) -> np.ndarray:
        """The picture uint8 [H, W, 3] of a code grid int64 [h, w]."""
        ...

    def draft(self, pixels: np.ndarray) -> np.ndarray:
        """The code grid int64 [h, w] that the VQGAN's encoder gives of a picture uint8 [H, W, 3]."""
        ...


def open_executor(
    bundle: Bundle, tasks: tuple[str, ...], name: str, device: str | None, threads: int | None, kernels: bool
) -> Executor:
    """Open the executor called `name`, onnx or tensorrt, for `tasks` on cpu or cuda (None: where it runs by default).

    threads and kernels are for onnx, threads for the CPU. Raises ExecutorError, and BundleError where the bundle was
    replaced meanwhile.
    """
    executor: Executor
    if name == "onnx":
        from .onnx import OnnxExecutor

        executor = OnnxExecutor(bundle, tasks, device=device or "cpu", threads=threads, kernels=kernels)
    elif name == "tensorrt":
        from .tensorrt import TensorRtExecutor

        if device not in (None, "cuda"):
            raise ExecutorError(f"executor tensorrt runs on device cuda, found {device!r:.40}")
        if threads is not None or not kernels:
            raise ExecutorError("executor tensorrt runs its engines: threads and kernels are options of onnx")
        executor = TensorRtExecutor.open(bundle, tasks)
    else:
        raise ExecutorError(f"executor must be onnx or tensorrt, found {name!r:.40}")
    bundle.check_unchanged()
    return executor
