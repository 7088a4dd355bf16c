"""Random systems of sizes that no golden case has, against transformers' own models with H-LoRA as the paper gives it.

The golden cases end before a window closes, and their heads, experts and ranks are even. Here is what lies beyond: the
reference is held to transformers, and the exported bundle, with our kernels and without, to both.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from golden_cases import GOLDEN, arguments, open_golden
from safetensors.torch import save_file
from tolerances import LOGITS
from torch import Tensor, nn
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

import healthgpt_edge
from healthgpt_edge.export.bundle import export_bundle
from healthgpt_edge.export.checkpoint import Checkpoint, TaskConfig
from healthgpt_edge.export.checkpoint.vocabulary import tokenizer_size
from healthgpt_edge.export.reference.language import rotary_tables
from healthgpt_edge.export.reference.model import HealthGPT
from healthgpt_edge.images import prepare, read_image
from healthgpt_edge.prompt import IMAGE

PICTURE = GOLDEN / "images" / "tall.png"
# More tokens than a pass takes, and than the caches begin with.
QUESTION = " Is <|end|>\nthis   胸部CT? " + "Or is it not? " * 30
TOKENS = 90
# An epsilon so large that another one would be noticed.
EPSILON, ROPE_THETA, VISION_LAYERS = 0.01, 500.0, 3
# Cosines and sines of the same float32 angles.
ANGLES = 1e-6


@dataclass(frozen=True)
class Sizes:
    """What differs from the golden system in layout."""

    system: str
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    rank: int
    experts: int
    window: int | None = None
    penalty: float = 1.0


ODD = {
    "heads of 10, a window": Sizes("m3", 70, 7, 7, 101, rank=21, experts=3, window=37),
    "one expert, five queries a head": Sizes("m3", 60, 10, 2, 33, rank=16, experts=1, window=64),
    "rows that are means": Sizes("phi4", 96, 12, 3, 131, rank=256, experts=16),
    "biases, a penalty": Sizes("qwen", 84, 14, 2, 50, rank=40, experts=5, penalty=1.3),
}


def random_model(sizes: Sizes) -> HealthGPT:
    with open_golden(sizes.system) as golden:
        language = replace(
            golden.language,
            layers=2,
            hidden=sizes.hidden,
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.hidden // sizes.heads,
            intermediate=sizes.intermediate,
            rms_epsilon=EPSILON,
            rope_theta=ROPE_THETA,
        )
        vision = replace(golden.vision, layers=VISION_LAYERS)
        task = TaskConfig("comprehension", sizes.rank, sizes.experts, 2.0 * sizes.rank, VISION_LAYERS - 1)
        tokens = tokenizer_size(golden.base_dir) if golden.tokens is None else language.vocab
        torch.manual_seed(0)
        model = HealthGPT(language, vision, task, golden.generation, golden.tokens)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif "embed" not in name:
            # Outputs of order one; of an adapter less, for its scaling is twice the number of experts.
            gain = 1 / (2 * sizes.experts) if "lora_B" in name else 1.4
            parameter.data = gain * torch.randn_like(parameter) * parameter[0].numel() ** -0.5
    model.model.embed_tokens.weight.data.normal_()
    # No run ends early or says what has no token: such logits are 0, and the greatest is above.
    model.lm_head.weight.data[[*model.generation.eos_ids, *range(tokens, language.vocab)]] = 0
    return model.requires_grad_(False).eval()


def release(folder: Path, sizes: Sizes) -> dict[str, Path]:
    """Files in the released layout, as arguments of Checkpoint.open."""
    model, golden = random_model(sizes), arguments(sizes.system)
    for name in ("base", "vision"):
        shutil.copytree(golden[name], folder / name, ignore=shutil.ignore_patterns("model*", "pytorch_model.bin"))
    changes = {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": 2,
        "num_key_value_heads": sizes.kv_heads,
        "rms_norm_eps": EPSILON,
        "rope_theta": ROPE_THETA,
        "sliding_window": sizes.window,
    }
    vision = json.loads((folder / "vision/config.json").read_text())["vision_config"]
    for path, change in {
        "base/config.json": changes,
        "base/generation_config.json": {"repetition_penalty": sizes.penalty},
        "vision/config.json": {"vision_config": vision | {"num_hidden_layers": VISION_LAYERS}},
    }.items():
        settings = json.loads((folder / path).read_text()) | change
        (folder / path).write_text(json.dumps(settings))
    metadata = {"format": "pt"}
    save_file(model.base_state(model.language.base_vocab), folder / "base/model.safetensors", metadata)
    save_file(model.vision_state(), folder / "vision/model.safetensors", metadata)
    torch.save(model.plugin_state(rows=sizes.system == "m3"), folder / "plugin.bin")
    return {"base": folder / "base", "vision": folder / "vision", "comprehension": folder / "plugin.bin"}


class Adapted(nn.Linear):
    """y = W x + b + scaling * B (gates * A x), with a gate for each expert's part of the rank."""

    def __init__(self, linear: nn.Linear, rank: int, experts: int) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)
        self.lora_route = nn.Linear(linear.in_features, experts, bias=False)
        self.weight, self.bias = linear.weight, linear.bias
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        gates, parts = self.lora_route(x).softmax(-1), self.lora_A(x).unflatten(-1, (self.experts, -1))
        scaling = 2 * self.experts  # alpha is twice the rank
        return super().forward(x) + scaling * self.lora_B((gates[..., None] * parts).flatten(-2))


