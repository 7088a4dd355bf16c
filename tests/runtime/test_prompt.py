"""Prompts, token ids and text against what the original HealthGPT printed, and the limits of the runtime's side."""

import json
import os
import random
import re
import time
from pathlib import Path

import pytest

from healthgpt_edge.errors import BundleError, GenerationError, PromptError
from healthgpt_edge.export.tokenizer import write_tokenizer
from healthgpt_edge.prompt import (
    IMAGE,
    MAX_QUESTION_CHARACTERS,
    TEMPLATES,
    Options,
    Tokenizer,
    prompt_ids,
)

GOLDEN = Path(__file__).parents[1] / "golden"
BASES = {"m3": "m3/Phi-3-mini-4k-instruct", "phi4": "phi4/phi-4", "qwen": "qwen/Qwen2.5-32B-Instruct"}
TEMPLATE_OF = {"m3": "phi3", "phi4": "phi4", "qwen": "qwen"}
CODES = 64
CASES = sorted(path.stem for path in (GOLDEN / "expected").glob("*.json"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """tokenizer.json and options by variant, as a bundle holds them."""
    folder = tmp_path_factory.mktemp("tokenizers")
    written = {}
    for variant, base in BASES.items():
        text, options = write_tokenizer(GOLDEN / "checkpoints" / base, None if variant == "qwen" else CODES)
        path = folder / f"{variant}.json"
        path.write_text(text)
        written[variant] = path, json.loads(json.dumps(options))
    return written


@pytest.fixture(scope="module")
def tokenizers(files):
    return {variant: Tokenizer.load(path, options) for variant, (path, options) in files.items()}


def expected(case):
    record = json.loads((GOLDEN / "expected" / f"{case}.json").read_text())
    argv = record["argv"]
    question = argv[argv.index("--question") + 1]
    return record, (TEMPLATE_OF[record["variant"]], question, "--img_path" in argv, record["task"] == "gen")


def test_all_golden_cases_are_here():
    assert len(CASES) == 7


@pytest.mark.parametrize("case", CASES)
def test_prompt_equals_the_original(tokenizers, case):
    record, arguments = expected(case)
    assert prompt_ids(tokenizers[record["variant"]], *arguments) == record["input_ids"]


@pytest.mark.parametrize("case", [case for case in CASES if "com" in case])
def test_text_equals_the_original(tokenizers, case):
    record, (template, *_) = expected(case)
    printed = record["stdout"].split("HealthGPT: ", 1)[1].removesuffix("\n")
    text = tokenizers[record["variant"]].decode(record["output_ids"], skip_special=True)
    assert (text[:-8] if template == "phi3" else text) == printed


@pytest.mark.parametrize("variant", BASES)
def test_answers_leave_special_tokens_out(tokenizers, variant):
    """All three scripts of the original print them so, image tokens in words included."""
    tokenizer = tokenizers[variant]
    words = tokenizer.encode("in the image")
    assert tokenizer.decode([*words, *sorted(tokenizer.special), *words], skip_special=True) == tokenizer.decode(
        words + words
    )


def test_codes_equal_the_original(tokenizers):
    record, _ = expected("m3_gen_wide")
    text = tokenizers["m3"].decode(record["output_ids"])[:-8]
    assert [int(number) for number in re.findall(r"\d+", text)] == record["vq_indices"]


@pytest.mark.parametrize("variant", BASES)
def test_image_typed_by_the_user_is_text(tokenizers, variant):
    tokenizer, template = tokenizers[variant], TEMPLATE_OF[variant]
    ids = prompt_ids(tokenizer, template, "Is <image> a word?\n<image>", True, False)
    assert ids.count(IMAGE) == 1
    after = ids[ids.index(IMAGE) + 1 :]
    assert after == tokenizer.encode("\nIs <image> a word?\n<image>" + TEMPLATES[template].tail)
    assert IMAGE not in prompt_ids(tokenizer, template, "<image>", False, False)


def test_image_typed_by_the_user_has_known_ids(tokenizers):
    ids = tokenizers["m3"].encode("<image>")
    assert [tokenizers["m3"].text_of(i) for i in ids] == ["▁", "<0x3C>", "i", "mage", "<0x3E>"]


def test_added_tokens_typed_by_the_user_are_tokens(tokenizers):
    first = tokenizers["m3"].added_id("<idx_0>")
    ids = prompt_ids(tokenizers["m3"], "phi3", "what is <idx_7>?", False, False)
    assert ids.count(first + 7) == 1


def test_generation_opens_with_the_start_token(tokenizers):
    for variant in ("m3", "phi4"):
        ids = prompt_ids(tokenizers[variant], TEMPLATE_OF[variant], "Reconstruct.", True, True)
        assert ids[-1] == tokenizers[variant].added_id("<start_index>")
    with pytest.raises(PromptError, match="needs the token <start_index>, which this model's tokenizer has not"):
        prompt_ids(tokenizers["qwen"], "qwen", "Reconstruct.", True, True)


def test_bos_stands_once_at_the_very_beginning(files):
    path, options = files["m3"]
    with_bos = Tokenizer.load(path, options | {"begin": [1]})
    without = Tokenizer.load(path, options)
    assert prompt_ids(with_bos, "phi3", "Why?", True, False) == [1, *prompt_ids(without, "phi3", "Why?", True, False)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("phi5", "Why?"), "the template must be one of phi3, phi4, qwen, got 'phi5'"),
        (("phi3", ""), "the question must hold words, got none"),
        (("phi3", " \n\t"), "the question must hold words, got none"),
        (("phi3", None), "the question must be text, got NoneType"),
        (("phi3", b"Why?"), "the question must be text, got bytes"),
        (("phi3", "secret \ud83d"), "text must be valid Unicode, got half a surrogate pair at "),
        (
            ("phi3", "a" * (MAX_QUESTION_CHARACTERS + 1)),
            f"the question must have at most {MAX_QUESTION_CHARACTERS} characters, got {MAX_QUESTION_CHARACTERS + 1}",
        ),
    ],
)
def test_bad_questions(tokenizers, arguments, message):
    with pytest.raises(PromptError) as caught:
        prompt_ids(tokenizers["m3"], *arguments, True, False)
    assert message in str(caught.value)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def some_ids(tokenizer, count):
    """Lists of ids with many bytes that are no character and many added tokens."""
    source = random.Random(7)
    everything, added = sorted(tokenizer.vocabulary().values()), sorted(tokenizer.added)
    for _ in range(count):
        pools = source.choices([everything, added, range(3, 259)], [2, 1, 2], k=source.randint(0, 12))
        yield [source.choice(pool) for pool in pools]


