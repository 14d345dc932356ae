"""What several tests use and one session makes once: exported graphs, and environments without packages."""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
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
def bare(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script of a bundle where nothing can be imported but the standard library and the packages named."""
    folder = tmp_path_factory.mktemp("bare")
    runtimes = [("numpy", "PIL", r) for r in ("onnxruntime", "openvino") if importlib.util.find_spec(r) is not None]
    for packages in (*runtimes, ("numpy", "PIL"), ()):
        (folder / "-".join(("p", *packages))).mkdir()
        for package in packages:
            site = Path(importlib.util.find_spec(package).origin).parent.parent
            libraries = {"PIL": "pillow"}.get(package, package) + ".libs"  # where wheels keep their shared libraries
            for name in (package, libraries):
                if (site / name).exists():
                    (folder / "-".join(("p", *packages)) / name).symlink_to(site / name)

    def call(script: Path, *arguments: str, packages: tuple[str, ...] = ("numpy", "PIL", "onnxruntime")) -> Any:
        start = (
            "import sys, runpy; sys.path.insert(0, sys.argv[1]); sys.argv = sys.argv[2:]\n"
            "import importlib.util as u\n"
            "assert not [n for n in ('torch', 'timm', 'onnx', 'distill', 'export', 'pydantic') if u.find_spec(n)]\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')"
        )
        # -S: not even site-packages. The base interpreter: not even the virtual environment.
        python = [getattr(sys, "_base_executable", sys.executable), "-I", "-S", "-c", start]
        command = [*python, str(folder / "-".join(("p", *packages))), str(script), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=script.parent, timeout=120)

    return call


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
    from export.bundling.verify import unpack

    folder = tmp_path_factory.mktemp("unpacked") / "bundle"
    unpack(kit_archive, folder)
    return folder


@pytest.fixture
def kit_bundle(kit_unpacked, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(kit_unpacked, tmp_path / "bundle"))
