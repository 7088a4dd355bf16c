"""The nodes for ONNX Runtime's CUDA provider, in real sessions and a whole bundle, on this machine's CPU.

The library is built of the CUDA sources for the host's fibers and registered for the CPU provider in place of CUDA's:
all but CUDA itself, ONNX Runtime's provider for it and the time that things take is as on a GPU.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import ExitStack
from typing import Any

import numpy as np
import onnxruntime
import pytest
from cmake_build import ROOT, build
from onnx import numpy_helper
from test_onnxruntime_library import (
    AROUND,
    BLOCK_SIZE,
    FLOAT,
    HEADS,
    STORED,
    WRONG_AROUND,
    around_operands,
    attention_operands,
    attention_results,
    hlora_operands,
    linear_operands,
    model,
    open_session,
    run,
    tensor,
)

from healthgpt_edge import load, phantoms
from healthgpt_edge.errors import ExecutorError
from healthgpt_edge.executors.onnx import DEVICES
from healthgpt_edge.executors.onnx_memory import KernelMemory
from healthgpt_edge.export.bundle import export_bundle
from healthgpt_edge.export.checkpoint import Checkpoint
from healthgpt_edge.export.graph.functions import (
    cached_attention,
    caches,
    hlora_linear,
    linear,
    norm_swish,
    packed_cached_attention,
)
from healthgpt_edge.export.phantom.release import released_files

# Of the largest result. Up to 64 rows x is the sum of two float16, above it is rounded to one; bfloat16 has 8 bits
# where that has 11.
FEW_ROWS, MANY_ROWS = 3e-6, 1e-3
BFLOAT16_ROUNDS = 8
# Whole graphs beside the standard bodies: a prompt's linears and the caches round to float16; in int4 the bodies'
# product rounds activations to 8 bits, which these kernels do not.
LOGITS = {"fp16": 5e-3, "bf16": 4e-2, "int4": 8e-2}


@pytest.fixture(scope="module")
def library():
    (found,) = build("healthgpt_onnxruntime_cuda_host").rglob("healthgpt_onnxruntime_cuda_host.so")
    return found


def near(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max(initial=0))


def tolerance(storage: str, rows: int) -> float:
    return (FEW_ROWS if rows <= 64 else MANY_ROWS) * (BFLOAT16_ROUNDS if storage == "bfloat16" else 1)


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("rows", [0, 1, 33, 65])
@pytest.mark.parametrize("outputs", [24, 33])
def test_linear(library, storage, rows, outputs):
    """Rows that begin where wide loads may, rows that the node copies so that they do, and int4 rows within a byte."""
    operands = linear_operands((1, rows, 70), outputs, storage, True)
    (found,) = run("Linear", operands, {"y": FLOAT}, kernels=library, block_size=BLOCK_SIZE)
    body = linear(STORED[storage], True)
    (expected,) = run("Linear", operands, {"y": FLOAT}, body=body, block_size=BLOCK_SIZE)
    near(found, expected, tolerance(storage, rows))


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 40])
def test_hlora_linear(library, storage, rows):
    operands, more = hlora_operands(storage, storage, rows=rows), {"block_size": BLOCK_SIZE, "experts": 4}
    (found,) = run("HLoraLinear", operands, {"y": FLOAT}, kernels=library, **more)
    body = hlora_linear(STORED[storage], STORED[storage], True)
    (expected,) = run("HLoraLinear", operands, {"y": FLOAT}, body=body, **more)
    near(found, expected, tolerance(storage, 2 * rows))  # there are two sequences of them


@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 40])
def test_panels(library, storage, rows):
    """They are put in rows when they are copied to the GPU."""
    more: Any = {"block_size": BLOCK_SIZE, "experts": 4}
    expected, found = (
        run(
            "HLoraLinear",
            hlora_operands(storage, storage, True, rows, 384, panels),
            {"y": FLOAT},
            kernels=library,
            **more,
        )[0]
        for panels in (False, True)
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("op", AROUND)
@pytest.mark.parametrize("storage", ["float16", "int4"])
@pytest.mark.parametrize("rows", [1, 20, 40])
def test_what_stands_around_a_linear(library, op, storage, rows):
    """One launch, two of 32 rows or less, and many: there are two sequences of `rows`."""
    operands, bodies = around_operands(op, storage, rows)
    more = {"block_size": BLOCK_SIZE, "experts": 4, **AROUND[op]}
    (found,) = run(op, operands, {"y": FLOAT}, kernels=library, **more)
    (expected,) = run(op, operands, {"y": FLOAT}, body=bodies, **more)
    near(found, expected, tolerance(storage, 2 * rows))


@pytest.mark.parametrize(("op", "wrong", "attributes", "message"), WRONG_AROUND)
def test_what_cannot_stand_around_a_linear_is_named(library, op, wrong, attributes, message):
    operands, _ = around_operands(op, "float16")
    more = {"block_size": BLOCK_SIZE, "experts": 4, **AROUND[op], **attributes}
    with pytest.raises(Exception) as caught:  # onnxruntime's own exceptions share no public base class
        run(op, operands | wrong, {"y": FLOAT}, kernels=library, **more)
    assert f"{op}: " in str(caught.value) and message in str(caught.value)


def test_weights_that_are_no_constants_are_refused(library):
    """They would lie on the CPU."""
    operands, more = linear_operands((5, 70), 24, "float16", True), {"block_size": BLOCK_SIZE}
    operands["weight"] = numpy_helper.to_array(operands["weight"])
    with pytest.raises(Exception, match="weight must be a constant on a GPU"):
        run("Linear", operands, {"y": FLOAT}, kernels=library, **more)


def test_sessions_share_equal_matrices(library):
    """And matrices that only look equal are none of it: of large ones all bytes are compared."""
    held = ctypes.CDLL(str(library)).HealthGptMatrixBytes
    held.restype = ctypes.c_int64
    gc.collect()  # sessions of other tests
    before, random = held(), np.random.default_rng(0)
    first = random.standard_normal((700, 72)).astype(np.float16)
    second = first.copy()
    second[351, 7] += 1  # none of the bytes that are looked at first

    def opened(weight: np.ndarray) -> Any:
        operands = {"x": np.ones((3, 700), np.float32), "weight": tensor("weight", weight), "weight_scale": None}
        operands["bias"] = None
        session = open_session(model("Linear", operands, {"y": FLOAT}, block_size=0), library)
        (found,) = session.run(None, {"x": operands["x"]})
        np.testing.assert_allclose(found[0], weight.astype(float).sum(0), atol=1e-3)
        return session

    sessions = [opened(first), opened(first)]
    assert held() - before == first.nbytes
    sessions.append(opened(second))
    assert held() - before == 2 * first.nbytes
    del sessions[0]  # the other one still holds it
    assert held() - before == 2 * first.nbytes
    sessions.clear()
    assert held() == before


@pytest.mark.parametrize("cache", ["float16", "int8"])
@pytest.mark.parametrize("tokens", [0, 2, 40])
def test_cached_attention(library, cache, tokens):
    operands = attention_operands(cache, tokens=tokens, capacity=90)
    more = HEADS | {"window": 0}
    found = run("CachedAttention", operands, attention_results(cache), kernels=library, **more)
    expected = [operands["query"], *(operands[f"past_{kind}"] for kind in caches(STORED[cache]))]
    if tokens:
        expected = run(
            "CachedAttention", operands, attention_results(cache), body=cached_attention(STORED[cache]), **more
        )
    near(found[0], expected[0], 1e-5)
    for present, wanted in zip(found[1:], expected[1:], strict=True):
        assert present.dtype == wanted.dtype
        one = 1 if cache == "int8" and present.dtype == np.int8 else 1e-6  # a rotated key may fall to either of two
        np.testing.assert_allclose(present.astype(float), wanted.astype(float), rtol=2e-3, atol=one)


@pytest.mark.parametrize("cache", ["float16", "int8"])
def test_packed_attention_is_that_of_its_parts(library, cache):
    apart = attention_operands(cache, tokens=3)
    packed = np.concatenate([apart.pop(name) for name in ("query", "key", "value")], axis=-1)
    operands, results = {"packed": packed, **apart}, attention_results(cache)
    more = HEADS | {"window": 0}
    found = run("PackedCachedAttention", operands, results, kernels=library, sizes=[32, 16, 16], **more)
    for one, wanted in zip(
        found,
        run("CachedAttention", attention_operands(cache, tokens=3), results, kernels=library, **more),
        strict=True,
    ):
        np.testing.assert_array_equal(one, wanted)
    # Without its kernel it is the other node's.
    bodies = [packed_cached_attention(STORED[cache]), cached_attention(STORED[cache])]
    body = run("PackedCachedAttention", operands, results, body=bodies, sizes=[32, 16, 16], **more)
    near(found[0], body[0], 1e-5)


@pytest.mark.parametrize("shape", [(2, 5, 7, 8), (1, 1, 3, 32)], ids=str)
def test_norm_and_swish(library, shape):
    random = np.random.default_rng(0)
    sizes = {"x": shape, "norm_weight": shape[-1:], "norm_bias": shape[-1:]}
    operands = {name: random.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    (found,) = run("NormSwish", operands, {"y": FLOAT}, kernels=library, groups=4)
    (expected,) = run("NormSwish", operands, {"y": FLOAT}, body=norm_swish(), groups=4)
    near(found, expected, 1e-6)


@pytest.mark.parametrize(
    ("op", "operands", "results", "more", "message"),
    [
        ("Linear", linear_operands((5, 70), 24, "float32", True), {"y": FLOAT}, {"block_size": 0}, "found float32"),
        (
            "CachedAttention",
            attention_operands("float16") | {"sine": np.zeros((1, 2, 4), np.float32)},
            attention_results("float16"),
            HEADS | {"window": 0},
            "sine must be [2, 2, 4], found [1, 2, 4]",
        ),
    ],
)
def test_what_the_kernels_do_not_take_is_named(library, op, operands, results, more, message):
    with pytest.raises(Exception) as caught:  # onnxruntime's own exceptions share no public base class
        run(op, operands, results, kernels=library, **more)
    assert f"{op}: " in str(caught.value) and message in str(caught.value)


# --- a whole bundle ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The trained phantom: fp16; bf16; int4, with caches of bytes."""
    folder = tmp_path_factory.mktemp("cuda-bundles")
    with Checkpoint.open(**released_files(ROOT / "phantom")) as checkpoint:
        for precision in ("fp16", "bf16"):
            export_bundle(checkpoint, folder / precision, precision=precision, block_size=32)
        export_bundle(checkpoint, folder / "int4", precision="int4", cache="int8", block_size=32)
    return folder


