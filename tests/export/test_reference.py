"""The reference model against every figure of the original code, and the few rules the golden cases cannot show."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from golden_cases import CASES, Case, arguments, open_golden
from safetensors.torch import save_file
from tolerances import FEATURES, HIDDEN_STATES, IMAGE_LEVELS, IMAGE_SHARE, LOGITS, PIXEL_VALUES

from healthgpt_edge.errors import GenerationError, PromptError
from healthgpt_edge.export.checkpoint import Checkpoint, SpecialTokens
from healthgpt_edge.export.reference.language import KeyValueCache, visible
from healthgpt_edge.export.reference.model import HealthGPT, penalise
from healthgpt_edge.export.tokenizer import write_tokenizer
from healthgpt_edge.images import prepare, read_image
from healthgpt_edge.prompt import Tokenizer, prompt_ids

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_picture_case = pytest.mark.parametrize("case", [case for case in CASES if case.image], ids=str)
each_generation = pytest.mark.parametrize("case", [case for case in CASES if case.task == "generation"], ids=str)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small matrices are slower on two threads, and other tests want the second core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def model_of(system: str, task: str) -> HealthGPT:
    with open_golden(system) as checkpoint:
        return HealthGPT.load(checkpoint, task)


def model(case: Case) -> HealthGPT:
    return model_of(case.system, case.task)


def pixel_values(case: Case) -> torch.Tensor | None:
    return torch.from_numpy(case.arrays["pixel_values"]) if case.image else None


def embeddings(case: Case) -> torch.Tensor:
    values = pixel_values(case)
    features = None if values is None else model(case).features(values)
    return model(case).embed(case.record["input_ids"], features)


@cache
def run(case: Case) -> tuple[list[int], list[torch.Tensor]]:
    if case.name == "m3_gen_1024":
        # The prompt of m3_gen_wide with a lower limit: its greedy run is the beginning of that one.
        longer = Case("m3_gen_wide")
        assert case.record["input_ids"] == longer.record["input_ids"] and case.image == longer.image
        ids, logits = run(longer)
        return ids[: case.max_new_tokens], logits
    logits: list[torch.Tensor] = []
    ids = model(case).generate(case.record["input_ids"], pixel_values(case), case.max_new_tokens, logits)
    return ids, logits


def assert_close(found: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=tolerance)


@each_case
def test_prompt_ids(case, tmp_path):
    with open_golden(case.system) as checkpoint:
        codes = None if checkpoint.tokens is None else checkpoint.tokens.codes
        text, options = write_tokenizer(arguments(case.system)["base"], codes)
        (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
        tokenizer = Tokenizer.load(tmp_path / "tokenizer.json", options)
        generation = case.task == "generation"
        ids = prompt_ids(tokenizer, checkpoint.template, case.question, case.image is not None, generation)
    assert ids == case.record["input_ids"]


@each_picture_case
def test_pixel_values(case):
    tower = model(case).vision_tower
    picture = prepare(read_image(case.image), tower.config.image_size)
    assert_close(tower.normalise(torch.from_numpy(picture)[None]), case.arrays["pixel_values"], PIXEL_VALUES)


@each_picture_case
def test_vision_features(case):
    found = model(case).image_features(pixel_values(case))
    assert_close(found, case.arrays["vision_features"], FEATURES)


@each_picture_case
def test_projected_features(case):
    assert_close(model(case).features(pixel_values(case)), case.arrays["projected_features"], FEATURES)


@each_case
def test_hidden_states(case):
    found = torch.stack(model(case).model.layer_outputs(embeddings(case)))[:, 0]
    assert_close(found, case.arrays["hidden_states_layers_then_norm"], HIDDEN_STATES)


@pytest.mark.parametrize("case", [case for case in CASES if any(k.startswith("unit.") for k in case.arrays)], ids=str)
def test_hlora_linears_one_by_one(case):
    layer = model(case).model.layers[0]
    linears = [key.removeprefix("unit.").removesuffix(".x") for key in case.arrays if key.endswith(".x")]
    assert sorted(linears) == sorted(model(case).language.linears)
    for name in linears:
        linear = layer.get_submodule(name)
        assert np.array_equal(linear.lora_A.weight, case.arrays[f"unit.{name}.lora_A"])
        assert np.array_equal(linear.weight, case.arrays[f"unit.{name}.W"])
        found = linear(torch.from_numpy(case.arrays[f"unit.{name}.x"]))
        assert_close(found, case.arrays[f"unit.{name}.y"], FEATURES)


@each_case
def test_logits_of_the_first_steps(case):
    _, logits = run(case)
    for step in range(4):
        assert_close(logits[step], case.arrays[f"logits_step{step}"], LOGITS)


@each_case
def test_token_ids(case):
    ids, _ = run(case)
    assert ids == case.record["output_ids"]


def test_codes_and_picture():
    case = Case("m3_gen_wide")
    codes = model(case).codes(run(case)[0])
    assert codes == case.record["vq_indices"]
    expected = case.arrays["image_uint8"].astype(int)
    difference = np.abs(model(case).picture(codes).numpy().astype(int) - expected)
    assert difference.max() <= IMAGE_LEVELS
    assert (difference > 0).mean() <= IMAGE_SHARE


def test_a_run_cut_at_the_token_limit_is_an_error_as_in_the_original():
    case = Case("m3_gen_1024")
    assert case.record["exception"].startswith("AssertionError")
    with pytest.raises(GenerationError, match=r"^expected 1024 codes of one picture, found 1023$"):
        model(case).codes(run(case)[0])


def test_without_the_added_tokens_phi4_answers_the_same():
    # No file of this checkpoint tells the number of codes; rows that are means are never the greatest logit.
    case = Case("phi4_com")
    with Checkpoint.open(**arguments("phi4")) as checkpoint:
        assert checkpoint.tokens is None
        short = HealthGPT.load(checkpoint, "comprehension")
    assert short.generate(case.record["input_ids"], pixel_values(case), 64) == case.record["output_ids"]


def test_qwen_needs_its_repetition_penalty():
    case = Case("qwen_com")
    free = model(case)
    original = free.generation
    free.generation = replace(original, repetition_penalty=1.0)
    try:
        assert free.generate(case.record["input_ids"], pixel_values(case), 64) != case.record["output_ids"]
    finally:
        free.generation = original


def test_penalty_pushes_both_signs_down():
    logits = torch.tensor([2.0, -2.0, 4.0, -4.0])
    assert penalise(logits, [0, 1, 1], 2.0).tolist() == [1.0, -4.0, 4.0, -4.0]
    assert logits.tolist() == [2.0, -2.0, 4.0, -4.0]


def test_window_is_the_token_itself_and_those_before():
    config = replace(model_of("m3", "comprehension").language, sliding_window=2)
    rows = visible(config, past=3, new=2).int().tolist()
    assert rows == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_cached_decoding_equals_one_pass_with_a_window():
    source = model_of("m3", "comprehension")
    config = replace(source.language, sliding_window=3)
    case = Case("m3_com_text")
    decoder = source.model
    states = embeddings(case)
    for layer in decoder.layers:
        layer.self_attn.config = config
    decoder.config = config
    try:
        whole = decoder(states)
        cache = KeyValueCache(config, states.shape[1])
        steps = torch.cat([decoder(part, cache) for part in states.split([7, 1, 1, states.shape[1] - 9], dim=1)], dim=1)
    finally:
        for layer in decoder.layers:
            layer.self_attn.config = source.language
        decoder.config = source.language
    assert_close(steps, whole.numpy(), FEATURES)
    assert not np.allclose(whole.numpy(), decoder(states).numpy(), atol=1e-2)


def test_newlines_and_ends_are_passed_over_wherever_they_stand():
    generation = model_of("m3", "generation")
    tokens: SpecialTokens = generation.tokens
    grid = [tokens.first_code + index % tokens.codes for index in range(1024)]
    ids = [*grid[:32], tokens.newline, *grid[32:1000], tokens.end, *grid[1000:], tokens.end, 400]
    assert generation.codes(ids) == [index % tokens.codes for index in range(1024)]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "expected 1024 codes of one picture, found 0"),
        ([412, 413, 300, 412, 400], "expected an image token, found token 300 after 2 codes"),
        ([412] * 1025 + [400], "expected 1024 codes of one picture, found 1025"),
        ([412] * 1024 + [476, 412, 400], "expected 1024 codes of one picture, found 1025"),
    ],
)
def test_unusable_codes_are_errors(ids, message):
    with pytest.raises(GenerationError, match=f"^{message}$"):
        model_of("m3", "generation").codes(ids)


def test_a_model_without_codes_draws_no_picture():
    with pytest.raises(GenerationError, match="expected a generation model with a VQGAN, found none"):
        model_of("qwen", "comprehension").codes([1, 2])


@pytest.mark.parametrize(("ids", "features"), [([5, -200, 6], False), ([5, 6], True), ([-200, -200], True)])
def test_an_image_token_per_image(ids, features):
    healthgpt = model_of("m3", "comprehension")
    given = torch.zeros(1, 16, 64) if features else None
    with pytest.raises(PromptError, match="the prompt must hold an image token per image, found"):
        healthgpt.embed(ids, given)


def test_logits_that_are_not_finite_are_an_error():
    with open_golden("m3") as checkpoint:
        broken = HealthGPT.load(checkpoint, "comprehension")
    broken.lm_head.weight[7, 3] = float("nan")
    with pytest.raises(GenerationError, match="step 0: expected finite logits, found NaN or infinity"):
        broken.generate([5, 6, 7], None, 4)


# --- built from configurations, to be trained ---------------------------------------------------------------------


def fresh(task: str = "comprehension") -> HealthGPT:
    torch.manual_seed(0)
    with open_golden("m3") as checkpoint:
        return HealthGPT(
            checkpoint.language, checkpoint.vision, checkpoint.tasks[task], checkpoint.generation, checkpoint.tokens
        )


def test_a_fresh_adapter_changes_nothing():
    linear = fresh().model.layers[0].self_attn.qkv_proj
    x = torch.randn(3, 64)
    assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight))


def test_a_saved_model_opens_as_a_release(tmp_path):
    healthgpt = fresh().eval()
    for path in (path for name, path in arguments("m3").items() if name in ("base", "vision")):
        shutil.copytree(path, tmp_path / path.name, ignore=shutil.ignore_patterns("model*", "*.bin"))
    base, vision, plugin = (
        tmp_path / "Phi-3-mini-4k-instruct",
        tmp_path / "clip-vit-large-patch14-336",
        tmp_path / "p.bin",
    )
    save_file(healthgpt.base_state(416), base / "model.safetensors")
    save_file(healthgpt.vision_state(), vision / "model.safetensors")
    torch.save(healthgpt.plugin_state(rows=True), plugin)
    with Checkpoint.open(base, vision, comprehension=plugin) as checkpoint:
        assert checkpoint.tokens == SpecialTokens(411, 64)
        loaded = HealthGPT.load(checkpoint, "comprehension")
    assert loaded.state_dict().keys() == healthgpt.state_dict().keys()
    for name, tensor in healthgpt.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
