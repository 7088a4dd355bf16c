"""write_tokenizer against the slow tokenizers of transformers, and the files that it refuses."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import transformers
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto

from healthgpt_edge.errors import CheckpointError
from healthgpt_edge.export import tokenizer as module
from healthgpt_edge.export.checkpoint.vocabulary import tokenizer_size
from healthgpt_edge.export.tokenizer import PROBES, write_tokenizer
from healthgpt_edge.prompt import Tokenizer

TESTS = Path(__file__).parents[1]
CHECKPOINTS = TESTS / "golden" / "checkpoints"
# Base directory and picture codes by name; phi3 is the real vocabulary of Phi-3-mini-4k.
BASES = {
    "phi3": (TESTS / "data" / "phi3-tokenizer", 64),
    "m3": (CHECKPOINTS / "m3/Phi-3-mini-4k-instruct", 64),
    "phi4": (CHECKPOINTS / "phi4/phi-4", 64),
    "qwen": (CHECKPOINTS / "qwen/Qwen2.5-32B-Instruct", None),
}
SEED = 20
RANDOM_TEXTS = 150

ODD = [
    *PROBES,
    "",
    "▁",
    "▁▁",
    " ▁ ",
    "<start_index>",
    "<start_index>hello",
    " <start_index> hello",
    "<s>hello",
    "▁<s>",
    "<unk>",
    "<unk> x",
    "</s> x",
    "<|end|>",
    " <|end|> ",
    "<|end|>\n\n\t x",
    "<|end|>\x1c\x1f x",
    "<|end|>\u200b x",
    "<|end|>▁x",
    "x \x1d<|im_end|>\x1e y",
    "x\u3000<|im_end|>\xa0y",
    "<|im_end|>\u0338",
    "<|im_start|>\u0301<|im_end|>",
    "<|end|><|end|>",
    "<|end|> <|user|>",
    "<|end|",
    "<|<|end|>",
    "<|endoftext|><|endoftext|>",
    "<|ENDOFTEXT|>",
    "<idx_1><idx_63><idx_64>",
    "<idx_1 >",
    "<tool_call></tool_call>",
    "<image>\n<image>",
    "<0xE2><0x82>",
    "▁<0x0A>",
    "e\u0301e\u0301",
    "\u1112\u1161\u11ab",
    "\u212b\u2126",
    "ſ's 'ſ 'S 'Re 'LL",
    "a'b'c'd'm't",
    "1234567 1,234 ١٢٣ ½ ²",
    "\u0558\ua7ce\U00012550\U00011de0",  # letters and numbers that the tables inside `tokenizers` do not know
    "a \r\n b\r\r\n\n c  \n",
    "x" * 3000,
    " " * 500,
    "=" * 333 + " " + "-" * 95,
    "erereroror",
]


@pytest.fixture(scope="module", params=BASES)
def pair(request, tmp_path_factory):
    """The runtime's tokenizer, and the slow one after what the original does to it."""
    folder, codes = BASES[request.param]
    text, options = write_tokenizer(folder, codes)
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    path.write_text(text)
    slow = transformers.AutoTokenizer.from_pretrained(folder, use_fast=False, padding_side="right")
    if codes is not None:
        tokens = ["<start_index>", *(f"<idx_{i}>" for i in range(codes)), "<end_index>", "<pixel_newline>"]
        slow.add_special_tokens({"additional_special_tokens": tokens})
    return Tokenizer.load(path, json.loads(json.dumps(options))), slow


def random_text(source, pieces, added):
    """Pieces of the vocabulary, any Unicode, white space, and added tokens whole and broken."""
    space = " \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u2003\u2028\u3000\u200b▁"
    makers = [
        lambda: source.choice(pieces),
        lambda: source.choice(pieces) * source.randint(2, 20),
        lambda: "".join(source.choices(space, k=source.randint(1, 5))),
        lambda: source.choice(added),
        lambda: source.choice(added)[: -source.randint(1, 2)],
        lambda: chr(
            source.choice([source.randrange(0x800), source.randrange(0xD800), source.randrange(0xE000, 0x110000)])
        ),
        lambda: "".join(source.choices("abcdefgh'STRE 019\n!é\u0301", k=source.randint(1, 12))),
    ]
    return "".join(source.choice(makers)() for _ in range(source.randint(1, 10)))


