"""The rebuild kit of a bundle, run as on a device: TensorRT-RTX compiles for absent GPUs; TensorRT, trtexec and a driver are stand-ins."""

import json
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_device import fake_device
from tiny_bundle import QUIET, photographs, tiny_artifacts, tiny_bundle

from export.archive import LIMITS, Refused
from export.bundle import TEMPLATES, BundleConfig, build_bundle
from export.engine_config import BatchProfile, EngineConfig
from export.golden import SOURCE
from export.rebuild import fits, flags_of
from export.targets import ExportConfig
from export.verify import parse_manifest, unpack

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


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, tiny_artifacts(folder, ["onnx-fp32", "onnx-int8", "onnx-fp8"])


@pytest.fixture(scope="module")
def unpacked(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked") / "bundle"
    unpack(tiny_bundle(*run), folder)
    return folder


@pytest.fixture
def bundle(unpacked, tmp_path) -> Path:
    return Path(shutil.copytree(unpacked, tmp_path / "bundle"))


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


# ---- what a bundle says


def test_manifest(run, bundle):
    """Every ONNX file of ours with its hash, profile and the source tolerance of its precision."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    hashes = {f["path"]: f["sha256"] for f in manifest["files"]}
    entries = {(f["target"], f["resolution"]): f for f in manifest["rebuild"]["files"]}
    assert sorted(entries) == [(t, r) for t in ("onnx-fp32", "onnx-fp8", "onnx-int8") for r in (32, 48)]
    assert all(hashes[f["path"]] == f["sha256"] and f["profiles"] == [[1, 3, 3]] for f in entries.values())
    for artifact in manifest["artifacts"]:
        for file in artifact["files"]:
            entry, own = entries[artifact["target"], file["resolution"]], file["expected"]["max_abs"]
            assert entry["cosine_min"] == SOURCE[artifact["precision"]].cosine_min
            assert all(entry["max_abs"][n] > own[n] > 0 for n in own)
    assert manifest["rebuild"]["settings"] == flags_of(EngineConfig())
    assert {"build_engine.py", "engine_files.py", "engine_flags.py", "engine_makers.py", "REBUILD.md"} <= set(hashes)
    assert "build_engine.py" in (bundle / "README.md").read_text()


def test_what_tensorrt_does_not_read(run, tmp_path):
    """Dynamic quantization, INT8 with zero points, weight-only INT8, and other people's targets stay out."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    artifact = run[1][0]
    quantize_dynamic(artifact.path(artifact.files[0]), tmp_path / "model_32.onnx", weight_type=QuantType.QUInt8)
    theirs = artifact.model_copy(update={"folder": tmp_path, "target": "theirs", "precision": "int8"})
    assert not fits(theirs, artifact.files[0])
    assert fits(artifact, artifact.files[0])
    assert not fits(artifact.model_copy(update={"target": "onnx-int8-modelopt"}), artifact.files[0])
    assert not fits(artifact.model_copy(update={"precision": "w8"}), artifact.files[0])


def everything(run, tmp_path: Path) -> Path:
    """A bundle whose recipe asks for every flag."""
    folder, artifacts = run
    export = ExportConfig(opt_batch=2, max_batch=3, engine=EVERYTHING)
    about = (folder / "student", photographs(), None, {"teacher": "large"}, tmp_path / "all.tar.gz", QUIET)
    path = build_bundle(BundleConfig(targets=["onnx-int8"]), "small", {"name": "demo"}, artifacts, *about, export=export)
    unpack(path, tmp_path / "all")
    return tmp_path / "all"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["rebuild"]["files"][0].update(path="golden/image_0.png"), "does not lie in artifacts/onnx-fp32"),
        (lambda m: m["rebuild"]["files"][0].update(path="../x.onnx"), "does not lie in artifacts/onnx-fp32"),
        (lambda m: m["rebuild"]["files"][0].update(sha256="0" * 64), "from another content than the manifest lists"),
        (lambda m: m["rebuild"]["files"][0].update(sha256="0"), "rebuild.files.0.sha256"),
        (lambda m: m["rebuild"]["files"][0].update(target="onnx-w9"), "has no such resolution"),
        (lambda m: m["rebuild"]["files"][0].update(resolution=33), "has no such resolution"),
        (lambda m: m["rebuild"]["files"][0].update(input="x' --loadEngine=y"), "rebuild.files.0.input"),
        (lambda m: m["rebuild"]["files"][0].update(profiles=[[3, 2, 1]]), "batches decrease"),
        (lambda m: m["rebuild"]["files"][0].update(profiles=[[1, 2]]), "rebuild.files.0.profiles"),
        (lambda m: m["rebuild"]["files"][0].update(profiles=[]), "rebuild.files.0.profiles"),
        (lambda m: m["rebuild"]["files"][0].update(profiles=[["1x3", 1, 1]]), "rebuild.files.0.profiles"),
        (lambda m: m["rebuild"]["files"][0]["max_abs"].pop("cls"), "no tolerance for one of its engine's outputs"),
        (lambda m: m["rebuild"]["files"][0].update(command="rm"), "rebuild.files.0.command"),
        (lambda m: m["rebuild"]["files"].append(m["rebuild"]["files"][0]), "rebuilt twice at 32 px"),
        (lambda m: m["rebuild"].update(files=[]), "rebuild.files"),
        (lambda m: m["rebuild"]["settings"].update(flags=["TACTICS"]), "rebuild.settings.flags"),
        (lambda m: m["rebuild"]["settings"].update(strongly_typed=False), "rebuild.settings.strongly_typed"),
        (lambda m: m["rebuild"]["settings"].update(workspace_mb="1 --x"), "rebuild.settings.workspace_mb"),
        (lambda m: m.update(files=[f for f in m["files"] if f["path"] != "engine_makers.py"]), "lacks engine_makers.py"),
    ],
)
def test_hostile_sections(unpacked, change, words):
    manifest = json.loads((unpacked / "manifest.json").read_text())
    assert parse_manifest(json.dumps(manifest).encode(), LIMITS).rebuild
    change(manifest)
    with pytest.raises(Refused, match=re.escape(words)):
        parse_manifest(json.dumps(manifest).encode(), LIMITS)


