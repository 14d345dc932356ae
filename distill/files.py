"""Files that are either whole or absent: written beside their final name, flushed, renamed. Hashes of files and folders."""

import errno
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distill.errors import EnvironmentFailed

FULL = re.compile(rf"os error ({errno.ENOSPC}|{errno.EDQUOT})\b")
UMASK = os.umask(0)
os.umask(UMASK)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed to `path`, on failure removed.

    The temporary name ends with `path`'s own suffix, so writers that look at suffixes work.

    Raises:
        EnvironmentFailed: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".part-*-{glob.escape(path.name)}"):
        if not _alive(left.name.split("-")[1]):
            left.unlink(missing_ok=True)  # of a process that was killed
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        yield part
        with suppress(PermissionError):  # a file system without permissions
            os.chmod(part, 0o666 & ~UMASK)  # some writers make private files
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    except Exception as e:  # safetensors has an error of its own for a full disk
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or FULL.search(str(e)):
            raise EnvironmentFailed(
                f"The disk is full while writing {path}. Free some space and run the same command again."
            ) from e
        raise
    finally:
        part.unlink(missing_ok=True)


def unfinished(name: str) -> bool:
    """Whether a file of this name is a write that did not finish: ours, or one of safetensors, which writes beside the part in turn."""
    return name.startswith((".part-", ".tmp"))


def _alive(pid: str) -> bool:
    """Whether a process of this number runs; unknown counts as running."""
    try:
        os.kill(int(pid), 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except (OSError, ValueError):
        return True
    return True


def write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as part:
        part.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Stable JSON: sorted keys, two spaces, no NaN (a NaN in a result file is a bug upstream)."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def sha256_file(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8")).hexdigest()
