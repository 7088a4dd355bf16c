"""`verify`: whether a bundle is whole, and what a machine computes from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..errors import HealthGPTError
from .loading import load_session
from .options import BundlePath, Device, Json, Threads
from .output import print_json, print_table, progress_bar, progress_of

if TYPE_CHECKING:
    from ..session import Session


def verify(
    bundle: BundlePath,
    executor: Annotated[
        str | None, typer.Option(help="Compare what this executor computes, too: onnx or tensorrt.", show_default=False)
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="What it is compared with: by default onnx on the CPU; by its standard bodies, if that is the same."
        ),
    ] = None,
    device: Device = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Check every byte of a bundle against its manifest, and with --executor what a machine computes from it."""
    from ..bundle import Bundle

    for name, given in {"--against": against, "--device": device, "--threads": threads}.items():
        if executor is None and given is not None:  # nothing would be computed, there or anywhere
            raise HealthGPTError(f"{name} needs --executor, which says what is to be compared")
    against = "onnx" if against is None else against
    opened = Bundle.open(bundle, verify=False)
    with progress_of("verify", of_bytes=True) as on_bytes:
        checked = opened.verify(on_bytes=on_bytes)
    result: dict[str, Any] = {"ok": True, "files": len(opened.manifest.files), "bytes": checked}
    if executor is not None:
        from ..acceptance import compare

        def load(name: str, device: str | None, kernels: bool) -> Session:
            if name != "onnx":  # which alone has these options
                return load_session(bundle, executor=name, device=device, kernels=True, verify=False)
            return load_session(bundle, executor=name, device=device, threads=threads, kernels=kernels, verify=False)

        found = load(executor, device, kernels=True)
        # The same executor on the same device is held to the graphs' standard bodies, not to itself.
        expected = load(against, None, kernels=against != executor or device == "cuda")
        if found.executor.name == expected.executor.name:
            raise HealthGPTError(f"{executor} must be compared with another, found {expected.executor.name} in both")
        with progress_bar() as progress:
            bar = progress.add_task("compare", total=None)
            report = compare(found, expected, on_step=lambda name: progress.update(bar, description=name))
        result |= {"ok": report.passed, **report.to_json()}
        if not as_json:
            table = Table("what", "found", "must be", "", title=f"{report.executor} against {report.against}")
            for check in report.checks:
                table.add_row(check.name, f"{check.found:.5g}", check.bound, "ok" if check.passed else "FAILED")
            print_table(table)
    if as_json:
        print_json(result)
    elif result["ok"]:
        print(f"ok: {result['files']} files, {checked:,} bytes")
    if not result["ok"]:
        raise HealthGPTError(f"{executor} must compute what {against} does: {report.first_failure}")
