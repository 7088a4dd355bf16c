"""Reading released files: what a sound release gives, and the message of every way in which one can be wrong."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import arguments, open_golden
from safetensors.torch import load_file, save_file
from torch.serialization import get_unsafe_globals_in_checkpoint

from healthgpt_edge.errors import CheckpointError
from healthgpt_edge.export.checkpoint import Checkpoint, SpecialTokens
from healthgpt_edge.export.checkpoint.pickles import PickleSource

BASE, VISION, VQGAN = "Phi-3-mini-4k-instruct", "clip-vit-large-patch14-336", "taming_transformers/ckpt"
FIRST, SECOND = f"{BASE}/model-00001-of-00002.safetensors", f"{BASE}/model-00002-of-00002.safetensors"
INDEX = f"{BASE}/model.safetensors.index.json"
COM, GEN = "HealthGPT-M3/com_hlora_weights.bin", "HealthGPT-M3/gen_hlora_weights.bin"
FUSION, CLIP, LAST = "HealthGPT-M3/fusion_layer_weights.bin", f"{VISION}/pytorch_model.bin", f"{VQGAN}/last.ckpt"
PREFIX = "base_model.model.model."
DOWN = f"{PREFIX}layers.1.mlp.down_proj"


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A copy of the golden M3 release, to be damaged."""
    return Path(shutil.copytree(arguments("m3")["base"].parent, tmp_path / "m3"))


