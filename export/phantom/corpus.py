"""The phantom's text: a small SentencePiece vocabulary with Phi-3's special tokens, prompts, written findings.

The tokenizer has the same files as a released Phi-3 base (`tokenizer.model`, `tokenizer_config.json`,
`added_tokens.json`). As in the original, transformers' slow class computes the ids.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import sentencepiece
import transformers

from healthgpt_edge import phantoms
from healthgpt_edge.phantoms import MODALITIES, QUADRANTS
from healthgpt_edge.prompt import IMAGE, TEMPLATES

PIECES = 448
# In the order of the released tokenizer, where they begin at id 32000; here they begin at PIECES.
SPECIAL = (
    "<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>", "<|placeholder4|>",
    "<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>",
)  # fmt: skip
TOKENS = PIECES + len(SPECIAL)
BASE_ROWS = 464  # with padding rows, like the released table
END_OF_TEXT, ASSISTANT, MARKER, END = (
    PIECES + SPECIAL.index(text) for text in ("<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|end|>")
)
BEGIN = 1  # <s>
FIRST_BYTE = 3  # SentencePiece's 256 byte tokens follow <unk>, <s> and </s>

# Ordinary sentences besides the phantoms' own, so that the vocabulary has pieces of common English words.
ENGLISH = (
    "The patient lies on the table while the scanner takes the image slice by slice.",
    "A lesion is a region of tissue that looks brighter or darker than what is around it.",
    "Computed tomography measures how strongly tissue weakens X-rays, so bone is bright.",
    "Magnetic resonance shows fat and fluid well, and the skull stays dark.",
    "Describe the findings in the chest, the liver, the heart and the lungs.",
    "There is no evidence of disease. Please compare with the earlier examination.",
    "What does this picture show? It shows the head of a patient, seen from above.",
    "Generate a high resolution picture from the low resolution one, and repair its noise.",
)


def findings(rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    """Written findings of an invented slice, and the answers to the questions about it."""
    modality = MODALITIES[rng.integers(2)]
    count = int(rng.choice(4, p=phantoms.LESION_COUNT_ODDS))
    places = [QUADRANTS[i] for i in rng.integers(4, size=count)]
    are = "is" if count < 2 else "are"
    seen = f"The image is {modality}. There {are} {phantoms.LESION_WORDS[count]}"
    return seen + "".join(f", {place}" for place in places) + ".", phantoms.right_answers(modality, places)


def training_text() -> list[str]:
    """The lines from which the vocabulary is learnt."""
    rng = np.random.default_rng(0)
    words = [*phantoms.QUESTIONS.values(), *phantoms.INSTRUCTIONS.values(), TEMPLATES["phi3"].head.split("\n")[1][:-7]]
    answers = [*MODALITIES, "Yes", "No", *phantoms.COUNT_WORDS, *QUADRANTS]
    # After a bracket a word has no SentencePiece space mark, just as after the prompt's newlines.
    lines = [f"({line}" for line in [*words, *answers]] * 20 + [*words, *answers] * 20
    return lines + list(ENGLISH) * 4 + [findings(rng)[0] for _ in range(200)]


def write_tokenizer_files(folder: Path) -> None:
    """Train the vocabulary and write the three tokenizer files of the base into `folder`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_text()),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    added = {str(i): _added(text, False, True) for i, text in enumerate(("<unk>", "<s>"))}
    added["2"] = _added("</s>", True, False)
    for index, text in enumerate(SPECIAL):
        added[str(PIECES + index)] = _added(text, text != "<|endoftext|>", True)
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": added,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "legacy": False,
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    ids = {text: PIECES + index for index, text in enumerate(SPECIAL)}
    (folder / "added_tokens.json").write_text(json.dumps(ids, indent=1) + "\n")


def _added(text: str, rstrip: bool, special: bool) -> dict[str, object]:
    return {
        "content": text,
        "lstrip": False,
        "normalized": False,
        "rstrip": rstrip,
        "single_word": False,
        "special": special,
    }


class Words:
    """Token ids of prompts and answers, from the tokenizer in a folder."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = transformers.LlamaTokenizer.from_pretrained(folder)
        if len(self.tokenizer) != TOKENS:
            raise ValueError(f"expected a tokenizer of {TOKENS} tokens, got {len(self.tokenizer)}")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def prompt(self, text: str) -> list[int]:
        """The ids of the phi3 template around `text`, with IMAGE for the picture."""
        return [*self.before_picture(), IMAGE, *self.after_picture(text)]

    def before_picture(self) -> list[int]:
        return self.encode(TEMPLATES["phi3"].head)

    def after_picture(self, text: str) -> list[int]:
        return self.encode(f"\n{text}{TEMPLATES['phi3'].tail}")

    def without_picture(self, text: str) -> list[int]:
        """The ids of the phi3 template around `text`, without a picture."""
        template = TEMPLATES["phi3"]
        return self.encode(template.head + text + template.tail)

    def written(self, context: str, question: str) -> list[int]:
        """The ids of a prompt with the text `context` in place of the picture."""
        template = TEMPLATES["phi3"]
        return [*self.encode(template.head + context), *self.encode(f"\n{question}{template.tail}")]

    def answer(self, text: str) -> list[int]:
        """The ids of an answer with the end token."""
        return [*self.encode(text), END]

    def instructions(self) -> dict[str, list[int]]:
        """The prompts of the generation tasks without `<start_index>`. Raises ValueError if their lengths differ."""
        prompts = {kind: self.prompt(text) for kind, text in phantoms.INSTRUCTIONS.items()}
        lengths = {kind: len(prompt) for kind, prompt in prompts.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"expected instructions of one length in tokens, got {lengths}")
        return prompts
