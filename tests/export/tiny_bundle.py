"""A run with a tiny student and its bundle, for tests of what is done with bundles."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny import backbone, pictures

from distill.data.preprocess import Preprocess
from distill.files import sha256_file
from distill.models.checkpoints import save_model
from distill.progress import Progress
from export.artifact import Artifact
from export.builders import build_target
from export.bundle import BundleConfig, BundleInputs, build_bundle
from export.bundling.archive import write_archive
from export.bundling.verify import MANIFEST, unpack, verify
from export.targets import ExportConfig, Images

IMAGES = Images(lambda n, size: pictures(32, size)[:n], lambda n, size, avoid: pictures(32, size)[:n])
QUIET = Progress("quiet")
PREPROCESS = Preprocess(32, 36)


def tiny_artifacts(folder: Path, targets: Sequence[str], preprocess: Preprocess = PREPROCESS) -> list[Artifact]:
    """Save a student in `folder`/student and export it; sources come before what is made from them."""
    save_model(folder / "student", backbone(), preprocess, lineage={"seed": 0})
    config, sources, artifacts = ExportConfig(resolutions=[32, 48], max_batch=3, opt_batch=2), {}, []
    for target in targets:
        sources[target] = folder / target
        artifacts.append(build_target(target, config, "small", folder / "student", sources, IMAGES, folder / target, QUIET))
    return artifacts


def photographs() -> list[Image.Image]:
    """Four smooth pictures of different shapes, most larger than the network's input."""
    noise, made = np.random.default_rng(0), []
    for size in ((90, 70), (64, 64), (50, 120), (200, 41)):
        coarse = Image.fromarray(noise.integers(0, 255, (9, 9, 3), np.uint8))
        made.append(coarse.resize(size, Image.Resampling.BICUBIC))
    return made


def tiny_bundle(folder: Path, artifacts: list[Artifact], config: BundleConfig | None = None, **more: Any) -> Path:
    """Write `folder`/small.tar.gz. `more`: of BundleInputs."""
    settings = config or BundleConfig(golden_images=4)
    about: dict[str, Any] = {
        "student": "small",
        "run": {"name": "demo"},
        "lineage": {"teacher": "large"},
        "report_folder": None,
    }
    inputs = BundleInputs(artifacts=artifacts, model_folder=folder / "student", golden_images=photographs(), **about, **more)
    return build_bundle(settings, inputs, folder / "small.tar.gz", QUIET)


def remade(bundle: Path, out: Path, change: Callable[[Path], object]) -> Path:
    """The bundle with `change(folder)` done to its files, and sizes, hashes and archive made to fit: all but golden data."""
    folder = out.parent / f"{out.name}-files"
    manifest = unpack(bundle, folder).manifest.model_dump()
    change(folder)
    for entry in manifest["files"]:
        path = folder / entry["path"]
        entry |= {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    for entry in (manifest["rebuild"] or {"files": []})["files"]:
        entry["sha256"] = sha256_file(folder / entry["path"])
    (folder / MANIFEST).write_text(json.dumps(manifest))
    names = [MANIFEST, *(entry["path"] for entry in manifest["files"])]
    write_archive(out, ((n, (folder / n).stat().st_size, iter([(folder / n).read_bytes()])) for n in names))
    verify(out)
    return out
