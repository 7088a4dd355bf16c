"""Tokens chosen on the device by our kernel (csrc/token_selection), pass after pass without the host.

Not run on a GPU yet.
"""

from __future__ import annotations

import numpy as np

from . import Choice
from .cuda import Device

_INT64, _INT32, _FLOAT32, _UINT8 = (np.dtype(name) for name in ("int64", "int32", "float32", "uint8"))
_BITS = 32


class Chooser:
    """What the kernel keeps of one sequence: rules, ids that came before, and the ids that it chooses.

    Row 0 of the `rows` logits is the id `first_id`.
    """

    def __init__(self, device: Device, first_id: int, rows: int) -> None:
        self._device, self._first_id, self._rows = device, first_id, rows
        self._words = -(-rows // _BITS)
        self._allowed, self._seen = device.allocate(self._words * _INT32.itemsize), device.allocate(rows)
        self._step, self._ids = device.allocate(_INT64.itemsize), device.allocate(0)
        self._penalty, self._count = 1.0, 0

    def begin(self, choice: Choice, count: int) -> None:
        """Set the rules for the next `count` tokens."""
        allowed = np.zeros(self._words * _BITS, np.bool_)
        allowed[: self._rows] = choice.allowed
        self._device.upload(np.packbits(allowed, bitorder="little").view(_INT32), self._allowed)
        if choice.penalty != 1.0:
            self._device.upload(choice.seen.astype(_UINT8), self._seen)
        self._device.upload(np.zeros(1, _INT64), self._step)
        if self._ids.size_bytes < count * _INT64.itemsize:
            self._ids = self._device.allocate(count * _INT64.itemsize)
        self._penalty, self._count = choice.penalty, count

    def order(self, logits: int, token: int, past_length: int) -> None:
        """Order one choice, of addresses: from float32 logits [1, rows] to int64 token [1]; `past_length` [1] grows by
        one."""
        array = self._device.array
        self._device.kernels.token_selection(
            array(logits, (1, self._rows), _FLOAT32),
            array(self._step.address, (1,), _INT64),
            array(self._ids.address, (self._count, 1), _INT64),
            array(token, (1,), _INT64),
            first_id=self._first_id,
            allowed=array(self._allowed.address, (self._words,), _INT32),
            penalty=self._penalty,
            seen=array(self._seen.address, (1, self._rows), _UINT8) if self._penalty != 1.0 else None,
            past_length=array(past_length, (1,), _INT64),
            stream=self._device.stream,
        )

    def ids(self) -> np.ndarray:
        """The ids chosen, int64 [count]; waits for them."""
        return self._device.download(self._ids, (self._count,), _INT64)
