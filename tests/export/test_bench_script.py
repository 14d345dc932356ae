"""bench.py of a bundle, by itself."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_bundle import tiny_artifacts, tiny_bundle

from distill.files import sha256_file
from export.bundle import BundleConfig
from export.bundling.verify import unpack


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    packed = tiny_bundle(folder, tiny_artifacts(folder, ["onnx-fp32"]), BundleConfig(golden_images=1))
    unpack(packed, folder / "unpacked")
    return folder / "unpacked"


def bench(bundle: Path, *options: str) -> tuple[int, dict]:
    fast = ["--json", "--seconds", "0.02", "--rounds", "2"]
    done = subprocess.run(
        [sys.executable, "-I", "-B", bundle / "bench.py", *fast, *options], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["exit_code"] == done.returncode
    assert report["format"] == "decant-device-bench-1"
    return done.returncode, report


def test_batches_and_openings(bundle):
    code, report = bench(bundle, "--batch", "1", "--batch", "3", "--batch", "4", "--openings", "2")
    assert code == 0
    assert report["machine"]["onnxruntime"]
    timed = [r for r in report["rows"] if r["metric"] == "latency_p50_ms"]
    assert {(r["conditions"]["resolution"], r["conditions"]["batch"], r["status"]) for r in timed} == {
        (side, batch, "not measured" if batch == 4 else "measured") for side in (32, 48) for batch in (1, 3, 4)
    }
    assert all("at most 3 images" in r["reason"] for r in timed if r["status"] == "not measured")
    assert not any("low" in r for r in report["rows"])  # two openings are too few for an interval
    assert {r["conditions"]["openings"] for r in timed if r["status"] == "measured"} == {2}
    manifest = json.loads((bundle / "manifest.json").read_text())
    hashes = {f["path"]: f["sha256"] for f in manifest["files"]}
    assert all(r["conditions"]["artifact_sha256"] == hashes[r["conditions"]["path"]] for r in timed)
    assert {r["conditions"]["threads"] for r in timed} == {len(os.sched_getaffinity(0))}
    alone = bench(bundle, "--openings", "1", "--threads", "1", "--target", "onnx-fp32")[1]["rows"]
    assert {r["conditions"]["threads"] for r in alone} == {1}
    assert {"load_s", "images_per_s", "latency_p90_ms", "latency_mean_ms"} <= {r["metric"] for r in report["rows"]}


def test_engines_that_were_built_here(bundle, tmp_path):
    """As build_engine.py leaves them, but that the "engine" is an ONNX file, which runs without a GPU."""
    code, report = bench(bundle, "--openings", "1", "--engines", str(tmp_path))
    assert code == 1
    assert "run build_engine.py first" in next(r["reason"] for r in report["rows"] if r["target"] == "engines")
    onnx = bundle / "artifacts" / "onnx-fp32" / "model_32.onnx"
    (tmp_path / "good.engine").write_bytes(onnx.read_bytes())
    (tmp_path / "changed.engine").write_bytes(b"another content")
    entry = {
        "target": "onnx-fp32",
        "onnx": "artifacts/onnx-fp32/model_32.onnx",
        "onnx_sha256": sha256_file(onnx),
        "sha256": sha256_file(onnx),
        "bytes": onnx.stat().st_size,
        "runtime": "onnxruntime",
        "versions": {},
        "compute_capabilities": [],
        "system": platform.system().lower(),
        "machine": platform.machine().lower(),
    }
    engines = [{**entry, "path": name} for name in ("good.engine", "changed.engine")]
    (tmp_path / "engines.json").write_text(json.dumps({"format": "decant-engines-1", "engines": engines}))
    code, report = bench(bundle, "--openings", "1", "--engines", str(tmp_path))
    assert code == 1  # for the one that is refused
    (built,) = (r for r in report["rows"] if r["target"] == "engines/good.engine" and r["metric"] == "latency_p50_ms")
    assert (built["status"], built["conditions"]["built_on_device"]) == ("measured", True)
    assert str(tmp_path) not in json.dumps(report)
    assert "not the file" in next(r["reason"] for r in report["rows"] if r["target"] == "engines/changed.engine")
    code, report = bench(bundle, "--openings", "1", "--engines", str(tmp_path), "--target", "onnx-fp32")
    assert {r["target"] for r in report["rows"]} == {"onnx-fp32", "engines/good.engine", "engines/changed.engine"}
    code, report = bench(bundle, "--openings", "1", "--engines", str(tmp_path), "--target", "onnx-int8")
    assert {r["target"]: r["reason"] for r in report["rows"][:1]} == {"onnx-int8": "there is no artifact onnx-int8"}
    assert not any(r["target"].startswith("engines/") and r["status"] == "measured" for r in report["rows"])


def test_what_fails_in_the_middle_leaves_the_others(bundle, tmp_path):
    """One of two files stops answering after 40 calls, as a GPU without memory would; the other keeps its numbers."""
    unpacked = tmp_path / "b"
    shutil.copytree(bundle, unpacked)
    script = (unpacked / "infer.py").read_text()
    broken = """
    def run(self, images):
        if self.file["resolution"] == 48:
            Model.calls = getattr(Model, "calls", 0) + 1
            if Model.calls > 40:
                raise RuntimeError("CUDA out of memory\\nand more")
        return self._run(images)

    def _run(self, images):
"""
    assert script.count("\n    def run(self, images):\n") == 1
    (unpacked / "infer.py").write_text(script.replace("\n    def run(self, images):\n", broken))
    code, report = bench(unpacked, "--openings", "2", "--seconds", "0.5")
    assert code == 1
    timed = {(r["conditions"]["resolution"], r["status"]) for r in report["rows"] if r["metric"] == "latency_p50_ms"}
    assert timed == {(32, "measured"), (48, "not measured")}
    assert "RuntimeError: CUDA out of memory" in [r.get("reason") for r in report["rows"]]


def test_what_cannot_run(bundle):
    code, report = bench(bundle, "--target", "onnx-int4")
    assert code == 1
    assert "there is no artifact onnx-int4" in report["rows"][0]["reason"]


def test_without_its_manifest(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "b")
    (tmp_path / "b/manifest.json").unlink()
    code, report = bench(tmp_path / "b")
    assert (code, "manifest.json cannot be read" in report["rows"][0]["reason"]) == (1, True)


def test_a_stand_in_is_named(bundle, bare):
    """Where OpenVINO runs ONNX Runtime's file, its latency is not ONNX Runtime's."""
    pytest.importorskip("openvino")
    done = bare(
        bundle / "bench.py",
        *("--json", "--seconds", "0.02", "--rounds", "1", "--openings", "1"),
        packages=("numpy", "PIL", "openvino"),
    )
    rows = [r for r in json.loads(done.stdout)["rows"] if r["metric"] == "latency_p50_ms"]
    assert {(r["status"], r["conditions"]["runtime"], r["conditions"]["stands_in_for"]) for r in rows} == {
        ("measured", "openvino", "onnxruntime")
    }
