"""Pictures in (PNG, JPEG, DICOM) and out (PNG, DICOM), reports about them, and what the vision graph takes."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .errors import ImageError
from .files import written_whole
from .limits import MAX_FILE_BYTES, MAX_PIXELS, check_size, check_window, guarded

if TYPE_CHECKING:
    from .dicom.study import Study

Pixels = NDArray[np.uint8]

# The CLIP mean in 8 bit: what the original pads with, so that the border is nearly 0 after normalisation.
BACKGROUND = (122, 116, 104)
_SIGNATURES = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff"}
_EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
# "I" is how older Pillow opens a 16-bit PNG.
_SIXTEEN_BIT_MODES = frozenset({"I;16", "I;16B", "I;16L", "I"})


def read_image(source: Any, *, frame: int | None = None, window: tuple[float, float] | None = None) -> Image.Image:
    """The picture in `source` as an RGB PIL image: a path, the bytes of a file, a PIL image, or an array.

    Files are PNG, JPEG or DICOM by their content, not by their name. 8-bit ones equal `Image.open(p).convert("RGB")`:
    an alpha channel is dropped and an EXIF orientation is not applied, as in the original. 16-bit grey is scaled by
    its full range (value / 257, rounded) unless `window` says otherwise. A PNG or JPEG of several pictures is refused.
    Arrays are uint8 [H, W] or [H, W, 3], or uint16 [H, W].

    `frame` chooses a frame of a DICOM file, from 0, by default the first. `window` = (centre, width), in the units
    after rescaling (Hounsfield units for CT), replaces the window of a DICOM file; see `dicom.display.grayscale` for
    what is shown without it. Raises ImageError, which never quotes pixels or DICOM values.
    """
    if isinstance(source, Image.Image | np.ndarray):
        name = "picture" if isinstance(source, Image.Image) else "array"
        with guarded(name, "a picture"):
            return _to_rgb(_checked_array(source) if isinstance(source, np.ndarray) else source, frame, window)
    with _opened(source, "a path, bytes, a PIL image or an array") as (file, name):
        return _read_file(file, name, frame, window)


def read_if_any(source: Any, frame: int | None, window: tuple[float, float] | None) -> Image.Image | None:
    """`read_image`, or None where there is no picture, of which neither frame nor window can be: then an ImageError."""
    if source is not None:
        return read_image(source, frame=frame, window=window)
    if frame is not None or window is not None:
        raise ImageError("frame and window need an image, got none")
    return None


def read_study(source: str | os.PathLike[str] | bytes, *, frame: int | None = None) -> Study:
    """What files made from the DICOM file `source`, a path or its bytes, share with it: `write_image`, `write_report`.

    `frame` is the one that was read, from 0. Raises ImageError, which never quotes DICOM values, also where what would
    be shared cannot be written: minutes before there is something to write.
    """
    from .dicom.file import is_dicom
    from .dicom.picture import secondary_capture
    from .dicom.report import structured_report
    from .dicom.study import parse_study

    with _opened(source, "a path or bytes") as (file, name):
        if not is_dicom(file.read(132)):
            raise ImageError(f"{name}: expected DICOM, to write DICOM of its study, found another format")
        with guarded(name, "DICOM"):
            study = parse_study(file, frame)
    with guarded(name, "DICOM of its study", writing=True):
        secondary_capture(np.zeros((1, 1, 3), np.uint8), study)
        structured_report([("?", "!")], study)
    return study


def prepare(image: Image.Image, size: int, background: tuple[int, ...] = BACKGROUND) -> Pixels:
    """Pad `image` (RGB) to a centred square of `background`, resize it bicubically: uint8 [size, size, 3].

    Equal to the original's preprocessing before its normalisation. Raises ImageError.
    """
    if image.mode != "RGB":
        raise ImageError(f"expected an RGB picture, found mode {image.mode}")
    check_size(*image.size)
    side = max(image.size)
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.array(square.resize((size, size), Image.Resampling.BICUBIC))


def write_image(path: str | os.PathLike[str], pixels: Pixels, study: Study | None = None) -> None:
    """Write `pixels` (uint8 [H, W, 3]) to a file: whole, or not at all. Raises ImageError.

    A name that ends in .png gives a PNG; one in .dcm, a DICOM Secondary Capture Image in a new series of `study`, which
    `read_study` takes from the file that the picture was made from.
    """
    target = Path(path)
    name = _printable(str(target))
    suffix = target.suffix.lower()
    if suffix not in (".png", ".dcm"):
        raise ImageError(f"{name}: pictures are written as PNG or DICOM, expected a name that ends in .png or .dcm")
    if (suffix == ".dcm") != (study is not None):
        raise ImageError(f"{name}: a DICOM file needs the study it belongs to, and a PNG has none")
    if not isinstance(pixels, np.ndarray):
        raise ImageError(f"{name}: expected pixels uint8 [H, W, 3], got {type(pixels).__name__}")
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise ImageError(f"{name}: expected pixels uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
    _write(target, png_bytes(pixels) if study is None else _dicom(name, pixels, study))


def write_report(path: str | os.PathLike[str], exchanges: Iterable[tuple[str, str]], study: Study) -> None:
    """Write questions and their answers to a DICOM structured report: whole, or not at all. Raises ImageError.

    It is an Enhanced SR document in a new series of `study`, which `read_study` takes from the file that the questions
    were about, and says that a device wrote it and nobody has reviewed it. The name must end in .dcm.
    """
    from .dicom.report import structured_report

    target = Path(path)
    name = _printable(str(target))
    if target.suffix.lower() != ".dcm":
        raise ImageError(f"{name}: reports are written as DICOM, expected a name that ends in .dcm")
    pairs = list(exchanges or ())  # what is walked only once, too, as `zip` gives it
    if not pairs:
        raise ImageError(f"{name}: expected at least one question with its answer, found none")
    if not all(map(_is_exchange, pairs)):
        raise ImageError(f"{name}: expected pairs of texts, a question and its answer, found something else")
    _check_study(name, study)
    with guarded(name, "DICOM", writing=True):
        content = structured_report(pairs, study)
    _write(target, content)


def _is_exchange(pair: Any) -> bool:
    return isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def _check_study(name: str, study: Any) -> None:
    from .dicom.study import Study

    if not isinstance(study, Study):
        raise ImageError(f"{name}: expected a study, as `read_study` gives it, got {type(study).__name__}")


def _write(target: Path, content: bytes) -> None:
    try:
        with written_whole(target) as file:
            file.write(content)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a usable path"
        raise ImageError(f"{_printable(str(target))}: cannot be written: {reason}", error) from None


def png_bytes(pixels: Pixels) -> bytes:
    """`pixels` (uint8 [H, W, 3]) as the file of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _dicom(name: str, pixels: Pixels, study: Study) -> bytes:
    from .dicom.picture import secondary_capture

    _check_study(name, study)
    with guarded(name, "DICOM", writing=True):
        return secondary_capture(pixels, study)


