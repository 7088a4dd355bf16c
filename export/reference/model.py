"""HealthGPT in plain PyTorch and float32: the reference for every exported graph.

A `HealthGPT` is one task of one system: vision tower, projector, decoder with that task's adapters, head, and for
pictures the VQGAN. Loaded from a checkpoint it computes what the original computes. Made from configurations it has
random weights and can be trained. Source: Lin et al., "HealthGPT", 2025 (arXiv 2502.09838).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from healthgpt_edge.errors import GenerationError, PromptError
from healthgpt_edge.prompt import IMAGE

from ..checkpoint import Checkpoint, GenerationConfig, LanguageConfig, SpecialTokens, TaskConfig, VisionConfig, VqConfig
from ..checkpoint.plugins import PREFIX as PLUGIN_PREFIX
from ..checkpoint.vision import PREFIX as VISION_PREFIX
from .clip import VisionTower
from .language import Decoder, KeyValueCache
from .vqgan import Vqgan, to_uint8

ADAPTER_PARTS = (".lora_A.", ".lora_B.", ".lora_route.")
ROWS = ("model.embed_tokens.weight", "lm_head.weight")


class HealthGPT(nn.Module):
    """One task. Parameters have released names, such as `model.layers.0.self_attn.qkv_proj.lora_A.weight`.

    The vision tower's names begin with `vision_tower.`, the VQGAN's with `vqgan.`.
    """

    def __init__(
        self,
        language: LanguageConfig,
        vision: VisionConfig,
        task: TaskConfig,
        generation: GenerationConfig,
        tokens: SpecialTokens | None = None,
        vq: VqConfig | None = None,
    ) -> None:
        super().__init__()
        self.language, self.task, self.generation, self.tokens, self.vq = language, task, generation, tokens, vq
        self.vision_tower = VisionTower(vision)
        self.model = Decoder(language, task, vision.hidden)
        self.lm_head = nn.Linear(language.hidden, language.vocab, bias=False)
        if vq is not None:
            self.vqgan = Vqgan(vq)

    @classmethod
    def load(cls, checkpoint: Checkpoint, task: str, parts: tuple[str, ...] = ("",)) -> HealthGPT:
        """The model of one of the checkpoint's tasks, with weights in float32, in evaluation mode.

        Only parameters whose names begin with one of `parts` are read. The others have no values.
        """
        config = checkpoint.tasks[task]
        with torch.device("meta"):  # so that no weight is allocated twice
            model = cls(
                checkpoint.language,
                checkpoint.vision,
                config,
                checkpoint.generation,
                checkpoint.tokens,
                checkpoint.vq if task == "generation" else None,
            )
        names = [name for name in model.state_dict() if name.startswith(parts)]
        state = {name: released_tensor(checkpoint, task, name).float() for name in names}
        model.load_state_dict(state, assign=True, strict=len(state) == len(model.state_dict()))
        return model.requires_grad_(False).eval()

    # --- prompt -------------------------------------------------------------------------------------------------

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Pixel values [B,3,S,S] -> CLIP's features of the task's layer, [B,P,C]."""
        return self.vision_tower(pixel_values, self.task.vision_layers)

    def features(self, pixel_values: Tensor) -> Tensor:
        """Pixel values [B,3,S,S] -> the embeddings [B,P,hidden] that replace the image token."""
        return self.model.mm_projector(self.image_features(pixel_values))

    def embed(self, prompt_ids: Sequence[int], features: Tensor | None = None) -> Tensor:
        """Prompt ids, in which IMAGE stands for the image, and `features` [1,P,hidden] -> embeddings [1,T,hidden].

        Raises PromptError unless the prompt has one IMAGE with features, and none without.
        """
        images = list(prompt_ids).count(IMAGE)
        if images != (0 if features is None else 1):
            raise PromptError(f"the prompt must hold an image token per image, found {images}")
        if features is None:
            return self.model.embed_tokens(torch.tensor([list(prompt_ids)]))
        at = list(prompt_ids).index(IMAGE)
        before, after = (torch.tensor([part], dtype=torch.long) for part in (prompt_ids[:at], prompt_ids[at + 1 :]))
        return torch.cat([self.model.embed_tokens(before), features, self.model.embed_tokens(after)], dim=1)

    # --- decoder ------------------------------------------------------------------------------------------------

    def forward(self, embeddings: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Embeddings [B,S,hidden] -> logits [B,S,vocab]."""
        return self.lm_head(self.model(embeddings, cache))

    @torch.inference_mode()
    def generate(
        self,
        prompt_ids: Sequence[int],
        pixel_values: Tensor | None,
        max_new_tokens: int,
        logits: list[Tensor] | None = None,
    ) -> list[int]:
        """Greedy decoding. Returns the new token ids, including the stop token.

        pixel_values: [1,3,S,S] or None. Each step's logits [vocab] before the repetition penalty are appended to
        `logits`. Raises GenerationError if logits are not finite.
        """
        embeddings = self.embed(prompt_ids, None if pixel_values is None else self.features(pixel_values))
        cache = KeyValueCache(self.language, embeddings.shape[1] + max_new_tokens)
        new_ids: list[int] = []
        while len(new_ids) < max_new_tokens:
            hidden = self.model(embeddings, cache)
            step = self.lm_head(hidden[0, -1])
            if not bool(torch.isfinite(step).all()):
                raise GenerationError(f"step {len(new_ids)}: expected finite logits, found NaN or infinity")
            if logits is not None:
                logits.append(step)
            new_ids.append(int(penalise(step, new_ids, self.generation.repetition_penalty).argmax()))
            if new_ids[-1] in self.generation.eos_ids:
                break
            embeddings = self.model.embed_tokens(torch.tensor([new_ids[-1:]]))
        return new_ids

    # --- pictures -----------------------------------------------------------------------------------------------

    def codes(self, new_ids: Sequence[int]) -> list[int]:
        """The codes of one picture from a free run's new ids, which include the stop token.

        The original removes ` <|end|>` by cutting off the text's last eight characters. At the token limit this removes
        the last token instead. So the last id is dropped in both cases. Newlines and `<end_index>` hold no number, so
        the original passes over both: codes after the end count. Raises GenerationError unless exactly one grid of
        codes remains.
        """
        if self.tokens is None or self.vq is None:
            raise GenerationError("codes: expected a generation model with a VQGAN, found none")
        tokens, codes = self.tokens, []
        for token in new_ids[:-1]:
            if token in (tokens.end, tokens.newline):
                continue
            if not tokens.first_code <= token < tokens.first_code + tokens.codes:
                raise GenerationError(f"expected an image token, found token {token} after {len(codes)} codes")
            codes.append(token - tokens.first_code)
        if len(codes) != self.vq.grid**2:
            raise GenerationError(f"expected {self.vq.grid**2} codes of one picture, found {len(codes)}")
        return codes

    @torch.no_grad()
    def picture(self, codes: Sequence[int]) -> Tensor:
        """The codes of one picture in row-major order -> uint8 [H,W,3]."""
        if self.vq is None:
            raise GenerationError("picture: expected a model with a VQGAN, found none")
        grid = torch.tensor(codes).reshape(1, self.vq.grid, self.vq.grid)
        return to_uint8(self.vqgan.decode(grid))[0]

    # --- the released layout ------------------------------------------------------------------------------------

    def base_state(self, rows: int) -> dict[str, Tensor]:
        """The tensors of the base's files, with only the first `rows` vocabulary rows."""
        state = {
            name: tensor
            for name, tensor in self.state_dict().items()
            if name.startswith(("model.", "lm_head.")) and not is_plugin(name)
        }
        return state | {name: state[name][:rows].clone() for name in ROWS}

    def plugin_state(self, rows: bool) -> dict[str, Tensor]:
        """The tensors of the task's plugin file by their released keys; with `rows` also the vocabulary rows."""
        return {
            f"{PLUGIN_PREFIX}{name}": tensor
            for name, tensor in self.state_dict().items()
            if is_plugin(name) or (rows and name in ROWS)
        }

    def vision_state(self) -> dict[str, Tensor]:
        """The tensors of CLIP's file, by their released keys."""
        return {f"{VISION_PREFIX}{name}": tensor for name, tensor in self.vision_tower.state_dict().items()}


def is_plugin(name: str) -> bool:
    """Whether a parameter belongs to a task's plugin rather than to the base."""
    return ".mm_projector." in name or any(part in name for part in ADAPTER_PARTS)


def penalise(logits: Tensor, new_ids: Iterable[int], penalty: float) -> Tensor:
    """Logits [vocab] with the repetition penalty on the generated ids (Keskar et al., arXiv 1909.05858).

    Prompt ids are not penalised: the original passes the prompt as embeddings, so its decoding never sees the ids.
    """
    if penalty == 1.0:
        return logits
    ids = torch.tensor(sorted(set(new_ids)), dtype=torch.long)
    seen = logits[ids]
    return logits.index_put((ids,), torch.where(seen < 0, seen * penalty, seen / penalty))


def released_tensor(checkpoint: Checkpoint, task: str, name: str) -> Tensor:
    """The checkpoint's tensor for a parameter name of HealthGPT."""
    part, _, rest = name.partition(".")
    if part == "vision_tower":
        return checkpoint.vision_tensor(rest)
    if part == "vqgan":
        return checkpoint.vq_tensor(rest)
    if name in ROWS or ".mm_projector." in name:
        return checkpoint.task_tensor(task, name.removeprefix("model."))
    for index, adapter_part in enumerate(ADAPTER_PARTS):
        if adapter_part in name:
            layer, linear = rest.removeprefix("layers.").split(adapter_part)[0].split(".", 1)
            return checkpoint.adapter(task, int(layer), linear)[index]
    return checkpoint.base_tensor(rest)
