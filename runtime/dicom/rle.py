"""The RLE Lossless transfer syntax (PS3.5 annex G).

Implemented here because the decoder in pylibjpeg-rle panics on damaged data: a report on stderr, no exception.
"""

from __future__ import annotations

import struct

import numpy as np

from ..errors import ImageError

_HEADER = struct.Struct("<16I")  # number of segments, and the offset of each


def decode_rle(encoded: bytes, pixels: int, samples: int, sample_bytes: int) -> bytes:
    """Decode one frame to `samples` planes of `pixels` values, in sequence, little endian. Raises ImageError."""
    if len(encoded) < _HEADER.size:
        raise ImageError("the RLE frame is cut short")
    count, *offsets = _HEADER.unpack_from(encoded)
    if count != samples * sample_bytes:
        raise ImageError(f"expected {samples * sample_bytes} RLE segments, found {count}")
    bounds = [*offsets[:count], len(encoded)]
    if bounds[0] != _HEADER.size or bounds != sorted(bounds):
        raise ImageError("the RLE segments are damaged or cut short")
    frame = np.empty((samples, pixels, sample_bytes), dtype=np.uint8)
    for segment in range(count):
        # The most significant byte comes first (G.2).
        sample, byte = divmod(segment, sample_bytes)
        plane = _unpack(encoded, bounds[segment], bounds[segment + 1], pixels)
        frame[sample, :, sample_bytes - 1 - byte] = np.frombuffer(plane, np.uint8)
    return frame.tobytes()


def _unpack(data: bytes, position: int, end: int, size: int) -> bytearray:
    """`size` bytes of PackBits data (G.3.2); what follows them is padding."""
    plane = bytearray()
    while len(plane) < size:
        if position >= end:
            raise ImageError(f"expected {size} bytes in an RLE segment, found {len(plane)}")
        control = data[position]
        if control < 128:
            following = position + control + 2
            plane += data[position + 1 : min(following, end)]
            position = following
        elif control > 128:
            plane += data[position + 1 : min(position + 2, end)] * (257 - control)
            position += 2
        else:
            position += 1
    if len(plane) != size:
        raise ImageError(f"expected {size} bytes in an RLE segment, found more")
    return plane
