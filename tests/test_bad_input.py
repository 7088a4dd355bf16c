"""Bad input at the command line: exit code 2, one line that says what was wrong, and nothing written.

Each case makes its files in an empty folder and names the words that follow `healthgpt-edge`. The folder must hold
the same afterwards.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Outcome, export_options, run
from golden_cases import FILES, GOLDEN, arguments
from PIL import Image
from safetensors.torch import load_file, save_file
from sealed import seal

from healthgpt_edge.images import write_image

M3 = FILES["m3"]
PREFIX = "base_model.model.model."
QUESTION = "What is in the image?"
PICTURE = GOLDEN / "images/wide.png"


class Place:
    """The folder of one case, and copies of sound things to damage in it."""

    def __init__(self, folder: Path, golden_bundle: Callable[[str], Path]) -> None:
        self.folder, self._golden_bundle = folder, golden_bundle

    def file(self, name: str, data: bytes = b"") -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path

    def release(self) -> Path:
        """The golden M3 release. Its files are links: to change one, replace it."""
        return Path(
            shutil.copytree(
                arguments("m3")["base"].parent, self.folder / "m3", copy_function=os.link, dirs_exist_ok=True
            )
        )

    def bundle(self, system: str = "m3") -> Path:
        """A golden bundle. Its files are links: to change one, replace it."""
        return Path(shutil.copytree(self._golden_bundle(system), self.folder / "bundle", copy_function=os.link))

    def sound(self, system: str = "m3") -> Path:
        """A golden bundle that is left as it is."""
        return self._golden_bundle(system)


def replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def replaced(path: Path) -> Path:
    """The path of a file that is no link any more: it is gone."""
    path.unlink()
    return path


def cut(path: Path) -> None:
    data = path.read_bytes()
    replace(path, data[: len(data) // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    replace(path, bytes(data))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_bytes())
    change(data)
    replace(path, json.dumps(data).encode())


def edit_torch(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    path.unlink()
    torch.save(tensors, path)


def edit_safetensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


# --- export ---------------------------------------------------------------------------------------------------------

Change = Callable[[Path], object]
SHARD = f"{M3['base']}/model-00002-of-00002.safetensors"
CLIP = f"{M3['vision']}/pytorch_model.bin"
COM, GEN, LAST = M3["comprehension"], M3["generation"], f"{M3['vqgan']}/last.ckpt"
DOWN = f"{PREFIX}layers.1.mlp.down_proj"


class TouchFile:
    """Unpickles by running a shell command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def hostile(name: str) -> Change:
    """The file becomes a pickle that makes `it-ran` if it runs."""

    def change(release: Path) -> None:
        (release / name).unlink()
        torch.save({"state_dict": TouchFile(release / "it-ran")}, release / name)

    return change


def fill(name: str, key: str, value: float, edit: Callable[..., None] = edit_torch) -> Change:
    return lambda release: edit(release / name, lambda tensors: tensors[key].view(-1)[0].fill_(value))


def config(key: str, value: object, name: str = "config.json") -> Change:
    return lambda release: edit_json(release / M3["base"] / name, lambda data: data.update({key: value}))


def in_yaml(old: str, new: str) -> Change:
    def change(release: Path) -> None:
        path = release / M3["vqgan"] / "model.yaml"
        replace(path, path.read_text().replace(old, new).encode())

    return change


