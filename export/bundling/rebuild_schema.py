"""Schema of the manifest's `rebuild`: which ONNX files TensorRT compiles on a device, and with which flags. Made to read hostile files."""

from collections import Counter
from typing import Annotated, Literal

from pydantic import Field

from export.artifact import Precision
from export.bundling.archive import shown
from export.bundling.strict_model import Several, Sha256, Size, Strict

SCRIPTS = ("build_engine.py", "engine_files.py", "engine_flags.py", "engine_makers.py")
"""What a bundle with such files carries at its root."""
NATIVE = ("tensorrt", "tensorrt_rtx")
Flag = Literal["VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME", "REFIT", "SPARSE_WEIGHTS", "WEIGHT_STREAMING"]
Batch = Annotated[int, Field(ge=1, le=1 << 16)]


class RebuildSettings(Strict):
    """Settings of every engine of the bundle; `export/engine_config.py` says what each does. Networks are strongly typed."""

    strongly_typed: Literal[True]
    flags: Several[Flag]
    workspace_mb: Annotated[int, Field(ge=1, le=1 << 24)] | None
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"]
    tf32: bool
    profiling: Literal["none", "names", "detailed"]


class RebuildFile(Strict):
    """An ONNX file that TensorRT takes.

    Attributes:
        target: the artifact that it lies in, whose golden outputs its engine is tested by.
        profiles: smallest, most likely and largest batch, of each optimisation profile.
        cosine_min, max_abs: how far the engine's outputs may lie from the golden ones, as in `verify.Expected`.
    """

    target: str
    precision: Precision
    path: str
    sha256: Sha256
    resolution: Size
    input: Literal["images"]
    profiles: Annotated[Several[Annotated[list[Batch], Field(min_length=3, max_length=3)]], Field(min_length=1, max_length=16)]
    cosine_min: float
    max_abs: dict[str, float]


class Rebuild(Strict):
    settings: RebuildSettings
    files: Annotated[Several[RebuildFile], Field(min_length=1)]

    def problems(self, listed: dict[str, str], outputs: dict[tuple[str, int], list[str]]) -> list[str]:
        """What contradicts the rest of the manifest, one clause each.

        Args:
            listed: path -> sha256 of the bundle's files. outputs: (target, resolution) -> names, of every artifact's files.
        """
        found = [f"its rebuild kit lacks {name}" for name in SCRIPTS if name not in listed]
        twice = Counter((f.target, f.resolution) for f in self.files)
        found += [f"{shown(t)} is to be rebuilt twice at {r} px" for (t, r), count in twice.items() if count > 1]
        for file in self.files:
            names = outputs.get((file.target, file.resolution))
            if names is None:
                found.append(f"{shown(file.path)} is to be rebuilt for {shown(file.target)}, which has no such resolution")
            elif set(file.max_abs) != set(names):
                found.append(f"{shown(file.path)} has no tolerance for one of its engine's outputs")
            if not file.path.startswith(f"artifacts/{file.target}/"):
                found.append(f"{shown(file.path)} does not lie in artifacts/{shown(file.target)}")
            if listed.get(file.path) != file.sha256:
                found.append(f"{shown(file.path)} is to be rebuilt from another content than the manifest lists")
            if any(p != sorted(p) for p in file.profiles):
                found.append(f"{shown(file.path)} has a profile whose batches decrease")
        return found
