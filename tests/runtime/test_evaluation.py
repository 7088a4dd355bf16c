"""Scores against known values, files of cases, and what two bundles make of the same cases."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import export_options, run
from golden_cases import GOLDEN
from golden_cases import Case as Golden
from PIL import Image

from healthgpt_edge import load, phantoms
from healthgpt_edge.errors import BundleError, RequestError
from healthgpt_edge.evaluation import Case, Evaluation, Outcome, check_cases, evaluate, read_cases
from healthgpt_edge.evaluation.cases import question_case, task_case
from healthgpt_edge.evaluation.divergence import next_tokens
from healthgpt_edge.evaluation.scores import chance, is_right, picture_scores, psnr, recall, ssim
from healthgpt_edge.images import prepare, read_image
from healthgpt_edge.session import Session

COM, GEN = Golden("m3_com_wide"), Golden("m3_gen_wide")
WIDE, SQUARE = GOLDEN / "images/wide.png", GOLDEN / "images/square.png"


# --- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "right", "share"),
    [
        ("Upper left", True, 1.0),
        (" upper LEFT.\n", True, 1.0),
        ("It is in the left, upper lobe", False, 1.0),
        ("upper", False, 0.5),
        ("", False, 0.0),
    ],
)
def test_answers_beside_the_expected_one(answer: str, right: bool, share: float) -> None:
    assert is_right(answer, "upper left") is right
    assert recall(answer, "upper left") == share


def test_an_expected_answer_without_words() -> None:
    assert (recall("?", "?"), recall("Yes", "?")) == (1.0, 0.0)


def test_chance_is_the_share_of_the_most_frequent_answer() -> None:
    assert chance(["Yes", "yes.", "No", " YES "]) == 0.75


def test_psnr_of_known_errors() -> None:
    black = np.zeros((8, 8), dtype=np.uint8)
    assert psnr(black, black) == float("inf")
    assert psnr(black, np.full((8, 8), 255, dtype=np.uint8)) == pytest.approx(0.0)
    assert psnr(black, np.full((8, 8, 3), 10, dtype=np.uint8)) == pytest.approx(28.1308, abs=1e-4)


def test_ssim_of_equal_flat_and_inverted_pictures() -> None:
    picture = phantoms.phantom(0).mr
    assert ssim(picture, picture) == pytest.approx(1.0)
    assert ssim(picture, 255 - picture) < 0.1
    # Flat pictures have no structure: only the luminance term (2ab + c1) / (a^2 + b^2 + c1) is left.
    flat = ssim(np.full((9, 9), 100), np.full((9, 9), 50))
    assert flat == pytest.approx((2 * 100 * 50 + 6.5025) / (100**2 + 50**2 + 6.5025))


def test_ssim_of_noise_is_the_mean_over_its_windows() -> None:
    """By the definition, a window at a time, with covariances as NumPy computes them of a sample."""
    first, second = np.random.default_rng(0).integers(0, 256, (2, 9, 10)).astype(float)
    c1, c2 = 6.5025, 58.5225
    found = []
    for row in range(3):
        for column in range(4):
            a, b = (one[row : row + 7, column : column + 7].ravel() for one in (first, second))
            covariance = np.cov(a, b, ddof=1)
            luminance = (2 * a.mean() * b.mean() + c1) / (a.mean() ** 2 + b.mean() ** 2 + c1)
            found.append(luminance * (2 * covariance[0, 1] + c2) / (np.trace(covariance) + c2))
    assert ssim(first, second) == pytest.approx(np.mean(found), rel=1e-9)


@pytest.mark.parametrize("score", [psnr, ssim])
def test_pictures_of_different_shapes_are_refused(score: Any) -> None:
    with pytest.raises(
        ValueError, match=r"expected two pictures of one shape, at least 7x7, got \(8, 8\) and \(8, 9\)"
    ):
        score(np.zeros((8, 8)), np.zeros((8, 9)))


def test_means_are_by_kind_and_leave_out_what_failed() -> None:
    def outcome(kind: str, expected: str, exact: float, error: str | None = None) -> Outcome:
        scores = {} if error else {"exact": exact}
        return Outcome(Case("", kind, "comprehension", "?", expected=expected), error=error, scores=scores)

    result = Evaluation(
        [
            outcome("count", "None", 1.0),
            outcome("count", "None", 0.0),
            outcome("count", "Two", 1.0),
            outcome("count", "Two", 1.0, error="no"),
            outcome("modality", "CT", 0.0),
        ]
    )
    count = {"total": 3, "exact": pytest.approx(2 / 3), "chance": pytest.approx(2 / 3)}
    assert result.means("comprehension") == {"count": count, "modality": {"total": 1, "exact": 0.0, "chance": 1.0}}
    assert result.means("generation") == {}
    assert result.to_json()["failed"] == 1


def test_chance_on_the_held_out_set_is_what_the_odds_say() -> None:
    asked = [question for subject in phantoms.held_out(100) for question in phantoms.questions(subject)]
    means = Evaluation([Outcome(question_case(one), scores={"exact": 1.0}) for one in asked]).means("comprehension")
    assert means["modality"]["chance"] == 0.5
    assert 0.5 < means["lesion"]["chance"] < 0.7
    assert 0.3 < means["count"]["chance"] < 0.5
    assert 0.25 <= means["where"]["chance"] < 0.5


def test_a_baseline_is_scored_beside_the_picture() -> None:
    target = phantoms.phantom(0).ct
    worse = np.clip(target.astype(int) + 10, 0, 255).astype(np.uint8)
    scores = picture_scores(np.repeat(worse[..., None], 3, axis=2), target, np.zeros_like(target))
    assert scores["psnr"] == pytest.approx(psnr(worse, target))
    assert scores["baseline_psnr"] < scores["psnr"] and scores["baseline_ssim"] < scores["ssim"]


# --- files of cases -------------------------------------------------------------------------------------------------


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "cases.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_a_file_of_cases(tmp_path: Path) -> None:
    asked = {"task": "answer", "image": "a.dcm", "question": "Why?", "expected": "No", "frame": 2, "window": [40, 400]}
    made = {"task": "generate", "instruction": "Draw.", "expected": "/far/b.png", "kind": "free", "id": "x"}
    assert read_cases(written(tmp_path, asked, "", made)) == [
        Case(1, "answer", "comprehension", "Why?", tmp_path / "a.dcm", "No", frame=2, window=(40, 400)),
        Case("x", "free", "generation", "Draw.", expected=Path("/far/b.png")),
    ]


ASK = {"task": "answer", "question": "Why?", "expected": "No"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "cases.jsonl must have at least one case, a line of JSON, found none"),
        ([ASK, "{"], "cases.jsonl line 2: a line must be a JSON object, at character 2: "),
        ([ASK | {"task": "cancel"}], "cases.jsonl line 1: task must be one of answer, generate, found 'cancel'"),
        ([ASK | {"out": "a.png"}], "cases.jsonl line 1: answer takes question, expected, kind, image, frame, window, "),
        ([ASK | {"expected": 1}], "cases.jsonl line 1: expected must be a string, found 1"),
        ([ASK | {"kind": "\x1b[2J"}], "cases.jsonl line 1: kind must be printable, found control characters"),
        ([{"task": "answer"}], "cases.jsonl line 1: answer needs question, found none"),
        ([ASK | {"question": "x" * (1 << 20)}], "cases.jsonl line 1: a line must have at most 1048576 bytes, found"),
        ([ASK | {"image": "a\0b"}], "case 1: 'a\\x00b': cannot be opened: not a usable path"),
        ([ASK | {"image": "a.png"}], "case 1: a.png: cannot be opened: No such file or directory"),
        ([ASK | {"frame": 0}], "case 1: frame and window need an image, got none"),
        ([{"task": "answer", "question": "Why?"}], "case 1: expected is needed where nothing else is compared with"),
        ([ASK | {"question": " "}], "case 1: the question must hold words, got none"),
        ([{"task": "generate", "instruction": "Draw.", "expected": "a.png"}], "case 1: a.png: cannot be opened: "),
    ],
)
def test_a_case_that_is_none_is_found_before_the_first(golden_bundle, tmp_path: Path, lines: Any, message: str) -> None:
    outcome = run("evaluate", golden_bundle("m3"), "--cases", written(tmp_path, *lines), "--threads", 1)
    assert outcome.code == 2 and outcome.output == ""
    assert outcome.errors.startswith(f"error: {message}") and outcome.errors.count("\n") == 1


def test_too_many_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("healthgpt_edge.evaluation.cases.MAX_CASES", 2)
    with pytest.raises(RequestError, match=r"cases\.jsonl line 3: a file must have at most 2 cases, found more"):
        read_cases(written(tmp_path, ASK, ASK, ASK))


def test_a_file_that_is_not_there(golden_bundle, tmp_path: Path) -> None:
    outcome = run("evaluate", golden_bundle("m3"), "--cases", tmp_path / "none.jsonl")
    assert (outcome.code, outcome.errors) == (2, "error: none.jsonl: cannot be read: No such file or directory\n")
    outcome = run("evaluate", golden_bundle("m3"), "--cases", ".")
    assert (outcome.code, outcome.errors) == (2, "error: .: cannot be read: Is a directory\n")


def test_a_bundle_that_cannot_do_a_case(golden_bundle) -> None:
    case = Case(1, "generate", "generation", "Draw.", expected=np.zeros((8, 8), np.uint8))
    sessions = [load(golden_bundle(system), threads=1) for system in ("m3", "qwen")]
    message = f"case 1: the bundle '{sessions[1].bundle.path.name}' has no generation plugin, only comprehension"
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        check_cases([case], sessions)


def test_the_cases_are_not_overwritten(golden_bundle, tmp_path: Path) -> None:
    cases = written(tmp_path, ASK)
    outcome = run("evaluate", golden_bundle("m3"), "--cases", cases, "--details", tmp_path / "." / "cases.jsonl")
    assert (outcome.code, outcome.errors) == (2, "error: --details must not be the file of --cases\n")
    assert read_cases(cases)


def test_details_take_the_place_of_no_folder_or_device(golden_bundle, tmp_path: Path) -> None:
    """Found before hours are spent; and a device, /dev/null say, is not replaced, which root could do."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, found in {"folder": "a folder", "pipe": "a device or pipe"}.items():
        outcome = run("evaluate", golden_bundle("m3"), "--cases", written(tmp_path, ASK), "--details", tmp_path / name)
        assert (outcome.code, outcome.errors) == (2, f"error: --details must be a file, '{name}' is {found}\n")
    assert (tmp_path / "pipe").is_fifo()


