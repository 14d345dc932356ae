"""Image files in folders: which there are, a store of them (see encoded.py), and what identifies their content."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from distill.data.paths import content_hash
from distill.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def image_files(root: str, prefix: str = "", roots: tuple[Path, ...] = ()) -> Iterator[str]:
    """Relative paths (with /) of the image files under `root`, by suffix, names in byte order; hidden files and folders are
    left out.

    Links are followed, but not into what is visited anyway (loops). A link that leads nowhere is listed: a bad image, not no
    image.

    Raises:
        UserError: a folder that may not be read.
    """
    roots = roots or (Path(root).resolve(),)
    try:
        entries = sorted(os.scandir(root), key=lambda entry: os.fsencode(entry.name))
    except OSError as e:
        raise UserError(f"The folder {root} cannot be read ({e.strerror}). Change its permissions or name another.") from e
    for entry in entries:
        if entry.name.startswith("."):
            continue
        link, path = entry.is_symlink(), prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from image_files(entry.path, path + "/", roots)
        elif link and os.path.isdir(entry.path):
            real = Path(entry.path).resolve()
            if not any(real.is_relative_to(r) or r.is_relative_to(real) for r in roots):
                yield from image_files(entry.path, path + "/", (*roots, real))
        elif path.lower().endswith(SUFFIXES):
            # Regular files alone: opening a named pipe would wait for ever.
            dangling = link and not os.path.exists(entry.path)
            if dangling or (os.path.isfile(entry.path) if link else entry.is_file(follow_symlinks=False)):
                yield path


class FolderImages:
    """Image files under `root` by relative path, as one Arrow array: to forked workers a million of them are one object."""

    def __init__(self, root: Path, paths: list[str]):
        self.root = str(root)
        self.paths = pa.array([os.fsencode(p) for p in paths], pa.large_binary())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Path:
        return Path(self.root, os.fsdecode(self.paths[row].as_py()))

    def where(self, row: int) -> str:
        return self.paths[row].as_py().decode("utf-8", "replace")

    def fingerprint(self, rows: np.ndarray) -> str:
        """Names, sizes, and the first and last 2 KiB of each file: quick, and equal for a copy."""
        return files_fingerprint((self.paths[row].as_py(), self[row]) for row in rows.tolist())

    def shared(self, rows: np.ndarray, other: Any, theirs: np.ndarray) -> int:
        """How many files of another folder's rows have the same content as one of these rows."""
        if not isinstance(other, FolderImages):
            return 0
        return same_files([self[row] for row in rows.tolist()], [other[row] for row in theirs.tolist()])


def same_files(mine: list[Path], theirs: list[Path]) -> int:
    """How many of `theirs` have the same content as one of `mine`, whatever their names.

    Sizes are compared first, then both ends of what is left, then whole files: sets that share nothing are hardly read.
    """
    for key in (lambda p: p.stat().st_size, _ends, content_hash):
        ours, others = _keys(mine, key), _keys(theirs, key)
        common = set(ours.values()) & set(others.values())
        mine, theirs = ([p for p in files if keys.get(p) in common] for files, keys in ((mine, ours), (theirs, others)))
    return len(theirs)


def _keys(files: list[Path], key: Callable[[Path], Any]) -> dict[Path, Any]:
    found = {}
    for path in files:
        with suppress(OSError):  # a bad image like any other
            found[path] = key(path)
    return found


def _ends(path: Path) -> tuple[int, bytes]:
    """Size and sha256 of the first and last 2 KiB."""
    with open(path, "rb") as f:
        size, ends = _size_and_ends(f)
    return size, sha256(ends).digest()


def _size_and_ends(f: BinaryIO) -> tuple[int, bytes]:
    size, ends = os.fstat(f.fileno()).st_size, f.read(2048)
    if size > 2048:
        f.seek(-2048, os.SEEK_END)
        ends += f.read(2048)
    return size, ends


def files_fingerprint(files: Iterable[tuple[bytes, Path]]) -> str:
    """sha256 of (name, file) pairs by names, sizes and both ends (2 KiB each) of the files."""
    total = sha256()
    for name, path in files:
        try:
            with open(path, "rb") as f:
                size, ends = _size_and_ends(f)
        except OSError:  # a bad image like any other; that it is unreadable is its content
            size, ends = -1, b""
        total.update(b"%d %d %d " % (len(name), size, len(ends)) + name + ends)
    return total.hexdigest()