RELEASE_FAULTS: dict[str, tuple[Change, str]] = {
    "base missing": (
        lambda m3: shutil.rmtree(m3 / M3["base"]),
        f"{M3['base']}/config.json: expected a file, found nothing",
    ),
    "clip missing": (lambda m3: shutil.rmtree(m3 / M3["vision"]), f"{M3['vision']}/config.json: expected a file"),
    "comprehension plugin missing": (lambda m3: (m3 / COM).unlink(), f"{COM}: expected a file, found nothing"),
    "generation plugin missing": (lambda m3: (m3 / GEN).unlink(), f"{GEN}: expected a file, found nothing"),
    "fusion file missing": (lambda m3: (m3 / M3["fusion"]).unlink(), f"{M3['fusion']}: expected a file, found nothing"),
    "vqgan missing": (lambda m3: shutil.rmtree(m3 / M3["vqgan"]), "ckpt/model.yaml: expected a file, found nothing"),
    "shard truncated": (lambda m3: cut(m3 / SHARD), f"{SHARD}: expected a safetensors file, found SafetensorError"),
    "clip truncated": (lambda m3: cut(m3 / CLIP), f"{CLIP}: expected a whole torch file, found BadZipFile"),
    "plugin truncated": (lambda m3: cut(m3 / COM), f"{COM}: expected a whole torch file, found BadZipFile"),
    "vqgan truncated": (lambda m3: cut(m3 / LAST), "ckpt/last.ckpt: expected a whole torch file, found BadZipFile"),
    "plugin empty": (lambda m3: replace(m3 / COM, b""), f"{COM}: expected a torch file"),
    "plugin is a folder": (
        lambda m3: ((m3 / COM).unlink(), (m3 / COM).mkdir()),
        f"{COM}: expected a file, found a folder",
    ),
    "fusion in the plugin's place": (
        lambda m3: shutil.copyfile(m3 / M3["fusion"], replaced(m3 / GEN)),
        f"{GEN}: expected tensors lora_A, found none",
    ),
    "plugin of another system": (
        lambda m3: shutil.copyfile(arguments("qwen")["comprehension"], replaced(m3 / COM)),
        f"{COM}: expected tensor {PREFIX}layers.0.self_attn.qkv_proj.lora_A.weight [8, 64], found nothing",
    ),
    "adapter mis-shaped": (
        lambda m3: edit_torch(m3 / COM, lambda state: state.update({f"{DOWN}.lora_A.weight": torch.ones(8, 127)})),
        f"{COM}: {DOWN}.lora_A.weight: expected shape [8, 128], found [8, 127]",
    ),
    "adapter missing": (
        lambda m3: edit_torch(m3 / COM, lambda state: state.pop(f"{DOWN}.lora_B.weight")),
        f"{COM}: expected tensor {DOWN}.lora_B.weight [64, 8], found nothing",
    ),
    "adapter extra": (
        lambda m3: edit_torch(m3 / COM, lambda state: state.update({"extra": torch.ones(2)})),
        f"{COM}: expected no tensor extra, found float32 [2]",
    ),
    "hostile plugin": (hostile(COM), f"{COM}: expected tensors only, found the global posix.system"),
    "hostile vqgan": (hostile(LAST), "ckpt/last.ckpt: expected tensors only, found the global posix.system"),
    "hostile clip": (hostile(CLIP), f"{CLIP}: expected tensors only, found the global posix.system"),
    "index leaves the folder": (
        lambda m3: edit_json(
            m3 / M3["base"] / "model.safetensors.index.json",
            lambda index: index["weight_map"].update({"lm_head.weight": "../../../etc/shadow.safetensors"}),
        ),
        "lm_head.weight: expected a .safetensors file of this folder, found '../../../etc",
    ),
    "nan in the base": (
        fill(SHARD, "model.norm.weight", float("nan"), edit_safetensors),
        f"{SHARD}: model.norm.weight: expected finite values, found NaN or infinity",
    ),
    "nan in an adapter": (
        fill(COM, f"{DOWN}.lora_B.weight", float("nan")),
        f"{COM}: {DOWN}.lora_B.weight: expected finite values, found NaN or infinity",
    ),
    "infinity in the projector": (
        fill(GEN, f"{PREFIX}mm_projector.2.bias", float("inf")),
        f"{GEN}: {PREFIX}mm_projector.2.bias: expected finite values, found NaN or infinity",
    ),
    "nan in clip": (
        fill(CLIP, "vision_model.encoder.layers.3.mlp.fc2.bias", float("nan")),
        f"{CLIP}: vision_model.encoder.layers.3.mlp.fc2.bias: expected finite values, found NaN or infinity",
    ),
    "config truncated": (
        lambda m3: cut(m3 / M3["base"] / "config.json"),
        f"{M3['base']}/config.json: expected JSON, found JSONDecodeError",
    ),
    "config of a longer context": (
        config("rope_scaling", {"type": "longrope"}),
        "rope_scaling.type: expected 'default', found",
    ),
    "config of another model": (config("model_type", "llama"), "model_type: expected 'phi3' or 'qwen2', found 'llama'"),
    "config with more layers": (config("num_hidden_layers", 4), "expected tensor model.layers.3."),
    "config with absurd width": (config("hidden_size", 10**12), "hidden_size: expected an integer from 1 to 262144"),
    "stop id outside": (
        config("eos_token_id", [9999], "generation_config.json"),
        "eos_token_id: expected 1 to 64 integers from 0 to 477, found [9999]",
    ),
    "tokenizer damaged": (
        lambda m3: cut(m3 / M3["base"] / "tokenizer.model"),
        "tokenizer.model: expected a sentencepiece model, found RuntimeError",
    ),
    "another quantiser": (
        in_yaml("vqgan.GumbelVQ", "vqgan.VQModel"),
        "model.target: expected 'taming.models.vqgan.Gum",
    ),
    "more codes than rows": (
        in_yaml("n_embed: 64", "n_embed: 8192"),
        "expected 8192 codes (as model.yaml: n_embed), found 64",
    ),
}


def export(*more: object, **paths: object) -> Callable[[Place], list[object]]:
    """Words that export the golden release, options overridden (None leaves one out)."""

    def words(place: Place) -> list[object]:
        options = {**arguments("m3"), "out": place.folder / "out"} | {
            name: value(place) if callable(value) else value for name, value in paths.items()
        }
        return [
            "export",
            *(w for name, value in options.items() if value is not None for w in (f"--{name}", value)),
            *more,
        ]

    return words


def of_release(change: Change) -> Callable[[Place], list[object]]:
    def words(place: Place) -> list[object]:
        release = place.release()
        change(release)
        return ["export", *export_options("m3", release), "--out", place.folder / "out"]

    return words


@dataclass(frozen=True)
class Bad:
    """One case: the words to run, made in its place, and a part of the message."""

    words: Callable[[Place], list[Any]]
    message: str


def in_folder(name: str) -> Callable[[Place], Path]:
    return lambda place: place.folder / name


def make(name: str, kind: Callable[[Path], object] = Path.mkdir) -> Callable[[Place], Path]:
    def path(place: Place) -> Path:
        kind(place.folder / name)
        return place.folder / name

    return path


def pictures_of(*files: tuple[str, bytes]) -> Callable[[Place], Path]:
    """A folder with these files."""

    def path(place: Place) -> Path:
        folder = make("pictures")(place)
        for name, data in files:
            (folder / name).write_bytes(data)
        return folder

    return path


def too_large_for_float16(place: Place) -> list[object]:
    release = place.release()
    fill(COM, f"{DOWN}.lora_B.weight", 60_000.0)(release)
    return ["export", *export_options("m3", release), "--out", place.folder / "out", "--precision", "fp16"]


