"""Write a checkpoint of a real system's exact size and layout, with random weights.

    python -m benchmarks.random_checkpoint OUT [--system m3|l14|xl32] [--layers N] [--random-layers N]

The released weights cannot be shipped, and time, memory and size do not depend on their values. Weights are scaled so
that each layer refines its input, as in a trained model: with one scale for all, 32 layers are chaotic, and two correct
roundings give unrelated logits that cannot be compared. The base is written tensor by tensor, so that 65 GB need little
memory, and where the disk has no room for them, matrices of later layers can be zeros that take none. A bundle of them
is as large as any and takes as long. L14 and XL32 get the small tokenizers of the tests, padded with tokens that occur
in no text, because the released ones are not in this repository.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from healthgpt_edge.export.checkpoint import VqConfig
from healthgpt_edge.export.reference.vqgan import Vqgan

from .systems import SYSTEMS, System

TESTS = Path(__file__).parents[1] / "tests"
PHI3_TOKENIZER = TESTS / "data" / "phi3-tokenizer"
SHARD_BYTES = 4 << 30
# One pool of normal values, read from a moving offset: good enough here, and a hundred times faster than fresh ones.
POOL_SIZE = 1 << 24
STANDARD_DEVIATION = 0.02


class Normal:
    """A stream of normally distributed tensors."""

    def __init__(self, seed: int) -> None:
        self._pool = torch.randn(POOL_SIZE, generator=torch.Generator().manual_seed(seed)) * STANDARD_DEVIATION
        self._start = 0

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        size = torch.Size(shape).numel()
        flat = torch.empty(size, dtype=dtype)
        done = 0
        while done < size:
            count = min(size - done, POOL_SIZE - self._start)
            flat[done : done + count] = self._pool[self._start : self._start + count]
            done += count
            # An odd step keeps rows of a matrix from repeating each other.
            self._start = (self._start + count + 7919) % (POOL_SIZE - 1)
        return flat.view(shape)


def scale_of(name: str, system: System) -> float:
    """What a matrix is multiplied with: embeddings are of order one, and each residual branch adds a small part."""
    if "embed_tokens" in name:
        return 1 / STANDARD_DEVIATION
    branch = ("o_proj" in name or "down_proj" in name) and "lora_A" not in name and "lora_route" not in name
    return (2 * system.layers) ** -0.5 if branch else 1.0


def base_tensors(system: System) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (system.base_vocab, system.hidden)
    for layer in range(system.layers):
        for name, shape in system.linears.items():
            yield f"model.layers.{layer}.{name}.weight", shape
        for name, outputs in system.biases.items():
            yield f"model.layers.{layer}.{name}.bias", (outputs,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", (system.hidden,)
    yield "model.norm.weight", (system.hidden,)
    yield "lm_head.weight", (system.base_vocab, system.hidden)


def is_hole(name: str, random_layers: int) -> bool:
    """Whether this is a matrix of a layer after those that are random."""
    parts = name.split(".")
    return parts[1] == "layers" and int(parts[2]) >= random_layers and name.endswith("_proj.weight")


def write_base(folder: Path, system: System, normal: Normal, random_layers: int) -> None:
    """bf16 safetensors shards with their index, config and tokenizer."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in base_tensors(system):
        tensor_bytes = 2 * torch.Size(shape).numel()
        if size + tensor_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += tensor_bytes
    weight_map = {}
    for index, shard in enumerate(shards, 1):
        file_name = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        header, offset = {}, 0
        for name, shape in shard:
            end = offset + 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
            weight_map[name], offset = file_name, end
        text = json.dumps(header).encode()
        with (folder / file_name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, shape in shard:
                if is_hole(name, random_layers):
                    file.seek(2 * torch.Size(shape).numel(), os.SEEK_CUR)
                    continue
                values = normal(*shape, dtype=torch.bfloat16).mul_(scale_of(name, system))
                if name.endswith("norm.weight"):
                    values += 1
                file.write(values.view(torch.int16).numpy().data)
            file.truncate()  # to here, where a hole comes last
    index_json = {"metadata": {"random_layers": random_layers}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json))
    write_settings(folder, system)


