"""One run at a time in a folder. The operating system holds the lock, so a killed run leaves none behind."""

import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.errors import EnvironmentFailed, UserError

NAME = ".lock"
_held: set[Path] = set()  # record locks do not exclude a second taker inside the same process


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. The file says who holds it; what it says after a kill is ignored, as nobody holds it then.

    Raises:
        UserError: another run holds it; the sentence names its process.
        EnvironmentFailed: the folder cannot be written.
    """
    path = folder.resolve() / NAME
    if path in _held:
        raise UserError(_busy(folder, f"process {os.getpid()}"))
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as e:
        raise EnvironmentFailed(f"{folder} cannot be written ({e.strerror}). Choose another folder with --out.") from e
    try:
        if not _take(fd):
            raise UserError(_busy(folder, os.read(fd, 200).decode(errors="replace").strip() or "another process"))
        _held.add(path)
        os.ftruncate(fd, 0)
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(
            fd, f"process {os.getpid()} on {socket.gethostname()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode()
        )
        try:
            yield
        finally:
            _held.discard(path)
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def _busy(folder: Path, holder: str) -> str:
    return f"{folder} is in use by another run ({holder}). Wait for it, stop it, or choose another folder with --out."


if sys.platform == "win32":

    def _take(fd: int) -> bool:
        import msvcrt

        os.lseek(fd, 1 << 20, os.SEEK_SET)  # far behind the text: Windows' locks keep others from reading what they cover
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(fd, 0, os.SEEK_SET)
        return True

else:

    def _take(fd: int) -> bool:
        """A POSIX record lock: unlike flock, forked data workers that outlive a killed run do not keep it."""
        import fcntl

        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise EnvironmentFailed(f"This disk cannot lock files ({e.strerror}). Choose another with --out.") from e
        return True
