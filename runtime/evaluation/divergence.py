"""How far apart two bundles are in the next token that they expect, along the same tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..images import prepare, read_if_any
from ..inference import read_prompt
from ..session import Session
from .cases import Case

# Positions that give logits in one pass: 1024 of them at once take a gigabyte where the vocabulary is large.
_ROWS = 32


def next_tokens(found: Session, expected: Session, case: Case, ids: Sequence[int]) -> dict[str, float]:
    """Compare what two sessions expect to follow the case's prompt and each of its `ids` but the last.

    `next_tokens` is the share of places where both hold the same token for the likeliest. `divergence` is the mean
    Kullback-Leibler divergence of the distribution of `found` from that of `expected`, in nats a token. It does not
    depend on which token is drawn, and so it shows much smaller differences than answers and pictures do.
    """
    agree: list[np.ndarray] = []
    nats: list[np.ndarray] = []
    for ours, theirs in zip(_log_shares(found, case, ids), _log_shares(expected, case, ids), strict=True):
        agree.append(ours.argmax(axis=-1) == theirs.argmax(axis=-1))
        nats.append((np.exp(theirs) * (theirs - ours)).sum(axis=-1))
    return {
        "next_tokens": float(np.concatenate(agree).mean()),
        "divergence": float(np.concatenate(nats).mean()),
    }


def _log_shares(session: Session, case: Case, ids: Sequence[int]) -> Iterator[np.ndarray]:
    """The logarithm of every next token's probability [places, rows], some places at a time."""
    vision, executor = session.bundle.manifest.vision, session.executor
    picture = read_if_any(case.image, case.frame, case.window)
    features = None
    if picture is not None:
        features = executor.features(case.task, prepare(picture, vision.image_size, vision.background))
    _, prompt = session.prompt(case.task, case.words, has_image=picture is not None)
    context = executor.context(case.task, features)
    yield _log_softmax(read_prompt(executor, context, prompt))
    following = np.array(ids[:-1], np.int64)
    for start in range(0, len(following), _ROWS):
        some = following[start : start + _ROWS]
        yield _log_softmax(context.forward(some, last_positions=len(some)))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    values = logits.astype(np.float64)
    values -= values.max(axis=-1, keepdims=True)
    return np.asarray(values - np.log(np.exp(values).sum(axis=-1, keepdims=True)))
