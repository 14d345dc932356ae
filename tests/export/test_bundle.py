"""Bundles: same inputs same bytes, whole or absent; the self-test catches what hashes cannot, without torch and this project."""

import ast
import ctypes
import errno
import gc
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from tiny import backbone, pictures
from tiny_bundle import remade

from distill.data import preprocess
from distill.data.preprocess import Preprocess
from distill.errors import EnvironmentFailed, GateFailed, UserError
from distill.files import sha256_file
from distill.models.checkpoints import load_backbone, save_model
from distill.progress import Progress
from export import bundle as building
from export.artifact import Artifact, read_artifact
from export.builders import build_target
from export.bundle import TEMPLATES, BundleConfig, BundleInputs, build_bundle
from export.bundling.golden import Tolerance
from export.bundling.keys import make_keys, read_private, read_public
from export.bundling.selftest import selftest
from export.bundling.signing import sign_bundle
from export.bundling.verify import MANIFEST, Trust, unpack, verify
from export.runtimes import open_artifact
from export.targets import ExportConfig, Images

IMAGES = Images(lambda n, size: pictures(32, size)[:n], lambda n, size, avoid: pictures(32, size)[:n])
QUIET = Progress("quiet")
ENGINE = "artifacts/rtx-int8/model_32.engine"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, list[Artifact]]:
    """A student's folder, its ONNX artifacts, and an engine for a GPU that no machine has."""
    folder = tmp_path_factory.mktemp("run")
    save_model(folder / "student", backbone(), Preprocess(32, 36, normalize="per_image"), lineage={"seed": 0})
    config, sources, artifacts = ExportConfig(resolutions=[32, 48], max_batch=3), {}, []
    for target in ("onnx-fp32", "onnx-int8"):
        out = folder / target
        artifacts.append(build_target(target, config, "small", folder / "student", sources, IMAGES, out, QUIET))
        sources[target] = out
    return folder, [*artifacts, engine_like(artifacts[0], folder / "rtx-int8")]


def engine_like(artifact: Artifact, folder: Path) -> Artifact:
    """An INT8 engine made from `artifact`, as far as its description goes; compute capability 0.1 never existed."""
    folder.mkdir()
    (folder / "model_32.engine").write_bytes(b"a plan")
    entry = artifact.files[0].model_copy(
        update={"path": "model_32.engine", "bytes": 6, "sha256": hashlib.sha256(b"a plan").hexdigest()}
    )
    update = {"target": "rtx-int8", "precision": "int8", "runtime": "tensorrt_rtx", "compute_capabilities": ["0.1"]}
    made = {"files": [entry], "source": "onnx-fp32", "versions": {"tensorrt_rtx": "0.0.1"}, "folder": folder}
    return artifact.model_copy(update={**update, **made}).write()


