"""What real released files have that the golden ones lack: whole configurations, odd pickles, published sizes."""

from __future__ import annotations

import collections
import json
import random
import shutil
import sys
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from golden_cases import arguments, open_golden

from healthgpt_edge.errors import CheckpointError
from healthgpt_edge.export.checkpoint import Checkpoint, VisionConfig, VqConfig
from healthgpt_edge.export.checkpoint.language import read_generation, read_language
from healthgpt_edge.export.checkpoint.pickles import PickleSource
from healthgpt_edge.export.checkpoint.vision import read_vision
from healthgpt_edge.export.checkpoint.vocabulary import tokenizer_size
from healthgpt_edge.export.checkpoint.vqgan import read_vqgan
from healthgpt_edge.export.tokenizer import PROBES, write_tokenizer
from healthgpt_edge.prompt import Tokenizer

PLUGIN = "HealthGPT-M3/com_hlora_weights.bin"
KEY = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A copy of the golden M3 release, to be changed."""
    return Path(shutil.copytree(arguments("m3")["base"].parent, tmp_path / "m3"))


def write_json(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


# --- configurations, with every field that the published ones have ---------------------------------------------------

PHI = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "embd_pdrop": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "phi3",
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.2",
    "use_cache": True,
}
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "m3": (
        PHI
        | {
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "original_max_position_embeddings": 4096,
            "pad_token_id": 32000,
            "rope_theta": 10000.0,
            "sliding_window": 2047,
            "vocab_size": 32064,
        },
        {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": [32000, 32001, 32007], "pad_token_id": 32000},
        {"head_dim": 96, "kv_heads": 32, "rope_theta": 10000.0, "sliding_window": 2047, "rms_epsilon": 1e-5},
    ),
    "l14": (
        PHI
        | {
            "bos_token_id": 100257,
            "eos_token_id": 100265,
            "hidden_size": 5120,
            "intermediate_size": 17920,
            "max_position_embeddings": 16384,
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
            "num_key_value_heads": 10,
            "original_max_position_embeddings": 16384,
            "pad_token_id": 100349,
            "rope_theta": 250000,
            "sliding_window": None,
            "vocab_size": 100352,
        },
        {"_from_model_config": True, "bos_token_id": 100257, "eos_token_id": 100265, "pad_token_id": 100349},
        {"head_dim": 128, "kv_heads": 10, "rope_theta": 250000.0, "sliding_window": None, "rms_epsilon": 1e-5},
    ),
    "xl32": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "hidden_act": "silu",
            "hidden_size": 5120,
            "initializer_range": 0.02,
            "intermediate_size": 27648,
            "max_position_embeddings": 32768,
            "max_window_layers": 70,
            "model_type": "qwen2",
            "num_attention_heads": 40,
            "num_hidden_layers": 64,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.43.1",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 152064,
        },
        {
            "bos_token_id": 151643,
            "do_sample": True,
            "eos_token_id": [151645, 151643],
            "pad_token_id": 151643,
            "repetition_penalty": 1.05,
            "temperature": 0.7,
            "top_k": 20,
            "top_p": 0.8,
            "transformers_version": "4.43.1",
        },
        # The window's size is there, and off.
        {"head_dim": 128, "kv_heads": 8, "rope_theta": 1e6, "sliding_window": None, "rms_epsilon": 1e-6},
    ),
}

# As first published, before its end token was corrected.
CONFIGS["l14 at first"] = (
    CONFIGS["l14"][0] | {"auto_map": {}, "eos_token_id": 100257, "pad_token_id": 100257},
    {"_from_model_config": True, "bos_token_id": 100257, "eos_token_id": [100257, 100265]},
    CONFIGS["l14"][2],
)


@pytest.mark.parametrize("system", CONFIGS)
def test_released_configurations_are_read(tmp_path, system):
    config, generation, expected = CONFIGS[system]
    write_json(tmp_path / "config.json", config)
    write_json(tmp_path / "generation_config.json", generation)
    language = read_language(tmp_path)
    assert {name: getattr(language, name) for name in expected} == expected
    assert language.layers == config["num_hidden_layers"] and not language.tied
    eos = generation["eos_token_id"]
    read = read_generation(tmp_path, language.base_vocab)
    assert read.eos_ids == tuple(eos if isinstance(eos, list) else [eos])
    assert read.repetition_penalty == generation.get("repetition_penalty", 1.0)


@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 250000}}, 250000.0),
        ({"rope_scaling": {"rope_type": "default"}}, 10000.0),
        ({"rope_scaling": {"type": "default"}, "rope_parameters": None}, 10000.0),
    ],
)
def test_rotary_settings_that_scale_nothing_are_taken(tmp_path, rope, theta):
    config = {key: value for key, value in (CONFIGS["m3"][0] | rope).items() if key != "rope_theta" or value}
    write_json(tmp_path / "config.json", config)
    assert read_language(tmp_path).rope_theta == theta


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_scaling": {"type": "su", "short_factor": [1.0]}}, "rope_scaling.type: expected 'default', found 'su'"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor: expected no such setting"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "rope_parameters.rope_type: expected 'default', found 'yarn'",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.75}},
            "rope_parameters.partial_rotary_factor: expected 1.0 or 1, found 0.75",
        ),
        ({"rope_parameters": [1]}, "rope_parameters: expected an object, found [1]"),
    ],
)
def test_rotary_settings_that_scale_are_refused(tmp_path, rope, message):
    write_json(tmp_path / "config.json", CONFIGS["m3"][0] | rope)
    with pytest.raises(CheckpointError) as caught:
        read_language(tmp_path)
    assert message in str(caught.value)


def test_generation_settings_without_a_say_in_greedy_decoding_are_taken(tmp_path):
    harmless = {"max_length": 4096, "max_new_tokens": 64, "num_beams": 1, "min_p": 0.1, "use_cache": True}
    write_json(tmp_path / "generation_config.json", CONFIGS["m3"][1] | harmless)
    assert read_generation(tmp_path, 32064).eos_ids == (32000, 32001, 32007)


CLIP = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "model_type": "clip_text_model"},
    "text_config_dict": {"hidden_size": 768},
    "torch_dtype": "float32",
    "transformers_version": None,
    "vision_config": {
        "add_cross_attention": False,
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "hidden_act": "quick_gelu",
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "vision_config_dict": {"hidden_size": 1024, "image_size": 336, "patch_size": 14},
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def write_clip(folder: Path, size: int) -> Path:
    write_json(folder / "config.json", CLIP | {"vision_config": CLIP["vision_config"] | {"image_size": size}})
    steps = {"do_center_crop": True, "do_normalize": True, "do_resize": True}
    picture = {"crop_size": size, "size": size, "resample": 3, "image_mean": MEAN, "image_std": STD}
    write_json(
        folder / "preprocessor_config.json", steps | {"feature_extractor_type": "CLIPFeatureExtractor"} | picture
    )
    return folder


def test_released_clip_is_read(tmp_path):
    expected = VisionConfig(1024, 24, 16, 4096, 336, 14, 1e-5, MEAN, STD)
    assert read_vision(write_clip(tmp_path, 336)) == expected
    assert expected.patches == 576


def test_the_better_known_clip_is_refused(tmp_path):
    """openai/clip-vit-large-patch14 fits every shape of a plugin and gives 256 features where 576 were trained with."""
    with pytest.raises(
        CheckpointError, match=r"vision_config.image_size: expected 336, as of the clip-vit.* found 224"
    ):
        read_vision(write_clip(tmp_path, 224))


VQGAN = {
    "model": {
        "base_learning_rate": 4.5e-06,
        "target": "taming.models.vqgan.GumbelVQ",
        "params": {
            "kl_weight": 1e-08,
            "embed_dim": 256,
            "n_embed": 8192,
            "monitor": "val/rec_loss",
            "temperature_scheduler_config": {"target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler"},
            "ddconfig": {
                "double_z": False,
                "z_channels": 256,
                "resolution": 256,
                "in_channels": 3,
                "out_ch": 3,
                "ch": 128,
                "ch_mult": [1, 1, 2, 4],
                "num_res_blocks": 2,
                "attn_resolutions": [32],
                "dropout": 0.0,
            },
            "lossconfig": {"target": "taming.modules.losses.vqperceptual.DummyLoss"},
        },
    },
}


@pytest.mark.parametrize("folder", [".", "configs"])
def test_released_vqgan_is_read(tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "model.yaml").write_text(yaml.safe_dump(VQGAN))
    config = read_vqgan(tmp_path)
    assert config == VqConfig(8192, 256, 256, 128, (1, 1, 2, 4), 2, (32,), 256)
    assert (config.grid, config.image_size) == (32, 256)


def test_the_vqgan_may_lie_as_it_is_published(release):
    folder = release / "taming_transformers/ckpt"
    for name, place in (("model.yaml", "configs"), ("last.ckpt", "checkpoints")):
        (folder / place).mkdir()
        (folder / name).rename(folder / place / name)
    with Checkpoint.open(**arguments("m3", release)) as checkpoint, open_golden("m3") as original:
        name = "quantize.embed.weight"
        assert torch.equal(checkpoint.vq_tensor(name), original.vq_tensor(name))


def test_what_else_training_left_in_the_vqgans_file_is_skipped(release):
    """The published one is 100 MB larger than the model; only some of that can be its loss."""
    path = release / "taming_transformers/ckpt/last.ckpt"
    with open_golden("m3") as original:
        state = {key: original.vq_tensor(key) for key in original._vqgan.entries}
    extra = {"loss.discriminator.main.0.bias": torch.ones(2), "model_ema.decodernorm_outbias": torch.ones(2)}
    torch.save({"state_dict": state | extra | {"colorize": torch.ones(3, 2, 1, 1)}}, path)
    with Checkpoint.open(**arguments("m3", release)) as checkpoint:
        name = "decoder.norm_out.bias"
        assert torch.equal(checkpoint.vq_tensor(name), state[name])


# --- what the published files hold, told by their sizes --------------------------------------------------------------

# In MB, as the Hub lists them; every tensor is bfloat16.
PUBLISHED = {"m3 comprehension": 231, "m3 generation": 835, "l14 comprehension": 297, "xl32 comprehension": 630}


@pytest.mark.parametrize("plugin", PUBLISHED)
def test_a_published_plugin_is_adapters_and_a_projector(tmp_path, plugin):
    """Without vocabulary rows: those of M3 are the 494 MB of its fusion file."""
    system, task = plugin.split()
    write_json(tmp_path / "config.json", CONFIGS[system][0])
    language = read_language(tmp_path)
    rank = {"m3": 64, "l14": 32, "xl32": 32}[system] if task == "comprehension" else 256
    shapes = [language.linear_shape(linear) for linear in language.linears]
    adapters = language.layers * sum(rank * inputs + outputs * rank + 4 * inputs for outputs, inputs in shapes)
    projector = (1024 + 1 + language.hidden + 1) * language.hidden
    assert PUBLISHED[plugin] - 1 < 2 * (adapters + projector) / 1e6 < PUBLISHED[plugin]
    assert round(2 * 2 * (32011 + 8195) * 3072 / 1e6) == 494


# --- pickles ---------------------------------------------------------------------------------------------------------


def instance(module: str, name: str, **state: Any) -> Any:
    """An object of a class `name` that pickles as one of `module`, which is gone when the file is read."""
    kind = type(name, (), {"__module__": module})
    home = sys.modules.setdefault(module, types.ModuleType(module))
    setattr(home, name, kind)
    made = kind()
    made.__dict__.update(state)
    return made


def test_hyperparameters_of_omegaconf_are_skipped(tmp_path, monkeypatch):
    """As Lightning writes them after save_hyperparameters: configuration nodes, each with a defaultdict."""
    for module in ("omegaconf", "omegaconf.base", "omegaconf.nodes", "omegaconf.dictconfig"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    common = {"ref_type": typing.Any, "optional": True, "flags": {}, "resolver_cache": collections.defaultdict(dict)}
    metadata = instance("omegaconf.base", "ContainerMetadata", object_type=dict, key=None, **common)
    metadata.resolver_cache["a"] = {"b": 1}
    leaf = instance("omegaconf.nodes", "AnyNode", _val=3, _parent=None)
    config = instance("omegaconf.dictconfig", "DictConfig", _metadata=metadata, _content={"x": leaf})
    training = {"hyper_parameters": config, "dirpath": tmp_path}
    torch.save({"state_dict": {"a": torch.ones(2)}, **training}, tmp_path / "last.ckpt")
    monkeypatch.undo()
    source = PickleSource(tmp_path / "last.ckpt", section="state_dict", lightning=True)
    assert source.read("a").tolist() == [1.0, 1.0]
    with pytest.raises(CheckpointError, match="expected tensors only, found the global"):
        PickleSource(tmp_path / "last.ckpt", section="state_dict")


def on_a_gpu(state: dict[str, torch.Tensor], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.serialization.location_tag", lambda storage: "cuda:3")
    torch.save(state, path)
    monkeypatch.undo()
    assert b"cuda:3" in path.read_bytes()


FORMS = {
    "on a GPU": on_a_gpu,
    "as parameters": lambda state, path, _: torch.save(
        {key: torch.nn.Parameter(value) for key, value in state.items()}, path
    ),
    "as pieces of one buffer": lambda state, path, _: torch.save(_pieces(state), path),
    "with the metadata of a module": lambda state, path, _: torch.save(_with_metadata(state), path),
    "in bfloat16": lambda state, path, _: torch.save({key: value.bfloat16() for key, value in state.items()}, path),
    "with rotary frequencies": lambda state, path, _: torch.save(
        state | {"base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, path
    ),
}


def _pieces(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As DeepSpeed keeps them: views of one flat tensor."""
    buffer = torch.cat([value.float().flatten() for value in state.values()])
    pieces = buffer.split([value.numel() for value in state.values()])
    return {key: piece.view(state[key].shape) for key, piece in zip(state, pieces, strict=True)}