EXPORTS = {
    f"export: {name}": Bad(of_release(change), message) for name, (change, message) in RELEASE_FAULTS.items()
} | {
    "export: too large for float16": Bad(too_large_for_float16, "must fit float16 (65504), found 480000"),
    "export: no plugin": Bad(
        export(comprehension=None, generation=None, fusion=None),
        "expected a comprehension or a generation plugin, found neither",
    ),
    "export: generation without vqgan": Bad(export(vqgan=None), f"{GEN}: expected a VQGAN beside it, found none"),
    "export: fusion without generation": Bad(
        export(generation=None), f"{M3['fusion']}: expected a generation plugin beside it, found none"
    ),
    "export: plugins in each other's option": Bad(
        export(comprehension=arguments("m3")["generation"], generation=arguments("m3")["comprehension"]),
        f"{GEN}: expected the comprehension plugin, found the other task's by its name",
    ),
    "export: base and clip swapped": Bad(
        export(base=arguments("m3")["vision"], vision=arguments("m3")["base"]),
        "model_type: expected 'phi3' or 'qwen2', found 'clip'",
    ),
    "export: base is a file": Bad(
        export(base=arguments("m3")["comprehension"]), "config.json: expected a file, found nothing"
    ),
    "export: base name too long": Bad(export(base="x" * 300), "File name too long"),
    "export: unknown template": Bad(export(template="phi5"), "template: expected phi3 or phi4 for phi3, found 'phi5'"),
    "export: unknown precision": Bad(
        export(precision="int2"), "precision must be one of fp32, fp16, bf16, int8, int4, got 'int2'"
    ),
    "export: block size 48": Bad(
        export("--block-size", 48, precision="int4"), "block size must be one of (32, 64, 128), got 48"
    ),
    "export: block size in words": Bad(export("--block-size", "many"), "Invalid value for '--block-size'"),
    "export: unknown cache": Bad(export(cache="int4"), "cache must be one of fp32, fp16, int8, got 'int4'"),
    "export: nothing to calibrate": Bad(
        export(calibrate=GOLDEN / "images", precision="bf16"),
        "pictures to calibrate with need integer matrices, int8 or int4, got bf16",
    ),
    "export: no folder to calibrate with": Bad(
        export(calibrate=in_folder("nowhere"), precision="int4"), "No such file or directory: nowhere"
    ),
    "export: a picture for the folder": Bad(export(calibrate=PICTURE, precision="int4"), "Not a directory: wide.png"),
    "export: calibrate with an empty folder": Bad(
        export(calibrate=make("empty"), precision="int4"), "'empty' must hold pictures, found none"
    ),
    "export: calibrate with hidden files": Bad(
        export(calibrate=pictures_of((".thumbnails", b"x")), precision="int4"),
        "'pictures' must hold pictures, found none",
    ),
    "export: calibrate with what is no picture": Bad(
        export("--block-size", 32, calibrate=pictures_of(("notes.txt", b"words")), precision="int4"),
        "notes.txt: expected PNG, JPEG or DICOM, found another format",
    ),
    "export: negative alpha": Bad(export("--hlora-alpha", -3), "hlora_alpha: expected a number above 0, found -3.0"),
    "export: alpha not a number": Bad(
        export("--hlora-alpha", "nan"), "hlora_alpha: expected a number above 0, found nan"
    ),
    "export: no base": Bad(export(base=None), "Missing option '--base'"),
    "export: no out": Bad(export(out=None), "Missing option '--out'"),
    "export: out exists": Bad(export(out=make("out")), "'out' exists already; a bundle is written to a new directory"),
    "export: out in a bundle": Bad(
        export(out=lambda place: place.bundle() / "out"),
        "'out' must not lie in another bundle, whose files are all listed",
    ),
    "export: out is a file": Bad(export(out=make("out", Path.touch)), "'out' exists already"),
    "export: out is a link to nothing": Bad(
        export(out=make("out", lambda path: path.symlink_to("nowhere"))), "'out' exists already"
    ),
    "export: out in a missing folder": Bad(export(out=in_folder("a/out")), "the folder to hold 'out' does not exist"),
    "export: out in a file": Bad(
        export(out=lambda place: place.file("file") / "out"), "the folder to hold 'out' does not exist"
    ),
    # A folder that takes no new ones, from root neither.
    "export: out in a folder that is not to be written to": Bad(export(out="/proc/out"), "cannot write beside 'out': "),
    "export: out with too long a name": Bad(export(out=in_folder("x" * 300)), "File name too long"),
    "export: out with almost too long a name": Bad(export(out=in_folder("x" * 250)), "File name too long"),
}


# --- bundles --------------------------------------------------------------------------------------------------------


def damaged(change: Change, *words: object, system: str = "m3") -> Callable[[Place], list[object]]:
    """Words with the path of a damaged bundle after the first."""

    def made(place: Place) -> list[object]:
        bundle = place.bundle(system)
        change(bundle)
        command, *options = words
        return [command, bundle, *options]

    return made


ASK = ("answer", "--question", QUESTION, "--threads", 1)


def manifest(change: Callable[[dict[str, Any]], object]) -> Change:
    """Another manifest, with the hash of what it says now."""

    def sealed(data: dict[str, Any]) -> None:
        change(data)
        seal(data)

    return lambda bundle: edit_json(bundle / "bundle.json", sealed)


def link(name: str) -> Change:
    def change(bundle: Path) -> None:
        shutil.move(bundle / name, bundle.parent / "elsewhere")
        (bundle / name).symlink_to(bundle.parent / "elsewhere")

    return change


def nonsense_graph(bundle: Path) -> None:
    """A graph that is none, its hash in the manifest in order."""
    data = bytes(range(256)) * 9
    name = "comprehension.language.onnx"
    replace(bundle / name, data)
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest(lambda content: content["files"].update({name: entry}))(bundle)


def all_ones(bundle: Path) -> None:
    """Base weights of the bits of NaN, their hash in the manifest in order."""
    data = b"\xff" * (bundle / "weights/base.bin").stat().st_size
    replace(bundle / "weights/base.bin", data)
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest(lambda content: content["files"].update({"weights/base.bin": entry}))(bundle)


