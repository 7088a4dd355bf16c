"""From a question to token ids and from ids back to text, equal to the slow tokenizers of transformers.

`tokenizers` supplies the merges and the vocabulary; what the slow classes do around them (added tokens with the white
space that they swallow, the SentencePiece prefix of a chunk, the spaces of decoding) is here, driven by the `options`
that the exporter stores in the bundle. Nothing in it names a model.
"""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from .errors import BundleError, GenerationError, PromptError

# Stands for the picture among the ids of a prompt.
IMAGE = -200
START_TEXT = "<start_index>"
# More than the longest context of the released models (32,768 positions) holds of ordinary text.
MAX_QUESTION_CHARACTERS = 131_072
SPACE_SYMBOL = "▁"


@dataclass(frozen=True, slots=True)
class Template:
    """The text before and after the user's words; a picture stands between `head` and the words."""

    head: str
    tail: str


TEMPLATES = {
    "phi3": Template(
        "<|system|>\nYou are a helpful AI assistant.<|end|>\n<|user|>\n",
        "<|end|>\n<|assistant|>\n",
    ),
    "phi4": Template(
        "<|im_start|>system<|im_sep|>\n"
        "You are a medieval knight and must provide explanations to modern people.<|im_end|>\n"
        "<|im_start|>user<|im_sep|>\n",
        "<|im_end|>\n<|im_start|>assistant<|im_sep|>\n",
    ),
    "qwen": Template(
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
}


def prompt_ids(tokenizer: Tokenizer, template: str, question: str, image: bool, generation: bool) -> list[int]:
    """The prompt's token ids, the picture as one IMAGE.

    Text is tokenized chunk by chunk around the template's own picture; `<image>` typed by the user is plain text.
    Raises PromptError: unknown template, no words or too many, invalid Unicode, generation without its start token.
    """
    if generation and tokenizer.added_id(START_TEXT) is None:
        raise PromptError(f"making a picture needs the token {START_TEXT}, which this model's tokenizer has not")
    ids = list(tokenizer.options.begin)
    for position, chunk in enumerate(_chunks(template, question, image, generation)):
        ids += [IMAGE] * (position > 0) + tokenizer.encode(chunk)
    return ids


def with_patches(ids: Iterable[int], vocab: int, patches: int) -> NDArray[np.int64]:
    """A prompt's ids as the language graph takes them, [S]: the picture as its patches, which follow the vocabulary.

    Raises BundleError for an id that is not in the vocabulary.
    """
    spliced: list[int] = []
    for token_id in ids:
        if token_id != IMAGE and not 0 <= token_id < vocab:
            raise BundleError(f"the tokenizer must give ids below {vocab}, found {token_id}")
        spliced += range(vocab, vocab + patches) if token_id == IMAGE else (token_id,)
    return np.array(spliced, np.int64)


def _chunks(template: str, question: str, image: bool, generation: bool) -> list[str]:
    """The prompt's text before and after the picture; one chunk where there is none."""
    if template not in TEMPLATES:
        raise PromptError(f"the template must be one of {', '.join(TEMPLATES)}, got {template!r:.40}")
    if not isinstance(question, str):
        raise PromptError(f"the question must be text, got {type(question).__name__}")
    if len(question) > MAX_QUESTION_CHARACTERS:
        raise PromptError(f"the question must have at most {MAX_QUESTION_CHARACTERS} characters, got {len(question)}")
    if not question.strip():
        raise PromptError("the question must hold words, got none")
    parts = TEMPLATES[template]
    tail = question + parts.tail + (START_TEXT if generation else "")
    return [parts.head, "\n" + tail] if image else [parts.head + tail]


@dataclass(frozen=True, slots=True)
class Options:
    """What tokenizer.json cannot say; the keys of the manifest's tokenizer options.

    scheme: "metaspace" (SentencePiece: a space is ▁, an unknown character is bytes) or "byte_level" (GPT-2).
    prefix: put before every chunk that holds anything. normal_form: Unicode form of a chunk, "NFC" or "" for none.
    begin: ids that open a prompt, once. separator: stands between added tokens and text when ids are decoded, except
    around the ids of `inline`, which decode as part of the running text.
    """

    scheme: str
    prefix: str
    normal_form: str
    begin: tuple[int, ...]
    separator: str
    inline: frozenset[int]

    @classmethod
    def parse(cls, options: dict[str, Any]) -> Options:
        """Check the options of a manifest; raises BundleError."""
        keys = set(cls.__slots__)
        if set(options) != keys:
            raise BundleError(f"tokenizer options must be {sorted(keys)}, found {sorted(options)!r:.200}")
        allowed = {
            "scheme": ("metaspace", "byte_level"),
            "prefix": (SPACE_SYMBOL, ""),
            "normal_form": ("NFC", ""),
            "separator": (" ", ""),
        }
        for key, values in allowed.items():
            if options[key] not in values:
                raise BundleError(f"tokenizer option {key} must be one of {values}, found {options[key]!r:.40}")
        for key in ("begin", "inline"):
            if not isinstance(options[key], list) or any(type(item) is not int for item in options[key]):
                raise BundleError(f"tokenizer option {key} must be a list of ids, found {options[key]!r:.40}")
        return cls(**{**options, "begin": tuple(options["begin"]), "inline": frozenset(options["inline"])})


class Tokenizer:
    """Text to ids and back: `model` for what stands between the `added` tokens, by their ids. Made by `load`."""

    def __init__(self, model: tokenizers.Tokenizer, added: dict[int, tokenizers.AddedToken], options: Options) -> None:
        self.options = options
        self.model, self.added = model, added
        # The ids of transformers' all_special_tokens: what its skip_special_tokens leaves out.
        self.special = frozenset(token_id for token_id, token in self.added.items() if token.special)
        self._added_ids: dict[str, int] = {token.content: token_id for token_id, token in self.added.items()}
        self._added_lengths = sorted({len(content) for content in self._added_ids}, reverse=True)
        self._added_starts = re.compile("|".join(re.escape(c) for c in {c[0] for c in self._added_ids}) or r"(?!)")
        self._space_id = model.token_to_id(SPACE_SYMBOL) if options.scheme == "metaspace" else None

    @classmethod
    def load(cls, path: str | Path, options: dict[str, Any]) -> Tokenizer:
        """Read `path`, a tokenizer.json of the exporter, with the options of its manifest; raises BundleError."""
        parsed = Options.parse(options)
        try:
            # By its text: the library takes no path that is not Unicode, as any is in the C locale. And without the
            # added tokens, M3's 8209, over which it takes two thirds of its time: text is cut at them here.
            document = json.loads(Path(path).read_bytes())
            added = {entry["id"]: _added_token(entry) for entry in document["added_tokens"]}
            model = tokenizers.Tokenizer.from_str(json.dumps(document | {"added_tokens": []}))
        except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
            raise BundleError(f"{Path(path).name} must be a tokenizer, found {type(error).__name__}") from error
        return cls(model, added, parsed)

    def vocabulary(self) -> dict[str, int]:
        """The ids of all tokens, by what they are called in the file."""
        return {**self.model.get_vocab(), **self._added_ids}

    def text_of(self, token_id: int) -> str | None:
        """What a token is called in the file; None where there is none."""
        if token_id in self.added:
            return str(self.added[token_id].content)
        return self.model.id_to_token(token_id) if token_id >= 0 else None

    def added_id(self, text: str) -> int | None:
        """The id of the added token that reads `text`, or None."""
        return self._added_ids.get(text)

    def encode(self, chunk: str) -> list[int]:
        """The ids of one chunk of a prompt, without the ids that open a prompt; raises PromptError.

        Added tokens typed in the text become their ids, as in the original.
        """
        try:
            chunk.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"text must be valid Unicode, got half a surrogate pair at {error.start}") from error
        if self.options.normal_form == "NFC":
            chunk = unicodedata.normalize("NFC", chunk)
        if self.options.scheme == "metaspace":
            chunk = chunk.replace(SPACE_SYMBOL, " ")
        ids: list[int] = []
        for part in self._split(self.options.prefix + chunk) if chunk else ():
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self.model.encode(part, add_special_tokens=False).ids
        # A lone prefix before a special token is dropped, but not before the role tokens, which are not "special" to
        # the slow class because no attribute of its configuration names them.
        if len(ids) > 1 and ids[0] == self._space_id and ids[1] in self.special:
            del ids[0]
        return ids

    def _split(self, text: str) -> list[str | int]:
        """`text` cut at its added tokens (as ids), less the white space that those swallow.

        The longest token wins; the exporter has checked that no token can begin inside another. Cut here and not by
        `tokenizers` because the two disagree on what white space is (U+001C to U+001F).
        """
        parts: list[str | int] = []
        begin, strip_left = 0, False
        for match in self._added_starts.finditer(text):
            candidates = (text[match.start() : match.start() + length] for length in self._added_lengths)
            content = next((candidate for candidate in candidates if candidate in self._added_ids), None)
            if content is None:
                continue
            token_id = self._added_ids[content]
            before = text[begin : match.start()]
            before = before.lstrip() if strip_left else before
            before = before.rstrip() if self.added[token_id].lstrip else before
            parts += [before, token_id] if before else [token_id]
            begin, strip_left = match.start() + len(content), self.added[token_id].rstrip
        rest = text[begin:].lstrip() if strip_left else text[begin:]
        return [*parts, rest] if rest else parts

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`, as the slow tokenizer's `decode`; bytes that are not UTF-8 become U+FFFD.

        `skip_special` is transformers' skip_special_tokens. Raises GenerationError for an id without a token.
        """
        streamer = self.streamer(skip_special=skip_special)
        return "".join([*map(streamer.push, ids), streamer.end()])

    def streamer(self, *, skip_special: bool = False) -> Streamer:
        """Decodes ids one by one; the pieces add up to `decode` of all of them."""
        return Streamer(self, skip_special)


def _added_token(entry: dict[str, Any]) -> tokenizers.AddedToken:
    if not entry["content"]:
        raise ValueError("an added token must have text")
    flags = {name: entry[name] for name in ("special", "lstrip", "rstrip")}
    return tokenizers.AddedToken(entry["content"], **flags)


class Streamer:
    """Incremental decoding: holds back the bytes of a character that is not complete yet.

    The slow classes cut the ids at their added tokens into stretches of running text, decode each and join what is
    not empty with the separator; a last stretch is joined even when it is empty.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._options = tokenizer, tokenizer.options
        self._skipped = tokenizer.special if skip_special else frozenset()
        self._metaspace = self._options.scheme == "metaspace"
        errors = _EACH_BYTE if self._metaspace else "replace"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)
        self._anything_before = False
        self._stretch_tokens, self._stretch_has_text, self._after_inline = 0, False, False

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often all of its own; raises GenerationError for an unknown id."""
        token_id = int(token_id)
        piece = self._tokenizer.text_of(token_id)
        if piece is None:
            raise GenerationError(f"the model gave id {token_id}, for which its tokenizer has no token")
        if token_id in self._skipped:
            return ""
        is_added = token_id in self._tokenizer.added
        if is_added and token_id not in self._options.inline:
            text = self._emit(self._utf8.decode(b"", True))
            self._anything_before |= self._stretch_has_text
            text += self._options.separator + piece if self._anything_before else piece
            self._anything_before = True
            self._new_stretch()
            return text
        text = self._inline(piece) if is_added else self._ordinary(piece)
        self._stretch_tokens += 1
        return self._emit(text)

    def end(self) -> str:
        """What is left: an incomplete character as U+FFFD."""
        text = self._emit(self._utf8.decode(b"", True))
        if self._stretch_tokens and not self._stretch_has_text and self._anything_before:
            text += self._options.separator
        self._anything_before = False
        self._new_stretch()
        return text

    def _inline(self, content: str) -> str:
        self._after_inline = True
        return self._utf8.decode(b"", True) + content

    def _ordinary(self, piece: str) -> str:
        if not self._metaspace:
            return self._utf8.decode(bytes(BYTE_OF[character] for character in piece))
        space = ""
        if self._options.prefix:
            if self._stretch_tokens == 0:
                piece = piece.removeprefix(SPACE_SYMBOL)
            elif self._stretch_tokens == 1 and self._after_inline and not piece.startswith(SPACE_SYMBOL):
                space = " "
        self._after_inline = False
        if _BYTE_PIECE.fullmatch(piece):
            return space + self._utf8.decode(bytes([int(piece[3:5], 16)]))
        return space + self._utf8.decode(piece.replace(SPACE_SYMBOL, " ").encode())

    def _emit(self, text: str) -> str:
        """`text` of the running stretch, after the separator where its first characters need one."""
        if text and not self._stretch_has_text:
            self._stretch_has_text = True
            return self._options.separator + text if self._anything_before else text
        return text

    def _new_stretch(self) -> None:
        self._stretch_tokens, self._stretch_has_text, self._after_inline = 0, False, False


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """SentencePiece gives one U+FFFD per bad byte, where Python's own "replace" gives one per broken sequence."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the others follow from U+0100 in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_EACH_BYTE = "healthgpt_edge.replace_each_byte"
codecs.register_error(_EACH_BYTE, _replace_each_byte)
BYTE_OF = _byte_alphabet()
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
