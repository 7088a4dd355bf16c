"""The TensorRT executor on engines that are doubles: the original's ids through the graphs that TensorRT gets."""

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
from engine_doubles import HostKernels, host_executor
from golden_cases import CASES, Case
from tolerances import IMAGE_LEVELS, IMAGE_SHARE, LOGITS_SAME_ARITHMETIC

from healthgpt_edge.bundle import Bundle
from healthgpt_edge.errors import ExecutorError
from healthgpt_edge.executors import Choice
from healthgpt_edge.executors.onnx import OnnxExecutor
from healthgpt_edge.executors.tensorrt_context import DECODE, PREFILL, TensorRtContext
from healthgpt_edge.export.engines.build import default_settings
from healthgpt_edge.prompt import Tokenizer, with_patches
from healthgpt_edge.session import Session

MAX_CONTEXT, MAX_ROWS = 1400, 8
GENERATION = Case("m3_gen_wide")


@pytest.fixture(scope="module")
def opened(golden_bundle, tmp_path_factory):
    """Gives a golden system's bundle, its executor on doubles, and the passes that it was asked for."""

    @cache
    def give(system):
        bundle = Bundle.open(golden_bundle(system))
        context = min(MAX_CONTEXT, bundle.manifest.language.max_positions)
        settings = default_settings(bundle.manifest, max_context=context, max_rows=MAX_ROWS)
        tasks = tuple(sorted(bundle.manifest.tasks))
        return bundle, *host_executor(bundle, tasks, settings, tmp_path_factory.mktemp(system))

    return give


def session_of(bundle, executor):
    tokenizer = bundle.manifest.tokenizer
    return Session(bundle, executor, Tokenizer.load(bundle.file(tokenizer.file), tokenizer.options))


@pytest.mark.parametrize("case", [case for case in CASES if case.task == "comprehension"], ids=str)
def test_answers_have_the_originals_ids(opened, case):
    bundle, executor, _ = opened(case.system)
    result = session_of(bundle, executor).answer(case.image, case.question, max_new_tokens=case.max_new_tokens)
    assert result.token_ids == case.record["output_ids"]


def test_two_threads_do_not_get_each_others_answers(opened, monkeypatch):
    """All sequences share the buffers of a pass."""
    bundle, executor, _ = opened("m3")
    session, upload = session_of(bundle, executor), TensorRtContext._upload

    def slowly(context, token_ids):
        upload(context, token_ids)
        time.sleep(0.002)  # in which another would overwrite what was uploaded

    monkeypatch.setattr(TensorRtContext, "_upload", slowly)
    cases = [Case("m3_com_wide"), Case("m3_com_square")]

    def ask(case):
        return session.answer(case.image, case.question, max_new_tokens=case.max_new_tokens).token_ids

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(ask, cases)) == [case.record["output_ids"] for case in cases]


def test_a_free_picture_has_the_originals_ids(opened):
    """Free: with the rows of the vocabulary that the language engine leaves out."""
    bundle, executor, _ = opened("m3")
    result = session_of(bundle, executor).generate(
        GENERATION.image, GENERATION.question, faithful=True, max_new_tokens=GENERATION.max_new_tokens
    )
    assert result.token_ids == GENERATION.record["output_ids"]
    difference = np.abs(result.pixels.astype(int) - GENERATION.arrays["image_uint8"])
    assert difference.max() <= IMAGE_LEVELS and (difference > 0).mean() <= IMAGE_SHARE


@pytest.fixture
def choosing(opened, monkeypatch):
    """Gives `opened`'s bundle and executor with kernels that choose tokens, and the sizes of what is downloaded."""

    def give(system):
        bundle, executor, _ = opened(system)
        device, sizes = executor.device, []
        download = device.download

        def counted(memory, shape, dtype, offset=0):
            sizes.append(shape)
            return download(memory, shape, dtype, offset)

        monkeypatch.setattr(device, "kernels", HostKernels())
        monkeypatch.setattr(device, "download", counted)
        return bundle, executor, sizes

    return give


@pytest.mark.parametrize("case", [case for case in CASES if case.task == "comprehension"], ids=str)
def test_answers_chosen_on_the_device_have_the_originals_ids(choosing, case):
    """With the penalty of Qwen2.5, too; the host gets logits once, of the prefill."""
    bundle, executor, sizes = choosing(case.system)
    session = session_of(bundle, executor)
    result = session.answer(case.image, case.question, max_new_tokens=case.max_new_tokens, draft="none")
    assert result.token_ids == case.record["output_ids"]
    rows = executor.language.rows["logits.comprehension"]
    assert [shape for shape in sizes if shape[-1] == rows] == [(1, rows)]


def test_a_picture_chosen_on_the_device_has_the_hosts_codes(choosing):
    bundle, executor, sizes = choosing("m3")

    def generate():
        return session_of(bundle, executor).generate(GENERATION.image, GENERATION.question, draft="none")

    found = generate()
    logits = [shape for shape in sizes if shape == (1, executor.language.rows["logits.generation"])]
    assert len(logits) == 1 and found.forward_passes == len(found.token_ids) - 1
    executor.device.kernels = None
    expected = generate()
    assert found.token_ids == expected.token_ids and found.tokens_by_pass == expected.tokens_by_pass


