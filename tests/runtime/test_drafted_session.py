"""Drafts, certification, previews and kept pictures through the public calls and the command line."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from command import run
from free_rows import FreeRows
from golden_cases import Case
from PIL import Image

from healthgpt_edge import HealthGPTError, Sampling, load
from healthgpt_edge import inference as inference_module
from healthgpt_edge import previews as previews_module
from healthgpt_edge.drafting import PICTURE_DRAFTS, PassKind
from healthgpt_edge.drafting import drafts as drafts_module
from healthgpt_edge.drafting.costs import RowCosts
from healthgpt_edge.errors import BundleError, GenerationError, OptionError
from healthgpt_edge.executors.onnx import OnnxExecutor
from healthgpt_edge.prefixes import Prefix, Prefixes
from healthgpt_edge.previews import Previews

COM, GEN = Case("m3_com_wide"), Case("m3_gen_wide")
QUESTION = "What is in the image?"


def eager(golden_bundle, **options):
    session = load(golden_bundle("m3"), threads=1, **options)
    session.drafts.costs = defaultdict(FreeRows)
    return session


@pytest.fixture(scope="module")
def session(golden_bundle):
    return eager(golden_bundle)


@pytest.fixture
def rounding(monkeypatch):
    """An executor that the self-test finds to round by the size of a pass."""
    monkeypatch.setattr(drafts_module, "rows_agree", lambda executor, task: False)


def wrong_token(monkeypatch, drafted_only: bool = True):
    """Lets a drafted run change its third token, as an executor that rounds by the size of a pass might."""
    honest = inference_module.decoding

    def decoding(*arguments, drafter=None, **options):
        done = yield from honest(*arguments, drafter=drafter, **options)
        if drafter or not drafted_only:
            done.ids[2] ^= 1
        return done

    monkeypatch.setattr(inference_module, "decoding", decoding)


def message(kind: type[HealthGPTError], call) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


# --- the same pictures ----------------------------------------------------------------------------------------------


def test_every_draft_gives_the_original_picture(session):
    """The golden codes, whatever they are drafted from, and the passes add up."""
    for draft in PICTURE_DRAFTS:
        picture = session.generate(GEN.image, GEN.question, draft=draft)
        assert picture.codes == GEN.record["vq_indices"]
        assert picture.draft == {"auto": "input"}.get(draft, draft)
        assert picture.certified and picture.reused_tokens == 0
        assert sum(picture.tokens_by_pass) == len(picture.token_ids) == 1025
        assert len(picture.tokens_by_pass) == picture.forward_passes
        assert picture.accepted_per_pass == round(1025 / picture.forward_passes, 3)
        assert (picture.timings_ms["draft"] > 1) == (picture.draft == "input")
        assert (picture.forward_passes == 1024) == (draft == "none")


def test_sampled_pictures_are_those_of_the_seed(session):
    sampling = Sampling(temperature=0.7, top_p=0.95, seed=9)
    plain = session.generate(None, GEN.question, sampling=sampling, draft="none")
    drafted = session.generate(None, GEN.question, sampling=sampling)
    assert drafted.draft == "jacobi" and drafted.token_ids == plain.token_ids
    assert session.generate(None, GEN.question, draft="none").token_ids != plain.token_ids


def test_answers_are_drafted_from_words_that_came_before(session):
    """An answer that repeats itself takes fewer passes, and is the same."""
    for case in (COM, Case("m3_com_square")):
        plain = session.answer(case.image, case.question, max_new_tokens=case.max_new_tokens, draft="none")
        drafted = session.answer(case.image, case.question, max_new_tokens=case.max_new_tokens, certify=True)
        assert drafted.token_ids == plain.token_ids == case.record["output_ids"]
        assert (plain.draft, plain.certified, drafted.certified) == ("none", True, True)
        assert plain.forward_passes == len(plain.token_ids)
    # The second is long enough, and repeats itself.
    assert drafted.draft == "lookup" and drafted.forward_passes < plain.forward_passes


def test_a_short_answer_is_decoded_plainly(session):
    answer = session.answer(COM.image, COM.question, max_new_tokens=12)
    assert (answer.draft, answer.forward_passes, answer.accepted_per_pass) == ("none", 12, 1.0)


@pytest.mark.parametrize("call", ["answer", "generate"])
def test_a_draft_that_is_none(session, call):
    known = {"answer": "auto, lookup, none", "generate": "auto, input, jacobi, none"}[call]
    text = message(OptionError, lambda: getattr(session, call)(None, QUESTION, draft="magic"))
    assert text == f"draft must be one of {known}, got 'magic'"


@pytest.mark.parametrize(("draft", "tries"), [("auto", False), ("input", True)])
def test_the_time_of_the_encoder_is_lost_unless_it_was_asked_for(golden_bundle, monkeypatch, draft, tries):
    """An encoder as slow as the whole picture: nothing is left to lose on drafts that may be wrong."""
    drafts = eager(golden_bundle).drafts
    kind = PassKind("generation")
    costs = drafts.costs[kind] = RowCosts()
    for rows in (1, 8, 16):
        for _ in range(10):
            costs.record(rows, 1.0 + 0.05 * rows)
    grid = drafts.manifest.codes.grid
    clock = iter((0.0, 1.05 * grid**2))
    monkeypatch.setattr(drafts_module.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(OnnxExecutor, "draft", lambda executor, picture: np.zeros((grid, grid), np.int64))
    drafter = drafts.for_picture(draft, kind, Image.new("RGB", (8, 8)))
    assert drafter.name == "input"
    assert (max(drafter.pace.rows() for _ in range(4)) > 1) is tries


def test_drafts_from_an_input_need_one(session):
    text = message(OptionError, lambda: session.generate(None, QUESTION, draft="input"))
    assert text == "drafts from the input need a picture, got none"


def test_a_bundle_without_the_encoder_drafts_by_jacobi(golden_bundle, monkeypatch):
    drafts = eager(golden_bundle).drafts
    monkeypatch.delitem(drafts.manifest.tasks["generation"].graphs, "draft")
    picture = Image.new("RGB", (8, 8))
    assert drafts.for_picture("auto", PassKind("generation"), picture).name == "jacobi"
    text = message(BundleError, lambda: drafts.for_picture("input", PassKind("generation"), picture))
    assert text.startswith("task generation has no graph 'draft'")


def test_a_slow_encoder_is_left_out_by_auto(session):
    picture, kind = Image.new("RGB", (8, 8)), PassKind("generation")

    def chosen(plain: float) -> str:
        session.drafts.costs[kind].plain = plain
        return session.drafts.for_picture("auto", kind, picture).name

    assert chosen(1.0) == "input"
    assert chosen(1e-9) == "jacobi"  # a plain run would take no time beside it
    assert chosen(1.0) == "input"
    assert session.drafts.for_picture("auto", kind, None).name == "jacobi"


def test_a_slow_encoder_is_left_out_where_requests_are_always_done_together(golden_bundle):
    """Then nothing is known of a pass by itself, and those of the fewest sequences stand for it."""
    drafts = load(golden_bundle("m3"), threads=1).drafts
    picture, kind = Image.new("RGB", (8, 8)), PassKind("generation")
    for sequences in (3, 2):
        for seconds in (1e-9, 1e-9, 1e-9, 1e-9):
            drafts.costs[kind].among(sequences).record(1, seconds * sequences)
    assert drafts.costs[kind].plain_among_fewest == 2e-9
    names = [drafts.for_picture("auto", kind, picture).name for _ in range(2)]
    assert names == ["input", "jacobi"]  # the first one finds out


def test_costs_are_kept_for_each_kind_of_pass(golden_bundle):
    session = eager(golden_bundle)
    for temperature in (0.0, 0.5):
        session.answer(None, QUESTION, max_new_tokens=2, sampling=Sampling(temperature))
    message(GenerationError, lambda: session.generate(None, QUESTION, faithful=True, max_new_tokens=2))
    assert set(session.drafts.costs) == {
        PassKind("comprehension"),
        PassKind("comprehension", sampled=True),
        PassKind("generation", full_vocabulary=True),
    }


# --- exact, and known to be ------------------------------------------------------------------------------------------


def test_kernels_are_found_to_agree_and_are_asked_once(golden_bundle, monkeypatch):
    asked = []
    honest = drafts_module.rows_agree
    monkeypatch.setattr(drafts_module, "rows_agree", lambda *arguments: asked.append(1) or honest(*arguments))
    session = eager(golden_bundle)
    assert session.drafts.agree("generation") and session.drafts.agree("generation")
    assert len(asked) == 1


def test_an_executor_that_rounds_is_not_drafted_for_by_auto(golden_bundle, rounding):
    picture = eager(golden_bundle).generate(GEN.image, GEN.question)
    assert (picture.draft, picture.certified, picture.forward_passes) == ("none", True, 1024)
    assert picture.codes == GEN.record["vq_indices"]


def test_nor_is_an_answer(golden_bundle, rounding):
    """The very one that is drafted where passes agree."""
    case = Case("m3_com_square")
    answer = load(golden_bundle("m3"), threads=1).answer(case.image, case.question, max_new_tokens=case.max_new_tokens)
    assert (answer.draft, answer.certified) == ("none", True)
    assert answer.token_ids == case.record["output_ids"]


def test_a_comparison_certifies_an_executor_that_rounds(golden_bundle, rounding):
    session = eager(golden_bundle)
    picture = session.generate(GEN.image, GEN.question, draft="jacobi", certify=True)
    assert (picture.draft, picture.certified) == ("jacobi", True)
    assert picture.timings_ms["certify"] > 0


def test_an_answer_waits_for_its_certificate(session, monkeypatch):
    """Nothing is told of an answer that turns out to differ."""
    case = Case("m3_com_square")
    pieces: list[str] = []
    options = {"max_new_tokens": 40, "certify": True, "on_text": pieces.append}
    answer = session.answer(case.image, case.question, **options)
    assert "".join(pieces) == answer.text and len(pieces) > 3
    assert answer.draft == "lookup"
    pieces.clear()
    wrong_token(monkeypatch)
    text = message(GenerationError, lambda: session.answer(case.image, case.question, **options))
    assert "found another at token 2 of 40" in text and pieces == []


def test_certifying_fails_closed(golden_bundle, tmp_path, monkeypatch):
    words = ["generate", golden_bundle("m3"), "--instruction", GEN.question, "--image", GEN.image]
    words += ["--out", tmp_path / "out.png", "--progress", "--certify", "--draft", "jacobi", "--threads", "1"]
    monkeypatch.setattr(drafts_module, "RowCosts", FreeRows)
    wrong_token(monkeypatch)
    outcome = run(*words)
    assert (outcome.code, outcome.output) == (2, "")
    text = "drafted ids must be those of plain decoding, found another at token 2 of 1025; run again without drafts"
    assert outcome.errors == f"error: {text}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_command_says_what_is_not_certified(golden_bundle, tmp_path, monkeypatch, rounding):
    monkeypatch.setattr(drafts_module, "RowCosts", FreeRows)
    words = ["generate", golden_bundle("m3"), "--instruction", GEN.question, "--out", tmp_path / "out.png", "--json"]
    outcome = run(*words, "--draft", "jacobi", "--threads", "1")
    assert (outcome.code, outcome.json["certified"], outcome.json["draft"]) == (0, False, "jacobi")
    assert outcome.errors.startswith("note: not certified: ") and outcome.errors.count("\n") == 1


# --- previews -------------------------------------------------------------------------------------------------------


def previews(monkeypatch, share: float) -> tuple[Previews, dict[int, np.ndarray]]:
    monkeypatch.setattr("healthgpt_edge.previews._SHARE", share)
    seen: dict[int, np.ndarray] = {}
    return Previews(3, lambda grid: grid, lambda pixels, rows: seen.update({rows: pixels})), seen


def test_previews_show_the_rows_so_far_and_repeat_the_last(monkeypatch):
    made, seen = previews(monkeypatch, share=1e9)
    for code in range(9):
        made.add(code)
    assert {rows: grid.tolist() for rows, grid in seen.items()} == {
        1: [[0, 1, 2], [0, 1, 2], [0, 1, 2]],
        2: [[0, 1, 2], [3, 4, 5], [3, 4, 5]],
    }


def test_previews_take_little_of_the_time(monkeypatch):
    made, seen = previews(monkeypatch, share=0.0)
    for code in range(9):
        made.add(code)
    assert list(seen) == [1]


def test_previews_take_a_tenth_of_the_time(monkeypatch):
    """On a clock where a row takes a second and a preview two."""
    now, shown = 0.0, []

    def picture(grid):
        nonlocal now
        now += 2.05
        return grid

    monkeypatch.setattr(previews_module.time, "perf_counter", lambda: now)
    made = Previews(80, picture, lambda pixels, rows: shown.append(rows))
    for code in range(80**2):
        now += 1 / 80
        made.add(code)
    # Where 2.05 s of each preview so far are a tenth of rows and previews.
    assert shown == [1, 19, 37, 56, 74]


def test_progress_is_written_beside_the_picture_and_removed(golden_bundle, tmp_path, monkeypatch):
    written: list[str] = []
    honest = Image.Image.save

    def save(image, file, *arguments):
        written.extend(path.name for path in tmp_path.iterdir())
        honest(image, file, *arguments)

    monkeypatch.setattr(Image.Image, "save", save)
    monkeypatch.setattr("healthgpt_edge.previews._SHARE", 1e9)
    monkeypatch.setattr(OnnxExecutor, "picture", lambda executor, grid: np.zeros((8, 8, 3), np.uint8))
    out = tmp_path / "chest.png"
    words = ["--instruction", GEN.question, "--image", GEN.image, "--out", out, "--progress", "--threads", "1"]
    outcome = run("generate", golden_bundle("m3"), *words)
    assert (outcome.code, outcome.output) == (0, f"{out}\n")
    assert "chest.partial.png" in written
    assert [path.name for path in tmp_path.iterdir()] == ["chest.png"]


# --- kept pictures --------------------------------------------------------------------------------------------------

KEPT_BYTES = 64 << 20


def test_a_second_question_starts_after_the_picture(golden_bundle, session, monkeypatch):
    keeping = eager(golden_bundle, keep_pictures_bytes=KEPT_BYTES)
    case = Case("m3_com_square")
    questions = [COM.question, QUESTION, COM.question]
    expected = [session.answer(COM.image, question, max_new_tokens=20).token_ids for question in questions]
    answers = [keeping.answer(COM.image, question, max_new_tokens=20) for question in questions]
    assert [answer.token_ids for answer in answers] == expected
    patches = session.bundle.manifest.vision.patches
    assert answers[0].reused_tokens == 0
    assert [answer.reused_tokens for answer in answers[1:]] == [answers[0].prompt_ids.index(-200) + patches] * 2
    assert answers[0].timings_ms["vision"] > 0 and answers[1].timings_ms["vision"] == 0
    assert all(answer.certified for answer in answers)
    # Another picture finds nothing.
    assert keeping.answer(case.image, QUESTION, max_new_tokens=1).reused_tokens == 0


def test_a_command_asks_several_questions_about_one_picture(golden_bundle):
    words = ["answer", golden_bundle("m3"), "--image", COM.image, "--max-new-tokens", "12", "--threads", "1"]
    single = [run(*words, "--question", question) for question in (COM.question, QUESTION)]
    asked = ["--question", COM.question, "--question", QUESTION]
    assert run(*words, *asked).output == "".join(outcome.output for outcome in single)
    answers = run(*words, *asked, "--json").json["answers"]
    assert [answer["text"] + "\n" for answer in answers] == [outcome.output for outcome in single]
    assert answers[0]["reused_tokens"] == 0 < answers[1]["reused_tokens"]
    assert run(*words, *asked[:2], "--json").json["token_ids"] == answers[0]["token_ids"]


def test_a_key_names_task_picture_and_tokens():
    pixels, ids = np.zeros((2, 3, 3), np.uint8), np.arange(4)
    keys = [
        Prefix.of("comprehension", pixels, ids),
        Prefix.of("generation", pixels, ids),
        Prefix.of("comprehension", pixels + np.uint8(1), ids),
        Prefix.of("comprehension", pixels.reshape(3, 2, 3), ids),
        Prefix.of("comprehension", pixels, ids[:3]),
        Prefix.of("comprehension", pixels, ids + 1),
    ]
    assert len(set(keys)) == len(keys)
    assert Prefix.of("comprehension", pixels.copy(), ids.copy()) == keys[0]


def test_a_long_answer_leaves_room_for_other_pictures(golden_bundle, session, monkeypatch):
    """What is kept of a picture is as large after it as after a short one; ids are the same as ever."""
    keeping = eager(golden_bundle, keep_pictures_bytes=KEPT_BYTES)
    for one in (keeping, session):  # no answer ends by itself
        manifest = one.bundle.manifest
        endless = replace(manifest, decoding=replace(manifest.decoding, stop_ids=()))
        monkeypatch.setattr(one.bundle, "manifest", endless)
    keeping.answer(COM.image, QUESTION, max_new_tokens=1)
    ((_, short),) = keeping.prefixes.kept()
    size_bytes = short.memory_bytes
    first, second = (keeping.answer(COM.image, QUESTION, max_new_tokens=300) for _ in range(2))
    assert len(first.token_ids) == 300
    ((_, kept),) = keeping.prefixes.kept()
    assert kept.memory_bytes <= size_bytes
    assert second.reused_tokens > 0
    expected = session.answer(COM.image, QUESTION, max_new_tokens=300).token_ids
    assert first.token_ids == second.token_ids == expected


def test_what_does_not_fit_by_itself_drops_no_other():
    prefixes = Prefixes(10)
    names = [Prefix("comprehension", f"{number:064x}", "0" * 64, 3) for number in range(3)]
    for name, memory_bytes in zip(names, (4, 5, 11), strict=True):
        prefixes.keep(name, SimpleNamespace(length=9, memory_bytes=memory_bytes))
    assert [name for name, _ in prefixes.kept()] == names[:2]


def test_what_two_requests_have_read_is_kept_as_the_later_one_leaves_it():
    """Each began before the other was done, so neither found anything."""
    prefixes = Prefixes(10)
    first, second = (Prefix("comprehension", f"{number:064x}", "0" * 64, 3) for number in range(2))
    for name in (first, second, first):
        prefixes.keep(name, SimpleNamespace(length=9, memory_bytes=4))
    assert [name for name, _ in prefixes.kept()] == [second, first]


def test_what_is_kept_is_in_one_request_at_a_time():
    prefixes, prefix = Prefixes(1), Prefix("comprehension", "0" * 64, "0" * 64, 3)
    context = SimpleNamespace(length=9, memory_bytes=1)
    prefixes.keep(prefix, context)
    assert prefixes.take(prefix) is context and context.length == 3
    assert prefixes.take(prefix) is None


def test_a_picture_that_differs_by_one_level_is_another(golden_bundle):
    keeping = load(golden_bundle("m3"), tasks=("comprehension",), threads=1, keep_pictures_bytes=KEPT_BYTES)
    pixels = np.full((336, 336, 3), 128, np.uint8)
    other = pixels.copy()
    other[:, :, 0] += 1
    reused = [keeping.answer(one, QUESTION, max_new_tokens=1).reused_tokens > 0 for one in (pixels, pixels, other)]
    assert reused == [False, True, False]


def test_nothing_is_kept_unless_asked_for_nor_after_forgetting(golden_bundle, session):
    assert [session.answer(COM.image, QUESTION, max_new_tokens=1).reused_tokens for _ in range(2)] == [0, 0]
    keeping = load(golden_bundle("m3"), tasks=("comprehension",), threads=1, keep_pictures_bytes=KEPT_BYTES)
    keeping.answer(COM.image, QUESTION, max_new_tokens=1)
    keeping.forget_pictures()
    assert keeping.answer(COM.image, QUESTION, max_new_tokens=1).reused_tokens == 0
    text = message(OptionError, lambda: load(golden_bundle("m3"), keep_pictures_bytes=-1))
    assert text == "keep_pictures_bytes must be 0 or above, got -1"


def test_kept_pictures_stay_within_their_bytes(golden_bundle):
    """The one not asked about for longest goes first; what is too large on its own is not kept."""
    keeping = load(golden_bundle("m3"), tasks=("comprehension",), threads=1, keep_pictures_bytes=KEPT_BYTES)
    pictures = [np.full((336, 336, 3), level, np.uint8) for level in (10, 20, 30)]

    def reused(number: int) -> bool:
        return keeping.answer(pictures[number], QUESTION, max_new_tokens=1).reused_tokens > 0

    assert not reused(0)
    (context,) = keeping.prefixes._contexts.values()
    keeping.prefixes.limit_bytes = 2 * context.memory_bytes
    assert [reused(1), reused(0), reused(2), reused(0), reused(1)] == [False, True, False, True, False]
    keeping.prefixes.limit_bytes = context.memory_bytes - 1
    assert [reused(1), reused(1)] == [True, False]


def test_a_request_that_failed_leaves_nothing_behind(golden_bundle):
    keeping = load(golden_bundle("m3"), tasks=("comprehension",), threads=1, keep_pictures_bytes=KEPT_BYTES)

    def fail(piece: str) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        keeping.answer(COM.image, COM.question, on_text=fail)
    assert keeping.answer(COM.image, COM.question, max_new_tokens=1).reused_tokens == 0


def test_kept_pictures_of_an_executor_that_rounds_are_not_certified(golden_bundle, rounding):
    options = {"tasks": ("comprehension",), "threads": 1}
    keeping = load(golden_bundle("m3"), keep_pictures_bytes=KEPT_BYTES, **options)
    assert not keeping.answer(COM.image, QUESTION, max_new_tokens=1).certified
    assert load(golden_bundle("m3"), **options).answer(COM.image, QUESTION, max_new_tokens=1).certified
