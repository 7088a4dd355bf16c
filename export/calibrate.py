"""Calibration: quantise the decoder's matrices for the inputs that they see on sample pictures.

Works layer by layer, so that only one is in memory. The prompts of every task run through the layer in float32, the
second moments of each matrix' inputs are accumulated, and the quantised matrices are written to the weight files under
the keys by which the graphs, built afterwards, look them up. Nothing else of the pictures is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from healthgpt_edge.errors import BundleError
from healthgpt_edge.images import prepare, read_image
from healthgpt_edge.prompt import Tokenizer, prompt_ids

from .checkpoint import Checkpoint
from .folded import FoldedLinear
from .gptq import quantise_for
from .quantize import Storage, scale_type, to_panels
from .reference.language import DecoderLayer, rotary_tables, visible
from .reference.model import HealthGPT
from .weights import WeightFile, require_finite

# One per picture, in turn: the question matters little beside the picture's own tokens.
QUESTIONS = ("What is in the image?", "What modality is used to take this image?", "Is there a lesion in the image?")
INSTRUCTION = "Reconstruct the image."
# Everything before the first decoder layer, and the VQGAN's encoder for the codes of a reconstruction.
_PARTS = ("vision_tower.", "model.mm_projector.", "model.embed_tokens.")
_PARTS += ("vqgan.encoder.", "vqgan.quant_conv.", "vqgan.quantize.")


class Moments:
    """Accumulates the second moments of rows [..., C]."""

    def __init__(self, channels: int) -> None:
        self.total, self.rows = torch.zeros(channels, channels), 0

    def add(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """A forward pre-hook: adds the rows that a module is given."""
        rows = inputs[0].flatten(0, -2)
        self.total.addmm_(rows.T, rows)
        self.rows += len(rows)


def calibrate(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    pictures: Sequence[Any],
    base: WeightFile,
    own: Mapping[str, WeightFile],
    storage: Storage,
    block_size: int,
    on_layer: Callable[[], None],
) -> None:
    """Write the matrices of all decoder layers, quantised for `pictures` (as `read_image` takes them).

    Base matrices go to `base`, the adapters of each task to its `own`. Raises ImageError, and BundleError where a
    matrix or what it is multiplied with is not finite.
    """

    def write(file: WeightFile, key: str, data_type: int, weight: np.ndarray, moments: list[Moments]) -> None:
        mean = sum(one.total for one in moments) / sum(one.rows for one in moments)
        if not torch.isfinite(mean.diagonal()).all():
            raise BundleError(
                f"{key} cannot be calibrated: what it is multiplied with must be finite, found NaN or infinity"
            )
        values, scales = quantise_for(require_finite(key, weight), mean, data_type, block_size)
        panels = storage.panels and not key.endswith("adapter_in")
        if panels:
            values, scales = to_panels(values), to_panels(scales)
        file.put(key, data_type, lambda: values)
        file.put(f"{key}_scale", scale_type(panels), lambda: scales)

    with torch.inference_mode():
        hidden = {task: list(_embeddings(checkpoint, task, tokenizer, pictures)) for task in sorted(checkpoint.tasks)}
        for index in range(checkpoint.language.layers):
            heard = {task: _pass(checkpoint, task, index, states) for task, states in hidden.items()}
            for linear in checkpoint.language.linears:
                for task in heard:
                    folded = FoldedLinear(checkpoint, task, index, linear)
                    into, out_of = heard[task][linear]
                    write(own[task], f"{folded.key}.adapter_in", storage.adapter, folded.adapter_in(), [into])
                    write(own[task], f"{folded.key}.adapter_out", storage.adapter, folded.adapter_out(), [out_of])
                # The tasks share the base matrix, so it is quantised for the inputs of all of them.
                all_into = [heard[task][linear][0] for task in heard]
                write(base, f"{folded.key}.weight", storage.linear, folded.base(), all_into)
            on_layer()


def _embeddings(checkpoint: Checkpoint, task: str, tokenizer: Tokenizer, pictures: Sequence[Any]) -> Iterator[Tensor]:
    """One prompt per picture, for generation followed by the picture's own codes: [1, T, hidden] each."""
    model = HealthGPT.load(checkpoint, task, _PARTS)
    background = checkpoint.vision.background
    for number, source in enumerate(pictures):
        picture = read_image(source)
        generates = task == "generation"
        words = INSTRUCTION if generates else QUESTIONS[number % len(QUESTIONS)]
        ids = prompt_ids(tokenizer, checkpoint.template, words, True, generates)
        pixels = torch.from_numpy(prepare(picture, checkpoint.vision.image_size, background))
        embeddings = model.embed(ids, model.features(model.vision_tower.normalise(pixels[None])))
        if generates and checkpoint.tokens and checkpoint.vq:
            drawn = torch.from_numpy(prepare(picture, checkpoint.vq.image_size, background))
            codes = model.vqgan.encode(drawn.permute(2, 0, 1)[None] / 127.5 - 1).flatten(1)
            embeddings = torch.cat([embeddings, model.model.embed_tokens(codes + checkpoint.tokens.first_code)], dim=1)
        yield embeddings


def _pass(checkpoint: Checkpoint, task: str, index: int, hidden: list[Tensor]) -> dict[str, tuple[Moments, Moments]]:
    """Run `hidden` through one layer, in place; returns the input moments of each linear and of its B."""
    config, heard = checkpoint.language, {}
    layer = _layer(checkpoint, task, index)
    for name in config.linears:
        linear = layer.get_submodule(name)
        moments = Moments(linear.weight.shape[1]), Moments(linear.lora_B.weight.shape[1])
        linear.register_forward_pre_hook(moments[0].add)
        linear.lora_B.register_forward_pre_hook(moments[1].add)
        heard[name] = moments
    for number, states in enumerate(hidden):
        length = states.shape[1]
        tables = rotary_tables(config, torch.arange(length))
        hidden[number] = layer(states, tables, visible(config, 0, length), None, index)
    return heard


def _layer(checkpoint: Checkpoint, task: str, index: int) -> DecoderLayer:
    """A decoder layer with exactly the folded matrices that the graph will hold."""
    config, plugin = checkpoint.language, checkpoint.tasks[task]
    with torch.device("meta"):
        layer = DecoderLayer(config, plugin)
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.weight = nn.Parameter(torch.ones(config.hidden))
    for name in config.linears:
        folded, linear = FoldedLinear(checkpoint, task, index, name), layer.get_submodule(name)
        into = torch.from_numpy(folded.adapter_in())
        state = {
            "weight": torch.from_numpy(folded.base()),
            "lora_A.weight": into[: plugin.rank],
            "lora_route.weight": into[plugin.rank :],
            "lora_B.weight": torch.from_numpy(folded.adapter_out()),
        }
        state |= {"bias": torch.from_numpy(folded.bias())} if config.has_bias(name) else {}
        linear.load_state_dict(state, assign=True)
        linear.scaling = 1.0  # folded into B
    return layer