def write_settings(folder: Path, system: System) -> None:
    """config.json, generation_config.json and the tokenizer."""
    small = TESTS / "golden" / "checkpoints" / system.small_base
    config, generation = (json.loads((small / name).read_text()) for name in ("config.json", "generation_config.json"))
    config |= {
        "hidden_size": system.hidden,
        "intermediate_size": system.intermediate,
        "num_hidden_layers": system.layers,
        "num_attention_heads": system.heads,
        "num_key_value_heads": system.kv_heads,
        "vocab_size": system.base_vocab,
    }
    tokenizer = small
    if system == replace(SYSTEMS["m3"], layers=system.layers):
        tokenizer = PHI3_TOKENIZER  # the released one
        config |= {"bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000}
        generation = {"bos_token_id": 1, "eos_token_id": [32000, 32001, 32007], "pad_token_id": 32000}
    for name, settings in {"config.json": config, "generation_config.json": generation}.items():
        (folder / name).write_text(json.dumps(settings))
    for name in ("tokenizer.model", "tokenizer_config.json", "merges.txt"):
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, folder / name)
    if (tokenizer / "vocab.json").is_file():
        vocabulary = json.loads((tokenizer / "vocab.json").read_text())
        added = json.loads((tokenizer / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        vocabulary |= {token["content"]: int(token_id) for token_id, token in added.items()}
        unused = sorted(set(range(system.base_vocab)) - set(vocabulary.values()))
        vocabulary |= {f"unused{token_id}": token_id for token_id in unused}
        (folder / "vocab.json").write_text(json.dumps(vocabulary))


def write_vision(folder: Path, normal: Normal) -> None:
    """CLIP ViT-L/14-336 in float32, its text half reduced to a stub."""
    hidden, intermediate, layers = 1024, 4096, 24
    state = {
        "logit_scale": torch.tensor(1.0),
        "text_model.final_layer_norm.weight": normal(16),
        "vision_model.embeddings.class_embedding": normal(hidden),
        "vision_model.embeddings.patch_embedding.weight": normal(hidden, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": normal(577, hidden),
    }
    for name in ("pre_layrnorm", "post_layernorm"):
        state |= _affine(f"vision_model.{name}", hidden, normal)
    for layer in range(layers):
        prefix = f"vision_model.encoder.layers.{layer}"
        for name in ("layer_norm1", "layer_norm2"):
            state |= _affine(f"{prefix}.{name}", hidden, normal)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            state |= _linear(f"{prefix}.self_attn.{name}", hidden, hidden, normal)
        state |= _linear(f"{prefix}.mlp.fc1", intermediate, hidden, normal)
        state |= _linear(f"{prefix}.mlp.fc2", hidden, intermediate, normal)
    torch.save(state, folder / "pytorch_model.bin")
    vision = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
        "model_type": "clip_vision_model",
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    preprocessor = {
        "crop_size": 336,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": 336,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def _affine(name: str, size: int, normal: Normal) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": normal(size) + 1, f"{name}.bias": normal(size)}


def _linear(name: str, outputs: int, inputs: int, normal: Normal) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": normal(outputs, inputs), f"{name}.bias": normal(outputs)}


def write_plugins(folder: Path, system: System, normal: Normal) -> None:
    """The H-LoRA plugins and, where there is generation, the fusion file, fp16, with the released keys."""
    prefix, half = "base_model.model.model", torch.float16
    for task, rank in system.ranks.items():
        state = {}
        for layer in range(system.layers):
            for name, (outputs, inputs) in system.linears.items():
                key = f"{prefix}.layers.{layer}.{name}"
                state[f"{key}.lora_A.weight"] = normal(rank, inputs, dtype=half)
                state[f"{key}.lora_B.weight"] = normal(outputs, rank, dtype=half).mul_(scale_of(key, system))
                state[f"{key}.lora_route.weight"] = normal(system.experts, inputs, dtype=half)
        for index, inputs in ((0, 1024), (2, system.hidden)):
            state[f"{prefix}.mm_projector.{index}.weight"] = normal(system.hidden, inputs, dtype=half)
            state[f"{prefix}.mm_projector.{index}.bias"] = normal(system.hidden, dtype=half)
        torch.save(state, folder / system.plugin(task))
    if "generation" not in system.ranks:
        return
    fusion = {
        f"{prefix}.embed_tokens.weight": normal(system.vocab, system.hidden, dtype=half).mul_(1 / STANDARD_DEVIATION),
        "base_model.model.lm_head.weight": normal(system.vocab, system.hidden, dtype=half),
    }
    torch.save(fusion, folder / "fusion_layer_weights.bin")


def write_vqgan(folder: Path) -> None:
    """The Gumbel VQGAN f8 with 8192 codes as a Lightning checkpoint."""
    dd = {
        "double_z": False,
        "z_channels": 256,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 1, 2, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [32],
        "dropout": 0.0,
    }
    params = {"embed_dim": 256, "n_embed": 8192, "ddconfig": dd}
    model = {"target": "taming.models.vqgan.GumbelVQ", "params": params}
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": model}))
    torch.manual_seed(0)
    config = VqConfig(
        codes=params["n_embed"],
        embed_dim=params["embed_dim"],
        z_channels=dd["z_channels"],
        channels=dd["ch"],
        multipliers=tuple(dd["ch_mult"]),
        blocks=dd["num_res_blocks"],
        attention_resolutions=tuple(dd["attn_resolutions"]),
        resolution=dd["resolution"],
    )
    state = Vqgan(config).state_dict()
    torch.save({"epoch": 0, "global_step": 0, "state_dict": state}, folder / "last.ckpt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--system", choices=sorted(SYSTEMS), default="m3")
    parser.add_argument("--layers", type=int, help="fewer decoder layers, for a quick look")
    parser.add_argument("--random-layers", type=int, help="matrices of later layers are zeros that take no disk")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    system = SYSTEMS[arguments.system]
    if arguments.layers:
        system = replace(system, layers=arguments.layers)
    out, partial = arguments.out, arguments.out.with_name(f".{arguments.out.name}.partial")
    if out.exists():
        raise SystemExit(f"{out.name} exists already; a checkpoint is written to a new folder")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was cut off
    normal = Normal(arguments.seed)
    parts = ["base", "vision", system.folder, *(["vqgan"] if "generation" in system.ranks else [])]
    folders = {name: partial / name for name in parts}
    for folder in folders.values():
        folder.mkdir(parents=True)
    write_base(folders["base"], system, normal, arguments.random_layers or system.layers)
    write_vision(folders["vision"], normal)
    write_plugins(folders[system.folder], system, normal)
    if "vqgan" in folders:
        write_vqgan(folders["vqgan"])
    partial.rename(out)
    total = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"wrote {out}: {total:,} bytes")


if __name__ == "__main__":
    main()
