"""The memory of a budget's search: every measurement on disk as it is made, so that a killed search repeats none."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distill.files import sha256_json, write_text
from export.quantizing.budget_config import Measured

Kept = frozenset[str]
Measure = Callable[[Kept], Measured]
LEDGER = "budget.jsonl"


class Ledger:
    """Measurements on disk, one JSON line each, in the order in which they were made.

    Args:
        path: of the file; None keeps them in memory only.
        identity: all that the measurements depend on (model, images, settings, versions). A file of another one is begun anew.
    """

    def __init__(self, path: Path | None = None, identity: Mapping[str, Any] | None = None):
        self.path = path
        self.known: dict[tuple[str, Kept], Measured] = {}
        if path is None:
            return
        first = json.dumps({"identity": sha256_json(dict(identity or {}))})
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        records = [r for line in lines[1:] if (r := _record(line))] if lines[:1] == [first] else []
        self.known = {(r.get("what", ""), frozenset(r["kept"])): r["measured"] for r in records}
        write_text(path, "\n".join([first, *map(json.dumps, records)]) + "\n")  # without a line that a kill cut short

    def at(self, kept: Kept, measure: Measure, what: str = "") -> Measured:
        """The measurement of these layers kept, remembered or made now. `what` tells several measures in one file apart."""
        if (what, kept) not in self.known:
            self.known[what, kept] = measured = measure(kept)
            if self.path is not None:
                with open(self.path, "a", encoding="utf-8") as f:
                    f.write(json.dumps({"what": what, "kept": sorted(kept), "measured": measured}) + "\n")
        return self.known[what, kept]


def _record(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("measured"), dict) and "kept" in value else None
