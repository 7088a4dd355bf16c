"""The command line, `healthgpt-edge`. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperCommand

from .errors import HealthGPTError, ImageError, PromptError
from .stopping import stopping_cleanly

if TYPE_CHECKING:
    from PIL.Image import Image

    from .bundle import Bundle
    from .engines import EngineRecord
    from .results import Answer, Picture
    from .session import Session

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Run HealthGPT medical vision-language models on any machine.",
)
# Progress and notes go to stderr, so that stdout holds the result alone.
notes = Console(stderr=True, highlight=False)
# What several questions about one picture may keep of it: 0.7 GB for M3 after the longest answer.
_ONE_PICTURE_BYTES = 1 << 30
# The widest tables fit.
_PIPE_COLUMNS = 120

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A directory written by `export`.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Threads = Annotated[int | None, typer.Option("--threads", help="Threads to compute with.")]
ExecutorName = Annotated[str, typer.Option("--executor", help="onnx, or tensorrt with the engines of `build`.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu or cuda; onnx runs on the CPU by default.", show_default=False)
]
Temperature = Annotated[float, typer.Option("--temperature", help="0 is greedy.")]
TopP = Annotated[float, typer.Option("--top-p", help="Sample from this share of the probability.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the sampling.")]
Frame = Annotated[int | None, typer.Option("--frame", help="Frame of a multi-frame DICOM file, from 0.")]
Window = Annotated[str | None, typer.Option("--window", metavar="CENTRE,WIDTH", help="DICOM window.")]
Kernels = Annotated[bool, typer.Option("--kernels/--no-kernels", help="Native kernels, where they are built.")]
Certify = Annotated[bool, typer.Option("--certify", help="Decode again without drafts, and fail if ids differ.")]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Check the hashes of the weights first.")]


class OneOfEach(TyperCommand):
    """A command that refuses an option given twice; its parser would take the last, one picture of two."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        *_, given = self.make_parser(ctx).parse_args(args=list(args))
        for one in given:
            if given.count(one) > 1 and not getattr(one, "multiple", False):
                raise HealthGPTError(f"{one.opts[0]} must be given once, got it {given.count(one)} times")
        return super().parse_args(ctx, args)


def _print_version(wanted: bool) -> None:
    from .machine import version

    if wanted:
        print(", ".join(f"{name} {version(name)}" for name in ("healthgpt-edge", "onnxruntime")))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", callback=_print_version)] = False,
) -> None:
    """What goes before a command."""


