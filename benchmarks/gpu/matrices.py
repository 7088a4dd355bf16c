"""Random matrices as the exporter stores them, made on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .device import Device

BLOCK_SIZE = 128
FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Matrix:
    """A stored matrix [C, O], with the kernels' description of it."""

    kernel: Any
    values: torch.Tensor
    scales: torch.Tensor | None
    storage: str
    outputs: int
    stride: int

    @property
    def size_bytes(self) -> int:
        scales = 0 if self.scales is None else self.scales.numel() * 4
        return self.values.numel() * self.values.element_size() + scales

    def floats(self) -> torch.Tensor:
        """The float32 matrix."""
        if self.scales is None:
            return self.values.float()[:, : self.outputs]
        integers = self.values.to(torch.int32)
        if self.storage == "int4":
            pairs = torch.stack([integers & 15, integers >> 4 & 15], dim=-1).flatten(1)
            integers = torch.where(pairs > 7, pairs - 16, pairs)
        integers = integers[:, : self.outputs]
        return integers.float() * self.scales.repeat_interleave(BLOCK_SIZE, dim=0)[: len(integers)]


def random_matrix(device: Device, channels: int, outputs: int, storage: str) -> Matrix:
    """A random matrix whose rows are padded for wide loads, as a loader does when it copies a matrix to the GPU."""
    per_row = {"int8": 16, "int4": 32}.get(storage, 8)
    stride = -(-outputs // per_row) * per_row
    scales = None
    if storage in FLOATS:
        values = device.normal(channels, stride, scale=channels**-0.5, dtype=FLOATS[storage])
    elif storage == "int8":
        values = device.integers(-128, 128, (channels, stride), torch.int8)
    else:
        values = device.integers(0, 256, (channels, stride // 2), torch.uint8)
    if storage not in FLOATS:
        step = channels**-0.5 / (74 if storage == "int8" else 4.6)  # the deviation of uniform integers
        scales = device.normal(-(-channels // BLOCK_SIZE), outputs, scale=step)
    block_size = 0 if scales is None else BLOCK_SIZE
    kernel = device.kernels.Matrix(values, storage, (channels, outputs), scales, block_size, stride)
    return Matrix(kernel, values, scales, storage, outputs, stride)
