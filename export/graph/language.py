"""The `language` graph: token ids in, logits and grown caches out, the same for prefill and decode.

An image is extra vocabulary: token id V + p stands for row p of `image_features`, so no other code has to splice
features in. Letters: B batch, S new tokens, P patches, C hidden, V vocabulary, M cache capacity, n positions asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from onnx import FunctionProto, ModelProto, TensorProto

from .. import fold
from ..checkpoint import Checkpoint
from ..folded import FoldedLinear, to_float
from ..quantize import Storage
from ..weights import WeightFile
from .builder import GraphBuilder
from .functions import (
    cached_attention,
    caches,
    hlora_linear,
    norm_hlora_linear,
    packed_cached_attention,
    residual_hlora_linear,
    swiglu_residual_hlora_linear,
)
from .matrices import stored_linear, stored_matrix

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


class LanguageGraph:
    """Builds the language graph of one task; base matrices go to `base`, the plugin's to `own`."""

    def __init__(
        self, checkpoint: Checkpoint, task: str, base: WeightFile, own: WeightFile, storage: Storage, block_size: int
    ) -> None:
        self.checkpoint, self.task, self.base, self.own = checkpoint, task, base, own
        self.storage, self.block_size = storage, block_size
        self.config = checkpoint.language
        self.graph = GraphBuilder(f"{task}.language")
        # Qwen has biases on some linears. All get one then, so that one function body serves the whole graph.
        self.has_bias = self.config.architecture == "qwen2"
        self.linear_function = hlora_linear(storage.linear, storage.adapter, self.has_bias, storage.panels)
        self.norm_function = norm_hlora_linear(storage.linear, storage.adapter, self.config.hidden)
        self.residual_function = residual_hlora_linear(storage.linear, storage.adapter)
        self.swiglu_function = swiglu_residual_hlora_linear(storage.linear, storage.adapter)
        self.attention_function = cached_attention(storage.cache)
        self.packed_attention_function = packed_cached_attention(storage.cache)

    def build(self, on_layer: Callable[[], None] = lambda: None) -> ModelProto:
        """The whole graph; `on_layer` is called after each decoder layer, for a progress bar."""
        graph, config = self.graph, self.config
        token_ids = graph.input("token_ids", INT64, ["B", "S"])
        image_features = graph.input("image_features", FLOAT, ["B", "P", config.hidden])
        past_length = graph.input("past_length", INT64, ["B"])
        last_positions = graph.input("last_positions", INT64, [1])
        pasts = [
            [
                graph.input(f"past_key_values.{layer}.{kind}", data_type, self._cache_shape(kind))
                for kind, data_type in caches(self.storage.cache).items()
            ]
            for layer in range(config.layers)
        ]
        with graph.scope("embedding"):
            hidden = self._embed(token_ids, image_features)
        with graph.scope("positions"):
            cosine, sine, visible = self._positions(token_ids, past_length, pasts[0][0])
            # An explicit start, because a slice from -0 would be all positions.
            first_wanted = graph.op("Sub", graph.op("Shape", token_ids, start=1, end=2), last_positions)
        for layer, past in enumerate(pasts):
            with graph.scope(f"layers.{layer}"):
                first = first_wanted if layer == len(pasts) - 1 else None
                hidden = self._layer(layer, hidden, (cosine, sine, past_length, visible), past, first)
            on_layer()
        with graph.scope("head"):
            hidden = self._norm(hidden)
            first_row = first_logit_row(self.checkpoint, self.task)
            logits = self.head(hidden, first_row, self.config.vocab)
        graph.output(logits, "logits", FLOAT, ["B", "n", config.vocab - first_row])
        if first_row:
            graph.output(hidden, "hidden", FLOAT, ["B", "n", config.hidden])
        return graph.model()

    def _embed(self, token_ids: str, image_features: str) -> str:
        graph, rows = self.graph, self.config.vocab
        owned = self.checkpoint.task_owns(self.task, "embed_tokens.weight")
        table = graph.weight(
            self.own if owned else self.base,
            "embed_tokens.weight",
            self.storage.table,
            lambda: to_float(self.checkpoint.task_tensor(self.task, "embed_tokens.weight")),
        )
        text = graph.op("Gather", table, graph.op("Min", token_ids, graph.constant(rows - 1, np.int64)), axis=0)
        if self.storage.table != FLOAT:
            text = graph.op("Cast", text, to=FLOAT)
        patch = graph.op("Max", graph.op("Sub", token_ids, graph.constant(rows, np.int64)), graph.constant(0, np.int64))
        last = graph.constant([-1], np.int64)
        image = graph.op("GatherND", image_features, graph.op("Unsqueeze", patch, last), batch_dims=1)
        is_image = graph.op("GreaterOrEqual", token_ids, graph.constant(rows, np.int64))
        return graph.op("Where", graph.op("Unsqueeze", is_image, last), image, text)

    def _positions(self, token_ids: str, past_length: str, past_key: str) -> tuple[str, str, str]:
        """Rotary cosine and sine [B, S, D/2] and the visibility mask [B, 1, S, M], computed once for all layers."""
        graph, config = self.graph, self.config
        zero, one = graph.constant(0, np.int64), graph.constant(1, np.int64)
        scalar = graph.constant([], np.int64)
        length = graph.op("Reshape", graph.op("Shape", token_ids, start=1, end=2), scalar)
        capacity = graph.op("Reshape", graph.op("Shape", past_key, start=2, end=3), scalar)
        first = graph.op("Unsqueeze", past_length, graph.constant([1], np.int64))
        positions = graph.op("Add", first, graph.op("Range", zero, length, one))
        column = graph.op("Unsqueeze", positions, graph.constant([2], np.int64))
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        inverse_frequencies = (1.0 / config.rope_theta**exponents).numpy()
        angles = graph.op("Mul", graph.op("Cast", column, to=FLOAT), graph.constant(inverse_frequencies, np.float32))
        places = graph.op("Range", zero, capacity, one)
        visible = graph.op("GreaterOrEqual", column, places)
        if config.sliding_window is not None:
            furthest = graph.op("Sub", column, graph.constant(config.sliding_window, np.int64))
            visible = graph.op("And", visible, graph.op("GreaterOrEqual", places, furthest))
        visible = graph.op("Unsqueeze", visible, graph.constant([1], np.int64))
        return graph.op("Cos", angles), graph.op("Sin", angles), visible

    def head(self, hidden: str, first: int, end: int) -> str:
        """Logits [B, n, end - first] of the normed hidden states, the final norm's weight folded in."""
        checkpoint, task, name = self.checkpoint, self.task, "lm_head.weight"

        def rows() -> np.ndarray:
            norm = to_float(checkpoint.base_tensor("norm.weight"))
            return fold.take_norm(to_float(checkpoint.task_tensor(task, name)[first:end]), norm)

        file, key = self.own if checkpoint.task_owns(task, name) else self.base, f"lm_head.{first}.{end}"
        return stored_linear(self.graph, hidden, file, key, self.storage.head, self.block_size, rows)

    def _cache_shape(self, kind: str) -> list[int | str]:
        return ["B", self.config.kv_heads, "M", 1 if kind.endswith("_scale") else self.config.head_dim]

    def _layer(
        self, layer: int, hidden: str, shared: tuple[str, str, str, str], past: list[str], first: str | None
    ) -> str:
        """Hidden states after a layer, from position `first` on: of those before it, keys and values are enough."""
        graph, config = self.graph, self.config
        # The node itself writes the graph's outputs: a copy in between would touch the whole cache for every token.
        kinds = caches(self.storage.cache)
        presents = [f"present_key_values.{layer}.{kind}" for kind in kinds]
        sizes = {"heads": config.heads, "kv_heads": config.kv_heads, "window": config.sliding_window or 0}
        with graph.scope("attention"):
            if "self_attn.qkv_proj" in config.linears:
                query_size, key_size = config.heads * config.head_dim, config.kv_heads * config.head_dim
                attended, *_ = graph.call(
                    self.packed_attention_function,
                    *(self._normed_linear(layer, "self_attn.qkv_proj", hidden), *shared, *past),
                    within=(self.attention_function,),
                    last=presents,
                    sizes=[query_size, key_size, key_size],
                    **sizes,
                )
            else:
                normed = self._norm(hidden)
                rows = [self._linear(layer, f"self_attn.{p}_proj", normed) for p in "qkv"]
                attended, *_ = graph.call(self.attention_function, *rows, *shared, *past, last=presents, **sizes)
            if first:
                attended, hidden = (self._from(first, rows) for rows in (attended, hidden))
            hidden = self._linear(layer, "self_attn.o_proj", attended, hidden, around=self.residual_function)
        for present, (kind, data_type) in zip(presents, kinds.items(), strict=True):
            graph.output(present, present, data_type, self._cache_shape(kind))
        with graph.scope("mlp"):
            if "mlp.gate_up_proj" in config.linears:
                packed = self._normed_linear(layer, "mlp.gate_up_proj", hidden)
                return self._linear(layer, "mlp.down_proj", packed, hidden, around=self.swiglu_function)
            normed = self._norm(hidden)
            gate, up = (self._linear(layer, f"mlp.{p}_proj", normed) for p in ("gate", "up"))
            activated = graph.op("Mul", graph.op("Mul", gate, graph.op("Sigmoid", gate)), up)
            return self._linear(layer, "mlp.down_proj", activated, hidden, around=self.residual_function)

    def _from(self, first: str, rows: str) -> str:
        """Rows [B, S, C] from position `first` on."""
        end, axis = self.graph.constant([np.iinfo(np.int64).max], np.int64), self.graph.constant([1], np.int64)
        return str(self.graph.op("Slice", rows, first, end, axis))

    def _norm(self, hidden: str) -> str:
        """RMS normalisation without its weight, which is folded into the matrices that follow."""
        ones = self.graph.constant(np.ones(self.config.hidden), np.float32)
        return str(self.graph.op("RMSNormalization", hidden, ones, axis=-1, epsilon=self.config.rms_epsilon))

    def _normed_linear(self, layer: int, linear: str, hidden: str) -> str:
        """One H-LoRA linear of the normed hidden states; of several, the norm would be computed several times."""
        return self._linear(layer, linear, hidden, around=self.norm_function, epsilon=self.config.rms_epsilon)

    def _linear(
        self, layer: int, linear: str, x: str, *more: str, around: FunctionProto | None = None, **attributes: Any
    ) -> str:
        """One H-LoRA linear, with what is `around` it, which takes `more` inputs and attributes."""
        folded, storage = FoldedLinear(self.checkpoint, self.task, layer, linear), self.storage
        panels = storage.panels
        with self.graph.scope(linear):
            return str(
                self.graph.call(
                    around or self.linear_function,
                    x,
                    *self._stored(self.base, f"{folded.key}.weight", storage.linear, folded.base, panels),
                    self.graph.weight(self.base, f"{folded.key}.bias", FLOAT, folded.bias) if self.has_bias else "",
                    *self._stored(self.own, f"{folded.key}.adapter_in", storage.adapter, folded.adapter_in),
                    *self._stored(self.own, f"{folded.key}.adapter_out", storage.adapter, folded.adapter_out, panels),
                    *more,
                    within=(self.linear_function,),
                    block_size=self.block_size,
                    experts=self.checkpoint.tasks[self.task].experts,
                    **attributes,
                )
            )

    def _stored(
        self, file: WeightFile, key: str, data_type: int, produce: Callable[[], np.ndarray], panels: bool = False
    ) -> tuple[str, str]:
        return stored_matrix(self.graph, file, key, data_type, self.block_size, produce, panels)


