"""Write a bundle: graphs and weights into a temporary directory, renamed into place when all of it is there."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import onnx

from healthgpt_edge import manifest as schema
from healthgpt_edge.bundle import MANIFEST, is_in_bundle
from healthgpt_edge.errors import BundleError
from healthgpt_edge.files import flush_folder
from healthgpt_edge.machine import version
from healthgpt_edge.prompt import Tokenizer

from .calibrate import calibrate
from .checkpoint import Checkpoint
from .graph.codes import build_codes
from .graph.draft import build_draft
from .graph.language import build_language, build_vocabulary, first_logit_row
from .graph.vision import build_vision
from .quantize import BLOCK_SIZES, CACHE_TYPES, LAYOUTS, PANEL, Storage, is_quantised
from .summary import Part, Summary, folds_of, parts_of
from .tokenizer import write_tokenizer
from .weights import WeightFile

# A reader hashes several files at once, and a file system for sticks, FAT32, takes none of 4 GiB.
_WEIGHT_FILE_BYTES = 1 << 30


def export_bundle(
    checkpoint: Checkpoint,
    out: Path,
    *,
    precision: str = "fp32",
    block_size: int = 128,
    cache: str | None = None,
    layout: str = "panels",
    pictures: Sequence[Any] = (),
    on_step: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Summary:
    """Export `checkpoint` to the new directory `out`; returns what was written and folded.

    precision: one of fp32, fp16, bf16, int8, int4; block_size: 32, 64 or 128, for the integer ones; cache: fp32, fp16
    or int8 for keys and values, by default what the precision has (Storage.of). layout of the decoder's integers:
    panels, for our kernels, or rows, for ONNX Runtime without them; linears that are not of whole panels lie in rows
    either way. With `pictures`, as `read_image` takes them, the integer matrices of the decoder are rounded for what
    the model makes of those (calibrate.py).
    `on_step(name, done, total)` reports progress in decoder layers and graphs. Nothing is left at `out` if anything
    fails. Raises CheckpointError, BundleError, ImageError.
    """
    if precision not in schema.PRECISIONS:
        raise BundleError(f"precision must be one of {', '.join(schema.PRECISIONS)}, got {precision!r}")
    if block_size not in BLOCK_SIZES:
        raise BundleError(f"block size must be one of {BLOCK_SIZES}, got {block_size}")
    if cache not in (None, *CACHE_TYPES):
        raise BundleError(f"cache must be one of {', '.join(CACHE_TYPES)}, got {cache!r}")
    if layout not in LAYOUTS:
        raise BundleError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if pictures and not is_quantised(Storage.of(precision).linear):
        raise BundleError(f"pictures to calibrate with need integer matrices, int8 or int4, got {precision}")
    with _new_directory(out) as folder:
        return _Export(checkpoint, folder, precision, block_size, cache, layout, pictures, on_step).run()


@contextmanager
def _new_directory(out: Path) -> Iterator[Path]:
    """A temporary directory beside `out` that takes its place on success and is removed on failure."""
    try:
        if out.exists() or out.is_symlink():
            raise BundleError(f"{out.name!r} exists already; a bundle is written to a new directory")
        if not out.parent.is_dir():
            raise BundleError(f"the folder to hold {out.name!r} does not exist")
        if is_in_bundle(out):
            raise BundleError(f"{out.name!r} must not lie in another bundle, whose files are all listed")
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise BundleError(f"cannot write beside {out.name[:100]!r}: {error.strerror}") from error
    try:
        yield folder
        folder.chmod(0o755)
        flush_folder(folder)
        folder.rename(out)
    except OSError as error:
        raise BundleError(f"cannot write the bundle {out.name!r}: {error.strerror}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Export:
    """The steps of one export, and the files written so far."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        precision: str,
        block_size: int,
        cache: str | None,
        layout: str,
        pictures: Sequence[Any],
        on_step: Callable[[str, int, int], None],
    ) -> None:
        self.checkpoint, self.folder, self.precision, self.block_size = checkpoint, folder, precision, block_size
        config, self.pictures = checkpoint.language, pictures
        whole = all(config.linear_shape(linear)[0] % PANEL == 0 for linear in config.linears)
        self.storage = Storage.of(precision, cache, panels=layout == "panels" and whole)
        self.files: dict[str, schema.FileEntry] = {}
        self.parts: list[Part] = []
        self.graphs: dict[str, dict[str, str]] = {}
        self._on_step, self._done = on_step, 0
        layers = checkpoint.language.layers
        self._total = len(checkpoint.tasks) * (layers + 1) + ("generation" in checkpoint.tasks)
        self._total += layers if pictures else 0

    def run(self) -> Summary:
        (self.folder / "weights").mkdir()
        tokens = self.checkpoint.tokens
        text, options = write_tokenizer(self.checkpoint.base_dir, tokens.codes if tokens else None)
        self._write("tokenizer.json", text.encode())
        with ExitStack() as stack:  # closes the files whatever fails
            base = stack.enter_context(self._weight_file("base"))
            own = {task: stack.enter_context(self._weight_file(task)) for task in sorted(self.checkpoint.tasks)}
            if self.pictures:
                tokenizer = Tokenizer.load(self.folder / "tokenizer.json", options)
                arguments = (self.checkpoint, tokenizer, self.pictures, base, own, self.storage, self.block_size)
                calibrate(*arguments, on_layer=lambda: self._step("calibrate"))
            for task, file in own.items():
                self._task(task, base, file)
            self._close(base)
        manifest = self._manifest(options)
        (self.folder / MANIFEST).write_text(manifest.to_json())
        # What was just written must open: the reader's checks are the writer's, too.
        schema.Manifest.from_json((self.folder / MANIFEST).read_bytes())
        total = sum(entry.size for entry in self.files.values())
        return Summary(tuple(self.parts), total, tuple(folds_of(self.checkpoint)))

    def _task(self, task: str, base: WeightFile, own: WeightFile) -> None:
        self.graphs[task] = {}
        self._language(task, base, own)
        vision = build_vision(self.checkpoint, task, base, own, self.storage.vision, self.block_size)
        self._save(task, "vision", vision)
        self._step(f"{task}: vision")
        if task == "generation":
            self._save(task, "codes", build_codes(self.checkpoint, own, self.storage.picture))
            self._save(task, "draft", build_draft(self.checkpoint, own, self.storage.picture))
            self._step(f"{task}: codes")
        self._close(own)

    def _language(self, task: str, base: WeightFile, own: WeightFile) -> None:
        arguments = (self.checkpoint, task, base, own, self.storage, self.block_size)
        self._save(task, "language", build_language(*arguments, on_layer=lambda: self._step(f"{task}: language")))
        if first_logit_row(self.checkpoint, task):
            self._save(task, "vocabulary", build_vocabulary(*arguments))

    def _weight_file(self, name: str) -> WeightFile:
        location = f"weights/{name}.bin"
        return WeightFile(self.folder / location, location, _WEIGHT_FILE_BYTES)

    def _close(self, file: WeightFile) -> None:
        self.files |= file.close()
        self.parts += parts_of(file)

    def _save(self, task: str, role: str, model: onnx.ModelProto) -> None:
        name = f"{task}.{role}.onnx"
        self._write(name, model.SerializeToString())
        self.graphs[task][role] = name

    def _write(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)
        self.files[name] = schema.FileEntry(len(data), hashlib.sha256(data).hexdigest())

    def _step(self, name: str) -> None:
        self._done += 1
        self._on_step(name, self._done, self._total)

    def _manifest(self, tokenizer_options: dict[str, object]) -> schema.Manifest:
        checkpoint, language, vision = self.checkpoint, self.checkpoint.language, self.checkpoint.vision
        count = len(self.pictures)
        tokens, vq = checkpoint.tokens, checkpoint.vq
        codes = None
        if tokens and vq and "generation" in checkpoint.tasks:
            codes = schema.Codes(
                start=tokens.start,
                first=tokens.first_code,
                count=tokens.codes,
                end=tokens.end,
                newline=tokens.newline,
                grid=vq.grid,
                image_size=vq.image_size,
            )
        return schema.Manifest(
            format=schema.FORMAT,
            version=schema.VERSION_IN_PANELS if self.storage.panels else schema.VERSION,
            producer=f"healthgpt-edge {version('healthgpt-edge')}",
            template=checkpoint.template,
            precision=self.precision,
            block_size=self.block_size,
            cache_precision=next(name for name, kind in CACHE_TYPES.items() if kind == self.storage.cache),
            language=schema.Language(
                architecture=language.architecture,
                layers=language.layers,
                hidden=language.hidden,
                heads=language.heads,
                kv_heads=language.kv_heads,
                head_dim=language.head_dim,
                intermediate=language.intermediate,
                vocab=language.vocab,
                max_positions=language.max_positions,
            ),
            vision=schema.Vision(vision.image_size, vision.patches, vision.background),
            tokenizer=schema.Tokenizer("tokenizer.json", dict(tokenizer_options)),
            decoding=schema.Decoding(
                tuple(checkpoint.generation.eos_ids), float(checkpoint.generation.repetition_penalty)
            ),
            codes=codes,
            tasks={
                name: schema.Task(
                    task.rank,
                    task.experts,
                    float(task.alpha),
                    first_logit_row(checkpoint, name),
                    self.graphs[name],
                )
                for name, task in checkpoint.tasks.items()
            },
            provenance=checkpoint.provenance() | ({"calibration": [f"{count} pictures"]} if count else {}),
            files=self.files,
            own_sha256="",
        ).sealed()
