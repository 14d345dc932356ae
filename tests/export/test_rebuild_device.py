"""The rebuild kit on a device: TensorRT-RTX itself compiles for absent GPUs; TensorRT, trtexec and the driver are stand-ins."""

import json
import runpy
import signal
import subprocess
import sys
import time

import pytest
from fake_device import fake_device
from interrupts import heeds_interrupts
from rebuild_kit import everything, files_in, index, kit, log, selftest
from tiny_bundle import tiny_artifacts, tiny_bundle

from export.bundle import BundleConfig
from export.bundling.verify import unpack

# ---- TensorRT for RTX, the real one


def test_rtx_compiles_for_absent_gpus(kit_bundle):
    pytest.importorskip("tensorrt_rtx")
    code, results = kit(kit_bundle, "--compute-capability", "8.6")
    assert code == 0
    assert {c: s for c, (s, _) in results.items() if c.endswith("px")} == {
        f"{t} {r} px": "SKIP" if t == "onnx-fp8" else "PASS" for t in ("onnx-fp32", "onnx-int8", "onnx-fp8") for r in (32, 48)
    }
    assert "FP8 needs compute capability 8.9" in results["onnx-fp8 32 px"][1]
    engines = index(kit_bundle)
    assert sorted(engines) == [f"onnx-{p}/model_{r}.engine" for p in ("fp32", "int8") for r in (32, 48)]
    before = (kit_bundle / "engines/onnx-int8/model_32.engine").stat().st_mtime_ns
    code, results = kit(kit_bundle, "--target", "onnx-int8", "--compute-capability", "8.6")
    assert (code, results["onnx-int8 32 px"][1].split(":")[0]) == (0, "up to date")
    assert (kit_bundle / "engines/onnx-int8/model_32.engine").stat().st_mtime_ns == before
    assert kit(kit_bundle, "--target", "onnx-fp8", "--compute-capability", "8.9")[0] == 0
    assert index(kit_bundle)["onnx-fp8/model_32.engine"]["compute_capabilities"] == ["8.9"]
    code, results = selftest(kit_bundle, "--engines", str(kit_bundle / "engines"), "--target", "onnx-int8")
    assert (code, results["engines/onnx-int8/model_32.engine"]) == (0, ("SKIP", "there is no NVIDIA driver here"))


@pytest.mark.slow
def test_rtx_compiles_what_an_engine_was_made_from(tmp_path):
    """A bundle of engines brings the graph behind a quantized one; its half and BF16 files compile too."""
    pytest.importorskip("tensorrt_rtx")
    artifacts = tiny_artifacts(tmp_path, ["onnx-fp32", "onnx-fp16", "onnx-bf16", "onnx-int8", "rtx-int8"])
    path = tiny_bundle(tmp_path, artifacts, BundleConfig(targets=["onnx-fp16", "onnx-bf16", "rtx-int8"]))
    unpack(path, tmp_path / "b")
    code, results = kit(tmp_path / "b", "--compute-capability", "8.6")
    assert (code, {s for s, _ in results.values()}) == (0, {"PASS"})
    sources = {p: e["onnx"] for p, e in index(tmp_path / "b").items()}
    assert sources["rtx-int8/model_48.engine"] == "artifacts/rtx-int8/graph_48.onnx"
    assert sources["onnx-bf16/model_32.engine"] == "artifacts/onnx-bf16/model_32.onnx"
    code, results = selftest(tmp_path / "b", "--engines", str(tmp_path / "b/engines"))
    assert {s for c, (s, _) in results.items() if c.startswith("engines/")} == {"SKIP"}


def test_rtx_cannot(kit_bundle):
    pytest.importorskip("tensorrt_rtx")
    code, results = kit(kit_bundle, "--runtime", "tensorrt_rtx", "--compute-capability", "8.7")
    assert (code, results["machine"][0]) == (3, "SKIP")
    assert "does not compile for compute capability 8.7" in results["machine"][1]


def test_nothing_here(kit_bundle, tmp_path):
    code, results = kit(kit_bundle, env={**fake_device(tmp_path / "d", None), "LD_LIBRARY_PATH": ""})
    assert (code, list(results)) == (3, ["machine"])
    assert all(f"{name}: " in results["machine"][1] for name in ("tensorrt", "tensorrt_rtx", "trtexec"))
    code, results = kit(kit_bundle, "--target", "onnx-w4", env=fake_device(tmp_path / "e", "10.3.0"))
    assert (code, "there is no onnx-w4 to rebuild" in results["manifest"][1]) == (1, True)


# ---- TensorRT, by stand-ins


