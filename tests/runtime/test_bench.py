"""`healthgpt-edge bench`: rows, percentiles, costs, the checks before, and the report of a small bundle."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from command import run

from healthgpt_edge import costs, machine
from healthgpt_edge.agreement import agree
from healthgpt_edge.bench import DEFAULT_ROWS, Row, parse_rows, summary
from healthgpt_edge.bundle import Bundle
from healthgpt_edge.errors import BenchmarkError
from healthgpt_edge.manifest import VERSION_IN_PANELS

ROWS = "load,pp20,tg3@17,img,img+draft,vq,vit"


@pytest.fixture(scope="module")
def bundle(golden_bundle):
    return golden_bundle("m3")


def test_rows_are_parsed():
    rows = [Row("load"), Row("pp", 20), Row("tg", 3, 17), Row("img"), Row("img+draft"), Row("vq"), Row("vit")]
    assert parse_rows(ROWS) == rows


@pytest.mark.parametrize("word", ["", "pp", "pp0", "tg64", "tg64@", "tg64@0", "vq256", "pp600 ", "PP600", "pp1234567"])
def test_a_row_that_is_none_is_named(word):
    with pytest.raises(BenchmarkError) as caught:
        parse_rows(f"vit,{word}")
    assert (
        str(caught.value)
        == f"rows must be ppN, tgN@C, img, img+draft, vq, vit or load, with commas between, found {word!r}"
    )


def test_a_bad_row_is_one_line_and_exit_code_2(bundle):
    outcome = run("bench", bundle, "--rows", "pp600,speed")
    assert (outcome.code, outcome.output) == (2, "")
    assert outcome.errors.splitlines() == [
        "error: rows must be ppN, tgN@C, img, img+draft, vq, vit or load, with commas between, found 'speed'"
    ]


def test_rows_must_fit_the_bundle(bundle, golden_bundle):
    most = Bundle.open(bundle).manifest.language.max_positions
    outcome = run("bench", bundle, "--rows", f"tg2@{most}")
    assert (outcome.code, outcome.output) == (2, "")
    assert outcome.errors == f"error: row tg2@{most} must fit the {most} positions of the bundle\n"
    outcome = run("bench", golden_bundle("phi4"), "--rows", "img")
    assert (outcome.code, outcome.output) == (2, "")
    assert outcome.errors == "error: row img needs a bundle with generation, this one has none\n"


@pytest.mark.parametrize(("system", "left_out"), [("m3", ()), ("phi4", ("img", "vq"))])
def test_by_default_a_bundle_is_asked_for_what_it_can_do(golden_bundle, monkeypatch, system, left_out):
    timed = []
    monkeypatch.setattr("healthgpt_edge.bench._Bench.time", lambda bench, row: timed.append(row) or [])
    outcome = run("bench", golden_bundle(system), "--no-check", "--repeat", "1", "--threads", "1", "--json")
    assert (outcome.code, outcome.errors) == (0, "")
    assert timed == [row for row in parse_rows(DEFAULT_ROWS) if row.kind not in (*left_out, "load")]


def test_percentiles():
    samples = [float(value) for value in range(101)]
    assert summary(samples) == {"count": 101, "p50_ms": 50.0, "p90_ms": 90.0, "p99_ms": 99.0}
    assert summary([2.5]) == {"count": 1, "p50_ms": 2.5, "p90_ms": 2.5, "p99_ms": 2.5}


def test_results_that_differ_are_not_timed(bundle):
    manifest = Bundle.open(bundle).manifest
    reference = np.linspace(-1, 1, 100)
    (near,) = agree(manifest, {"logits": reference + 1e-5}, {"logits": reference})
    assert 0 < near.distance < near.tolerance
    for wrong in (-reference, reference * np.nan):
        with pytest.raises(BenchmarkError, match=r"^logits must agree to 0\.00087, found .*; nothing was timed$"):
            agree(manifest, {"logits": wrong}, {"logits": reference})


def test_costs_are_those_of_the_written_matrices(bundle):
    """The bytes of a token are the adapters and linears that the bundle holds, and the head's rows."""
    manifest = Bundle.open(bundle).manifest
    language, task = manifest.language, manifest.tasks["comprehension"]
    width, inner = language.hidden, language.intermediate
    keys = language.kv_heads * language.head_dim
    linears = [(width, width + 2 * keys), (width, width), (width, 2 * inner), (inner, width)]
    values = sum(i * o + i * (task.rank + task.experts) + task.rank * o for i, o in linears)
    assert manifest.precision == manifest.cache_precision == "fp32"
    layers = 4 * language.layers * values
    assert costs.token_bytes(manifest, "comprehension", 0) == layers + 4 * width * language.vocab
    assert costs.cache_bytes(manifest) == 4 * 2 * language.layers * keys
    for precision in ("fp16", "bf16"):
        half = replace(manifest, precision=precision)
        assert 2 * costs.token_bytes(half, "comprehension", 0) == costs.token_bytes(manifest, "comprehension", 0)
    # In panels, the scales of all but [A;R] and the head have two bytes less.
    rows = replace(manifest, precision="int4", block_size=32)
    panels = replace(rows, version=VERSION_IN_PANELS)
    scales = sum((-(-i // 32) + -(-task.rank // 32)) * o for i, o in linears)
    saved = costs.token_bytes(rows, "comprehension", 0) - costs.token_bytes(panels, "comprehension", 0)
    assert saved == 2 * language.layers * scales
    one = costs.prefill_operations(manifest, "comprehension", 1)
    assert one == 2 * (language.layers * (values + 2 * width) + width * language.vocab)
    # The last layer makes keys and values of the others, attends to them and goes on with the last one alone.
    inputs, outputs = linears[0]
    attending = inputs * outputs + inputs * (task.rank + task.experts) + task.rank * outputs
    others = costs.prefill_operations(manifest, "comprehension", 3) - one
    assert others == 2 * (2 * ((language.layers - 1) * values + attending) + 5 * language.layers * 2 * width)


def test_the_report_has_every_row_and_its_ceiling(bundle, monkeypatch):
    # A real ceiling reads half a gigabyte, over and over.
    monkeypatch.setattr(machine, "read_bandwidth", lambda threads: 1e10 * threads)
    monkeypatch.setattr(machine, "arithmetic_rate", lambda kind, threads: 1e12 * threads)
    outcome = run("bench", bundle, "--rows", ROWS, "--threads", "1", "--repeat", "2", "--json")
    assert outcome.code == 0, outcome.errors
    report = outcome.json
    assert report["bundle"]["precision"] == "fp32"
    assert report["machine"].keys() == {"processor", "cores", "memory_bytes", "system"}
    assert report["versions"].keys() == {"python", "healthgpt-edge", "numpy", "onnxruntime"}
    assert report["settings"]["threads"] == 1 and report["settings"]["repeat"] == 2
    assert report["settings"]["instruction_set"] == machine.instruction_set()
    checked = {one["name"] for one in report["checks"]}
    assert checked >= {"comprehension decode and prefill", "generation decode and prefill", "picture"}
    assert all(one["distance"] <= one["tolerance"] for one in report["checks"])
    assert all(size > 0 for size in report["memory"].values())

    rows = {(row["row"], row["task"]): row for row in report["rows"]}
    both = ("comprehension", "generation")
    expected = {("load", "all")} | {(name, "generation") for name in ("img256", "img256+draft", "vq256")}
    expected |= {(name, task) for name in ("pp20", "tg3@17") for task in both}
    vision = Bundle.open(bundle).manifest.vision.image_size
    assert rows.keys() == expected | {(f"vit{vision}", task) for task in both}
    for (name, _), row in rows.items():
        assert row["count"] == len(row["samples_ms"]) == {"tg3@17": 6, "img256": 1, "img256+draft": 1}.get(name, 2)
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
    decode, prefill = rows["tg3@17", "generation"], rows["pp20", "generation"]
    assert (decode["cost_unit"], prefill["cost_unit"]) == ("bytes", "float32 op")
    for row, ceiling in ((decode, 1e10), (prefill, 1e12)):
        assert row["ceiling_before"] == row["ceiling_after"] == ceiling
        assert row["share"] == pytest.approx(row["cost"] / (row["p50_ms"] / 1e3) / ceiling)
    assert rows["img256", "generation"]["stages_ms"].keys() >= {"vision", "prefill", "decode", "codes"}
    assert rows["load", "all"]["stages_ms"]["load"] > 0
    json.dumps(report, allow_nan=False)


def test_the_table_has_every_row(bundle, monkeypatch):
    """Whole, too: what goes to a file is not cut to a terminal's 80 columns."""
    monkeypatch.setattr(machine, "read_bandwidth", lambda threads: 1e10)
    outcome = run("bench", bundle, "--rows", "tg1@2", "--repeat", "1", "--no-check", "--no-kernels")
    assert outcome.code == 0, outcome.errors
    assert outcome.output.count("tg1@2") == 2 and "p99 ms" in outcome.output
    assert "comprehension" in outcome.output and "generation" in outcome.output and "…" not in outcome.output
    assert all(heading in outcome.output for heading in ("samples", "work", "of the ceiling"))
    assert " G bytes " in outcome.output


def test_ceilings_of_this_machine():
    kernels = pytest.importorskip("healthgpt_edge._kernels")
    assert kernels.read_bandwidth(1, 64) > 1e8
    # In turn and the best of each, for others on the machine slow both.
    rounds = [(kernels.int8_rate(1), kernels.float32_rate(1)) for _ in range(5)]
    int8, float32 = (max(rates) for rates in zip(*rounds, strict=True))
    assert float32 > 1e8
    # An instruction multiplies at most four times as many bytes as floats, and no more of them start in a cycle: a
    # higher ratio means that the compiler took products out of the loop.
    assert 0.25 < int8 / float32 < 5
    with pytest.raises(ValueError, match=r"^\[ceilings\] threads must be between 1 and 1024, got 0$"):
        kernels.read_bandwidth(0, 64)
    with pytest.raises(ValueError, match=r"^\[ceilings\] mebibytes must be between 1 and 1048576, got 0$"):
        kernels.read_bandwidth(1, 0)
