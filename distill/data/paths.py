"""Paths that a recipe names: whether one was meant, the files that are there, and a sentence where none is."""

import difflib
import glob
import os
from functools import cache
from pathlib import Path

from distill.errors import UserError
from distill.files import sha256_file

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def looks_like_path(value: str) -> bool:
    """Whether a string that names nothing here was meant as a path, not as a `datasets` name (`cifar10`, `owner/name`)."""
    parent = Path(value).expanduser().parent
    return (
        value.startswith((".", "/", "~"))
        or value.count("/") > 1
        or "\\" in value
        or (parent != Path() and os.path.isdir(parent))
    )


def missing(path: Path) -> UserError:
    """The sentence for a path that does not exist, with the sibling that was probably meant."""
    path = path.expanduser().absolute()
    folder = path.parent
    while not os.path.isdir(folder):
        path, folder = folder, folder.parent
    try:
        near = difflib.get_close_matches(path.name, [p.name for p in folder.iterdir()], n=1)
    except OSError:
        near = []
    return UserError(
        f"There is no {path}. " + (f"Did you mean {folder / near[0]}?" if near else f"Name something that is in {folder}.")
    )


def local_files(pattern: str) -> list[Path]:
    """The file that a path names, or those that a pattern does. Raises: UserError: there is none."""
    path = Path(pattern).expanduser().absolute()
    found = [path] if os.path.exists(path) else sorted(Path(m) for m in glob.glob(str(path), recursive=True))
    if not found:
        raise missing(path)
    return found


def content_hash(file: Path) -> str:
    """sha256 of a file's content, computed once in a process for as long as its size and time stay the same."""
    now = file.stat()
    return _content_hash(str(file), now.st_size, now.st_mtime_ns)


@cache
def _content_hash(path: str, size: int, mtime_ns: int) -> str:
    return sha256_file(Path(path))