@contextmanager
def _opened(source: Any, wanted: str) -> Iterator[tuple[BinaryIO, str]]:
    """The file `source`, a path or its bytes, and its name in messages; refused if empty or too large."""
    if isinstance(source, bytes):
        yield _sized(io.BytesIO(source), "picture", len(source))
        return
    if not isinstance(source, str | os.PathLike):
        found = type(source).__name__
        raise ImageError(f"expected {wanted} as the picture, found {found}")
    name = _printable(os.fspath(source))
    try:
        status = Path(os.fsdecode(source)).stat()
        # Neither a pipe, which may never end, nor a directory.
        if not stat.S_ISREG(status.st_mode):
            found = "directory" if stat.S_ISDIR(status.st_mode) else "device or pipe"
            raise ImageError(f"{name}: expected a file, found a {found}")
        with Path(os.fsdecode(source)).open("rb") as file:
            yield _sized(file, name, status.st_size)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a usable path"
        raise ImageError(f"{name}: cannot be opened: {reason}", error) from None


def _sized(file: BinaryIO, name: str, size_bytes: int) -> tuple[BinaryIO, str]:
    if size_bytes == 0:
        raise ImageError(f"{name}: expected a picture, found an empty file")
    if size_bytes > MAX_FILE_BYTES:
        raise ImageError(f"{name}: expected at most {MAX_FILE_BYTES} bytes, found {size_bytes}")
    return file, name