@pytest.mark.parametrize("variant", BASES)
def test_streamed_pieces_add_up_and_hold_whole_characters(tokenizers, variant):
    tokenizer = tokenizers[variant]
    for ids in some_ids(tokenizer, 300):
        streamer = tokenizer.streamer()
        pieces = [*map(streamer.push, ids), streamer.end()]
        assert "".join(pieces) == tokenizer.decode(ids)
        assert streamer.end() == ""


def test_a_character_waits_for_its_last_byte(tokenizers):
    for tokenizer in tokenizers.values():
        streamer = tokenizer.streamer()
        pieces = [streamer.push(i) for i in tokenizer.encode("x🫁")]
        assert pieces[-4:] == ["", "", "", "🫁"]
        assert streamer.end() == ""


def test_an_incomplete_character_ends_as_replacement(tokenizers):
    for variant, replacement in (("m3", "\ufffd" * 3), ("phi4", "\ufffd"), ("qwen", "\ufffd")):
        tokenizer = tokenizers[variant]
        streamer = tokenizer.streamer()
        pieces = [streamer.push(i) for i in tokenizer.encode("x🫁")[:-1]]
        assert "".join(pieces) == "x"
        assert streamer.end() == replacement


@pytest.mark.parametrize("token_id", [-200, 478, 10**9])
def test_an_id_without_a_token(tokenizers, token_id):
    with pytest.raises(GenerationError, match=f"the model gave id {token_id}, for which its tokenizer has no token"):
        tokenizers["m3"].decode([5, token_id])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": "wordpiece"}, "tokenizer option scheme must be one of ('metaspace', 'byte_level'), found 'wordp"),
        ({"prefix": "x"}, "tokenizer option prefix must be one of ('▁', ''), found 'x'"),
        ({"normal_form": "NFKC"}, "tokenizer option normal_form must be one of ('NFC', ''), found 'NFKC'"),
        ({"separator": None}, "tokenizer option separator must be one of (' ', ''), found None"),
        ({"begin": 1}, "tokenizer option begin must be a list of ids, found 1"),
        ({"inline": ["0"]}, "tokenizer option inline must be a list of ids, found ['0']"),
        ({"extra": 1}, "tokenizer options must be ['begin', 'inline', 'normal_form', 'prefix', 'scheme', 'separator']"),
    ],
)
def test_bad_options(files, change, message):
    path, options = files["m3"]
    with pytest.raises(BundleError) as caught:
        Tokenizer.load(path, options | change)
    assert message in str(caught.value)


def test_an_added_token_without_text(files, tmp_path):
    path, options = files["m3"]
    document = json.loads(path.read_bytes())
    document["added_tokens"][0]["content"] = ""
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"tokenizer\.json must be a tokenizer, found ValueError"):
        Tokenizer.load(tmp_path / "tokenizer.json", options)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_file(files, tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json must be a tokenizer, found "):
        Tokenizer.load(path, files["m3"][1])
    with pytest.raises(BundleError, match=r"absent\.json must be a tokenizer, found "):
        Tokenizer.load(tmp_path / "absent.json", files["m3"][1])


def test_of_added_tokens_that_begin_alike_the_longest_is_meant(files, tmp_path):
    path, options = files["m3"]
    document = json.loads(path.read_bytes())
    short = document["added_tokens"][-1]
    document["added_tokens"].append(short | {"id": short["id"] + 1, "content": short["content"] + "+"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json", options)
    assert tokenizer.encode(f"a{short['content']}+{short['content']}")[-2:] == [short["id"] + 1, short["id"]]


def test_a_tokenizer_may_lie_where_no_unicode_leads(files, tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    path = folder / "tokenizer.json"
    path.write_bytes(files["m3"][0].read_bytes())
    assert Tokenizer.load(path, files["m3"][1]).encode("a") == Tokenizer.load(*files["m3"]).encode("a")


def test_options_survive_the_manifest(files):
    for _, options in files.values():
        assert Options.parse(json.loads(json.dumps(options))) == Options.parse(options)


@pytest.mark.parametrize("text", ["a" * 10_000, " " * 10_000, "胸" * 10_000, "<|en" * 2_500, "e" + "\u0301" * 9_999])
def test_long_words_are_quick(tokenizers, text):
    """0.02 s each where measured; merging in quadratic time needs a minute."""
    for tokenizer in tokenizers.values():
        begin = time.perf_counter()
        ids = tokenizer.encode(text)
        assert time.perf_counter() - begin < 5
        assert tokenizer.decode(ids) in (text, "é" + text[2:])