class Original:
    """The released files as the original runs them, by transformers' models."""

    def __init__(self, files: dict[str, Path], sizes: Sizes) -> None:
        kind = transformers.Qwen2ForCausalLM if sizes.system == "qwen" else transformers.Phi3ForCausalLM
        # The original has transformers 4.41, for which a window is that many tokens and the token itself. Today's
        # counts the token itself.
        window = None if sizes.window is None else sizes.window + 1
        self.language = kind.from_pretrained(files["base"], attn_implementation="eager", sliding_window=window)
        for layer in self.language.model.layers:
            for block in (layer.self_attn, layer.mlp):
                for name, linear in list(block.named_children()):
                    if isinstance(linear, nn.Linear):
                        setattr(block, name, Adapted(linear, sizes.rank, sizes.experts))
        self.vision = transformers.CLIPVisionModel.from_pretrained(files["vision"]).eval()
        self.processor = transformers.CLIPImageProcessor.from_pretrained(files["vision"])
        width = self.vision.config.hidden_size
        self.language.model.mm_projector = nn.Sequential(
            nn.Linear(width, sizes.hidden), nn.GELU(), nn.Linear(sizes.hidden, sizes.hidden)
        )
        state = torch.load(files["comprehension"], weights_only=True)
        state = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
        if "lm_head.weight" in state:
            self.language.resize_token_embeddings(len(state["lm_head.weight"]), mean_resizing=False)
        assert not self.language.load_state_dict(state, strict=False).unexpected_keys
        self.language.eval()

    def pixel_values(self) -> Tensor:
        pixels = prepare(read_image(PICTURE), self.processor.size["shortest_edge"])
        return self.processor.preprocess(pixels, return_tensors="pt")["pixel_values"]

    @torch.inference_mode()
    def embed(self, prompt_ids: list[int]) -> Tensor:
        rows, at = self.language.get_input_embeddings(), prompt_ids.index(IMAGE)
        features = self.vision(self.pixel_values(), output_hidden_states=True).hidden_states[-2][:, 1:]
        before, after = (rows(torch.tensor([part])) for part in (prompt_ids[:at], prompt_ids[at + 1 :]))
        return torch.cat([before, self.language.model.mm_projector(features), after], dim=1)

    def run(self, prompt_ids: list[int]) -> tuple[list[int], np.ndarray]:
        """The new ids, and their logits [n, V] before the penalty."""
        done = self.language.generate(
            inputs_embeds=self.embed(prompt_ids),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return done.sequences[0].tolist(), torch.cat(done.logits).numpy()


@pytest.mark.parametrize("sizes", ODD.values(), ids=ODD)
def test_ids_and_logits_are_those_of_transformers(tmp_path, sizes):
    files = release(tmp_path, sizes)
    original = Original(files, sizes)
    with Checkpoint.open(**files) as checkpoint:
        export_bundle(checkpoint, tmp_path / "bundle")
        model = HealthGPT.load(checkpoint, "comprehension")
    sessions = [
        healthgpt_edge.load(tmp_path / "bundle", threads=1, kernels=kernels, keep_pictures_bytes=1 << 26)
        for kernels in (True, False)
    ]
    prompt_ids, _ = sessions[0].prompt("comprehension", QUESTION, has_image=True)
    expected, logits = original.run(prompt_ids)
    assert len(prompt_ids) > 300 and len(expected) == TOKENS and len(set(expected)) > TOKENS / 2
    found: list[Tensor] = []
    assert model.generate(prompt_ids, original.pixel_values(), TOKENS, found) == expected
    rows = found[0].shape[-1]  # the added rows may be left out where they are means
    np.testing.assert_allclose(torch.stack(found), logits[:, :rows], rtol=0, atol=LOGITS)
    for session in sessions:
        for draft in ("none", "lookup"):  # the second one after a kept picture
            answer = session.answer(PICTURE, QUESTION, max_new_tokens=TOKENS, draft=draft)
            assert (answer.prompt_ids, answer.token_ids) == (prompt_ids, expected)
        assert answer.reused_tokens
        together = session.together(2)
        for name in "ab":
            together.answer(name, PICTURE, QUESTION, max_new_tokens=TOKENS)
        assert [answer.token_ids for _, answer, _ in together] == [expected] * 2


@pytest.mark.parametrize("system", ["m3", "phi4", "qwen"])
def test_angles_are_those_of_transformers_to_the_last_position(system):
    """Far from the beginning, where the last bit of an angle is a thousandth."""
    with open_golden(system) as checkpoint:
        config = replace(checkpoint.language, head_dim=96 if system == "m3" else 128)
    positions = torch.arange(config.max_positions)
    rotary = Phi3RotaryEmbedding(
        transformers.Phi3Config(
            hidden_size=config.head_dim, num_attention_heads=1, rope_theta=config.rope_theta, pad_token_id=None
        )
    )
    expected = rotary(torch.zeros(1), positions[None])
    for found, table in zip(rotary_tables(config, positions), expected, strict=True):
        np.testing.assert_allclose(found, table[0], rtol=0, atol=ANGLES)
