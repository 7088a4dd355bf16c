"""What commands show: the result alone on stdout, progress and notes on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from ..results import Answer, Picture

_notes = Console(stderr=True, highlight=False)
# The widest tables fit.
_PIPE_COLUMNS = 120


def note(text: str) -> None:
    """One line on stderr, if it takes any: what is noted must not cost the result."""
    with suppress(OSError):
        print(f"note: {text}", file=sys.stderr)


def note_uncertified(result: Answer | Picture) -> None:
    """Say where drafts may have changed a token."""
    if not result.certified:
        note("not certified: this executor's passes round by their size, so drafts may have changed a token")


def progress_bar(*, of_bytes: bool = False) -> Progress:
    """Progress on a terminal that can redraw a line; nothing elsewhere."""
    count = DownloadColumn() if of_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeElapsedColumn())
    return Progress(*columns, console=_notes, transient=True, disable=not _notes.is_interactive)


@contextmanager
def progress_of(description: str, *, of_bytes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Gives a function to tell how much is done, of how much.

    The bar is gone with the last of it, for what follows may write to the same terminal.
    """
    with progress_bar(of_bytes=of_bytes) as progress:
        bar = progress.add_task(description, total=None)

        def tell(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)
            if done == total:
                progress.stop()

        yield tell


def print_json(value: dict[str, Any]) -> None:
    """One line."""
    print(json.dumps(value))


def print_table(table: Table) -> None:
    console().print(table)


def console() -> Console:
    """Stdout for tables."""
    # Names are no markup, whatever brackets and colons they hold. A file or a pipe has no width to cut words for.
    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else _PIPE_COLUMNS)