def open_release(root: Path, **changes: Any) -> Checkpoint:
    return Checkpoint.open(**(arguments("m3", root) | changes))


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_torch(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change the state dict of a plugin or of CLIP, or the one inside last.ckpt."""
    if path.name == "last.ckpt":
        with Checkpoint.open(**arguments("m3")) as checkpoint:
            content = {"state_dict": {key: checkpoint.vq_tensor(key) for key in checkpoint._vqgan.entries}}
    else:
        content = torch.load(path, weights_only=True)
    edit(content.get("state_dict", content))
    torch.save(content, path)


def edit_shard(path: Path, edit: Callable[[dict[str, Any]], Any], indexed: bool = True) -> None:
    """Change a shard, and the index with it unless the two shall disagree."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    if indexed:
        index = path.with_name("model.safetensors.index.json")
        content = json.loads(index.read_text())
        kept = {key: shard for key, shard in content["weight_map"].items() if shard != path.name}
        content["weight_map"] = kept | dict.fromkeys(tensors, path.name)
        index.write_text(json.dumps(content))


def setting(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """An edit that sets one key; `a.b` goes into the object a."""

    def edit(content: dict[str, Any]) -> None:
        *path, last = key.split("/")
        for name in path:
            content = content[name]
        content[last] = value

    return edit


def without(key: str) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        del content[key]

    return edit


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def as_yaml(root: Path, old: str, new: str) -> None:
    path = root / VQGAN / "model.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def compress(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)


def damage_pickle(path: Path) -> None:
    """Cut the pickle of a torch file short; the archive around it is sound."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries:
            archive.writestr(name, data[: len(data) // 2] if name.endswith("data.pkl") else data)


# --- sound releases -------------------------------------------------------------------------------------------------


def test_m3_is_read_from_its_files():
    with open_golden("m3") as checkpoint:
        language, vision, vq = checkpoint.language, checkpoint.vision, checkpoint.vq
        assert (language.architecture, language.layers, language.hidden, language.head_dim) == ("phi3", 3, 64, 16)
        assert (language.base_vocab, language.vocab, language.sliding_window) == (416, 478, 2047)
        assert (vision.layers, vision.patches) == (5, 16)
        assert (vq.codes, vq.grid, vq.image_size) == (64, 32, 256)
        assert checkpoint.template == "phi3"
        assert checkpoint.tokens == SpecialTokens(411, 64)
        assert (checkpoint.tokens.first_code, checkpoint.tokens.end, checkpoint.tokens.newline) == (412, 476, 477)
        assert checkpoint.generation.eos_ids == (400, 401, 407)
        sizes = {name: (task.rank, task.experts, task.alpha, task.scaling) for name, task in checkpoint.tasks.items()}
        assert sizes == {"comprehension": (8, 4, 16.0, 8.0), "generation": (16, 4, 32.0, 8.0)}
        assert {name: task.vision_layers for name, task in checkpoint.tasks.items()} == {
            "comprehension": 4,
            "generation": 1,
        }


def test_phi4_and_qwen_are_told_apart_by_their_files():
    with open_golden("phi4") as phi4, open_golden("qwen") as qwen:
        assert (phi4.template, phi4.language.kv_heads, phi4.tokens) == ("phi4", 2, SpecialTokens(426, 64))
        assert (qwen.template, qwen.language.architecture, qwen.tokens) == ("qwen", "qwen2", None)
        assert qwen.language.vocab == qwen.language.base_vocab == 384
        assert qwen.generation.repetition_penalty == 1.05
        assert qwen.base_tensor("layers.0.self_attn.q_proj.bias").shape == (64,)


def test_another_template_of_the_architecture_may_be_asked_for():
    with Checkpoint.open(**arguments("m3"), template="phi4") as checkpoint:
        assert checkpoint.template == "phi4"


def test_tensors_come_in_the_files_precision():
    with open_golden("m3") as checkpoint:
        assert checkpoint.base_tensor("norm.weight").dtype == torch.bfloat16
        assert checkpoint.vision_tensor("pre_layrnorm.weight").dtype == torch.float32
        assert checkpoint.vq_tensor("decoder.conv_in.weight").dtype == torch.float32
        assert checkpoint.task_tensor("generation", "mm_projector.0.weight").dtype == torch.float16
        reduce, expand, router = checkpoint.adapter("generation", 2, "mlp.gate_up_proj")
        assert [tuple(part.shape) for part in (reduce, expand, router)] == [(16, 64), (256, 16), (4, 64)]
        assert reduce.dtype == expand.dtype == router.dtype == torch.float32


def test_rows_that_no_plugin_carries_are_the_bases_and_their_mean():
    with open_golden("m3") as checkpoint:
        base = checkpoint.base_tensor("embed_tokens.weight").float()
        rows = checkpoint.task_tensor("comprehension", "embed_tokens.weight")
        assert not checkpoint.task_owns("comprehension", "embed_tokens.weight")
        assert torch.equal(rows[:411], base[:411])
        # 411 to 415 are padding rows of the base: they become the mean too.
        assert torch.equal(rows[411:], base[:411].mean(0, keepdim=True).expand(67, -1))
        assert checkpoint.task_owns("generation", "lm_head.weight")
        assert checkpoint.task_tensor("generation", "lm_head.weight").shape == (478, 64)


def test_the_fusion_file_wins_for_generation_and_comprehension_never_reads_it(release):
    edit_torch(release / FUSION, setting(f"{PREFIX}mm_projector.0.bias", torch.full((64,), 3.0)))
    with open_release(release) as checkpoint, open_golden("m3") as original:
        assert checkpoint.task_tensor("generation", "mm_projector.0.bias").tolist() == [3.0] * 64
        for task, name in (("comprehension", "mm_projector.0.bias"), ("generation", "mm_projector.2.bias")):
            assert torch.equal(checkpoint.task_tensor(task, name), original.task_tensor(task, name))


def test_rows_may_stand_in_the_generation_file(release):
    rows = torch.load(release / FUSION, weights_only=True)
    edit_torch(release / GEN, lambda state: state.update(rows))
    with open_release(release, fusion=None) as checkpoint, open_golden("m3") as original:
        expected = original.task_tensor("generation", "embed_tokens.weight")
        assert torch.equal(checkpoint.task_tensor("generation", "embed_tokens.weight"), expected)


def test_the_number_of_codes_comes_from_a_plugins_rows_where_there_is_no_vqgan(release):
    rows = torch.load(release / FUSION, weights_only=True)
    edit_torch(release / COM, lambda state: state.update(rows))
    with open_release(release, generation=None, fusion=None, vqgan=None) as checkpoint:
        assert checkpoint.tokens == SpecialTokens(411, 64)
        assert checkpoint.vq is None


def test_without_a_number_of_codes_no_token_is_added(release):
    with open_release(release, generation=None, fusion=None, vqgan=None) as checkpoint:
        assert checkpoint.tokens is None
        assert checkpoint.task_tensor("comprehension", "lm_head.weight").shape == (411, 64)


def test_alpha_can_be_given():
    with Checkpoint.open(**arguments("m3"), hlora_alpha=24) as checkpoint:
        assert checkpoint.tasks["comprehension"].scaling == 24 / 8 * 4


def test_clip_may_be_safetensors(release):
    save_file(torch.load(release / CLIP, weights_only=True), release / VISION / "model.safetensors")
    (release / CLIP).unlink()
    with open_release(release) as checkpoint, open_golden("m3") as original:
        assert torch.equal(
            checkpoint.vision_tensor("pre_layrnorm.weight"), original.vision_tensor("pre_layrnorm.weight")
        )


def test_the_base_may_be_one_file_and_tied(release):
    tensors = load_file(release / FIRST) | load_file(release / SECOND)
    del tensors["lm_head.weight"]
    save_file(tensors, release / BASE / "model.safetensors")
    for name in (FIRST, SECOND, INDEX):
        (release / name).unlink()
    edit_json(release / BASE / "config.json", setting("tie_word_embeddings", True))
    with open_release(release, generation=None, fusion=None) as checkpoint:
        head = checkpoint.task_tensor("comprehension", "lm_head.weight")
        assert torch.equal(head, checkpoint.task_tensor("comprehension", "embed_tokens.weight"))


def test_the_training_framework_in_last_ckpt_is_never_imported():
    last = arguments("m3")["vqgan"] / "last.ckpt"
    assert "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint" in get_unsafe_globals_in_checkpoint(str(last))
    with open_golden("m3") as checkpoint:
        checkpoint.vq_tensor("quantize.embed.weight")
    assert not [name for name in sys.modules if name.startswith("pytorch_lightning")]


def test_reading_renews_its_mapping(release, monkeypatch):
    monkeypatch.setattr("healthgpt_edge.export.checkpoint.pickles.RENEW_MAPPING_BYTES", 1)
    with open_release(release) as checkpoint, open_golden("m3") as original:
        first = checkpoint.vision_tensor("pre_layrnorm.weight")
        second = checkpoint.vision_tensor("pre_layrnorm.weight")
        assert torch.equal(first, second)
        assert torch.equal(first, original.vision_tensor("pre_layrnorm.weight"))


# --- damage ---------------------------------------------------------------------------------------------------------


class RunsCode:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


Damage = Callable[[Path], Any]

DAMAGES: dict[str, tuple[Damage, str]] = {
    # the base's tensors
    "base key missing": (
        lambda root: edit_shard(root / SECOND, without("model.norm.weight")),
        "model.safetensors.index.json: expected tensor model.norm.weight [64], found nothing (1 missing in all)",
    ),
    "base key extra": (
        lambda root: edit_shard(root / SECOND, setting("model.layers.3.mlp.down_proj.weight", torch.zeros(64, 128))),
        "model-00002-of-00002.safetensors: expected no tensor model.layers.3.mlp.down_proj.weight, "
        "found float32 [64, 128] (1 extra in all)",
    ),
    "base mis-shaped": (
        lambda root: edit_shard(root / SECOND, setting("model.norm.weight", torch.ones(63))),
        "model-00002-of-00002.safetensors: model.norm.weight: expected shape [64], found [63]",
    ),
    "base of integers": (
        lambda root: edit_shard(root / SECOND, setting("model.norm.weight", torch.ones(64, dtype=torch.int8))),
        "model.norm.weight: expected one of float16, bfloat16, float32, found I8",
    ),
    "index promises more": (
        lambda root: edit_shard(root / SECOND, without("model.norm.weight"), indexed=False),
        "model-00002-of-00002.safetensors: model.norm.weight: the index expects a tensor, the shard has none",
    ),
    "index promises less": (
        lambda root: edit_json(root / INDEX, lambda index: index["weight_map"].pop("model.norm.weight")),
        "model-00002-of-00002.safetensors: model.norm.weight: the index expects none, the shard has a tensor",
    ),
    "index leaves the folder": (
        lambda root: edit_json(root / INDEX, setting("weight_map/lm_head.weight", "../clip/model.safetensors")),
        "lm_head.weight: expected a .safetensors file of this folder, found '../clip/model.safetensors'",
    ),
    "index names an absolute path": (
        lambda root: edit_json(root / INDEX, setting("weight_map/lm_head.weight", "/etc/model.safetensors")),
        "lm_head.weight: expected a .safetensors file of this folder, found '/etc/model.safetensors'",
    ),
    "index without a map": (
        lambda root: (root / INDEX).write_text("{}"),
        "model.safetensors.index.json: expected a weight_map, found NoneType",
    ),
    "shard missing": (
        lambda root: (root / SECOND).unlink(),
        "model-00002-of-00002.safetensors: expected a file, found nothing",
    ),
    "shard truncated": (
        lambda root: truncate(root / SECOND),
        "model-00002-of-00002.safetensors: expected a safetensors file, found SafetensorError",
    ),
    "no weights": (
        lambda root: [(root / name).unlink() for name in (FIRST, SECOND, INDEX)],
        f"{BASE}: expected model.safetensors or model.safetensors.index.json, found neither",
    ),
    # the base's configuration
    "config missing": (
        lambda root: (root / BASE / "config.json").unlink(),
        f"{BASE}/config.json: expected a file, found nothing",
    ),
    "config truncated": (
        lambda root: truncate(root / BASE / "config.json"),
        f"{BASE}/config.json: expected JSON, found JSONDecodeError",
    ),
    "config is a list": (
        lambda root: (root / BASE / "config.json").write_text("[]"),
        f"{BASE}/config.json: expected a JSON object, found list",
    ),
    "config nested without end": (
        lambda root: (root / BASE / "config.json").write_text("[" * 100_000),
        f"{BASE}/config.json: expected JSON, found RecursionError",
    ),
    "config not text": (
        lambda root: (root / BASE / "config.json").write_bytes(b"\xff\xfe"),
        f"{BASE}/config.json: expected readable UTF-8, found UnicodeDecodeError",
    ),
    "long-context rotary": (
        lambda root: edit_json(
            root / BASE / "config.json", setting("rope_scaling", {"type": "longrope", "long_factor": [1.1]})
        ),
        f"{BASE}/config.json: rope_scaling.type: expected 'default', found 'longrope'",
    ),
    "partial rotary": (
        lambda root: edit_json(root / BASE / "config.json", setting("partial_rotary_factor", 0.75)),
        "partial_rotary_factor: expected 1.0 or 1, found 0.75",
    ),
    "other activation": (
        lambda root: edit_json(root / BASE / "config.json", setting("hidden_act", "gelu")),
        "hidden_act: expected 'silu', found 'gelu'",
    ),
    "attention bias": (
        lambda root: edit_json(root / BASE / "config.json", setting("attention_bias", True)),
        "attention_bias: expected False, found True",
    ),
    "quantised base": (
        lambda root: edit_json(root / BASE / "config.json", setting("quantization_config", {"bits": 4})),
        "quantization_config: expected None, found {'bits': 4}",
    ),
    "windowed qwen": (
        lambda root: edit_json(root / BASE / "config.json", setting("use_sliding_window", True)),
        "use_sliding_window: expected False, found True",
    ),
    "other architecture": (
        lambda root: edit_json(root / BASE / "config.json", setting("model_type", "llama")),
        "model_type: expected 'phi3' or 'qwen2', found 'llama'",
    ),
    "absurd width": (
        lambda root: edit_json(root / BASE / "config.json", setting("hidden_size", 10**12)),
        "hidden_size: expected an integer from 1 to 262144, found 1000000000000",
    ),
    "heads that do not divide": (
        lambda root: edit_json(root / BASE / "config.json", setting("num_attention_heads", 5)),
        "num_attention_heads: expected heads of equal even width in 64, found 5",
    ),
    "key heads that do not divide": (
        lambda root: edit_json(root / BASE / "config.json", setting("num_key_value_heads", 3)),
        "num_key_value_heads: expected a divisor of 4, found 3",
    ),
    "number beyond every float": (
        lambda root: edit_json(root / BASE / "config.json", setting("rms_norm_eps", 10**400)),
        "config.json: rms_norm_eps: expected a number from 1e-12 to 0.01, found 1000",
    ),
    "epsilon not a number": (
        lambda root: edit_json(root / BASE / "config.json", setting("rms_norm_eps", float("nan"))),
        "rms_norm_eps: expected a number from 1e-12 to 0.01, found nan",
    ),
    "fewer layers": (
        lambda root: edit_json(root / BASE / "config.json", setting("num_hidden_layers", 2)),
        "expected no tensor model.layers.2.",
    ),
    "tied with a head": (
        lambda root: edit_json(root / BASE / "config.json", setting("tie_word_embeddings", True)),
        "expected no tensor lm_head.weight, found bfloat16 [416, 64]",
    ),
    "generation config missing": (
        lambda root: (root / BASE / "generation_config.json").unlink(),
        f"{BASE}/generation_config.json: expected a file, found nothing",
    ),
    "generation config with an unknown setting": (
        lambda root: edit_json(root / BASE / "generation_config.json", setting("no_repeat_ngram_size", 3)),
        "no_repeat_ngram_size: expected no such setting (its meaning is not implemented), found 3",
    ),
    "stop id outside": (
        lambda root: edit_json(root / BASE / "generation_config.json", setting("eos_token_id", [400, 478])),
        "eos_token_id: expected 1 to 64 integers from 0 to 477, found [400, 478]",
    ),
    "penalty of zero": (
        lambda root: edit_json(root / BASE / "generation_config.json", setting("repetition_penalty", 0)),
        "repetition_penalty: expected a number from 0.01 to 100.0, found 0",
    ),
    # the tokenizer
    "unknown tokenizer": (
        lambda root: edit_json(root / BASE / "tokenizer_config.json", setting("tokenizer_class", "T5Tokenizer")),
        "tokenizer_class: expected 'LlamaTokenizer' or 'GPT2Tokenizer', found 'T5Tokenizer'",
    ),
    "damaged vocabulary": (
        lambda root: truncate(root / BASE / "tokenizer.model"),
        f"{BASE}/tokenizer.model: expected a sentencepiece model, found RuntimeError",
    ),
    "a pipe for a configuration": (
        lambda root: replace_by_pipe(root / BASE / "generation_config.json"),
        f"{BASE}/generation_config.json: expected a file, found something else",
    ),
    "vocabulary of nothing": (
        lambda root: os.truncate(root / BASE / "tokenizer.model", 0),
        f"{BASE}/tokenizer.model: expected a sentencepiece model, found ",
    ),
    "vocabulary too long": (
        lambda root: os.truncate(root / BASE / "tokenizer.model", (32 << 20) + 1),
        f"{BASE}/tokenizer.model: expected at most 33554432 bytes, found 33554433",
    ),
    "added token with a gap": (
        lambda root: edit_json(root / BASE / "added_tokens.json", setting("<|new|>", 412)),
        f"{BASE}: added tokens: expected ids without a gap from 400, found 412 out of order",
    ),
    "added token twice": (
        lambda root: edit_json(root / BASE / "added_tokens.json", setting("<|new|>", 410)),
        f"{BASE}/added_tokens.json: token 410: expected '<|user|>', found '<|new|>'",
    ),
    "an id of two added tokens": (
        lambda root: edit_json(
            root / BASE / "added_tokens.json", lambda added: added.update({"<|new|>": 411, "<|other|>": 411})
        ),
        f"{BASE}/added_tokens.json: token 411: expected '<|new|>', found '<|other|>'",
    ),
    "added token without a text": (
        lambda root: edit_json(
            root / BASE / "tokenizer_config.json", setting("added_tokens_decoder/411", {"special": True})
        ),
        "tokenizer_config.json: added_tokens_decoder.411: expected an added token with its content, found None",
    ),
    "added token with an id of many digits": (
        lambda root: edit_json(
            root / BASE / "tokenizer_config.json", setting("added_tokens_decoder/" + "9" * 5000, {"content": "<|new|>"})
        ),
        "added_tokens_decoder.999",
    ),
    "more tokens than rows": (
        lambda root: edit_json(
            root / BASE / "added_tokens.json", lambda added: added.update({f"<{i}>": i for i in range(411, 420)})
        ),
        f"{BASE}: expected at most 416 tokens (the base's rows), found a tokenizer of 420",
    ),
    # CLIP
    "clip key missing": (
        lambda root: edit_torch(root / CLIP, without("vision_model.pre_layrnorm.bias")),
        f"{CLIP}: expected tensor vision_model.pre_layrnorm.bias [32], found nothing (1 missing in all)",
    ),
    "clip key extra": (
        lambda root: edit_torch(root / CLIP, setting("vision_model.head.weight", torch.ones(2))),
        f"{CLIP}: expected no tensor vision_model.head.weight, found float32 [2] (1 extra in all)",
    ),
    "clip of other patches": (
        lambda root: edit_json(root / VISION / "config.json", setting("vision_config/patch_size", 28)),
        "embeddings.patch_embedding.weight: expected shape [32, 3, 28, 28], found [32, 3, 14, 14]",
    ),
    "clip heads that do not divide": (
        lambda root: edit_json(root / VISION / "config.json", setting("vision_config/num_attention_heads", 7)),
        f"{VISION}/config.json: vision_config.num_attention_heads: expected a divisor of 32, found 7",
    ),
    "clip with another activation": (
        lambda root: edit_json(root / VISION / "config.json", setting("vision_config/hidden_act", "gelu")),
        f"{VISION}/config.json: vision_config.hidden_act: expected 'quick_gelu', found 'gelu'",
    ),
    "clip resized otherwise": (
        lambda root: edit_json(root / VISION / "preprocessor_config.json", setting("resample", 2)),
        f"{VISION}/preprocessor_config.json: resample: expected 3, found 2",
    ),
    "clip resized to another size": (
        lambda root: edit_json(root / VISION / "preprocessor_config.json", setting("size", 64)),
        f"{VISION}/preprocessor_config.json: size: expected 56 or ",
    ),
    "clip mean of no colour": (
        lambda root: edit_json(root / VISION / "preprocessor_config.json", setting("image_mean", [0.5, 1e308, 0.5])),
        "image_mean: expected 3 numbers from 0 to 1, found [0.5, 1e+308, 0.5]",
    ),
    "clip mean beyond every float": (
        lambda root: edit_json(root / VISION / "preprocessor_config.json", setting("image_mean", [0.5, 10**400, 0.5])),
        "image_mean: expected 3 numbers from 0 to 1, found [0.5, 1000",
    ),
    "clip deviation of zero": (
        lambda root: edit_json(root / VISION / "preprocessor_config.json", setting("image_std", [0.2, 0, 0.2])),
        "image_std: expected 3 numbers from 0.001 to 1, found [0.2, 0, 0.2]",
    ),
    "clip mean of two": (
        lambda root: edit_json(root / VISION / "preprocessor_config.json", setting("image_mean", [0.5, 0.5])),
        "image_mean: expected 3 numbers from 0 to 1, found [0.5, 0.5]",
    ),
    "clip missing": (
        lambda root: (root / CLIP).unlink(),
        f"{CLIP}: expected a file, found nothing",
    ),
    "clip truncated": (
        lambda root: truncate(root / CLIP),
        f"{CLIP}: expected a whole torch file, found BadZipFile",
    ),
    # the plugins
    "adapter missing": (
        lambda root: edit_torch(root / COM, without(f"{DOWN}.lora_route.weight")),
        f"{COM}: expected tensor {DOWN}.lora_route.weight [4, 128], found nothing",
    ),
    "adapter of another layer": (
        lambda root: edit_torch(
            root / GEN, setting(f"{PREFIX}layers.3.mlp.down_proj.lora_A.weight", torch.ones(16, 128))
        ),
        f"{GEN}: expected no tensor {PREFIX}layers.3.mlp.down_proj.lora_A.weight, found float32 [16, 128] "
        "(the base has 3 layers)",
    ),
    "adapter of another architecture": (
        lambda root: edit_torch(root / GEN, setting(f"{PREFIX}layers.1.mlp.up_proj.lora_A.weight", torch.ones(16, 64))),
        f"{GEN}: expected no tensor {PREFIX}layers.1.mlp.up_proj.lora_A.weight, found float32 [16, 64] "
        "(the base is phi3)",
    ),
    "adapter mis-shaped": (
        lambda root: edit_torch(root / COM, setting(f"{DOWN}.lora_A.weight", torch.ones(8, 127))),
        f"{COM}: {DOWN}.lora_A.weight: expected shape [8, 128], found [8, 127]",
    ),
    "adapter of another rank": (
        lambda root: edit_torch(root / COM, setting(f"{DOWN}.lora_B.weight", torch.ones(64, 16))),
        f"{COM}: {DOWN}.lora_B.weight: expected shape [64, 8], found [64, 16]",
    ),
    "adapter of integers": (
        lambda root: edit_torch(root / COM, setting(f"{DOWN}.lora_A.weight", torch.ones(8, 128, dtype=torch.int64))),
        f"{COM}: {DOWN}.lora_A.weight: expected one of float16, bfloat16, float32, found torch.int64",
    ),
    "experts that do not divide the rank": (
        lambda root: edit_torch(
            root / COM, setting(f"{PREFIX}layers.0.self_attn.qkv_proj.lora_route.weight", torch.ones(3, 64))
        ),
        f"{COM}: expected a rank of at most 4096 that the number of experts divides, found rank [8] and experts [3]",
    ),
    "no experts": (
        lambda root: edit_torch(
            root / COM, setting(f"{PREFIX}layers.0.self_attn.qkv_proj.lora_route.weight", torch.ones(0, 64))
        ),
        f"{COM}: expected a rank of at most 4096 that the number of experts divides, found rank [8] and experts [0]",
    ),
    "absurd rank": (
        lambda root: edit_torch(
            root / COM, setting(f"{PREFIX}layers.0.self_attn.qkv_proj.lora_A.weight", torch.ones(4100, 64))
        ),
        f"{COM}: expected a rank of at most 4096 that the number of experts divides, found rank [4100] and experts [4]",
    ),
    "no rank": (
        lambda root: edit_torch(
            root / COM, setting(f"{PREFIX}layers.0.self_attn.qkv_proj.lora_A.weight", torch.ones(0, 64))
        ),
        f"{COM}: expected a rank of at most 4096 that the number of experts divides, found rank [0] and experts [4]",
    ),
    "projector missing": (
        lambda root: edit_torch(root / COM, without(f"{PREFIX}mm_projector.2.bias")),
        f"{COM}: expected tensor {PREFIX}mm_projector.2.bias [64], found nothing",
    ),
    "projector missing in both generation files": (
        lambda root: edit_torch(root / GEN, without(f"{PREFIX}mm_projector.2.bias")),
        f"{GEN} or {FUSION}: expected tensor {PREFIX}mm_projector.2.bias [64], found nothing",
    ),
    "head missing in both generation files": (
        lambda root: edit_torch(root / FUSION, without("base_model.model.lm_head.weight")),
        f"{GEN} or {FUSION}: expected tensor base_model.model.lm_head.weight [478, 64], found nothing",
    ),
    "plugin key without its prefix": (
        lambda root: edit_torch(root / COM, setting("mm_projector.0.bias", torch.ones(64))),
        f"{COM}: expected no tensor mm_projector.0.bias, found float32 [64]",
    ),
    "rows for other codes": (
        lambda root: edit_torch(root / FUSION, setting("base_model.model.lm_head.weight", torch.ones(446, 64))),
        f"{FUSION}: base_model.model.lm_head.weight: expected 64 codes (as model.yaml: n_embed), found 32",
    ),
    "rows for no codes": (
        lambda root: edit_torch(root / FUSION, setting("base_model.model.lm_head.weight", torch.ones(300, 64))),
        f"{FUSION}: base_model.model.lm_head.weight: expected 1 to 1048576 codes after 411 tokens, found -114",
    ),
    "rows of another width": (
        lambda root: edit_torch(root / FUSION, setting("base_model.model.lm_head.weight", torch.ones(478, 32))),
        f"{FUSION}: base_model.model.lm_head.weight: expected shape [478, 64], found [478, 32]",
    ),
    "plugin of qwen": (
        lambda root: shutil.copyfile(arguments("qwen")["comprehension"], root / COM),
        f"{COM}: expected tensor {PREFIX}layers.0.self_attn.qkv_proj.lora_A.weight [8, 64], found nothing",
    ),
    "fusion file in the plugin's place": (
        lambda root: shutil.copyfile(root / FUSION, root / GEN),
        f"{GEN}: expected tensors lora_A, found none",
    ),
    "plugin is a list": (
        lambda root: torch.save([torch.ones(2)], root / COM),
        f"{COM}: expected a dictionary of tensors, found list",
    ),
    "plugin holds text": (
        lambda root: torch.save({"a": "text"}, root / COM),
        f"{COM}: a: expected a tensor, found str",
    ),
    "plugin named by numbers": (
        lambda root: torch.save({1: torch.ones(2)}, root / COM),
        f"{COM}: expected tensor names, found a key of type int",
    ),
    "plugin sparse": (
        lambda root: torch.save({"a": torch.eye(3).to_sparse()}, root / COM),
        f"{COM}: a: expected a dense tensor, found layout torch.sparse_coo on cpu",
    ),
    "plugin of rows of unequal length": (
        lambda root: torch.save({"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, root / COM),
        f"{COM}: a: expected a dense tensor, found layout nested on cpu",
    ),
    "plugin without values": (
        lambda root: torch.save({"a": torch.ones(3, device="meta")}, root / COM),
        f"{COM}: a: expected a dense tensor, found layout torch.strided on meta",
    ),
    "plugin of one value said to be a billion": (
        lambda root: torch.save({"a": torch.ones(1).expand(1 << 15, 1 << 15)}, root / COM),
        f"{COM}: a: expected 4294967296 bytes of values, found 4",
    ),
    "plugin truncated": (
        lambda root: truncate(root / GEN),
        f"{GEN}: expected a whole torch file, found BadZipFile",
    ),
    "plugin empty": (
        lambda root: (root / GEN).write_bytes(b""),
        f"{GEN}: expected a torch file as torch 1.6 and later save it, found another format",
    ),
    "plugin in the legacy format": (
        lambda root: torch.save({"a": torch.ones(2)}, root / COM, _use_new_zipfile_serialization=False),
        f"{COM}: expected a torch file as torch 1.6 and later save it, found another format",
    ),
    "plugin with a damaged pickle": (
        lambda root: damage_pickle(root / COM),
        f"{COM}: expected a torch file, found ",
    ),
    "plugin compressed": (
        lambda root: compress(root / COM),
        f"{COM}: expected stored entries, found com_hlora_weights/",
    ),
    "plugin missing": (
        lambda root: (root / COM).unlink(),
        f"{COM}: expected a file, found nothing",
    ),
    # the VQGAN
    "vqgan key missing": (
        lambda root: edit_torch(root / LAST, without("post_quant_conv.bias")),
        f"{Path(LAST).parent.name}/last.ckpt: expected tensor post_quant_conv.bias [32], found nothing",
    ),
    "vqgan key extra": (
        lambda root: edit_torch(root / LAST, setting("decoder.extra.weight", torch.ones(1))),
        "ckpt/last.ckpt: expected no tensor decoder.extra.weight, found float32 [1]",
    ),
    "vqgan mis-shaped": (
        lambda root: edit_torch(root / LAST, setting("quantize.embed.weight", torch.ones(63, 32))),
        "ckpt/last.ckpt: quantize.embed.weight: expected shape [64, 32], found [63, 32]",
    ),
    "vqgan without a state": (
        lambda root: torch.save({"epoch": 3}, root / LAST),
        "ckpt/last.ckpt: expected a state_dict, found none",
    ),
    "vqgan truncated": (
        lambda root: truncate(root / LAST),
        "ckpt/last.ckpt: expected a whole torch file, found BadZipFile",
    ),
    "vqgan description missing": (
        lambda root: (root / VQGAN / "model.yaml").unlink(),
        "ckpt/model.yaml: expected a file, found nothing",
    ),
    "vqgan description damaged": (
        lambda root: (root / VQGAN / "model.yaml").write_text("model: [1, 2"),
        "ckpt/model.yaml: expected YAML, found ParserError",
    ),
    "vqgan description runs code": (
        lambda root: (root / VQGAN / "model.yaml").write_text("model: !!python/object/apply:os.getcwd []"),
        "ckpt/model.yaml: expected YAML, found ConstructorError",
    ),
    "vqgan description of a billion aliases": (
        lambda root: (root / VQGAN / "model.yaml").write_text(
            "a: &a [1,1,1,1,1,1,1,1,1]\n"
            + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
            + "model: *i\n"
        ),
        "ckpt/model.yaml: model: expected an object, found [[[[[[[...",
    ),
    "vqgan description of a billion merges": (
        lambda root: (root / VQGAN / "model.yaml").write_text(
            "a: &a {k: 1}\n"
            + "".join(
                f"{b}: &{b} {{<<: [{','.join(['*' + a] * 9)}]}}\n"
                for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
            )
        ),
        "ckpt/model.yaml: model: expected an object, found None",
    ),
    "vqgan description of a number without digits": (
        lambda root: as_yaml(root, "n_embed: 64", 'n_embed: !!int ""'),
        "ckpt/model.yaml: expected YAML, found IndexError",
    ),
    "vqgan description of a number too long to be written out": (
        lambda root: as_yaml(root, "n_embed: 64", f"n_embed: 0x{'f' * 5000}"),
        "model.params.n_embed: expected an integer from 1 to 1048576, found an integer of 20000 bits",
    ),
    "vqgan description too long": (
        lambda root: (root / VQGAN / "model.yaml").write_text("#" * (1 << 20) + "\n"),
        "ckpt/model.yaml: expected at most 1048576 bytes, found 1048577",
    ),
    "another quantiser": (
        lambda root: as_yaml(root, "vqgan.GumbelVQ", "vqgan.VQModel"),
        "model.target: expected 'taming.models.vqgan.GumbelVQ', found 'taming.models.vqgan.VQModel'",
    ),
    "more codes than rows": (
        lambda root: as_yaml(root, "n_embed: 64", "n_embed: 8192"),
        f"{FUSION}: {PREFIX}embed_tokens.weight: expected 8192 codes (as model.yaml: n_embed), found 64",
    ),
    "latents of another width": (
        lambda root: as_yaml(root, "z_channels: 32", "z_channels: 16"),
        "model.params.embed_dim: expected z_channels, 16, found 32",
    ),
    "channels that no norm takes": (
        lambda root: as_yaml(root, "ch: 32", "ch: 40"),
        "model.params.ddconfig.ch: expected a multiple of the 32 groups of its norms, found 40",
    ),
    "an odd resolution": (
        lambda root: as_yaml(root, "resolution: 256", "resolution: 252"),
        "model.params.ddconfig.resolution: expected a multiple of 8, found 252",
    ),
    "an unknown layer kind": (
        lambda root: as_yaml(root, "dropout: 0.0", "attn_type: linear"),
        "model.params.ddconfig.attn_type: expected no such setting (its meaning is not implemented), found 'linear'",
    ),
    "remapped codes": (
        lambda root: as_yaml(root, "embed_dim: 32", "embed_dim: 32\n    remap: used.npy"),
        "model.params.remap: expected None, found 'used.npy'",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_damage_is_named(release, name):
    damage, message = DAMAGES[name]
    damage(release)
    with pytest.raises(CheckpointError) as caught:
        open_release(release)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(release) not in str(caught.value)


NOT_FINITE = {
    "base": (
        lambda root: edit_shard(root / SECOND, lambda state: state["model.norm.weight"][3].fill_(float("nan"))),
        lambda checkpoint: checkpoint.base_tensor("norm.weight"),
        f"{SECOND}: model.norm.weight: expected finite values, found NaN or infinity",
    ),
    "adapter": (
        lambda root: edit_torch(root / COM, lambda state: state[f"{DOWN}.lora_B.weight"][0, 0].fill_(float("inf"))),
        lambda checkpoint: checkpoint.adapter("comprehension", 1, "mlp.down_proj"),
        f"{COM}: {DOWN}.lora_B.weight: expected finite values, found NaN or infinity",
    ),
    "clip": (
        lambda root: edit_torch(
            root / CLIP, lambda state: state["vision_model.pre_layrnorm.bias"].fill_(-float("inf"))
        ),
        lambda checkpoint: checkpoint.vision_tensor("pre_layrnorm.bias"),
        f"{CLIP}: vision_model.pre_layrnorm.bias: expected finite values, found NaN or infinity",
    ),
    "vqgan": (
        lambda root: edit_torch(root / LAST, lambda state: state["post_quant_conv.bias"].fill_(float("nan"))),
        lambda checkpoint: checkpoint.vq_tensor("post_quant_conv.bias"),
        "ckpt/last.ckpt: post_quant_conv.bias: expected finite values, found NaN or infinity",
    ),
}


@pytest.mark.parametrize("part", NOT_FINITE)
def test_weights_that_are_not_finite_are_named_when_read(release, part):
    damage, read, message = NOT_FINITE[part]
    damage(release)
    with open_release(release) as checkpoint, pytest.raises(CheckpointError) as caught:
        read(checkpoint)
    assert str(caught.value) == message


# --- hostile files --------------------------------------------------------------------------------------------------

HOSTILE: dict[str, Callable[[Path], Any]] = {
    f"{os.system.__module__}.system": lambda marker: RunsCode(os.system, f"touch {marker}"),
    "shutil.copyfile": lambda marker: RunsCode(shutil.copyfile, __file__, str(marker)),
    "builtins.eval": lambda marker: RunsCode(eval, f"open({str(marker)!r}, 'w')"),
    "builtins.getattr": lambda marker: RunsCode(getattr, marker, "touch"),
    f"{open.__module__}.open": lambda marker: RunsCode(open, str(marker), "w"),
    "pickle.loads": lambda marker: RunsCode(pickle.loads, pickle.dumps(RunsCode(os.system, f"touch {marker}"))),
}


@pytest.mark.parametrize("lightning", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_never_runs(tmp_path, name, lightning):
    file, marker = tmp_path / "file.bin", tmp_path / "it-ran"
    torch.save({"state_dict": {"a": torch.ones(2)}, "callbacks": HOSTILE[name](marker)}, file)
    with pytest.raises(CheckpointError, match=rf"file.bin: expected tensors only, found the global {re.escape(name)}$"):
        PickleSource(file, section="state_dict", lightning=lightning)
    assert not marker.exists()


@pytest.mark.parametrize("file", [COM, GEN, FUSION, CLIP, LAST])
def test_no_file_of_a_release_may_run_code(release, file):
    marker = release / "it-ran"
    torch.save({"state_dict": RunsCode(os.system, f"touch {marker}")}, release / file)
    with pytest.raises(CheckpointError, match=r"expected tensors only, found the global \w+\.system$"):
        open_release(release)
    assert not marker.exists()


def test_a_plugin_has_no_training_objects(release):
    shutil.copyfile(release / LAST, release / COM)
    with pytest.raises(CheckpointError, match=f"{COM}: expected tensors only, found the global pytorch_lightning"):
        open_release(release)


def test_the_hostile_pickles_would_run(tmp_path):
    """The test above would pass on harmless files too: this one shows that these are not."""
    marker = tmp_path / "it-ran"
    torch.save(HOSTILE["builtins.eval"](marker), tmp_path / "file.bin")
    torch.load(tmp_path / "file.bin", weights_only=False)
    assert marker.exists()


# --- arguments ------------------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "no plugin": (
        {"comprehension": None, "generation": None, "fusion": None},
        "expected a comprehension or a generation plugin, found neither",
    ),
    "fusion alone": (
        {"generation": None},
        f"{FUSION}: expected a generation plugin beside it, found none",
    ),
    "fusion forgotten": (
        {"fusion": None},
        f"{GEN} or a fusion file: expected tensor {PREFIX}embed_tokens.weight [478, 64], found nothing",
    ),
    "no vqgan": ({"vqgan": None}, f"{GEN}: expected a VQGAN beside it, found none"),
    "template of another base": (
        {"template": "qwen"},
        f"m3/{BASE}: template: expected phi3 or phi4 for phi3, found 'qwen'",
    ),
    "negative alpha": ({"hlora_alpha": -1.0}, "hlora_alpha: expected a number above 0, found -1.0"),
    "infinite alpha": ({"hlora_alpha": float("inf")}, "hlora_alpha: expected a number above 0, found inf"),
    "other number of codes": ({"codes": 32}, "codes: expected 64 codes (as model.yaml: n_embed), found 32"),
    "no codes": ({"codes": 0}, "codes: expected 1 to 1048576 codes after 411 tokens, found 0"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_must_fit(name):
    changes, message = ARGUMENTS[name]
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(**(arguments("m3") | changes))
    assert str(caught.value) == message


def test_swapped_plugins_are_told_by_their_names():
    files = arguments("m3")
    swapped = files | {"comprehension": files["generation"], "generation": files["comprehension"]}
    with pytest.raises(CheckpointError, match=f"{GEN}: expected the comprehension plugin, found the other task's"):
        Checkpoint.open(**swapped)


def test_one_file_for_both_tasks_is_refused(release):
    plugin = shutil.copyfile(release / COM, release / "plugin.bin")
    with pytest.raises(CheckpointError, match=r"plugin.bin: expected a plugin for each task, found one for both"):
        open_release(release, comprehension=plugin, generation=release / "." / "plugin.bin")


def test_base_and_clip_swapped():
    files = arguments("m3")
    with pytest.raises(CheckpointError, match=f"{VISION}/config.json: model_type: expected 'phi3' or 'qwen2'"):
        Checkpoint.open(**(files | {"base": files["vision"], "vision": files["base"]}))


def test_a_pickle_that_is_too_large_is_not_read(monkeypatch):
    monkeypatch.setattr("healthgpt_edge.export.checkpoint.pickles.MAX_PICKLE_BYTES", 100)
    with pytest.raises(CheckpointError, match=r"expected \S+/data\.pkl of at most 100 bytes, found \d{3,}$"):
        Checkpoint.open(**arguments("m3"))


def test_qwen_draws_no_pictures():
    files = arguments("qwen") | {"vqgan": arguments("m3")["vqgan"]}
    with pytest.raises(CheckpointError, match="template: expected phi3 or phi4 for image tokens, found qwen"):
        Checkpoint.open(**files)


def test_a_tied_base_takes_no_rows(release):
    edit_shard(release / FIRST, without("lm_head.weight"))
    edit_json(release / BASE / "config.json", setting("tie_word_embeddings", True))
    with pytest.raises(CheckpointError, match=f"{GEN}: expected no vocabulary rows"):
        open_release(release)


@pytest.mark.parametrize(
    "name", ["config.json", "model-00001-of-00002.safetensors", "com_hlora_weights.bin", "last.ckpt"]
)
def test_a_file_that_may_not_be_read_is_named(name, monkeypatch):
    opened = Path.open

    def refuse(path, *arguments, **options):
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read: Permission denied$"):
        Checkpoint.open(**arguments("m3"))


def test_unknown_names_are_errors():
    with open_golden("m3") as checkpoint:
        with pytest.raises(CheckpointError, match="task: expected one of comprehension, generation, found 'drawing'"):
            checkpoint.adapter("drawing", 0, "mlp.down_proj")
        with pytest.raises(CheckpointError, match=r"model\.nothing: expected the name of a tensor of this release"):
            checkpoint.base_tensor("nothing")
    with open_golden("qwen") as checkpoint, pytest.raises(CheckpointError, match="a checkpoint without a VQGAN"):
        checkpoint.vq_tensor("quantize.embed.weight")
