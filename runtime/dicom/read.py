"""One frame of a DICOM file as an RGB picture.

pydicom drives the decoders. What it would trust is checked first, against the limits and against the file itself.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import uid
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import get_decoder

from ..errors import ImageError
from ..limits import MAX_DECODED_BYTES, MAX_ITEMS, check_size
from .codestream import jpeg2000_header, jpeg_header
from .display import grayscale, palette, to_levels
from .file import (
    JPEG,
    JPEG2000,
    NATIVE,
    PLUGINS,
    UNDEFINED_LENGTH,
    PixelData,
    frame_count,
    frame_index,
    open_dicom,
    whole,
)
from .rle import decode_rle

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_GRAY, _COLOUR = ("MONOCHROME1", "MONOCHROME2"), ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_ITEM, _END_OF_ITEMS = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"


def read_dicom(file: BinaryIO, frame: int | None, window: tuple[float, float] | None) -> Image.Image:
    """Frame `frame` (default: the first, 0) of the DICOM `file` as RGB; `window` as in `dicom.display.grayscale`.

    Overlays, ICC profiles and pixel aspect ratios are not applied. Raises ImageError.
    """
    pixels = open_dicom(file)
    shape = _Shape.of(pixels.dataset)
    index = frame_index(frame, shape.frames)
    if shape.photometric in ("YBR_ICT", "YBR_RCT") and pixels.syntax not in JPEG2000:
        raise ImageError(f"{shape.photometric} belongs to JPEG 2000, found another transfer syntax")
    decoded = (_decode_native if pixels.syntax in NATIVE else _decode_encapsulated)(pixels, shape, index)
    if shape.photometric in _GRAY:
        inverted = shape.photometric == "MONOCHROME1"
        levels = grayscale(decoded, pixels.dataset, index, inverted, window)
        return Image.fromarray(levels).convert("RGB")
    if window is not None:
        raise ImageError("window applies to greyscale, found a colour picture")
    if shape.photometric == "PALETTE COLOR":
        return Image.fromarray(palette(decoded, pixels.dataset))
    if shape.bits_stored == 8:
        return Image.fromarray(decoded.astype(np.uint8))
    return Image.fromarray(to_levels(decoded * np.float32(255 / ((1 << shape.bits_stored) - 1))))


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the header says about the pixel data, checked."""

    rows: int
    columns: int
    samples: int
    frames: int
    bits_allocated: int
    bits_stored: int
    signed: int
    photometric: str
    planar: int

    @classmethod
    def of(cls, dataset: Dataset) -> _Shape:
        rows, columns, samples = (whole(dataset, name) for name in ("Rows", "Columns", "SamplesPerPixel"))
        check_size(columns, rows)
        allocated, stored = whole(dataset, "BitsAllocated"), whole(dataset, "BitsStored")
        if allocated not in (8, 16):
            raise ImageError(f"expected 8 or 16 bits allocated, found {allocated}")
        if not 1 <= stored <= allocated or whole(dataset, "HighBit", stored - 1) != stored - 1:
            raise ImageError(f"expected the lowest of {allocated} bits to be stored, found another layout")
        photometric = dataset.get("PhotometricInterpretation")
        if photometric not in (*_GRAY, *_COLOUR, "PALETTE COLOR"):
            raise ImageError(f"expected one of {', '.join(_GRAY + _COLOUR)}, PALETTE COLOR; found another")
        colour = photometric in _COLOUR
        if samples != (3 if colour else 1):
            raise ImageError(f"expected {3 if colour else 1} samples per pixel for {photometric}, found {samples}")
        if colour and photometric != "RGB" and (allocated, stored) != (8, 8):
            raise ImageError(f"expected 8 bits stored of 8 for {photometric}, found {stored} of {allocated}")
        signed, planar = whole(dataset, "PixelRepresentation"), whole(dataset, "PlanarConfiguration", 0)
        if signed not in (0, 1) or (signed and photometric not in _GRAY):
            raise ImageError(f"expected unsigned values, or signed ones in greyscale, found {signed}")
        if planar not in (0, 1):
            raise ImageError(f"expected planar configuration 0 or 1, found {planar}")
        if dataset.get("PixelPresentation") in ("COLOR", "MIXED"):
            raise ImageError("greyscale with a supplemental colour palette is not supported")
        frames = frame_count(dataset)
        shape = cls(rows, columns, samples, frames, allocated, stored, signed, str(photometric), planar)
        if rows * columns * samples * allocated // 8 > MAX_DECODED_BYTES:
            raise ImageError(f"expected at most {MAX_DECODED_BYTES} bytes a frame, found {rows} x {columns}")
        return shape

    def native_frame_bytes(self) -> int:
        if self.photometric == "YBR_FULL_422":
            return self.rows * self.columns * 2  # two pixels share their chroma (PS3.3 C.7.6.3.1.2)
        return self.rows * self.columns * self.samples * self.bits_allocated // 8

    def options(self, frames: int, vr: str) -> dict[str, Any]:
        """For pydicom's decoders."""
        return {
            "rows": self.rows,
            "columns": self.columns,
            "samples_per_pixel": self.samples,
            "number_of_frames": frames,
            "bits_allocated": self.bits_allocated,
            "bits_stored": self.bits_stored,
            "pixel_representation": self.signed,
            "photometric_interpretation": self.photometric,
            "planar_configuration": self.planar,
            "pixel_keyword": "PixelData",
            "pixel_vr": vr,
        }


