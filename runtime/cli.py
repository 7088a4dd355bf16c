"""The command line, `healthgpt-edge`: its commands, what is common to all, and how it ends."""

from __future__ import annotations

import codecs
import io
import os
import sys
from contextlib import suppress
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .commands.answer import answer
from .commands.bench import bench
from .commands.build import build
from .commands.demo import demo
from .commands.evaluate import evaluate
from .commands.export import export
from .commands.generate import generate
from .commands.inspect import inspect
from .commands.serve import serve
from .commands.verify import verify
from .errors import HealthGPTError, in_one_line
from .stopping import stopping_cleanly

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Run HealthGPT medical vision-language models on any machine.",
)


class OneOfEach(TyperCommand):
    """A command that refuses an option given twice; its parser would take the last, one picture of two."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        *_, given = self.make_parser(ctx).parse_args(args=list(args))
        for one in given:
            if given.count(one) > 1 and not getattr(one, "multiple", False):
                raise HealthGPTError(f"{one.opts[0]} must be given once, got it {given.count(one)} times")
        return super().parse_args(ctx, args)


for command in (export, inspect, build, verify, answer, generate, serve, evaluate, bench, demo):
    app.command(cls=OneOfEach)(command)


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


def _open_streams() -> None:
    """Have a stderr, and refuse to go on without a stdout, where results go.

    A parent may have closed some: the next files opened would take their numbers, and get what libraries print.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    if sys.stderr is None:  # `print` would turn to stdout
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        raise HealthGPTError("results go to stdout, found it closed")


def _drop_output() -> None:
    """Where a stream takes nothing, drop what is left for it: Python would try again in the end, and exit by that."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _as_it_came(error: UnicodeError) -> tuple[str | bytes, int]:
    """How stdout shows what its encoding lacks: a byte of a file's name as that byte, all else by its number."""
    if isinstance(error, UnicodeEncodeError):
        error.end = error.start + 1
        letter = error.object[error.start]
        if "\udc80" <= letter <= "\udcff":  # as Python reads such a byte
            return bytes([ord(letter) - 0xDC00]), error.end
    return codecs.backslashreplace_errors(error)


codecs.register_error("healthgpt-edge", _as_it_came)


def _say_error(text: str) -> None:
    """One line on stderr, if it takes any: the exit code says it, too."""
    with suppress(OSError):
        print(f"error: {text}", file=sys.stderr)


def run() -> None:
    """Entry point of a process of its own."""
    main(ends_process=True)


def main(ends_process: bool = False) -> None:
    """Entry point: bad input is one line on stderr and exit code 2, and so is a stdout that takes no results.

    A host whose process goes on afterwards has its signal handlers back.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # An answer or a file name may hold what the terminal's encoding does not.
        sys.stdout.reconfigure(errors="healthgpt-edge")
    status: object = None
    try:
        _open_streams()
        with stopping_cleanly(ends_process):
            status = app(standalone_mode=False)
            sys.stdout.flush()
    except typer.TyperException as error:
        _say_error(in_one_line(error.format_message()))
        status = 2
    except (HealthGPTError, OSError, MemoryError, ImportError) as error:  # ImportError: of a library, half installed
        _say_error(in_one_line(error))
        status = 2
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except SystemExit as stopped:
        status = stopped.code
        if isinstance(stopped.__context__, BrokenPipeError):  # of which typer makes this, without a word
            _say_error(in_one_line(stopped.__context__))
            status = 2
    if isinstance(status, int) and status > 128:  # 130 is what typer makes of an interrupt, too
        _say_error("interrupted")
    _drop_output()
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    run()