# ---- TensorRT for RTX, the real one


def test_rtx_compiles_for_absent_gpus(bundle):
    pytest.importorskip("tensorrt_rtx")
    code, results = kit(bundle, "--compute-capability", "8.6")
    assert code == 0
    assert {c: s for c, (s, _) in results.items() if c.endswith("px")} == {
        f"{t} {r} px": "SKIP" if t == "onnx-fp8" else "PASS" for t in ("onnx-fp32", "onnx-int8", "onnx-fp8") for r in (32, 48)
    }
    assert "FP8 needs compute capability 8.9" in results["onnx-fp8 32 px"][1]
    engines = index(bundle)
    assert sorted(engines) == [f"onnx-{p}/model_{r}.engine" for p in ("fp32", "int8") for r in (32, 48)]
    before = (bundle / "engines/onnx-int8/model_32.engine").stat().st_mtime_ns
    code, results = kit(bundle, "--target", "onnx-int8", "--compute-capability", "8.6")
    assert (code, results["onnx-int8 32 px"][1].split(":")[0]) == (0, "up to date")
    assert (bundle / "engines/onnx-int8/model_32.engine").stat().st_mtime_ns == before
    assert kit(bundle, "--target", "onnx-fp8", "--compute-capability", "8.9")[0] == 0
    assert index(bundle)["onnx-fp8/model_32.engine"]["compute_capabilities"] == ["8.9"]
    code, results = selftest(bundle, "--engines", str(bundle / "engines"), "--target", "onnx-int8")
    assert (code, results["engines/onnx-int8/model_32.engine"]) == (0, ("SKIP", "there is no NVIDIA driver here"))


def test_rtx_cannot(bundle):
    pytest.importorskip("tensorrt_rtx")
    code, results = kit(bundle, "--runtime", "tensorrt_rtx", "--compute-capability", "8.7")
    assert (code, results["machine"][0]) == (3, "SKIP")
    assert "does not compile for compute capability 8.7" in results["machine"][1]


def test_nothing_here(bundle, tmp_path):
    code, results = kit(bundle, env={**fake_device(tmp_path / "d", None), "LD_LIBRARY_PATH": ""})
    assert (code, list(results)) == (3, ["machine"])
    assert all(f"{name}: " in results["machine"][1] for name in ("tensorrt", "tensorrt_rtx", "trtexec"))
    code, results = kit(bundle, "--target", "onnx-w4", env=fake_device(tmp_path / "e", "10.3.0"))
    assert (code, "there is no onnx-w4 to rebuild" in results["manifest"][1]) == (1, True)


# ---- TensorRT, by stand-ins


@pytest.mark.parametrize("version", ["10.3.0", "10.12.0", "11.4.0"])
def test_tensorrt(run, tmp_path, version):
    """Flags, profiles and pools as asked; what a version lacks is said; a rebuilt engine passes the self-test on the GPU."""
    bundle, env = everything(run, tmp_path), fake_device(tmp_path / "d", version)
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


