"""The acceptance test between two executors: what passes, and that it fails closed."""

import json
from functools import cache

import numpy as np
import pytest
from command import run
from engine_doubles import host_executor

from healthgpt_edge import acceptance, load
from healthgpt_edge.acceptance import Report, compare
from healthgpt_edge.bundle import Bundle
from healthgpt_edge.errors import HealthGPTError
from healthgpt_edge.executors.onnx import DEVICES
from healthgpt_edge.executors.tensorrt import TensorRtExecutor
from healthgpt_edge.export.bundle import export_bundle
from healthgpt_edge.export.checkpoint import Checkpoint
from healthgpt_edge.export.demo import PHANTOM
from healthgpt_edge.export.engines.build import default_settings
from healthgpt_edge.export.phantom.release import released_files
from healthgpt_edge.manifest import PRECISIONS
from healthgpt_edge.session import Session

BLOCK_SIZE = 32


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    """Gives a phantom bundle in a precision on engines that are doubles, and in ONNX Runtime."""

    @cache
    def give(precision):
        work = tmp_path_factory.mktemp(precision)
        with Checkpoint.open(**released_files(PHANTOM)) as checkpoint:
            export_bundle(checkpoint, work / "bundle", precision=precision, block_size=BLOCK_SIZE)
        bundle = Bundle.open(work / "bundle")
        settings = default_settings(bundle.manifest, max_context=512, max_rows=16)
        expected = load(work / "bundle", threads=1)
        executor, _ = host_executor(bundle, tuple(sorted(bundle.manifest.tasks)), settings, work)
        return Session(bundle, executor, expected.tokenizer), expected

    return give


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_engines_graphs_are_accepted_in_every_precision(sessions, precision):
    report = compare(*sessions(precision))
    assert report.passed, report.first_failure
    names = [check.name for check in report.checks]
    for task in ("comprehension", "generation"):
        for part in (
            "features: cosine",
            "layer 0 keys: cosine",
            "layer 3 values: norm ratio from 1",
            "logits: distance",
        ):
            assert f"{task} {part}" in names
        assert f"{task} next tokens that agree" in names
    assert "levels more than 4 apart" in names and "codes of a picture that agree" in names


class Distorted:
    """An executor that is another's but for one method of itself or of its contexts."""

    def __init__(self, executor, **methods):
        self._executor, self._methods = executor, methods

    def __getattr__(self, name):
        return self._methods.get(name, getattr(self._executor, name))


def scaled_features(executor, factor):
    return Distorted(executor, features=lambda task, pixels: factor * executor.features(task, pixels))


def distorted_logits(executor, change):
    def context(task, features):
        inner = executor.context(task, features)
        return Distorted(inner, forward=lambda ids: change(inner.forward(ids)))

    return Distorted(executor, context=context)


@pytest.mark.parametrize(
    "distort, message",
    [
        (lambda one: scaled_features(one, 1.1), "features: norm ratio from 1 must be at most 0.03, found 0.1"),
        (lambda one: scaled_features(one, -1), "features: cosine must be at least 0.99999, found -1"),
        (lambda one: scaled_features(one, np.nan), "features: cosine must be at least 0.99999, found nan"),
        (lambda one: distorted_logits(one, lambda logits: logits * np.nan), "logits: distance must be at most"),
        (lambda one: distorted_logits(one, lambda logits: -logits), "logits: distance must be at most"),
        (
            lambda one: Distorted(one, picture=lambda codes: one.picture(codes)[::-1]),
            "levels more than 4 apart must be at most 0.01, found",
        ),
        (
            lambda one: Distorted(one, draft=lambda pixels: one.draft(pixels) + 1),
            "codes of a picture that agree must be at least 0.98, found 0",
        ),
    ],
)
def test_what_is_wrong_fails(sessions, distort, message):
    _, expected = sessions("fp32")
    report = compare(Session(expected.bundle, distort(expected.executor), expected.tokenizer), expected)
    assert not report.passed and message in report.first_failure


def test_another_plugin_fails(sessions):
    """The tasks of a bundle taken for each other: same base, other adapters."""
    _, expected = sessions("fp32")
    other = {"comprehension": "generation", "generation": "comprehension"}
    inner = expected.executor
    crossed = Distorted(inner, features=lambda task, pixels: inner.features(other[task], pixels))
    assert not compare(Session(expected.bundle, crossed, expected.tokenizer), expected).passed


def test_nothing_compared_is_not_accepted():
    report = Report("one", "other")
    assert not report.passed and report.first_failure == "nothing was compared"


def test_a_report_of_what_is_no_number_is_json():
    report = Report("one", "other")
    report.at_least("cosine", float("nan"), 0.5)
    text = json.dumps(report.to_json(), allow_nan=False)
    assert json.loads(text)["checks"] == [{"name": "cosine", "found": None, "bound": "at least 0.5", "passed": False}]


def test_another_shape_is_an_error():
    with pytest.raises(HealthGPTError, match=r"features must have the shape \(3,\), found \(2,\)"):
        Report("one", "other").alike("features", np.zeros(2), np.zeros(3), 1.0)


@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_the_command_line_compares_executors(sessions, precision):
    bundle = sessions(precision)[0].bundle.path
    outcome = run("verify", bundle, "--executor", "onnx", "--threads", "1", "--json")
    assert (outcome.code, outcome.json["ok"]) == (0, True)
    assert (outcome.json["executor"], outcome.json["against"]) == ("onnx-cpu+kernels", "onnx-cpu")
    assert outcome.json["checks"]
    plain = run("verify", bundle, "--executor", "onnx", "--threads", "1").output
    assert "next tokens that agree" in plain and "FAILED" not in plain and "ok: " in plain


def test_nothing_is_compared_with_itself(sessions, tmp_path, monkeypatch):
    """As where the kernels are not built: every check would pass and say nothing."""
    device = DEVICES["cpu"]._replace(library=tmp_path / "nothing.so")
    monkeypatch.setitem(DEVICES, "cpu", device)
    outcome = run("verify", sessions("int4")[0].bundle.path, "--executor", "onnx", "--threads", "1")
    assert (outcome.code, outcome.output) == (2, "")
    assert outcome.errors.endswith("error: onnx must be compared with another, found onnx-cpu in both\n")


def test_engines_are_not_compared_with_themselves_either(sessions, monkeypatch):
    """And --threads, an option of ONNX Runtime's, is not theirs to refuse."""
    doubles, _ = sessions("fp32")
    monkeypatch.setattr(TensorRtExecutor, "open", lambda bundle, tasks: doubles.executor)
    words = ("--executor", "tensorrt", "--against", "tensorrt", "--threads", 1)
    outcome = run("verify", doubles.bundle.path, *words)
    name = doubles.executor.name
    assert outcome.code == 2
    assert outcome.errors == f"error: tensorrt must be compared with another, found {name} in both\n"


def test_the_command_line_fails_closed(sessions, monkeypatch):
    bundle = sessions("int4")[0].bundle.path
    monkeypatch.setattr(acceptance, "NORM_RATIO", -1.0)
    outcome = run("verify", bundle, "--executor", "onnx", "--threads", "1", "--json")
    assert (outcome.code, outcome.json["ok"]) == (2, False)
    assert "onnx must compute what onnx does: comprehension features: norm ratio from 1 must be" in outcome.errors
