"""The runtime's public calls: what they take, what they give, and that a device needs no exporter for them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from command import run
from golden_cases import Case
from PIL import Image
from tolerances import FEATURES, LOGITS_SAME_ARITHMETIC

import healthgpt_edge
from healthgpt_edge import Sampling, Session, load
from healthgpt_edge.agreement import random_grid, random_pixels
from healthgpt_edge.bundle import Bundle
from healthgpt_edge.errors import (
    BundleError,
    ExecutorError,
    GenerationError,
    HealthGPTError,
    ImageError,
    OptionError,
    PromptError,
)
from healthgpt_edge.executors.onnx import DEVICES
from healthgpt_edge.export.bundle import export_bundle
from healthgpt_edge.export.checkpoint import Checkpoint
from healthgpt_edge.export.phantom.release import released_files
from healthgpt_edge.images import prepare, read_image
from healthgpt_edge.inference import Run

QUESTION = "What is in the image?"
COM, GEN = Case("m3_com_wide"), Case("m3_gen_wide")


@pytest.fixture(scope="module")
def session(golden_bundle) -> Session:
    """Both tasks of M3 resident."""
    return load(golden_bundle("m3"), threads=1)


@pytest.fixture(scope="module")
def locked_picture(session):
    """The golden picture, made once."""
    return cache(lambda: session.generate(GEN.image, GEN.question))


def refusal(kind: type[HealthGPTError], call) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Enough(Exception):
    """What a listener raises that has heard enough."""


def enough(piece: str) -> None:
    raise Enough


# --- pictures in ----------------------------------------------------------------------------------------------------


def test_a_picture_may_come_in_any_form(session):
    with Image.open(COM.image) as opened:
        picture = opened.convert("RGB")
    sources = [COM.image, str(COM.image), COM.image.read_bytes(), picture, np.asarray(picture)]
    answers = [session.answer(source, COM.question, max_new_tokens=8) for source in sources]
    assert [answer.token_ids for answer in answers] == [COM.record["output_ids"][:8]] * len(sources)


def test_a_file_object_is_no_picture(session):
    with COM.image.open("rb") as file:
        message = refusal(ImageError, lambda: session.answer(file, QUESTION))
    assert message == "expected a path, bytes, a PIL image or an array as the picture, found BufferedReader"


def test_no_picture_is_another_prompt(session):
    case = Case("m3_com_text")
    answer = session.answer(None, case.question, max_new_tokens=64)
    assert (answer.prompt_ids, answer.token_ids) == (case.record["input_ids"], case.record["output_ids"])
    assert answer.timings_ms["vision"] == 0
    with pytest.raises(TypeError):
        session.answer(QUESTION)


def test_a_picture_from_words_alone(session):
    picture = session.generate(None, GEN.question)
    assert -200 not in picture.prompt_ids
    assert picture.codes != GEN.record["vq_indices"] and len(picture.codes) == 1024
    assert (picture.pixels.shape, picture.pixels.dtype) == ((256, 256, 3), np.uint8)


@pytest.mark.parametrize(("option", "value"), [("frame", 0), ("window", (40, 400))])
def test_options_of_a_picture_need_one(session, option, value):
    message = "frame and window need an image, got none"
    assert refusal(ImageError, lambda: session.answer(None, QUESTION, **{option: value})) == message
    assert refusal(ImageError, lambda: session.generate(None, QUESTION, **{option: value})) == message


# --- text out -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m3_com_wide", "m3_com_square", "phi4_com", "qwen_com"])
def test_streamed_pieces_add_up_to_the_text(golden_bundle, name):
    case = Case(name)
    session = load(golden_bundle(case.system), tasks=iter(["comprehension"]), threads=1)
    pieces: list[str] = []
    answer = session.answer(case.image, case.question, max_new_tokens=case.max_new_tokens, on_text=pieces.append)
    assert answer.token_ids == case.record["output_ids"]
    assert "".join(pieces) == answer.text
    assert len(pieces) > 3 and all(pieces)
    # The same without anyone listening.
    assert session.answer(case.image, case.question, max_new_tokens=case.max_new_tokens).text == answer.text


def test_streamed_pieces_add_up_wherever_the_answer_is_cut(session):
    """Also in the middle of a character, which is held back until the end."""
    case = Case("m3_com_square")
    held_back = 0
    for limit in range(1, 25):
        pieces: list[str] = []
        answer = session.answer(case.image, case.question, max_new_tokens=limit, on_text=pieces.append)
        assert "".join(pieces) == answer.text
        streamer = session.tokenizer.streamer()
        held_back += "".join(map(streamer.push, answer.token_ids)) != answer.text
    assert held_back


def test_text_comes_while_it_is_written(session):
    """The first piece is there before the run is over: a listener that raises ends it."""
    with pytest.raises(Enough):
        session.answer(COM.image, COM.question, max_new_tokens=4000, on_text=enough)


def test_the_stop_token_is_among_the_ids_and_not_in_the_text(session):
    stops = session.bundle.manifest.decoding.stop_ids
    ids = COM.record["output_ids"]
    assert ids[-1] in stops
    answer = session.answer(COM.image, COM.question)
    assert answer.token_ids == ids
    assert answer.text == session.tokenizer.decode(ids[:-1])
    assert session.tokenizer.decode(ids) != answer.text


def test_special_tokens_within_an_answer_are_not_in_its_text(session, monkeypatch):
    """As the original prints answers: neither in the pieces nor in the whole."""
    words = session.tokenizer.encode("in the image")
    codes = session.bundle.manifest.codes
    ids = [*words, codes.first, codes.newline, *words, session.bundle.manifest.decoding.stop_ids[-1]]

    class Said:
        def __init__(self, *arguments) -> None:
            self.on_token = arguments[-1]

        def steps(self):
            for token_id in ids:
                self.on_token(token_id)
            return Run([], ids, "none", [1], True, 0)
            yield

    monkeypatch.setattr("healthgpt_edge.session.Inference", Said)
    pieces: list[str] = []
    answer = session.answer(None, QUESTION, on_text=pieces.append)
    assert "".join(pieces) == answer.text == session.tokenizer.decode(words + words)


# --- sampling -------------------------------------------------------------------------------------------------------


def test_sampled_answers_follow_their_seed(session):
    def ids(seed: int, **options: float) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed, **options)
        return session.answer(COM.image, COM.question, max_new_tokens=20, sampling=sampling).token_ids

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)
    greedy = session.answer(COM.image, COM.question, max_new_tokens=20).token_ids
    assert greedy == COM.record["output_ids"][:20]
    assert ids(1) != greedy
    assert ids(1, top_p=1e-6) == greedy


def test_sampled_pictures_are_full_grids_too(session):
    sampling = Sampling(temperature=2.0, top_p=0.9, seed=3)
    picture = session.generate(GEN.image, GEN.question, sampling=sampling)
    assert len(picture.codes) == 1024 and set(picture.codes) <= set(range(64))
    assert picture.token_ids[-1] == session.bundle.manifest.codes.end
    assert picture.codes != GEN.record["vq_indices"]


# --- pictures out ---------------------------------------------------------------------------------------------------


def test_progress_counts_the_tokens(session, locked_picture):
    counts: list[int] = []
    picture = session.generate(GEN.image, GEN.question, on_code=counts.append)
    assert counts == list(range(1, 1026))
    assert picture.codes == locked_picture().codes == GEN.record["vq_indices"]
    np.testing.assert_array_equal(picture.pixels, locked_picture().pixels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"faithful": True, "max_new_tokens": 2}, "a picture needs exactly 1024 codes, the model gave 1"),
        ({"faithful": True, "max_new_tokens": 1030}, "a picture needs exactly 1024 codes, the model gave 1029"),
        ({"max_new_tokens": 1024}, "max_new_tokens must be at least 1025 for 1024 codes, got 1024"),
        ({"max_new_tokens": "all"}, "max_new_tokens must be at least 1025 for 1024 codes, got 'all'"),
        ({"faithful": True, "max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"faithful": True, "max_new_tokens": -5}, "max_new_tokens must be at least 1, got -5"),
    ],
)
def test_runs_that_make_no_picture(session, options, message):
    kind = GenerationError if message.startswith("a picture") else OptionError
    assert refusal(kind, lambda: session.generate(GEN.image, GEN.question, **options)) == message


def free_codes(session: Session, *pieces: str) -> list[int]:
    ids = [session.tokenizer.added_id(piece) or session.tokenizer.model.token_to_id(piece) for piece in pieces]
    return session._free_codes(ids)


def test_a_free_run_is_read_as_the_original_reads_it(session):
    """Every number in the text without its last eight characters, whatever stands around it."""
    assert free_codes(session, "<idx_3>", "<pixel_newline>", "<idx_63>", "<end_index>", "<|end|>") == [3, 63]
    assert free_codes(session, "<idx_3>", "<idx_4>") == [3]
    assert free_codes(session, "<idx_3>", "<idx_63>", "a") == [3]
    assert free_codes(session, "<idx_3>", "7", "7", "<|end|>") == [3, 77]
    assert free_codes(session, "▁are", "<|end|>") == []
    # Longer than Python turns into a number without being told to.
    message = refusal(GenerationError, lambda: free_codes(session, *["7"] * 5000, "<|end|>"))
    assert message == "codes must be numbers, the model gave 5000 digits"


def test_a_free_run_with_a_number_that_is_no_code(session, monkeypatch):
    monkeypatch.setattr(session, "_free_codes", lambda ids: [*range(64)] * 16)
    assert session.generate(GEN.image, GEN.question, faithful=True, max_new_tokens=2).codes == [*range(64)] * 16
    monkeypatch.setattr(session, "_free_codes", lambda ids: [64] * 1024)
    message = refusal(
        GenerationError, lambda: session.generate(GEN.image, GEN.question, faithful=True, max_new_tokens=2)
    )
    assert message == "codes must be below 64, the model gave 64"


# --- prompts and limits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "limit"), [("answer", 1024), ("generate", 1100)])
def test_a_prompt_and_its_answer_must_fit_the_positions(session, call, limit):
    """By default an answer may be as long as the original's, and so may a picture with its newlines."""
    words = "image " * 4000
    message = refusal(PromptError, lambda: getattr(session, call)(None, words))
    assert message.startswith("prompt and new tokens must fit 4096 positions, got ")
    assert message.endswith(f" + {limit}")
    message = refusal(PromptError, lambda: session.answer(None, QUESTION, max_new_tokens=4096 - 23))
    assert message == "prompt and new tokens must fit 4096 positions, got 24 + 4073"
    # One less begins to answer.
    with pytest.raises(Enough):
        session.answer(None, QUESTION, max_new_tokens=4096 - 24, on_text=enough)


