"""The exceptions a caller can get: one tree, one class per subject.

Every message names what was expected and what was found, and never holds pixels, prompts or DICOM values.
"""

import errno
from pathlib import Path

# What is wrong with the machine, whichever file the OSError is about.
_OF_THE_MACHINE = frozenset(
    (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
)


class HealthGPTError(Exception):
    """Base of every error raised on purpose; the command line turns it into exit code 2.

    `kind` is what `serve` calls it.
    """

    kind = "request"


class ImageError(HealthGPTError):
    """A picture cannot be read or written, is too large, or is of a kind that is not supported.

    Where the `cause` is want of memory, or of files or room on the disk, its kind is "machine".
    """

    kind = "picture"

    def __init__(self, message: str, cause: Exception | None = None) -> None:
        super().__init__(message)
        if isinstance(cause, MemoryError) or getattr(cause, "errno", None) in _OF_THE_MACHINE:
            self.kind = "machine"


class OptionError(HealthGPTError):
    """An option has a value that it cannot have, or does not go with the others."""


class PromptError(HealthGPTError):
    """A question or instruction cannot be turned into token ids."""

    kind = "words"


class BundleError(HealthGPTError):
    """A bundle is damaged, unknown, or does not hold what was asked for."""

    kind = "bundle"


class CheckpointError(HealthGPTError):
    """A released file is missing, malformed, or disagrees with the others."""


class ExecutorError(HealthGPTError):
    """The engine that runs the graphs is missing or refused them."""

    kind = "machine"


class GenerationError(HealthGPTError):
    """The model's output is unusable: not finite, or not the codes of one image."""

    kind = "model"


class KeptError(HealthGPTError):
    """A file of kept pictures is damaged, of another bundle or executor, or too large."""


class BenchmarkError(HealthGPTError):
    """A row is unknown or does not fit the bundle, or what was to be timed computes something else."""


class RequestError(HealthGPTError):
    """A line given to `serve` is no request: not JSON, or its fields are not those of a task."""


class Cancelled(HealthGPTError):
    """A request was given up by who made it."""

    kind = "cancelled"

    def __init__(self, message: str = "the request was cancelled") -> None:  # as pickle gives it back
        super().__init__(message)


def in_one_line(error: Exception | str) -> str:
    """What went wrong, without line breaks or what a terminal would obey; of files no more than their names."""
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if isinstance(error, OSError):
        name = f": {Path(error.filename).name[:100]}" if isinstance(error.filename, str) else ""
        error = f"{error.strerror or error}{name}"
    line = " ".join(str(error).split())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