def _decode_native(pixels: PixelData, shape: _Shape, index: int) -> NDArray[Any]:
    if pixels.length == UNDEFINED_LENGTH:
        raise ImageError("expected uncompressed pixel data, found encapsulated data")
    if shape.photometric == "YBR_FULL_422" and shape.columns % 2:
        raise ImageError(f"expected an even number of columns for YBR_FULL_422, found {shape.columns}")
    # More data than declared is refused, too: nobody would see the rows left out.
    expected = shape.native_frame_bytes() * shape.frames
    if pixels.length not in (expected, expected + expected % 2):
        raise ImageError(
            f"expected {expected} bytes of pixel data for {shape.frames} frames of {shape.rows} rows and "
            f"{shape.columns} columns, found {pixels.length}"
        )
    available = pixels.file.seek(0, io.SEEK_END) - pixels.offset
    if available < expected:
        raise ImageError(f"the pixel data are cut short: expected {expected} bytes, found {available}")
    pixels.file.seek(pixels.offset)
    options = shape.options(shape.frames, pixels.vr)
    decoded: NDArray[Any] = get_decoder(pixels.syntax).as_array(pixels.file, index=index, **options)[0]
    return decoded


def _decode_encapsulated(pixels: PixelData, shape: _Shape, index: int) -> NDArray[Any]:
    package = PLUGINS.get(pixels.syntax)
    if package and "pylibjpeg" not in get_decoder(pixels.syntax).available_plugins:
        raise ImageError(f"{pixels.syntax.name} needs {package}: pip install {package}")
    if pixels.length != UNDEFINED_LENGTH:
        raise ImageError("expected encapsulated pixel data, found uncompressed data")
    tables = [pixels.dataset.get(name) for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")]
    _check_fragments(pixels, shape.frames, len(tables[0]) // 8 if tables[0] else None)
    pixels.file.seek(pixels.offset)
    offsets = (tables[0], tables[1]) if all(tables) else None
    encoded = get_frame(pixels.file, index, extended_offsets=offsets, number_of_frames=shape.frames)
    decoded_bytes = shape.rows * shape.columns * shape.samples * shape.bits_allocated // 8
    if not 0 < len(encoded) <= 2 * decoded_bytes + (1 << 16):
        raise ImageError(f"expected a compressed frame of {decoded_bytes} bytes, found {len(encoded)} compressed bytes")
    # Passed on as a file of one frame, so that exactly what was checked is decoded.
    options = shape.options(1, pixels.vr)
    decoded: NDArray[Any]
    if pixels.syntax == uid.RLELossless:
        planes = decode_rle(encoded, shape.rows * shape.columns, shape.samples, shape.bits_allocated // 8)
        if shape.photometric == "YBR_FULL_422":
            options["photometric_interpretation"] = "YBR_FULL"  # RLE does not subsample
        options |= {"planar_configuration": 1}
        decoded = get_decoder(uid.ExplicitVRLittleEndian).as_array(planes, index=0, **options)[0]
    else:
        _check_codestream(encoded, pixels.syntax, shape)
        file = encapsulate([encoded])
        decoded = get_decoder(pixels.syntax).as_array(file, index=0, decoding_plugin="pylibjpeg", **options)[0]
    return decoded


def _check_fragments(pixels: PixelData, frames: int, extended_offsets: int | None) -> None:
    """Follow the fragments to their end mark (PS3.5 A.4): a decoder would accept one that is cut short."""
    file, fragments, table_bytes, position = pixels.file, -1, 0, pixels.offset
    while True:
        file.seek(position)
        item = file.read(8)  # empty if the fragment before it is cut short
        length = int.from_bytes(item[4:], "little")
        if item[:4] == _END_OF_ITEMS:
            break
        if item[:4] != _ITEM:
            raise ImageError("the encapsulated pixel data are damaged or cut short")
        if fragments < 0:
            table_bytes = length
        fragments += 1
        if fragments > MAX_ITEMS:
            raise ImageError(f"expected at most {MAX_ITEMS} fragments of pixel data, found more")
        position += 8 + length
    offsets = extended_offsets or table_bytes // 4
    if fragments < frames or offsets not in (0, frames):
        raise ImageError(f"expected {frames} frames, found {fragments} fragments and {offsets} frame offsets")


def _check_codestream(encoded: bytes, syntax: uid.UID, shape: _Shape) -> None:
    """Refuse an encoded frame that would decode to something other than the header declares."""
    found = jpeg_header(encoded) if syntax in JPEG else jpeg2000_header(encoded)
    if (found.rows, found.columns, found.samples) != (shape.rows, shape.columns, shape.samples):
        raise ImageError(
            f"expected {shape.rows} rows, {shape.columns} columns and {shape.samples} samples in the codestream, "
            f"found {found.rows}, {found.columns} and {found.samples}"
        )
    if found.precision > shape.bits_allocated:
        raise ImageError(f"expected at most {shape.bits_allocated} bits in the codestream, found {found.precision}")
