"""Trains the phantom's VQGAN as a vector-quantised autoencoder and stores it as a GumbelVQ.

The nearest codebook row is an argmax of linear logits: argmin |z - e|^2 = argmax (2 e.z - |e|^2). So a codebook trained
with moving averages (van den Oord et al., 2017, appendix A) equals a GumbelVQ whose `proj` is (2 e, -|e|^2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from healthgpt_edge import phantoms

from ..checkpoint import VqConfig
from ..reference.vqgan import Vqgan
from .precision import quick

CONFIG = VqConfig(
    codes=256,
    embed_dim=32,
    z_channels=32,
    channels=32,  # the minimum for GroupNorm(32)
    multipliers=(1, 1, 2, 2),
    blocks=1,
    attention_resolutions=(16,),
    resolution=phantoms.SIDE,
)
BATCH = 4
LEARNING_RATE = 1.5e-3
WARM_UP_STEPS = 150  # without quantisation, so that the codebook starts from useful latents
COMMITMENT = 0.25
DECAY = 0.98
REVIVE_EVERY = 50
REVIVE_UNTIL = 0.7  # of all steps


def to_input(pictures: np.ndarray) -> Tensor:
    """Grey uint8 [B,128,128] -> [B,3,128,128] in [-1,1]."""
    grey = torch.from_numpy(pictures).float() / 127.5 - 1
    return grey[:, None].expand(-1, 3, -1, -1)


def batches(seed: int, steps: int) -> Iterator[Tensor]:
    """Batches of new training pictures, half CT and half MR."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        subjects = [phantoms.phantom(int(s)) for s in rng.integers(phantoms.TRAINING_SEEDS, 2**31, BATCH // 2)]
        yield to_input(np.stack([picture for subject in subjects for picture in (subject.ct, subject.mr)]))


class MovingCodebook:
    """Codebook rows, each the moving average of the latents that chose it."""

    def __init__(self, latents: Tensor, codes: int) -> None:
        self.rows = latents[torch.randperm(len(latents))[:codes]].clone()  # [codes, z]
        for _ in range(10):  # a few rounds of k-means
            self.rows, _ = self._means(latents)
        self.counts = torch.ones(codes)
        self.sums = self.rows.clone()

    def choose(self, latents: Tensor) -> Tensor:
        """Latents [N, z] -> the index of the nearest row for each, int64 [N]."""
        return torch.cdist(latents, self.rows).argmin(dim=1)

    def _means(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        chosen = functional.one_hot(self.choose(latents), len(self.rows)).float()  # [N, codes]
        counts = chosen.sum(dim=0)
        spare = latents[torch.randint(len(latents), (len(self.rows),))]
        means = torch.where(counts[:, None] > 0, chosen.T @ latents / counts.clamp(min=1)[:, None], spare)
        return means, counts

    def update(self, latents: Tensor, chosen: Tensor) -> None:
        one_hot = functional.one_hot(chosen, len(self.rows)).float()
        self.counts.lerp_(one_hot.sum(dim=0), 1 - DECAY)
        self.sums.lerp_(one_hot.T @ latents, 1 - DECAY)
        self.rows = self.sums / self.counts.clamp(min=1e-4)[:, None]

    def revive(self, latents: Tensor) -> None:
        """Replace rows that are rarely chosen by random latents of the batch."""
        dead = self.counts < 0.05
        self.rows[dead] = latents[torch.randint(len(latents), (int(dead.sum()),))]
        self.sums[dead], self.counts[dead] = self.rows[dead], 1.0

    def write(self, model: Vqgan) -> None:
        """Write the codebook to GumbelVQ's `embed` and `proj`."""
        with torch.no_grad():
            model.quantize.embed.weight.copy_(self.rows)
            model.quantize.proj.weight.copy_(2 * self.rows[:, :, None, None])
            model.quantize.proj.bias.copy_(-self.rows.square().sum(dim=1))


def train(seed: int, steps: int, report: Callable[[str], None]) -> Vqgan:
    """A VQGAN trained for `steps` batches of 4 pictures."""
    torch.manual_seed(seed)
    model = Vqgan(CONFIG)
    learned = [parameter for name, parameter in model.named_parameters() if not name.startswith("quantize.")]
    optimizer = torch.optim.AdamW(learned, LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    codebook: MovingCodebook | None = None
    recent: list[Tensor] = []
    for step, pictures in enumerate(batches(seed, steps)):
        with quick():
            grid = model.quant_conv(model.encoder(pictures))  # [B, z, h, w]
        grid = grid.float()
        latents = grid.permute(0, 2, 3, 1).flatten(0, 2)
        loss = torch.zeros(())
        if step >= WARM_UP_STEPS:
            if codebook is None:
                codebook = MovingCodebook(torch.cat(recent), CONFIG.codes)
            chosen = codebook.choose(latents.detach())
            rows = codebook.rows[chosen]
            loss = COMMITMENT * functional.mse_loss(latents, rows)
            codebook.update(latents.detach(), chosen)
            if step % REVIVE_EVERY == 0 and step < REVIVE_UNTIL * steps:
                codebook.revive(latents.detach())
            straight_through = latents + (rows - latents).detach()
            grid = straight_through.view(*grid.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        else:
            recent = [*recent[-15:], latents.detach()]
        with quick():
            drawn = model.decoder(model.post_quant_conv(grid))
        error = functional.mse_loss(drawn.float(), pictures)
        loss = loss + error + 0.2 * functional.l1_loss(drawn.float(), pictures)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == steps - 1:
            used = 0 if codebook is None else int((codebook.counts > 0.05).sum())
            report(f"vqgan {step}/{steps} psnr {10 * np.log10(4 / error.item()):.2f} dB, {used} codes in use")
    if codebook is None:
        raise ValueError(f"expected more than {WARM_UP_STEPS} steps, got {steps}")
    codebook.write(model)
    return model.eval()
