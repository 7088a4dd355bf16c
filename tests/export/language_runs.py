"""The language graph as tests run it, and the reference it is held to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from golden_cases import CASES, Case
from onnx import TensorProto

from healthgpt_edge.executors.onnx import value_of
from healthgpt_edge.export.checkpoint import Checkpoint
from healthgpt_edge.export.checkpoint.language import LanguageConfig
from healthgpt_edge.export.graph.language import build_language, build_vocabulary, first_logit_row
from healthgpt_edge.export.quantize import Storage, dequantise, quantise
from healthgpt_edge.export.reference.language import KeyValueCache
from healthgpt_edge.export.reference.model import HealthGPT
from healthgpt_edge.export.weights import WeightFile
from healthgpt_edge.prompt import IMAGE

# The linears before which no norm stands.
AFTER_NO_NORM = ("o_proj", "down_proj")


@dataclass
class Sequences:
    """What the graph keeps of B sequences: caches [B, K, M, D] by name, and how many tokens each holds, [B]."""

    caches: dict[str, np.ndarray]
    length: np.ndarray

    @classmethod
    def together(cls, *parts: Sequences) -> Sequences:
        caches = {name: np.concatenate([part.caches[name] for part in parts]) for name in parts[0].caches}
        return cls(caches, np.concatenate([part.length for part in parts]))


class LanguageRun:
    """The language graph of a task in `folder`, and its vocabulary graph where there is one."""

    def __init__(self, folder: Path, task: str, *, optimised: bool = True, save_as: Path | None = None) -> None:
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = 1
        if not optimised:
            # Nothing is fused, but what bodies say of types alone is left out (functions.py).
            self.options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        if save_as is not None:
            self.options.optimized_model_filepath = str(save_as)
        self.session = self._open(folder / f"{task}.language.onnx")
        self.options.optimized_model_filepath = ""
        vocabulary = folder / f"{task}.vocabulary.onnx"
        self.vocabulary = self._open(vocabulary) if vocabulary.exists() else None

    def _open(self, path: Path) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(path, self.options, providers=["CPUExecutionProvider"])

    def sequences(self, batch: int = 1, capacity: int = 128) -> Sequences:
        """Empty sequences; rows that were never written hold large values, which nothing may read."""
        values = {node.name: value_of(node) for node in self.session.get_inputs() if node.name.startswith("past_key")}
        caches = {
            name: np.full((batch, heads, capacity, size), 1e3, element)
            for name, (element, (_, heads, _, size)) in values.items()
        }
        return Sequences(caches, np.zeros(batch, np.int64))

    def outputs(self, sequences: Sequences, ids: np.ndarray, features: np.ndarray, n: int = 1) -> dict[str, np.ndarray]:
        """All outputs by name for new token ids [B, S], after which `sequences` holds those tokens too."""
        feeds = {
            "token_ids": np.asarray(ids, np.int64),
            "image_features": features,
            "past_length": sequences.length,
            "last_positions": np.array([n], np.int64),
        }
        names = [node.name for node in self.session.get_outputs()]
        outputs = dict(zip(names, self.session.run(names, feeds | sequences.caches), strict=True))
        sequences.caches = {name: outputs[name.replace("past_", "present_")] for name in sequences.caches}
        sequences.length = sequences.length + feeds["token_ids"].shape[1]
        return outputs

    def forward(self, sequences: Sequences, ids: np.ndarray, features: np.ndarray, n: int = 1) -> np.ndarray:
        """Logits [B, n, V] of the whole vocabulary."""
        outputs = self.outputs(sequences, ids, features, n)
        if self.vocabulary is None:
            return outputs["logits"]
        (others,) = self.vocabulary.run(None, {"hidden": outputs["hidden"]})
        return np.concatenate([others, outputs["logits"]], axis=-1)


def write_graphs(
    checkpoint: Checkpoint, folder: Path, precision: str = "fp32", block_size: int = 128, cache: str | None = None
) -> None:
    """The language graphs of every task of `checkpoint` in `folder`, as a bundle holds them."""
    (folder / "weights").mkdir()
    storage = Storage.of(precision, cache)
    base = WeightFile(folder / "weights/base.bin", "weights/base.bin")
    for task in checkpoint.tasks:
        own = WeightFile(folder / f"weights/{task}.bin", f"weights/{task}.bin")
        built = {"language": build_language(checkpoint, task, base, own, storage, block_size)}
        if first_logit_row(checkpoint, task):
            built["vocabulary"] = build_vocabulary(checkpoint, task, base, own, storage, block_size)
        own.close()
        for role, model in built.items():
            (folder / f"{task}.{role}.onnx").write_bytes(model.SerializeToString())
    base.close()


def as_stored(matrix: torch.Tensor, data_type: int, block_size: int) -> torch.Tensor:
    """What is left of a float32 matrix [O, C] when a bundle has stored it."""
    if data_type == TensorProto.FLOAT:
        return matrix
    if data_type == TensorProto.FLOAT16:
        return matrix.half().float()
    if data_type == TensorProto.BFLOAT16:
        return matrix.bfloat16().float()
    values, scales = quantise(matrix.numpy(), data_type, block_size)
    return torch.from_numpy(np.ascontiguousarray(dequantise(values, scales, block_size).T))


def as_exported(model: HealthGPT, precision: str, block_size: int) -> HealthGPT:
    """The reference with the matrices that a bundle of `precision` stands for, norms folded in as there."""
    storage = Storage.of(precision)
    for layer in model.model.layers:
        norms = {"self_attn": layer.input_layernorm.weight, "mlp": layer.post_attention_layernorm.weight}
        for name in model.language.linears:
            linear = layer.get_submodule(name)
            norm = norms[name.split(".")[0]].clone()
            if name.endswith(AFTER_NO_NORM):
                norm = torch.ones(linear.weight.shape[1])
            linear.weight.copy_(as_stored(linear.weight * norm, storage.linear, block_size))
            rank = linear.lora_A.weight.shape[0]
            reduce = torch.cat([linear.lora_A.weight, linear.lora_route.weight])
            reduce = as_stored(reduce * norm, storage.adapter, block_size)
            linear.lora_A.weight.copy_(reduce[:rank])
            linear.lora_route.weight.copy_(reduce[rank:])
            expand = as_stored(linear.lora_B.weight * linear.scaling, storage.adapter, block_size)
            linear.lora_B.weight.copy_(expand / linear.scaling)
        for norm in norms.values():
            norm.fill_(1)
    model.lm_head.weight.copy_(as_stored(model.lm_head.weight * model.model.norm.weight, storage.head, block_size))
    model.model.norm.weight.fill_(1)
    model.model.embed_tokens.weight.copy_(as_stored(model.model.embed_tokens.weight, storage.table, block_size))
    return model


def case_of(system: str, task: str) -> Case:
    """A golden case with a picture."""
    return next(case for case in CASES if (case.system, case.task) == (system, task) and case.image)


def features_of(case: Case) -> np.ndarray:
    """The picture's features as the language model takes them, [1, P, C]."""
    features = case.arrays["projected_features"]
    return features.reshape(1, *features.shape[-2:])


