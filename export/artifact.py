"""The artifact: the folder `export/<student>/<target>/`, one file a resolution and an `artifact.json` on what they are.

`artifact.json` is written last: a folder without it is an interrupted export.
"""

import hashlib
import json
from pathlib import Path, PurePath
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from distill.config import Config
from distill.errors import UserError
from distill.files import read_json, write_json

FORMAT = "decant-artifact-1"
# int8 and fp8 quantize weights and activations, w8 and w4 only weights (to INT8 and INT4).
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "w8", "w4"]
Runtime = Literal["onnxruntime", "openvino", "tensorrt_rtx", "tensorrt"]
NAME = "artifact.json"


class Unrunnable(Exception):
    """This machine cannot execute an artifact; the message is the one-sentence reason of a "not measured" row."""


def plain_name(path: str) -> str:
    """An artifact.json from elsewhere must not make a reader open files outside its folder."""
    if not path or path.startswith(".") or set(path) & set("/\\:\0"):
        raise ValueError(f"{path!r} is not a plain file name")
    return path


class TensorSpec(Config):
    """An input or output of a file: `shape` mixes sizes with the name of the dynamic axis, e.g. ["batch", 3, 48, 48]."""

    name: str
    dtype: str
    shape: list[int | str]


class ExtraFile(Config):
    """A file beside the ones that are served: the quantization plan, the graph that an engine was compiled from."""

    path: str
    sha256: str
    bytes: int

    _plain_name = field_validator("path")(plain_name)


class ArtifactFile(Config):
    """One file of an artifact: one resolution, positions baked, the batch dynamic.

    Attributes:
        path: plain file name inside the artifact's folder.
        resolution: side of the square input in pixels.
        sha256, bytes: of the file as written; checked before anything is deserialized.
        preprocess: Preprocess.to_json() whose size is `resolution`.
    """

    path: str
    resolution: int
    sha256: str
    bytes: int
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    preprocess: dict[str, Any]

    _plain_name = field_validator("path")(plain_name)


class Artifact(Config):
    """What an export target produced, as `artifact.json` holds it.

    Attributes:
        student: name of the model in the run, e.g. `small`.
        target: one of export/targets.py, e.g. `onnx-int8`.
        precision: the precision of the linear layers, verified in the graph before the file got its name.
        runtime: what executes the files.
        source: the target that this one was made from (`torch-fp32` when from the model itself).
        dim, patch: width D of the features and side of a patch in pixels.
        compute_capabilities: of GPUs that an engine was compiled for, e.g. ["8.6", "8.9"]; empty for ONNX.
        runnable_here: whether the machine that built it can execute it; `reason` says why not.
        versions: packages that made it. details: the quantization plan, counts of element types, the profile of an engine, ...
        extras: files beside the ones that are served (plan.json, the Q/DQ graph of an engine).
        folder: where it was read from or written to (not stored).
    """

    format: Literal["decant-artifact-1"] = "decant-artifact-1"
    student: str
    target: str
    precision: Precision
    runtime: Runtime
    files: list[ArtifactFile] = Field(min_length=1)
    source: str
    dim: int
    patch: int
    opset: int
    max_batch: int
    compute_capabilities: list[str] = Field(default_factory=list)
    build_seconds: float
    runnable_here: bool = True
    reason: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    details: dict[str, Any] = Field(default_factory=dict)
    extras: list[ExtraFile] = Field(default_factory=list)
    folder: Path = Field(default=Path(), exclude=True)

    def file(self, resolution: int | None = None) -> ArtifactFile:
        """The file for a resolution; without one, the first.

        Raises:
            UserError: the artifact was not exported for that resolution.
        """
        for entry in self.files:
            if resolution in (None, entry.resolution):
                return entry
        have = ", ".join(str(f.resolution) for f in self.files)
        raise UserError(
            f"{self.folder} holds no file for {resolution} px (only {have}); add it to the recipe's export.resolutions."
        )

    def path(self, entry: ArtifactFile | ExtraFile) -> Path:
        return self.folder / entry.path

    def content(self, entry: ArtifactFile | ExtraFile) -> bytes:
        """The bytes of a file, proved to be those that `artifact.json` names: what is deserialized is what was hashed.

        Raises:
            UserError: the file was changed since it was exported.
        """
        data = self.path(entry).read_bytes()
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise UserError(
                f"{self.path(entry)} was changed since it was exported (its sha256 differs from {NAME}); export again."
            )
        return data

    def content_sha256(self, entry: ArtifactFile) -> str:
        """What names a file's numbers: its hash, and for OpenVINO, whose .xml may be the same for other weights, that of the .bin too."""
        beside = [e.sha256 for e in self.extras if e.path == str(PurePath(entry.path).with_suffix(".bin"))]
        return hashlib.sha256("".join([entry.sha256, *beside]).encode()).hexdigest() if beside else entry.sha256

    def size_mb(self, resolution: int | None = None) -> float:
        """Megabytes (10^6 bytes) of one file."""
        return self.file(resolution).bytes / 1e6

    def write(self) -> "Artifact":
        """Write `artifact.json` into `folder`; call it when every file is in place."""
        write_json(self.folder / NAME, self.model_dump(mode="json"))
        return self


def read_artifact(folder: Path) -> Artifact:
    """Read an artifact's folder: format and presence and size of every file are checked, contents when a file is opened.

    Raises:
        UserError: the folder holds no artifact, one of another format, or one whose files are missing or truncated.
    """
    path = folder / NAME
    if not path.is_file():
        raise UserError(
            f"{folder} holds no artifact (no {NAME}); run the export stage, which writes RUN/export/STUDENT/TARGET."
        )
    try:
        value = read_json(path)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            got = value.get("format") if isinstance(value, dict) else type(value).__name__
            raise UserError(f"{path} has format {got!r}, this version reads {FORMAT!r}; run the export stage again.")
        artifact = Artifact(**{**value, "folder": folder})
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not JSON ({e}); run the export stage again.") from e
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is damaged at {where or 'its top'}: {first['msg']}; run the export stage again.") from e
    entries: list[ArtifactFile | ExtraFile] = [*artifact.files, *artifact.extras]
    for entry in entries:
        file = artifact.path(entry)
        if not file.is_file() or file.is_symlink() or file.stat().st_size != entry.bytes:
            raise UserError(f"{file} is missing or not {entry.bytes} bytes as {NAME} says; run the export stage again.")
    return artifact