BUNDLES = {
    "bundle: verified on a device that computes nothing": Bad(
        lambda place: ["verify", place.sound(), "--device", "cuda"],
        "--device needs --executor, which says what is to be compared",
    ),
    "bundle: verified against nothing": Bad(
        lambda place: ["verify", place.sound(), "--against", "onnx"],
        "--against needs --executor, which says what is to be compared",
    ),
    "bundle: missing": Bad(
        lambda place: ["verify", place.folder / "nothing"], "a bundle is a directory, found none at 'nothing'"
    ),
    "bundle: a file": Bad(
        lambda place: ["inspect", place.file("file")], "a bundle is a directory, found none at 'file'"
    ),
    "bundle: an empty folder": Bad(lambda place: ["inspect", make("empty")(place)], "'empty' is not a bundle"),
    "bundle: a folder without a name": Bad(lambda place: ["inspect", "/"], "'/' is not a bundle"),
    "bundle: a release": Bad(lambda place: ["inspect", arguments("m3")["base"]], "it has no regular file bundle.json"),
    "bundle: name too long": Bad(lambda place: ["verify", "x" * 300], "File name too long"),
    "bundle: bit of the base weights": Bad(
        damaged(lambda bundle: flip(bundle / "weights/base.bin"), "verify"),
        "file weights/base.bin is damaged: SHA-256 must be",
    ),
    "bundle: bit of the task weights": Bad(
        damaged(lambda bundle: flip(bundle / "weights/comprehension.bin"), *ASK),
        "file weights/comprehension.bin is damaged: SHA-256 must be",
    ),
    "bundle: bit of a graph": Bad(
        damaged(lambda bundle: flip(bundle / "comprehension.language.onnx"), *ASK),
        "file comprehension.language.onnx is damaged: SHA-256 must be",
    ),
    "bundle: bit of a graph, unverified": Bad(
        damaged(lambda bundle: flip(bundle / "comprehension.language.onnx"), *ASK, "--no-verify"),
        "file comprehension.language.onnx is damaged: SHA-256 must be",
    ),
    "bundle: bit of the tokenizer": Bad(
        damaged(lambda bundle: flip(bundle / "tokenizer.json"), "inspect"),
        "file tokenizer.json is damaged: SHA-256 must be",
    ),
    "bundle: bit of the manifest": Bad(
        damaged(
            lambda bundle: replace(
                bundle / "bundle.json", (bundle / "bundle.json").read_bytes().replace(b"{", b"k", 1)
            ),
            "verify",
        ),
        "bundle.json must be JSON",
    ),
    "bundle: a stop id in the manifest": Bad(
        damaged(
            lambda bundle: edit_json(bundle / "bundle.json", lambda data: data["decoding"].update(stop_ids=[3])), *ASK
        ),
        "bundle.json is damaged: SHA-256 must be ",
    ),
    "bundle: bit of a hash": Bad(
        damaged(manifest(lambda data: data["files"]["tokenizer.json"].update(sha256="0" * 64)), "verify"),
        "file tokenizer.json is damaged: SHA-256 must be 0000000000000000...",
    ),
    "bundle: truncated": Bad(
        damaged(lambda bundle: cut(bundle / "weights/generation.bin"), "inspect"),
        "file weights/generation.bin must be ",
    ),
    "bundle: file missing": Bad(
        damaged(lambda bundle: (bundle / "generation.codes.onnx").unlink(), "inspect"),
        "the bundle lacks generation.codes.onnx",
    ),
    "bundle: file more": Bad(
        damaged(lambda bundle: (bundle / "more.bin").touch(), "inspect"),
        "the bundle holds 'more.bin', which its manifest does not list",
    ),
    "bundle: file more with a name that clears the screen": Bad(
        damaged(lambda bundle: (bundle / "more\x1b[2J\n.bin").touch(), "inspect"),
        r"the bundle holds 'more\x1b[2J\n.bin', which",
    ),
    "bundle: link": Bad(
        damaged(link("tokenizer.json"), "inspect"), "tokenizer.json must be part of the bundle, found a link"
    ),
    "bundle: linked folder": Bad(
        damaged(link("weights"), "verify"), "weights must be part of the bundle, found a link"
    ),
    "bundle: version of tomorrow": Bad(
        damaged(manifest(lambda data: data.update(version=5)), "inspect"),
        "bundle format version must be 2 or 4, found 5",
    ),
    "bundle: version of yesterday": Bad(
        damaged(manifest(lambda data: data.update(version=1)), "inspect"),
        "bundle format version must be 2 or 4, found 1",
    ),
    "bundle: unknown key": Bad(
        damaged(manifest(lambda data: data.update(plugins={})), "inspect"),
        "bundle.json has unknown keys ['plugins'] and lacks []",
    ),
    "bundle: path that leaves it": Bad(
        damaged(
            manifest(lambda data: data["files"].update({"../../etc/passwd": data["files"]["tokenizer.json"]})), "verify"
        ),
        "file names must stay inside the bundle, found '../../etc/passwd'",
    ),
    "bundle: manifest without end": Bad(
        damaged(lambda bundle: replace(bundle / "bundle.json", b"[" * 500_000), "inspect"), "bundle.json must be JSON"
    ),
    "bundle: manifest of a gigabyte": Bad(
        damaged(
            lambda bundle: (replaced(bundle / "bundle.json").touch(), os.truncate(bundle / "bundle.json", 1 << 30)),
            "inspect",
        ),
        "bundle.json must be at most 1048576 bytes",
    ),
    "bundle: key that clears the screen": Bad(
        damaged(manifest(lambda data: data["files"].update({"\x1b[2J": 3})), "inspect"),
        r"bundle.json: files.\x1b[2J must be an object, found int",
    ),
    "bundle: more layers than the graph": Bad(
        damaged(manifest(lambda data: data["language"].update(layers=4)), *ASK),
        "comprehension.language.onnx: past_key_values.3.key must be float32 ['B', 4, 'M', 16] by the manifest, "
        "found none",
    ),
    "bundle: a graph that is none": Bad(
        damaged(nonsense_graph, *ASK), "ONNX Runtime cannot load comprehension.language.onnx: "
    ),
    "bundle: weights that are no numbers": Bad(
        damaged(all_ones, *ASK), "the model must give finite logits, found 478 NaN or infinite of 478"
    ),
    "bundle: evaluated without being there": Bad(
        lambda place: ["evaluate", place.folder / "nothing"], "a bundle is a directory, found none at 'nothing'"
    ),
}


