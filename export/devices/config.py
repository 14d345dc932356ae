"""A device of a device file."""

from pydantic import Field

from distill.config import Config
from distill.errors import UserError
from export.devices.address import NAME, Address, parse_address


class DeviceConfig(Config):
    """A device of a device file.

    Attributes:
        name: what it is called in results and reports; a plain word.
        on: ssh://user@host[:port][/dir].
        python: its Python with the runtimes: a name, or a path there.
        env: environment variables of what runs there, such as LD_LIBRARY_PATH: no profile is read by a command over ssh.
        timeout: seconds that one of build, bench and self-test may take.
    """

    name: str
    on: str
    python: str = "python3"
    env: dict[str, str] = Field(default_factory=dict)
    timeout: float = 1800.0

    def problems(self) -> list[str]:
        """What is wrong with it, one sentence each."""
        found = (
            [] if NAME.fullmatch(self.name) else [f"name {self.name!r} is no plain word of letters, digits, `_`, `.` and `-`"]
        )
        try:
            self.address()
        except UserError as e:
            found.append(str(e).rstrip("."))
        if not self.python or self.python.startswith("-") or any(not " " <= c <= "~" for c in self.python):
            found.append(f"python {self.python!r} is no name or path of a program")
        if not 1 <= self.timeout <= 7 * 86400:
            found.append(f"timeout must lie in 1..604800 seconds, got {self.timeout:g}")
        if wrong := [k for k, v in self.env.items() if not k.isidentifier() or "\0" in v]:
            found.append(f"env has {wrong[0]!r}, which is no variable's name, or has a value that none can have")
        return found

    def address(self) -> Address:
        return parse_address(self.on)
