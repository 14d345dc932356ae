"""Heads in bundles: the graph gives what the head gives, the bundle proves it, and everything else is refused in a sentence."""

import importlib.util
import json
import platform
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from PIL import Image
from tiny_bundle import PREPROCESS, remade, tiny_artifacts, tiny_bundle

from distill.errors import GateFailed, UserError
from distill.evaluate.kept_heads import kept_heads
from distill.evaluate.linear_head import Head, predict
from distill.files import sha256_file
from distill.progress import Progress
from export.artifact import Artifact
from export.bundle import TEMPLATES, BundleConfig
from export.bundling.head_graph import head_graph, inputs_of, outputs_of
from export.bundling.selftest import selftest
from export.bundling.verify import unpack, verify
from export.demo.heads import load_head
from export.demo.models import Look
from export.demo.sources import find
from export.graphs.nodes import serialize

DIM = 32
NAMES = ["ash", "birch", "cedar", "elm", "fir", "gum", "hazel"]


def head(kind: str, k: int, width: int, seed: int = 0, **more) -> Head:
    g = np.random.default_rng(seed)
    arrays = {"weight": (k, width), "bias": (k,), "shift": (width,)}
    made = {name: g.normal(size=shape).astype(np.float32) for name, shape in arrays.items()}
    about = {"layers": 1, "cls": False, "names": [], "constant": 0.0, "values": np.arange(k, dtype=np.float32), **more}
    return Head(kind, **made, scale=g.uniform(0.5, 2, width).astype(np.float32), **about)


HEADS = {
    "main": head("classification", 7, 2 * DIM, cls=True, mean_patch=True, names=NAMES),
    "rooms": head("segmentation", 3, DIM, 1, values=np.array([0, 2, 5], np.float32), names=["floor", "wall", "lamp"]),
    "far": head("depth", 8, 2 * DIM, 2, cls=True, values=np.linspace(0.5, 8, 8, dtype=np.float32)),
}
DEEP = head("segmentation", 3, 4 * DIM, 3, layers=4)


def evaluated(folder: Path, heads: dict[str, Head], owner: str = "students.small-torch-fp32-32") -> Path:
    """As an evaluation leaves them."""
    for name, one in heads.items():
        (folder / "tasks" / name).mkdir(parents=True, exist_ok=True)
        one.save(folder / "tasks" / name / f"head-{owner}.safetensors")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, list[Artifact]]:
    folder = tmp_path_factory.mktemp("run")
    evaluated(folder / "evaluate", {**HEADS, "deep": DEEP})
    evaluated(folder / "evaluate", {"other": HEADS["main"]}, "students.small-2-torch-fp32-32")  # another student's
    return folder, tiny_artifacts(folder, ["onnx-fp32", "onnx-int8"])


def built(run, **settings) -> Path:
    folder, artifacts = run
    return tiny_bundle(folder, artifacts, BundleConfig(**settings), heads=kept_heads(folder / "evaluate", "students/small"))


@pytest.fixture(scope="module")
def good(run) -> Path:
    path = built(run)
    return path.rename(path.with_name("good.tar.gz"))


@pytest.mark.parametrize("name", HEADS)
def test_the_graph_gives_what_the_head_gives(name):
    g, one = np.random.default_rng(5), HEADS[name]
    patches, cls = g.normal(size=(3, 16, DIM)).astype(np.float32), g.normal(size=(3, DIM)).astype(np.float32)
    data = serialize(head_graph(one, DIM, "torch-fp32"))
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    assert [p.name for p in session.get_inputs()] == inputs_of(one)
    (found,) = session.run([outputs_of(one.kind)], {n: {"patches": patches, "cls": cls}[n] for n in inputs_of(one)})
    if name == "main":
        inputs = np.concatenate([cls, patches.mean(1)], 1)
        np.testing.assert_allclose(found, ((inputs - one.shift) * one.scale) @ one.weight.T + one.bias, atol=1e-4)
    elif name == "rooms":  # at the size of the grid nothing is upsampled
        np.testing.assert_array_equal(one.values[found.argmax(-1)].reshape(3, 4, 4), predict(one, patches, cls, (4, 4)))
    else:
        np.testing.assert_allclose(found.reshape(3, 4, 4), predict(one, patches, cls, (4, 4)), atol=1e-4)


