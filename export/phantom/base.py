"""Pretrains the phantom's language model. Its weights are frozen afterwards.

It never sees a picture. Half of its batches are written findings with questions and answers in the chat template. The
other half teach a skill that drawing with codes needs: copying 256 byte tokens from a fixed distance. So small a model
takes very long to find that distance, so three heads attend to it from the start (`place_copy_heads`). Training may
change them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from healthgpt_edge import phantoms
from healthgpt_edge.prompt import IMAGE

from ..checkpoint import GenerationConfig, LanguageConfig, TaskConfig
from ..reference.language import HLoraLinear
from ..reference.model import HealthGPT
from .corpus import ASSISTANT, BASE_ROWS, END, END_OF_TEXT, FIRST_BYTE, MARKER, TOKENS, Words, findings
from .pictures import GRID
from .precision import quick
from .vision import CONFIG as VISION

LANGUAGE = LanguageConfig(
    architecture="phi3",
    layers=4,
    hidden=128,
    heads=4,
    kv_heads=4,
    head_dim=32,
    intermediate=384,
    vocab=BASE_ROWS,
    base_vocab=BASE_ROWS,
    rms_epsilon=1e-5,
    rope_theta=10000.0,
    sliding_window=2047,
    max_positions=4096,
)
GENERATION = GenerationConfig(eos_ids=(END_OF_TEXT, ASSISTANT, END), repetition_penalty=1.0)
CODES = GRID * GRID
COPY_BATCH, TEXT_BATCH = 4, 24
LEARNING_RATE = 2e-3
IGNORED = -100  # cross entropy skips these labels

# All embeddings share a direction of this size, from which the copy heads compute queries and keys. SPREAD is the
# deviation of the rest.
MEAN_SIZE, SPREAD = 0.7, 0.5
COPY_FREQUENCIES = 8  # the fastest ones, which are enough to distinguish neighbouring positions
COPY_SHARPNESS = 6.4


def new_model() -> HealthGPT:
    """A base with random weights and adapters that do nothing."""
    idle = TaskConfig("generation", rank=4, experts=4, alpha=8.0, vision_layers=1)
    model = HealthGPT(LANGUAGE, VISION, idle, GENERATION)
    direction = torch.randint(2, (LANGUAGE.hidden,)) * 2.0 - 1.0
    with torch.no_grad():
        rows = torch.randn(BASE_ROWS, LANGUAGE.hidden) * SPREAD + MEAN_SIZE * direction
        model.model.embed_tokens.weight.copy_(rows)
        model.lm_head.weight.normal_(std=0.02)
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_((2 * LANGUAGE.layers) ** -0.5)
    for module in model.modules():
        if isinstance(module, HLoraLinear):
            for part in (module.lora_A, module.lora_B, module.lora_route):
                part.requires_grad_(False)
    model.vision_tower.requires_grad_(False)
    model.model.mm_projector.requires_grad_(False)
    return model


def place_copy_heads(model: HealthGPT, distance: int) -> None:
    """Make the first head of the first three layers attend to the token `distance` positions before its own.

    For each frequency w the query is (cos w d, -sin w d) and the key (1, 0). Rotated by their positions they give the
    score cos(w (p_query - p_key - d)). The sum over all frequencies has its maximum at the distance d.
    """
    width = LANGUAGE.head_dim // 2
    mean = model.model.embed_tokens.weight.mean(dim=0).sign()
    # The component of a normalised embedding along the shared direction.
    gain = LANGUAGE.hidden * MEAN_SIZE / math.hypot(MEAN_SIZE, SPREAD)
    with torch.no_grad():
        for layer in list(model.model.layers)[:3]:
            weight = layer.self_attn.qkv_proj.weight
            query, key = weight[: LANGUAGE.head_dim], weight[LANGUAGE.hidden : LANGUAGE.hidden + LANGUAGE.head_dim]
            query.mul_(0.05)
            key.mul_(0.05)
            for index in range(COPY_FREQUENCIES):
                angle = distance * LANGUAGE.rope_theta ** (-index / width)
                row = mean * (COPY_SHARPNESS / gain)
                query[index] += math.cos(angle) * row
                query[index + width] -= math.sin(angle) * row
                key[index] += row


def copy_batch(words: Words, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Token ids and labels [B,T]: prompts with 256 bytes in place of the picture, and answers that copy them."""
    prompts = list(words.instructions().values())
    sequences, labels = [], []
    for _ in range(COPY_BATCH):
        prompt = prompts[rng.integers(len(prompts))]
        at = prompt.index(IMAGE)
        alphabet = rng.choice(256, size=int(rng.choice((4, 16, 64, 256))), replace=False)
        items = (FIRST_BYTE + rng.choice(alphabet, size=CODES)).tolist()
        before = [*prompt[:at], *items, *prompt[at + 1 :], MARKER]
        sequences.append([*before, *items])
        labels.append([IGNORED] * (len(before) - 1) + [*items, END])
    return torch.tensor(sequences), torch.tensor(labels)


def text_batch(words: Words, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Token ids and labels [B,T]: written findings, a question and its answer. All tokens have the same weight."""
    sequences = []
    for _ in range(TEXT_BATCH):
        seen, answers = findings(rng)
        kind = rng.choice(list(answers))
        sequences.append([*words.written(seen, phantoms.QUESTIONS[kind]), *words.answer(answers[kind])])
    return pad(sequences)


def pad(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Inputs and next-token labels of the sequences, [B,T] each, padded on the right."""
    length = max(len(one) for one in sequences) - 1
    inputs = torch.full((len(sequences), length), END_OF_TEXT)
    labels = torch.full((len(sequences), length), IGNORED)
    for row, one in enumerate(sequences):
        inputs[row, : len(one) - 1] = torch.tensor(one[:-1])
        labels[row, : len(one) - 1] = torch.tensor(one[1:])
    return inputs, labels


def copy_distance(words: Words) -> int:
    """The distance from patch i to the token that predicts code i."""
    prompt = next(iter(words.instructions().values()))
    after_picture = len(prompt) - 1 - prompt.index(IMAGE)
    return CODES + after_picture


def train(seed: int, steps: int, words: Words, report: Callable[[str], None]) -> HealthGPT:
    """A base trained with `steps` batches of each kind."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = new_model()
    place_copy_heads(model, copy_distance(words))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        told = []
        for make in (copy_batch, text_batch):
            inputs, labels = make(words, rng)
            kept = labels != IGNORED
            with quick():
                logits = model.lm_head(model.model(model.model.embed_tokens(inputs))[kept])
            loss = functional.cross_entropy(logits.float(), labels[kept])
            loss.backward()
            right = float((logits.argmax(dim=1) == labels[kept]).float().mean())
            told.append(f"{loss.item():.3f} ({right:.2f} right)")
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == steps - 1:
            report(f"base {step}/{steps} copy {told[0]}, text {told[1]}")
    with torch.no_grad():
        # Padding rows, which no token uses, as in the released tables.
        model.model.embed_tokens.weight[TOKENS:] = model.model.embed_tokens.weight[:TOKENS].mean(dim=0)
        model.lm_head.weight[TOKENS:] = model.lm_head.weight[:TOKENS].mean(dim=0)
    return model.requires_grad_(False).eval()
