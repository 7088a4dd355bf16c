"""Writes the phantom in the released layout: base, CLIP, plugins and VQGAN, each in the format of its authors.

base/     Hugging Face Phi-3: config.json, generation_config.json, model.safetensors (float16), tokenizer files
vision/   Hugging Face CLIP: config.json, preprocessor_config.json, pytorch_model.bin (float32)
plugins/  com_hlora_weights.bin, gen_hlora_weights.bin, fusion_layer_weights.bin (float16)
vqgan/    taming-transformers: model.yaml, last.ckpt (float32)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import Tensor

from ..checkpoint import VqConfig
from ..checkpoint.plugins import PREFIX
from ..reference.model import ROWS, HealthGPT
from ..reference.vqgan import Vqgan
from .base import GENERATION, LANGUAGE
from .corpus import BASE_ROWS, BEGIN, END_OF_TEXT
from .vision import CONFIG as VISION


def released_files(folder: Path) -> dict[str, Path]:
    """The arguments of Checkpoint.open for a phantom in `folder`."""
    plugins = folder / "plugins"
    return {
        "base": folder / "base",
        "vision": folder / "vision",
        "comprehension": plugins / "com_hlora_weights.bin",
        "generation": plugins / "gen_hlora_weights.bin",
        "fusion": plugins / "fusion_layer_weights.bin",
        "vqgan": folder / "vqgan",
    }


def write_base(folder: Path, model: HealthGPT) -> None:
    """Write config.json, generation_config.json and model.safetensors. The tokenizer files are already there."""
    _write_json(
        folder / "config.json",
        {
            "architectures": ["Phi3ForCausalLM"],
            "attention_bias": False,
            "bos_token_id": BEGIN,
            "eos_token_id": END_OF_TEXT,
            "hidden_act": "silu",
            "hidden_size": LANGUAGE.hidden,
            "intermediate_size": LANGUAGE.intermediate,
            "max_position_embeddings": LANGUAGE.max_positions,
            "model_type": "phi3",
            "num_attention_heads": LANGUAGE.heads,
            "num_hidden_layers": LANGUAGE.layers,
            "num_key_value_heads": LANGUAGE.kv_heads,
            "original_max_position_embeddings": LANGUAGE.max_positions,
            "pad_token_id": END_OF_TEXT,
            "rms_norm_eps": LANGUAGE.rms_epsilon,
            "rope_scaling": None,
            "rope_theta": LANGUAGE.rope_theta,
            "sliding_window": LANGUAGE.sliding_window,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "vocab_size": BASE_ROWS,
        },
    )
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": BEGIN, "eos_token_id": list(GENERATION.eos_ids), "pad_token_id": END_OF_TEXT},
    )
    state = {name: tensor.half().contiguous() for name, tensor in model.base_state(BASE_ROWS).items()}
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def write_vision(folder: Path, model: HealthGPT) -> None:
    _write_json(
        folder / "config.json",
        {
            "architectures": ["CLIPVisionModel"],
            "hidden_act": "quick_gelu",
            "hidden_size": VISION.hidden,
            "image_size": VISION.image_size,
            "intermediate_size": VISION.intermediate,
            "layer_norm_eps": VISION.epsilon,
            "model_type": "clip_vision_model",
            "num_attention_heads": VISION.heads,
            "num_hidden_layers": VISION.layers,
            "patch_size": VISION.patch_size,
        },
    )
    _write_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": VISION.image_size,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": list(VISION.mean),
            "image_std": list(VISION.std),
            "resample": 3,
            "size": VISION.image_size,
        },
    )
    torch.save(_detached(model.vision_state()), folder / "pytorch_model.bin")


def write_comprehension(folder: Path, model: HealthGPT) -> None:
    torch.save(_halved(model.plugin_state(rows=False)), folder / "com_hlora_weights.bin")


def write_generation(folder: Path, model: HealthGPT) -> None:
    """Write the adapters and the projector to one file, and the vocabulary rows to the fusion file."""
    state = _halved(model.plugin_state(rows=True))
    rows = {key: state.pop(key) for key in [f"{PREFIX}{name}" for name in ROWS]}
    torch.save(state, folder / "gen_hlora_weights.bin")
    torch.save(rows, folder / "fusion_layer_weights.bin")


def write_vqgan(folder: Path, model: Vqgan, config: VqConfig) -> None:
    params = {
        "kl_weight": 1e-8,
        "embed_dim": config.embed_dim,
        "n_embed": config.codes,
        "monitor": "val/rec_loss",
        "ddconfig": {
            "double_z": False,
            "z_channels": config.z_channels,
            "resolution": config.resolution,
            "in_channels": config.in_channels,
            "out_ch": config.out_channels,
            "ch": config.channels,
            "ch_mult": list(config.multipliers),
            "num_res_blocks": config.blocks,
            "attn_resolutions": list(config.attention_resolutions),
            "dropout": 0.0,
        },
        "lossconfig": {"target": "taming.modules.losses.vqperceptual.DummyLoss"},
    }
    content = {"model": {"target": "taming.models.vqgan.GumbelVQ", "params": params}}
    (folder / "model.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    # A Lightning checkpoint holds more than the weights, and readers must accept that, so the phantom has some as well.
    lightning = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": "1.0.8"}
    torch.save({**lightning, "state_dict": _detached(model.state_dict())}, folder / "last.ckpt")


def _detached(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def _halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().half().contiguous() for name, tensor in state.items()}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