def test_an_answer_that_just_fits_the_caches_is_given(choosing, monkeypatch):
    """Its last token needs no place, and what would be chosen behind that is not asked for."""
    bundle, executor, _ = choosing("m3")
    case = Case("m3_com_wide")
    expected = case.record["output_ids"]
    assert len(expected) < case.max_new_tokens  # it ends by a stop token
    session = session_of(bundle, executor)

    def answer(max_context):
        settings = dataclasses.replace(executor.settings, max_context=max_context, prefill_rows=MAX_ROWS)
        monkeypatch.setattr(executor, "settings", settings)
        return session.answer(case.image, case.question, max_new_tokens=case.max_new_tokens, draft="none")

    language, vision = session.bundle.manifest.language, session.bundle.manifest.vision
    prompt = len(with_patches(answer(MAX_CONTEXT).prompt_ids, language.vocab, vision.patches))
    assert answer(prompt + len(expected) - 1).token_ids == expected
    with pytest.raises(ExecutorError, match="build with --max-context"):
        answer(prompt + len(expected) - 2)


def test_a_run_ahead_that_is_too_long_is_refused_before_it_is_written(choosing):
    _, executor, _ = choosing("m3")
    context = executor.context("comprehension", None)
    context.length = MAX_CONTEXT - 3
    with pytest.raises(ExecutorError, match=rf"engines hold {MAX_CONTEXT} tokens, found {MAX_CONTEXT + 1}: build with"):
        context.run_ahead(5, 4, Choice(np.ones(1, np.bool_), 1.0, np.zeros(1, np.bool_)))


def test_a_task_is_deaf_to_the_other_plugin(opened):
    """Both tasks in turn in one engine, as each alone in ONNX Runtime."""
    bundle, executor, _ = opened("m3")
    plain = OnnxExecutor(bundle, tuple(sorted(bundle.manifest.tasks)), threads=1, kernels=False)
    ids = np.arange(11)
    for task in ("generation", "comprehension", "generation"):
        found, expected = (one.context(task, None).forward(ids, 5) for one in (executor, plain))
        assert np.abs(found - expected).max() <= LOGITS_SAME_ARITHMETIC


@pytest.mark.parametrize("count, last_positions", [(1, 1), (8, 8), (9, 1), (30, 1), (30, 21), (30, 30), (17, 8)])
def test_passes_fit_the_engine_whatever_is_asked(opened, count, last_positions):
    """Logits of any number of rows, and never more in a pass than the engine was built for."""
    _, executor, passes = opened("m3")
    ids = np.arange(count) + 5
    expected = np.concatenate(
        [
            row
            for context in [executor.context("comprehension", None)]
            for row in (context.forward(ids[place : place + 1]) for place in range(count))
        ]
    )[-last_positions:]
    passes.clear()
    context = executor.context("comprehension", None)
    found = context.forward(ids, last_positions)
    assert context.length == count
    assert found.shape == expected.shape and np.abs(found - expected).max() <= LOGITS_SAME_ARITHMETIC
    assert sum(rows for _, _, rows in passes) == count
    for _, profile, rows in passes:
        assert profile == (DECODE if rows <= MAX_ROWS else PREFILL)
    assert len(passes) == max(1, -(-last_positions // MAX_ROWS))


def test_a_prefill_longer_than_a_pass_is_cut(opened, tmp_path):
    bundle, executor, passes = opened("m3")
    ids = np.arange(executor.settings.prefill_rows + 30) % 50
    passes.clear()
    context = executor.context("generation", None)
    found = context.forward(ids)
    assert [rows for _, _, rows in passes] == [executor.settings.prefill_rows, 30]
    plain = OnnxExecutor(bundle, ("generation",), threads=1, kernels=False).context("generation", None)
    assert np.abs(found - plain.forward(ids)).max() <= LOGITS_SAME_ARITHMETIC


def test_forgotten_tokens_leave_no_trace(opened):
    """A context that is set back, as after a wrong draft, and one whose caches were another's before."""
    _, executor, _ = opened("m3")
    ids = np.arange(12)
    expected = executor.context("comprehension", None).forward(ids)
    context = executor.context("comprehension", None)
    context.forward(ids[:6])
    context.forward(np.arange(40, 45))
    context.length = 6
    assert np.abs(context.forward(ids[6:]) - expected).max() <= LOGITS_SAME_ARITHMETIC


def test_a_context_that_is_too_long_is_refused_before_it_is_written(opened):
    _, executor, _ = opened("m3")
    context = executor.context("comprehension", None)
    context.length = MAX_CONTEXT - 1
    with pytest.raises(ExecutorError, match=rf"engines hold {MAX_CONTEXT} tokens, found {MAX_CONTEXT + 1}: build with"):
        context.forward(np.arange(2))


def test_a_task_that_was_not_opened_is_refused(opened, golden_bundle, tmp_path):
    bundle = Bundle.open(golden_bundle("m3"))
    executor, _ = host_executor(bundle, ("generation",), opened("m3")[1].settings, tmp_path)
    for call in (
        lambda: executor.features("comprehension", np.zeros(1)),
        lambda: executor.context("comprehension", None),
    ):
        with pytest.raises(ExecutorError, match="opened for generation, not for comprehension"):
            call()


def test_an_engine_that_is_not_of_this_bundle_is_refused(opened, golden_bundle, tmp_path):
    """The engine of one system under the manifest of another."""
    bundle, executor, _ = opened("m3")
    foreign = opened("phi4")[1].engine("language")
    executor = type(executor)(bundle, ("comprehension",), executor.device, executor.settings, executor._open)
    executor._engines.clear()
    executor._open = lambda name: foreign
    with pytest.raises(ExecutorError, match=r"engine language: .* must be .* by the manifest, found"):
        executor.engine("language")