def test_what_goes_in(run, good, tmp_path):
    result = unpack(good, tmp_path / "b")
    heads = {h.name: h for h in result.manifest.heads}
    assert sorted(heads) == ["far", "main", "rooms"]  # the deep one cannot be served, `other` is another student's
    assert (heads["main"].classes, heads["main"].ids, heads["main"].fit) == (NAMES, list(range(7)), "crop")
    assert (heads["rooms"].ids, heads["rooms"].fit, heads["rooms"].trained_on) == ([0, 2, 5], "squash", "torch-fp32")
    assert (heads["far"].ids, heads["far"].outputs[0].name) == ([], "metres")
    assert all((h.artifacts, h.resolution) == (["onnx-fp32", "onnx-int8"], 32) for h in heads.values())
    bill = {c["bom-ref"]: c for c in json.loads((tmp_path / "b/sbom.cdx.json").read_text())["components"]}
    listed = {f.path: f.sha256 for f in result.manifest.files}
    assert all(bill[h.path]["hashes"][0]["content"] == listed[h.path] for h in heads.values())
    line = "head `rooms`: segmentation at 32 px, 3 classes, trained by this run's evaluation on the features of `torch-fp32`\n"
    card = (tmp_path / "b/MODEL_CARD.md").read_text()
    assert line in card
    assert "evaluation's images; the licence of those images and labels is not stated." in card
    assert "| `far` | depth | 32 px | onnx-fp32, onnx-int8 | – | torch-fp32 |" in (tmp_path / "b/README.md").read_text()
    assert built(run).read_bytes() == good.read_bytes()
    assert [h.name for h in verify(built(run, heads=["rooms"])).manifest.heads] == ["rooms"]
    assert verify(built(run, heads=False)).manifest.heads == []


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["rooms", "room"], "bundle.heads names room, which no evaluation of this run trained."),
        (["deep"], "which cannot go in (it reads the last 4 layers, and exported files give the last alone)"),
        (["other"], "there are: deep, far, main, rooms."),
    ],
)
def test_wrong_names(run, names, words):
    before = (run[0] / "small.tar.gz").read_bytes() if (run[0] / "small.tar.gz").exists() else None
    with pytest.raises(UserError) as caught:
        built(run, heads=names)
    assert words in str(caught.value)
    assert before is None or (run[0] / "small.tar.gz").read_bytes() == before