def images() -> list[Image.Image]:
    """Four pictures of different shapes and modes."""
    noise = np.random.default_rng(0)
    sizes = (90, 70), (64, 64), (50, 120), (200, 41)
    made = [
        Image.fromarray(noise.integers(0, 255, (9, 9, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC) for size in sizes
    ]
    return [made[0], made[1].convert("L"), made[2].convert("CMYK"), made[3].convert("RGBA")]


def build(run, out: Path, config: BundleConfig | None = None, report: Path | None = None, **changes) -> Path:
    folder, artifacts = run
    about = {"student": "small", "run": {"name": "demo"}, "artifacts": artifacts, "model_folder": folder / "student"}
    rest = {"golden_images": images(), "report_folder": report, "lineage": {"teacher": "vit_giant"}}
    return build_bundle(config or BundleConfig(), BundleInputs(**{**about, **rest, **changes}), out, QUIET)


@pytest.fixture(scope="module")
def good(run, tmp_path_factory) -> Path:
    return build(run, tmp_path_factory.mktemp("good") / "small.tar.gz")


# ---- what is in it


def test_same_inputs_same_bytes(run, good, tmp_path):
    folder, artifacts = run
    shutil.copytree(folder, tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere").rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    moved = [read_artifact(tmp_path / "elsewhere" / a.target) for a in artifacts]
    again = build((tmp_path / "elsewhere", moved), tmp_path / "another name.tar.gz")
    assert again.read_bytes() == good.read_bytes()
    other = build(run, tmp_path / "other.tar.gz", lineage={"teacher": "another"})
    assert other.read_bytes() != good.read_bytes()


def test_signed_in_the_run_as_afterwards(run, good, tmp_path):
    """The same statement, the same bytes: with signature, bill of materials and model card, twice."""
    private, public, key = make_keys(tmp_path / "keys", None)
    config = BundleConfig(sign_key=str(private))
    assert config.problems() == []
    one, two = build(run, tmp_path / "one.tar.gz", config), build(run, tmp_path / "two.tar.gz", config)
    assert one.read_bytes() == two.read_bytes() == sign_bundle(good, read_private(private), tmp_path / "3").path.read_bytes()
    result = unpack(one, tmp_path / "b", trust=Trust((read_public(public),)))
    assert (result.signers, result.manifest_sha256) == ((key,), verify(good).manifest_sha256)
    bill = json.loads((tmp_path / "b/sbom.cdx.json").read_text())
    hashes = {c["bom-ref"]: c["hashes"][0]["content"] for c in bill["components"] if c["bom-ref"].startswith("artifacts/")}
    listed = {f.path: f.sha256 for f in result.manifest.files}
    assert hashes == {f.path: listed[f.path] for a in result.manifest.artifacts for f in a.files}
    assert (tmp_path / "b/MODEL_CARD.md").read_text().startswith("# Model card: small\n")
    done = subprocess.run([sys.executable, tmp_path / "b/selftest.py", "--seconds", "0"], capture_output=True, text=True)
    assert "every hash as listed\n" in done.stdout  # the signature is no stranger


def test_a_key_that_is_not_there(run, tmp_path):
    config = BundleConfig(sign_key=str(tmp_path / "none.pem"))
    assert config.problems() == [
        f"sign_key cannot be used: There is no key file {tmp_path}/none.pem; `decant keygen` makes a pair."
    ]
    with pytest.raises(UserError, match="There is no key file"):
        build(run, tmp_path / "b.tar.gz", config)
    assert not (tmp_path / "b.tar.gz").exists()


def test_content(run, good, tmp_path):
    folder, artifacts = run
    result = verify(good)
    with tarfile.open(good) as archive:
        names = archive.getnames()
        assert names[0] == MANIFEST
        assert names[1:] == sorted(f.path for f in result.manifest.files)
        assert archive.extractfile("preprocess.py").read() == Path(preprocess.__file__).read_bytes()
    unpack(good, tmp_path / "b")
    for artifact in artifacts:
        for entry in [*artifact.files, *artifact.extras]:
            assert (tmp_path / "b/artifacts" / artifact.target / entry.path).read_bytes() == artifact.path(entry).read_bytes()
        assert read_artifact(tmp_path / "b/artifacts" / artifact.target).files == artifact.files
    assert [a.target for a in result.manifest.artifacts] == ["onnx-fp32", "onnx-int8", "rtx-int8"]
    lineage = json.loads((tmp_path / "b/lineage.json").read_text())
    assert lineage["model"]["weights_sha256"] == sha256_file(folder / "student/backbone.safetensors")
    assert lineage["model"]["lineage"] == {"seed": 0}
    assert (lineage["run"], lineage["lineage"]) == ({"name": "demo"}, {"teacher": "vit_giant"})
    readme = (tmp_path / "b/README.md").read_text()
    assert "| `onnx-int8` | int8 | onnxruntime | 32 px, 48 px | 3 |" in readme
    assert "| `rtx-int8` | int8 | tensorrt_rtx, GPUs of compute capability 0.1 | 32 px | 3 |" in readme
    assert "report/index.html" not in readme
    licence = (tmp_path / "b/LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


def test_manifest_describes_inputs_outputs_and_compatibility(good):
    onnx_fp32, _, engine = verify(good).manifest.artifacts
    assert [f.resolution for f in onnx_fp32.files] == [32, 48]
    assert [p.model_dump() for p in onnx_fp32.files[1].inputs] == [
        {
            "name": "images",
            "dtype": "float32",
            "shape": ["batch", 3, 48, 48],
            "layout": "batch, channel (red, green, blue), row, column",
        }
    ]
    assert [(p.name, p.shape) for p in onnx_fp32.files[1].outputs] == [("cls", ["batch", 32]), ("patches", ["batch", 36, 32])]
    where = onnx_fp32.compatibility
    assert (where.systems, where.machines, where.compute_capabilities) == ([], [], [])
    assert "onnxruntime" in where.built_with
    assert engine.compatibility.systems
    assert engine.compatibility.machines
    assert engine.compatibility.compute_capabilities == ["0.1"]


def test_golden_data(run, good, tmp_path):
    _, artifacts = run
    manifest = unpack(good, tmp_path / "b").manifest
    code = Preprocess(32, 36, normalize="per_image")
    stored = np.load(tmp_path / "b/golden/input_32.npy", allow_pickle=False)
    assert stored.shape == (4, 3, 32, 32)
    raw = [Image.open(tmp_path / "b" / name) for name in manifest.golden.images]
    assert [(i.mode, i.size) for i in raw] == [("RGB", i.size) for i in images()]
    assert all(i.info == {} for i in raw)
    np.testing.assert_array_equal(stored, np.stack([code(image) for image in raw]))
    for described, artifact in zip(manifest.artifacts, artifacts, strict=True):
        for file in described.files:
            tensor = torch.from_numpy(np.load(tmp_path / f"b/golden/input_{file.resolution}.npy", allow_pickle=False))
            source = artifacts[0] if artifact.target == "rtx-int8" else artifact
            assert file.expected.source == source.target
            features = open_artifact(source, file.resolution, threads=1)(tensor)
            with np.load(tmp_path / "b" / file.expected.path, allow_pickle=False) as expected:
                np.testing.assert_allclose(expected["cls"], features.cls.numpy(), atol=1e-5)
                np.testing.assert_allclose(expected["patches"], features.patches.numpy(), atol=1e-5)
                size = float(np.sqrt((expected["cls"] ** 2).mean()))
            limits = {"onnx-fp32": (0.9999, 0.02), "onnx-int8": (0.99, 1.0), "rtx-int8": (0.98, 2.0)}[artifact.target]
            assert (file.expected.cosine_min, file.expected.max_abs["cls"]) == (limits[0], pytest.approx(limits[1] * size))


def test_expected_outputs_come_from_torch_at_last(run, tmp_path):
    folder, artifacts = run
    path = build(run, tmp_path / "b.tar.gz", artifacts=[artifacts[2].model_copy(update={"source": "onnx-fp16"})])
    (file,) = unpack(path, tmp_path / "b").manifest.artifacts[0].files
    assert file.expected.source == "torch-fp32"
    tensor = torch.from_numpy(np.load(tmp_path / "b/golden/input_32.npy"))
    with torch.inference_mode(), np.load(tmp_path / "b" / file.expected.path) as expected:
        np.testing.assert_allclose(expected["cls"], load_backbone(folder / "student")(tensor).cls.numpy(), atol=1e-5)


def test_report_goes_in_without_what_the_runner_keeps_there(run, tmp_path):
    report = tmp_path / "report"
    (report / "more").mkdir(parents=True)
    for name in ("index.html", "report.json", "report.csv", "more/page.html", "done.json", "rows.jsonl", ".part-1-x.json"):
        (report / name).write_text("{}")
    path = build(run, tmp_path / "b.tar.gz", report=report)
    names = [f.path for f in verify(path).manifest.files if f.path.startswith("report/")]
    assert names == ["report/index.html", "report/more/page.html", "report/report.csv", "report/report.json"]
    unpack(path, tmp_path / "b")
    assert "report/index.html" in (tmp_path / "b/README.md").read_text()


def test_large_golden_images_are_reduced(run, tmp_path):
    path = build(run, tmp_path / "b.tar.gz", BundleConfig(golden_images=1), golden_images=[images()[0].resize((3000, 1500))])
    unpack(path, tmp_path / "b")
    assert Image.open(tmp_path / "b/golden/image_0.png").size == (1024, 512)


# ---- what goes wrong


def test_config_problems():
    assert BundleConfig().problems() == []
    assert "golden_images" in BundleConfig(golden_images=0).problems()[0]
    assert "targets" in BundleConfig(targets=[]).problems()[0]
    assert "targets" in BundleConfig(targets=["a", "a"]).problems()[0]
    wrong = BundleConfig(tolerances={"int8": Tolerance(cosine_min=2.0, max_abs=0.0)})
    assert "tolerances.int8" in wrong.problems()[0]


def test_targets_and_tolerances_are_the_users(run, tmp_path):
    own = Tolerance(cosine_min=0.5, max_abs=3.0)
    config = BundleConfig(targets=["rtx-int8", "onnx-int8"], tolerances={"int8": own}, golden_images=2)
    path = build(run, tmp_path / "b.tar.gz", config)
    engine, int8 = verify(path).manifest.artifacts
    assert (engine.target, engine.files[0].expected.source, engine.files[0].expected.cosine_min) == (
        "rtx-int8",
        "onnx-fp32",
        0.98,
    )
    assert (int8.target, int8.files[0].expected.cosine_min) == ("onnx-int8", 0.5)
    assert len(verify(path).manifest.golden.images) == 2


def test_refusals_write_nothing(run, tmp_path):
    _, artifacts = run
    out = tmp_path / "b.tar.gz"
    with pytest.raises(UserError, match=r"names onnx-int4, and export made onnx-fp32, onnx-int8, rtx-int8"):
        build(run, out, BundleConfig(targets=["onnx-int4"]))
    with pytest.raises(UserError, match="no artifact to bundle"):
        build(run, out, artifacts=[])
    with pytest.raises(UserError, match="needs 4 golden images and got 3"):
        build(run, out, golden_images=images()[:3])
    other = artifacts[1].files[0].model_copy(update={"preprocess": Preprocess(32, 32).to_json()})
    with pytest.raises(UserError, match="preprocessed otherwise"):
        build(run, out, artifacts=[artifacts[0], artifacts[1].model_copy(update={"files": [other]})])
    shutil.copytree(artifacts[0].folder, tmp_path / "changed")
    changed = read_artifact(tmp_path / "changed")
    with open(changed.path(changed.files[0]), "r+b") as f:
        f.seek(1000)
        f.write(b"?")
    with pytest.raises(UserError, match="missing or was changed since it was exported"):
        build(run, out, artifacts=[changed])
    assert not out.exists()


def test_nan_is_refused(run, tmp_path):
    folder, artifacts = run
    model = load_backbone(folder / "student")
    torch.nn.init.constant_(model.norm.weight, float("nan"))
    save_model(tmp_path / "nan", model, Preprocess(32, 36))
    alone = artifacts[2].model_copy(update={"source": "torch-fp32"})
    with pytest.raises(GateFailed, match="torch-fp32 gives NaN or infinity in cls"):
        build(run, tmp_path / "b.tar.gz", artifacts=[alone], model_folder=tmp_path / "nan")
    assert not (tmp_path / "b.tar.gz").exists()


def test_a_file_that_changes_meanwhile(run, good, tmp_path, monkeypatch):
    """Same length, other bytes, between hashing and writing: the archive would not verify, so it is not there."""
    out = tmp_path / "b.tar.gz"
    shutil.copy(good, out)
    pieces = building.pieces
    monkeypatch.setattr(building, "pieces", lambda c: iter([bytes(6)]) if building.size(c) == 6 else pieces(c))
    with pytest.raises(GateFailed, match=r"was not written.*model_32.engine was changed"):
        build(run, out)
    assert out.read_bytes() == good.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["b.tar.gz"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_full_disk_and_interrupt(run, tmp_path, monkeypatch, error):
    def half(path, members):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(building, "write_archive", half)
    with pytest.raises(EnvironmentFailed if isinstance(error, OSError) else KeyboardInterrupt):
        build(run, tmp_path / "b.tar.gz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_leaves_nothing_under_the_final_name(tmp_path):
    """SIGKILL in the middle of writing: the half archive has another name, and the next build succeeds beside it."""
    files = {f"f{i}": os.urandom(1 << 20) for i in range(6)}
    listed = [{"path": n, "bytes": len(v), "sha256": hashlib.sha256(v).hexdigest()} for n, v in files.items()]
    out, pieces = tmp_path / "b.tar.gz", building.pieces
    child = os.fork()
    if child == 0:
        building.pieces = lambda content: (time.sleep(0.3) or piece for piece in pieces(content))
        building.write(out, {MANIFEST: json.dumps({"files": listed}).encode()}, files, QUIET)
        os._exit(0)
    end = time.monotonic() + 20
    while time.monotonic() < end and sum(p.stat().st_size for p in tmp_path.iterdir()) < 1 << 20:
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not out.exists()
    left = [p.name for p in tmp_path.iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".part-")


# ---- the self-test


def test_selftest_passes(good):
    results = {r.check: r for r in selftest(good, QUIET, seconds=0.02)}
    assert [(n, r.status) for n, r in results.items()] == [
        ("machine", "PASS"),
        ("files", "PASS"),
        ("preprocess", "PASS"),
        ("onnx-fp32", "PASS"),
        ("onnx-int8", "PASS"),
        ("rtx-int8", "SKIP"),
    ]
    assert "tensorrt_rtx" in results["rtx-int8"].text or "NVIDIA" in results["rtx-int8"].text
    assert "48 px: cosine 1.000000" in results["onnx-fp32"].text
    assert results["onnx-fp32"].files[1]["latency_p50_ms"] > 0  # the numbers ride along
    assert results["onnx-fp32"].files[1]["latency_n"] >= 3


def test_selftest_refuses_a_bundle_that_does_not_verify(good, tmp_path):
    data = bytearray(good.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "b.tar.gz").write_bytes(data)
    with pytest.raises(GateFailed, match="was refused"):
        selftest(tmp_path / "b.tar.gz", QUIET)
    with pytest.raises(UserError, match="is not a file"):
        selftest(tmp_path / "none.tar.gz", QUIET)


def alter_weights(path: Path, by: float) -> None:
    """Add noise to the largest matrix of an ONNX file."""
    model = onnx.load(path)
    largest = max((t for t in model.graph.initializer if len(t.dims) == 2), key=lambda t: np.prod(t.dims))
    values = numpy_helper.to_array(largest)
    noise = np.random.default_rng(0).normal(size=values.shape) * by * values.std()
    changed = np.clip(values + noise, -127, 127).round() if values.dtype == np.int8 else values + noise
    largest.CopyFrom(numpy_helper.from_array(changed.astype(values.dtype), largest.name))
    onnx.save(model, path)


@pytest.mark.parametrize(("target", "by"), [("onnx-fp32", 0.05), ("onnx-int8", 0.3)])
def test_selftest_catches_other_weights_under_right_hashes(good, tmp_path, target, by):
    changed = remade(
        good, tmp_path / "b.tar.gz", lambda folder: alter_weights(folder / f"artifacts/{target}/model_48.onnx", by)
    )
    with pytest.raises(
        GateFailed, match=f"{target} .*48 px: .* has cosine .*; the stored tensor gives the same: it is the model"
    ):
        selftest(changed, QUIET, seconds=0)


def test_selftest_catches_other_preprocessing_under_right_hashes(good, tmp_path):
    def nearest(folder: Path) -> None:
        text = (folder / "preprocess.py").read_text()
        assert "Image.Resampling.BICUBIC" in text
        (folder / "preprocess.py").write_text(text.replace("Image.Resampling.BICUBIC", "Image.Resampling.NEAREST"))

    with pytest.raises(GateFailed) as caught:
        selftest(remade(good, tmp_path / "b.tar.gz", nearest), QUIET, seconds=0)
    assert "preprocess    cosine" in str(caught.value)
    assert "the stored tensor passes: it is the preprocessing" in str(caught.value)


def test_selftest_forgives_a_grey_level_of_another_pillow(good, tmp_path):
    """The tensors differ, so the artifact's own tolerance judges the stored ones, and the images only need the direction."""

    def brighter(folder: Path) -> None:
        text = (folder / "preprocess.py").read_text()
        code = "return np.ascontiguousarray(self.normalized(np.asarray(image, np.float32).transpose(2, 0, 1) / 255.0))"
        assert code in text
        changed = code.replace("np.asarray(image, np.float32)", "(np.asarray(image, np.float32) + (np.arange(3) == 0))")
        (folder / "preprocess.py").write_text(text.replace(code, changed.replace("/ 255.0", "/ np.float32(255)")))

    results = {r.check: r for r in selftest(remade(good, tmp_path / "b.tar.gz", brighter), QUIET, seconds=0)}
    file = results["onnx-fp32"].files[0]
    assert file["tolerance"] == {"cosine_min": 0.999, "max_abs": {}}
    assert file["cosine_min"] < 1
    assert file["stored_tensor"]["cosine_min"] == pytest.approx(1)
    assert file["stored_tensor"]["tolerance"]["cosine_min"] == 0.9999


def test_selftest_catches_a_damaged_model_file(good, tmp_path):
    def damage(folder: Path) -> None:
        (folder / "artifacts/onnx-int8/model_32.onnx").write_bytes(b"no graph")

    with pytest.raises(GateFailed, match=r"onnx-int8 +[A-Z]\w+: "):
        selftest(remade(good, tmp_path / "b.tar.gz", damage), QUIET, seconds=0)


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("import time; time.sleep(60)", GateFailed, "did not end within 1 s"),
        ("raise SystemExit('it is\x1b[31m broken')", GateFailed, r"exit code 1 and no report \(it is\?\[31m broken\)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", GateFailed, "exit code -9 and no report"),
        ("print('{')", GateFailed, "no report"),
        ("print([])", GateFailed, "no report"),
        ('print(\'{"exit_code": 0, "results": 5}\')', GateFailed, "is not one that this version reads"),
        ('print(\'{"exit_code": 0, "results": []}\'); raise SystemExit(1)', GateFailed, "reports exit code 0 and ended with 1"),
        ('print(\'{"exit_code": 1, "results": []}\'); raise SystemExit(1)', GateFailed, "without saying what failed"),
        ('print(\'{"exit_code": 3, "results": []}\'); raise SystemExit(3)', EnvironmentFailed, "can run here"),
    ],
)
def test_selftest_that_does_not_report(good, tmp_path, code, error, words):
    changed = remade(good, tmp_path / "b.tar.gz", lambda folder: (folder / "selftest.py").write_text(code))
    with pytest.raises(error, match=words):
        selftest(changed, QUIET, timeout=1 if "sleep" in code else 60)


# ---- in the bundle, without torch and without this project


def listed(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def test_selftest_without_torch(good, tmp_path, bare):
    unpack(good, tmp_path / "b")
    before = listed(tmp_path / "b")
    done = bare(tmp_path / "b/selftest.py", "--seconds", "0.02")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS  onnx-int8" in done.stdout
    assert "SKIP  rtx-int8" in done.stdout
    assert "every artifact that can run here passes (exit code 0)" in done.stdout
    assert listed(tmp_path / "b") == before  # it leaves nothing behind
    done = bare(tmp_path / "b/selftest.py", "--json", "--seconds", "0", "--target", "onnx-fp32")
    report = json.loads(done.stdout)
    assert (report["exit_code"], report["student"]) == (0, "small")
    assert [r["check"] for r in report["results"]] == ["machine", "files", "preprocess", "onnx-fp32"]
    assert "torch" not in report["machine"]


def test_selftest_without_a_runtime(good, tmp_path, bare):
    unpack(good, tmp_path / "b")
    done = bare(tmp_path / "b/selftest.py", packages=("numpy", "PIL"))
    assert done.returncode == 3
    assert "SKIP  onnx-fp32     onnxruntime cannot be imported here" in done.stdout
    done = bare(tmp_path / "b/selftest.py", packages=())
    assert done.returncode == 3
    assert "numpy and pillow missing; run: pip install numpy pillow onnxruntime" in done.stdout
    done = bare(tmp_path / "b/infer.py", str(tmp_path / "b/golden/image_0.png"), packages=())
    assert (done.returncode, done.stderr) == (3, "numpy is missing; run: pip install numpy pillow onnxruntime\n")


def test_selftest_checks_hashes_before_it_opens_anything(good, tmp_path, bare):
    for name, words in (("infer.py", "infer.py has"), ("artifacts/onnx-fp32/model_32.onnx", "model_32.onnx was changed")):
        folder = tmp_path / name.replace("/", "-")
        unpack(good, folder)
        data = (folder / name).read_bytes()
        evil = b"raise SystemExit('it ran')\n" + data if name == "infer.py" else data[:-1] + bytes([data[-1] ^ 1])
        (folder / name).write_bytes(evil)
        done = bare(folder / "selftest.py")
        assert done.returncode == 1
        assert words in done.stdout
        assert "it ran" not in done.stdout + done.stderr
        assert done.stdout.count("not opened, because a file was changed") == 3
    (folder / name).unlink()
    assert "model_32.onnx is missing" in bare(folder / "selftest.py").stdout
    (folder / MANIFEST).write_text("{")
    done = bare(folder / "selftest.py", "--json")
    assert done.returncode == 1
    assert "manifest.json" in json.loads(done.stdout)["results"][0]["text"]


def test_selftest_names_what_does_not_belong(good, tmp_path, bare):
    unpack(good, tmp_path / "b")
    (tmp_path / "b/features.npz").write_bytes(b"")
    done = bare(tmp_path / "b/selftest.py", "--seconds", "0")
    assert done.returncode == 0
    assert "not part of the bundle: features.npz" in done.stdout


def test_infer_gives_the_encoders_features(run, good, tmp_path, bare):
    _, artifacts = run
    unpack(good, tmp_path / "b")
    pictures_ = [str(tmp_path / f"b/golden/image_{i}.png") for i in range(4)]  # more than the largest batch, which is 3
    done = bare(
        tmp_path / "b/infer.py", *pictures_, "--target", "onnx-int8", "--resolution", "48", "--out", str(tmp_path / "f")
    )
    assert done.returncode == 0, done.stderr
    assert "onnx-int8 at 48 px: cls [4, 32], patches [4, 36, 32]" in done.stdout
    code = Preprocess.from_json(artifacts[1].file(48).preprocess)
    tensor = torch.from_numpy(np.stack([code(Image.open(p)) for p in pictures_]))
    expected = open_artifact(artifacts[1], 48, threads=1)(tensor)
    with np.load(tmp_path / "f") as features:  # under the very name that was asked for
        np.testing.assert_allclose(features["cls"], expected.cls.numpy(), atol=1e-4)
        np.testing.assert_allclose(features["patches"], expected.patches.numpy(), atol=1e-4)
    assert "onnx-fp32 at 32 px" in bare(tmp_path / "b/infer.py", pictures_[0]).stdout  # the first that runs


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["none.png"], 2, "No such file"),
        (["README.md"], 2, "cannot identify image file"),
        (["golden/image_0.png", "--target", "onnx-int4"], 2, "There is no onnx-int4 here, only onnx-fp32"),
        (["golden/image_0.png", "--resolution", "50"], 2, "no file for 50 px, only for 32, 48"),
        (["golden/image_0.png", "--out", "none/f.npz"], 2, "none/f.npz cannot be written: No such file"),
        (["golden/image_0.png", "--target", "rtx-int8"], 3, "Nothing here can run: rtx-int8"),
    ],
)
def test_infer_says_what_is_wrong(good, tmp_path, bare, arguments, code, words):
    unpack(good, tmp_path / "b")
    done = bare(tmp_path / "b/infer.py", *arguments)
    assert done.returncode == code
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_scripts_are_python_3_9():
    for path in (*sorted(TEMPLATES.glob("*.py")), Path(preprocess.__file__)):
        ast.parse(path.read_text(), feature_version=(3, 9))


# ---- engines: no GPU here, so the driver and the runtime are stand-ins that keep books on memory and arguments


class Driver:
    """NVIDIA's driver as infer.py calls it: device memory is host memory at other addresses."""

    def __init__(self):
        self.memory: dict[int, bytearray] = {}
        self.next = 1 << 40  # beyond 32 bits

    def cuInit(self, flags):
        return 0

    def cuDeviceGetCount(self, count):
        count._obj.value = 1
        return 0

    def cuDeviceGet(self, device, ordinal):
        return 0

    def cuDeviceGetName(self, buffer, size, device):
        buffer.value = b"A GPU"
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = {75: 8, 76: 6}[attribute.value]
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        return 0

    def cuCtxSetCurrent(self, context):
        return 0

    def cuStreamCreate(self, stream, flags):
        stream._obj.value = 77
        return 0

    def cuMemAlloc_v2(self, pointer, size):
        pointer._obj.value, self.next = self.next, self.next + (1 << 30)
        self.memory[pointer._obj.value] = bytearray(size.value)
        return 0 if size.value < 1 << 20 else 2

    def cuMemFree_v2(self, pointer):
        del self.memory[pointer.value]
        return 0

    def cuMemcpyHtoD_v2(self, pointer, host, size):
        self.memory[pointer.value][: size.value] = ctypes.string_at(host.value, size.value)
        return 0

    def cuMemcpyDtoH_v2(self, host, pointer, size):
        ctypes.memmove(host.value, bytes(self.memory[pointer.value][: size.value]), size.value)
        return 0

    def cuStreamSynchronize(self, stream):
        return 0 if stream.value == 77 else 1


def fake_tensorrt(driver: Driver, refuses: bool = False) -> ModuleType:
    """`cls` is the mean of each channel, `patches` the first pixels."""

    class Context:
        def __init__(self):
            self.addresses: dict[str, int] = {}

        def set_input_shape(self, name, shape):
            self.shape = shape
            return name == "images" and shape[0] <= 3

        def set_tensor_address(self, name, pointer):
            self.addresses[name] = pointer

        def execute_async_v3(self, stream):
            count = int(np.prod(self.shape))  # a buffer may be larger: it is kept from a larger batch
            taken = np.frombuffer(bytes(driver.memory[self.addresses["images"]]), np.float32)[:count].reshape(self.shape)
            for name, values in (("cls", taken.mean((2, 3))), ("patches", taken[:, :, 0, :2].transpose(0, 2, 1))):
                data = np.ascontiguousarray(values).tobytes()
                driver.memory[self.addresses[name]][: len(data)] = data
            return stream == 77

    class Engine:
        def create_execution_context(self):
            return Context()

    class Runtime:
        def __init__(self, logger):
            pass

        def deserialize_cuda_engine(self, plan):
            return Engine() if plan == b"a plan" and not refuses else None

    class Logger:
        ERROR = 1

        def __init__(self, level):
            pass

    module = ModuleType("tensorrt_rtx")
    module.__dict__.update(__version__="0.0.1", Logger=Logger, Runtime=Runtime)
    return module


@pytest.fixture
def engine(good, tmp_path, monkeypatch):
    """(infer.py of an unpacked bundle, an artifact's entry for an engine, the driver); the machine seems to have a GPU."""
    unpack(good, tmp_path / "b")
    spec = importlib.util.spec_from_file_location("bundle_infer_test", tmp_path / "b/infer.py")
    infer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(infer)
    driver = Driver()
    monkeypatch.setattr(infer.ctypes, "CDLL", lambda name: driver)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_tensorrt(driver))
    artifact = json.loads((tmp_path / "b" / MANIFEST).read_text())["artifacts"][2]
    artifact["compatibility"]["compute_capabilities"] = ["8.6"]
    artifact["files"][0]["outputs"] = [{"name": "cls", "shape": ["batch", 3]}, {"name": "patches", "shape": ["batch", 2, 3]}]
    return infer, artifact, driver


@pytest.mark.parametrize("vnni", [True, False])
def test_exact_products_are_asked_for_where_the_processor_has_none(good, tmp_path, monkeypatch, vnni):
    unpack(good, tmp_path / "b")
    spec = importlib.util.spec_from_file_location("bundle_infer_vnni", tmp_path / "b/infer.py")
    infer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(infer)
    monkeypatch.setattr(infer, "has_vnni", lambda: vnni)
    options = infer.open_model("onnx-int8", 32).opened.session.get_session_options()
    if vnni:
        with pytest.raises(RuntimeError, match="x64quantprecision"):
            options.get_session_config_entry("session.x64quantprecision")
    else:
        assert options.get_session_config_entry("session.x64quantprecision") == "1"


def test_engine_runs_through_the_driver(engine):
    infer, artifact, driver = engine
    model = infer.Model(artifact, artifact["files"][0])
    given = np.random.default_rng(0).normal(size=(7, 3, 32, 32)).astype(np.float32)
    model.run(given[:1])
    got = model.run(given)  # in batches of 3, 3 and 1
    np.testing.assert_allclose(got["cls"], given.mean((2, 3)), atol=1e-6)
    np.testing.assert_array_equal(got["patches"], given[:, :, 0, :2].transpose(0, 2, 1))
    kept = sorted(map(len, driver.memory.values()))
    assert kept == sorted([given[:3].nbytes, 3 * 3 * 4, 3 * 2 * 3 * 4]), "one buffer a tensor, as large as its largest batch"
    with pytest.raises(RuntimeError, match="no profile for a batch of 4"):
        model.opened(given[:4])
    del model
    gc.collect()
    assert driver.memory == {}


def test_engine_says_why_it_cannot(engine, monkeypatch):
    infer, artifact, driver = engine

    def reason(kind=infer.Unavailable):
        with pytest.raises(kind) as caught:
            infer.Model(artifact, artifact["files"][0])
        return str(caught.value)

    with monkeypatch.context() as m:
        m.setattr(infer.Cuda, "MINOR", 75)  # seems to be 8.8
        assert reason() == "it was compiled for compute capability 8.6, here is 8.8"
    with monkeypatch.context() as m:
        m.setattr(driver, "cuInit", lambda flags: 100)
        assert reason() == "the NVIDIA driver finds no GPU here"
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "tensorrt_rtx", fake_tensorrt(driver, refuses=True))
        assert "refused the engine on A GPU" in reason(RuntimeError)
    with monkeypatch.context() as m:
        m.setattr(sys.modules["tensorrt_rtx"], "__version__", "0.0.2")
        assert reason() == "it was compiled by tensorrt_rtx 0.0.1, this is 0.0.2"
    with monkeypatch.context() as m:
        m.delattr(sys.modules["tensorrt_rtx"], "Logger")
        assert "without its libraries" in reason()
    with monkeypatch.context() as m:
        m.setattr(infer.platform, "machine", lambda: "aarch64")
        assert "this is aarch64" in reason()
    with monkeypatch.context() as m:
        m.setattr(infer.platform, "system", lambda: "Plan9")
        assert "this is plan9" in reason()

    def no_driver(name):
        raise OSError(name)

    monkeypatch.setattr(infer.ctypes, "CDLL", no_driver)
    assert reason() == "there is no NVIDIA driver here"