# --- questions and pictures -----------------------------------------------------------------------------------------


def answer(*more: object, question: str | None = QUESTION, system: str = "m3") -> Callable[[Place], list[object]]:
    def words(place: Place) -> list[object]:
        asked = [] if question is None else ["--question", question]
        made = [word(place) if callable(word) else word for word in more]
        return ["answer", place.sound(system), *asked, "--threads", 1, *made]

    return words


def with_threads(number: int) -> Callable[[Place], list[object]]:
    return lambda place: ["answer", place.sound(), "--question", QUESTION, "--threads", number]


def generate(*more: object, out: str | None = "out.png", system: str = "m3") -> Callable[[Place], list[object]]:
    def words(place: Place) -> list[object]:
        target = [] if out is None else ["--out", place.folder / out]
        made = [word(place) if callable(word) else word for word in more]
        return [
            "generate",
            place.sound(system),
            "--instruction",
            "Reconstruct the image.",
            *target,
            "--threads",
            1,
            *made,
        ]

    return words


def picture_file(data: bytes | Callable[[], bytes], name: str = "picture.png") -> Callable[[Place], Path]:
    return lambda place: place.file(name, data if isinstance(data, bytes) else data())


def encoded(kind: str, size: tuple[int, int] = (64, 48)) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few kilobytes that says it has 9,000 x 9,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    side = (9_000).to_bytes(4, "big")
    header = chunk(b"IHDR", side + side + bytes([8, 0, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(9_001 * 100))) + chunk(b"IEND", b"")


def image(
    data: bytes | Callable[[], bytes], *more: object, name: str = "picture.png"
) -> Callable[[Place], list[object]]:
    return answer("--image", picture_file(data, name), *more)


REQUESTS = {
    # the picture
    "image: missing": Bad(
        answer("--image", in_folder("no.png")), "no.png: cannot be opened: No such file or directory"
    ),
    "image: missing, as the bundle is, which comes later": Bad(
        lambda place: ["answer", place.folder / "none", "--question", QUESTION, "--image", place.folder / "no.png"],
        "no.png: cannot be opened: No such file or directory",
    ),
    "image: a folder": Bad(answer("--image", make("folder.png")), "folder.png: expected a file, found a directory"),
    "image: a pipe": Bad(
        answer("--image", make("pipe.png", os.mkfifo)), "pipe.png: expected a file, found a device or pipe"
    ),
    "image: empty": Bad(image(b""), "picture.png: expected a picture, found an empty file"),
    "image: text": Bad(image(b"Dear doctor,\n" * 20), "picture.png: expected PNG, JPEG or DICOM, found another format"),
    "image: gif named png": Bad(image(partial(encoded, "GIF")), "expected PNG, JPEG or DICOM, found another format"),
    "image: truncated png": Bad(image(lambda: encoded("PNG")[:-2000]), "picture.png: cannot be read as PNG: "),
    "image: truncated jpeg": Bad(image(lambda: encoded("JPEG")[:-900]), "picture.png: cannot be read as JPEG: "),
    "image: png of nothing but its signature": Bad(image(b"\x89PNG\r\n\x1a\n"), "cannot be read as PNG: "),
    "image: bomb": Bad(image(bomb), "expected at most 10000 pixels a side and 67108864 in all, found 9000 x 9000"),
    "image: wide bomb for generate": Bad(
        generate("--image", picture_file(bomb)), "expected at most 10000 pixels a side and 67108864 in all"
    ),
    "image: dicom of nothing but its preamble": Bad(
        image(bytes(128) + b"DICM", name="scan.dcm"),
        "scan.dcm: expected a transfer syntax in the file meta group, found none",
    ),
    "keep: the report's file": Bad(
        answer("--image", PICTURE, "--keep", in_folder("one"), "--out", in_folder("one")),
        "--keep and --out must be two files, found one",
    ),
    "keep: no picture": Bad(answer("--keep", in_folder("kept")), "--keep needs a picture: give --image"),
    "keep: no folder": Bad(
        answer("--image", PICTURE, "--keep", in_folder("none/kept")), "the folder to hold 'kept' does not exist"
    ),
    "keep: another file": Bad(
        answer("--image", PICTURE, "--keep", picture_file(partial(encoded, "PNG"), "kept")),
        "'kept' must begin with 'healthgpt-edge kept pictures 1'",
    ),
    "keep: a folder": Bad(
        answer("--image", PICTURE, "--keep", make("kept")), "--keep must be a file, 'kept' is a folder"
    ),
    "image: window in words": Bad(
        answer("--image", PICTURE, "--window", "lung"), "--window must be CENTRE,WIDTH, two numbers, got 'lung'"
    ),
    "image: window of three": Bad(answer("--image", PICTURE, "--window", "1,2,3"), "--window must be CENTRE,WIDTH"),
    "image: window of no width": Bad(
        image(lambda: encoded16(), "--window", "40,0"), "window must be a finite centre and a width of at least 1"
    ),
    "image: window of no number": Bad(
        image(lambda: encoded16(), "--window", "nan,400"), "window must be a finite centre and a width of at least 1"
    ),
    "image: window for a png of 8 bits": Bad(
        answer("--image", PICTURE, "--window", "40,400"),
        "wide.png: window applies to DICOM and 16-bit grey pictures only",
    ),
    "image: window without a picture": Bad(answer("--window", "40,400"), "frame and window need an image, got none"),
    "image: frame for a png": Bad(
        answer("--image", PICTURE, "--frame", 0), "wide.png: frame applies to DICOM files only"
    ),
    "image: frame in words": Bad(answer("--image", PICTURE, "--frame", "first"), "Invalid value for '--frame'"),
    "image: frame without a picture": Bad(generate("--frame", 1), "frame and window need an image, got none"),
    # the words
    "words: no question": Bad(answer(question=None), "Missing option '--question'"),
    "words: empty question": Bad(answer(question=""), "the question must hold words, got none"),
    "words: blank question": Bad(answer(question=" \t\n"), "the question must hold words, got none"),
    "words: too long a question": Bad(
        answer(question="x" * 131_073), "the question must have at most 131072 characters, got 131073"
    ),
    "words: more than the positions": Bad(
        answer(question="image " * 4000), "prompt and new tokens must fit 4096 positions, got "
    ),
    "words: not unicode": Bad(answer(question="what\udcff"), "text must be valid Unicode, got half a surrogate pair"),
    "words: no instruction": Bad(
        lambda place: ["generate", place.sound(), "--out", place.folder / "out.png"], "Missing option '--instruction'"
    ),
    # what the bundle cannot do
    "task: generate with qwen": Bad(generate(system="qwen"), "the bundle has no generation plugin, only comprehension"),
    "task: generate with phi4": Bad(generate(system="phi4"), "the bundle has no generation plugin, only comprehension"),
    # where the picture goes
    "out: not png": Bad(generate(out="out.jpg"), "--out must be a .png or .dcm file, got 'out.jpg'"),
    "out: no ending": Bad(generate(out="png"), "--out must be a .png or .dcm file, got 'png'"),
    "out: DICOM of no picture": Bad(
        generate(out="out.dcm"), "--out as .dcm takes patient and study from --image, which is missing"
    ),
    "out: DICOM of a PNG": Bad(
        generate("--image", PICTURE, out="out.dcm"),
        "wide.png: expected DICOM, to write DICOM of its study, found another format",
    ),
    "out: the picture itself": Bad(
        generate("--image", picture_file(partial(encoded, "PNG"), "out.png")),
        "--out must not be the file of --image, got 'out.png' for both",
    ),
    "out: the picture itself, by another path": Bad(
        generate(
            "--image",
            lambda place: make("a")(place) / ".." / picture_file(partial(encoded, "PNG"), "out.png")(place).name,
        ),
        "--out must not be the file of --image, got 'out.png' for both",
    ),
    "out: the preview in place of the picture": Bad(
        generate("--image", picture_file(partial(encoded, "PNG"), "out.partial.png"), "--progress"),
        "the file of --progress must not be the file of --image, got 'out.partial.png' for both",
    ),
    "out: in the bundle": Bad(
        lambda place: ["generate", bundle := place.bundle(), "--instruction", QUESTION, "--out", bundle / "out.png"],
        "--out must not lie in a bundle, whose files are all listed: got 'out.png' there",
    ),
    "keep: in the bundle": Bad(
        lambda place: [
            *("answer", bundle := place.bundle(), "--image", PICTURE, "--question", QUESTION),
            *("--keep", bundle / "weights" / "kept"),
        ],
        "--keep must not lie in a bundle",
    ),
    "out: missing folder": Bad(generate(out="a/out.png"), "the folder to hold 'out.png' does not exist"),
    "out: a folder": Bad(generate(lambda place: (make("out.png")(place), "--json")[1]), "'out.png' is a folder"),
    "out: a pipe": Bad(
        generate(lambda place: (make("out.png", os.mkfifo)(place), "--json")[1]),
        "--out must be a file, 'out.png' is a device or pipe",
    ),
    "out: in a folder that is not to be written to": Bad(
        lambda place: ["generate", place.sound(), "--instruction", QUESTION, "--out", "/proc/out.png"],
        "cannot be written",
    ),
    "out: left out": Bad(generate(out=None), "Missing option '--out'"),
    # limits and sampling
    "limit: no token": Bad(answer("--max-new-tokens", 0), "Invalid value for '--max-new-tokens': "),
    "limit: negative": Bad(generate("--max-new-tokens", -1), "Invalid value for '--max-new-tokens'"),
    "limit: too small for a picture": Bad(
        generate("--max-new-tokens", 1024), "max_new_tokens must be at least 1025 for 1024 codes, got 1024"
    ),
    "limit: too small for a free picture": Bad(
        generate("--image", PICTURE, "--faithful", "--max-new-tokens", 3),
        "a picture needs exactly 1024 codes, the model gave 2",
    ),
    "limit: more than the positions": Bad(
        answer("--max-new-tokens", 4096), "prompt and new tokens must fit 4096 positions, got 24 + 4096"
    ),
    "limit: beyond a machine's integer": Bad(
        answer("--max-new-tokens", 10**30), "prompt and new tokens must fit 4096 positions, got 24 + 1000000"
    ),
    "draft: unknown, and the bundle is missing, which comes later": Bad(
        lambda place: ["answer", place.folder / "none", "--question", QUESTION, "--draft", "input"],
        "draft must be one of auto, lookup, none, got 'input'",
    ),
    "draft: unknown for a picture, and the bundle is missing, which comes later": Bad(
        lambda place: [
            *("generate", place.folder / "none", "--instruction", QUESTION),
            *("--out", place.folder / "out.png", "--draft", "lookup"),
        ],
        "draft must be one of auto, input, jacobi, none, got 'lookup'",
    ),
    "sampling: negative temperature": Bad(
        answer("--temperature", -1), "temperature must be 0 or a positive number, found -1.0"
    ),
    "sampling: temperature not a number": Bad(
        answer("--temperature", "nan"), "temperature must be 0 or a positive number, found nan"
    ),
    "sampling: temperature in words": Bad(answer("--temperature", "hot"), "Invalid value for '--temperature'"),
    "sampling: endless temperature": Bad(
        generate("--temperature", "inf"), "temperature must be 0 or a positive number"
    ),
    "sampling: top-p of zero": Bad(generate("--top-p", 0), "top_p must be above 0 and at most 1, found 0.0"),
    "sampling: top-p above one": Bad(answer("--top-p", 1.5), "top_p must be above 0 and at most 1, found 1.5"),
    "sampling: negative top-k": Bad(answer("--top-k", -1), "top_k must be 0 or above, found -1"),
    "sampling: negative seed": Bad(answer("--seed", -1), "seed must be 0 or above, found -1"),
    "serve: no bundle": Bad(
        lambda place: ["serve", place.folder / "none"], "a bundle is a directory, found none at 'none'"
    ),
    "serve: no megabytes": Bad(
        lambda place: ["serve", place.sound(), "--keep-pictures", -1], "Invalid value for '--keep-pictures'"
    ),
    # the command line
    "command: none": Bad(lambda place: [], "Missing command"),
    "command: unknown": Bad(lambda place: ["diagnose", place.sound()], "No such command 'diagnose'"),
    "command: unknown option": Bad(answer("--verbose"), "No such option: --verbose"),
    "command: two pictures": Bad(
        answer("--image", PICTURE, "--image", PICTURE), "--image must be given once, got it 2 times"
    ),
    "command: yes and no": Bad(answer("--verify", "--no-verify"), "--verify must be given once, got it 2 times"),
    "command: one bundle too many": Bad(
        lambda place: ["inspect", place.sound(), place.sound()], "unexpected extra argument"
    ),
    "command: no bundle": Bad(lambda place: ["inspect"], "Missing argument 'BUNDLE'"),
    "command: option without its value": Bad(
        lambda place: ["answer", place.sound(), "--question"], "'--question' requires an argument"
    ),
    "command: no threads": Bad(with_threads(0), "threads must be from 1 to 1024, got 0"),
    "command: fewer than no threads": Bad(with_threads(-1), "threads must be from 1 to 1024, got -1"),
    "command: threads of a farm": Bad(with_threads(10**6), "threads must be from 1 to 1024, got 1000000"),
    "command: unknown device": Bad(answer("--device", "tpu"), "device must be cpu or cuda, found 'tpu'"),
    "command: device that is not there": Bad(
        answer("--device", "cuda"), "device cuda needs CUDAExecutionProvider; this"
    ),
    "command: negative phantoms": Bad(
        lambda place: ["evaluate", place.sound(), "--answer-phantoms", -1], "Invalid value for '--answer-phantoms'"
    ),
}


def encoded16() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64)).save(buffer, "PNG")
    return buffer.getvalue()


