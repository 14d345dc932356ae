"""The rebuild kit of a bundle: which ONNX files a device compiles for itself, with which flags, and the same as lines of trtexec.

Engines run on the GPU generation, version and system that they were compiled for, so a bundle carries the graphs and the scripts that
compile them (templates/bundle/build_engine.py). The flags are those that export/engine.py would have used in this recipe, but for
strip_plan: a device has the weights beside the engine, and an engine without them could not be tested.
"""

import io
import runpy
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.artifact import Artifact, ArtifactFile, ExtraFile, Precision
from export.builders import with_sparsity
from export.bundling.golden import Tolerance, root_mean_square
from export.bundling.rebuild_schema import NATIVE, SCRIPTS
from export.engine_config import EngineConfig
from export.graphs.nodes import INPUT, load_graph
from export.lint import lint
from export.targets import SPECS, ExportConfig

FIT = ("fp32", "fp16", "bf16", "int8", "fp8")
REFUSED = {"uint8-zero-point", "dynamic-quantization"}
"""What TensorRT's parser accepts in no version (export/linting/lint_quantization.py)."""
LEFT_OUT = ("STRIP_PLAN", "REFIT_IDENTICAL")
PREAMBLE = """\
# Engines for this machine's GPU

`python build_engine.py` compiles every file below into `engines/`, keeps a timing cache there, and skips what is up to date;
`python selftest.py --engines engines` compares the engines with the golden outputs. It takes TensorRT 10.3 or newer (JetPack 6.1
and later), TensorRT for RTX 1.x, or trtexec, and says what is missing.

The same by hand with trtexec, from this folder. Networks are strongly typed: the file decides every precision. TensorRT 11 has no other
kind and ignores `--stronglyTyped`. A `selftest.py --engines` tests only engines that `build_engine.py` wrote.
"""
Json = dict[str, Any]


def rebuild(
    chosen: Sequence[Artifact],
    expected: dict[str, Json],
    golden: dict[str, bytes],
    tolerance: Callable[[Precision], Tolerance],
    export: ExportConfig,
    model_folder: Path,
) -> Json | None:
    """The manifest's `rebuild` (its schema is `rebuild_schema.Rebuild`), or None where nothing can be compiled.

    Args:
        expected: the manifest's `expected` by path of an artifact's file. golden: the .npz files that it names.
        tolerance: how far from the golden outputs an engine of a precision may lie.
        export: batches and engine settings of the recipe. model_folder: the student, whose weights may be sparse.
    """
    settings = with_sparsity(export.engine, model_folder)
    files = []
    for artifact, entry, graph in graphs(chosen):
        beside = expected[f"artifacts/{artifact.target}/{entry.path}"]
        allowed = tolerance(artifact.precision)
        with np.load(io.BytesIO(golden[beside["path"]]), allow_pickle=False) as outputs:
            largest = {n: allowed.max_abs * root_mean_square(outputs[n]) for n in outputs.files}
        most = artifact.max_batch
        files.append(
            {
                "target": artifact.target,
                "precision": artifact.precision,
                "path": f"artifacts/{artifact.target}/{graph.path}",
                "sha256": graph.sha256,
                "resolution": entry.resolution,
                "input": INPUT,
                "profiles": [[1, min(export.opt_batch, most), most], *(list(p.shapes()) for p in settings.profiles)],
                "cosine_min": allowed.cosine_min,
                "max_abs": largest,
            }
        )
    return {"settings": flags_of(settings), "files": files} if files else None


def graphs(chosen: Sequence[Artifact]) -> Iterator[tuple[Artifact, ArtifactFile, ArtifactFile | ExtraFile]]:
    """(artifact, its file, the ONNX file to compile): an ONNX artifact's own file, the graph that an engine was compiled from.

    Of ONNX artifacts only ours and only those whose quantization TensorRT reads; engines of a float precision were compiled from
    another artifact's file and have none of their own.
    """
    for artifact in chosen:
        beside = {e.path: e for e in artifact.extras}
        for entry in artifact.files:
            if artifact.runtime in NATIVE and (graph := beside.get(f"graph_{entry.resolution}.onnx")):
                yield artifact, entry, graph
            elif artifact.runtime == "onnxruntime" and fits(artifact, entry):
                yield artifact, entry, entry


def fits(artifact: Artifact, entry: ArtifactFile) -> bool:
    """Whether TensorRT reads a file of ONNX Runtime: explicit Q/DQ, zero points 0, no dynamic quantization."""
    if artifact.precision not in FIT or (artifact.target in SPECS and not SPECS[artifact.target].ours):
        return False
    found = lint(load_graph(artifact.path(entry)), entry.path, artifact.precision, "tensorrt")
    return not {f.rule for f in found} & REFUSED


def flags_of(settings: EngineConfig) -> Json:
    """Engine settings as the kit reads them; what belongs to one machine (the timing cache) is the kit's own affair."""
    return {
        "strongly_typed": True,
        "flags": [f for f in settings.flags() if f not in LEFT_OUT],
        "workspace_mb": settings.workspace_mb,
        "hardware_compatibility": settings.hardware_compatibility,
        "tf32": settings.tf32,
        "profiling": settings.profiling,
    }


def kit(section: Json, templates: Path) -> dict[str, bytes | Path]:
    """The files that a bundle with a `rebuild` section carries: the scripts and REBUILD.md."""
    return {name: templates / name for name in SCRIPTS} | {"REBUILD.md": by_hand(section, templates).encode()}


def by_hand(section: Json, templates: Path) -> str:
    """REBUILD.md: a trtexec command for each file, of the very options that build_engine.py passes."""
    options = runpy.run_path(str(templates / "engine_flags.py"))["trtexec_arguments"]
    text = PREAMBLE
    for file in section["files"]:
        folder = f"engines/{file['target']}"
        engine = f"{folder}/model_{file['resolution']}.engine"
        command = ["trtexec", *options(file, section["settings"], file["path"], engine, "engines/timing.cache")]
        text += f"\n## {file['target']} at {file['resolution']} px\n\n```\nmkdir -p {shlex.quote(folder)}\n{shlex.join(command)}\n```\n"
    return text
