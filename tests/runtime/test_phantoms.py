"""Phantoms: seeded, in agreement with their own answers, and scored by figures worked out by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from healthgpt_edge import phantoms
from healthgpt_edge.evaluation.scores import psnr
from healthgpt_edge.phantoms import SIDE, Drawing, Lesion

SAMPLE = phantoms.held_out(40)


def test_a_seed_gives_the_same_phantom_and_another_seed_another() -> None:
    again = phantoms.phantom(3)
    assert np.array_equal(SAMPLE[3].ct, again.ct)
    assert np.array_equal(SAMPLE[3].mr, again.mr)
    assert SAMPLE[3].lesions == again.lesions
    assert not np.array_equal(SAMPLE[3].ct, SAMPLE[4].ct)


def test_pictures_are_grey_and_of_one_size() -> None:
    for subject in SAMPLE:
        for picture in (subject.ct, subject.mr):
            assert picture.shape == (SIDE, SIDE)
            assert picture.dtype == np.uint8
            assert picture.max() > 150
            assert picture[:3].mean() < 20  # air around the head


def test_both_modalities_show_one_anatomy_in_different_brightness() -> None:
    for subject in SAMPLE:
        head = subject.ct > 40
        assert (head & (subject.mr > 10)).sum() > 0.9 * head.sum()
    bone = SAMPLE[0].ct > 200
    assert SAMPLE[0].mr[bone].mean() < 0.5 * SAMPLE[0].ct[bone].mean()


def test_lesions_are_bright_apart_and_off_the_middle_lines() -> None:
    seen = 0
    for subject in SAMPLE:
        for lesion in subject.lesions:
            row, column = int(lesion.row), int(lesion.column)
            assert min(abs(lesion.row - SIDE / 2), abs(lesion.column - SIDE / 2)) > 8
            assert subject.mr[row, column] > 190
            seen += 1
        for first, second in zip(subject.lesions, subject.lesions[1:], strict=False):
            assert np.hypot(first.row - second.row, first.column - second.column) > first.radius + second.radius
    assert seen > 20


def test_every_count_and_quadrant_occurs() -> None:
    assert {len(subject.lesions) for subject in SAMPLE} == {0, 1, 2, 3}
    quadrants = {
        q.answer for subject in phantoms.held_out(80) for q in phantoms.questions(subject) if q.kind == "where"
    }
    assert quadrants == {"upper left", "upper right", "lower left", "lower right"}


@pytest.mark.parametrize(
    ("row", "column", "quadrant"),
    [(20, 20, "upper left"), (20, 90, "upper right"), (90, 20, "lower left"), (90, 90, "lower right")],
)
def test_quadrant_of_a_lesion(row: float, column: float, quadrant: str) -> None:
    assert Lesion(row, column, 5.0).quadrant == quadrant


def test_questions_follow_the_lesions() -> None:
    one = next(subject for subject in SAMPLE if len(subject.lesions) == 1)
    none = next(subject for subject in SAMPLE if not subject.lesions)
    about_one = [(q.kind, q.answer) for q in phantoms.questions(one)]
    where = ("where", one.lesions[0].quadrant)
    assert about_one == [
        *[("modality", "CT"), ("lesion", "Yes"), ("count", "One"), where],
        *[("modality", "MR"), ("lesion", "Yes"), ("count", "One"), where],
    ]
    assert [q.answer for q in phantoms.questions(none)] == ["CT", "No", "None", "MR", "No", "None"]


def test_drawings_are_asked_for_and_asked_about_like_the_pictures() -> None:
    two = next(subject for subject in SAMPLE if len(subject.lesions) == 2)
    ct, mr = phantoms.drawings(two)
    first, second = two.quadrants
    assert phantoms.QUADRANTS.index(first) <= phantoms.QUADRANTS.index(second)
    assert sorted(two.quadrants) == sorted(lesion.quadrant for lesion in two.lesions)
    assert ct.instruction == f"Draw a CT image with two lesions, {first}, {second}."
    assert mr.instruction == f"Draw an MR image with two lesions, {first}, {second}."
    assert Drawing("MR", ()).instruction == "Draw an MR image with no lesion."
    picture = np.zeros((SIDE, SIDE), np.uint8)
    assert [(q.kind, q.answer) for q in ct.questions(picture)] == [
        ("modality", "CT"),
        ("lesion", "Yes"),
        ("count", "Two"),
    ]
    asked = Drawing("MR", ("lower left",)).questions(picture)
    assert [q.answer for q in asked] == ["MR", "Yes", "One", "lower left"]
    assert all(q.picture is picture and q.text == phantoms.QUESTIONS[q.kind] for q in asked)


def test_tasks_have_targets_inputs_and_baselines() -> None:
    subject = SAMPLE[0]
    kinds = [task.kind for task in phantoms.tasks(subject)]
    assert sorted(kinds) == ["ct-to-mr", "reconstruct", "reconstruct", "super-resolve", "super-resolve"]
    for task in phantoms.tasks(subject):
        assert task.instruction == phantoms.INSTRUCTIONS[task.kind]
        assert task.picture.shape == ((32, 32) if task.kind == "super-resolve" else (SIDE, SIDE))
        assert task.target.shape == task.baseline.shape == (SIDE, SIDE)
    translate = next(task for task in phantoms.tasks(subject) if task.kind == "ct-to-mr")
    assert np.array_equal(translate.picture, subject.ct)
    assert np.array_equal(translate.target, subject.mr)


def test_downsample_averages_squares() -> None:
    picture = np.arange(SIDE * SIDE, dtype=np.uint32).reshape(SIDE, SIDE).astype(np.uint8)
    expected = picture.reshape(32, 4, 32, 4).mean(axis=(1, 3))
    assert np.abs(phantoms.downsample(picture) - expected).max() <= 0.5
    assert phantoms.enlarge(phantoms.downsample(picture)).shape == (SIDE, SIDE)


def test_held_out_seeds_are_not_those_of_training() -> None:
    assert [subject.seed for subject in phantoms.held_out(3)] == [0, 1, 2]
    assert phantoms.HELD_OUT_SEEDS <= phantoms.TRAINING_SEEDS
    for count in (0, -1, phantoms.HELD_OUT_SEEDS + 1):
        with pytest.raises(ValueError, match=f"expected 1 to 10000 held-out phantoms, got {count}"):
            phantoms.held_out(count)


def test_the_mean_picture_is_no_single_phantom() -> None:
    mean = phantoms.mean_picture("ct")
    assert mean.shape == (SIDE, SIDE)
    assert 10 < psnr(mean, SAMPLE[0].ct) < 25
    assert not np.array_equal(mean, phantoms.mean_picture("mr"))


def test_phantoms_cannot_be_changed_by_accident() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SAMPLE[0].seed = 1  # type: ignore[misc]