def test_rebuilt_when_anything_changed(bundle, tmp_path):
    env = fake_device(tmp_path / "d", "10.3.0")
    target = ("--target", "onnx-int8")
    assert kit(bundle, *target, env=env)[0] == 0
    (bundle / "engines/onnx-int8/model_32.engine").write_bytes(b"damaged")
    kit(bundle, *target, env=env)
    assert len(log(env)) == 3
    kit(bundle, *target, env={**env, "FAKE_TENSORRT": "10.12.0"})
    assert len(log(env)) == 5
    engines = index(bundle)
    assert {e["versions"]["tensorrt"] for e in engines.values()} == {"10.12.0"}
    assert {(e["gpu"], e["runtime"], e["built_by"]) for e in engines.values()} == {("Orin", "tensorrt", "tensorrt")}


def test_too_old(bundle, tmp_path):
    env = fake_device(tmp_path / "d", None, trtexec=True)
    code, results = kit(bundle, "--runtime", "trtexec", env={**env, "FAKE_TRTEXEC": "8602"})
    assert (code, "version 8.6.2 is older than 10.3" in results["machine"][1]) == (3, True)


def test_changed_file_is_not_parsed(bundle, tmp_path):
    """The hash is checked before any native code sees the bytes."""
    env, path = fake_device(tmp_path / "d", "10.3.0"), bundle / "artifacts/onnx-int8/model_32.onnx"
    path.write_bytes(path.read_bytes() + b"x")
    code, results = kit(bundle, "--target", "onnx-int8", env=env)
    assert (code, results["onnx-int8 32 px"][0], results["onnx-int8 48 px"][0]) == (1, "FAIL", "PASS")
    assert "its sha256 is not the manifest's" in results["onnx-int8 32 px"][1]
    assert len(log(env)) == 1
    assert "onnx-int8/model_32.engine" not in files_in(bundle / "engines")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("Cannot compile for target(s) sm86, because the model contains HW-specific datatypes: fp8_e4m3.", "no FP8"),
        ("Error Code 2: OutOfMemory (Requested size was 8589934592 bytes.)", "memory ran out"),
        ("Tactic Device request: 900MB Available: 400MB. Device memory is insufficient workspace", "memory ran out"),
        ("No importer registered for op: Attention. Attempting to import as plugin.", "too old"),
        ("CUDA initialization failure with error: 35", "driver"),
        ("error while loading shared libraries: libnvinfer.so.10: cannot open shared object file", "library"),
        ("Error Code 10: Could not find any implementation for node blocks.0.", "no kernel fits"),
        ("No space left on device: '/workspace/x'", "disk is full"),
        ("Error Code 9: something new in /workspace/x", "something new"),
    ],
)
@pytest.mark.parametrize("by", ["tensorrt", "trtexec"])
def test_failures_are_explained(message, words, by):
    explain = runpy.run_path(str(TEMPLATES / "engine_flags.py"))
    said = explain["reason_in"](f"banner\n[11/28/2026-05:00:00] [E] {message}\n[E] later\n") if by == "trtexec" else message
    text = explain["explained"](said)
    assert words in text
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize("by", ["tensorrt", "trtexec"])
def test_a_failure(bundle, tmp_path, by):
    """One sentence, exit code 1, no half file, the earlier engine untouched."""
    env = fake_device(tmp_path / "d", "10.3.0", trtexec=True)
    arguments = ("--target", "onnx-int8", "--runtime", by)
    code, results = kit(bundle, *arguments, env={**env, "FAKE_ERROR": "CUDA initialization failure with error: 35"})
    assert code == 1
    assert "the NVIDIA driver or GPU does not answer" in results["onnx-int8 32 px"][1]
    assert files_in(bundle / "engines") == [".lock"]
    assert kit(bundle, *arguments, env=env)[0] == 0