def test_heads_of_another_size_and_of_an_artifact_alone(run, tmp_path):
    folder, artifacts = run
    evaluated(tmp_path / "e", {"far": HEADS["far"]}, "students.small-torch-fp32-99")
    kept = kept_heads(tmp_path / "e", "students/small")
    assert verify(tiny_bundle(folder, artifacts, heads=kept)).manifest.heads == []
    with pytest.raises(UserError, match="it was trained at 99 px"):
        tiny_bundle(folder, artifacts, BundleConfig(heads=["far"]), heads=kept)
    evaluated(tmp_path / "e", {"far": HEADS["far"]}, "students.small-onnx-int8-48")
    (only,) = verify(tiny_bundle(folder, artifacts, heads=kept_heads(tmp_path / "e", "students/small"))).manifest.heads
    assert (only.trained_on, only.resolution) == ("onnx-int8", 48)
    evaluated(tmp_path / "e", {"far": DEEP})  # in PyTorch and of the right size, but of four layers
    (only,) = verify(tiny_bundle(folder, artifacts, heads=kept_heads(tmp_path / "e", "students/small"))).manifest.heads
    assert (only.trained_on, only.kind) == ("onnx-int8", "depth")
    (tmp_path / "e/tasks/far/head-students.small-onnx-int8-48.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="holds no head"):
        tiny_bundle(folder, artifacts, heads=kept_heads(tmp_path / "e", "students/small"))


def test_config_problems():
    assert BundleConfig(heads=[]).problems() == BundleConfig(heads=["a", "a"]).problems()
    assert "heads must name at least one task, and each once" in BundleConfig(heads=[]).problems()[0]
    assert BundleConfig(heads=["a"]).problems() == BundleConfig(heads=False).problems() == []


# ---- on the device


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_selftest_says_how_the_answers_agree(good, tmp_path, bare, runtime):
    """In a bundle of ONNX Runtime's artifacts OpenVINO stands in where it alone is installed, and says so."""
    if importlib.util.find_spec(runtime) is None:
        pytest.skip(f"{runtime} is not installed")
    unpack(good, tmp_path / "b")
    packages = ("numpy", "PIL", runtime)
    done = bare(tmp_path / "b/selftest.py", "--json", "--seconds", "0", packages=packages)
    report = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, ""), report
    results = {r["check"]: r for r in report["results"]}
    order = ["machine", "files", "preprocess", "head far", "head main", "head rooms", "onnx-fp32", "onnx-int8"]
    assert (list(results), {r["status"] for r in results.values()}) == (order, {"PASS"})
    stand_in = "run by openvino instead of onnxruntime; 32 px: "
    for target in ("onnx-fp32", "onnx-int8"):
        small, large = results[target]["files"]
        assert results[target]["text"].startswith(stand_in if runtime == "openvino" else "32 px: ")
        assert (small["run_by"], large["heads"]) == (runtime, {})  # heads read 32 px alone
        assert set(small["heads"]) == {"far", "main", "rooms"}
        assert small["heads"]["main"]["items"] == 4
        assert small["heads"]["rooms"]["items"] == 4 * 16
        assert "top5_agreement" not in small["heads"]["rooms"]
        assert 0.9 < large["neighbour_agreement"] <= 1 if target == "onnx-fp32" else 0.5 < large["neighbour_agreement"] <= 1
        manifest = json.loads((tmp_path / "b/manifest.json").read_text())
        expected = next(a for a in manifest["artifacts"] if a["target"] == target)["files"][0]["expected"]
        asked = expected["stand_in"] if runtime == "openvino" else expected
        assert small["tolerance"] == {"cosine_min": asked["cosine_min"], "max_abs": asked["max_abs"]}
    exact = results["onnx-fp32"]["files"][0]
    assert (exact["heads"]["main"]["top1_agreement"], exact["heads"]["rooms"]["top1_agreement"]) == (1, 1)
    assert exact["heads"]["far"]["max_difference_m"] < 1e-3
    said = results["onnx-fp32"]["text"].split("; 48 px: ")
    assert "main top-1 100.0% top-5 100.0%, rooms top-1 100.0%" in said[0]
    assert "nearest patches " in said[1]  # at 48 px, where no head reads


def test_a_changed_head_under_right_hashes(good, tmp_path):
    def change(folder: Path) -> None:
        model = onnx.load(folder / "heads/main.onnx")
        bias = next(t for t in model.graph.initializer if t.name == "bias")
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias)[::-1].copy(), "bias"))
        (folder / "heads/main.onnx").write_bytes(model.SerializeToString())

    bad = remade(good, tmp_path / "bad.tar.gz", change)
    with pytest.raises(GateFailed, match=r"head main .*logits"):
        selftest(bad, Progress("quiet"), seconds=0)


def features(folder: Path, picture: Path, fit: str) -> tuple[np.ndarray, np.ndarray]:
    """(cls [1, D], patches [1, N, D]) of onnx-fp32 at 32 px."""
    with Image.open(picture) as image:
        tensor = replace(PREPROCESS, fit=fit)(image)[None]
    session = onnxruntime.InferenceSession(folder / "artifacts/onnx-fp32/model_32.onnx", providers=["CPUExecutionProvider"])
    cls, patches = session.run(["cls", "patches"], {"images": tensor})
    return cls, patches