def test_a_pictures_patches_count_as_positions(session):
    patches = session.bundle.manifest.vision.patches
    prompt = len(COM.record["input_ids"]) - 1 + patches
    message = refusal(PromptError, lambda: session.answer(COM.image, COM.question, max_new_tokens=4097 - prompt))
    assert message == f"prompt and new tokens must fit 4096 positions, got {prompt} + {4097 - prompt}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the question must hold words, got none"),
        (" \n\t", "the question must hold words, got none"),
        ("x" * 131_073, "the question must have at most 131072 characters, got 131073"),
        ("\ud800", "text must be valid Unicode"),
        (3, "the question must be text, got int"),
    ],
)
def test_unusable_words(session, words, message):
    assert message in refusal(PromptError, lambda: session.answer(COM.image, words))
    assert message in refusal(PromptError, lambda: session.generate(COM.image, words))


@pytest.mark.parametrize("limit", [0, -1, 2.5, "5", None, True])
def test_an_answer_has_at_least_one_token(session, limit):
    """And a whole number of them: one of 2.5 is never reached, and the answer would go on."""
    message = refusal(OptionError, lambda: session.answer(COM.image, QUESTION, max_new_tokens=limit))
    assert message == f"max_new_tokens must be at least 1, got {limit!r}"


def test_numpys_whole_numbers_are_some(session):
    assert len(session.answer(COM.image, QUESTION, max_new_tokens=np.int64(2)).token_ids) == 2


