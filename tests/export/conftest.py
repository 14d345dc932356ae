"""Graphs that several tests read: exporting one takes seconds, so each is made once a session."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import MEDIUM, backbone

from distill.models.backbone import Backbone
from export.graph import export_onnx


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Backbone, Path, int]]:
    """name -> (backbone, file, size): an MLP at its native grid, and SwiGLU with registers above it, in both precisions."""
    folder = tmp_path_factory.mktemp("graphs")
    mlp, swiglu = backbone(**MEDIUM), backbone(ffn="swiglu", registers=3)
    made = {}
    wanted: list[tuple[str, Backbone, int, Any]] = [
        ("mlp-fp32", mlp, 32, "fp32"),
        ("mlp-fp16", mlp, 32, "fp16"),
        ("swiglu-fp32", swiglu, 56, "fp32"),
        ("swiglu-fp16", swiglu, 56, "fp16"),
    ]
    for name, model, size, precision in wanted:
        path = folder / f"{name}.onnx"
        export_onnx(model, path, size, precision)
        made[name] = model, path, size
    return made


@pytest.fixture(scope="session")
def kit_run(tmp_path_factory):
    """(folder, artifacts) of a tiny student's ONNX files that TensorRT takes."""
    from tiny_bundle import tiny_artifacts

    folder = tmp_path_factory.mktemp("run")
    return folder, tiny_artifacts(folder, ["onnx-fp32", "onnx-int8", "onnx-fp8"])


@pytest.fixture(scope="session")
def kit_archive(kit_run) -> Path:
    """Their bundle."""
    from tiny_bundle import tiny_bundle

    return tiny_bundle(*kit_run)


@pytest.fixture(scope="session")
def kit_unpacked(kit_archive, tmp_path_factory) -> Path:
    """Their bundle's folder, to look at."""
    from export.verify import unpack

    folder = tmp_path_factory.mktemp("unpacked") / "bundle"
    unpack(kit_archive, folder)
    return folder


@pytest.fixture
def kit_bundle(kit_unpacked, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(kit_unpacked, tmp_path / "bundle"))