@pytest.mark.parametrize("by", ["tensorrt", "trtexec"])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_in_the_middle(bundle, tmp_path, by, sent):
    env = fake_device(tmp_path / "d", "10.3.0", trtexec=True)
    command = [sys.executable, "-B", bundle / "build_engine.py", "--target", "onnx-int8", "--runtime", by]
    process = subprocess.Popen(command, env={**env, "FAKE_SLEEP": "20"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not log(env) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sent)
    process.communicate(timeout=10)
    assert process.returncode != 0
    left = files_in(bundle / "engines")
    if sent != signal.SIGKILL:
        assert left == [".lock"]
    assert not [name for name in left if name.endswith("engine") and ".part-" not in name]
    code, results = kit(bundle, *map(str, command[3:]), env=env)
    assert (code, results["onnx-int8 32 px"][0]) == (0, "PASS")
    assert not [name for name in files_in(bundle / "engines") if ".part-" in name]


def test_one_build_at_a_time(bundle, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    env = fake_device(tmp_path / "d", "10.3.0")
    (bundle / "engines").mkdir()
    with open(bundle / "engines/.lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        code, results = kit(bundle, env=env)
    assert (code, "another build runs" in results["folder"][1], log(env)) == (1, True, [])


# ---- trtexec


@pytest.mark.parametrize("version", ["100300", "110400"])
def test_trtexec_as_rebuild_md_says(run, tmp_path, version):
    """What build_engine.py passes is what REBUILD.md prints, but for the names of parts that are renamed at the end."""
    bundle, env = everything(run, tmp_path), {**fake_device(tmp_path / "d", "10.3.0", trtexec=True), "FAKE_TRTEXEC": version}
    lines = [shlex.split(s) for s in (bundle / "REBUILD.md").read_text().splitlines() if s.startswith("trtexec ")]
    code, results = kit(bundle, "--runtime", "trtexec", env=env)
    assert code == 0
    passed = [[a.replace(f"{bundle}/", "").replace(".part-", "") for a in arguments] for arguments in log(env)]
    for line, arguments in zip(lines, passed, strict=True):
        cache = next(a for a in arguments if a.startswith("--timingCacheFile"))
        assert cache.startswith("--timingCacheFile=engines/timing-")
        expected = ["--timingCacheFile=engines/timing.cache" if a == cache else a for a in arguments]
        lacks = ["--hardwareCompatibilityLevel=sameComputeCapability"] if version == "100300" else []
        assert sorted(expected + lacks) == sorted(line[1:])
    assert lines[0][1:] == [
        *("--onnx=artifacts/onnx-int8/model_32.onnx", "--saveEngine=engines/onnx-int8/model_32.engine"),
        *("--stronglyTyped", "--skipInference"),
        *("--profile=0", "--minShapes=images:1x3x32x32", "--optShapes=images:2x3x32x32", "--maxShapes=images:3x3x32x32"),
        *("--profile=1", "--minShapes=images:1x3x32x32", "--optShapes=images:1x3x32x32", "--maxShapes=images:2x3x32x32"),
        *("--timingCacheFile=engines/timing.cache", "--memPoolSize=workspace:512"),
        *("--versionCompatible", "--excludeLeanRuntime", "--refit", "--sparsity=enable", "--allowWeightStreaming", "--noTF32"),
        *("--hardwareCompatibilityLevel=sameComputeCapability", "--profilingVerbosity=layer_names_only"),
    ]
    engine = index(bundle)["onnx-int8/model_32.engine"]
    assert (engine["built_by"], engine["runtime"]) == ("trtexec", "tensorrt")
    if version == "100300":  # the same TensorRT as the Python package, which runs it
        code, results = selftest(bundle, "--engines", str(bundle / "engines"), env=env)
        assert (code, results["engines/onnx-int8/model_32.engine"][0]) == (0, "PASS")


# ---- the self-test of what was built


def test_selftest_of_engines(bundle, tmp_path):
    env, engines = fake_device(tmp_path / "d", "10.3.0"), bundle / "engines"
    arguments = ("--engines", str(engines), "--target", "onnx-fp32")
    code, results = selftest(bundle, *arguments, env=env)
    assert (code, "holds no engines.json" in results["engines"][1]) == (1, True)
    assert kit(bundle, "--target", "onnx-fp32", env=env)[0] == 0
    code, results = selftest(bundle, *arguments, env=env)
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
        code, results = selftest(bundle, *arguments, env=env)
        ((status, reason),) = (r for c, r in results.items() if c.startswith("engines/") and not c.endswith("model_48.engine"))
        assert (status, code) == (("SKIP", 0) if words == "SKIP" else ("FAIL", 1))
        assert words in (status, reason) or words in reason
    (engines / "engines.json").write_text(text)

    other = (engines / "onnx-fp32/model_32.engine").read_bytes().partition(b"\n")[0]
    onnx = (bundle / "artifacts/onnx-int8/model_32.onnx").read_bytes()
    (engines / "onnx-fp32/model_32.engine").write_bytes(other + b"\n" + onnx)
    changed = json.loads(text)
    changed["engines"][0]["sha256"] = runpy.run_path(str(bundle / "engine_files.py"))["sha256_file"](
        engines / "onnx-fp32/model_32.engine"
    )
    (engines / "engines.json").write_text(json.dumps(changed))
    code, results = selftest(bundle, *arguments, env=env)
    assert (code, results["engines/onnx-fp32/model_32.engine"][0]) == (1, "FAIL")
    assert "cosine" in results["engines/onnx-fp32/model_32.engine"][1]
