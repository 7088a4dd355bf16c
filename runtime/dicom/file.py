"""Find the pixel data of a DICOM file, and parse the attributes before it that a picture needs.

The file meta group is read here, not by pydicom, so that a deflated data set is inflated under a limit. Only wanted
attributes are parsed, so that nothing about the patient is.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag, Tag

from ..checks import is_whole
from ..errors import ImageError
from ..limits import MAX_HEADER_BYTES, MAX_INFLATED_BYTES, MAX_ITEMS

NATIVE = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian)
JPEG = (*uid.JPEGTransferSyntaxes, *uid.JPEGLSTransferSyntaxes)
JPEG2000 = (uid.JPEG2000Lossless, uid.JPEG2000, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K)
# One decoder per transfer syntax, so that a file gives the same picture on every machine.
PLUGINS = {
    **dict.fromkeys(JPEG, "pylibjpeg-libjpeg"),
    **dict.fromkeys(JPEG2000, "pylibjpeg-openjpeg"),
}
UNDEFINED_LENGTH = 0xFFFFFFFF

# Elements of group 0008 with which a file can begin that has neither preamble nor file meta group.
_FIRST_ELEMENTS = frozenset({0x0000, 0x0001, 0x0005, 0x0008, 0x0012, 0x0014, 0x0016, 0x0018})
# What has its length in 4 bytes, behind 2 that mean nothing (PS3.5 7.1.2); of all others it is in 2 bytes.
_LONG_LENGTH = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
_PIXEL_DATA = 0x7FE00010
_PIXEL_TAGS = frozenset({_PIXEL_DATA, 0x7FE00008, 0x7FE00009})
_ITEM_TAGS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # little and big endian
_PALETTE = [
    f"{segmented}{colour}PaletteColorLookupTable{part}"
    for colour in ("Red", "Green", "Blue")
    for segmented, part in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
]
_KEYWORDS = [
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "PixelPresentation",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "VOILUTSequence",
    "PerFrameFunctionalGroupsSequence",
    "SharedFunctionalGroupsSequence",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
]
_WANTED: list[BaseTag | int] = [Tag(keyword) for keyword in _KEYWORDS + _PALETTE]


@dataclass(frozen=True, slots=True)
class PixelData:
    """A data set up to its pixel data, and where these are in `file`. `length` is the declared one."""

    dataset: Dataset
    file: BinaryIO
    syntax: uid.UID
    offset: int
    length: int
    vr: str


def is_dicom(head: bytes) -> bool:
    """Whether a file that begins with `head` (132 bytes) is DICOM, with or without preamble and file meta group."""
    without_preamble = head[:8] == b"\x02\x00\x00\x00UL\x04\x00"
    return head[128:132] == b"DICM" or without_preamble or _is_bare(head)


def open_dicom(file: BinaryIO, more: Sequence[str] = ()) -> PixelData:
    """Parse the attributes of `file` that a picture needs, and `more` (keywords), and find its pixel data."""
    file.seek(0)
    syntax, offset = _file_meta(file.read(MAX_HEADER_BYTES))
    file.seek(offset)
    if syntax == uid.DeflatedExplicitVRLittleEndian:
        file, syntax, offset = _inflate(file), uid.ExplicitVRLittleEndian, 0
    if syntax not in (*NATIVE, *PLUGINS, uid.RLELossless):
        # The name of a registered syntax is public; anything else is text of the file.
        named = syntax.name if syntax in uid.AllTransferSyntaxes else "an unknown one"
        raise ImageError(f"expected an uncompressed, JPEG, JPEG-LS, JPEG 2000 or RLE transfer syntax, found {named}")
    head = file.read(MAX_HEADER_BYTES)
    if sum(map(head.count, _ITEM_TAGS)) > MAX_ITEMS:
        raise ImageError(f"expected at most {MAX_ITEMS} sequence items, found more")

    header = io.BytesIO(head)
    found: list[tuple[int, str | None, int, int]] = []

    def at_pixels(tag: BaseTag, vr: str | None, length: int) -> bool:
        if tag in _PIXEL_TAGS:
            found.append((int(tag), vr, length, header.tell()))
        return tag in _PIXEL_TAGS

    little_endian = syntax != uid.ExplicitVRBigEndian
    implicit = syntax == uid.ImplicitVRLittleEndian
    dataset = read_dataset(
        header, implicit, little_endian, stop_when=at_pixels, specific_tags=[*_WANTED, *map(Tag, more)]
    )
    if not found:
        where = f" in its first {MAX_HEADER_BYTES} bytes" if len(head) == MAX_HEADER_BYTES else ""
        raise ImageError(f"holds no pixel data{where}")
    tag, vr, length, start = found[-1]
    if tag != _PIXEL_DATA:
        raise ImageError("expected whole numbers as pixel data, found floating point")
    return PixelData(dataset, file, syntax, offset + start, length, vr or "OW")


def whole(dataset: Dataset, keyword: str, default: int | None = None) -> int:
    """The single whole number of an attribute; `default` where it is absent. Raises ImageError."""
    value = dataset.get(keyword)
    value = default if value is None else value
    if not isinstance(value, int):
        found = "none" if value is None else "something else"
        raise ImageError(f"expected {keyword} to be one whole number, found {found}")
    return int(value)


def frame_count(dataset: Dataset) -> int:
    """The number of frames that a data set declares. Raises ImageError below one."""
    frames = whole(dataset, "NumberOfFrames", 1)
    if frames < 1:
        raise ImageError(f"expected at least one frame, found {frames}")
    return frames


def frame_index(frame: int | None, frames: int) -> int:
    """The index of `frame` among `frames`, from 0; the first by default. Raises ImageError if there is none such."""
    if frame is None:
        return 0
    if not (is_whole(frame) and 0 <= frame < frames):
        raise ImageError(f"frame must be from 0 to {frames - 1}, got {frame!r:.40}")
    return frame


def _file_meta(head: bytes) -> tuple[uid.UID, int]:
    """Transfer syntax, and where the data set begins; the file meta group is always explicit little endian."""
    if head[128:132] != b"DICM" and _is_bare(head):
        return (uid.ExplicitVRLittleEndian if head[4:6].isalpha() else uid.ImplicitVRLittleEndian), 0
    position, syntax = (132 if head[128:132] == b"DICM" else 0), b""
    while head[position : position + 2] == b"\x02\x00":
        element = int.from_bytes(head[position + 2 : position + 4], "little")
        first, width = (8, 4) if head[position + 4 : position + 6] in _LONG_LENGTH else (6, 2)
        value = position + first + width
        length = int.from_bytes(head[position + first : value], "little")
        if element == 0x0010:
            syntax = head[value : value + length]
        position = value + length
    if not syntax:
        raise ImageError("expected a transfer syntax in the file meta group, found none")
    return uid.UID(syntax.decode("ascii", "replace").rstrip("\0 ")), position


def _is_bare(head: bytes) -> bool:
    return head[:2] == b"\x08\x00" and int.from_bytes(head[2:4], "little") in _FIRST_ELEMENTS


def _inflate(file: BinaryIO) -> io.BytesIO:
    """Inflate a data set of the deflated transfer syntax (PS3.5 A.5). Stops with ImageError at the limit."""
    inflater, inflated = zlib.decompressobj(-zlib.MAX_WBITS), bytearray()
    while not inflater.eof:
        piece = file.read(1 << 14)  # inflates to 16 MiB at most
        if not piece:
            raise ImageError("the deflated data set is cut short")
        inflated += inflater.decompress(piece)
        if len(inflated) > MAX_INFLATED_BYTES:
            raise ImageError(f"expected at most {MAX_INFLATED_BYTES} bytes in the deflated data set, found more")
    return io.BytesIO(inflated)
