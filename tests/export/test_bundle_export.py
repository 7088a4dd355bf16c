"""Whole bundles: every precision exports, opens and runs; the same checkpoint gives the same bytes."""

from __future__ import annotations

import os
import stat
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from golden_cases import Case, arguments, open_golden

from healthgpt_edge import load
from healthgpt_edge.bundle import Bundle
from healthgpt_edge.engines import Settings, ingredients
from healthgpt_edge.errors import BundleError
from healthgpt_edge.export.bundle import export_bundle
from healthgpt_edge.export.checkpoint import Checkpoint
from healthgpt_edge.export.phantom.release import released_files
from healthgpt_edge.manifest import PRECISIONS

COM, GEN = Case("m3_com_wide"), Case("m3_gen_wide")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Gives the M3 bundle of a precision, in blocks of 32, and the summary of its export."""
    folder = tmp_path_factory.mktemp("bundles")

    @cache
    def export(precision: str):
        with open_golden("m3") as checkpoint:
            summary = export_bundle(checkpoint, folder / precision, precision=precision, block_size=32)
        return folder / precision, summary

    return export


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_answers_and_draws(exported, precision):
    path, _ = exported(precision)
    manifest = Bundle.open(path).manifest
    assert (manifest.precision, manifest.block_size) == (precision, 32)
    assert manifest.cache_precision == ("fp32" if precision == "fp32" else "fp16")
    session = load(path, threads=1)
    answer = session.answer(COM.image, COM.question, max_new_tokens=8)
    assert answer.prompt_ids == COM.record["input_ids"]
    picture = session.generate(GEN.image, GEN.question)
    assert len(picture.codes) == 1024 and picture.pixels.std() > 1
    if precision in ("fp32", "fp16"):
        # Up to the first step where the original's two best logits lie closer than float16 can tell apart.
        assert answer.token_ids == COM.record["output_ids"][:8]
        assert picture.codes[:20] == GEN.record["vq_indices"][:20]
    if precision == "bf16":
        bodies = load(path, threads=1, kernels=False)
        assert bodies.answer(COM.image, COM.question, max_new_tokens=8).token_ids == answer.token_ids
        assert bodies.generate(GEN.image, GEN.question).codes == picture.codes


def test_each_precision_is_smaller_than_the_one_before(exported):
    sizes = [(exported(precision)[0] / "weights/base.bin").stat().st_size for precision in PRECISIONS]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4  # two have 16 bits


def test_linears_of_whole_panels_lie_in_them_unless_told(tmp_path, exported):
    """Which makes the bundle's version 4. Logits have the same bits; without kernels they are those of rows, too."""
    phantom = released_files(Path(__file__).parents[2] / "phantom")
    for precision, layout, version in (("int4", "panels", 4), ("int4", "rows", 2), ("int8", "panels", 4)):
        with Checkpoint.open(**phantom) as checkpoint:
            path = tmp_path / f"{precision}-{layout}"
            export_bundle(checkpoint, path, precision=precision, block_size=32, layout=layout)
        manifest = Bundle.open(path).manifest
        assert (manifest.version, manifest.in_panels) == (version, version == 4)
        graph = onnx.load(path / "generation.language.onnx", load_external_data=False).graph
        shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
        panels, rows = [3, 128, 128], [128, 384]
        weight = "layers.0.self_attn.qkv_proj.weight"
        assert shapes[weight] == (panels if manifest.in_panels else rows)
        assert shapes[f"{weight}_scale"] == ([3, 4, 128] if manifest.in_panels else [4, 384])
    ids = np.arange(70) % 50
    of_panels, of_rows, bodies, plain = (
        load(tmp_path / f"int4-{layout}", threads=2, kernels=kernels).executor.context("generation", None).forward(ids)
        for layout, kernels in (("panels", True), ("rows", True), ("panels", False), ("rows", False))
    )
    np.testing.assert_array_equal(of_panels, of_rows)
    assert np.abs(bodies - plain).max() <= 0.05 * np.abs(plain).max()
    for precision in ("int4", "fp16"):  # linears of 96 outputs, and floats
        assert Bundle.open(exported(precision)[0]).manifest.version == 2


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_the_same_checkpoint_gives_the_same_bytes(exported, precision, tmp_path):
    path, _ = exported(precision)
    with open_golden("m3") as checkpoint:
        export_bundle(checkpoint, tmp_path / "again", precision=precision, block_size=32)
    assert tree(tmp_path / "again") == tree(path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
def test_weights_that_folding_makes_infinite_are_refused(tmp_path, precision):
    out = tmp_path / "out"
    with Checkpoint.open(**arguments("m3"), hlora_alpha=1e300) as checkpoint, pytest.raises(BundleError) as caught:
        export_bundle(checkpoint, out, precision=precision)
    assert str(caught.value) == "tensor layers.0.self_attn.qkv_proj.adapter_out must be finite, found NaN or infinity"
    assert list(tmp_path.iterdir()) == []


def test_the_summary_counts_every_byte(exported):
    path, summary = exported("int4")
    listed = Bundle.open(path).manifest.files
    assert summary.total_bytes == sum(entry.size for entry in listed.values())
    # A tensor that several graphs name counts once; what lies between tensors is no part.
    lengths: dict[str, dict[str, int]] = {}
    for graph in path.glob("*.onnx"):
        for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place:
                lengths.setdefault(place["location"], {})[place["offset"]] = int(place["length"])
    parts = {file: sum(part.size_bytes for part in summary.parts if part.file == file) for file in lengths}
    assert parts == {file: sum(tensors.values()) for file, tensors in lengths.items()}


def test_weights_of_many_files_are_the_same_weights(exported, tmp_path, monkeypatch):
    monkeypatch.setattr("healthgpt_edge.export.bundle._WEIGHT_FILE_BYTES", 100_000)
    with open_golden("m3") as checkpoint:
        summary = export_bundle(checkpoint, tmp_path / "out", precision="int4", block_size=32)
    assert summary.parts == exported("int4")[1].parts
    manifest = Bundle.open(tmp_path / "out").manifest
    files = {name for name in manifest.files if name.startswith("weights/")}
    assert files >= {f"weights/{name}-{number}.bin" for name in ("base", "generation") for number in (1, 2)}
    # An engine is stale when one of them is another.
    settings = Settings("fp16", ("8.9",), 2048, 8, 512)
    assert set(ingredients(manifest, "language", "tensorrt", "11.4", settings)) >= files
    answers = [
        load(path, threads=1).answer(COM.image, COM.question) for path in (exported("int4")[0], tmp_path / "out")
    ]
    assert answers[0].token_ids == answers[1].token_ids


@pytest.mark.parametrize("tasks", [("comprehension",), ("generation",), ("comprehension", "generation")], ids=str)
def test_progress_ends_at_its_total(tmp_path, tasks):
    files = arguments("m3")
    if "generation" not in tasks:
        files |= {"generation": None, "fusion": None}
    if "comprehension" not in tasks:
        files |= {"comprehension": None}
    steps: list[tuple[str, int, int]] = []
    with Checkpoint.open(**files) as checkpoint:
        export_bundle(checkpoint, tmp_path / "out", on_step=lambda *step: steps.append(step))
    totals = {total for _, _, total in steps}
    assert len(totals) == 1
    assert [done for _, done, _ in steps] == list(range(1, totals.pop() + 1))
    assert {name.split(":")[0] for name, _, _ in steps} == set(tasks)
    # A bundle of one task holds nothing of the other.
    manifest = Bundle.open(tmp_path / "out").manifest
    assert set(manifest.tasks) == set(tasks)
    assert (manifest.codes is None) == ("generation" not in tasks)
    session = load(tmp_path / "out", threads=1)
    if "comprehension" in tasks:
        assert session.answer(COM.image, COM.question).token_ids == COM.record["output_ids"]
    else:
        assert session.generate(GEN.image, GEN.question).codes == GEN.record["vq_indices"]


def test_a_bundle_can_be_read_like_any_new_folder(exported):
    """The temporary directory was its writer's alone."""
    path, _ = exported("fp32")
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert list(path.parent.glob(".*")) == []


def test_all_of_a_bundle_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Otherwise a power cut may leave the name and half of the bytes."""
    flushed: set[str] = set()
    fsync = os.fsync

    def note(descriptor: int) -> None:
        flushed.add(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def check(folder: Path, out: Path) -> Path:
        assert flushed >= {str(path) for path in (folder, *folder.rglob("*"))}
        return rename(folder, out)

    rename = Path.rename
    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", check)
    with open_golden("qwen") as checkpoint:
        export_bundle(checkpoint, tmp_path / "out")
    assert any(path.endswith("weights/base.bin") for path in flushed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "precision must be one of fp32, fp16, bf16, int8, int4, got 'fp8'"),
        ({"block_size": 16}, "block size must be one of (32, 64, 128), got 16"),
        ({"layout": "columns"}, "layout must be one of panels, rows, got 'columns'"),
    ],
)
def test_options_are_checked_before_anything_is_written(tmp_path, options, message):
    with open_golden("qwen") as checkpoint, pytest.raises(BundleError) as caught:
        export_bundle(checkpoint, tmp_path / "out", **options)
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


def test_a_failure_in_the_middle_leaves_nothing(tmp_path):
    """Whatever it is, also one of our own making."""
    steps = 0

    def fail(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise ZeroDivisionError

    with open_golden("qwen") as checkpoint, pytest.raises(ZeroDivisionError):
        export_bundle(checkpoint, tmp_path / "out", on_step=fail)
    assert list(tmp_path.iterdir()) == []
