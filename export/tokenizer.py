"""tokenizer.json and its options from the released files, giving the ids of transformers' slow tokenizers.

SentencePiece merges the adjacent pair whose union has the best score, the leftmost first; a merge table does the same
when it lists every split of every piece, ordered by score. The slow byte-level classes carry their merges in a file.
What would break the equality (another normalizer, user-defined pieces, added tokens that overlap) is refused, and the
result is compared with the slow class itself on probe texts before it is handed out.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import regex
import tokenizers
import transformers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto
from tokenizers import models, normalizers, pre_tokenizers

from healthgpt_edge.errors import CheckpointError
from healthgpt_edge.prompt import BYTE_OF, SPACE_SYMBOL, START_TEXT, Options, Tokenizer

from .checkpoint.fields import Fields
from .checkpoint.files import label, one_line, read_bytes, read_json, read_text
from .checkpoint.vocabulary import token_id_of

# The special tokens of each slow class where its configuration names none.
SLOW_CLASSES = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
}
ATTRIBUTES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# How the byte-level classes cut text into words; the letters and numbers are spelled out by _spelled_out.
PATTERNS = {
    "GPT2Tokenizer": r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "Qwen2Tokenizer": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}]+|[\p{N}]| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
PIECE = sentencepiece_proto.ModelProto.SentencePiece
PROBES = (
    "What is in the image?", " ", "  two  spaces ", "\t\n\r\n \n\n", "\0\x01\x1c\x1f\x7f\x85\xa0", "▁▁ a▁b", "<image>",
    "<0x0A>", "<unk><s></s>", "1234567890 12,345.6", "it's IT'S 'S we'll DON'T 'ſ", "e\u0301 \u1e9b\u0323 Å Å",
    "½²Ⅷ٣", "naïve façade Übergröße", "胸部CT平扫：未见异常。", "الأشعة السينية للصدر", "रेडियोलॉजी", "한국어 의료",
    "ﬁ ﷺ ㎎", "👩🏽\u200d⚕️ 🫁❤️\u200d🔥", "\u200b\u200d\ufeff\u2028", "----------- ====== ...... ///", "a" * 20,
    " " * 40 + "x" + " " * 17, "def f(x):\n    return {'a': [1]}\n", "\U0010ffff\ue000\ufffd",
)  # fmt: skip
RANDOM_PROBES = 200


def write_tokenizer(base_dir: str | Path, codes: int | None) -> tuple[str, dict[str, Any]]:
    """The text of tokenizer.json and the options of healthgpt_edge.prompt.Tokenizer for the base in `base_dir`.

    codes: how many picture codes to add tokens for, or None for a base that gets none. Raises CheckpointError where
    the files are damaged or ask for something whose ids would not be the slow tokenizer's.
    """
    folder = Path(base_dir)
    path = folder / "tokenizer_config.json"
    config = Fields(path, read_json(path))
    slow_class = config.require("tokenizer_class", *SLOW_CLASSES)
    for key in ("clean_up_tokenization_spaces", "add_eos_token", "split_special_tokens"):
        config.require(key, False, default=False)
    build = _metaspace if slow_class == "LlamaTokenizer" else _byte_level
    model, options = build(folder, config, slow_class)
    added = _AddedTokens(config, SLOW_CLASSES[slow_class], model.get_vocab())
    options |= {"begin": added.begin(slow_class), "inline": added.inline()}
    _compare_with_slow(_assemble(config, model, added, options), folder, slow_class)
    if codes is not None:
        added.add_codes(codes)
    return _assemble(config, model, added, options).model.to_str(), options


def _metaspace(folder: Path, config: Fields, _: str) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """LlamaTokenizer without `legacy`: SentencePiece BPE, its own prefix switched off, ours put before each chunk."""
    config.require("legacy", False)
    config.require("sp_model_kwargs", {}, default={})
    prefix = config.require("add_prefix_space", True, False, default=True)
    proto = _read_sentencepiece(folder / "tokenizer.model")
    vocabulary = {piece.piece: token_id for token_id, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == PIECE.NORMAL}
    splits = [
        (-score, -cut, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    # Of equal scores SentencePiece takes the leftmost pair, so that a run of spaces grows from its left end: the
    # longest left part must come first. Merge tables know no other tie.
    merges = [(left, right) for *_, left, right in sorted(splits)]
    model = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    model.normalizer = normalizers.Replace(" ", SPACE_SYMBOL)
    entries = config.section("added_tokens_decoder").values.values()
    added = {entry.get("content") for entry in entries if isinstance(entry, dict)}
    for piece in proto.pieces:
        # Control pieces decode to nothing there unless they are added tokens, which is what we take them for.
        if piece.type in (PIECE.CONTROL, PIECE.UNKNOWN) and piece.piece not in added:
            raise config.error("added_tokens_decoder", f"the control piece {piece.piece}", "none")
    options = {"scheme": "metaspace", "prefix": SPACE_SYMBOL if prefix else "", "normal_form": "", "separator": " "}
    return model, options


def _read_sentencepiece(path: Path) -> Any:
    """The parsed model, with everything refused that a merge table could not reproduce."""
    try:
        proto = sentencepiece_proto.ModelProto.FromString(read_bytes(path))
    except DecodeError as error:
        raise CheckpointError(f"{label(path)}: expected a SentencePiece model, found {one_line(error)}") from error
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    normal = {piece.piece for piece in proto.pieces if piece.type == PIECE.NORMAL}
    byte_pieces = [piece.piece for piece in proto.pieces if piece.type == PIECE.BYTE]
    kinds = {piece.type for piece in proto.pieces}
    ranked = [
        p.score for p in proto.pieces if p.type == PIECE.NORMAL and len(p.piece) > 1 and p.piece.strip(SPACE_SYMBOL)
    ]
    requirements = {
        "byte-pair merges": trainer.model_type == sentencepiece_proto.TrainerSpec.BPE,
        "all 256 byte pieces": sorted(byte_pieces) == [f"<0x{byte:02X}>" for byte in range(256)],
        "byte fallback": trainer.byte_fallback,
        "no normalization": not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces,
        "no denormalization": not proto.denormalizer_spec.precompiled_charsmap,
        "escaped white space": normalizer.escape_whitespaces and not trainer.treat_whitespace_as_suffix,
        "no user-defined pieces": kinds <= {PIECE.NORMAL, PIECE.UNKNOWN, PIECE.CONTROL, PIECE.BYTE},
        "every piece once": len({piece.piece for piece in proto.pieces}) == len(proto.pieces),
        "one score per piece": len(set(ranked)) == len(ranked),
        "every letter of a piece to be a piece": all(letter in normal for piece in normal for letter in piece),
        "spaces only at the start of a piece": not any(SPACE_SYMBOL in p.lstrip(SPACE_SYMBOL) for p in normal),
        "shorter runs of spaces to be pieces": all(p[1:] in normal for p in normal if p.startswith(SPACE_SYMBOL * 2)),
    }
    for expected, holds in requirements.items():
        if not holds:
            raise CheckpointError(f"{label(path)}: expected {expected}, found otherwise")
    return proto


def _byte_level(folder: Path, config: Fields, slow_class: str) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """GPT2Tokenizer and Qwen2Tokenizer: vocab.json, merges.txt, and the class's own way to cut words."""
    config.require("errors", "replace", default="replace")
    config.require("add_prefix_space", False, default=False)
    vocab_path, merges_path = folder / "vocab.json", folder / "merges.txt"
    vocabulary = read_json(vocab_path)
    ids = vocabulary.values()
    # Of every id that is left out the library says so on stdout, where results go.
    if any(type(value) is not int for value in ids) or sorted(ids) != list(range(len(ids))):
        raise CheckpointError(f"{label(vocab_path)}: expected one id per token, from 0 without a gap, found otherwise")
    if not vocabulary.keys() >= BYTE_OF.keys() or not all(BYTE_OF.keys() >= set(token) for token in vocabulary):
        raise CheckpointError(f"{label(vocab_path)}: expected tokens of bytes, each byte among them, found otherwise")
    lines = read_text(merges_path).split("\n")
    if slow_class == "GPT2Tokenizer":
        # The slow class takes the first line for a header and the last for what follows the final newline, always.
        lines = lines[1:-1]
    elif lines[0].startswith("#version:"):
        lines = lines[1:]
    # A pair that comes twice has its last rank, and a blank line none.
    ranks = {tuple(line.split()): rank for rank, line in enumerate(lines) if line.strip()}
    merges = sorted(ranks, key=ranks.__getitem__)
    wrong = next((pair for pair in merges if len(pair) != 2), None)
    if wrong is not None:
        raise CheckpointError(f"{label(merges_path)}: expected two tokens a line, found {' '.join(wrong)!r:.80}")
    try:
        model = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the library raises bare Exception, here for a merge whose token is not in vocab.json
        raise CheckpointError(
            f"{label(merges_path)}: expected merges of vocab.json, found {one_line(error)}"
        ) from error
    words = pre_tokenizers.Split(tokenizers.Regex(_spelled_out(PATTERNS[slow_class])), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    is_qwen = slow_class == "Qwen2Tokenizer"
    options = {"scheme": "byte_level", "prefix": "", "normal_form": "NFC" if is_qwen else ""}
    return model, options | {"separator": "" if is_qwen else " "}


def _spelled_out(pattern: str) -> str:
    """`pattern` with the letters and numbers of Python's regex, which the slow classes use, as explicit ranges.

    The Unicode tables inside `tokenizers` are of another age: they disagree on 17,000 characters.
    """
    every = "".join(chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF)
    for name in (r"\p{L}", r"\p{N}"):
        runs = (match.group() for match in regex.finditer(f"{name}+", every))
        pattern = pattern.replace(name, "".join(rf"\x{{{ord(run[0]):x}}}-\x{{{ord(run[-1]):x}}}" for run in runs))
    return pattern


class _AddedTokens:
    """The entries of tokenizer.json's added_tokens; `special` there means transformers' all_special_tokens."""

    def __init__(self, config: Fields, defaults: dict[str, str], vocabulary: dict[str, int]) -> None:
        self._config, self._vocabulary = config, vocabulary
        values = {name: config.values.get(name, defaults.get(name)) for name in ATTRIBUTES}
        self._attributes = {name: _content(value) for name, value in values.items() if value is not None}
        additional = config.values.get("additional_special_tokens") or []
        if not isinstance(additional, list):
            raise config.error("additional_special_tokens", "a list of tokens", additional)
        self._additional = {_content(value) for value in additional}
        special = self._additional | set(self._attributes.values())
        decoder = config.section("added_tokens_decoder")
        keys = sorted(decoder.values, key=lambda key: token_id_of(decoder, key))
        self.entries = [_entry(decoder, key, special) for key in keys]
        self.ids = {entry["content"]: entry["id"] for entry in self.entries}
        missing = sorted(special - self.ids.keys())
        if missing:
            raise config.error("added_tokens_decoder", f"the special token {missing[0]}", "none")

    def begin(self, slow_class: str) -> list[int]:
        """The ids that open a prompt: Llama's class adds its BOS by default, GPT-2's on request, Qwen's never."""
        if slow_class == "Qwen2Tokenizer":
            return []
        wanted = self._config.require("add_bos_token", True, False, default=slow_class == "LlamaTokenizer")
        if wanted and "bos_token" not in self._attributes:
            raise self._config.error("bos_token", "a token, since add_bos_token is set", None)
        return [self.ids[self._attributes["bos_token"]]] if wanted else []

    def inline(self) -> list[int]:
        """The ids that decode as running text: special, and no additional token after the vocabulary."""
        return [
            entry["id"]
            for entry in self.entries
            if entry["special"] and not (entry["content"] in self._additional and entry["id"] >= len(self._vocabulary))
        ]

    def add_codes(self, codes: int) -> None:
        """The tokens of HealthGPT after all others; the original adds none to a base with additional tokens."""
        if self._additional:
            found = f"{len(self._additional)} of them"
            raise self._config.error("additional_special_tokens", "none in a base that gets picture codes", found)
        first = len(self._vocabulary.keys() | self.ids.keys())
        texts = [START_TEXT, *(f"<idx_{code}>" for code in range(codes)), "<end_index>", "<pixel_newline>"]
        taken = next((text for text in texts if text in self._vocabulary or text in self.ids), None)
        if taken is not None:
            raise self._config.error("added_tokens_decoder", f"no token {taken} in a base", taken)
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        self.entries += [{"id": first + i, "content": text, **flags} for i, text in enumerate(texts)]
        self.ids |= {entry["content"]: entry["id"] for entry in self.entries}


def _content(token: Any) -> str:
    """The text of a special token, which a configuration gives bare or inside an object."""
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def _entry(decoder: Fields, key: str, special: set[str]) -> dict[str, Any]:
    """One entry of added_tokens from one of added_tokens_decoder."""
    token = decoder.section(key)
    content = token.values.get("content")
    if not isinstance(content, str) or not content or content != content.strip() or not _is_unicode(content):
        raise token.error("content", "text without white space around it", content)
    token.require("single_word", False, default=False)
    strips = {side: token.require(side, True, False, default=False) for side in ("lstrip", "rstrip")}
    flags = {"single_word": False, **strips, "normalized": False, "special": content in special}
    return {"id": int(key), "content": content, **flags}


def _is_unicode(text: str) -> bool:
    """Whether it is free of lone surrogates, which JSON can spell and no tokenizer takes."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _assemble(config: Fields, model: tokenizers.Tokenizer, added: _AddedTokens, options: dict[str, Any]) -> Tokenizer:
    """The runtime's tokenizer with the added tokens, each under its own id."""
    starts = {content[0] for content in added.ids}
    overlapping = next((content for content in added.ids if starts & set(content[1:])), None)
    if overlapping is not None:
        raise config.error("added_tokens_decoder", "tokens that cannot begin inside another", overlapping)
    document = json.loads(model.to_str()) | {"added_tokens": added.entries}
    whole = tokenizers.Tokenizer.from_str(json.dumps(document))
    tokenizer = Tokenizer(whole, whole.get_added_tokens_decoder(), Options.parse(options))
    for content, token_id in added.ids.items():
        # The library numbers new tokens itself, in order: a gap or a repeated id shows here.
        if tokenizer.added_id(content) != token_id or tokenizer.model.token_to_id(content) != token_id:
            raise config.error("added_tokens_decoder", f"{content} to follow without a gap", token_id)
    return tokenizer


def _compare_with_slow(tokenizer: Tokenizer, folder: Path, slow_class: str) -> None:
    """Encode and decode the probes with both; the merge tables of a release are not seen by the tests here."""
    try:
        slow = getattr(transformers, slow_class).from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever transformers makes of settings that we do not read
        raise CheckpointError(f"{label(folder)}: expected {slow_class} to load, found {one_line(error)}") from error
    source = random.Random(0)
    vocabulary = tokenizer.vocabulary()
    pieces, all_ids = [*sorted(vocabulary), *PROBES], sorted(vocabulary.values())
    mixed = ("".join(source.choices(pieces, k=source.randint(1, 12))) for _ in range(RANDOM_PROBES))
    for number, text in enumerate((*PROBES, *mixed)):
        ids = tokenizer.encode(text)
        if ids != slow.encode(text, add_special_tokens=False):
            raise CheckpointError(f"{label(folder)}: expected the ids of {slow_class} for probe {number}, found others")
        some = ids + source.choices(all_ids, k=8)
        if tokenizer.decode(some) != slow.decode(some):
            raise CheckpointError(f"{label(folder)}: expected {slow_class}'s text for probe {number}, found another")
