"""Layouts: same bundle same bytes, Triton's schema, OCI digests, a Docker context that passes the bundle's self-test, and refusals."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from test_bundle import engine_like
from tiny_bundle import photographs, tiny_artifacts, tiny_bundle

from distill.errors import GateFailed, UserError
from distill.files import sha256_file
from export.bundle import BundleConfig
from export.bundling.archive import write_archive
from export.bundling.keys import make_keys, read_public
from export.bundling.layouts import LAYOUTS, layout
from export.bundling.verify import MANIFEST, Trust, unpack, verify


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    artifacts = tiny_artifacts(folder, ["onnx-fp32"])
    return folder, [*artifacts, engine_like(artifacts[0], folder / "rtx-int8")]


@pytest.fixture(scope="module")
def bundle(run) -> Path:
    return tiny_bundle(*run)


def content(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("to", LAYOUTS)
def test_same_bundle_same_bytes(bundle, tmp_path, to):
    lines = layout(bundle, to, tmp_path / "one")
    assert lines[0] == f"Wrote {tmp_path / 'one'}: small as {to}."
    assert str(tmp_path / "one") in lines[1]
    (tmp_path / "other name.tar.gz").write_bytes(bundle.read_bytes())
    layout(tmp_path / "other name.tar.gz", to, tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert not list(tmp_path.glob(".part-*"))


def test_triton(bundle, tmp_path):
    """What Triton would do: the preprocessing model's output into the features model."""
    layout(bundle, "triton", tmp_path / "t")
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == [
        "small-onnx-fp32-32",
        "small-onnx-fp32-32-pixels",
        "small-onnx-fp32-48",
        "small-onnx-fp32-48-pixels",
        "small-preprocess-32",
        "small-preprocess-48",
    ]
    assert (tmp_path / "t/small-onnx-fp32-48/config.pbtxt").read_text() == (
        'name: "small-onnx-fp32-48"\nbackend: "onnxruntime"\nmax_batch_size: 3\n'
        'input { name: "images" data_type: TYPE_FP32 dims: [3, 48, 48] }\n'
        'output { name: "cls" data_type: TYPE_FP32 dims: [32] }\n'
        'output { name: "patches" data_type: TYPE_FP32 dims: [36, 32] }\n'
        "dynamic_batching { max_queue_delay_microseconds: 1000 }\n"
    )
    opened = [
        onnxruntime.InferenceSession(tmp_path / "t" / name / "1/model.onnx")
        for name in ("small-preprocess-32", "small-onnx-fp32-32")
    ]
    pixels = np.asarray(photographs()[0])[None]
    (tensor,) = opened[0].run(None, {"pixels": pixels})
    (cls,) = opened[1].run(["cls"], {"images": tensor})
    assert cls.shape == (1, 32)
    assert [(i.name, i.shape[1:]) for i in opened[1].get_inputs()] == [("images", [3, 32, 32])]


