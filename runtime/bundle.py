"""A bundle on disk: a directory of graphs and weights, checked against its manifest before anything else reads it."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from .errors import BundleError
from .machine import cores
from .manifest import FORMAT, MAX_MANIFEST_BYTES, Manifest
from .threads import require_threads

MANIFEST = "bundle.json"
ENGINES = "engines"
_HASH_CHUNK_BYTES = 256 << 10  # stays in a cache between reading and hashing
_HASH_THREADS = 4  # a gigabyte a second each, together as fast as a disk
_TELL_SECONDS = 0.05


class Bundle:
    """An opened bundle: `manifest`, and `file(name)` for the paths of what it lists."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Bundle:
        """Open the bundle at `path`.

        Always checked: the manifest, the list of files and their sizes, and that none is a link. With `verify` also
        the SHA-256 of every file, which reads all of it once; without it only that of graphs and tokenizer.
        Raises BundleError.
        """
        root = Path(path)
        with _reading(root):
            if not root.is_dir():
                raise BundleError(f"a bundle is a directory, found none at {_name(root)}")
            # Graphs are opened later, too: then this must be the place still, wherever the process or a link has gone.
            root = Path(os.path.realpath(root, strict=True))
            bundle = cls(root, _read_manifest(root))
            bundle._check_listing()
        bundle.verify(() if verify else ("weights/",))
        return bundle

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists."""
        if name not in self.manifest.files:
            raise BundleError(f"the bundle has no file {name!r}")
        return self.path / name

    def graph(self, task: str, role: str) -> Path:
        """The path of a task's graph: vision, language, vocabulary, codes or draft.

        Raises BundleError where there is none, or the bundle was replaced.
        """
        if task not in self.manifest.tasks:
            raise BundleError(f"the bundle has no task {task!r}, only {', '.join(sorted(self.manifest.tasks))}")
        graphs = self.manifest.tasks[task].graphs
        if role not in graphs:
            raise BundleError(f"task {task} has no graph {role!r}, only {', '.join(sorted(graphs))}")
        self.check_unchanged()
        return self.file(graphs[role])

    def check_unchanged(self) -> None:
        """Raise BundleError where another bundle has taken the place of this one: parts of both are no model."""
        with _reading(self.path):
            found = _read_manifest(self.path)
        if found != self.manifest:
            raise BundleError(f"bundle {_name(self.path)} was replaced by another since it was opened: load it again")

    def verify(
        self, skip: tuple[str, ...] = (), on_bytes: Callable[[int, int], None] = lambda read, total: None
    ) -> int:
        """Compare the SHA-256 of every file whose name does not start with one of `skip`; returns the bytes read.

        `on_bytes` gets now and then how many have been read, of how many. Raises BundleError, and ExecutorError where
        the system starts no threads.
        """
        sizes = {name: entry.size for name, entry in self.manifest.files.items() if not name.startswith(skip)}
        read = dict.fromkeys(sizes, 0)
        stop = threading.Event()

        def check(name: str) -> None:
            digest = hashlib.sha256()
            with _reading(self.path), self.file(name).open("rb", buffering=0) as file:
                while (chunk := file.read(_HASH_CHUNK_BYTES)) and not stop.is_set():
                    digest.update(chunk)
                    read[name] += len(chunk)
            expected, found = self.manifest.files[name].sha256, digest.hexdigest()
            if found != expected:
                raise BundleError(f"file {name} is damaged: SHA-256 must be {expected[:16]}..., found {found[:16]}...")

        threads = min(cores(), _HASH_THREADS)
        require_threads(threads)
        with ThreadPoolExecutor(threads) as pool:
            try:
                # The largest first, or one thread would end with it alone.
                pending = {pool.submit(check, name) for name in sorted(sizes, key=lambda name: -sizes[name])}
                while pending:
                    done, pending = wait(pending, _TELL_SECONDS, FIRST_COMPLETED)
                    for one in done:
                        one.result()
                    on_bytes(sum(read.values()), sum(sizes.values()))
            finally:
                stop.set()
        return sum(read.values())

    def _check_listing(self) -> None:
        found: set[str] = set()
        for folder, folders, files in os.walk(self.path, onerror=_raise):
            relative = Path(folder).relative_to(self.path)
            if relative == Path():
                if (self.path / ENGINES).is_symlink():
                    raise BundleError(f"{ENGINES} must not be a link")
                folders[:] = [name for name in folders if name != ENGINES]
            for name in [*folders, *files]:
                if (Path(folder) / name).is_symlink():
                    raise BundleError(f"{(relative / name).as_posix()} must be part of the bundle, found a link")
            found |= {(relative / name).as_posix() for name in files}
        expected = set(self.manifest.files)
        found.discard(MANIFEST)
        if missing := sorted(expected - found):
            raise BundleError(f"the bundle lacks {missing[0]}" + (f" and {len(missing) - 1} more" * (len(missing) > 1)))
        if extra := sorted(found - expected):
            raise BundleError(f"the bundle holds {extra[0]!r}, which its manifest does not list")
        for name, entry in self.manifest.files.items():
            path = self.path / name
            if not _is_regular(path):
                raise BundleError(f"{name} must be a regular file")
            if (size := path.stat().st_size) != entry.size:
                raise BundleError(f"file {name} must be {entry.size} bytes, found {size}")
            path.open("rb").close()  # whoever maps it later may have no words for why it cannot


def is_in_bundle(path: Path) -> bool:
    """Whether `path` lies in the folder of a bundle, which one more file would spoil."""
    folder = path.parent.resolve()
    return any(_may_be_bundle(one) for one in (folder, *folder.parents))


def _may_be_bundle(folder: Path) -> bool:
    if not _is_regular(folder / MANIFEST):
        return False
    try:
        with (folder / MANIFEST).open("rb") as file:
            return FORMAT.encode() in file.read(MAX_MANIFEST_BYTES)
    except OSError:
        return False


def _read_manifest(root: Path) -> Manifest:
    if not _is_regular(root / MANIFEST):
        raise BundleError(f"{_name(root)} is not a bundle: it has no regular file {MANIFEST}")
    with (root / MANIFEST).open("rb") as file:
        return Manifest.from_json(file.read(MAX_MANIFEST_BYTES + 1))


def _raise(error: OSError) -> NoReturn:
    raise error


@contextmanager
def _reading(root: Path) -> Iterator[None]:
    """What the operating system refuses is an error of the bundle, which names the file."""
    try:
        yield
    except OSError as error:
        name = Path(os.fsdecode(error.filename or root)).name
        where = "" if name == root.name else f": {name[:100]}"
        raise BundleError(f"bundle {_name(root)} cannot be read: {error.strerror}{where}") from error


def _name(root: Path) -> str:
    return repr((root.name or str(root))[:100])  # "." and "/" have no name


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False
