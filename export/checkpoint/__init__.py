"""The released files of a HealthGPT system, checked against each other and read one tensor at a time."""

from __future__ import annotations

from .checkpoint import Checkpoint
from .language import GenerationConfig, LanguageConfig
from .plugins import TaskConfig
from .vision import VisionConfig
from .vocabulary import SpecialTokens
from .vqgan import VqConfig

__all__ = [
    "Checkpoint",
    "GenerationConfig",
    "LanguageConfig",
    "SpecialTokens",
    "TaskConfig",
    "VisionConfig",
    "VqConfig",
]