# --- the test -------------------------------------------------------------------------------------------------------

CASES = EXPORTS | BUNDLES | REQUESTS


@pytest.fixture
def place(tmp_path, golden_bundle) -> Place:
    (tmp_path / "place").mkdir()
    return Place(tmp_path / "place", golden_bundle)


def listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Everything in `folder`: kind, size and time of the last change by name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(folder))] = status.st_mode, status.st_size, status.st_mtime_ns
    return found


def assert_refused(outcome: Outcome, message: str) -> None:
    assert outcome.code == 2, outcome
    assert outcome.output == ""
    assert outcome.errors.startswith("error: ") and outcome.errors.endswith("\n")
    line = outcome.errors.removesuffix("\n")
    assert line.isprintable(), line
    assert message in line


def test_there_are_enough_cases():
    assert len(CASES) >= 40


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused(place, name, capfd, monkeypatch):
    # As on a machine without the provider, whatever this one has.
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    case = CASES[name]
    words = case.words(place)
    before = listing(place.folder)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        outcome = run(*words)
    assert_refused(outcome, case.message)
    assert listing(place.folder) == before
    # Nor does a library have its say beside that line.
    assert capfd.readouterr() == ("", "")
    assert [str(warning.message) for warning in heard] == []
    # A message names files, not where this machine keeps them.
    assert str(place.folder) not in outcome.errors


