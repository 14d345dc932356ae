"""Where a device is: `ssh://user@host[:port][/dir]`. What is not plainly that is refused before ssh sees any of it."""

import hashlib
import re
from dataclasses import dataclass

from distill.errors import UserError

SCHEME = "ssh://"
DEFAULT_FOLDER = "decant-device"
USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9_])?")
IPV6 = re.compile(r"[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9_.-]{1,32})?")
FOLDER_PART = re.compile(r"[A-Za-z0-9_.+][A-Za-z0-9_.+-]{0,100}")
LONGEST_NAME = 64
NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{LONGEST_NAME - 1}}}(?<!\.)")


@dataclass(frozen=True)
class Address:
    """A device.

    Attributes:
        user, port: None leaves them to ssh's own configuration.
        host: a name, an alias of ssh's configuration, or an IP address.
        folder: where files go there; relative to the user's home unless it begins with a slash.
    """

    host: str
    user: str | None = None
    port: int | None = None
    folder: str = DEFAULT_FOLDER

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        folder = self.folder if self.folder.startswith("/") else f"/~/{self.folder}"
        return f"{SCHEME}{f'{self.user}@' if self.user else ''}{host}{f':{self.port}' if self.port else ''}{folder}"

    @property
    def name(self) -> str:
        """What the device is called unless it was named: its host, as part of a path."""
        plain = re.sub(r"[^A-Za-z0-9_.-]", "_", self.host) + (f"_{self.port}" if self.port else "")
        return plain if len(plain) <= LONGEST_NAME else f"{plain[:50]}_{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


def parse_address(text: str) -> Address:
    """`ssh://user@host[:port][/dir]` -> its parts; `/~/dir` is relative to the home folder.

    Raises:
        UserError: anything else, in one sentence.
    """

    def refuse(why: str) -> UserError:
        shown = "".join(c if " " <= c <= "~" else "?" for c in text[:120])
        return UserError(f"The device {shown!r} {why}; write it as ssh://user@host[:port][/dir].")

    if not text.startswith(SCHEME):
        raise refuse("does not begin with ssh://")
    authority, slash, path = text[len(SCHEME) :].partition("/")
    user, at, rest = authority.rpartition("@")
    if at and not USER.fullmatch(user):
        raise refuse("has a user name of other signs than letters, digits, `_`, `.` and `-`, or none before the @")
    host, port = _host_and_port(rest)
    if not (IPV6 if ":" in host else HOST).fullmatch(host):
        raise refuse("has no host, or one that is no host's name")
    if port is not None and not (re.fullmatch(r"[0-9]{1,5}", port) and 1 <= int(port) <= 65535):
        raise refuse("has a port that is no number in 1..65535")
    parts = [p for p in path.split("/") if p]
    home = bool(parts) and parts[0] == "~"
    parts = parts[1:] if home else parts
    if not all(FOLDER_PART.fullmatch(p) and p not in (".", "..") for p in parts):
        raise refuse("has a folder with a part that is no plain name")
    if slash and path and not parts:
        raise refuse("names a whole home or disk as its folder")
    folder = DEFAULT_FOLDER if not parts else "/".join(parts) if home else "/" + "/".join(parts)
    return Address(host, user if at else None, None if port is None else int(port), folder)


def _host_and_port(text: str) -> tuple[str, str | None]:
    """(host, port as written or None); an IPv6 address stands in brackets."""
    if text.startswith("["):
        host, closed, port = text[1:].partition("]")
        if not closed or ":" not in host or (port and not port.startswith(":")):
            return "", None
        return host, port[1:] if port else None
    host, colon, port = text.partition(":")
    return host, port if colon else None
