"""bench.py of a bundle, by itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_bundle import tiny_artifacts, tiny_bundle

from export.bundle import BundleConfig
from export.verify import unpack

# Stands for the rebuild kit's list of engines: one file that is outside the bundle, and one that is refused.
ENGINES = """
def engine_artifacts(manifest, folder):
    artifact = manifest["artifacts"][0]
    file = dict(artifact["files"][0], path=str(folder / "model.engine"))
    yield "engines/a", dict(artifact, target="engines/a", files=[file])
    yield "engines/b", "it is not the file that engines.json names"
"""


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
    assert {"load_s", "images_per_s", "latency_p90_ms", "latency_mean_ms"} <= {r["metric"] for r in report["rows"]}


def test_engines_that_were_built_here(bundle, tmp_path):
    code, report = bench(bundle, "--openings", "1", "--engines", str(tmp_path))
    assert code == 1
    assert "no build_engine.py" in next(r["reason"] for r in report["rows"] if r["target"] == "engines")
    engine = bundle / "artifacts" / "onnx-fp32" / "model_32.onnx"
    (tmp_path / "model.engine").write_bytes(engine.read_bytes())
    kit = bundle / "engine_files.py"
    kit.write_text(ENGINES)
    try:
        code, report = bench(bundle, "--openings", "1", "--engines", str(tmp_path))
    finally:
        kit.unlink()
    assert code == 1  # for the one that is refused
    (built,) = (r for r in report["rows"] if r["target"] == "engines/a" and r["metric"] == "latency_p50_ms")
    assert (built["status"], built["conditions"]["built_on_device"]) == ("measured", True)
    assert str(tmp_path) not in json.dumps(report)
    assert "not the file" in next(r["reason"] for r in report["rows"] if r["target"] == "engines/b")


def test_what_cannot_run(bundle):
    code, report = bench(bundle, "--target", "onnx-int4")
    assert code == 1
    assert "there is no artifact onnx-int4" in report["rows"][0]["reason"]