def texts(slow):
    source = random.Random(SEED)
    vocabulary = sorted(slow.get_vocab())
    pieces = [piece.replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n") for piece in vocabulary]
    added = sorted(slow.added_tokens_encoder)
    return ODD + [random_text(source, pieces, added) for _ in range(RANDOM_TEXTS)]


def test_ids_equal_the_slow_tokenizer(pair):
    fast, slow = pair
    print("seed", SEED)
    for text in texts(slow):
        assert fast.encode(text) == slow.encode(text, add_special_tokens=False), repr(text)


def test_text_equals_the_slow_tokenizer(pair):
    fast, slow = pair
    print("seed", SEED)
    source = random.Random(SEED)
    added, everything = sorted(slow.added_tokens_decoder), range(len(slow))
    lists = [fast.encode(text) for text in ODD]
    # A stretch without text is joined only at the end; a space alone is such a stretch for SentencePiece.
    space, letter = slow.convert_tokens_to_ids(["▁" if "▁" in slow.get_vocab() else "Ġ", "a"])
    for token_id in (added[0], added[2], added[-1]):
        lists += [
            [token_id, space],
            [token_id, space, token_id],
            [space, token_id],
            [token_id, letter],
            [space, letter],
        ]
    for _ in range(RANDOM_TEXTS):
        pools = source.choices([everything, added, range(3, 259)], [2, 1, 1], k=source.randint(0, 12))
        lists.append([source.choice(pool) for pool in pools])
    for ids in lists:
        assert fast.decode(ids) == slow.decode(ids), ids
        assert fast.decode(ids, skip_special=True) == slow.decode(ids, skip_special_tokens=True), ids


@pytest.mark.parametrize("pair", ["phi4", "qwen"], indirect=True)
def test_words_equal_the_slow_tokenizer(pair):
    """The small vocabularies merge too little to show every cut between words."""
    fast, slow = pair
    for text in texts(slow):
        cuts = [text[begin:end] for _, (begin, end) in fast.model.pre_tokenizer.pre_tokenize_str(text)]
        assert cuts == slow.pat.findall(text), repr(text)


def test_every_id_and_token_is_the_same(pair):
    fast, slow = pair
    assert fast.vocabulary() == slow.get_vocab()
    assert fast.special == frozenset(slow.all_special_ids)
    assert list(fast.options.begin) == slow.encode("")


@pytest.mark.parametrize("pair", ["phi3"], indirect=True)
def test_real_phi3_ids(pair):
    """The first new ids of the original, behind the 32011 of its base, and the lone ▁ before a role token."""
    fast, _ = pair
    assert [fast.added_id(text) for text in ("<start_index>", "<idx_0>", "<idx_63>")] == [32011, 32012, 32075]
    assert fast.encode("<|system|>\nYou are") == [29871, 32006, 3492, 526]
    assert fast.encode("\n<image>") == [29871, 13, 29966, 3027, 29958]


def test_new_tokens_follow_the_base_in_order():
    text, options = write_tokenizer(BASES["m3"][0], 8192)
    entries = {entry["content"]: entry["id"] for entry in json.loads(text)["added_tokens"]}
    names = ("<start_index>", "<idx_0>", "<idx_8191>", "<end_index>", "<pixel_newline>")
    assert [entries[name] - 411 for name in names] == [0, 1, 8192, 8193, 8194]
    assert len(json.dumps(options)) < 300


def test_the_last_line_of_merges_is_none_even_without_a_newline_before_it(tmp_path):
    folder = broken(tmp_path, "phi4", lambda config: None)
    merges = folder / "merges.txt"
    merges.write_text(merges.read_text().rstrip("\n"))
    (tmp_path / "tokenizer.json").write_text(write_tokenizer(folder, None)[0])
    last = merges.read_text().rsplit("\n", 1)[1]
    read = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert last.split() not in read and len(read) > 0
    whole = json.loads(write_tokenizer(BASES["phi4"][0], None)[0])["model"]["merges"]
    assert whole == [*read, last.split()]


def test_without_codes_nothing_is_added():
    text, _ = write_tokenizer(BASES["m3"][0], None)
    assert "<start_index>" not in text


def test_bos_is_given_where_the_class_adds_it(tmp_path):
    folder = broken(tmp_path, "m3", lambda config: config.pop("add_bos_token"))
    assert write_tokenizer(folder, None)[1]["begin"] == [1]
    folder = broken(tmp_path, "phi4", lambda config: config.update(add_bos_token=True))
    assert write_tokenizer(folder, None)[1]["begin"] == [331]


def broken(tmp_path, name, change):
    """A copy of a base's tokenizer files with another tokenizer_config.json."""
    folder = tmp_path / name
    folder.mkdir()
    for path in BASES[name][0].iterdir():
        if path.name in ("tokenizer.model", "vocab.json", "merges.txt"):
            shutil.copy(path, folder)
            (folder / path.name).chmod(0o644)
    config = json.loads((BASES[name][0] / "tokenizer_config.json").read_text())
    change(config)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def token(config, content):
    return next(entry for entry in config["added_tokens_decoder"].values() if entry["content"] == content)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "m3",
            lambda c: c.update(tokenizer_class="BertTokenizer"),
            "tokenizer_class: expected 'LlamaTokenizer' or 'GPT",
        ),
        ("m3", lambda c: c.update(legacy=True), "legacy: expected False, found True"),
        ("m3", lambda c: c.pop("legacy"), "legacy: expected a value, found None"),
        ("m3", lambda c: c.update(add_eos_token=True), "add_eos_token: expected False, found True"),
        ("m3", lambda c: c.update(sp_model_kwargs={"nbest_size": -1}), "sp_model_kwargs: expected {}, found {'nbest"),
        (
            "m3",
            lambda c: c.update(unk_token="<none>"),
            "added_tokens_decoder: expected the special token <none>, found",
        ),
        ("m3", lambda c: c["added_tokens_decoder"].pop("2"), "expected the control piece </s>, found 'none'"),
        (
            "m3",
            lambda c: c["added_tokens_decoder"].pop("405"),
            "expected <|system|> to follow without a gap, found 406",
        ),
        ("m3", lambda c: c["added_tokens_decoder"].update(x={}), "added_tokens_decoder.x: expected a token id"),
        ("m3", lambda c: c.pop("added_tokens_decoder"), "added_tokens_decoder: expected an object, found None"),
        ("m3", lambda c: token(c, "<|end|>").update(content=""), "407.content: expected text without white space"),
        (
            "m3",
            lambda c: token(c, "<|end|>").update(content="\ud800"),
            "407.content: expected text without white space",
        ),
        (
            "m3",
            lambda c: token(c, "<|end|>").update(content="<|e<d|>"),
            "expected tokens that cannot begin inside anoth",
        ),
        ("m3", lambda c: token(c, "<|end|>").update(single_word=True), "407.single_word: expected False, found True"),
        ("m3", lambda c: token(c, "<|end|>").update(rstrip=1), "407.rstrip: expected True or False, found 1"),
        ("m3", lambda c: token(c, "<|end|>").update(content="<idx_3>"), "expected no token <idx_3> in a base"),
        (
            "m3",
            lambda c: c.update(additional_special_tokens=["<|end|>"]),
            "expected none in a base that gets picture code",
        ),
        ("m3", lambda c: c.update(additional_special_tokens=7), "additional_special_tokens: expected a list of tokens"),
        ("phi4", lambda c: c.update(clean_up_tokenization_spaces=True), "clean_up_tokenization_spaces: expected False"),
        ("phi4", lambda c: c.update(add_prefix_space=True), "add_prefix_space: expected False, found True"),
        ("phi4", lambda c: c.update(errors="ignore"), "errors: expected 'replace', found 'ignore'"),
        ("phi4", lambda c: c.update(bos_token=None, add_bos_token=True), "bos_token: expected a token, since add_bos"),
        ("phi4", lambda c: c.update(split_special_tokens=True), "split_special_tokens: expected False, found True"),
    ],
)
def test_refused_configurations(tmp_path, name, change, message):
    with pytest.raises(CheckpointError) as caught:
        write_tokenizer(broken(tmp_path, name, change), 64)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{name}/tokenizer_config.json: ")