def test_only_the_phantom_has_cases_of_its_own(golden_bundle) -> None:
    outcome = run("evaluate", golden_bundle("m3"), "--answer-phantoms", 1)
    message = "error: only a bundle of the phantom model has cases of its own: give --cases\n"
    assert (outcome.code, outcome.errors) == (2, message)


def test_phantoms_and_cases_exclude_each_other(golden_bundle, tmp_path: Path) -> None:
    words = ("--cases", written(tmp_path, ASK), "--picture-phantoms", 0)
    outcome = run("evaluate", golden_bundle("m3"), *words)
    message = "error: --picture-phantoms is for the phantom's own cases, found --cases as well\n"
    assert (outcome.code, outcome.errors) == (2, message)


def test_phantom_cases_are_the_questions_and_the_tasks() -> None:
    subject = phantoms.held_out(1)[0]
    asked, drawn = phantoms.questions(subject), phantoms.tasks(subject)
    first, last = question_case(asked[0]), task_case(drawn[-1])
    assert (first.words, first.expected, first.image is asked[0].picture) == (asked[0].text, asked[0].answer, True)
    assert last.expected is drawn[-1].target and last.baseline is drawn[-1].baseline


# --- two bundles ----------------------------------------------------------------------------------------------------

CASES = [
    Case("own", "closed", "comprehension", COM.question, COM.image, "Yes", max_new_tokens=9),
    Case("words", "closed", "comprehension", "Is there a lesion?", None, "No", max_new_tokens=40),
    Case("made", "picture", "generation", GEN.question, GEN.image, WIDE),
]


