"""Folders for devices: install.sh run as on a Jetson (its TensorRT and driver are stand-ins), what install.ps1 gets."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from fake_device import fake_device
from rebuild_kit import log
from test_bundle import engine_like
from tiny_bundle import tiny_bundle

from distill.errors import UserError
from distill.files import sha256_file
from export.bundling.layouts import layout
from export.bundling.verify import verify

RELEASE = "# R36 (release), REVISION: {}, GCID: 1, BOARD: generic, EABI: aarch64, DATE: Mon Jun 1 00:00:00 UTC 2026\n"


@pytest.fixture
def jetson(kit_archive, tmp_path) -> Path:
    layout(kit_archive, "jetson", tmp_path / "jetson")
    return tmp_path / "jetson"


def board(tmp_path: Path, version: str | None = "10.3.0", revision: str = "4.3", machine: str = "aarch64") -> dict[str, str]:
    """Environment of a shell on a Jetson: `uname`, the release file, and a Python that finds nothing but what it needs."""
    env = fake_device(tmp_path / "device", version)
    uname = tmp_path / "device/bin/uname"
    uname.write_text(f"#!/bin/sh\necho {machine}\n")
    uname.chmod(0o755)
    (tmp_path / "release").write_text(RELEASE.format(revision))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (site,) = (tmp_path / "env/lib").glob("python*/site-packages")
    folders = [*env["PYTHONPATH"].split(":"), sysconfig.get_paths()["purelib"]]
    (site / "device.pth").write_text("\n".join(folders) + "\n")
    found = {k: v for k, v in env.items() if k != "PYTHONPATH"}
    return {**found, "PYTHON": str(tmp_path / "env/bin/python"), "NV_TEGRA_RELEASE": str(tmp_path / "release")}


def install(folder: Path, env: dict[str, str], *arguments: str) -> tuple[int, str]:
    command = ["sh", str(folder / "install.sh"), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, timeout=300)
    return done.returncode, done.stdout


def test_install_on_a_jetson(jetson, tmp_path):
    """Hashes, engines, golden outputs; a second run builds nothing; the bundle's folder stays as it was verified."""
    env, before = board(tmp_path), sha256_file(jetson / "bundle/manifest.json")
    code, said = install(jetson, env)
    assert code == 0, said
    assert "Jetson Linux 36.4" in said
    assert "SKIP  onnx-fp8 32 px" in said
    assert "PASS  engines/onnx-int8/model_48.engine" in said
    built = len(log(env))
    assert built == 4
    code, said = install(jetson, env)
    assert (code, len(log(env)), said.count("up to date")) == (0, built, 4)
    assert sha256_file(jetson / "bundle/manifest.json") == before
    assert sorted(p.name for p in jetson.iterdir()) == ["README.md", "SHA256SUMS", "bundle", "engines", "install.sh"]
    assert not list((jetson / "bundle").rglob("*.pyc"))


def test_changed_files_stop_it(jetson, tmp_path):
    """Before any code of the bundle runs."""
    env = board(tmp_path)
    (jetson / "bundle/build_engine.py").write_text("raise SystemExit('ran')")
    code, said = install(jetson, env)
    assert (code, log(env)) == (1, [])
    assert "a file is missing or was changed" in said
    assert "ran" not in said.split()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"machine": "x86_64"}, "this machine is x86_64 and a Jetson is aarch64"),
        ({"revision": "3.0"}, "Jetson Linux 36.3 has a TensorRT older than 10.3"),
        ({"version": None}, "TensorRT is missing"),
    ],
)
def test_machines_that_lack_something(jetson, tmp_path, changes, words):
    code, said = install(jetson, board(tmp_path, **changes))
    assert code == 3
    assert words in said


def test_a_failed_build(jetson, tmp_path):
    code, said = install(jetson, {**board(tmp_path), "FAKE_ERROR": "Error Code 2: OutOfMemory"}, "--target", "onnx-int8")
    assert code == 1
    assert "memory ran out" in said


@pytest.mark.parametrize("command", [["sh", "-n"], ["bash", "-n"], ["shellcheck"]])
def test_install_sh_is_proper_shell(jetson, command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run([*command, jetson / "install.sh"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("to", ["jetson", "windows-rtx"])
def test_everything_is_in_the_sums(kit_archive, tmp_path, to):
    """Every file of the bundle with its hash, the manifest too; the scripts name only what is there."""
    layout(kit_archive, to, tmp_path / "d")
    sums = dict(line.split("  ")[::-1] for line in (tmp_path / "d/SHA256SUMS").read_text().splitlines())
    listed = {f"bundle/{f.path}": f.sha256 for f in verify(kit_archive).manifest.files}
    assert sums == listed | {"bundle/manifest.json": sha256_file(tmp_path / "d/bundle/manifest.json")}
    script = next((tmp_path / "d").glob("install.*")).read_text().replace("\\", "/")
    assert {"bundle/build_engine.py", "bundle/selftest.py"} <= set(script.split()) & set(sums)
    assert "# small on a" in (tmp_path / "d/README.md").read_text()


def test_windows_pins(kit_run, tmp_path):
    """The version that compiled the bundle's engines is the one that can run them; the engines stay."""
    folder, artifacts = kit_run
    kept = (folder / "small.tar.gz").read_bytes()
    try:
        path = tiny_bundle(folder, [*artifacts, engine_like(artifacts[0], folder / "rtx-int8")])
        layout(path, "windows-rtx", tmp_path / "w")
        only = tiny_bundle(folder, [engine_like(artifacts[0], folder / "again")])
        with pytest.raises(UserError, match="holds no ONNX file that TensorRT compiles"):
            layout(only, "windows-rtx", tmp_path / "x")
    finally:
        (folder / "small.tar.gz").write_bytes(kept)
    pins = (tmp_path / "w/requirements.txt").read_text().splitlines()
    assert [p.split("==")[0] for p in pins] == ["numpy", "pillow", "onnxruntime", "tensorrt_rtx"]
    assert pins[-1] == "tensorrt_rtx==0.0.1"
    assert (tmp_path / "w/bundle/artifacts/rtx-int8/model_32.engine").read_bytes() == b"a plan"
