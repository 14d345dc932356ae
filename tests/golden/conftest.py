"""Loading of the reference's vectors, and comparing with them: shapes and settings always come from the files.

`pytest tests/golden --golden-table` prints what the comparisons found as a Markdown table.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

RUNS = ("out", "out64")  # the reference in float32, and in float64


@dataclass
class Found:
    """The largest differences of one row of the table: of elements, and relative to the array's largest element."""

    tolerance: str
    differences: dict[str, tuple[float, float]] = field(default_factory=dict)

    def take(self, run: str, absolute: float, relative: float) -> None:
        before = self.differences.get(run, (0.0, 0.0))
        self.differences[run] = (max(before[0], absolute), max(before[1], relative))


TABLE: dict[tuple[str, str], Found] = {}


class Vectors:
    """One npz: `v["in/x"]` as a tensor, `v.number("in/cfg/depth")` as a Python scalar, `v.under("in/w/")` as a dict."""

    def __init__(self, path: Path):
        self.item = path.stem.split("_")[0]  # several files may belong to one
        self.arrays = np.load(path, allow_pickle=False)
        self.names = list(self.arrays.files)

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self.arrays[name]))

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def get(self, name: str) -> Tensor | None:
        return self[name] if name in self.names else None

    def number(self, name: str):
        return self.arrays[name].item()

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {n[len(prefix) :]: self[n] for n in self.names if n.startswith(prefix)}

    def children(self, prefix: str) -> list[str]:
        """The next path component of every name under `prefix`, in order, once each."""
        return list(dict.fromkeys(n[len(prefix) :].split("/")[0] for n in self.names if n.startswith(prefix)))

    def close(
        self,
        name: str,
        got: Any,
        what: str,
        rtol: float = 0.0,
        atol: float = 0.0,
        of: Callable[[Tensor], Tensor] = lambda x: x,
        runs: tuple[str, ...] = RUNS,
    ) -> None:
        """`got` equals `out/<name>`, and `out64/<name>` where there is one; the difference goes to row `what` of the table.

        Args:
            of: applied to the reference's array; what of it is compared.
            runs: which of the reference's runs to compare with.
        """
        found = TABLE.setdefault((self.item, what), Found(_tolerance(rtol, atol)))
        compared = [run for run in runs if f"{run}/{name}" in self]
        assert compared, f"{self.item} holds no {name}"
        for run in compared:
            want = of(self[f"{run}/{name}"]).double()
            ours = torch.as_tensor(got, dtype=torch.float64).detach().reshape(want.shape)
            if want.numel():
                off = (ours - want).abs().max().item()
                found.take(run, off, off / max(want.abs().max().item(), 1e-300))
            torch.testing.assert_close(ours, want, rtol=rtol, atol=atol, msg=lambda m, run=run: f"{run}/{name}: {m}")

    def within(self, what: str, errors: Any, limit: float) -> None:
        """A statistic's differences, counted in standard errors, are at most `limit`."""
        found = TABLE.setdefault((self.item, what), Found(f"{limit:g} standard errors"))
        most = float(np.abs(np.asarray(errors)).max())
        before = found.differences.get("out", (0.0, 0.0))[0]
        found.differences["out"] = (max(before, most), float("nan"))  # standard errors have no scale to compare with
        assert most <= limit, what


def _tolerance(rtol: float, atol: float) -> str:
    said = [f"rel {rtol:.0e}"] * bool(rtol) + [f"abs {atol:.0e}"] * bool(atol)
    return " + ".join(said).replace("e-0", "e-") or "equal"


def table() -> list[str]:
    """The comparisons of this session as Markdown."""
    lines = ["| item | what | tolerance | `out`: abs | rel | `out64`: abs | rel |", "|---|---|---|---|---|---|---|"]
    for (item, what), found in sorted(TABLE.items(), key=lambda entry: entry[0][0]):
        numbers = [n for run in RUNS for n in found.differences.get(run, (float("nan"),) * 2)]
        cells = ["" if np.isnan(n) else "0" if n == 0 else f"{n:.1e}" if n < 0.1 else f"{n:.2g}" for n in numbers]
        lines.append(f"| {item} | {what} | {found.tolerance} | {' | '.join(cells)} |")
    return lines


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-table", action="store_true", help="print the differences from the reference as a Markdown table")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.getoption("--golden-table"):
        for line in ["", *table()]:
            terminalreporter.write_line(line)


@pytest.fixture
def vectors(golden: Path) -> Callable[[str], Vectors]:
    def load(name: str) -> Vectors:
        path = golden / f"{name}.npz"
        if not path.exists():
            pytest.skip(f"{path} is absent")
        return Vectors(path)

    return load
