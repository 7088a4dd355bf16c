"""The GPU benchmark's words, and wheels for a machine with a GPU and no network: made slim, and unpacked."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import zstandard

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu import slim
from benchmarks.gpu.fat_binaries import MACHINE_CODE, entries, keep_only, kernels
from benchmarks.gpu.wheels import is_for, unpack

ROOT = Path(__file__).parents[1]
PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
PTX = 1


@pytest.mark.parametrize("words", [["--bundles"], ["--rehearse", "--times"], ["one", "two"], ["{file}/in-a-file"]])
def test_words_that_the_gpu_benchmark_does_not_know_start_nothing(tmp_path, words):
    (tmp_path / "file").touch()
    command = ["bash", ROOT / "benchmarks" / "gpu.sh", *(word.format(file=tmp_path / "file") for word in words)]
    environment = os.environ | {"PATH": os.defpath}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "") and "expected [--rehearse] [FOLDER], found " in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def entry(architecture: int, names: str, kind: int = MACHINE_CODE, compressed: bool = False) -> bytes:
    """An entry of a fat binary, as nvcc writes it."""
    code = b"\x7fELF..." + b"\0".join(f".text.{name}".encode() for name in names.split()) + b"\0"
    payload = zstandard.compress(code) if compressed else code
    padded = payload + bytes(-len(payload) % 8)
    sizes = len(padded), len(payload) if compressed else 0
    header = struct.pack("<HHIQIIHHI", kind, 0x101, 64, sizes[0], sizes[1], 0, 1, 8, architecture)
    return header.ljust(56, b"\0") + struct.pack("<Q", len(code) if compressed else 0) + padded


def fat_binary(*held: bytes) -> bytes:
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(b"".join(held))) + b"".join(held)


def library(code: bytes, name: bytes = b".nv_fatbin") -> bytearray:
    """A 64-bit ELF file with this section, and one with the names of both."""
    names = b"\0" + name + b"\0.shstrtab\0"
    start = b"\x7fELF\x02\x01".ljust(40, b"\0") + struct.pack("<Q", 64 + len(code) + len(names))
    start = start.ljust(58, b"\0") + struct.pack("<HHH", 64, 2, 1)
    sections = b"".join(
        struct.pack("<I20xQQ", *one).ljust(64, b"\0")
        for one in ((1, 64, len(code)), (2 + len(name), 64 + len(code), len(names)))
    )
    return bytearray(start + code + names + sections)


CODE = (
    fat_binary(entry(80, "Softmax"), entry(90, "Softmax LayerNorm"), entry(90, "Softmax", kind=PTX))
    + bytes(16)
    + fat_binary(entry(90, "GatherToFlash", compressed=True), entry(90, "_ZN5flash_fwd", compressed=True))
    + fat_binary(entry(90, "cutlass_AttentionKernel ToFlashSeqlens"), entry(120, "Gather", compressed=True))
)


def test_what_a_gpu_has_no_use_for_becomes_zeros():
    whole = library(CODE)
    before = list(entries(whole))
    slimmed = bytearray(whole)
    kept = keep_only(slimmed, 90, slim.is_used)
    assert len(slimmed) == len(whole)
    assert list(entries(slimmed)) == before  # headers stay, so that CUDA finds its way past what is gone
    stay = []
    for one in before:
        payload = slice(one.begin, one.begin + one.size)
        if any(slimmed[payload]):
            assert slimmed[payload] == whole[payload]
            stay.append((one.architecture, " ".join(kernels(slimmed, one))))
        slimmed[payload] = whole[payload]
    assert stay == [(90, "Softmax LayerNorm"), (90, "GatherToFlash"), (90, "cutlass_AttentionKernel ToFlashSeqlens")]
    assert slimmed == whole  # nothing else was touched
    assert kept == sum(one.size for one in (before[1], before[3], before[5]))


def test_a_library_without_code_for_gpus_stays_as_it_is():
    plain = library(CODE, b".rodata")
    assert keep_only(bytearray(plain), 90, slim.is_used) == 0


def damaged(offset: int, value: bytes) -> bytearray:
    spoilt = library(CODE)
    spoilt[64 + offset : 64 + offset + len(value)] = value
    return spoilt


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b"PK", "no library of a 64-bit Linux"),
        (library(CODE)[:50], "the library is cut off"),
        (library(CODE)[:-64], "the library is cut off"),
        (damaged(0, b"none"), "no fat binary at byte 64, but 0x656e6f6e"),
        (damaged(6, b"\0\0"), "no fat binary at byte 64, but 0xba55ed50"),
        (damaged(16 + 4, b"\0"), "an entry of a fat binary does not end where it should"),
        (damaged(16 + 8, b"\xff\xff"), "an entry of a fat binary does not end where it should"),
        (
            library(fat_binary(entry(90, "Gather", compressed=True)).replace(b"\x28\xb5\x2f\xfd", b"ZSTD")),
            "code for sm_90",
        ),
    ],
)
def test_what_is_no_library_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        keep_only(bytearray(given), 90, slim.is_used)


def test_another_gpu_is_refused():
    whole = library(CODE)
    with pytest.raises(ValueError, match="no code for sm_86, only for 80, 90, 120"):
        keep_only(whole, 86, slim.is_used)
    assert whole == library(CODE)


def write_wheel(path: Path, **files: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


NAME = "onnxruntime_gpu-1-py3-none-any.whl"


def run_slim(monkeypatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["slim", *map(str, arguments)])
    slim.main()


def test_wheels_are_made_slim_and_unpacked(tmp_path, monkeypatch):
    wheels, out, site = (tmp_path / name for name in ("whole", "wheels", "site"))
    kept = {
        "onnxruntime/__init__.py": b"",
        "onnxruntime/capi/libonnxruntime_providers_shared.so": b"shared",
        PROVIDER: bytes(library(CODE)),
        "transformers/modeling_utils.py": b"",
        "transformers/models/llama/configuration_llama.py": b"",
        "transformers/models/llama/tokenization_llama.py": b"",
    }
    left_out = {
        "onnxruntime/capi/libonnxruntime.so.1.31.1": b"",
        "onnxruntime/capi/libonnxruntime_providers_tensorrt.so": b"",
        "onnxruntime/tools/a.py": b"",
        "onnxruntime/transformers/a.py": b"",
        "transformers/models/llama/modeling_llama.py": b"",
        "transformers/models/clip/image_processing_clip.py": b"",
    }
    write_wheel(wheels / NAME, **kept, **left_out)
    run_slim(monkeypatch, wheels, out, "--architecture", "90")
    assert [path.name for path in out.iterdir()] == [NAME]
    assert list(unpack(out, site, (3, 12))) == [NAME]
    assert {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()} == set(kept)
    slimmed = library(CODE)
    keep_only(slimmed, 90, slim.is_used)
    for name, data in kept.items():
        assert (site / name).read_bytes() == (slimmed if name == PROVIDER else data)


@pytest.mark.parametrize(
    ("name", "provider", "architecture", "message"),
    [
        ("whole/README", b"", 90, "no wheels in .*whole"),
        (f"wheels/{NAME}", bytes(library(CODE)), 90, "the slim wheels need a folder of their own"),
        (f"whole/{NAME}", bytes(library(CODE)), 75, f"{NAME}: no code for sm_75, only for 80, 90, 120"),
        (f"whole/{NAME}", bytes(library(CODE, b".rodata")), 90, f"{NAME}: {PROVIDER} has no code for a GPU"),
        (f"whole/{NAME}", None, 90, f"{NAME}: File is not a zip file"),
    ],
)
def test_bad_wheels_are_one_error_and_nothing_is_left(tmp_path, monkeypatch, name, provider, architecture, message):
    given = tmp_path / name
    write_wheel(given, **{PROVIDER: provider or b""})
    if provider is None:
        given.write_bytes(b"no archive")
    with pytest.raises(SystemExit, match=message):
        run_slim(monkeypatch, given.parent, tmp_path / "wheels", "--architecture", str(architecture))
    assert not [path for path in (tmp_path / "wheels").glob("*") if path != given]


def test_wheels_for_other_pythons_are_passed_over(tmp_path):
    folder, site = tmp_path / "wheels", tmp_path / "site"
    write_wheel(folder / "small-1-py3-none-any.whl", **{"small.py": b""})
    write_wheel(folder / "other-1-cp311-cp311-linux_x86_64.whl", **{"other.py": b""})
    (folder / "README").write_text("no wheel")
    assert list(unpack(folder, site, (3, 12))) == ["small-1-py3-none-any.whl"]
    assert [path.name for path in site.iterdir()] == ["small.py"]
    (folder / "small-1-py3-none-any.whl").write_bytes(b"no archive")
    with pytest.raises(SystemExit, match=r"small-1-py3-none-any\.whl is damaged: File is not a zip file"):
        list(unpack(folder, site, (3, 12)))


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("a-1-py3-none-any.whl", True),
        ("a-1-py2.py3-none-any.whl", True),
        ("a-1-cp39-abi3-manylinux_2_28_x86_64.whl", True),
        ("a-1-cp312-cp312-manylinux_2_28_x86_64.whl", True),
        ("a-1-cp311-cp311-manylinux_2_28_x86_64.whl", False),
        ("a-1-cp312-cp312t-manylinux_2_28_x86_64.whl", False),
    ],
)
def test_which_wheels_are_for_a_python(name, fits):
    assert is_for(name, (3, 12)) == fits
