"""The one form that a bundle's archive has, written and read: a gzip stream around a USTAR archive of regular files.

Every tar header is byte for byte what `tar_header` makes (mode 644, no owner, no time), padding is zero, and nothing follows
the two closing blocks. So there are no links, devices, folders or extended headers to interpret. The gzip header has no name
and no time, and carries the sha256 of all that follows it in an extra field, which other readers skip: deflate can say one
thing in several ways, and this hash says which it was, so that no bit of a bundle can change unseen. The same files give the
same bytes (with the same zlib).

The reader is our own because `tarfile` reads whole extended headers into memory and follows conventions that no bundle needs.
"""

import hashlib
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

GZIP = b"\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\xff" + b"\x24\x00DC\x20\x00"  # deflate, no time, unknown system, extra field
HASH = hashlib.sha256().digest_size  # RFC 1952: the extra field has 36 bytes, of which "DC", a length of 32, the hash
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
    signature: int = 4 << 20  # 5,000 files with their hashes, in base64
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
    deflate, digest, crc, count = zlib.compressobj(LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS), hashlib.sha256(), 0, 0
    with open(path, "wb") as file:

        def put(packed: bytes) -> None:
            digest.update(packed)
            file.write(packed)

        file.write(GZIP + bytes(HASH))
        for piece in _tar(members):
            crc, count = zlib.crc32(piece, crc), count + len(piece)
            put(deflate.compress(piece))
        put(deflate.flush() + struct.pack("<II", crc, count & 0xFFFFFFFF))
        file.seek(len(GZIP))
        file.write(digest.digest())


def _tar(members: Iterable[tuple[str, int, Iterable[bytes]]]) -> Iterator[bytes]:
    for name, size, pieces in members:
        if reason := bad_name(name):
            raise ValueError(reason)
        yield tar_header(name, size)
        written = 0
        for piece in pieces:
            yield piece
            written += len(piece)
        if written != size:
            raise ValueError(f"{name} has {written} bytes, not {size}")
        yield bytes(-size % BLOCK)
    yield bytes(2 * BLOCK)


class ArchiveReader:
    """Reads an archive forwards in bounded memory, with its compression ratio watched. Every method may raise Refused.

    Attributes:
        packed, unpacked: bytes read from the file and bytes inflated so far.
    """

    def __init__(self, file: BinaryIO, limits: Limits):
        self.file, self.limits = file, limits
        head = file.read(len(GZIP) + HASH)
        if head[:2] != GZIP[:2]:
            raise Refused("it is not a gzip file" if head else "it is empty")
        if head[: len(GZIP)] != GZIP or len(head) < len(GZIP) + HASH:
            raise Refused("its gzip header is damaged, or not the one that a bundle has")
        self.expected, self.digest = head[len(GZIP) :], hashlib.sha256()
        self.packed, self.unpacked = len(head), 0
        self.inflate = zlib.decompressobj(wbits=31)  # 31: gzip, whose checksum zlib tests
        self.inflate.decompress(head)
        self.waiting = b""

    def some(self, at_most: int) -> bytes:
        """Between 1 and `at_most` bytes; none at the end of the stream."""
        while not self.inflate.eof:
            if not (data := self.waiting):
                data = self.file.read(CHUNK // 16)
                self.packed += len(data)
                self.digest.update(data)
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
        """Refuse anything behind the closing blocks, inside the gzip stream or after it, and bytes that were changed."""
        if self.some(1) or self.inflate.unused_data or self.file.read(1):
            raise Refused("there is data behind its end")
        if self.digest.digest() != self.expected:
            raise Refused("it was packed again or changed: its bytes are not those that were written")


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
