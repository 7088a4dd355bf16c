"""CLIP's vision tower in simple PyTorch: from pixels to patch features.

Parameter names are those of Hugging Face's CLIP after `vision_model.`. Source: Radford et al., "Learning Transferable
Visual Models From Natural Language Supervision", 2021 (arXiv 2103.00020). B batch, P patches, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checkpoint import VisionConfig


class Embeddings(nn.Module):
    """A class token, then one token per patch, each with a learnt position: [B,3,S,S] -> [B,1+P,C]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(config.hidden) * 0.02)
        self.patch_embedding = nn.Conv2d(3, config.hidden, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(config.patches + 1, config.hidden)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [B, P, C], row-major
        classes = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([classes, patches], dim=1) + self.position_embedding.weight


class Attention(nn.Module):
    """Every token attends to every token."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.hidden, config.hidden)
        self.k_proj = nn.Linear(config.hidden, config.hidden)
        self.v_proj = nn.Linear(config.hidden, config.hidden)
        self.out_proj = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        query, key, value = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in projections)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5  # [B, heads, 1+P, 1+P]
        return self.out_proj((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, quick GELU (x sigmoid(1.702 x)), linear."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden, config.intermediate)
        self.fc2 = nn.Linear(config.intermediate, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden))


class Layer(nn.Module):
    """Attention and MLP, each with a norm before it and a residual connection."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden, config.epsilon)
        self.mlp = Mlp(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden, config.epsilon)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))


class VisionTower(nn.Module):
    """The whole tower. The caller chooses how many of its layers run."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden, config.epsilon)  # spelt as in the released files
        self.encoder = Encoder(config)
        # In the released files, but never applied: HealthGPT takes features before the end of the tower.
        self.post_layernorm = nn.LayerNorm(config.hidden, config.epsilon)
        self.config = config

    def normalise(self, picture: Tensor) -> Tensor:
        """uint8 [B,S,S,3] -> pixel values float32 [B,3,S,S]: scale to [0, 1], subtract mean, divide by deviation."""
        mean, deviation = torch.tensor(self.config.mean), torch.tensor(self.config.std)
        return ((picture.float() / 255.0 - mean) / deviation).permute(0, 3, 1, 2)

    def forward(self, pixels: Tensor, layers: int) -> Tensor:
        """Pixel values [B,3,S,S] -> patch features [B,P,C] after `layers` layers, without the class token."""
        hidden = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.layers[:layers]:
            hidden = layer(hidden)
        return hidden[:, 1:]
