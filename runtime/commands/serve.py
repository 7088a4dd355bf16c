"""`serve`: requests from a program, one after another."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Annotated

import typer

from ..errors import HealthGPTError
from .loading import load_session
from .options import BundlePath, Device, ExecutorName, Kernels, Threads, Together, Verify
from .output import note


def serve(
    bundle: BundlePath,
    keep_pictures: Annotated[
        int, typer.Option(min=0, metavar="MB", help="Memory to keep what was read of pictures, for requests to come.")
    ] = 0,
    together: Together = 1,
    executor: ExecutorName = "onnx",
    device: Device = None,
    threads: Threads = None,
    kernels: Kernels = True,
    verify: Verify = True,
) -> None:
    """Serve requests, lines of JSON from stdin to stdout. See docs/serving.md."""
    from ..serving import Server

    if sys.stdin is None:
        raise HealthGPTError("serve reads requests from stdin, found it closed")
    session = load_session(
        bundle,
        executor=executor,
        device=device,
        threads=threads,
        verify=verify,
        kernels=kernels,
        keep_pictures_bytes=keep_pictures << 20,
    )
    tasks = session.bundle.manifest.tasks
    for task in tasks:  # now, for otherwise it stops somebody's answer: for 2 to 3 s with M3
        session.drafts.agree(task)
    if together > 1 and any(session.group(task, together) is None for task in tasks):
        note("requests are done one by one: this executor takes one sequence a pass, or rounds by how many there are")
        together = 1
    # Who asks may be gone, as at the end of stdin.
    with suppress(ConnectionError):
        Server(session, sys.stdin.fileno(), sys.stdout.fileno(), together).run()