def test_answer_needs_its_plugin(place, tmp_path):
    """A bundle that only draws."""
    words = export(comprehension=None, out=tmp_path / "drawing")(place)
    assert run(*words).code == 0
    assert_refused(
        run("answer", tmp_path / "drawing", "--question", QUESTION),
        "the bundle has no comprehension plugin, only generation",
    )


# --- in a process of its own ----------------------------------------------------------------------------------------


def process(words: list[Any], prepare: Callable[[], object] | None = None, **options: Any) -> Outcome:
    done = subprocess.run(
        [sys.executable, "-m", "healthgpt_edge.cli", *map(str, words)],
        capture_output=True,
        text=True,
        preexec_fn=prepare,
        timeout=120,
        **options,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    "name",
    [
        "export: hostile plugin",
        "export: nan in clip",
        "bundle: bit of a graph",
        "bundle: a graph that is none",
        "bundle: weights that are no numbers",
        "image: truncated jpeg",
        "words: not unicode",
        "command: unknown",
    ],
)
def test_a_process_says_no_more_than_that_line(place, name):
    """What libraries write to stderr by themselves, at import or at exit, would show here."""
    case = CASES[name]
    words = case.words(place)
    before = listing(place.folder)
    assert_refused(process(words), case.message)
    assert listing(place.folder) == before


