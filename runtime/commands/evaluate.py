"""`evaluate`: how good a bundle's answers and pictures are, and how far from another bundle's."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..errors import HealthGPTError
from .loading import load_session
from .options import BundlePath, Device, ExecutorName, Json, Kernels, Threads, Together
from .output import print_json, print_table, progress_bar, progress_of

if TYPE_CHECKING:
    from ..evaluation import Evaluation, Outcome
    from ..session import Session

_PHANTOMS = "Held-out phantoms to {}, where there is no --cases."
# What a table's columns hold of a kind's scores; behind a slash the other bundle's.
_COLUMNS = {
    "exact": [("exact", "{:.1%}"), ("reference_exact", "{:.1%}")],
    "recall": [("recall", "{:.1%}"), ("reference_recall", "{:.1%}")],
    "chance": [("chance", "{:.1%}")],
    "PSNR dB": [("psnr", "{:.2f}"), ("reference_psnr", "{:.2f}")],
    "SSIM": [("ssim", "{:.3f}"), ("reference_ssim", "{:.3f}")],
    "baseline": [("baseline_psnr", "{:.2f}"), ("baseline_ssim", "{:.3f}")],
    "same ids": [("same", "{:.1%}")],
    "next tokens": [("next_tokens", "{:.2%}")],
    "nats": [("divergence", "{:.4f}")],
    "levels": [("levels", "{:.2f}")],
    "cases": [("total", "{:.0f}")],
}


def evaluate(
    bundle: BundlePath,
    cases: Annotated[
        Path | None, typer.Option(help="Lines of JSON: what to ask, and what to expect. See docs/evaluating.md.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="Another bundle of the model, to compare with.")
    ] = None,
    details: Annotated[Path | None, typer.Option(help="Write what became of each case here, lines of JSON.")] = None,
    answer_phantoms: Annotated[
        int | None, typer.Option(min=0, max=10_000, help=_PHANTOMS.format("ask about (100)"), show_default=False)
    ] = None,
    picture_phantoms: Annotated[
        int | None, typer.Option(min=0, max=10_000, help=_PHANTOMS.format("draw (10)"), show_default=False)
    ] = None,
    together: Together = 1,
    executor: ExecutorName = "onnx",
    device: Device = None,
    threads: Threads = None,
    kernels: Kernels = True,
    as_json: Json = False,
) -> None:
    """Score a bundle on cases of one's own, or, of the phantom model, on slices it has never seen."""
    from ..evaluation import check_cases, phantom_cases, read_cases
    from ..evaluation import evaluate as run
    from ..files import PRIVATE, written_whole
    from ..manifest import COMPREHENSION, GENERATION
    from ..requests import check_target

    phantoms = {"--answer-phantoms": answer_phantoms, "--picture-phantoms": picture_phantoms}
    for name, given in phantoms.items():
        if cases is not None and given is not None:
            raise HealthGPTError(f"{name} is for the phantom's own cases, found --cases as well")
    asked = read_cases(cases) if cases is not None else None
    if details is not None:
        check_target(details, "--details")
        if cases is not None and details.exists() and details.samefile(cases):
            raise HealthGPTError("--details must not be the file of --cases")

    def load(path: Path) -> Session:
        return load_session(path, executor=executor, device=device, threads=threads, kernels=kernels)

    session = load(bundle)
    reference = load(against) if against is not None else None
    sessions = [one for one in (session, reference) if one is not None]
    if asked is None:
        asked = phantom_cases(
            session.bundle.manifest,
            100 if answer_phantoms is None else answer_phantoms,
            10 if picture_phantoms is None else picture_phantoms,
        )
    else:
        with progress_of("check") as on_step:
            check_cases(asked, sessions, scored=against is None, on_step=on_step)
    result: Evaluation | None = None
    failure: OSError | None = None  # of --details, on a full disk: what took hours is shown nevertheless
    try:
        with ExitStack() as opened:
            progress = opened.enter_context(progress_bar())
            bar = progress.add_task("cases", total=None)
            file = opened.enter_context(written_whole(details, PRIVATE, even_if_stopped=True)) if details else None

            def write(outcome: Outcome) -> None:
                nonlocal failure
                if file and not failure:
                    try:
                        file.write(json.dumps(outcome.to_json()).encode() + b"\n")
                    except OSError as error:
                        failure = error

            result = run(
                session,
                asked,
                against=reference,
                together=together,
                on_step=lambda stage, done, total: progress.update(bar, description=stage, completed=done, total=total),
                on_outcome=write,
            )
            if failure:
                raise failure
    except OSError as error:
        if result is None:
            raise
        failure = error
    if as_json:
        print_json(result.to_json())
    else:
        for name, means in {"answers": result.means(COMPREHENSION), "pictures": result.means(GENERATION)}.items():
            if means:
                print_table(_table(name, means))
    if failure:
        raise failure
    if result.failed:
        first = result.failed[0]
        raise HealthGPTError(f"{len(result.failed)} of {len(asked)} cases failed; {first.case.name}: {first.error}")


def _table(title: str, means: dict[str, dict[str, float]]) -> Table:
    """A row for each kind of case, a column for what any of them has scores for."""
    rows = [
        [" / ".join(form.format(found[name]) for name, form in column if name in found) for column in _COLUMNS.values()]
        for found in means.values()
    ]
    used = [number for number in range(len(_COLUMNS)) if any(row[number] for row in rows)]
    table = Table(title, *(list(_COLUMNS)[number] for number in used))
    for kind, row in zip(means, rows, strict=True):
        table.add_row(kind, *(row[number] for number in used))
    return table
