"""Shared fixtures. Shapes in annotations are checked while tests run: the import hook below turns them into errors."""

import os
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

# Before any of the checked modules is imported. `forward`s that torch.export traces stay cheap: only annotated functions are wrapped.
install_import_hook(["distill.losses", "distill.models"], "beartype.beartype")

torch.set_num_threads(1)  # tiny operations; threads only wait for each other where something else runs too

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference numbers, or skip."""
    folder = Path(os.environ.get("DECANT_GOLDEN", ROOT.parent / "shared" / "golden"))
    if not folder.is_dir():
        pytest.skip(f"no golden vectors in {folder}; set DECANT_GOLDEN to their folder")
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real image sets, or skip."""
    folder = Path(os.environ.get("DECANT_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real test data in {folder}; set DECANT_DATA to its folder")
    return folder
