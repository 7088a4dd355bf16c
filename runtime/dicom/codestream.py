"""The frame header of JPEG, JPEG-LS and JPEG 2000 codestreams.

The C decoders allocate what the codestream says, not what the DICOM header says. So it is checked before they run.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from ..errors import ImageError

_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
# Every "start of frame" of ISO 10918-1 table B.1 (C4, C8 and CC mean other things), and that of JPEG-LS.
_FRAME_MARKERS = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC} | {0xF7})
# Entropy-coded bytes never contain these: 0xFF is followed by 0x00 (JPEG) or by a clear top bit (JPEG-LS).
# DE starts a hierarchy of frames of several sizes.
_SECOND_FRAME = re.compile(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf\xde\xf7]")


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """What a codestream will decode to; `precision` in bits."""

    rows: int
    columns: int
    samples: int
    precision: int


def jpeg_header(data: bytes) -> FrameHeader:
    """The frame header of a JPEG or JPEG-LS codestream (ISO 10918-1 B.2.2). Raises ImageError unless there is one."""
    if data[:2] != b"\xff\xd8":
        raise ImageError("expected a JPEG codestream in the pixel data, found something else")
    position, header = 2, None
    while True:
        if position + 4 > len(data) or data[position] != 0xFF:
            raise ImageError("the JPEG codestream is damaged or cut short before its first scan")
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == _END_OF_IMAGE or length < 2:
            raise ImageError("the JPEG codestream is damaged or cut short before its first scan")
        if marker in _FRAME_MARKERS:
            if header or position + 10 > len(data):
                raise ImageError("expected one frame header in the JPEG codestream")
            precision, rows, columns, samples = struct.unpack_from(">BHHB", data, position + 4)
            header = FrameHeader(rows, columns, samples, precision)
        position += 2 + length
        if marker == _START_OF_SCAN:
            break
    if header is None or _SECOND_FRAME.search(data, position):
        raise ImageError("expected one frame header in the JPEG codestream")
    # libjpeg silently fills what is missing with grey. Some pad bytes may follow the end mark.
    if b"\xff\xd9" not in data[-10:]:
        raise ImageError("the JPEG codestream is cut short: expected its end mark")
    return header


def jpeg2000_header(data: bytes) -> FrameHeader:
    """The SIZ segment of a JPEG 2000 codestream (ISO 15444-1 A.5.1). Raises ImageError for one that DICOM forbids."""
    # A JP2 file around it is forbidden (PS3.5 A.4.4), and its header could contradict the codestream.
    if data[:4] != b"\xff\x4f\xff\x51":
        found = "a JP2 file" if data[4:8] == b"jP  " else "something else"
        raise ImageError(f"expected a bare JPEG 2000 codestream in the pixel data, found {found}")
    if len(data) < 42:
        raise ImageError("the JPEG 2000 codestream is cut short")
    right, bottom, left, top = struct.unpack_from(">4I", data, 8)
    (samples,) = struct.unpack_from(">H", data, 40)
    components = data[42 : 42 + 3 * samples]
    if len(components) < 3 * max(samples, 1):
        raise ImageError("the JPEG 2000 codestream is cut short")
    if any(step != 1 for index, step in enumerate(components) if index % 3):
        raise ImageError("JPEG 2000 with subsampled components is not supported")
    precision = max((value & 0x7F) + 1 for value in components[::3])
    return FrameHeader(bottom - top, right - left, samples, precision)