def test_infer_says_what_a_classifier_says(good, tmp_path, bare):
    unpack(good, tmp_path / "b")
    pictures, one = [tmp_path / f"b/golden/image_{i}.png" for i in range(4)], HEADS["main"]
    done = bare(tmp_path / "b/infer.py", *map(str, pictures), "--head", "main")
    assert (done.returncode, done.stderr) == (0, "")
    first, *lines = done.stdout.splitlines()
    assert (first, len(lines)) == ("main on onnx-fp32 at 32 px", 4)
    for picture, line in zip(pictures, lines, strict=True):
        cls, patches = features(tmp_path / "b", picture, "crop")
        (logits,) = ((np.concatenate([cls, patches.mean(1)], 1) - one.shift) * one.scale) @ one.weight.T + one.bias
        shares = 100 * np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        said = [answer.split() for answer in line.removeprefix(f"{picture}: ").split(", ")]
        assert [name for name, _ in said] == [NAMES[k] for k in np.argsort(-shares)[:5]]
        np.testing.assert_allclose([float(share.rstrip("%")) for _, share in said], -np.sort(-shares)[:5], atol=0.06)
    done = bare(tmp_path / "b/infer.py", str(pictures[0]), "--head", "main", "--target", "onnx-int8")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "main on onnx-int8 at 32 px")


@pytest.mark.parametrize(("name", "mode", "words"), [("rooms", "L", "holds class ids"), ("far", "I;16", "holds millimetres")])
def test_infer_draws_what_a_dense_head_says(good, tmp_path, bare, name, mode, words):
    """Of a picture that is not square: squashed it gives other features than cropped, and its map has another shape transposed."""
    unpack(good, tmp_path / "b")
    picture = tmp_path / "b/golden/image_3.png"
    done = bare(tmp_path / "b/infer.py", str(picture), "--head", name, "--out", str(tmp_path / "m"))
    assert (done.returncode, words in done.stdout) == (0, True), done.stdout + done.stderr
    with Image.open(tmp_path / f"m/image_3-{name}.png") as drawn:
        assert (drawn.size, drawn.mode) == ((200, 41), mode)
        values = np.asarray(drawn)
    cls, patches = features(tmp_path / "b", picture, "squash")
    (expected,) = predict(HEADS[name], patches, cls, (41, 200))
    if name == "rooms":
        assert len(np.unique(expected)) > 1
        assert (values == expected).mean() > 0.999, "but for ties at the last digit"
    else:
        assert np.ptp(expected) > 0.1
        np.testing.assert_allclose(values / 1000, expected, atol=2e-3)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--head", "x"], 2, "There is no head x here; there are: far, main, rooms."),
        (["--head", "main", "--resolution", "48"], 2, "The head main reads onnx-fp32, onnx-int8 at 32 px."),
        (["--head", "main", "--target", "rtx-int8"], 2, "The head main reads onnx-fp32, onnx-int8 at 32 px."),
    ],
)
def test_infer_says_what_is_wrong(good, tmp_path, bare, arguments, code, words):
    unpack(good, tmp_path / "b")
    done = bare(tmp_path / "b/infer.py", "golden/image_0.png", *arguments)
    assert (done.returncode, done.stderr) == (code, words + "\n")


def test_a_head_without_a_runtime(good, tmp_path, bare):
    unpack(good, tmp_path / "b")
    done = bare(tmp_path / "b/infer.py", "golden/image_0.png", "--head", "main", packages=("numpy", "PIL"))
    assert (done.returncode, "a head needs onnxruntime or openvino" in done.stderr) == (3, True)
    done = bare(tmp_path / "b/selftest.py", packages=("numpy", "PIL"))
    assert (done.returncode, "SKIP  head main     needs onnxruntime or openvino" in done.stdout) == (3, True)


