"""What a bundle says of engines that a device compiles: the manifest's section, hostile ones, REBUILD.md, what builders' messages mean."""

import json
import re
import runpy
import shlex

import pytest
from fake_device import fake_device
from rebuild_kit import everything, index, kit, log, selftest

from export.bundle import TEMPLATES
from export.bundling.archive import LIMITS, Refused
from export.bundling.golden import SOURCE
from export.bundling.rebuild import fits, flags_of
from export.bundling.verify import parse_manifest
from export.engine_config import EngineConfig


def test_manifest(kit_bundle):
    """Every ONNX file of ours with its hash, profile and the source tolerance of its precision."""
    manifest = json.loads((kit_bundle / "manifest.json").read_text())
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
    assert "build_engine.py" in (kit_bundle / "README.md").read_text()


def test_what_tensorrt_does_not_read(kit_run, tmp_path):
    """Dynamic quantization, INT8 with zero points, weight-only INT8, and other people's targets stay out."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    artifact = kit_run[1][0]
    quantize_dynamic(artifact.path(artifact.files[0]), tmp_path / "model_32.onnx", weight_type=QuantType.QUInt8)
    theirs = artifact.model_copy(update={"folder": tmp_path, "target": "theirs", "precision": "int8"})
    assert not fits(theirs, artifact.files[0])
    assert fits(artifact, artifact.files[0])
    assert not fits(artifact.model_copy(update={"target": "onnx-int8-modelopt"}), artifact.files[0])
    assert not fits(artifact.model_copy(update={"precision": "w8"}), artifact.files[0])


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
def test_hostile_sections(kit_unpacked, change, words):
    manifest = json.loads((kit_unpacked / "manifest.json").read_text())
    assert parse_manifest(json.dumps(manifest).encode(), LIMITS).rebuild
    change(manifest)
    with pytest.raises(Refused, match=re.escape(words)):
        parse_manifest(json.dumps(manifest).encode(), LIMITS)


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
        ("Read-only file system: 'engines'", "--out"),
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


@pytest.mark.parametrize("version", ["100300", "110400"])
def test_trtexec_as_rebuild_md_says(kit_run, tmp_path, version):
    """What build_engine.py passes is what REBUILD.md prints, but for the names of parts that are renamed at the end."""
    bundle, env = (
        everything(kit_run, tmp_path),
        {**fake_device(tmp_path / "d", "10.3.0", trtexec=True), "FAKE_TRTEXEC": version},
    )
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
