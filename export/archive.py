"""The one form that a bundle's archive has, written and read: a gzip stream around a USTAR archive of regular files.

Every header is byte for byte what `tar_header` makes (mode 644, no owner, no time), padding is zero, and nothing follows the
two closing blocks. So there are no links, devices, folders or extended headers to interpret, no bit can change unseen, and the
same files give the same bytes (with the same zlib). The reader is our own because `tarfile` reads whole extended headers into
memory and follows conventions that a bundle has no use for.
"""

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"  # deflate, no name, no time, unknown system
LEVEL = 6
BLOCK = 512
CHUNK = 1 << 20
MAX_NAME = 100
MAX_FILE = 8**11 - 1  # what a USTAR header can say
NAME_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(?<!\.)")
WINDOWS_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
KINDS = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"5": "a folder", b"6": "a pipe",
    b"7": "a contiguous file", b"x": "an extended header", b"g": "an extended header", b"L": "a GNU long name",
    b"K": "a GNU long link", b"S": "a sparse file",
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What a bundle may cost its reader.

    Attributes:
        manifest, signature: bytes of these two files, which are held in memory.
        file, total: unpacked bytes of one file and of all.
        files: how many files a manifest may list.
        ratio, grace: unpacked bytes per packed byte, once more than `grace` bytes are unpacked. Weights pack about
            1.1 : 1 and pages about 10 : 1; a gzip bomb is near 1,000 : 1.
    """

    manifest: int = 1 << 20
    signature: int = 64 << 10
    file: int = MAX_FILE
    total: int = 64 << 30
    files: int = 5_000
    ratio: int = 100
    grace: int = 16 << 20


LIMITS = Limits()


class Refused(Exception):
    """Why an archive is refused: a clause that follows "was refused: "."""


def write_archive(path: Path, members: Iterable[tuple[str, int, Iterable[bytes]]]) -> None:
    """Write members (name, bytes, content in pieces) in the order given.

    Raises:
        ValueError: a name that may not be in a bundle, or content of another length.
    """
    with open(path, "wb") as file, gzip.GzipFile("", "wb", LEVEL, file, mtime=0) as packed:
        for name, size, pieces in members:
            if reason := bad_name(name):
                raise ValueError(reason)
            packed.write(tar_header(name, size))
            written = 0
            for piece in pieces:
                packed.write(piece)
                written += len(piece)
            if written != size:
                raise ValueError(f"{name} has {written} bytes, not {size}")
            packed.write(bytes(-size % BLOCK))
        packed.write(bytes(2 * BLOCK))


class ArchiveReader:
    """Reads an archive forwards in bounded memory, with its compression ratio watched. Every method may raise Refused.

    Attributes:
        packed, unpacked: bytes read from the file and bytes inflated so far.
    """

    def __init__(self, file: BinaryIO, limits: Limits):
        self.file, self.limits = file, limits
        head = file.read(len(GZIP_HEADER))
        if head[:2] != GZIP_HEADER[:2]:
            raise Refused("it is not a gzip file" if head else "it is empty")
        if head != GZIP_HEADER:
            raise Refused("its gzip header is cut short or carries a name, a time or flags, which a bundle's never does")
        self.packed, self.unpacked = len(head), 0
        self.inflate = zlib.decompressobj(wbits=31)  # 31: gzip, whose checksum zlib tests
        self.inflate.decompress(head)
        self.waiting = b""

    def some(self, at_most: int) -> bytes:
        """Between 1 and `at_most` bytes; none at the end of the stream."""
        while not self.inflate.eof:
            data = self.waiting or self.file.read(CHUNK // 16)
            if not self.waiting:
                self.packed += len(data)
            try:
                out = self.inflate.decompress(data, at_most)  # without data: what the window still holds
            except zlib.error as e:
                raise Refused(f"its compressed data is damaged ({e})") from e
            self.waiting = self.inflate.unconsumed_tail
            self.unpacked += len(out)
            if self.unpacked > max(self.limits.grace, self.limits.ratio * self.packed):
                raise Refused(f"it unpacks to more than {self.limits.ratio} times its size, as a gzip bomb does")
            if out:
                return out
            if not data and not self.inflate.eof:
                raise Refused("it ends early: the file is truncated")
        return b""

    def exactly(self, size: int) -> bytes:
        """`size` bytes in memory; for small sizes."""
        parts = []
        while size:
            if not (part := self.some(size)):
                raise Refused("its archive ends early")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def header(self) -> tuple[str, int] | None:
        """(name, bytes) of the next member; None at the closing blocks."""
        block = self.exactly(BLOCK)
        if any(block):
            return parse_header(block)
        if any(self.exactly(BLOCK)):
            raise Refused("its closing blocks hold data")
        return None

    def member(self, size: int) -> bytes:
        """A member's bytes in memory; its size is checked before."""
        return b"".join(self.chunks(size))

    def chunks(self, size: int, digest: Any = None) -> Iterator[bytes]:
        """A member's bytes in pieces, fed to `digest`; the padding behind them is checked."""
        left = size
        while left:
            if not (piece := self.some(min(left, CHUNK))):
                raise Refused("its archive ends early")
            if digest is not None:
                digest.update(piece)
            left -= len(piece)
            yield piece
        if any(self.exactly(-size % BLOCK)):
            raise Refused("there is data in the padding of a file")

    def end(self) -> None:
        """Refuse anything behind the closing blocks, inside the gzip stream or after it."""
        if self.some(1) or self.inflate.unused_data or self.file.read(1):
            raise Refused("there is data behind its end")