def test_triton_reads_the_configurations(bundle, tmp_path):
    """Every file parses in Triton's own schema, names its folder, and an ensemble's tensors fit those of its steps."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    layout(bundle, "triton", tmp_path / "t")
    found = {}
    for path in (tmp_path / "t").glob("*/config.pbtxt"):
        found[path.parent.name] = text_format.Parse(path.read_text(), schema.ModelConfig())
    assert all(c.name == n and c.max_batch_size == 3 and len(c.input) == 1 for n, c in found.items())
    assert all(c.HasField("dynamic_batching") != c.HasField("ensemble_scheduling") for c in found.values())
    first, second = found["small-onnx-fp32-48-pixels"].ensemble_scheduling.step
    before, after = found[first.model_name], found[second.model_name]
    assert dict(first.input_map) == {before.input[0].name: "pixels"}
    assert dict(first.output_map) == {before.output[0].name: "preprocessed"}
    assert dict(second.input_map) == {after.input[0].name: "preprocessed"}
    assert (before.output[0].data_type, list(before.output[0].dims)) == (after.input[0].data_type, list(after.input[0].dims))
    assert (
        set(second.output_map) == {o.name for o in after.output} == {o.name for o in found["small-onnx-fp32-48-pixels"].output}
    )


def test_oci(bundle, tmp_path):
    """Every descriptor's size and digest is that of its blob, and the layer is the bundle itself."""
    (line,) = layout(bundle, "oci", tmp_path / "o")[1:]
    assert line == f"Push: oras copy --from-oci-layout {tmp_path / 'o'}:small REGISTRY/NAME:small"
    assert json.loads((tmp_path / "o/oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}

    def blob(descriptor: dict) -> bytes:
        algorithm, digest = descriptor["digest"].split(":")
        data = (tmp_path / "o/blobs" / algorithm / digest).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (digest, descriptor["size"])
        return data

    index = json.loads((tmp_path / "o/index.json").read_text())
    (entry,) = index["manifests"]
    assert (index["schemaVersion"], entry["annotations"]) == (2, {"org.opencontainers.image.ref.name": "small"})
    manifest = json.loads(blob(entry))
    assert manifest["artifactType"] == entry["artifactType"] == "application/vnd.decant.bundle.v1"
    assert manifest["mediaType"] == entry["mediaType"]
    assert blob(manifest["config"]) == b"{}"
    (layer,) = manifest["layers"]
    assert blob(layer) == bundle.read_bytes()
    assert layer["annotations"]["org.opencontainers.image.title"] == "small.tar.gz"
    assert len(list((tmp_path / "o/blobs/sha256").iterdir())) == 3


def test_docker(bundle, tmp_path):
    layout(bundle, "docker", tmp_path / "d")
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["Dockerfile", "bundle", "requirements.txt"]
    pins = dict(line.split("==") for line in (tmp_path / "d/requirements.txt").read_text().splitlines())
    assert (sorted(pins), pins["numpy"]) == (["numpy", "onnxruntime", "pillow"], np.__version__)
    lines = (tmp_path / "d/Dockerfile").read_text().splitlines()
    assert f"FROM python:{sys.version_info.major}.{sys.version_info.minor}-slim" in lines
    (health,) = (line for line in lines if line.startswith("HEALTHCHECK"))
    command = json.loads(health.split("CMD ")[1])
    here = [sys.executable, *command[1:3], str(tmp_path / "d" / command[3].lstrip("/")), *command[4:]]
    assert subprocess.run(here, capture_output=True).returncode == 0


def test_refusals(run, bundle, tmp_path):
    folder, artifacts = run
    for to, out, words in (
        ("helm", tmp_path / "x", "There is no layout helm; choose one of triton"),
        ("oci", tmp_path, "exists"),
    ):
        with pytest.raises(UserError, match=words):
            layout(bundle, to, out)
    only = engine_only(folder, artifacts)
    for to, words in (("triton", "no artifact that Triton serves"), ("docker", "no artifact that runs on a CPU")):
        with pytest.raises(UserError, match=words):
            layout(only, to, tmp_path / "x")
    _, public, _ = make_keys(tmp_path / "keys", None)
    with pytest.raises(GateFailed, match="it is not signed"):
        layout(bundle, "oci", tmp_path / "x", Trust((read_public(public),)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["keys"]


def engine_only(folder: Path, artifacts: list) -> Path:
    kept = (folder / "small.tar.gz").read_bytes()
    path = tiny_bundle(folder, artifacts, BundleConfig(targets=["rtx-int8"])).rename(folder / "engine.tar.gz")
    (folder / "small.tar.gz").write_bytes(kept)
    return path


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("student", "a/../b", "is no file name"),
        ("student", 'x" }', "is no file name"),
        ("numpy", "2.0 && rm", None),
        ("numpy", "x", "version of numpy"),
    ],
)
def test_hostile_manifests(bundle, tmp_path, name, value, words):
    """What a manifest says becomes file names and commands: only what is plain does."""

    changed = rewritten(bundle, tmp_path, name, value)
    assert verify(changed)
    if words:
        with pytest.raises(UserError, match=words):
            layout(changed, "docker", tmp_path / "d")
        assert not (tmp_path / "d").exists()
    else:
        layout(changed, "docker", tmp_path / "d")
        assert "numpy==2.0\n" in (tmp_path / "d/requirements.txt").read_text()


def rewritten(path: Path, tmp_path: Path, name: str, value: str) -> Path:
    folder = tmp_path / "again"
    manifest = unpack(path, folder).manifest.model_dump()
    if name == "student":
        manifest["student"] = value
    else:
        manifest["built_with"][name] = value
    (folder / MANIFEST).write_text(json.dumps(manifest))
    names = [MANIFEST, *(f["path"] for f in manifest["files"])]
    out = tmp_path / "hostile.tar.gz"
    write_archive(out, ((n, (folder / n).stat().st_size, iter([(folder / n).read_bytes()])) for n in names))
    return out