@pytest.mark.parametrize("version", ["10.3.0", "10.12.0", "11.4.0"])
def test_tensorrt(kit_run, tmp_path, version):
    """Flags, profiles and pools as asked; what a version lacks is said; a rebuilt engine passes the self-test on the GPU."""
    bundle, env = everything(kit_run, tmp_path), fake_device(tmp_path / "d", version)
    code, results = kit(bundle, env=env)
    assert code == 0
    assert results["machine"][1] == f"tensorrt {version} for Orin (compute capability 8.7)"
    asked, again = log(env)
    flags = ("EXCLUDE_LEAN_RUNTIME", "REFIT", "SPARSE_WEIGHTS", "VERSION_COMPATIBLE", "WEIGHT_STREAMING")
    assert asked["flags"] == sorted(flags)  # no TF32, and no STRIP_PLAN: a device has the weights and tests the engine
    assert asked["profiles"] == [[[b, 3, 32, 32] for b in batches] for batches in ((1, 2, 3), (1, 1, 2))]
    assert (asked["pools"], asked["verbosity"]) == ({"WORKSPACE": 512 << 20}, "LAYER_NAMES_ONLY")
    assert asked["bits"] == (1 if version == "11.4.0" else 3)
    lacks = version == "10.3.0"
    assert asked["level"] == (None if lacks else "SAME_COMPUTE_CAPABILITY")
    assert ("which this version lacks" in results["onnx-int8 32 px"][1]) == lacks
    assert (asked["cache"], again["cache"]) == ("", "+measured")  # the second file finds what the first has measured
    code, results = selftest(bundle, "--engines", str(bundle / "engines"), env=env)
    assert (code, results["engines/onnx-int8/model_48.engine"][0]) == (0, "PASS")
    assert kit(bundle, env=env)[0] == 0
    assert len(log(env)) == 2
    kit(bundle, "--timing-cache", str(tmp_path / "own.cache"), "--out", str(tmp_path / "own"), env=env)
    assert (tmp_path / "own.cache").read_bytes() == b"+measured+measured"
    (tmp_path / "own.cache").write_bytes(b"other version")
    (tmp_path / "own/onnx-int8/model_32.engine").unlink()
    code, results = kit(bundle, "--timing-cache", str(tmp_path / "own.cache"), "--out", str(tmp_path / "own"), env=env)
    assert (code, "timing cache of another version" in results["onnx-int8 32 px"][1]) == (1, True)


def test_rebuilt_when_anything_changed(kit_bundle, tmp_path):
    env = fake_device(tmp_path / "d", "10.3.0")
    target = ("--target", "onnx-int8")
    assert kit(kit_bundle, *target, env=env)[0] == 0
    (kit_bundle / "engines/onnx-int8/model_32.engine").write_bytes(b"damaged")
    kit(kit_bundle, *target, env=env)
    assert len(log(env)) == 3
    kit(kit_bundle, *target, env={**env, "FAKE_TENSORRT": "10.12.0"})
    assert len(log(env)) == 5
    engines = index(kit_bundle)
    assert {e["versions"]["tensorrt"] for e in engines.values()} == {"10.12.0"}
    assert {(e["gpu"], e["runtime"], e["built_by"]) for e in engines.values()} == {("Orin", "tensorrt", "tensorrt")}


def test_too_old(kit_bundle, tmp_path):
    env = fake_device(tmp_path / "d", None, trtexec=True)
    code, results = kit(kit_bundle, "--runtime", "trtexec", env={**env, "FAKE_TRTEXEC": "8602"})
    assert (code, "version 8.6.2 is older than 10.3" in results["machine"][1]) == (3, True)


def test_changed_file_is_not_parsed(kit_bundle, tmp_path):
    """The hash is checked before any native code sees the bytes."""
    env, path = fake_device(tmp_path / "d", "10.3.0"), kit_bundle / "artifacts/onnx-int8/model_32.onnx"
    path.write_bytes(path.read_bytes() + b"x")
    code, results = kit(kit_bundle, "--target", "onnx-int8", env=env)
    assert (code, results["onnx-int8 32 px"][0], results["onnx-int8 48 px"][0]) == (1, "FAIL", "PASS")
    assert "its sha256 is not the manifest's" in results["onnx-int8 32 px"][1]
    assert len(log(env)) == 1
    assert "onnx-int8/model_32.engine" not in files_in(kit_bundle / "engines")