@pytest.mark.parametrize("sampling", [0.7, {"temperature": 0.7}])
def test_sampling_is_described_by_its_class(session, sampling):
    message = refusal(OptionError, lambda: session.answer(COM.image, QUESTION, sampling=sampling))
    assert message == f"sampling must be a Sampling or None, got {type(sampling).__name__}"


# --- tasks ----------------------------------------------------------------------------------------------------------


def test_tasks_in_turn_do_not_change_each_other(session, locked_picture):
    """Answer, picture, answer, picture in one session: each as in a session of its own."""
    for _ in range(2):
        answer = session.answer(COM.image, COM.question)
        assert answer.token_ids == COM.record["output_ids"]
        assert locked_picture().codes == GEN.record["vq_indices"]
        picture = session.generate(GEN.image, GEN.question, faithful=True, max_new_tokens=1025)
        assert picture.token_ids == GEN.record["output_ids"]


def test_a_session_of_one_task(golden_bundle):
    session = load(golden_bundle("m3"), tasks=("comprehension",), threads=1)
    assert session.answer(COM.image, COM.question, max_new_tokens=4).token_ids == COM.record["output_ids"][:4]
    message = refusal(ExecutorError, lambda: session.generate(GEN.image, GEN.question))
    assert message == "the executor was opened for comprehension, not for generation"


