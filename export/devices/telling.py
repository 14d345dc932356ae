"""What of a device may be read by everybody who gets a report: no names or addresses of hosts, no users, no folders.

device.json, the log and the terminal have the whole text; rows and reports have what is made here.
"""

import re
from typing import Any

LONGEST = 300
PLACES = re.compile(r"ssh://\S+|[\w.+-]+@[\w.:\[\]-]+|(?<![\w.)])~?/[\w.+~-][\w.+~/-]*")  # addresses, user@host, absolute paths
IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.])")  # or a version of four numbers
GENERAL = {
    "failed": "it failed a step",
    "unreachable": "it could not be reached",
    "nothing ran": "nothing could run there",
    "stopped": "it was stopped",
}


def clause(text: str) -> str:
    """Text of a device for a message: ASCII without control characters, cut after a whole word."""
    plain = "".join(c if " " <= c <= "~" else "?" for c in text)
    return plain if len(plain) <= LONGEST else f"{plain[:LONGEST].rsplit(' ', 1)[0]} ..."


def unnamed(text: str, host: str | None = None) -> str:
    """A script's text without the device's host, if it is known, anyone's user name with a host, and absolute paths."""
    plain = PLACES.sub("[...]", text)
    return plain if host is None else re.sub(rf"(?<![\w.-]){re.escape(host)}(?![\w-])", "the device", plain)


def reason_told(text: str, host: str, status: str) -> str:
    """A reason as it is if it names nothing, else the general one of its status."""
    return text if unnamed(text, host) == text and not IPV4.search(text) else GENERAL[status]


def told_of(about: dict[str, Any]) -> dict[str, Any]:
    """reason and steps of a device.json, as a report may have them; one without them, of an earlier version, tells its status."""
    if isinstance(found := about.get("told"), dict):
        return {"reason": found.get("reason"), "steps": found.get("steps", {})}
    steps = {name: {k: v for k, v in step.items() if k != "why"} for name, step in about.get("steps", {}).items()}
    return {"reason": GENERAL.get(about.get("status", ""), "it has no number") if about.get("reason") else None, "steps": steps}
