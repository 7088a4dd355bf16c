"""`demo`: the whole path on the phantom model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import HealthGPTError
from .options import Json
from .output import console, print_json, progress_bar


def demo(
    out: Annotated[Path, typer.Option(help="Where the bundle and the contact sheet go.")] = Path("demo-output"),
    as_json: Json = False,
) -> None:
    """In a clone: export the phantom model, ask it, make pictures, and compare with the PyTorch reference."""
    try:
        from ..export.demo import run
    except ModuleNotFoundError as error:
        raise HealthGPTError(f"demo needs {error.name}: pip install 'healthgpt-edge[export,test]'") from error
    with progress_bar() as progress:
        bar = progress.add_task("demo", total=None)
        result = run(out, on_step=lambda done, total: progress.update(bar, completed=done, total=total))
    if as_json:
        print_json(result.to_json())
    else:
        result.print_tables(console())
