"""What stands between the process and a picture file: limits, silence, and one kind of error.

Pictures come from outside and their decoders are other people's C. Sizes are therefore checked against what the file
declares before anything is allocated, and no message of a decoder leaves this package: they quote DICOM values.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import ImageFile

from .errors import ImageError

# Files are read frame by frame, so a long cine or tomosynthesis series may be larger than the memory limits below.
MAX_FILE_BYTES = 512 << 20
# Long-leg radiographs reach 10,000 rows; `prepare` pads to a square, so the side bounds its memory (400 MB).
MAX_SIDE = 10_000
MAX_PIXELS = 64 << 20
# One frame of samples, before it becomes 8 bit.
MAX_DECODED_BYTES = 256 << 20
# A whole data set under the deflated transfer syntax.
MAX_INFLATED_BYTES = 128 << 20
# A DICOM header with the functional groups of a few thousand frames; and its sequence items or pixel fragments.
MAX_HEADER_BYTES = 16 << 20
MAX_ITEMS = 100_000

_LIBRARIES = {"PIL", "highdicom", "libjpeg", "openjpeg", "pydicom", "pylibjpeg", "rle"}
_reading = threading.local()
# The settings of Python and Pillow belong to the process: two threads must not save and restore them in turns.
_settings_lock = threading.RLock()


class _NotWhileReading(logging.Filter):
    """Drops what a library logs on the thread that is reading a picture; other threads keep their logs."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(_reading, "active", False)


_silence = _NotWhileReading()


@contextmanager
def guarded(name: str, kind: str, writing: bool = False) -> Iterator[None]:
    """Turn every failure inside into one ImageError about `name`, and let no library warn or log meanwhile."""
    do, done = ("write", "written") if writing else ("read", "read")
    for logger_name, logger in list(logging.root.manager.loggerDict.items()):
        if logger_name.split(".")[0] in _LIBRARIES and isinstance(logger, logging.Logger):
            logger.addFilter(_silence)
    with _settings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A host may have told Pillow to fill truncated pictures with grey; here that is an answer about nothing.
        fill_truncated, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        _reading.active = True
        try:
            yield
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from None
        except MemoryError as error:  # says nothing of the file
            raise ImageError(f"{name}: there is not enough memory to {do} it", error) from None
        except OSError as error:
            reason = error.strerror or "damaged or cut short"
            raise ImageError(f"{name}: cannot be {done} as {kind}: {reason}", error) from None
        except Exception as error:
            # The text of a library's exception may hold DICOM values; its class does not.
            raise ImageError(
                f"{name}: cannot be {done} as {kind}: damaged or not supported ({type(error).__name__})"
            ) from None
        finally:
            _reading.active = False
            ImageFile.LOAD_TRUNCATED_IMAGES = fill_truncated


def check_size(width: int, height: int) -> None:
    """Raise ImageError unless a picture of this size may be allocated."""
    if width < 1 or height < 1:
        raise ImageError(f"expected at least one pixel, found {width} x {height}")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ImageError(f"expected at most {MAX_SIDE} pixels a side and {MAX_PIXELS} in all, found {width} x {height}")


def check_window(window: tuple[float, float]) -> tuple[float, float]:
    """The window as (centre, width), both finite and the width at least 1; otherwise ImageError."""
    try:
        centre, width = (float(value) for value in window)
    except (TypeError, ValueError):
        raise ImageError("window must be two numbers, (centre, width)") from None
    if not (abs(centre) < float("inf") and 1 <= width < float("inf")):
        raise ImageError(f"window must be a finite centre and a width of at least 1, got ({centre}, {width})")
    return centre, width
