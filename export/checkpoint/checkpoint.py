"""Checkpoint opens all parts of a release, checks that they fit together, and reads their tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from healthgpt_edge.errors import CheckpointError

from .files import TensorSource, label
from .language import LanguageConfig, language_shapes, read_generation, read_language
from .pickles import PickleSource
from .plugins import PARTS, ROWS, Plugin, Task, TaskConfig, adapter_key, released_key
from .shards import SafetensorsSource
from .vision import PREFIX, VisionConfig, is_other_half, open_vision, read_vision, vision_shapes
from .vocabulary import MARKERS, SpecialTokens, infer_template, tokenizer_size
from .vqgan import MAX_CODES, VqConfig, find_file, is_training_state, read_vqgan, vqgan_shapes


class Checkpoint:
    """A released system. Its configurations are attributes; its tensors are read by name, each when it is asked for.

    `template` is the prompt template, `tokens` the ids of the added image tokens (None if there are none), `tasks` the
    task configurations by name.
    """

    def __init__(
        self,
        base: Path,
        vision: Path,
        plugins: dict[Task, Plugin],
        vqgan: Path | None,
        template: str | None,
        hlora_alpha: float | None,
        codes: int | None,
    ) -> None:
        self.base_dir, self._vision_dir = base, vision
        self.language: LanguageConfig = read_language(base)
        self.vision: VisionConfig = read_vision(vision)
        self.vq: VqConfig | None = None if vqgan is None else read_vqgan(vqgan)
        self.template = infer_template(base, self.language.architecture, template)
        self._tokenizer_size = tokenizer_size(base)
        if self._tokenizer_size > self.language.base_vocab:
            raise CheckpointError(
                f"{label(base)}: expected at most {self.language.base_vocab} tokens (the base's rows), "
                f"found a tokenizer of {self._tokenizer_size}"
            )
        self._plugins = plugins
        self.tokens: SpecialTokens | None = self._special_tokens(codes)
        if self.template != "qwen":
            # The original always adds tokens to these systems. It sets every row from the tokenizer's size on to the
            # mean row, also the base's padding rows. If their number is unknown they are left out here, which changes
            # no answer unless such a token is typed: a mean row never has the largest logit.
            added = 0 if self.tokens is None else self.tokens.codes + MARKERS
            self.language = replace(self.language, vocab=self._tokenizer_size + added)
        self.generation = read_generation(base, self.language.vocab)

        self._base: TensorSource = SafetensorsSource(base)
        self._base.require(language_shapes(self.language), lambda key: key.endswith("rotary_emb.inv_freq"))
        self._vision = open_vision(vision)
        self._vision.require(vision_shapes(self.vision), is_other_half)
        self._vqgan = None
        if vqgan is not None and self.vq is not None:
            self._vqgan = PickleSource(find_file(vqgan, "last.ckpt"), section="state_dict", lightning=True)
            self._vqgan.require(vqgan_shapes(self.vq), is_training_state)
        self.tasks: dict[str, TaskConfig] = {}
        for task, plugin in plugins.items():
            rank, experts = plugin.sizes()
            plugin.require(self.language, self.vision, rank, experts)
            if self.language.tied and any(plugin.owns(name) for name in ROWS):
                raise CheckpointError(
                    f"{label(plugin.sources[0].path)}: expected no vocabulary rows (the base ties its embedding and "
                    "head), found some"
                )
            # Hugging Face's hidden_states[-2] for comprehension and hidden_states[1] for generation, where
            # hidden_states[0] is the input of the first layer.
            vision_layers = self.vision.layers - 1 if task == "comprehension" else 1
            alpha = 2.0 * rank if hlora_alpha is None else hlora_alpha
            self.tasks[task] = TaskConfig(task, rank, experts, alpha, vision_layers)

    @classmethod
    def open(
        cls,
        base: str | Path,
        vision: str | Path,
        comprehension: str | Path | None = None,
        generation: str | Path | None = None,
        fusion: str | Path | None = None,
        vqgan: str | Path | None = None,
        template: str | None = None,
        hlora_alpha: float | None = None,
        codes: int | None = None,
    ) -> Checkpoint:
        """Open and check the files of a release. Raises CheckpointError with file, key, expected and found.

        base, vision: Hugging Face folders. comprehension, generation, fusion: plugin files. vqgan: the folder of
        model.yaml and last.ckpt. hlora_alpha: alpha of the plugins (None: twice the rank). codes: the number of codes,
        needed only to add the image tokens if no file of the release contains it.
        """
        if comprehension is None and generation is None:
            raise CheckpointError("expected a comprehension or a generation plugin, found neither")
        if fusion is not None and generation is None:
            raise CheckpointError(f"{label(Path(fusion))}: expected a generation plugin beside it, found none")
        if generation is not None and vqgan is None:
            raise CheckpointError(f"{label(Path(generation))}: expected a VQGAN beside it, found none")
        if hlora_alpha is not None and not (math.isfinite(hlora_alpha) and hlora_alpha > 0):
            raise CheckpointError(f"hlora_alpha: expected a number above 0, found {hlora_alpha}")
        if (
            comprehension is not None
            and generation is not None
            and Path(comprehension).resolve() == Path(generation).resolve()
        ):
            raise CheckpointError(f"{label(Path(generation))}: expected a plugin for each task, found one for both")
        plugins: dict[Task, Plugin] = {}
        if comprehension is not None:
            plugins["comprehension"] = Plugin("comprehension", Path(comprehension))
        if generation is not None:
            fusion_path = None if fusion is None else Path(fusion)
            plugins["generation"] = Plugin("generation", Path(generation), fusion_path)
        vqgan_path = None if vqgan is None else Path(vqgan)
        return cls(Path(base), Path(vision), plugins, vqgan_path, template, hlora_alpha, codes)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the files. Tensors that were already read stay valid."""
        for part in (self._base, self._vision, self._vqgan, *self._plugins.values()):
            if part is not None:
                part.close()

    def provenance(self) -> dict[str, list[str]]:
        """The names of the files by role, without full paths, which would reveal details of the exporting machine."""
        names = {"base": [label(self.base_dir)], "vision": [label(self._vision_dir)]}
        names |= {task: [label(source.path) for source in plugin.sources] for task, plugin in self._plugins.items()}
        return names

    def base_tensor(self, name: str) -> torch.Tensor:
        """A tensor of the base in the file's dtype, by its name after `model.`, or `lm_head.weight`."""
        if name == "lm_head.weight":
            return self._base.read("model.embed_tokens.weight" if self.language.tied else name)
        return self._read(self._base, f"model.{name}")

    def adapter(self, task: str, layer: int, linear: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A [R, C], B [O, R] and the router [E, C] of one linear, in float32."""
        plugin = self._plugin(task)
        keys = [adapter_key(layer, linear, part) for part in PARTS]
        reduce, expand, router = (self._read(plugin, key).float() for key in keys)
        return reduce, expand, router

    def task_owns(self, task: str, name: str) -> bool:
        """Whether a plugin file of the task has the tensor `name`. If not, every task uses the base's."""
        return self._plugin(task).owns(name)

    def task_tensor(self, task: str, name: str) -> torch.Tensor:
        """`mm_projector.{0,2}.{weight,bias}`, `embed_tokens.weight` or `lm_head.weight` of one task.

        If no plugin has vocabulary rows, they are the base's. If tokens are added to these, the table is float32
        [vocab, hidden], and the rows of the added tokens (some of which may be the base's padding rows) are the mean of
        the tokenizer's rows.
        """
        plugin = self._plugin(task)
        if plugin.owns(name) or name not in ROWS:
            return self._read(plugin, released_key(name))
        rows = self.base_tensor(name)
        if self.tokens is None:
            return rows[: self.language.vocab]
        table = torch.empty(self.language.vocab, self.language.hidden)
        table[: self.tokens.start] = rows[: self.tokens.start]
        table[self.tokens.start :] = table[: self.tokens.start].mean(dim=0)
        return table

    def vision_tensor(self, name: str) -> torch.Tensor:
        """A tensor of CLIP's vision tower in the file's dtype, by its name after `vision_model.`."""
        return self._read(self._vision, PREFIX + name)

    def vq_tensor(self, name: str) -> torch.Tensor:
        """A tensor of the VQGAN in the file's dtype, by its name in taming-transformers."""
        if self._vqgan is None:
            raise CheckpointError(f"VQGAN: expected tensor {name}, found a checkpoint without a VQGAN")
        return self._read(self._vqgan, name)

    def _plugin(self, task: str) -> Plugin:
        if task not in self._plugins:
            raise CheckpointError(f"task: expected one of {', '.join(self._plugins)}, found {task!r}")
        return self._plugins[task]

    @staticmethod
    def _read(source: TensorSource | Plugin, key: str) -> torch.Tensor:
        try:
            return source.read(key)
        except KeyError as error:
            raise CheckpointError(f"{key}: expected the name of a tensor of this release, found none such") from error

    def _special_tokens(self, asked: int | None) -> SpecialTokens | None:
        """The image tokens. The VQGAN, the plugins' vocabulary rows and the caller must agree on their number."""
        if self.template == "qwen":
            # The system on Qwen adds no tokens: it uses the base's rows and makes no pictures.
            if asked is not None or self.vq is not None or "generation" in self._plugins:
                raise CheckpointError("template: expected phi3 or phi4 for image tokens, found qwen")
            return None
        told: dict[str, int] = {}
        if self.vq is not None:
            told["model.yaml: n_embed"] = self.vq.codes
        for plugin in self._plugins.values():
            for key, rows in plugin.rows().items():
                told[f"{label(plugin.entry(key).path)}: {key}"] = rows - self._tokenizer_size - MARKERS
        if asked is not None:
            told["codes"] = asked
        if not told:
            return None
        first, count = next(iter(told.items()))
        for place, codes in told.items():
            if not 1 <= codes <= MAX_CODES:
                raise CheckpointError(
                    f"{place}: expected 1 to {MAX_CODES} codes after {self._tokenizer_size} tokens, found {codes}"
                )
            if codes != count:
                raise CheckpointError(f"{place}: expected {count} codes (as {first}), found {codes}")
        return SpecialTokens(self._tokenizer_size, count)