def spliced(prompt_ids: list[int], vocab: int, patches: int) -> np.ndarray:
    """The prompt as the graph takes it, [1, S]: the image as ids beyond the vocabulary."""
    ids: list[int] = []
    for token_id in prompt_ids:
        ids += range(vocab, vocab + patches) if token_id == IMAGE else [token_id]
    return np.array([ids])


class RoundedCache(KeyValueCache):
    """Keys and values rounded to what a cache of another type keeps of them."""

    def __init__(self, config: LanguageConfig, capacity: int, cache_type: int) -> None:
        super().__init__(config, capacity)
        self._type = cache_type

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().extend(layer, self._kept(key), self._kept(value))

    def _kept(self, rows: torch.Tensor) -> torch.Tensor:
        if self._type == TensorProto.FLOAT16:
            return rows.half().float()
        scale = rows.abs().amax(dim=-1, keepdim=True) / 127
        return (rows / scale).round() * scale


def reference_logits(
    model: HealthGPT, prompt_ids: list[int], features: np.ndarray | None, cache_type: int = TensorProto.FLOAT
) -> np.ndarray:
    """Logits [T, V] at every position, the picture's included."""
    with torch.inference_mode():
        embeddings = model.embed(prompt_ids, None if features is None else torch.from_numpy(features))
        cache = (
            None if cache_type == TensorProto.FLOAT else RoundedCache(model.language, embeddings.shape[1], cache_type)
        )
        found = model(embeddings, cache)
    return found[0].numpy()