def test_tasks_that_a_bundle_has_not(golden_bundle):
    for name in ("drawing", "generation"):
        message = refusal(BundleError, lambda name=name: load(golden_bundle("qwen"), tasks=(name,)))
        assert message == f"the bundle has no {name} plugin, only comprehension"
    for tasks in ((), "comprehension"):
        message = refusal(BundleError, lambda tasks=tasks: load(golden_bundle("qwen"), tasks=tasks))
        assert message == f"tasks must be some of comprehension, got {tasks!r}"
    qwen = load(golden_bundle("qwen"), threads=1)
    assert refusal(BundleError, lambda: qwen.generate(None, "Draw.")) == "the bundle has no generation plugin"


def test_what_a_bundle_has_not_is_said_before_its_weights_are_hashed(golden_bundle, monkeypatch):
    """That reads gigabytes."""
    hashed = []
    monkeypatch.setattr(Bundle, "verify", lambda self, skip=(), **_: hashed.append(skip) or 0)
    refusal(BundleError, lambda: load(golden_bundle("qwen"), tasks=("generation",)))
    assert hashed == [("weights/",)]
    load(golden_bundle("qwen"), threads=1)
    assert hashed == [("weights/",), ("weights/",), ()]


def test_executors_and_devices_that_are_not_there(golden_bundle):
    path = golden_bundle("qwen")
    assert (
        refusal(ExecutorError, lambda: load(path, executor="magic"))
        == "executor must be onnx or tensorrt, found 'magic'"
    )
    assert refusal(ExecutorError, lambda: load(path, device="tpu")) == "device must be cpu or cuda, found 'tpu'"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
        message = refusal(ExecutorError, lambda: load(path, device="cuda"))
    assert message == "device cuda needs CUDAExecutionProvider; this onnxruntime has CPUExecutionProvider"