def _read_file(file: BinaryIO, name: str, frame: int | None, window: tuple[float, float] | None) -> Image.Image:
    head = file.read(132)
    for kind, signature in _SIGNATURES.items():
        if head.startswith(signature):
            with guarded(name, kind):
                return _read_picture(file, kind, frame, window)
    # pydicom takes as long to import as everything else here together, and most pictures are not DICOM.
    from .dicom.file import is_dicom
    from .dicom.read import read_dicom

    if not is_dicom(head):
        raise ImageError(f"{name}: expected PNG, JPEG or DICOM, found another format")
    with guarded(name, "DICOM"):
        return read_dicom(file, frame, window)


def _read_picture(file: BinaryIO, kind: str, frame: int | None, window: tuple[float, float] | None) -> Image.Image:
    file.seek(0)
    try:
        image = Image.open(file, formats=(kind,))
    except Image.DecompressionBombError:  # Pillow's own limit, above ours
        raise ImageError(f"expected at most {MAX_PIXELS} pixels, found more") from None
    with image:
        check_size(*image.size)  # before any pixel is decoded
        count = getattr(image, "n_frames", 1)
        if count != 1:
            raise ImageError(f"expected one picture in the file, found {count}")
        return _to_rgb(image, frame, window)


def _to_rgb(image: Image.Image, frame: int | None, window: tuple[float, float] | None) -> Image.Image:
    check_size(*image.size)
    if frame is not None:
        raise ImageError("frame applies to DICOM files only")
    if image.mode in _SIXTEEN_BIT_MODES:
        return _sixteen_bit_to_rgb(np.asarray(image), window)
    if window is not None:
        raise ImageError("window applies to DICOM and 16-bit grey pictures only")
    if image.mode not in _EIGHT_BIT_MODES:
        raise ImageError(f"expected 8 bits a channel or 16-bit grey, found mode {image.mode}")
    return image.convert("RGB")


def _sixteen_bit_to_rgb(values: NDArray[Any], window: tuple[float, float] | None) -> Image.Image:
    """PIL's own conversion would clip everything above 255 to white."""
    from .dicom.display import linear_window, to_levels

    if values.min() < 0 or values.max() > 0xFFFF:
        raise ImageError("expected grey values of 16 bits, found larger ones")
    every = np.arange(1 << 16, dtype=np.float64)
    levels = every / 257 if window is None else linear_window(every, *check_window(window))
    return Image.fromarray(to_levels(levels)[values]).convert("RGB")


def _checked_array(pixels: NDArray[Any]) -> Image.Image:
    if not (pixels.ndim == 2 and pixels.dtype in (np.uint8, np.uint16)) and not (
        pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8
    ):
        raise ImageError(
            f"expected uint8 [H, W] or [H, W, 3], or uint16 [H, W], found {pixels.dtype} {list(pixels.shape)}"
        )
    check_size(pixels.shape[1], pixels.shape[0])
    return Image.fromarray(np.ascontiguousarray(pixels))


def _printable(path: Any) -> str:
    """The base name, in one line."""
    name = os.fsdecode(path).rstrip("/").rsplit("/", 1)[-1]
    return name if name and name.isprintable() else ascii(name)
