"""The C++ sample, compiled with the headers of the openvino package and run on a bundle's golden images."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image
from tiny_bundle import tiny_artifacts, tiny_bundle

from distill.data.preprocess import KINDS, Preprocess
from export.bundling.verify import Manifest, unpack

pytestmark = pytest.mark.slow
OPENVINO = next(iter(getattr(importlib.util.find_spec("openvino"), "submodule_search_locations", None) or []), None)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> tuple[Path, Manifest]:
    """An unpacked bundle whose sample is compiled."""
    if not shutil.which("g++") or not shutil.which("make") or not OPENVINO or not Path(OPENVINO, "include").is_dir():
        pytest.skip("needs g++, make and the openvino package with its headers")
    folder = tmp_path_factory.mktemp("run")
    bundle = tiny_bundle(folder, tiny_artifacts(folder, ["onnx-fp32"], Preprocess(32, 36, normalize="per_image")))
    manifest = unpack(bundle, folder / "b").manifest
    command = ["make", "-s", "-C", folder / "b/samples/cpp", f"OPENVINO={OPENVINO}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")  # no warnings
    return folder / "b", manifest


def call(folder: Path, model: Path, picture: Path, preprocess: Preprocess, *more: str) -> subprocess.CompletedProcess:
    options = [f"--{name}={value}".split("=") for name, value in vars(preprocess).items()]
    command = [folder / "samples/cpp/features", model, picture, *(word for pair in options for word in pair), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_golden_outputs(unpacked, tmp_path):
    folder, manifest = unpacked
    for file in manifest.artifacts[0].files:
        preprocess = Preprocess(file.resolution, round(file.resolution * 36 / 32), normalize="per_image")
        with np.load(folder / file.expected.path) as expected:
            for i, name in enumerate(manifest.golden.images):
                Image.open(folder / name).save(tmp_path / "a.ppm")
                done = call(folder, folder / file.path, tmp_path / "a.ppm", preprocess)
                assert done.returncode == 0, done.stderr
                got, wanted = np.array(done.stdout.split(), np.float64), expected["cls"][i].astype(np.float64)
                assert got @ wanted / np.linalg.norm(got) / np.linalg.norm(wanted) >= 0.9999
        done = call(folder, folder / file.path, tmp_path / "a.ppm", preprocess, "--out", str(tmp_path / "f.bin"))
        n = (file.resolution // 8) ** 2
        assert done.stdout.splitlines() == ["cls [1,32]", f"patches [1,{n},32]"]
        assert (tmp_path / "f.bin").stat().st_size == 4 * 32 * (1 + n)


@pytest.mark.parametrize("normalize", KINDS)
def test_preprocessing_to_the_grey_level(unpacked, tmp_path, normalize):
    """A network that returns its input shows what the sample makes of a picture: equal grey levels; numpy sums a mean in float32."""
    folder, _ = unpacked
    shape = [1, 3, 56, 56]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("images", "cls")]
    graph = helper.make_graph([helper.make_node("Identity", ["images"], ["cls"])], "g", ports[:1], ports[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "i.onnx")
    noise = np.random.default_rng(0)
    for size, interpolation, fit in (
        ((300, 201), "bicubic", "crop"),
        ((40, 90), "bilinear", "crop"),
        ((75, 64), "lanczos", "squash"),
    ):
        image = Image.fromarray(noise.integers(0, 255, (*size, 3), np.uint8))
        image.save(tmp_path / "a.ppm")
        code = Preprocess(56, 64, interpolation, normalize, fit)
        done = call(folder, tmp_path / "i.onnx", tmp_path / "a.ppm", code, "--out", str(tmp_path / "f.bin"))
        assert done.returncode == 0, done.stderr
        got = np.fromfile(tmp_path / "f.bin", np.float32).reshape(shape)[0]
        np.testing.assert_allclose(got, code(image), rtol=2e-6, atol=5e-5 if normalize == "per_image" else 2e-6)


@pytest.mark.parametrize(
    ("content", "more", "words"),
    [
        (None, [], "There is no picture"),
        (b"P5\n2 2\n255\n....", [], "is no binary PPM"),
        (b"P6\n2 2\n255\n....", [], "ends early"),
        (b"P6\n# a comment\n1 1\n255\nabc", ["--normalize", "mine"], "--normalize must be imagenet"),
        (b"P6\n1 1\n255\nabc", ["--size", "-3"], "--size must be a number of pixels"),
        (b"P6\n1 1\n255\nabc", ["--size"], "--size needs a value"),
        (b"P6\n1 1\n255\nabc", ["--colour", "1"], "There is no option --colour"),
    ],
)
def test_says_what_is_wrong(unpacked, tmp_path, content, more, words):
    folder, manifest = unpacked
    if content:
        (tmp_path / "a.ppm").write_bytes(content)
    model = folder / manifest.artifacts[0].files[0].path
    done = call(folder, model, tmp_path / "a.ppm", Preprocess(32, 36), *more)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_openvino_fails(unpacked, tmp_path):
    (tmp_path / "a.ppm").write_bytes(b"P6\n1 1\n255\nabc")
    done = call(unpacked[0], tmp_path / "none.onnx", tmp_path / "a.ppm", Preprocess(32, 36))
    assert done.returncode == 1
    assert done.stderr.startswith("OpenVINO failed: ")
