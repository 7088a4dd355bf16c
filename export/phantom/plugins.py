"""Trains the two H-LoRA plugins on the frozen base and tower: answers about phantoms, and pictures of them.

Only the contents of the released files are trained: the adapters, the projector, and for generation the new tokens'
rows in the embedding and the head. Prompts are those of the original. The loss is on answers and codes only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from healthgpt_edge import phantoms
from healthgpt_edge.phantoms import Phantom

from ..checkpoint import SpecialTokens, TaskConfig
from ..checkpoint.vocabulary import MARKERS
from ..reference.language import rotary_tables
from ..reference.model import HealthGPT, is_plugin
from .base import CODES, GENERATION, IGNORED, LANGUAGE, pad
from .corpus import ASSISTANT, END, FIRST_BYTE, TOKENS, Words
from .pictures import enlarge
from .precision import quick
from .vision import COMPREHENSION_LAYERS, GENERATION_LAYERS
from .vision import CONFIG as VISION

COMPREHENSION_TASK = TaskConfig("comprehension", rank=16, experts=4, alpha=32.0, vision_layers=COMPREHENSION_LAYERS)
GENERATION_TASK = TaskConfig("generation", rank=32, experts=4, alpha=64.0, vision_layers=GENERATION_LAYERS)
NEW_TOKENS = SpecialTokens(TOKENS, CODES)
LEARNING_RATE = 1e-3
ANSWER_BATCH = 6  # pictures, each with all its questions
PICTURE_BATCH = 4
# This share of pictures always has exactly one lesion: only then can one ask where it is, the hardest question.
ONE_LESION_SHARE = 0.3
# This share of input codes is replaced at random, so that drawing relies more on the picture than on earlier codes.
WRONG_CODES = 0.2
# From words alone there is nothing but the earlier codes, so only a few are replaced: enough that a drawing continues
# well after a code that no training picture has at that place.
WRONG_CODES_OF_WORDS = 0.05


def new_plugin(task: TaskConfig, base: dict[str, Tensor], tower: dict[str, Tensor]) -> HealthGPT:
    """The frozen base and tower with a new plugin; for generation also with rows for the new tokens.

    base, tower: state dicts with the names of HealthGPT and of VisionTower. A code's row starts as the row of a byte,
    which the base can already copy. The other new rows start as the mean, as in the original.
    """
    rows = TOKENS + NEW_TOKENS.codes + MARKERS if task.name == "generation" else LANGUAGE.vocab
    model = HealthGPT(replace(LANGUAGE, vocab=rows), VISION, task, GENERATION)
    state = model.state_dict()
    for name, value in base.items():
        if is_plugin(name) or name.startswith("vision_tower."):
            continue
        state[name] = value.clone()
        if name in ("model.embed_tokens.weight", "lm_head.weight") and task.name == "generation":
            mean = value[:TOKENS].mean(dim=0, keepdim=True)
            codes = value[FIRST_BYTE : FIRST_BYTE + NEW_TOKENS.codes]
            state[name] = torch.cat([value[:TOKENS], mean, codes, mean, mean])
    state |= {f"vision_tower.{name}": value for name, value in tower.items()}
    # A picture's features start near the mean embedding, where the base's attention expects tokens.
    state["model.mm_projector.2.bias"] = base["model.embed_tokens.weight"].mean(dim=0)
    model.load_state_dict(state)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_plugin(name))
    if task.name == "generation":
        for table in (model.model.embed_tokens, model.lm_head):
            table.weight.requires_grad_(True)
            table.weight.register_hook(lambda gradient: torch.cat([gradient[:TOKENS] * 0, gradient[TOKENS:]]))
    return model


def optimiser(model: HealthGPT, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)


def descend(model: HealthGPT, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()


# --- comprehension ----------------------------------------------------------------------------------------------


def branch(model: HealthGPT, prefix: Tensor, branches: Tensor) -> Tensor:
    """Normalised hidden states of several continuations of a prefix, none of which attends to another.

    prefix [B,P,hidden], branches [B,K,S,hidden] -> [B,K,S,hidden]. One pass instead of K saves much, because most
    tokens of a question about a picture are the picture's.
    """
    count, length = branches.shape[1:3]
    shared = prefix.shape[1]
    positions = torch.cat([torch.arange(shared), (shared + torch.arange(length)).repeat(count)])
    owner = torch.cat([torch.full((shared,), -1), torch.arange(count).repeat_interleave(length)])
    mask = (positions[None, :] <= positions[:, None]) & ((owner[None, :] == -1) | (owner[None, :] == owner[:, None]))
    tables = rotary_tables(model.language, positions)
    hidden = torch.cat([prefix, branches.flatten(1, 2)], dim=1)
    for index, layer in enumerate(model.model.layers):
        hidden = layer(hidden, tables, mask, None, index)
    return model.model.norm(hidden)[:, shared:].unflatten(1, (count, length))


def train_comprehension(
    seed: int, steps: int, model: HealthGPT, words: Words, subjects: list[Phantom], report: Callable[[str], None]
) -> HealthGPT:
    """Train the comprehension plugin with `steps` batches of pictures and all their questions."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    optimizer, schedule = optimiser(model, steps)
    head = torch.tensor([words.before_picture()])
    with_one = [subject for subject in subjects if len(subject.lesions) == 1]
    for step in range(steps):
        pictures, asked = [], []
        for _ in range(ANSWER_BATCH):
            some = with_one if rng.random() < ONE_LESION_SHARE else subjects
            subject, modality = some[rng.integers(len(some))], rng.integers(2)
            pictures.append((subject.ct, subject.mr)[modality])
            kinds = phantoms.questions(subject)
            kinds = kinds[: len(kinds) // 2] if modality == 0 else kinds[len(kinds) // 2 :]
            # Always four questions, so that the batch is rectangular.
            asked.append([*kinds, kinds[rng.integers(len(kinds))]][:4])
        with torch.no_grad():
            features = model.image_features(model.vision_tower.normalise(enlarge(pictures)))
        inputs, labels = pad([words.after_picture(q.text) + words.answer(q.answer) for row in asked for q in row])
        answers = _answer_labels(inputs, labels)
        with quick():
            before = model.model.embed_tokens(head.expand(ANSWER_BATCH, -1))
            prefix = torch.cat([before, model.model.mm_projector(features)], dim=1)
            hidden = branch(model, prefix, model.model.embed_tokens(inputs.unflatten(0, (ANSWER_BATCH, 4))))
            logits = model.lm_head(hidden.flatten(0, 1)[answers != IGNORED])
        loss = functional.cross_entropy(logits.float(), answers[answers != IGNORED])
        descend(model, optimizer, loss)
        schedule.step()
        if step % 25 == 0 or step == steps - 1:
            right = float((logits.argmax(dim=1) == answers[answers != IGNORED]).float().mean())
            report(f"comprehension {step}/{steps} loss {loss.item():.3f}, {right:.3f} of answer tokens right")
    return model


def _answer_labels(inputs: Tensor, labels: Tensor) -> Tensor:
    """Labels [N,S] with only the answer's tokens: those after the first <|assistant|>."""
    return torch.where((inputs == ASSISTANT).cumsum(dim=1) > 0, labels, IGNORED)


# --- generation -------------------------------------------------------------------------------------------------


def train_generation(
    seed: int,
    steps: int,
    model: HealthGPT,
    words: Words,
    subjects: list[Phantom],
    codes: Tensor,
    report: Callable[[str], None],
    keep: Callable[[HealthGPT], None],
    words_share: float,
) -> HealthGPT:
    """Train the generation plugin with `steps` batches of 4 pictures. `words_share` of them are drawn from words alone.

    codes: the VQGAN's codes of each subject's CT and MR, int64 [len(subjects), 2, 256]. `keep` is called with the
    model every 200 steps.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    optimizer, schedule = optimiser(model, steps)
    examples = _Examples(rng, model, words, subjects, codes)
    for step in range(steps):
        # With a share of 0 no random number is drawn, as when the first stage of the phantom in this repository was
        # trained: its weights depend on the sequence of random numbers.
        from_words = words_share > 0 and bool(rng.random() < words_share)
        prompts, wanted = examples.from_words() if from_words else examples.from_pictures()
        wrong = torch.from_numpy(rng.random(wanted.shape) < (WRONG_CODES_OF_WORDS if from_words else WRONG_CODES))
        given = torch.where(wrong, torch.from_numpy(rng.integers(CODES, size=wanted.shape)), wanted)
        ends = torch.tensor([[NEW_TOKENS.end]]).expand(PICTURE_BATCH, -1)
        labels = torch.cat([wanted + NEW_TOKENS.first_code, ends, torch.full_like(ends, END)], dim=1)
        with quick():
            drawn = model.model.embed_tokens(torch.cat([given + NEW_TOKENS.first_code, ends], dim=1))
            hidden = model.model(torch.cat([prompts, drawn], dim=1))[:, -labels.shape[1] :]
            logits = model.lm_head(hidden)
        loss = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        descend(model, optimizer, loss)
        schedule.step()
        if step % 25 == 0 or step == steps - 1:
            right = float((logits.argmax(dim=2) == labels).float().mean())
            source = "words" if from_words else "pictures"
            report(f"generation {step}/{steps} from {source} loss {loss.item():.3f}, {right:.3f} of codes right")
        if step % 200 == 199:
            keep(model)
    return model


class _Examples:
    """Random batches: embedded prompts [B,T,hidden] and the wanted codes [B,256]."""

    def __init__(
        self, rng: np.random.Generator, model: HealthGPT, words: Words, subjects: list[Phantom], codes: Tensor
    ) -> None:
        self._rng, self._model, self._subjects, self._codes = rng, model, subjects, codes
        self._instructions = {
            kind: torch.tensor([*prompt, NEW_TOKENS.start]) for kind, prompt in words.instructions().items()
        }
        # Index, modality and prompt of every picture, by the prompt's length, so that a batch is rectangular.
        self._drawings: dict[int, list[tuple[int, int, list[int]]]] = {}
        for index, subject in enumerate(subjects):
            for modality, drawing in enumerate(phantoms.drawings(subject)):
                prompt = [*words.without_picture(drawing.instruction), NEW_TOKENS.start]
                self._drawings.setdefault(len(prompt), []).append((index, modality, prompt))

    def from_pictures(self) -> tuple[Tensor, Tensor]:
        shown, targets, asked = [], [], []
        for index in self._rng.integers(len(self._subjects), size=PICTURE_BATCH):
            kind = list(self._instructions)[self._rng.integers(3)]
            source = 0 if kind == "ct-to-mr" else int(self._rng.integers(2))
            picture = (self._subjects[index].ct, self._subjects[index].mr)[source]
            shown.append(phantoms.downsample(picture) if kind == "super-resolve" else picture)
            targets.append(self._codes[index, 1 if kind == "ct-to-mr" else source])
            asked.append(self._instructions[kind])
        with torch.no_grad():
            features = self._model.image_features(self._model.vision_tower.normalise(enlarge(shown)))
        return prompt_embeddings(self._model, torch.stack(asked), features), torch.stack(targets)

    def from_words(self) -> tuple[Tensor, Tensor]:
        lengths = list(self._drawings)
        sizes = np.array([len(self._drawings[length]) for length in lengths])
        alike = self._drawings[int(self._rng.choice(lengths, p=sizes / sizes.sum()))]
        chosen = [alike[at] for at in self._rng.integers(len(alike), size=PICTURE_BATCH)]
        targets = torch.stack([self._codes[index, modality] for index, modality, _ in chosen])
        return self._model.model.embed_tokens(torch.tensor([prompt for *_, prompt in chosen])), targets


def prompt_embeddings(model: HealthGPT, prompts: Tensor, features: Tensor) -> Tensor:
    """Prompts [B,T] with IMAGE in the same place, and CLIP's features [B,P,C] -> embeddings [B,T-1+P,hidden]."""
    at = int(prompts[0].argmin())
    before, after = model.model.embed_tokens(prompts[:, :at]), model.model.embed_tokens(prompts[:, at + 1 :])
    return torch.cat([before, model.model.mm_projector(features), after], dim=1)