def tar_header(name: str, size: int) -> bytes:
    """The one header [512 bytes] that a bundle has for a file."""
    assert bad_name(name) is None
    assert 0 <= size <= MAX_FILE
    head = name.encode("ascii").ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % size + b"%011o\0" % 0
    tail = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2 + bytes(167)
    checksum = sum(head) + 8 * ord(" ") + sum(tail)
    return head + b"%06o\0 " % checksum + tail


def parse_header(block: bytes) -> tuple[str, int]:
    """A header -> (name, bytes). Whatever is not exactly what `tar_header` writes is refused, by name where it is known."""
    name = block[:100].rstrip(b"\0").decode("latin-1")
    if block[257:262] != b"ustar":
        raise Refused("it holds no tar archive, or a damaged one")
    if (kind := block[156:157]) != b"0":
        raise Refused(f"{shown(name)} is {KINDS.get(kind, 'no regular file')}, and a bundle holds only regular files")
    if reason := bad_name(name):
        raise Refused(reason)
    if not re.fullmatch(rb"[0-7]{11}\0", block[124:136]):
        raise Refused(f"{shown(name)} has no proper size")
    size = int(block[124:135], 8)
    if tar_header(name, size) != block:
        raise Refused(f"the header of {shown(name)} is damaged, or has an owner, mode, time or name that a bundle's never has")
    return name, size


def bad_name(name: str) -> str | None:
    """Why no file of a bundle may have this name, or None: names are relative, plain, and mean the same on every system."""
    if not name or len(name) > MAX_NAME:
        return f"a file's name is empty or longer than {MAX_NAME} characters"
    if name.startswith(("/", "\\", "~")) or re.match(r"[A-Za-z]:", name):
        return f"{shown(name)} is an absolute path"
    if ".." in re.split(r"[/\\]", name):
        return f"{shown(name)} leads out of the bundle's folder"
    if not all(NAME_PART.fullmatch(p) and not WINDOWS_DEVICES.fullmatch(p) for p in name.split("/")):
        return f"{shown(name)} is not a plain file name"
    return None


def shown(text: str) -> str:
    """Text of a hostile file for a message: ASCII, short, without control characters that a terminal would obey."""
    plain = "".join(c if " " <= c <= "~" else "?" for c in text[:120])
    return f"{plain}..." if len(text) > 120 else plain