@app.command(cls=OneOfEach)
def export(
    base: Annotated[Path, typer.Option(help="Directory of the base model.")],
    vision: Annotated[Path, typer.Option(help="Directory of the CLIP vision tower.")],
    out: Annotated[Path, typer.Option(help="The new bundle directory.")],
    comprehension: Annotated[Path | None, typer.Option(help="com_hlora_weights*.bin")] = None,
    generation: Annotated[Path | None, typer.Option(help="gen_hlora_weights.bin")] = None,
    fusion: Annotated[Path | None, typer.Option(help="fusion_layer_weights.bin")] = None,
    vqgan: Annotated[Path | None, typer.Option(help="Directory with model.yaml and last.ckpt.")] = None,
    template: Annotated[str | None, typer.Option(help="phi3, phi4 or qwen; inferred when left out.")] = None,
    hlora_alpha: Annotated[float | None, typer.Option(help="H-LoRA alpha; twice the rank when left out.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, fp16, int8 or int4.")] = "fp32",
    block_size: Annotated[int, typer.Option(help="Block of int8 and int4: 32, 64 or 128.")] = 128,
    cache: Annotated[str | None, typer.Option(help="Keys and values: fp32, fp16 or int8; else by precision.")] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="Folder of pictures (PNG, JPEG, DICOM) to round int4 for, over many minutes.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn a released checkpoint into a bundle."""
    try:
        from .export.bundle import export_bundle
        from .export.checkpoint import Checkpoint
    except ModuleNotFoundError as error:
        raise HealthGPTError(f"export needs {error.name}: pip install 'healthgpt-edge[export]'") from error
    with (
        Checkpoint.open(
            base=base,
            vision=vision,
            comprehension=comprehension,
            generation=generation,
            fusion=fusion,
            vqgan=vqgan,
            template=template,
            hlora_alpha=hlora_alpha,
        ) as checkpoint,
        _progress() as progress,
    ):
        bar = progress.add_task("export", total=None)
        summary = export_bundle(
            checkpoint,
            out,
            precision=precision,
            block_size=block_size,
            cache=cache,
            pictures=_files(calibrate) if calibrate else (),
            on_step=lambda name, done, total: progress.update(bar, description=name, completed=done, total=total),
        )
    if as_json:
        _print_json({"bundle": str(out), **dataclasses.asdict(summary)})
        return
    table = Table("file", "part", "bytes", title=f"{out} ({precision})")
    table.columns[2].justify = "right"
    for part in summary.parts:
        table.add_row(part.file, part.part, f"{part.size_bytes:,}")
    table.add_row("total", "graphs, tokenizer and padding too", f"{summary.total_bytes:,}")
    _print_table(table)
    print("\n".join(f"folded: {line}" for line in summary.folded))


@app.command(cls=OneOfEach)
def inspect(bundle: BundlePath, as_json: Json = False) -> None:
    """Show what a bundle holds, without loading its weights."""
    from .bundle import Bundle

    opened = Bundle.open(bundle, verify=False)
    manifest = opened.manifest
    if as_json:
        engines = {record.target: dataclasses.asdict(record) for record in _engine_records(opened)}
        _print_json(json.loads(manifest.to_json()) | ({"engines": engines} if engines else {}))
        return
    table = Table("", "", title=str(bundle), show_header=False)
    language, vision = manifest.language, manifest.vision
    table.add_row("system", f"{language.architecture}, template {manifest.template}")
    blocks = f", blocks of {manifest.block_size}" if manifest.precision.startswith("int") else ""
    table.add_row("precision", f"{manifest.precision}{blocks}; caches {manifest.cache_precision}")
    table.add_row("language", f"{language.layers} layers, hidden {language.hidden}, vocabulary {language.vocab}")
    table.add_row("vision", f"{vision.image_size} x {vision.image_size}, {vision.patches} patches")
    for name, task in sorted(manifest.tasks.items()):
        table.add_row(name, f"rank {task.rank}, {task.experts} experts, alpha {task.alpha:g}")
    if manifest.codes:
        codes = manifest.codes
        table.add_row("pictures", f"{codes.grid} x {codes.grid} of {codes.count} codes, {codes.image_size} px")
    for name, entry in sorted(manifest.files.items()):
        table.add_row(name, f"{entry.size:,} bytes")
    for record in _engine_records(opened):
        made = record.settings
        gpus = ", ".join(made.compute_capabilities) or "any GPU"
        held = f"{made.compute}{' with our plugin' if made.plugin else ''}, {made.max_context} tokens, for {gpus}"
        table.add_row(f"engines/{record.target}", f"TensorRT {record.tensorrt}; {held}")
        for name, engine in record.engines.items():
            table.add_row(f"engines/{record.target}/{name}.engine", f"{engine.size:,} bytes")
    _print_table(table)


@app.command(cls=OneOfEach)
def build(
    bundle: BundlePath,
    target: Annotated[str, typer.Option(help="tensorrt-rtx (needs no GPU), or tensorrt for the GPU at hand.")],
    compute_capability: Annotated[
        str | None, typer.Option(metavar="8.6,8.9,...", help="GPUs to build for; all of TensorRT-RTX's when left out.")
    ] = None,
    compute: Annotated[str | None, typer.Option(help="fp16 or bf16; fp32 for an fp32 bundle.")] = None,
    max_context: Annotated[
        int | None, typer.Option(min=1, help="Tokens the caches hold; at most 4096 by default.")
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="New tokens of a decode pass, as drafts need.")] = 64,
    plugin: Annotated[bool, typer.Option("--plugin", help="Our H-LoRA kernel in the full TensorRT.")] = False,
    stream_weights: Annotated[
        bool, typer.Option("--stream-weights", help="For a GPU too small for the weights: keep there what fits.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build a bundle's TensorRT engines into it, in place of older ones of the same target."""
    from .bundle import Bundle

    try:
        from .export.engines.build import build_engines, default_settings
    except ModuleNotFoundError as error:
        raise HealthGPTError(f"build needs {error.name}: pip install 'healthgpt-edge[engines]'") from error
    opened = Bundle.open(bundle)
    capabilities = tuple(compute_capability.split(",")) if compute_capability else ()
    settings = default_settings(opened.manifest, capabilities, compute, max_context, max_rows, plugin, stream_weights)
    with _progress() as progress:
        bar = progress.add_task("build", total=None)
        record = build_engines(
            opened,
            target,
            settings,
            on_step=lambda name, done, total: progress.update(bar, description=name, completed=done, total=total),
        )
    if as_json:
        _print_json({"bundle": str(bundle), **dataclasses.asdict(record)})
        return
    table = Table("engine", "bytes", "seconds", title=f"{bundle}: {target} {record.tensorrt}, {settings.compute}")
    for name, entry in record.engines.items():
        table.add_row(name, f"{entry.size:,}", f"{entry.seconds:.1f}")
    _print_table(table)


@app.command(cls=OneOfEach)
def verify(
    bundle: BundlePath,
    executor: Annotated[
        str | None, typer.Option(help="Compare what this executor computes, too: onnx or tensorrt.", show_default=False)
    ] = None,
    against: Annotated[
        str, typer.Option(help="The executor it is compared with; with itself, by its standard bodies.")
    ] = "onnx",
    device: Device = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Check every byte of a bundle against its manifest, and with --executor what a machine computes from it."""
    from .bundle import Bundle

    opened = Bundle.open(bundle, verify=False)
    total = sum(entry.size for entry in opened.manifest.files.values())
    with _progress() as progress:
        bar = progress.add_task("verify", total=total)
        checked = opened.verify(on_bytes=lambda count: progress.advance(bar, count))
    result: dict[str, Any] = {"ok": True, "files": len(opened.manifest.files), "bytes": checked}
    if executor is not None:
        from .acceptance import compare

        found = _load(bundle, executor=executor, device=device, threads=threads, kernels=True, verify=False)
        # The same executor on the same device is held to the graphs' standard bodies, not to itself.
        kernels = against != executor or device == "cuda"
        expected = _load(bundle, executor=against, device=None, threads=threads, kernels=kernels, verify=False)
        if found.executor.name == expected.executor.name:
            raise HealthGPTError(f"{executor} must be compared with another, found {expected.executor.name} in both")
        with _progress() as progress:
            bar = progress.add_task("compare", total=None)
            report = compare(found, expected, on_step=lambda name: progress.update(bar, description=name))
        result |= {"ok": report.passed, **report.to_json()}
        if not as_json:
            table = Table("what", "found", "must be", "", title=f"{report.executor} against {report.against}")
            for check in report.checks:
                table.add_row(check.name, f"{check.found:.5g}", check.bound, "ok" if check.passed else "FAILED")
            _print_table(table)
    if as_json:
        _print_json(result)
    elif result["ok"]:
        print(f"ok: {result['files']} files, {checked:,} bytes")
    if not result["ok"]:
        raise HealthGPTError(f"{executor} must compute what {against} does: {report.first_failure}")


@app.command(cls=OneOfEach)
def answer(
    bundle: BundlePath,
    question: Annotated[list[str], typer.Option(help="The question; several are asked one after another.")],
    image: Annotated[Path | None, typer.Option(help="PNG, JPEG or DICOM file; may be left out.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 1024,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    frame: Frame = None,
    window: Window = None,
    draft: Annotated[str, typer.Option(help="Guess ahead: auto, lookup (in the words so far) or none.")] = "auto",
    certify: Certify = False,
    keep: Annotated[
        Path | None, typer.Option(help="Keep what was read of pictures in this file, for questions to come.")
    ] = None,
    executor: ExecutorName = "onnx",
    device: Device = None,
    threads: Threads = None,
    kernels: Kernels = True,
    verify: Verify = True,
    as_json: Json = False,
) -> None:
    """Answer a question about a picture; the text appears as it is written, a line for each question."""
    from .decoding import Sampling
    from .session import COMPREHENSION

    if keep and not image:
        raise HealthGPTError("--keep needs a picture: give --image")
    if keep and not keep.parent.is_dir():
        raise HealthGPTError(f"the folder to hold {keep.name!r} does not exist")
    sampling = Sampling(temperature, top_p, seed)
    picture = _picture(image, frame, window)
    session = _load(
        bundle,
        tasks=(COMPREHENSION,),
        executor=executor,
        device=device,
        threads=threads,
        verify=verify,
        kernels=kernels,
        prefix_cache_bytes=_ONE_PICTURE_BYTES if len(question) > 1 or keep else 0,
    )
    if keep and keep.exists():
        session.restore_pictures(keep)

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    results = []
    for one in question:
        result = session.answer(
            picture,
            one,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            draft=draft,
            certify=certify,
            on_text=None if as_json else write,
        )
        _note_uncertified(result)
        results.append(dataclasses.asdict(result))
        if not as_json:
            print()
    if keep and not all(result["reused_tokens"] for result in results):
        session.save_pictures(keep)
    if as_json:
        _print_json(results[0] if len(results) == 1 else {"answers": results})


@app.command(cls=OneOfEach)
def generate(
    bundle: BundlePath,
    instruction: Annotated[str, typer.Option(help="What to make.")],
    out: Annotated[Path, typer.Option(help="The file to write: PNG, or DICOM of the study of --image.")],
    image: Annotated[Path | None, typer.Option(help="PNG, JPEG or DICOM file; may be left out.")] = None,
    faithful: Annotated[bool, typer.Option("--faithful", help="Run free, as the original does.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    frame: Frame = None,
    window: Window = None,
    draft: Annotated[str, typer.Option(help="Guess ahead: auto, input (its codes), jacobi or none.")] = "auto",
    certify: Certify = False,
    show_progress: Annotated[
        bool, typer.Option("--progress", help="Meanwhile write the picture so far to NAME.partial.png.")
    ] = False,
    executor: ExecutorName = "onnx",
    device: Device = None,
    threads: Threads = None,
    kernels: Kernels = True,
    verify: Verify = True,
    as_json: Json = False,
) -> None:
    """Make a picture from a picture, or from words alone."""
    from .decoding import Sampling
    from .images import read_study, write_image
    from .session import GENERATION

    as_dicom = out.suffix.lower() == ".dcm"
    if not as_dicom and out.suffix.lower() != ".png":
        raise HealthGPTError(f"--out must be a .png or .dcm file, got {out.name!r}")
    if as_dicom and image is None:
        raise HealthGPTError("--out as .dcm takes patient and study from --image, which is missing")
    # Known before the minutes that a picture may take.
    if not out.parent.is_dir():
        raise HealthGPTError(f"the folder to hold {out.name!r} does not exist")
    if out.is_dir():
        raise HealthGPTError(f"--out must be a file, {out.name!r} is a folder")
    sampling = Sampling(temperature, top_p, seed)
    picture = _picture(image, frame, window)
    study = read_study(image, frame=frame) if image and as_dicom else None
    session = _load(
        bundle,
        tasks=(GENERATION,),
        executor=executor,
        device=device,
        threads=threads,
        verify=verify,
        kernels=kernels,
    )
    partial = out.with_suffix(".partial.png")
    try:
        with _progress() as progress:
            codes = session.bundle.manifest.codes
            bar = progress.add_task("codes", total=codes.grid**2 if codes else None)
            result = session.generate(
                picture,
                instruction,
                faithful=faithful,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                draft=draft,
                certify=certify,
                on_code=lambda count: progress.update(bar, completed=count),
                on_preview=(lambda pixels, rows: write_image(partial, pixels)) if show_progress else None,
            )
    finally:
        if show_progress:
            partial.unlink(missing_ok=True)
    write_image(out, result.pixels, study)
    _note_uncertified(result)
    if as_json:
        fields = dataclasses.fields(result)
        values = {field.name: getattr(result, field.name) for field in fields if field.name != "pixels"}
        _print_json(values | {"image": str(out)})
    else:
        print(out)


@app.command(cls=OneOfEach)
def evaluate(
    bundle: BundlePath,
    answer_phantoms: Annotated[int, typer.Option(min=0, max=10_000, help="Phantoms to ask about.")] = 100,
    picture_phantoms: Annotated[int, typer.Option(min=0, max=10_000, help="Phantoms to make pictures of.")] = 10,
    executor: ExecutorName = "onnx",
    device: Device = None,
    threads: Threads = None,
    kernels: Kernels = True,
    as_json: Json = False,
) -> None:
    """Score a bundle of the phantom model on slices it has never seen."""
    from .evaluate import evaluate as run

    session = _load(bundle, executor=executor, device=device, threads=threads, kernels=kernels)
    with _progress() as progress:
        bar = progress.add_task("evaluate", total=None)
        result = run(
            session,
            answer_phantoms=answer_phantoms,
            picture_phantoms=picture_phantoms,
            on_step=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    if as_json:
        _print_json(result.to_json())
        return
    table = Table("question", "exact", "chance", "of")
    for kind, score in result.answers.items():
        table.add_row(kind, f"{score.accuracy:.1%}", f"{score.chance:.1%}", str(score.total))
    _print_table(table)
    table = Table("picture", "PSNR dB", "SSIM", "baseline PSNR", "baseline SSIM", "of")
    for kind, made in result.pictures.items():
        table.add_row(
            kind,
            f"{made.psnr:.2f}",
            f"{made.ssim:.3f}",
            f"{made.baseline_psnr:.2f}",
            f"{made.baseline_ssim:.3f}",
            str(made.total),
        )
    _print_table(table)


@app.command(cls=OneOfEach)
def bench(
    bundle: BundlePath,
    rows: Annotated[str, typer.Option(help="ppN, tgN@C, img, img+draft, vq, vit or load, with commas between.")] = (
        "load,pp600,tg64@700,img,vq,vit"
    ),
    repeat: Annotated[int, typer.Option(min=1, max=1000, help="Times each; a whole picture a fifth of it.")] = 5,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare with the standard bodies first.")] = True,
    executor: ExecutorName = "onnx",
    device: Device = None,
    kernels: Kernels = True,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time a bundle, after checking that it computes the same in every way it is timed."""
    from .bench import parse_rows
    from .bench import run as run_bench

    parsed = parse_rows(rows)
    with _progress() as progress:
        bar = progress.add_task("bench", total=None)
        report = run_bench(
            bundle,
            parsed,
            executor=executor,
            device=device,
            threads=threads,
            kernels=kernels,
            repeat=repeat,
            check=check,
            on_step=lambda name: progress.update(bar, description=name),
        )
    if as_json:
        _print_json(report)
        return
    settings = report["settings"]
    title = f"{bundle} on {report['machine']['processor']}, {settings['threads']} threads, {settings['executor']}"
    table = Table("row", "task", "p50 ms", "p90 ms", "p99 ms", "of", "G of", "", "share", title=title)
    for row in report["rows"]:
        cost = f"{row['cost'] / 1e9:.3g}" if "cost" in row else ""
        share = f"{row['share']:.0%}" if "share" in row else ""
        percentiles = (f"{row[name]:.2f}" for name in ("p50_ms", "p90_ms", "p99_ms"))
        table.add_row(row["row"], row["task"], *percentiles, str(row["count"]), cost, row.get("cost_unit"), share)
    _print_table(table)


@app.command(cls=OneOfEach)
def demo(
    out: Annotated[Path, typer.Option(help="Where the bundle and the contact sheet go.")] = Path("demo-output"),
    as_json: Json = False,
) -> None:
    """Export the phantom model, ask it, make pictures, and compare with the PyTorch reference."""
    try:
        from .export.demo import run
    except ModuleNotFoundError as error:
        raise HealthGPTError(f"demo needs {error.name}: pip install 'healthgpt-edge[export,test]'") from error
    with _progress() as progress:
        bar = progress.add_task("demo", total=None)
        result = run(out, on_step=lambda done, total: progress.update(bar, completed=done, total=total))
    if as_json:
        _print_json(result.to_json())
    else:
        result.print_tables(_stdout())


def _load(bundle: Path, *, executor: str, device: str | None, kernels: bool, **options: Any) -> Session:
    """A session; where the kernels are wanted but not built, one line says so, for answers then come slower."""
    from .session import load

    session = load(bundle, executor=executor, device=device, kernels=kernels, **options)
    if kernels and session.executor.name == "onnx-cpu":
        text = "note: the native kernels are not built; ONNX Runtime's own nodes run in their place, slower"
        notes.print(text, soft_wrap=True)
    return session


def _engine_records(bundle: Bundle) -> list[EngineRecord]:
    """The records of the engines in a bundle, of whichever TensorRT."""
    from .engines import MODULES, folder, read_record

    return [read_record(bundle, target) for target in MODULES if folder(bundle, target).is_dir()]


def _note_uncertified(result: Answer | Picture) -> None:
    if not result.certified:
        text = "note: not certified: this executor's passes round by their size, so drafts may have changed a token"
        notes.print(text, soft_wrap=True)


def _files(folder: Path) -> list[Path]:
    """The files of a folder, by name."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if not files:
        raise ImageError(f"{folder.name[:100]!r} must hold pictures, found none")
    return files


def _picture(path: Path | None, frame: int | None, window: str | None) -> Image | None:
    """The picture at `path`, read before the bundle is: hashing and loading that takes a while, for nothing if not."""
    from .images import read_if_any

    return read_if_any(path, frame, _window(window))


def _window(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        centre, width = (float(part) for part in text.split(","))
    except ValueError:
        raise PromptError(f"--window must be CENTRE,WIDTH, two numbers, got {text!r}") from None
    return centre, width


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))


def _print_table(table: Table) -> None:
    _stdout().print(table)


def _stdout() -> Console:
    # Names of files are no markup, whatever brackets they hold. A file or a pipe has no width to cut words for.
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _PIPE_COLUMNS)


def _one_line(message: str) -> str:
    """The message without line breaks or what a terminal would obey."""
    line = " ".join(message.split())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # An answer or a file name may hold what the terminal's encoding does not.
        sys.stdout.reconfigure(errors="backslashreplace")
    status: object = None
    try:
        with stopping_cleanly():
            status = app(standalone_mode=False)
    except (HealthGPTError, typer.TyperException) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        print(f"error: {_one_line(message)}", file=sys.stderr)
        status = 2
    except OSError as error:
        name = f": {Path(error.filename).name[:100]}" if isinstance(error.filename, str) else ""
        print(f"error: {_one_line(f'{error.strerror or error}{name}')}", file=sys.stderr)
        status = 2
    except MemoryError:
        print("error: there is not enough memory", file=sys.stderr)
        status = 2
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except SystemExit as stopped:
        status = stopped.code
    if isinstance(status, int) and status > 128:  # 130 is what typer makes of an interrupt, too
        print("error: interrupted", file=sys.stderr)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