def test_kernels_and_standard_bodies_compute_the_same(golden_bundle):
    ids, results = np.array([5, 6, 7, 8]), []
    vision = Bundle.open(golden_bundle("m3")).manifest.vision
    pixels = prepare(read_image(COM.image), vision.image_size, vision.background)
    for kernels in (True, False):
        session = load(golden_bundle("m3"), threads=1, kernels=kernels)
        assert session.executor.name == ("onnx-cpu+kernels" if kernels else "onnx-cpu")
        features = session.executor.features("comprehension", pixels)
        results.append((features, session.executor.context("comprehension", features).forward(ids, last_positions=4)))
    (features, logits), (expected_features, expected_logits) = results
    np.testing.assert_allclose(features, expected_features, rtol=0, atol=FEATURES)
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=LOGITS_SAME_ARITHMETIC)


def test_kernels_that_are_not_built_or_cannot_be_opened(golden_bundle, tmp_path, monkeypatch):
    path, library = golden_bundle("qwen"), tmp_path / "healthgpt_onnxruntime.so"
    monkeypatch.setitem(DEVICES, "cpu", DEVICES["cpu"]._replace(library=library))
    assert load(path, threads=1).executor.name == "onnx-cpu"
    library.write_bytes(b"no library")
    message = refusal(ExecutorError, lambda: load(path, threads=1))
    assert message.startswith("ONNX Runtime cannot load healthgpt_onnxruntime.so: ") and str(tmp_path) not in message
    assert load(path, threads=1, kernels=False).executor.name == "onnx-cpu"


def test_a_command_says_that_kernels_are_not_built(golden_bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(DEVICES, "cpu", DEVICES["cpu"]._replace(library=tmp_path / "healthgpt_onnxruntime.so"))
    words = ["answer", golden_bundle("qwen"), "--question", "What?", "--max-new-tokens", "1", "--json"]
    outcome = run(*words)
    assert (outcome.code, outcome.json["executor"]) == (0, "onnx-cpu")
    assert outcome.errors.startswith("note: the native kernels are not built") and outcome.errors.count("\n") == 1
    assert run(*words, "--no-kernels").errors == ""  # wanted so


def test_a_command_says_what_panels_cost_without_kernels(tmp_path):
    for layout in ("panels", "rows"):
        with Checkpoint.open(**released_files(Path(__file__).parents[2] / "phantom")) as checkpoint:
            export_bundle(checkpoint, tmp_path / layout, precision="int4", block_size=32, layout=layout)
    words = ["--question", "What?", "--max-new-tokens", "1", "--json"]
    outcome = run("answer", tmp_path / "panels", *words, "--no-kernels")
    assert outcome.code == 0 and outcome.errors.count("\n") == 1
    assert outcome.errors.startswith("note: the weights lie in panels") and "export --layout rows" in outcome.errors
    assert run("answer", tmp_path / "panels", *words).errors == ""
    assert run("answer", tmp_path / "rows", *words, "--no-kernels").errors == ""


def test_a_failure_of_the_engine_is_an_error_and_nothing_on_stderr(session, capfd):
    message = refusal(ExecutorError, lambda: session.executor.picture(np.full((32, 32), 64)))
    assert message.startswith("ONNX Runtime failed in the codes graph of generation: ")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("threads", [0, -1, 1_000_000, 1.5, "2", True])
def test_a_number_of_threads_that_is_none(golden_bundle, threads):
    """ONNX Runtime would take 0 and -1 for all of them, and a million for a million."""
    message = refusal(ExecutorError, lambda: load(golden_bundle("m3"), threads=threads))
    assert message == f"threads must be from 1 to 1024, got {threads!r}"


def test_the_number_of_threads_changes_no_token(golden_bundle):
    ids = [
        load(golden_bundle("m3"), tasks=("comprehension",), threads=threads).answer(COM.image, COM.question).token_ids
        for threads in (1, 2, None)
    ]
    assert ids == [COM.record["output_ids"]] * 3


def test_threads_that_wait_leave_the_cores_to_others(golden_bundle):
    """Each graph has threads of its own, and the next one's need what they would take by spinning."""
    session = load(golden_bundle("m3"), threads=4)
    session.generate(GEN.image, GEN.question)
    begin = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - begin < 0.02


def test_graphs_of_pictures_give_their_memory_back(golden_bundle):
    """And only these: a row of the vocabulary is asked for with every token of a free run."""
    executor, asked = load(golden_bundle("m3"), threads=1).executor, {}

    class Asked:
        def __init__(self, role, honest):
            self.role, self.honest = role, honest

        def run(self, names, feeds, options):
            try:
                asked[self.role] = options.get_run_config_entry("memory.enable_memory_arena_shrinkage")
            except RuntimeError:  # it was not said
                asked[self.role] = None
            return self.honest.run(names, feeds, options)

    for role in ("vision", "codes", "vocabulary"):
        executor._sessions["generation", role] = Asked(role, executor.session("generation", role))
    manifest = executor.bundle.manifest
    executor.features("generation", random_pixels(manifest))
    executor.picture(random_grid(manifest))
    executor.run("generation", "vocabulary", {"hidden": np.zeros((1, 1, manifest.language.hidden), np.float32)})
    assert asked == {"vision": "cpu:0", "codes": "cpu:0", "vocabulary": None}


def test_a_session_may_be_asked_from_several_threads(session):
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(session.answer, COM.image, COM.question) for _ in range(8)]
        assert [future.result().token_ids for future in futures] == [COM.record["output_ids"]] * 8


