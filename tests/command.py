"""The command line as tests call it: in this process where that is enough, in one of its own where it is not."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from golden_cases import arguments

from healthgpt_edge import cli


@dataclass(frozen=True)
class Outcome:
    """What a command gave: exit code, stdout, stderr."""

    code: int
    output: str
    errors: str

    @property
    def json(self) -> Any:
        return json.loads(self.output)


def run(*words: str | Path) -> Outcome:
    """Run `healthgpt-edge WORDS` in this process."""
    output, errors = io.StringIO(), io.StringIO()
    code: Any = None
    with (
        mock.patch.object(sys, "argv", ["healthgpt-edge", *map(str, words)]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code
    return Outcome(code, output.getvalue(), errors.getvalue())


def run_process(*words: str | Path, **environment: str) -> Outcome:
    """Run `healthgpt-edge WORDS` in a process of its own, as a user does."""
    return _run_process(words, environment)


def run_closed(stream: int, *words: str | Path) -> Outcome:
    """Run `healthgpt-edge WORDS` in a process of its own that has none of the stream of this number."""
    return _run_process(words, {}, before=lambda: os.close(stream))


def _run_process(
    words: Sequence[str | Path], environment: dict[str, str], before: Callable[[], None] | None = None
) -> Outcome:
    done = subprocess.run(
        [sys.executable, "-m", "healthgpt_edge.cli", *map(str, words)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="surrogateescape",
        stdin=subprocess.DEVNULL,
        env=os.environ | environment,
        preexec_fn=before,
        timeout=300,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def export_options(system: str, root: Path | None = None) -> list[str]:
    """The options of `export` that name the files of a golden system, or of its copy under `root`."""
    return [word for name, path in arguments(system, root).items() for word in (f"--{name}", str(path))]