@pytest.fixture(scope="module")
def session(golden_bundle):
    return load(golden_bundle("m3"), threads=1)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """The same model in int4."""
    folder = tmp_path_factory.mktemp("rounded") / "m3"
    outcome = run("export", *export_options("m3"), "--out", folder, "--precision", "int4", "--block-size", 32)
    assert outcome.code == 0, outcome.errors
    return load(folder, threads=1)


def test_a_bundle_is_as_far_from_itself_as_nothing(session) -> None:
    result = evaluate(session, CASES, against=session)
    for outcome in result.outcomes:
        assert outcome.scores["same"] == outcome.scores["next_tokens"] == 1.0
        assert outcome.scores["divergence"] == pytest.approx(0.0, abs=1e-12)
        assert outcome.pixels is None
    made = result.outcomes[2].scores
    assert made["levels"] == 0.0 and made["reference_psnr"] == made["psnr"] and made["reference_ssim"] == made["ssim"]


def test_results_are_those_of_the_session_and_are_scored(session) -> None:
    result = evaluate(session, CASES)
    answer = session.answer(COM.image, COM.question, max_new_tokens=9)
    picture = session.generate(GEN.image, GEN.question)
    assert [one.case.name for one in result.outcomes] == ["own", "words", "made"]
    assert (result.outcomes[0].token_ids, result.outcomes[0].text) == (answer.token_ids, answer.text)
    target = prepare(read_image(WIDE), len(picture.pixels), session.bundle.manifest.vision.background)
    assert result.outcomes[2].scores == picture_scores(picture.pixels, target)
    assert result.means("comprehension")["closed"]["total"] == 2


def test_cases_done_together_have_the_same_results(session) -> None:
    alone, together = (evaluate(session, CASES, together=number).outcomes for number in (1, 3))
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert [one.scores for one in together] == [one.scores for one in alone]