def build_language(
    checkpoint: Checkpoint,
    task: str,
    base: WeightFile,
    own: WeightFile,
    storage: Storage,
    block_size: int,
    on_layer: Callable[[], None] = lambda: None,
) -> ModelProto:
    """The language graph of `task`.

    Inputs: token_ids int64 [B, S], image_features float [B, P, C] (P >= 1, zeros where there is no image),
    past_length int64 [B], last_positions int64 [1] = n, past_key_values.{i}.{key,value} [B, K, M, D] of
    the storage's cache type, with past_key_values.{i}.{key,value}_scale [B, K, M, 1] where that is INT8.
    Outputs: logits [B, n, V - first] for the rows from `first_logit_row` on, the same caches as present_key_values,
    and, where `first` is above 0, hidden [B, n, C] for the `vocabulary` graph.
    """
    return LanguageGraph(checkpoint, task, base, own, storage, block_size).build(on_layer)


def build_vocabulary(
    checkpoint: Checkpoint, task: str, base: WeightFile, own: WeightFile, storage: Storage, block_size: int
) -> ModelProto:
    """The head rows that `language` leaves out: hidden [B, n, C] -> logits [B, n, first]."""
    parts = LanguageGraph(checkpoint, task, base, own, storage, block_size)
    parts.graph.name = f"{task}.vocabulary"
    hidden = parts.graph.input("hidden", FLOAT, ["B", "n", checkpoint.language.hidden])
    first_row = first_logit_row(checkpoint, task)
    parts.graph.output(parts.head(hidden, 0, first_row), "logits", FLOAT, ["B", "n", first_row])
    return parts.graph.model()


def first_logit_row(checkpoint: Checkpoint, task: str) -> int:
    """The first head row that `language` computes: 0, or `<idx_0>` where the task can only emit codes.

    The codes, `<end_index>` and `<pixel_newline>` are the last rows of the vocabulary: at M3's size 8194 of 40206.
    """
    if task != "generation" or checkpoint.tokens is None:
        return 0
    return checkpoint.tokens.first_code
