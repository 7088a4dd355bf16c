"""Files and folders that are written whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# What only its owner may read: what is known of a patient.
PRIVATE = 0o600


@contextlib.contextmanager
def written_whole(target: Path, mode: int = 0o666, *, even_if_stopped: bool = False) -> Iterator[BinaryIO]:
    """A file that takes the place of `target` when the block is left, and leaves nothing behind where that fails.

    With `even_if_stopped` what was written until then, if anything, takes the place of `target` where the block fails.
    An OSError names `target`, whose disk may be full, unless it is about another file.
    """
    # In the same folder: a rename is atomic only within one file system.
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "wb") as file:
            try:
                yield file
            except BaseException:
                if not (even_if_stopped and file.tell()):
                    raise
                _put(file, temporary, target)
                raise
            _put(file, temporary, target)
    except OSError as error:
        if error.filename in (None, os.fspath(temporary)):
            error.filename = os.fspath(target)
        raise
    finally:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink()


def _put(file: BinaryIO, temporary: Path, target: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    temporary.replace(target)


def flush_folder(folder: Path) -> None:
    """Have all of `folder` on the disk before it is renamed: after a power cut a name must not stand for half of it."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