# --- what a device installs -----------------------------------------------------------------------------------------

ONLY_THE_RUNTIME = """
import importlib.abc, sys

class Forbid(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors",
                                  "sentencepiece", "yaml"} or name.startswith("healthgpt_edge.export"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Forbid())
sys.argv = ["healthgpt-edge", *sys.argv[1:]]
from healthgpt_edge import cli
cli.main()
"""


def without_exporter(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ONLY_THE_RUNTIME, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_runtime_needs_nothing_of_the_exporter(golden_bundle, tmp_path):
    words = ("--max-new-tokens", 4, "--threads", 1, "--json")
    done = without_exporter("answer", golden_bundle("m3"), "--question", QUESTION, "--image", COM.image, *words)
    assert (done.returncode, done.stderr) == (0, "")
    done = without_exporter("inspect", golden_bundle("m3"))
    assert (done.returncode, done.stderr) == (0, "")
    for command in (
        ["export", "--base", "b", "--vision", "v", "--out", tmp_path / "o"],
        ["demo", "--out", tmp_path / "o"],
    ):
        done = without_exporter(*command)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {command[0]} needs ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_importing_the_runtime_imports_no_heavy_module():
    program = (
        "import json, sys, healthgpt_edge, healthgpt_edge.cli, healthgpt_edge.evaluation\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    modules = set(json.loads(done.stdout))
    assert {"numpy", "PIL", "tokenizers"} <= modules
    assert not modules & {"torch", "transformers", "onnx", "onnxruntime", "pydicom", "safetensors", "scipy"}


def test_the_public_names():
    names = {"Answer", "Cancelled", "HealthGPTError", "Picture", "Sampling", "Session", "load"}
    names |= {"read_study", "write_image", "write_report"}
    assert set(healthgpt_edge.__all__) == names
    assert all(hasattr(healthgpt_edge, name) for name in names)


def test_stdout_that_cannot_hold_an_answer(golden_bundle):
    """Text beyond the terminal's encoding is spelled out, not a failure after the work is done."""
    words = ["answer", golden_bundle("m3"), "--question", QUESTION, "--max-new-tokens", "40", "--threads", "1"]
    plain = run(*words).output
    assert not plain.isascii()
    done = subprocess.run(
        [sys.executable, "-m", "healthgpt_edge.cli", *map(str, words)],
        capture_output=True,
        timeout=120,
        env={"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "0"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == plain.encode("ascii", "backslashreplace")
