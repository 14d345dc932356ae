"""Copying an archive to a device: what is there stays, what is missing follows, and its name is its hash."""

import hashlib
from pathlib import Path
from typing import BinaryIO

from distill.progress import Progress
from export.devices.ssh import DeviceFailed, Ssh

PIECE = 256 << 10
SLOWEST = 50e3  # bytes a second that a connection must give
UNIT = 1 << 10


def copy(ssh: Ssh, path: Path, sha256: str, unpacked: int, progress: Progress, title: str) -> int:
    """Bring an archive to the device -> bytes sent; none if it is there.

    Args:
        sha256: of the archive, as it was verified here. unpacked: bytes that it unpacks to; the disk there must hold both.

    Raises:
        DeviceFailed, Lost, Stopped: as `Ssh.ask`; after Lost, the same call continues where it broke off.
    """
    size = path.stat().st_size
    offer = ssh.ask("offer", sha256=sha256, bytes=size, unpacked=unpacked)
    if offer.get("changed"):
        progress.say(f"{title}: the archive on the device was changed since it was copied; copied again", warning=True)
    if offer["whole"]:
        return 0
    start = usable(path, offer["bytes"], offer["sha256"])
    with open(path, "rb") as file, progress.task(f"copy to {title}", -(-size // UNIT), "KiB", start // UNIT) as task:
        file.seek(start)

        def send(out: BinaryIO) -> None:
            told = start // UNIT
            while piece := file.read(PIECE):
                out.write(piece)
                now = -(-file.tell() // UNIT)
                task.advance(now - told)
                told = now

        limit = 120 + (size - start) / SLOWEST
        done = ssh.ask("receive", timeout=limit, send=send, sha256=sha256, bytes=size, **{"from": start})
    if done["bytes"] != size:
        raise DeviceFailed(f"only {done['bytes']} of {size} bytes arrived")
    return size - start


def usable(path: Path, size: int, sha256: str) -> int:
    """How much of what lies there is the beginning of this file: all of it or nothing."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = size
        while left and (piece := file.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
    return size if not left and digest.hexdigest() == sha256 else 0