def test_the_divergence_is_that_of_whole_prompts(session, rounded) -> None:
    """By the definition: softmax over everything, in one pass over prompt and ids."""
    case = CASES[1]
    ids = evaluate(session, [case]).outcomes[0].token_ids
    assert len(ids) == 40  # more than is compared in one pass

    def shares(one) -> np.ndarray:
        _, prompt = one.prompt(case.task, case.words, has_image=False)
        tokens = np.array([*prompt, *ids[:-1]])
        logits = one.executor.context(case.task, None).forward(tokens, last_positions=len(ids)).astype(np.float64)
        return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)

    found, expected = shares(rounded), shares(session)
    scores = next_tokens(rounded, session, case, ids)
    assert scores["divergence"] == pytest.approx((expected * np.log(expected / found)).sum() / len(ids), rel=1e-4)
    assert scores["divergence"] > 1e-4
    assert scores["next_tokens"] == (found.argmax(-1) == expected.argmax(-1)).mean()


def test_the_picture_of_a_case_is_looked_at(session, rounded) -> None:
    ids = evaluate(session, CASES[:1]).outcomes[0].token_ids
    with_picture = next_tokens(rounded, session, CASES[0], ids)
    without = next_tokens(rounded, session, Case("own", "closed", "comprehension", COM.question), ids)
    assert with_picture != without


def test_bundles_of_two_models_are_not_compared(session, golden_bundle) -> None:
    other = load(golden_bundle("qwen"), threads=1)
    with pytest.raises(BundleError, match="bundles that are compared must be of one model, found another template"):
        evaluate(session, CASES[:1], against=other)


def test_a_case_that_fails_leaves_the_others(session, golden_bundle, tmp_path: Path) -> None:
    most = session.bundle.manifest.language.max_positions
    lines = [
        ASK | {"max_new_tokens": most, "id": "long"},
        ASK | {"max_new_tokens": 2, "kind": "short"},
        {"task": "answer", "question": "What?", "max_new_tokens": 2, "kind": "short", "expected": "n/a"},
    ]
    details = tmp_path / "details.jsonl"
    words = ("--cases", written(tmp_path, *lines), "--details", details, "--threads", 1)
    outcome = run("evaluate", golden_bundle("m3"), *words, "--json")
    assert outcome.code == 2
    assert outcome.errors.startswith("error: 1 of 3 cases failed; long: prompt and new tokens must fit ")
    assert outcome.json["failed"] == 1 and outcome.json["answers"]["short"]["total"] == 2
    found = [json.loads(line) for line in details.read_text().splitlines()]
    assert [one["id"] for one in found] == ["long", 2, 3]
    assert "error" in found[0] and "exact" not in found[0]
    assert found[1].keys() == {"id", "kind", "text", "expected", "exact", "recall"}
    assert details.stat().st_mode & 0o077 == 0  # answers are a patient's data


def test_what_was_done_is_written_when_the_rest_is_not(golden_bundle, tmp_path: Path, monkeypatch) -> None:
    """Signals are raised as exceptions, in the midst of anything."""
    make = Session.generating

    def stopped(*arguments: Any) -> Any:
        raise KeyboardInterrupt
        yield from make(*arguments)

    monkeypatch.setattr(Session, "generating", stopped)
    made = {"task": "generate", "instruction": GEN.question, "expected": str(WIDE)}
    details = tmp_path / "details.jsonl"
    words = ("--cases", written(tmp_path, ASK | {"max_new_tokens": 2}, made), "--details", details, "--threads", 1)
    assert run("evaluate", golden_bundle("m3"), *words).code == 130
    (only,) = [json.loads(line) for line in details.read_text().splitlines()]
    assert only["id"] == 1 and "exact" in only
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cases.jsonl", "details.jsonl"]


def test_the_command_compares_two_bundles(golden_bundle, rounded, tmp_path: Path) -> None:
    Image.new("L", (40, 30), 90).save(tmp_path / "grey.png")
    lines = [
        {"task": "answer", "image": str(SQUARE), "question": "Is it bright?", "max_new_tokens": 4},
        {"task": "generate", "image": "grey.png", "instruction": GEN.question, "expected": "grey.png"},
    ]
    words = (golden_bundle("m3"), "--against", rounded.bundle.path, "--cases", written(tmp_path, *lines))
    outcome = run("evaluate", *words, "--threads", 1, "--together", 2, "--json")
    assert outcome.code == 0, outcome.errors
    apart = {"total", "same", "next_tokens", "divergence"}
    assert outcome.json["answers"]["answer"].keys() == apart
    picture = outcome.json["pictures"]["generate"]
    assert picture.keys() == apart | {"psnr", "ssim", "reference_psnr", "reference_ssim", "levels"}
    assert picture["divergence"] > 0
    table = run("evaluate", *words, "--threads", 1).output
    assert all(heading in table for heading in ("same ids", "next tokens", "nats", "PSNR dB", "levels"))
    assert f" {picture['psnr']:.2f} / {picture['reference_psnr']:.2f} " in table
