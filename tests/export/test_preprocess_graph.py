"""The preprocessing inside a graph against distill/data/preprocess.py, in both runtimes, and in a bundle."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image
from tiny_bundle import QUIET, photographs, tiny_artifacts, tiny_bundle

from distill.data.preprocess import CONSTANTS, Preprocess
from distill.errors import GateFailed
from export.bundle import BundleConfig
from export.bundling.selftest import selftest
from export.bundling.verify import MANIFEST, Manifest, unpack, verify
from export.graph import load_graph
from export.graphs.preprocess_graph import PIXELS, preprocess_graph, with_preprocess

# Height and width: smaller and larger than the input, odd, one side far longer, and of exactly the resize.
SIZES = ((300, 400), (601, 450), (60, 50), (33, 250), (64, 64), (80, 64))


def photograph(h: int, w: int) -> Image.Image:
    """Smooth with hard edges and saturated areas, where the bicubic filter overshoots and Pillow clips."""
    noise = np.random.default_rng(h * w)
    image = np.asarray(Image.fromarray(noise.integers(0, 255, (9, 9, 3), np.uint8)).resize((w, h), Image.Resampling.BICUBIC))
    image = np.array(image)
    image[h // 3 : h // 2, w // 4 : w // 2] = (255, 0, 255)
    return Image.fromarray(image)


def openvino_run(model: onnx.ModelProto, pixels: np.ndarray) -> np.ndarray:
    ov = pytest.importorskip("openvino")
    core = ov.Core()
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled({PIXELS: pixels})[0]


def onnxruntime_run(model: onnx.ModelProto, pixels: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {PIXELS: pixels})[0]


@pytest.mark.parametrize("run", [onnxruntime_run, openvino_run])
@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(56, 64),
        Preprocess(56, 64, "bilinear", "clip"),
        Preprocess(56, 64, "lanczos", "inception"),
        Preprocess(56, 64, normalize="none", fit="squash"),
    ],
    ids=lambda p: f"{p.interpolation}-{p.fit}",
)
def test_within_one_grey_level(preprocess, run):
    model = preprocess_graph(preprocess)
    onnx.checker.check_model(model, full_check=True)
    std = np.array(CONSTANTS.get(preprocess.normalize, ((), (1.0, 1.0, 1.0)))[1], np.float32)[:, None, None]
    for h, w in SIZES:
        image = photograph(h, w)
        got = run(model, np.asarray(image)[None])
        levels = np.abs(got[0] - preprocess(image)) * std * 255
        assert got.dtype == np.float32
        # One grey level, as another Pillow may round. Magnified, both passes may round otherwise at the same pixel (seen: 1 of 10,000).
        assert levels.max() < (1.01 if min(h, w) >= preprocess.resize else 2.01)
        assert (levels > 1.01).mean() < 2e-4
        assert (levels > 0.5).mean() < 0.01


@pytest.mark.parametrize("run", [onnxruntime_run, openvino_run])
def test_per_image_normalisation(run):
    preprocess = Preprocess(56, 64, normalize="per_image")
    pixels = Preprocess(56, 64, normalize="none")
    for h, w in SIZES:
        image = photograph(h, w)
        got, deviation = run(preprocess_graph(preprocess), np.asarray(image)[None])[0], pixels(image).std((1, 2))
        assert (np.abs(got - preprocess(image)).max((1, 2)) * (deviation + 1e-3) * 255).max() < (
            1.02 if min(h, w) >= 64 else 2.02
        )
    flat = Image.new("RGB", (90, 70), (7, 7, 7))
    np.testing.assert_allclose(run(preprocess_graph(preprocess), np.asarray(flat)[None])[0], preprocess(flat), atol=1e-3)


def test_a_batch_is_its_pictures():
    model = preprocess_graph(Preprocess(32, 36))
    pair = np.stack([np.asarray(photograph(70, 90)), np.asarray(photograph(90, 70).transpose(Image.Transpose.ROTATE_90))])
    both = onnxruntime_run(model, pair)
    np.testing.assert_array_equal(both[1], onnxruntime_run(model, pair[1:])[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, tiny_artifacts(folder, ["onnx-fp32", "onnx-fp16"], Preprocess(32, 36, normalize="per_image"))


def test_features_as_by_the_separate_path(run):
    _, artifacts = run
    for artifact in artifacts:
        entry = artifact.files[0]
        graph, code = load_graph(artifact.path(entry)), Preprocess.from_json(entry.preprocess)
        model = with_preprocess(graph, code)
        onnx.checker.check_model(model, full_check=True)
        assert [o.name for o in model.graph.output] == ["cls", "patches"]
        apart = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        kind = {"tensor(float16)": np.float16}.get(apart.get_inputs()[0].type, np.float32)
        for image in photographs():
            got = onnxruntime_run(model, np.asarray(image)[None]).astype(np.float64)
            (expected,) = apart.run(["cls"], {"images": code(image)[None].astype(kind)})
            cosine = (got * expected).sum() / np.linalg.norm(got) / np.linalg.norm(expected.astype(np.float64))
            assert cosine >= 0.999


def test_in_a_bundle(run, tmp_path):
    folder, artifacts = run
    config = BundleConfig(preprocess_in_graph=True, targets=["onnx-fp32"])
    path = tiny_bundle(folder, artifacts, config)
    first = path.read_bytes()
    assert tiny_bundle(folder, artifacts, config).read_bytes() == first
    file = verify(path).manifest.artifacts[0].files[1]
    assert file.with_preprocess.path == "artifacts/onnx-fp32/model_48-with-preprocess.onnx"
    assert [(p.name, p.dtype, p.shape) for p in file.with_preprocess.inputs] == [
        (PIXELS, "uint8", ["batch", "height", "width", 3])
    ]
    results = {r.check: r for r in selftest(path, QUIET, seconds=0)}
    inside = results["onnx-fp32"].files[1]["with_preprocess"]
    assert inside["cosine_min"] >= inside["tolerance"]["cosine_min"] == 0.999
    unpack(path, tmp_path / "b")
    assert "-with-preprocess.onnx` take pictures" in (tmp_path / "b/README.md").read_text()
    value = json.loads((tmp_path / "b" / MANIFEST).read_text())
    value["artifacts"][0]["files"][0]["with_preprocess"]["path"] = "artifacts/onnx-fp16/model.onnx"
    problems = Manifest.model_validate(value).artifact_problems()
    assert problems == ["artifacts/onnx-fp16/model.onnx does not lie in artifacts/onnx-fp32"]


def test_the_self_test_looks_inside(run, tmp_path):
    """Another normalisation in the graph: hashes are right, features are not."""
    from test_bundle import remade

    folder, artifacts = run
    path = tiny_bundle(folder, artifacts, BundleConfig(preprocess_in_graph=True, targets=["onnx-fp32"]))

    def other(unpacked: Path) -> None:
        graph = load_graph(unpacked / "artifacts/onnx-fp32/model_32.onnx")
        onnx.save(with_preprocess(graph, Preprocess(32, 36)), unpacked / "artifacts/onnx-fp32/model_32-with-preprocess.onnx")

    with pytest.raises(GateFailed, match="this is the graph with the preprocessing inside"):
        selftest(remade(path, tmp_path / "b.tar.gz", other), QUIET, seconds=0)