def edit_normalizer(proto):
    proto.normalizer_spec.remove_extra_whitespaces = True


def edit_model_type(proto):
    proto.trainer_spec.model_type = sentencepiece_proto.TrainerSpec.UNIGRAM


def edit_user_defined(proto):
    proto.pieces[300].type = sentencepiece_proto.ModelProto.SentencePiece.USER_DEFINED


def edit_scores(proto):
    proto.pieces[260].score = proto.pieces[259].score


def edit_inner_space(proto):
    proto.pieces[261].piece = "a▁a"


def edit_repeat(proto):
    proto.pieces[261].piece = proto.pieces[262].piece


def edit_byte(proto):
    proto.pieces[3].piece = "<0xZZ>"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_normalizer, "expected no normalization, found otherwise"),
        (edit_model_type, "expected byte-pair merges, found otherwise"),
        (edit_user_defined, "expected no user-defined pieces, found otherwise"),
        (edit_scores, "expected one score per piece, found otherwise"),
        (edit_inner_space, "expected spaces only at the start of a piece, found otherwise"),
        (edit_repeat, "expected every piece once, found otherwise"),
        (edit_byte, "expected all 256 byte pieces, found otherwise"),
    ],
)
def test_refused_sentencepiece_models(tmp_path, edit, message):
    folder = broken(tmp_path, "m3", lambda config: None)
    path = folder / "tokenizer.model"
    proto = sentencepiece_proto.ModelProto.FromString(path.read_bytes())
    edit(proto)
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(CheckpointError) as caught:
        write_tokenizer(folder, 64)
    assert str(caught.value) == f"m3/tokenizer.model: {message}"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("merges.txt", "#version: 0.2\nh e\nre s t\n", "expected two tokens a line, found 're s t'"),
        ("merges.txt", "#version: 0.2\nQ Q\n", "expected merges of vocab.json, found "),
        ("vocab.json", '{"a": 0}', "expected tokens of bytes, each byte among them, found otherwise"),
        ("vocab.json", '{"a": 0, "b": 0}', "expected one id per token, from 0 without a gap, found otherwise"),
        ("vocab.json", '{"a": 0, "b": 3000000}', "expected one id per token, from 0 without a gap, found otherwise"),
        ("vocab.json", '{"a": "0"}', "expected one id per token, from 0 without a gap, found otherwise"),
        ("vocab.json", '{"a": 0', "expected JSON, found "),
    ],
)
def test_refused_byte_level_files(tmp_path, file, content, message):
    folder = broken(tmp_path, "phi4", lambda config: None)
    (folder / file).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        write_tokenizer(folder, 64)
    assert str(caught.value).startswith(f"phi4/{file}: {message}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "file"),
    [("m3", "tokenizer.model"), ("m3", "tokenizer_config.json"), ("phi4", "vocab.json"), ("phi4", "merges.txt")],
)
def test_missing_and_truncated_files(tmp_path, name, file):
    folder = broken(tmp_path, name, lambda config: None)
    whole = (folder / file).read_bytes()
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=f"{name}/{file}: expected a file, found nothing"):
        write_tokenizer(folder, 64)
    if file != "merges.txt":  # a shorter list of merges is a list of merges
        (folder / file).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match=f"{name}/{file}: expected (JSON|a SentencePiece model)"):
            write_tokenizer(folder, 64)


def test_other_ids_than_the_slow_ones_stop_the_export(monkeypatch):
    monkeypatch.setitem(module.PATTERNS, "GPT2Tokenizer", module.PATTERNS["Qwen2Tokenizer"])
    with pytest.raises(CheckpointError, match=r"phi-4: expected the ids of GPT2Tokenizer for probe \d+, found others"):
        write_tokenizer(BASES["phi4"][0], 64)


def test_other_text_than_the_slow_one_stops_the_export(monkeypatch):
    real = module._byte_level
    monkeypatch.setattr(module, "_byte_level", lambda *a: (real(*a)[0], real(*a)[1] | {"separator": ""}))
    with pytest.raises(CheckpointError, match=r"phi-4: expected GPT2Tokenizer's text for probe \d+, found another"):
        write_tokenizer(BASES["phi4"][0], 64)


def test_a_base_may_lie_under_a_name_that_is_no_text(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff")
    shutil.copytree(BASES["m3"][0], folder)
    assert tokenizer_size(folder) == tokenizer_size(BASES["m3"][0])
    assert write_tokenizer(folder, 64) == write_tokenizer(BASES["m3"][0], 64)
