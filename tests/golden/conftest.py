"""Loading of the reference's vectors: shapes and settings always come from the files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch


class Vectors:
    """One npz: `v["in/x"]` as a tensor, `v.number("in/cfg/depth")` as a Python scalar, `v.under("in/w/")` as a dict."""

    def __init__(self, path: Path):
        self.arrays = np.load(path, allow_pickle=False)
        self.names = list(self.arrays.files)

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(self.arrays[name]))

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def number(self, name: str):
        return self.arrays[name].item()

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {n[len(prefix) :]: self[n] for n in self.names if n.startswith(prefix)}

    def children(self, prefix: str) -> list[str]:
        """The next path component of every name under `prefix`, in order, once each."""
        return list(dict.fromkeys(n[len(prefix) :].split("/")[0] for n in self.names if n.startswith(prefix)))


@pytest.fixture
def vectors(golden: Path) -> Callable[[str], Vectors]:
    def load(name: str) -> Vectors:
        path = golden / f"{name}.npz"
        if not path.exists():
            pytest.skip(f"{path} is absent")
        return Vectors(path)

    return load
