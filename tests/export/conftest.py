"""Graphs that several tests read: exporting one takes seconds, so each is made once a session."""

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