def _with_metadata(state: dict[str, torch.Tensor]) -> collections.OrderedDict[str, torch.Tensor]:
    ordered = collections.OrderedDict(state)
    ordered._metadata = collections.OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return ordered


@pytest.mark.parametrize("form", FORMS)
def test_a_plugin_may_be_saved_in_many_forms(release, form, monkeypatch):
    state = torch.load(release / PLUGIN, weights_only=True)
    FORMS[form](state, release / PLUGIN, monkeypatch)
    with Checkpoint.open(**arguments("m3", release)) as checkpoint:
        read, _, _ = checkpoint.adapter("comprehension", 1, "mlp.down_proj")
        assert torch.equal(read, (state[KEY].bfloat16() if "bfloat16" in form else state[KEY]).float())


@pytest.mark.parametrize(
    "file",
    [
        "Phi-3-mini-4k-instruct/model-00001-of-00002.safetensors",
        "Phi-3-mini-4k-instruct/tokenizer.model",
        "Phi-3-mini-4k-instruct/config.json",
        "clip-vit-large-patch14-336/pytorch_model.bin",
        PLUGIN,
    ],
)
def test_pointers_of_git_lfs_are_named(release, file):
    (release / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(**arguments("m3", release))
    assert str(caught.value) == f"{file}: expected the file, found a Git LFS pointer to it: git lfs pull"


# --- phi-4's tokenizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", [None, 64])
@pytest.mark.parametrize("listed", [False, True])
def test_phi4s_vocabulary_may_list_the_added_tokens(tmp_path, listed, codes):
    """Their number, and with it the ids of the image tokens, is the same either way."""
    folder = Path(shutil.copytree(arguments("phi4")["base"], tmp_path / "phi-4"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    added = {token["content"]: int(key) for key, token in config["added_tokens_decoder"].items()}
    write_json(folder / "added_tokens.json", added)
    if listed:
        write_json(folder / "vocab.json", json.loads((folder / "vocab.json").read_text()) | added)
    slow = transformers.GPT2Tokenizer.from_pretrained(folder)
    assert tokenizer_size(folder) == len(slow) == 426
    text, options = write_tokenizer(folder, codes)
    (tmp_path / "tokenizer.json").write_text(text)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json", options)
    if codes is not None:
        tokens = ["<start_index>", *(f"<idx_{i}>" for i in range(codes)), "<end_index>", "<pixel_newline>"]
        slow.add_special_tokens({"additional_special_tokens": tokens})
    source = random.Random(7)
    pieces = [*PROBES, "<|im_end|>", "<|dummy_3|>", "<idx_3>", " ", "help"]
    for _ in range(200):
        words = "".join(source.choices(pieces, k=source.randint(1, 6)))
        ids = slow.encode(words)
        assert tokenizer.encode(words) == ids, repr(words)
        assert tokenizer.decode(ids, skip_special=True) == slow.decode(ids, skip_special_tokens=True), repr(words)
