"""Keeps the code for one GPU in a library that nvcc made, and replaces the other GPU code by zeros.

The ELF section .nv_fatbin holds fat binaries, one after another. Each has a header and entries; an entry has its own
header and code for one architecture. Nothing is moved, so all pointers stay valid. Zeros take no room in a compressed
wheel, and CUDA reads only the entries for the GPU that it finds.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

SECTION = b".nv_fatbin"
MAGIC = 0xBA55ED50
MACHINE_CODE = 2  # the kind of an entry; 1 is PTX
FAT_BINARY = struct.Struct("<I2xHQ")  # magic; size of this header; size of all entries, in bytes
# Kind; size of this header; size of the payload; size of a compressed payload without padding, otherwise 0;
# architecture; decompressed size.
ENTRY = struct.Struct("<H2xIQI8xI24xQ")
ELF_SECTION = struct.Struct("<I20xQQ")  # the name's offset in the names' section; offset; size


class Entry(NamedTuple):
    kind: int
    architecture: int  # 90 for compute capability 9.0
    begin: int  # of the payload, in the library
    size: int
    compressed_size: int
    full_size: int


def section(library: bytes | bytearray, name: bytes) -> range:
    """A section's bytes in a 64-bit ELF file, empty if it has no such section. Raises ValueError for other files."""
    if library[:6] != b"\x7fELF\x02\x01":
        raise ValueError("no library of a 64-bit Linux")
    (table,) = struct.unpack_from("<40xQ", library)
    each, count, names_at = struct.unpack_from("<58xHHH", library)
    headers = [ELF_SECTION.unpack_from(library, table + each * i) for i in range(count)]
    if names_at >= count:
        return range(0)
    _, names, names_size = headers[names_at]
    for name_at, offset, size in headers:
        if library[names + name_at : names + names_size].startswith(name + b"\0"):
            return range(offset, offset + size)
    return range(0)


def entries(library: bytes | bytearray) -> Iterator[Entry]:
    """All entries of GPU code. Raises ValueError if the section has another layout or is cut off."""
    try:
        place = section(library, SECTION)
        at, end = place.start, place.stop
        while at < end:
            magic, header_size, size = FAT_BINARY.unpack_from(library, at)
            if magic == 0:  # fat binaries begin at multiples of 8
                at += 8
                continue
            if magic != MAGIC or header_size < FAT_BINARY.size:
                raise ValueError(f"no fat binary at byte {at}, but {magic:#x}")
            at, last = at + header_size, at + header_size + size
            while at < last:
                kind, own_size, size, compressed_size, architecture, full_size = ENTRY.unpack_from(library, at)
                entry = Entry(kind, architecture, at + own_size, size, compressed_size, full_size)
                at = entry.begin + size
                if own_size < ENTRY.size or compressed_size > size or at > min(last, len(library)):
                    raise ValueError(f"an entry of a fat binary does not end where it should, at byte {last}")
                yield entry
    except struct.error as error:
        raise ValueError(f"the library is cut off: {error}") from error


def kernels(library: bytes | bytearray, entry: Entry) -> list[str]:
    """The mangled names of an entry's kernels. Raises ValueError if it cannot be decompressed."""
    payload = bytes(library[entry.begin : entry.begin + (entry.compressed_size or entry.size)])
    if entry.compressed_size:
        import zstandard

        try:
            payload = zstandard.ZstdDecompressor().decompress(payload, max_output_size=entry.full_size)
        except zstandard.ZstdError as error:
            raise ValueError(f"code for sm_{entry.architecture} at byte {entry.begin}: {error}") from error
    return [name.decode() for name in re.findall(rb"\.text\.([\w$.]+)", payload)]


def keep_only(library: bytearray, architecture: int, is_used: Callable[[list[str]], bool]) -> int:
    """Overwrite all GPU code with zeros, except machine code for `architecture` with kernels that are used.

    Returns the number of bytes of code that remain, 0 for a library without GPU code. Raises ValueError if a library
    has GPU code, but none for this architecture.
    """
    found = list(entries(library))
    architectures = Counter(entry.architecture for entry in found if entry.kind == MACHINE_CODE)
    if found and architecture not in architectures:
        raise ValueError(f"no code for sm_{architecture}, only for {', '.join(map(str, sorted(architectures)))}")
    kept = 0
    for entry in found:
        fits = (entry.kind, entry.architecture) == (MACHINE_CODE, architecture)
        if fits and is_used(kernels(library, entry)):
            kept += entry.size
        else:
            library[entry.begin : entry.begin + entry.size] = bytes(entry.size)
    return kept