def test_the_demo_reads_them(good, tmp_path):
    unpack(good, tmp_path / "b")
    found = find(good, tmp_path / "b")
    assert [p.name for p in found.heads] == ["far.onnx", "rooms.onnx"]  # the page has no use for a classifier
    g = np.random.default_rng(0)
    patches, cls = g.normal(size=(16, DIM)).astype(np.float32), g.normal(size=DIM).astype(np.float32)
    look = Look(Image.new("RGB", (32, 32)), cls, patches, (4, 4), 0, 0, 0, 1)
    for path in found.heads:
        theirs = predict(HEADS[path.stem], patches[None], cls[None], (64, 64))[0]
        ours = load_head(path).predict(look, 64)
        assert (np.abs(ours - theirs) < 1e-3).mean() > 0.999, "but for ties at the last digit"
    assert load_head(found.heads[1]).name_of(5) == "lamp"


# ---- what the numbers mean


def bundle_module(name: str):
    spec = importlib.util.spec_from_file_location(name, TEMPLATES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_agreement_counts_what_it_says():
    code, g = bundle_module("agreement"), np.random.default_rng(0)
    patches = g.normal(size=(2, 9, 8)).astype(np.float32)
    assert code.neighbour_agreement(patches, patches * 3) == 1  # only directions count
    other = g.normal(size=(2, 9, 8)).astype(np.float32)
    assert code.neighbour_agreement(patches, other) < 0.5
    same = np.ones((1, 6, 8), np.float32)
    assert code.neighbour_agreement(same, g.normal(size=same.shape)) == 1  # all were equally near
    pairs = np.repeat(np.eye(8, dtype=np.float32)[:4], 2, 0)[None]
    swapped = pairs.copy()
    swapped[0, [1, 2]] = pairs[0, [2, 1]]
    assert code.neighbour_agreement(pairs, swapped) == 0.5  # of the four patches of two pairs the partner is another
    many = g.normal(size=(3, 2000, 4)).astype(np.float32)
    assert code.neighbour_agreement(many, many) == 1
    logits = np.array([[5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]], np.float32)
    moved = np.array([[5, 4, 3, 2, 0, 1], [9, 1, 2, 3, 4, 5]], np.float32)
    assert code.top_agreement(logits, moved) == {"items": 2, "top1_agreement": 0.5, "top5_agreement": 0.8}
    assert "top5_agreement" not in code.top_agreement(logits[:, :5], moved[:, :5])


def test_an_engine_answers_for_what_it_was_built_from(good, tmp_path, bare):
    """As build_engine.py leaves it, but that the "engine" is an ONNX file, which runs without a GPU."""
    unpack(good, tmp_path / "b")
    onnx, folder = tmp_path / "b/artifacts/onnx-fp32/model_32.onnx", tmp_path / "engines"
    folder.mkdir()
    (folder / "a.engine").write_bytes(onnx.read_bytes())
    entry = {
        "path": "a.engine",
        "sha256": sha256_file(onnx),
        "bytes": onnx.stat().st_size,
        "target": "onnx-fp32",
        "onnx": "artifacts/onnx-fp32/model_32.onnx",
        "onnx_sha256": sha256_file(onnx),
        "compute_capabilities": [],
        "runtime": "onnxruntime",
        "versions": {},
        "system": platform.system().lower(),
    }
    listed = {"format": "decant-engines-1", "engines": [{**entry, "machine": platform.machine().lower()}]}
    (folder / "engines.json").write_text(json.dumps(listed))
    done = bare(tmp_path / "b/selftest.py", "--json", "--seconds", "0", "--engines", str(folder))
    assert done.returncode == 0, done.stdout
    results = {r["check"]: r for r in json.loads(done.stdout)["results"]}
    (mine,), (small, _) = results["engines/a.engine"]["files"], results["onnx-fp32"]["files"]
    assert mine["heads"] == small["heads"] != {}


def test_a_class_beyond_a_png_is_refused(good, tmp_path):
    unpack(good, tmp_path / "b")
    code = runpy.run_path(str(tmp_path / "b/head.py"))
    head = {"kind": "segmentation", "ids": [0, 70_000], "classes": [], "name": "rooms"}
    logits = np.zeros((16, 2), np.float32)
    assert code["dense_map"](head, logits, (32, 32))[0].size == (32, 32)
    with pytest.raises(ValueError, match="class id 70000 does not fit into a PNG"):
        code["dense_map"](head, logits + np.array([0, 1], np.float32), (32, 32))
