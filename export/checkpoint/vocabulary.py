"""The size of the base's tokenizer, its prompt template, and the ids of the image tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from healthgpt_edge.errors import CheckpointError

from .fields import Fields
from .files import label, read_bytes, read_json
from .language import MAX_VOCABULARY, Architecture

# HealthGPT adds three tokens besides its codes: start, end, pixel newline.
MARKERS = 3
TEMPLATES: dict[Architecture, tuple[str, ...]] = {"phi3": ("phi3", "phi4"), "qwen2": ("qwen",)}


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The ids of the tokens that HealthGPT adds after those of the base: start, the codes, end, pixel newline."""

    start: int
    codes: int

    @property
    def first_code(self) -> int:
        return self.start + 1

    @property
    def end(self) -> int:
        return self.first_code + self.codes

    @property
    def newline(self) -> int:
        return self.end + 1


def infer_template(base: Path, architecture: Architecture, template: str | None) -> str:
    """The prompt template: `template` if given and allowed, otherwise by the architecture and the tokenizer's class."""
    allowed = TEMPLATES[architecture]
    if template is not None:
        if template not in allowed:
            raise CheckpointError(
                f"{label(base)}: template: expected {' or '.join(allowed)} for {architecture}, found {template!r}"
            )
        return template
    if len(allowed) == 1:
        return allowed[0]
    by_class = {"LlamaTokenizer": "phi3", "GPT2Tokenizer": "phi4"}
    path = base / "tokenizer_config.json"
    return by_class[Fields(path, read_json(path)).require("tokenizer_class", *by_class)]


def tokenizer_size(base: Path) -> int:
    """len() of the slow tokenizer, computed without it: the size of its vocabulary and the added tokens after that."""
    pieces, model = base / "vocab.json", base / "tokenizer.model"
    size = _sentencepiece_size(model) if model.is_file() else len(read_json(pieces))
    added: dict[int, str] = {}
    for path, token_id, content in _added_tokens(base):
        if added.setdefault(token_id, content) != content:
            raise CheckpointError(f"{label(path)}: token {token_id}: expected {added[token_id]!r}, found {content!r}")
    new = sorted(token_id for token_id in added if token_id >= size)
    if new != list(range(size, size + len(new))):
        gap = next(token_id for expected, token_id in enumerate(new, size) if token_id != expected)
        raise CheckpointError(
            f"{label(base)}: added tokens: expected ids without a gap from {size}, found {gap} out of order"
        )
    return size + len(new)


def token_id_of(decoder: Fields, key: str) -> int:
    """The id that a key of added_tokens_decoder names."""
    if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < MAX_VOCABULARY):
        raise decoder.error(key, "a token id", key)
    return int(key)


def _sentencepiece_size(path: Path) -> int:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(read_bytes(path))
    except RuntimeError as error:
        raise CheckpointError(f"{label(path)}: expected a sentencepiece model, found {type(error).__name__}") from error
    return int(processor.get_piece_size())


def _added_tokens(base: Path) -> Iterator[tuple[Path, int, str]]:
    """File, id and text of each added token, from both files that may list them."""
    config = base / "tokenizer_config.json"
    fields = Fields(config, read_json(config))
    if "added_tokens_decoder" in fields.values:
        decoder = fields.section("added_tokens_decoder")
        for key in decoder.values:
            content = decoder.section(key).values.get("content")
            if not isinstance(content, str):
                raise decoder.error(key, "an added token with its content", content)
            yield config, token_id_of(decoder, key), content
    extra = base / "added_tokens.json"
    if extra.is_file():
        fields = Fields(extra, read_json(extra))
        for text in fields.values:
            yield extra, fields.integer(text, 0, MAX_VOCABULARY), text