def limit_file_size(size_bytes: int) -> None:
    """As on a full disk, writing fails beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes))


@pytest.mark.parametrize("size_bytes", [0, 100_000, 2_000_000])
def test_a_disk_that_is_full_while_exporting(place, size_bytes):
    """At the first byte, among the adapters, and among the weights of the VQGAN."""
    outcome = process(export()(place), partial(limit_file_size, size_bytes))
    assert_refused(outcome, "cannot write the bundle 'out': File too large")
    assert listing(place.folder) == {}


def test_a_disk_that_is_full_when_the_picture_is_written(place):
    old = place.file("out.png", b"an older picture")
    outcome = process(generate("--image", PICTURE)(place), partial(limit_file_size, 1000))
    assert_refused(outcome, "out.png: cannot be written: File too large")
    assert list(listing(place.folder)) == ["out.png"] and old.read_bytes() == b"an older picture"


@pytest.mark.parametrize("cases", [1, 200])
def test_a_disk_that_is_full_when_details_are_written(place, cases):
    """At the end, and when there is more than a buffer holds: the scores are shown all the same."""
    ask = {"task": "answer", "question": QUESTION, "expected": "Yes", "max_new_tokens": 2}
    asked = place.file("cases.jsonl", b"\n".join([json.dumps(ask).encode()] * cases))
    words = ["evaluate", place.sound(), "--cases", asked, "--details", place.folder / "details.jsonl", "--threads", 1]
    outcome = process([*words, "--json"], partial(limit_file_size, 10))
    assert outcome.code == 2 and outcome.errors == "error: File too large: details.jsonl\n"
    assert json.loads(outcome.output)["answers"]["answer"]["total"] == cases
    assert list(listing(place.folder)) == ["cases.jsonl"]


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "nowhere", "--instruction", QUESTION, "--out", "out.png"],
        ["answer", "nowhere", "--question", QUESTION, "--image", PICTURE, "--keep", "kept"],
    ],
)
def test_a_folder_that_takes_no_file_is_named_before_the_bundle_is_loaded(words, monkeypatch):
    """And not after the minutes that a picture takes."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK | os.X_OK)
    assert_refused(run(*words), f"the folder to hold {words[-1]!r} cannot be written to")


def test_a_picture_that_does_not_fit_the_memory(place, monkeypatch):
    """While it is read, and when it is padded to a square; neither says that the file is damaged."""

    def exhausted(*_: object) -> None:
        raise MemoryError

    words = answer("--image", PICTURE)(place)
    with monkeypatch.context() as patch:
        patch.setattr("healthgpt_edge.images._to_rgb", exhausted)
        assert_refused(run(*words), "wide.png: there is not enough memory to read it")
    monkeypatch.setattr("healthgpt_edge.inference.prepare", exhausted)
    assert_refused(run(*words), "there is not enough memory")


# --- stopped half-way -----------------------------------------------------------------------------------------------

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture(params=SIGNALS, ids=lambda number: number.name)
def stop(request) -> Callable[..., None]:
    """Sends this process a signal that ends it, which here does not where the command leaves it alone."""
    number = request.param

    def heard(*_: object) -> None:
        raise AssertionError(f"{number.name} was not caught")

    def send(*_: object, **__: object) -> None:
        signal.raise_signal(number)

    before = signal.signal(number, heard)
    send.code = SIGNALS[number]
    yield send
    restored = signal.signal(number, before)
    assert restored is heard  # a host that calls `main` has its own handlers back


def assert_stopped(outcome: Outcome, code: int) -> None:
    assert (outcome.code, outcome.output, outcome.errors) == (code, "", "error: interrupted\n")


def test_a_stopped_export_leaves_nothing(place, stop, monkeypatch):
    """After the graphs and weights of comprehension are written."""
    monkeypatch.setattr("healthgpt_edge.export.bundle.build_codes", stop)
    assert_stopped(run(*export()(place)), stop.code)
    assert listing(place.folder) == {}


def test_who_presses_ctrl_c_twice_leaves_nothing_either(place, stop, monkeypatch):
    remove = shutil.rmtree

    def stop_and_remove(*arguments: object, **options: Any) -> None:
        stop()
        remove(*arguments, **options)

    monkeypatch.setattr("healthgpt_edge.export.bundle.build_codes", stop)
    monkeypatch.setattr("healthgpt_edge.export.bundle.shutil.rmtree", stop_and_remove)
    assert_stopped(run(*export()(place)), stop.code)
    assert listing(place.folder) == {}


def test_a_stopped_answer(place, stop, monkeypatch):
    monkeypatch.setattr("healthgpt_edge.inference.decoding", stop)
    assert_stopped(run(*answer("--image", PICTURE)(place)), stop.code)


def test_a_stopped_picture_leaves_no_preview(place, stop, monkeypatch):
    """While the second row of codes is made: a picture of a patient must not stay in a file nobody asked for."""
    previews = []

    def write_and_stop(path: Path, pixels: np.ndarray) -> None:
        write_image(path, pixels)
        previews.append(path.name)
        stop()

    monkeypatch.setattr("healthgpt_edge.images.write_image", write_and_stop)
    assert_stopped(run(*generate("--image", PICTURE, "--progress")(place)), stop.code)
    assert previews == ["out.partial.png"]
    assert listing(place.folder) == {}


def test_an_interrupt_of_a_library_is_one_too(place, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("healthgpt_edge.inference.decoding", interrupt)
    assert_stopped(run(*generate("--image", PICTURE)(place)), 130)
    assert listing(place.folder) == {}


def test_what_is_ignored_stays_ignored(place, monkeypatch):
    """As by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ignored = []
        monkeypatch.setattr(
            "healthgpt_edge.bundle.Bundle.verify",
            lambda *_, **__: ignored.append(signal.getsignal(signal.SIGHUP)) or 0,
        )
        assert run("inspect", place.sound()).code == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert ignored == [signal.SIG_IGN]


def test_the_version_is_told():
    """What a site names when it reports something."""
    outcome = run("--version")
    versions = [f"{name} {version(name)}" for name in ("healthgpt-edge", "onnxruntime")]
    assert (outcome.code, outcome.output, outcome.errors) == (0, ", ".join(versions) + "\n", "")


def test_help_is_no_bad_input():
    for words in (["--help"], ["export", "--help"], ["answer", "--help"]):
        outcome = run(*words)
        assert (outcome.code, outcome.errors) == (0, "")
        assert "Usage: " in outcome.output
