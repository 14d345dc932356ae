"""A bundle's self-test where nothing but numpy, Pillow and one runtime is installed: virtual environments made from the index."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_bundle import tiny_artifacts, tiny_bundle

from export.bundle import BundleConfig
from export.bundling.golden import SAME, SOURCE
from export.bundling.verify import unpack

pytestmark = pytest.mark.slow
ONNX, OPENVINO = ["onnx-fp32", "onnx-int8"], ["openvino-fp32"]
RAN = {"onnxruntime": ONNX, "openvino": [*ONNX, *OPENVINO]}  # OpenVINO stands in for an onnxruntime that is not there


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    pytest.importorskip("openvino")
    folder = tmp_path_factory.mktemp("run")
    return tiny_bundle(folder, tiny_artifacts(folder, ["onnx-fp32", "onnx-int8", "openvino-fp32"]), BundleConfig())


def environment(folder: Path, runtime: str) -> Path:
    """A fresh environment's Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "numpy", "pillow", runtime],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"pip could not install {runtime} ({done.stderr.strip().splitlines()[-1]})")
    return python


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_fresh_environment_with_one_runtime(bundle, tmp_path, runtime):
    python = environment(tmp_path / "env", runtime)
    unpack(bundle, tmp_path / "b")

    def selftest() -> tuple[int, dict]:
        command = [python, "-I", "-B", tmp_path / "b/selftest.py", "--json", "--seconds", "0.05"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.stderr == ""
        return done.returncode, json.loads(done.stdout)

    code, report = selftest()
    assert (code, report["exit_code"]) == (0, 0)
    assert runtime in report["machine"]
    assert not ({"onnxruntime", "openvino", "torch"} - {runtime}) & set(report["machine"])
    results = {r["check"]: r for r in report["results"]}
    ran = RAN[runtime]
    assert [n for n, r in results.items() if r["status"] == "PASS"] == ["machine", "files", "preprocess", *ran]
    assert [n for n, r in results.items() if r["status"] == "SKIP"] == [t for t in (*ONNX, *OPENVINO) if t not in ran]
    for target in ran:
        stand_in = runtime == "openvino" and target in ONNX
        limit = (SOURCE if stand_in else SAME)[target.split("-")[1]].cosine_min
        assert results[target]["text"].startswith("run by openvino instead of onnxruntime; ") == stand_in
        assert [f["resolution"] for f in results[target]["files"]] == [32, 48]
        for file in results[target]["files"]:
            strict = file.get("stored_tensor", file)  # another Pillow than here may round a grey level otherwise
            assert strict["tolerance"]["cosine_min"] == limit <= strict["cosine_min"]
            assert set(strict["tolerance"]["max_abs"]) == {"cls", "patches"}
            assert strict["max_abs"] <= max(strict["tolerance"]["max_abs"].values())
            assert file["tolerance"]["cosine_min"] <= file["cosine_min"]
            assert file["latency_n"] >= 3
            assert file["latency_p50_ms"] > 0

    golden = tmp_path / "b/golden" / ran[0] / "expected_32.npz"
    data = bytearray(golden.read_bytes())
    data[len(data) // 2] ^= 1
    golden.write_bytes(data)
    code, report = selftest()
    assert (code, report["exit_code"]) == (1, 1)
    assert [r["text"] for r in report["results"] if r["status"] == "FAIL"] == [
        f"golden/{ran[0]}/expected_32.npz was changed: its sha256 is not the manifest's"
    ]
