"""Running the rebuild kit of an unpacked bundle as a device would: in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

from tiny_bundle import QUIET, photographs

from export.bundle import BundleConfig, BundleInputs, build_bundle
from export.bundling.verify import unpack
from export.engine_config import BatchProfile, EngineConfig
from export.targets import ExportConfig

EVERYTHING = EngineConfig(
    profiles=[BatchProfile(min_batch=1, opt_batch=1, max_batch=2)],
    workspace_mb=512,
    version_compatible=True,
    exclude_lean_runtime=True,
    refit=True,
    strip_plan=True,
    sparse_weights=True,
    weight_streaming=True,
    tf32=False,
    hardware_compatibility="same_compute_capability",
    profiling="names",
)


def kit(bundle: Path, *arguments: str, env: dict[str, str] | None = None, script: str = "build_engine.py"):
    """Run a script of the bundle -> (exit code, check -> (status, text), standard error)."""
    isolated = [] if env else ["-I"]
    command = [sys.executable, *isolated, "-B", str(bundle / script), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    report = json.loads(done.stdout)
    assert report["exit_code"] == done.returncode
    return done.returncode, {r["check"]: (r["status"], r["text"]) for r in report["results"]}


def selftest(bundle: Path, *arguments: str, env: dict[str, str] | None = None):
    return kit(bundle, "--seconds", "0", *arguments, env=env, script="selftest.py")


def index(bundle: Path) -> dict[str, dict]:
    return {e["path"]: e for e in json.loads((bundle / "engines/engines.json").read_text())["engines"]}


def log(env: dict[str, str]) -> list:
    path = Path(env["FAKE_LOG"])
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def files_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def everything(run, tmp_path: Path) -> Path:
    """A bundle whose recipe asks for every flag."""
    folder, artifacts = run
    export = ExportConfig(opt_batch=2, max_batch=3, engine=EVERYTHING)
    about = ("small", {"name": "demo"}, artifacts, folder / "student", photographs(), None, {"teacher": "large"})
    inputs = BundleInputs(*about, export=export)
    path = build_bundle(BundleConfig(targets=["onnx-int8"]), inputs, tmp_path / "all.tar.gz", QUIET)
    unpack(path, tmp_path / "all")
    return tmp_path / "all"