@pytest.mark.parametrize("by", ["tensorrt", "trtexec"])
def test_a_failure(kit_bundle, tmp_path, by):
    """One sentence, exit code 1, no half file, the earlier engine untouched."""
    env = fake_device(tmp_path / "d", "10.3.0", trtexec=True)
    arguments = ("--target", "onnx-int8", "--runtime", by)
    code, results = kit(kit_bundle, *arguments, env={**env, "FAKE_ERROR": "CUDA initialization failure with error: 35"})
    assert code == 1
    assert "the NVIDIA driver or GPU does not answer" in results["onnx-int8 32 px"][1]
    assert files_in(kit_bundle / "engines") == [".lock"]
    assert kit(kit_bundle, *arguments, env=env)[0] == 0


@pytest.mark.parametrize("by", ["tensorrt", "trtexec"])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_in_the_middle(kit_bundle, tmp_path, by, sent):
    env = fake_device(tmp_path / "d", "10.3.0", trtexec=True)
    command = [sys.executable, "-B", kit_bundle / "build_engine.py", "--target", "onnx-int8", "--runtime", by]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env={**env, "FAKE_SLEEP": "20"}, preexec_fn=heeds_interrupts, **pipes)
    deadline = time.monotonic() + 60
    while not log(env) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sent)
    process.communicate(timeout=10)
    assert process.returncode != 0
    left = files_in(kit_bundle / "engines")
    if sent != signal.SIGKILL:
        assert left == [".lock"]
    assert not [name for name in left if name.endswith("engine") and ".part-" not in name]
    code, results = kit(kit_bundle, *map(str, command[3:]), env=env)
    assert (code, results["onnx-int8 32 px"][0]) == (0, "PASS")
    assert not [name for name in files_in(kit_bundle / "engines") if ".part-" in name]


def test_one_build_at_a_time(kit_bundle, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    env = fake_device(tmp_path / "d", "10.3.0")
    (kit_bundle / "engines").mkdir()
    with open(kit_bundle / "engines/.lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        code, results = kit(kit_bundle, env=env)
    assert (code, "another build runs" in results["folder"][1], log(env)) == (1, True, [])


# ---- the self-test of what was built


def test_selftest_of_engines(kit_bundle, tmp_path):
    env, engines = fake_device(tmp_path / "d", "10.3.0"), kit_bundle / "engines"
    arguments = ("--engines", str(engines), "--target", "onnx-fp32")
    code, results = selftest(kit_bundle, *arguments, env=env)
    assert (code, "holds no engines.json" in results["engines"][1]) == (1, True)
    assert kit(kit_bundle, "--target", "onnx-fp32", env=env)[0] == 0
    code, results = selftest(kit_bundle, *arguments, env=env)
    assert (code, results["engines/onnx-fp32/model_32.engine"][0]) == (0, "PASS")

    text = (engines / "engines.json").read_text()
    for change, words in (
        (lambda e: e.update(onnx_sha256="0" * 64), "another ONNX file than this bundle's"),
        (lambda e: e.update(sha256="0" * 64), "not the file that engines.json names"),
        (lambda e: e.update(path="../../outside.engine"), "not the file that engines.json names"),
        (lambda e: e.update(versions={"tensorrt": "9.0.0"}), "SKIP"),
        (lambda e: e.update(compute_capabilities=["12.0"]), "SKIP"),
        (lambda e: e.update(runtime="tensorrt_rtx", versions={"tensorrt_rtx": "1.7"}), "SKIP"),
    ):
        changed = json.loads(text)
        change(changed["engines"][0])
        (engines / "engines.json").write_text(json.dumps(changed))
        code, results = selftest(kit_bundle, *arguments, env=env)
        ((status, reason),) = (r for c, r in results.items() if c.startswith("engines/") and not c.endswith("model_48.engine"))
        assert (status, code) == (("SKIP", 0) if words == "SKIP" else ("FAIL", 1))
        assert words in (status, reason) or words in reason
    (engines / "engines.json").write_text(text)

    other = (engines / "onnx-fp32/model_32.engine").read_bytes().partition(b"\n")[0]
    onnx = (kit_bundle / "artifacts/onnx-int8/model_32.onnx").read_bytes()
    (engines / "onnx-fp32/model_32.engine").write_bytes(other + b"\n" + onnx)
    changed = json.loads(text)
    changed["engines"][0]["sha256"] = runpy.run_path(str(kit_bundle / "engine_files.py"))["sha256_file"](
        engines / "onnx-fp32/model_32.engine"
    )
    (engines / "engines.json").write_text(json.dumps(changed))
    code, results = selftest(kit_bundle, *arguments, env=env)
    assert (code, results["engines/onnx-fp32/model_32.engine"][0]) == (1, "FAIL")
    assert "cosine" in results["engines/onnx-fp32/model_32.engine"][1]
