"""The VQGAN's decoder with random weights: our kernels between a library's convolutions, and PyTorch alone."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from .device import Device

GROUPS, EPSILON = 32, 1e-6


class Convolution:
    def __init__(self, device: Device, before: int, after: int, size: int) -> None:
        self.weight = device.normal(after, before, size, size, scale=(before * size * size) ** -0.5).half()
        self.weight = self.weight.contiguous(memory_format=torch.channels_last)
        self.bias = device.zeros(after, dtype=torch.float16)
        self.padding = size // 2

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, self.weight, self.bias, padding=self.padding)


class Norm:
    def __init__(self, device: Device, channels: int) -> None:
        self.weight, self.bias = (1 + device.normal(channels, scale=0.1)), device.normal(channels, scale=0.1)
        self.halves = self.weight.half(), self.bias.half()


class Picture:
    """From codes to a picture, with the released sizes or smaller ones. Images are [B, C, H, W], channels-last."""

    def __init__(self, device: Device, widths: tuple[int, ...], blocks: int, grid: int, codes: int = 8192) -> None:
        self.device, self.grid = device, grid
        top = widths[0]
        self.table = device.normal(codes, 256 if top > 64 else top, dtype=torch.float16)
        self.conv_in = Convolution(device, self.table.shape[1], top, 3)
        self.levels: list[Any] = []
        before = top
        for level, width in enumerate(widths):
            residuals = [self._residual(before if i == 0 else width, width) for i in range(blocks)]
            last = level + 1 == len(widths)
            upsample = None if last else Convolution(device, width, 4 * width, 2)
            self.levels.append((residuals, upsample))
            before = width
        self.norm_out, self.conv_out = Norm(device, before), Convolution(device, before, 3, 3)
        self.memory = device.zeros(device.kernels.group_norm_workspace_bytes(1, GROUPS), dtype=torch.uint8)
        self.codes = device.integers(0, codes, (grid * grid,), torch.int64)

    def _residual(self, before: int, after: int) -> Any:
        device = self.device
        shortcut = Convolution(device, before, after, 1) if before != after else None
        return (
            *(Norm(device, before), Convolution(device, before, after, 3)),
            *(Norm(device, after), Convolution(device, after, after, 3), shortcut),
        )

    # --- ours: the kernels see channels-last images as [B, H * W, C] ---

    def _norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        y = torch.empty_like(x)
        rows, to = (one.permute(0, 2, 3, 1).flatten(1, 2) for one in (x, y))
        self.device.kernels.group_norm(
            rows, norm.weight, norm.bias, to, self.memory, GROUPS, EPSILON, stream=self.device.stream
        )
        return y

    def _upsampled(self, x: torch.Tensor, convolution: Convolution) -> torch.Tensor:
        phases = functional.conv2d(x, convolution.weight, convolution.bias, padding=1)
        height, width, channels = x.shape[2], x.shape[3], x.shape[1]
        image = torch.empty(1, channels, 2 * height, 2 * width, dtype=x.dtype, device=x.device)
        image = image.contiguous(memory_format=torch.channels_last)
        cells = phases.permute(0, 2, 3, 1).unflatten(-1, (2, 2, channels))
        self.device.kernels.phase_interleave(cells, image.permute(0, 2, 3, 1), stream=self.device.stream)
        return image

    def ours(self) -> torch.Tensor:
        device, grid = self.device, self.grid
        first = device.zeros(grid * grid, self.table.shape[1], dtype=torch.float16)
        device.kernels.gather_rows(self.codes, self.table, first, stream=device.stream)
        x = self.conv_in(first.view(1, grid, grid, -1).permute(0, 3, 1, 2))
        for residuals, upsample in self.levels:
            for norm1, conv1, norm2, conv2, shortcut in residuals:
                hidden = conv2(self._norm(conv1(self._norm(x, norm1)), norm2))
                x = (shortcut(x) if shortcut else x) + hidden
            if upsample:
                x = self._upsampled(x, upsample)
        x = self.conv_out(self._norm(x, self.norm_out)).permute(0, 2, 3, 1).contiguous()
        levels = device.zeros(*x.shape, dtype=torch.uint8)
        device.kernels.image_levels(x, levels, stream=device.stream)
        return levels

    # --- PyTorch alone ---

    def _plain_norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        y = functional.group_norm(x, GROUPS, *norm.halves, eps=EPSILON)
        return y * torch.sigmoid(y)

    def plain(self) -> torch.Tensor:
        """The arithmetic of `ours`, for checking it."""
        return self._by_torch(self._plain_upsampled)

    def original(self) -> torch.Tensor:
        """The original's upsampling, for timing: nearest neighbour, then a 3x3 convolution on the large image.

        The weights of this convolution are random, so the picture is not that of `ours`.
        """
        return self._by_torch(
            lambda x, one: functional.conv2d(functional.interpolate(x, scale_factor=2.0), self._large(one), padding=1)
        )

    def _large(self, convolution: Convolution) -> torch.Tensor:
        if not hasattr(convolution, "large"):
            channels = convolution.weight.shape[1]
            weight = self.device.normal(channels, channels, 3, 3, scale=(9 * channels) ** -0.5).half()
            convolution.large = weight.contiguous(memory_format=torch.channels_last)
        return convolution.large

    @staticmethod
    def _plain_upsampled(x: torch.Tensor, convolution: Convolution) -> torch.Tensor:
        phases = functional.conv2d(x, convolution.weight, convolution.bias, padding=1)
        _, _, height, width = phases.shape
        cells = phases.unflatten(1, (2, 2, -1)).permute(0, 3, 4, 1, 5, 2)
        return cells.reshape(1, -1, 2 * height, 2 * width)[:, :, 1:-1, 1:-1]

    def _by_torch(self, upsampled: Any) -> torch.Tensor:
        x = self.conv_in(self.table[self.codes].view(1, self.grid, self.grid, -1).permute(0, 3, 1, 2))
        for residuals, upsample in self.levels:
            for norm1, conv1, norm2, conv2, shortcut in residuals:
                hidden = conv2(self._plain_norm(conv1(self._plain_norm(x, norm1)), norm2))
                x = (shortcut(x) if shortcut else x) + hidden
            if upsample:
                x = upsampled(x, upsample)
        x = self.conv_out(self._plain_norm(x, self.norm_out)).permute(0, 2, 3, 1)
        return ((x.clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)