@pytest.fixture
def cuda(library, monkeypatch):
    """--device cuda, on the CPU; what ONNX Runtime does of it on a GPU alone, graphs among it, it ignores here."""
    here = {"provider": "CPUExecutionProvider", "memory": "cpu", "library": library, "step_tokens": 320}
    monkeypatch.setitem(DEVICES, "cuda", DEVICES["cuda"]._replace(**here))


class Runs:
    """Every pass of language graphs: its CUDA graph's number, and what it was bound to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, Any]] = []
        plain = onnxruntime.InferenceSession.run_with_iobinding

        def spy(session: Any, binding: Any, options: Any = None) -> None:
            if options is not None:  # the standard bodies on the CPU know nothing of graphs
                self.seen.append((options.get_run_config_entry("gpu_graph_id"), binding))
            plain(session, binding, options)

        monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", spy)


def test_a_question_about_a_picture(bundles, cuda):
    """All of it by the CUDA sources: tower, prompt and decode steps give the ids of the standard bodies."""
    question = next(iter(phantoms.questions(phantoms.held_out(1)[0])))
    found, expected = (
        load(bundles / "fp16", tasks=("comprehension",), threads=1, verify=False, **how)
        for how in ({"device": "cuda"}, {"kernels": False})
    )
    assert found.executor.name == "onnx-cuda+kernels+graphs"
    answers = [one.answer(question.picture, question.text, max_new_tokens=4) for one in (found, expected)]
    assert answers[0].token_ids == answers[1].token_ids and len(answers[0].token_ids) > 1


@pytest.mark.parametrize(
    ("precision", "task"), [("fp16", "comprehension"), ("bf16", "generation"), ("int4", "generation")]
)
def test_a_prompt_and_its_steps(bundles, cuda, monkeypatch, precision, task):
    found, expected = (
        load(bundles / precision, tasks=(task,), threads=1, verify=False, **how)
        for how in ({"device": "cuda"}, {"kernels": False})
    )
    ids, runs = np.arange(80), Runs(monkeypatch)
    wanted = expected.executor.context(task, None).forward(ids, last_positions=4)
    runs.seen.clear()
    context = found.executor.context(task, None)
    logits = [context.forward(ids[:75])[:0], context.forward(ids[75:77], 1)]
    logits += [context.forward(ids[at : at + 1]) for at in (77, 78, 79)]
    near(np.concatenate(logits), wanted, LOGITS[precision])
    (prompt, _), (pair, _), *steps = runs.seen
    # A prompt is no graph. Steps of a size are one, bound once.
    assert prompt == "-1" and len(set(steps)) == 1 and len({prompt, pair, steps[0][0]}) == 3


def test_memory_and_graphs_are_used_again(bundles, cuda, monkeypatch):
    session = load(bundles / "fp16", tasks=("comprehension",), threads=1, verify=False, device="cuda")
    runs, executor = Runs(monkeypatch), session.executor

    def step(context: Any) -> np.ndarray:
        context.forward(np.array([3, 4]))
        return context.forward(np.array([7]))

    first = executor.context("comprehension", None)
    logits = step(first)
    second = executor.context("comprehension", np.full((256, 128), 3, np.float32))  # while the first is there
    np.testing.assert_array_equal(step(second), logits)
    del first
    third = executor.context("comprehension", None)
    np.testing.assert_array_equal(step(third), logits)
    steps = runs.seen[1::2]
    assert {number for number, _ in runs.seen[::2]} == {"-1"} and steps[0] == steps[2] != steps[1]
    # Where the caches grow, what they hold is kept, and the graph is another.
    third.length = 319
    third.forward(np.array([7]))
    rows = third.caches(320)
    third.forward(np.array([8]))
    assert runs.seen[-2] == steps[2] and runs.seen[-1][0] not in ("-1", steps[2][0])
    for name, one in third.caches(321).items():
        np.testing.assert_array_equal(one[:, :, :320], rows[name])


def test_the_caches_of_a_picture_have_room_for_its_codes(bundles, cuda, monkeypatch):
    """Growing them ends the CUDA graphs of the steps."""
    monkeypatch.setitem(DEVICES, "cuda", DEVICES["cuda"]._replace(step_tokens=16))
    session = load(bundles / "fp16", tasks=("generation",), threads=1, verify=False, device="cuda")
    context = session.executor.context("generation", None)
    context.forward(np.arange(7))
    size = context.memory_bytes
    context.length = 7 + session.bundle.manifest.codes.grid**2 - 1
    context.forward(np.array([3]))
    assert context.memory_bytes == size
    context.forward(np.arange(16))
    assert context.memory_bytes > size


def test_a_pass_of_drafts_has_the_bits_of_plain_steps(bundles, cuda):
    session = load(bundles / "fp16", tasks=("comprehension",), threads=1, verify=False, device="cuda")
    assert session.drafts.agree("comprehension")


def test_where_a_node_is_not_on_the_gpu_there_are_no_graphs(bundles, cuda, monkeypatch):
    plain = onnxruntime.InferenceSession.__init__

    def refuse(session: Any, path: str, options: Any, **more: Any) -> None:
        if "enable_cuda_graph" in more["providers"][0][1]:
            raise RuntimeError("This session cannot use the graph capture feature as requested by the user")
        plain(session, path, options, **more)

    monkeypatch.setattr(onnxruntime.InferenceSession, "__init__", refuse)
    session = load(bundles / "fp16", tasks=("comprehension",), threads=1, verify=False, device="cuda")
    assert session.executor.name == "onnx-cuda+kernels"


def test_a_provider_that_does_not_start(bundles, cuda, monkeypatch):
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda session: [])
    with pytest.raises(
        ExecutorError, match=r"^CPUExecutionProvider could not start, for want of a GPU, CUDA or cuDNN$"
    ):
        load(bundles / "fp16", tasks=("comprehension",), device="cuda", verify=False)


def test_an_fp32_bundle_runs_on_the_standard_bodies(golden_bundle, bundles, cuda, monkeypatch):
    """In float32 throughout, and that alone: without TF32, which keeps 10 of its 23 bits."""
    settings: list[dict[str, str]] = []
    plain = onnxruntime.InferenceSession.__init__

    def spy(session: Any, path: str, options: Any, **more: Any) -> None:
        settings.append(more["providers"][0][1])
        plain(session, path, options, **more)

    monkeypatch.setattr(onnxruntime.InferenceSession, "__init__", spy)
    session = load(golden_bundle("qwen"), device="cuda", verify=False)
    assert session.executor.name == "onnx-cuda" and session.executor.group("comprehension", 2) is None
    searched = {"cudnn_conv_algo_search": "HEURISTIC"}
    assert settings and all(one == {"use_tf32": "0"} | searched for one in settings)
    settings.clear()
    load(bundles / "fp16", tasks=("comprehension",), device="cuda", verify=False)
    assert settings and all(searched.items() <= one.items() and "use_tf32" not in one for one in settings)
    settings.clear()
    load(golden_bundle("qwen"), verify=False)
    assert settings and not any(settings)


# --- several sequences ----------------------------------------------------------------------------------------------


def test_requests_done_together_get_what_they_get_alone(bundles, cuda, monkeypatch):
    session = load(bundles / "fp16", tasks=("comprehension",), threads=1, verify=False, device="cuda")
    asked = {"What is it?": 4, "Where?": 9, "Is it there?": 6}
    assert session.group("comprehension", 2) is not None  # compares, once
    runs, together = Runs(monkeypatch), session.together(2)
    for words, tokens in asked.items():
        together.answer(words, None, words, max_new_tokens=tokens)
    made = {words: answer.token_ids for words, answer, _ in together}
    assert len(runs.seen) < sum(asked.values())  # or each was done by itself
    for words, tokens in asked.items():
        alone = session.answer(None, words, max_new_tokens=tokens, draft="none")
        assert made[words] == alone.token_ids and len(made[words]) > 1


class Members:
    """Sequences of a group, and the same ones by themselves."""

    def __init__(self, executor: Any, task: str, sequences: int) -> None:
        self._executor, self._task = executor, task
        self.group = executor.group(task, sequences)
        self._alone: dict[Any, Any] = {}

    def join(self, seats: ExitStack, length: int) -> None:
        context = self._executor.context(self._task, None)
        context.forward(np.arange(length, 2 * length))
        member = seats.enter_context(self.group.join(context))
        self._alone[member] = context
        seats.callback(self._alone.pop, member)

    def step(self, rows: int = 1) -> None:
        """Give each of them so many tokens, in a pass for all and in passes of their own."""
        ids = {member: np.arange(member.length, member.length + rows) for member in self._alone}
        found = self.group.forward(ids, ())
        for member, context in self._alone.items():
            np.testing.assert_array_equal(found[member], context.forward(ids[member], last_positions=rows))
            assert member.length == context.length


@pytest.fixture
def short_caches(cuda, monkeypatch):
    monkeypatch.setitem(DEVICES, "cuda", DEVICES["cuda"]._replace(step_tokens=32))


@pytest.mark.parametrize(("precision", "task"), [("fp16", "generation"), ("int4", "comprehension")])
def test_sequences_have_the_bits_of_plain_steps(bundles, short_caches, precision, task):
    """While others come and go, and when the caches, of bytes too, grow with all that is in them."""
    executor = load(bundles / precision, tasks=(task,), threads=1, verify=False, device="cuda").executor
    members = Members(executor, task, 3)
    with ExitStack() as seats, ExitStack() as first:
        for one, length in ((first, 7), (seats, 30), (seats, 3)):
            members.join(one, length)
        members.step()
        first.close()  # the last one takes its place
        members.step(2)
        members.join(seats, 5)
        members.step()  # the second one has 34 tokens now
        members.step(12)
    with ExitStack() as seats:  # where others were
        members.join(seats, 2)
        members.join(seats, 40)
        members.step()


def test_graphs_of_a_group_stay_until_its_caches_move(bundles, short_caches, monkeypatch):
    session = load(bundles / "fp16", tasks=("comprehension",), threads=1, verify=False, device="cuda")
    released: list[str] = []
    monkeypatch.setattr(
        onnxruntime.InferenceSession, "release_captured_graph", lambda _, number: released.append(str(number))
    )
    runs, members = Runs(monkeypatch), Members(session.executor, "comprehension", 3)

    def graph(members: Members) -> str:
        runs.seen.clear()
        members.step()
        return runs.seen[0][0]

    graphs = []
    for _ in range(2):
        with ExitStack() as seats:
            members.join(seats, 3)
            one = graph(members)
            members.join(seats, 4)
            graphs.append([one, graph(members)])
    assert graphs[0] == graphs[1] and len({"-1", *graphs[0]}) == 3 and not released
    with ExitStack() as seats:
        members.join(seats, 33)
        assert set(graphs[0]) <= set(released)
        last = graph(members)
        assert last not in ("-1", *graphs[0])
    released.clear()
    del members
    assert released == [last]


def test_what_is_not_copied_is_found_out(bundles, short_caches, monkeypatch):
    """Then requests are done one by one."""
    session = load(bundles / "fp16", tasks=("comprehension",), threads=1, verify=False, device="cuda")
    monkeypatch.setattr(KernelMemory, "copy", lambda *what: None)
    assert session.group("comprehension", 2) is None


def test_a_library_that_cannot_copy_is_an_older_one():
    """As where the package was brought up to date and its kernels were not."""
    without = DEVICES["cpu"].library
    with pytest.raises(ExecutorError, match=f"^{without.name} must be of this version, found an older one: "):
        KernelMemory("cuda", without)


def test_a_copy_that_fails_says_what_cuda_says(bundles, short_caches, monkeypatch):
    session = load(bundles / "fp16", tasks=("comprehension",), threads=1, verify=False, device="cuda")
    members = Members(session.executor, "comprehension", 2)
    monkeypatch.setattr(session.executor._memory, "_copy_rows", lambda *what: b"an illegal memory access")
    with (
        ExitStack() as seats,
        pytest.raises(ExecutorError, match=r"^caches cannot be copied on the GPU: an illegal memory access$"),
    ):
        members.join(seats, 3)
