"""A file of kept pictures: what a session has read of them, to be asked about again by another process.

    magic                  "healthgpt-edge kept pictures 1\\n": what it is, and the version of this format
    size of the header     8 bytes, little-endian
    header                 JSON: the bundle (SHA-256 of its manifest), the executor with what its bits depend on, and
                           each picture's prefix
    caches                 of each picture in turn, in the order of the language graph's inputs
    SHA-256                32 bytes, of all before

Types and shapes follow from the manifest and the number of tokens, so the file cannot ask for any of its own. The hash
finds damage. It is no signature: who may write the file may write the answers, and who may read it reads a patient's.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np

from .errors import KeptError
from .executors.contract import cache_values
from .files import PRIVATE, written_whole
from .machine import instruction_sets, version
from .manifest import Manifest
from .prefixes import Prefix

Caches = dict[str, np.ndarray]

_MAGIC = b"healthgpt-edge kept pictures 1\n"
_SIZE_BYTES, _DIGEST_BYTES = 8, 32
MAX_HEADER_BYTES = 1 << 20
MAX_PICTURES = 1000
_HEX = frozenset("0123456789abcdef")


def write_kept(path: Path, manifest: Manifest, executor: str, pictures: list[tuple[Prefix, Caches]]) -> None:
    """Write `pictures` for `read_kept`, whole or not at all, for the owner's eyes alone; of too many the last ones.

    Raises KeptError.
    """
    pictures = pictures[-MAX_PICTURES:]
    header = json.dumps(
        {
            "bundle": _identity(manifest),
            "executor": _arithmetic(executor),
            "pictures": [prefix._asdict() for prefix, _ in pictures],
        }
    ).encode()
    digest = hashlib.sha256()
    try:
        with written_whole(path, PRIVATE) as file:

            def write(data: Any) -> None:
                digest.update(data)
                file.write(data)

            write(_MAGIC + len(header).to_bytes(_SIZE_BYTES, "little") + header)
            for prefix, caches in pictures:
                for name, (dtype, shape) in _layout(manifest, prefix).items():
                    array = np.ascontiguousarray(caches[name])
                    if (array.dtype, array.shape) != (dtype, shape):
                        raise KeptError(f"cache {name} must be {dtype} {shape}, found {array.dtype} {array.shape}")
                    write(array.reshape(-1).view(np.uint8).data)
            file.write(digest.digest())
    except (OSError, ValueError) as error:
        raise KeptError(f"{path.name!r} cannot be written: {_reason(error)}") from None


def read_kept(path: Path, manifest: Manifest, executor: str, limit_bytes: int) -> list[tuple[Prefix, Caches]]:
    """The pictures of a file that this bundle and this executor may go on with, in no more than `limit_bytes`.

    Nothing is allocated that the size of the file does not bear out, and nothing returned before its hash is checked.
    Raises KeptError.
    """
    try:
        # Without waiting for who might write into it, if it is a pipe.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            return _read(file, repr(path.name), manifest, executor, limit_bytes)
    except (OSError, ValueError) as error:
        raise KeptError(f"{path.name!r} cannot be read: {_reason(error)}") from None


def _read(
    file: io.BufferedReader, name: str, manifest: Manifest, executor: str, limit_bytes: int
) -> list[tuple[Prefix, Caches]]:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise KeptError(f"{name} must be a regular file")
    digest = hashlib.sha256()

    def read(size: int) -> bytes:
        data = file.read(size)
        digest.update(data)
        return data

    if read(len(_MAGIC)) != _MAGIC:
        raise KeptError(f"{name} must begin with {_MAGIC.decode().strip()!r}")
    header_bytes = int.from_bytes(read(_SIZE_BYTES), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise KeptError(f"{name}: the header must be at most {MAX_HEADER_BYTES} bytes, found {header_bytes}")
    prefixes = _prefixes(read(header_bytes), name, manifest, executor)
    layouts = [_layout(manifest, prefix) for prefix in prefixes]
    caches_bytes = sum(dtype.itemsize * math.prod(shape) for layout in layouts for dtype, shape in layout.values())
    expected = len(_MAGIC) + _SIZE_BYTES + header_bytes + caches_bytes + _DIGEST_BYTES
    if status.st_size != expected:
        raise KeptError(f"{name} must be {expected} bytes, found {status.st_size}")
    if caches_bytes > limit_bytes:
        raise KeptError(f"{name} must fit keep_pictures_bytes={limit_bytes}, found {caches_bytes} bytes")
    pictures = []
    for prefix, layout in zip(prefixes, layouts, strict=True):
        caches = {cache: np.empty(shape, dtype) for cache, (dtype, shape) in layout.items()}
        for array in caches.values():
            data = array.reshape(-1).view(np.uint8).data
            file.readinto(data)
            digest.update(data)
        pictures.append((prefix, caches))
    if file.read(_DIGEST_BYTES) != digest.digest():
        raise KeptError(f"{name} is damaged: its SHA-256 must be {digest.hexdigest()[:16]}...")
    return pictures


def _prefixes(header: bytes, name: str, manifest: Manifest, executor: str) -> list[Prefix]:
    """The prefixes that a header lists, each within what the bundle allows."""
    try:
        fields = json.loads(header)
        bundle, kept_by, listed = fields["bundle"], fields["executor"], fields["pictures"]
        prefixes = [Prefix(**one) for one in listed[: MAX_PICTURES + 1]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise KeptError(f"{name}: the header must name bundle, executor and pictures, found something else") from None
    if bundle != _identity(manifest):
        raise KeptError(f"{name} was kept by another bundle than this one")
    if kept_by != _arithmetic(executor):
        raise KeptError(f"{name} must be kept by {_arithmetic(executor)}, found {kept_by!r:.150}")
    if len(prefixes) > MAX_PICTURES:
        raise KeptError(f"{name} must hold at most {MAX_PICTURES} pictures, found {len(listed)}")
    for prefix in prefixes:
        if not isinstance(prefix.task, str) or prefix.task not in manifest.tasks:
            raise KeptError(f"{name}: a picture's task must be {' or '.join(sorted(manifest.tasks))}")
        if not (_is_sha256(prefix.pixels) and _is_sha256(prefix.tokens)):
            raise KeptError(f"{name}: a picture must be named by two SHA-256 of 64 digits, found something else")
        if type(prefix.length) is not int or not 1 <= prefix.length <= manifest.language.max_positions:
            most = manifest.language.max_positions
            raise KeptError(f"{name}: a picture must have 1 to {most} tokens, found {prefix.length!r:.40}")
    return prefixes


def _layout(manifest: Manifest, prefix: Prefix) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Type and shape of each cache of a prefix, by its name in the language graph without `past_`."""
    sizes: dict[int | str, int] = {"B": 1, "M": prefix.length}
    return {
        name: (np.dtype(value.type), tuple(int(sizes.get(side, side)) for side in value.shape))
        for name, value in cache_values(manifest).items()
    }


def _identity(manifest: Manifest) -> str:
    """What names a bundle: its manifest has the hash of every file."""
    return hashlib.sha256(manifest.to_json().encode()).hexdigest()


def _arithmetic(executor: str) -> str:
    """What caches' bits depend on besides bundle and picture: those of another would not be certified here."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("healthgpt-edge", "onnxruntime"))
    return f"{executor} of {versions}, with {instruction_sets() or 'no native kernels'}"


def _is_sha256(text: object) -> bool:
    return isinstance(text, str) and len(text) == 64 and _HEX.issuperset(text)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or "not a usable path"
