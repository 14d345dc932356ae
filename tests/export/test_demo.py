"""The demo's parts: pictures from features by hand-computed values, the index on disk, odd images, views. No browser here."""

import hashlib
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from distill.data.preprocess import Preprocess
from distill.errors import EnvironmentFailed, UserError
from distill.evaluate.linear_head import Head, predict
from export.artifact import Artifact, ArtifactFile, TensorSpec
from export.demo import index as index_module
from export.demo import vision
from export.demo.heads import load_head
from export.demo.index import Index, build, place
from export.demo.models import Look, Model, open_model
from export.demo.sources import Choice, Models, find, joined
from export.demo.views import (
    compare_view,
    dense_view,
    mask_view,
    patch_at,
    pca_view,
    read_image,
    similar_view,
    similarity_view,
    source_view,
    timing,
    with_point,
)

GRID = (4, 4)


def look_of(patches_ND: np.ndarray, grid=GRID) -> Look:
    picture = Image.new("RGB", (grid[0] * 8, grid[1] * 8), "gray")
    return Look(picture, patches_ND.mean(0), patches_ND.astype(np.float32), grid, 1.0, 2.0, 2.0, 1)


def two_kinds() -> np.ndarray:
    """[16, 3]: the middle four patches of a 4 x 4 grid point along x, the rest along y."""
    patches = np.tile([0.0, 1.0, 0.0], (16, 1))
    patches[[5, 6, 9, 10]] = [2.0, 0.0, 0.0]
    return patches


# --- vision ---


def test_similarity_is_the_cosine_to_the_nearest_chosen_patch():
    patches = np.array([[1.0, 0], [0, 2], [3, 3], [-1, 0]])
    np.testing.assert_allclose(vision.similarity(patches, (2, 2), [(0, 0, True)]), [[1, 0], [0.5**0.5, -1]], atol=1e-12)
    both = vision.similarity(patches, (2, 2), [(0, 0, True), (0, 1, True), (1, 1, False)])
    np.testing.assert_allclose(both, [[1, 1], [0.5**0.5, 0]], atol=1e-12)
    np.testing.assert_allclose(vision.similarity(patches, (2, 2), [(1, 1, True)], positive=False), -np.ones((2, 2)))


def test_otsu_parts_two_groups():
    assert vision.otsu(np.array([0.0, 0.1, 0.1, 0.9, 1.0])) == pytest.approx(0.5)
    assert vision.otsu(np.full(7, 0.3)) == 0.3
    values = np.random.default_rng(0).normal(0, 1, 400)

    def within(cut: float) -> float:
        low, high = values[values <= cut], values[values > cut]
        return low.var() * len(low) + high.var() * len(high)

    best = min((np.sort(values)[:-1] + np.sort(values)[1:]) / 2, key=within)
    assert vision.otsu(values) == pytest.approx(best)


def test_mask_keeps_what_hangs_together_and_leaves_what_is_unwanted():
    patches = np.tile([0.0, 1.0], (16, 1))
    patches[[0, 10, 11]] = [1.0, 0.0]  # the corner, and two in the third row
    at = {"size": 16, "smooth": False}
    mask = vision.mask_from(patches, GRID, [(0, 0, True)], **at)
    assert mask.threshold == pytest.approx(0.5)
    assert mask.inside.sum() == 3 * 16
    together = vision.mask_from(patches, GRID, [(0, 0, True)], connected=True, **at)
    assert together.inside.sum() == 16
    assert together.inside[:4, :4].all()
    assert not vision.mask_from(patches, GRID, [(0, 0, True), (2, 2, False)], **at).inside.any(), "as near to the unwanted"
    assert vision.mask_from(patches, GRID, [(0, 0, True)], threshold=-0.5, **at).inside.all()


def test_resample():
    ramp = np.array([[0.0, 1.0], [0.0, 1.0]])
    assert vision.resample(ramp, 4, smooth=False).tolist() == [[0, 0, 1, 1]] * 4
    smooth = vision.resample(np.eye(4), 64)
    assert smooth.shape == (64, 64)
    assert smooth.min() >= 0
    assert smooth.max() <= 1, "bicubic overshoots, what is shown does not"


def test_projection_is_that_of_an_independent_pca():
    from sklearn.decomposition import PCA

    patches = np.random.default_rng(1).normal(size=(16, 5)) * [5, 3, 2, 1, 0.5]
    projection = vision.fit_projection(patches, GRID)
    theirs = PCA(3).fit(patches).components_
    np.testing.assert_allclose(np.abs((projection.directions_DC.T * theirs).sum(1)), 1, atol=1e-9)
    colours = projection.colours(patches)
    assert colours.shape == (16, 3)
    assert colours.min() == 0
    assert colours.max() == 1
    assert projection.foreground(patches).all()


def test_the_same_projection_colours_another_model_alike():
    patches = np.random.default_rng(2).normal(size=(16, 8))
    projection = vision.fit_projection(patches, GRID)
    np.testing.assert_allclose(projection.colours(patches + 1e-9), projection.colours(patches), atol=1e-6)
    assert np.abs(projection.colours(patches[::-1]) - projection.colours(patches)).max() > 0.1


def test_foreground_is_what_touches_the_border_less():
    patches = two_kinds() + np.random.default_rng(0).normal(size=(16, 3)) * 0.05
    inside = np.zeros(16, bool)
    inside[[5, 6, 9, 10]] = True
    assert (vision.fit_projection(patches, GRID, foreground=True).foreground(patches) == inside).all()
    assert (vision.fit_projection(-patches, GRID, foreground=True).foreground(-patches) == inside).all()
    assert (vision.fit_projection(patches, GRID, foreground=True, swap=True).foreground(patches) == ~inside).all()


def test_flat_features_are_grey():
    colours = vision.fit_projection(np.ones((16, 6)), GRID, foreground=True).colours(np.ones((16, 6)))
    assert (colours == 0.5).all()


def test_colours_are_told_apart():
    ends = vision.heat_colours(np.array([0.0, 1.0]))
    np.testing.assert_allclose(ends, [[0x44, 0x01, 0x54], [0xFD, 0xE7, 0x25]])
    lightness = vision.heat_colours(np.linspace(0, 1, 50)) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()
    assert len({tuple(c) for c in vision.class_colours(np.arange(32)).round()}) == 32


# --- images ---


def odd_images(folder: Path) -> dict[str, Path]:
    base = Image.new("RGB", (40, 20), (200, 30, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    made = {name: folder / name for name in ("exif.jpg", "alpha.png", "palette.gif", "deep.png", "cmyk.jpg", "huge.png")}
    base.save(made["exif.jpg"], exif=exif)
    Image.new("RGBA", (40, 20), (200, 30, 30, 0)).save(made["alpha.png"])
    base.convert("P").save(made["palette.gif"])
    Image.fromarray(np.full((20, 40), 40000, np.uint16)).save(made["deep.png"])
    base.convert("CMYK").save(made["cmyk.jpg"])
    Image.new("L", (3000, 2500), 90).save(made["huge.png"])
    return made


def test_images_of_every_kind_are_shown(tmp_path):
    read = {name: read_image(path) for name, path in odd_images(tmp_path).items()}
    assert {image.mode for image in read.values()} == {"RGB"}
    assert read["exif.jpg"].size == (20, 40)
    assert read["alpha.png"].getpixel((5, 5)) == (255, 255, 255)
    assert read["deep.png"].getpixel((5, 5)) == (156, 156, 156)
    assert read["huge.png"].size == (1229, 1024)


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0cut"])
def test_broken_images_are_a_sentence(tmp_path, content):
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"^bad\.jpg cannot be shown: .*Choose another image\.$"):
        read_image(tmp_path / "bad.jpg")


# --- views ---


def test_clicks_become_patches_and_points():
    look = look_of(two_kinds())
    size = vision.display_size(GRID)
    assert size == 448
    assert patch_at(look, 0, 0) == (0, 0)
    assert patch_at(look, 447, 111) == (0, 3)
    assert patch_at(look, 500, -3) == (0, 3)
    points = with_point([], 1, 2, "anew")
    points = with_point(points, 0, 0, "exclude")
    assert points == [(1, 2, True), (0, 0, False)]
    assert with_point(points, 0, 0, "add") == [(1, 2, True), (0, 0, True)]
    assert with_point(points, 1, 2, "add") == [(0, 0, False)], "chosen again it is taken away"
    assert "row 2, column 3 wanted; row 1, column 1 unwanted" in source_view(look, points).alt


def test_views_say_what_they_show():
    look = look_of(two_kinds())
    heat = similarity_view(look, [(1, 1, True)], smooth=True)
    assert heat.caption == "Cosine 0.00 (dark violet) to 1.00 (yellow)."
    assert heat.image.size == (448, 448)
    mask, used = mask_view(look, [(1, 1, True)], None, connected=True, smooth=False)
    assert used == pytest.approx(0.5)
    assert mask.caption == "25% of the picture, at cosine 0.50 (by Otsu)."
    assert mask_view(look, [(1, 1, True)], -1.0, connected=False, smooth=False)[0].caption.startswith("100% ")
    assert "Foreground: 4 of 16" in pca_view(look, "1, 2, 3 as red, green, blue", True, False, False).alt
    with pytest.raises(UserError, match="Choose a patch"):
        similarity_view(look, [(1, 1, False)], smooth=True)


def flat_model(name: str, width: int = 3, factor: float = 1.0) -> Model:
    """Mean colours of 4 x 4 cells, times a factor; no network."""

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cells = images.reshape(len(images), 3, 4, 8, 4, 8).mean((3, 5)).reshape(len(images), 3, 16).transpose(0, 2, 1)
        cells = np.concatenate([cells] * (width // 3), 2) * factor
        return cells.mean(1).astype(np.float32), cells.astype(np.float32)

    return Model(name, name, "arithmetic 1.0", Preprocess(32, 32, normalize="none"), 4, run)


def scene(seed: int) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 255, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(colours).resize((48, 32), Image.Resampling.NEAREST)


def test_look_keeps_preprocessing_apart():
    model = flat_model("flat")
    look = model.look(scene(0))
    assert look.patches_ND.shape == (16, 3)
    assert look.picture.size == (32, 32)
    assert look.calls == 1
    again = model.look(scene(0))
    assert again.calls == 2
    assert "median of the last 2 calls" in timing(model, again)
    assert "preprocessing apart" in timing(model, again)
    np.testing.assert_allclose(np.asarray(look.picture)[:8, :8].mean((0, 1)) / 255, look.patches_ND[0], atol=0.01)


def test_nan_is_a_sentence():
    with pytest.raises(UserError, match="gave NaN"):
        flat_model("broken", factor=float("nan")).look(scene(0))


def test_compare_has_one_projection_and_cosines():
    figures, line, rows = compare_view(scene(1), flat_model("a"), flat_model("b", factor=2.0), "1", False, False)
    assert line.startswith("Cosine of the CLS features 1.00000, of the patches 1.00000 in the mean")
    assert len(figures) == 3
    assert np.asarray(figures[0].image).std() > 0
    same = compare_view(scene(1), flat_model("a"), flat_model("b"), "1", False, False)[0]
    assert (np.asarray(same[0].image) == np.asarray(same[1].image)).all()
    assert (np.asarray(figures[0].image) != np.asarray(figures[1].image)).any(), "twice the features are other colours"
    figures, line, rows = compare_view(scene(1), flat_model("a"), flat_model("wide", width=6), "1", True, False)
    assert "different widths have no cosine" in line
    assert len(figures) == 2
    assert {row[0] for row in rows} == {"this call", "median", "preprocessing", "runtime", "patches"}


# --- the index ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for i in range(7):
        scene(i).save(tmp_path / "photos" / ("deep" if i > 4 else ".") / f"{i}.png")
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"nothing")
    return tmp_path / "photos"


def test_index_is_exact_and_leaves_out_what_is_broken(folder, tmp_path):
    model = flat_model("m")
    index = build(tmp_path / "index", folder, model)
    assert index.broken == ["bad.jpg"]
    assert sorted(index.names) == ["0.png", "1.png", "2.png", "3.png", "4.png", "deep/5.png", "deep/6.png"]
    query = model.look(scene(5)).cls_D
    found = index.search(query, 3)
    assert found[0] == ("deep/5.png", pytest.approx(1.0, abs=1e-6))
    cosines = {n: float(vision.unit(query) @ vision.unit(model.look(read_image(folder / n)).cls_D)) for n in index.names}
    assert [n for n, _ in found] == sorted(cosines, key=cosines.get, reverse=True)[:3]
    assert len(index.search(query, 99)) == 7


def test_index_resumes_and_follows_the_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "SHARD", 2)
    model, root = flat_model("m"), tmp_path / "index"
    counted: list[int] = []
    real = model.run
    model.run = lambda images: (counted.append(len(images)), real(images))[1]
    monkeypatch.setattr(index_module, "write_shard", killed := Killed(index_module.write_shard, after=2))
    with pytest.raises(KeyboardInterrupt):
        build(root, folder, model)
    killed.after = 99
    assert len(list(place(root, folder, model).glob("shard-*.npz"))) == 2
    before = sum(counted)
    told: list[tuple[int, int]] = []
    build(root, folder, model, lambda done, total: told.append((done, total)))
    assert told[0] == (4, 8), "four rows were kept"
    assert told[-1] == (8, 8)
    counted.clear()
    assert len(build(root, folder, model).names) == 7
    assert counted == [], "nothing is computed twice, broken files included"
    scene(50).save(folder / "0.png")
    os.utime(folder / "0.png", (1, 1))
    (folder / "1.png").unlink()
    index = build(root, folder, model)
    assert sum(counted) == 1
    assert "1.png" not in index.names
    assert index.search(model.look(scene(50)).cls_D, 1)[0][0] == "0.png"
    assert before > 0


class Killed:
    def __init__(self, real, after: int):
        self.real, self.after, self.calls = real, after, 0

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls > self.after:
            raise KeyboardInterrupt
        return self.real(*arguments)


def test_other_weights_are_another_index(folder, tmp_path):
    assert place(tmp_path, folder, flat_model("a")) != place(tmp_path, folder, flat_model("b"))


def test_faiss_finds_the_same(folder, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    units = vision.unit(np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32))
    index = Index(folder, [str(i) for i in range(200)], units, [])
    exact = index.search(units[7] + 0.01, 5)
    monkeypatch.setattr(index_module, "FAISS_FROM", 100)
    assert [n for n, _ in index.search(units[7] + 0.01, 5)] == [n for n, _ in exact]


def test_folders_without_images_are_a_sentence(folder, tmp_path):
    model = flat_model("m")
    (tmp_path / "empty").mkdir()
    for path, said in ((tmp_path / "none", "is no folder"), (tmp_path / "empty", "holds no image file")):
        with pytest.raises(UserError, match=said):
            build(tmp_path / "index", path, model)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="None of the 1 image files"):
        build(tmp_path / "index", tmp_path / "bad", model)
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFailed, match="cannot be written"):
        build(tmp_path / "file", folder, model)
    with pytest.raises(UserError, match="--images FOLDER"):
        similar_view(None, None, model, model.look(scene(0)), 3, lambda done, total: None)


# --- heads ---


@pytest.mark.parametrize(("kind", "cls"), [("segmentation", False), ("segmentation", True), ("depth", False)])
def test_heads_give_what_torch_gives(tmp_path, kind, cls):
    g = np.random.default_rng(0)
    patches, f, k = g.normal(size=(16, 6)).astype(np.float32), 12 if cls else 6, 5
    arrays = {"weight": (k, f), "bias": (k,), "shift": (f,), "scale": (f,)}
    made = {name: g.normal(size=shape).astype(np.float32) for name, shape in arrays.items()}
    values = np.array([3, 1, 4, 0, 7], np.float32)
    head = Head(kind, **made, values=values, layers=1, cls=cls, names=[], constant=0.0)
    (tmp_path / "heads").mkdir()
    head.save(tmp_path / "heads" / "head-small.safetensors")
    look = look_of(patches)
    ours = load_head(tmp_path / "heads" / "head-small.safetensors")
    assert (ours.name, ours.kind) == ("small", kind)
    theirs = predict(head, patches[None], look.cls_D[None], (448, 448))[0]
    if kind == "depth":
        np.testing.assert_allclose(ours.predict(look, 448), theirs, atol=1e-4)
    else:
        assert (ours.predict(look, 448) == theirs).mean() > 0.999, "but for ties at the last digit"
    assert dense_view(look, ours).image.size == (448, 448)
    with pytest.raises(UserError, match="numbers a patch, and this model gives"):
        ours.predict(look_of(patches[:, :4]), 448)


def test_heads_of_several_layers_and_damaged_ones_are_sentences(tmp_path):
    zeros = np.zeros(3, np.float32)
    head = Head("depth", np.zeros((3, 3), np.float32), zeros, zeros, zeros, zeros, 4, False, [], 0.0)
    head.save(tmp_path / "h.safetensors")
    with pytest.raises(UserError, match="reads the last 4 layers"):
        load_head(tmp_path / "h.safetensors").predict(look_of(two_kinds()), 16)
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    (tmp_path / "x.onnx").write_bytes(b"nothing")
    for name in ("x.safetensors", "x.onnx"):
        with pytest.raises(UserError, match="holds no head that can be shown"):
            load_head(tmp_path / name)


def test_a_runs_head_is_for_the_file_that_it_was_trained_on(tmp_path):
    zeros = np.zeros(3, np.float32)
    head = Head("depth", np.zeros((3, 3), np.float32), zeros, zeros, zeros, zeros, 1, False, [], 0.0)
    names = {"students.small-onnx-int8-224": "small onnx-int8 224 px", "teacher-torch-fp32-224": "teacher (torch)"}
    for owner, model in names.items():
        path = tmp_path / "evaluate" / "tasks" / "rooms" / f"head-{owner}.safetensors"
        head.save(path)
        found = load_head(path)
        assert found.name == "rooms"
        assert [found.reads(m) for m in names.values()] == [m == model for m in names.values()]
    head.save(tmp_path / "heads" / "head-rooms.safetensors")
    assert load_head(tmp_path / "heads" / "head-rooms.safetensors").reads("anything")


def test_an_onnx_head(tmp_path):
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, "n", w]) for n, w in (("patches", 3), ("logits", 2))]
    weight = numpy_helper.from_array(np.array([[1.0, 0], [0, 1], [0, 0]], np.float32), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["patches", "w"], ["logits"])], "g", ports[:1], ports[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {"head": '{"kind": "segmentation", "names": ["fish", "water"]}'})
    onnx.save(model, tmp_path / "sea.onnx")
    figure = dense_view(look_of(two_kinds()), load_head(tmp_path / "sea.onnx"))
    assert figure.caption == "Segmentation: water 69%, fish 31%."


# --- models and where they come from ---


def artifact(folder: Path, data: bytes = b"nothing", runtime: str = "onnxruntime", target: str = "onnx-fp32") -> Artifact:
    folder.mkdir(parents=True)
    (folder / "model_32.onnx").write_bytes(data)
    ports = [TensorSpec(name=n, dtype="float32", shape=["batch", 1]) for n in ("images", "cls", "patches")]
    entry = ArtifactFile(
        path="model_32.onnx", resolution=32, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data), inputs=ports[:1],
        outputs=ports[1:], preprocess=Preprocess(32, 36).to_json(),
    )  # fmt: skip
    return Artifact(
        student="small", target=target, precision="fp32", runtime=runtime, files=[entry], source="torch-fp32", dim=32, patch=8,
        opset=20, max_batch=4, build_seconds=0.0, folder=folder,
    ).write()  # fmt: skip


def test_an_exported_file_is_the_network_in_torch(graphs, tmp_path):
    model, path, size = graphs["mlp-fp32"]
    made = artifact(tmp_path / "a", path.read_bytes())
    entry = made.file().model_copy(update={"preprocess": Preprocess(size, size, normalize="per_image").to_json()})
    opened = open_model(made, entry, "small", torch_allowed=False)
    look = opened.look(scene(3))
    with torch.inference_mode():
        expected = model(torch.from_numpy(opened.preprocess(scene(3))[None]))
    np.testing.assert_allclose(look.cls_D, expected.cls[0], atol=1e-4)
    np.testing.assert_allclose(look.patches_ND, expected.patches[0], atol=1e-4)
    assert look.grid == (4, 4)
    np.testing.assert_allclose(opened.cls([scene(i) for i in range(6)])[3], look.cls_D, atol=1e-5)


def test_the_same_in_openvino(graphs, tmp_path):
    pytest.importorskip("openvino")
    _, path, size = graphs["mlp-fp32"]
    settings = {"preprocess": Preprocess(size, size).to_json()}
    looks = []
    for runtime in ("onnxruntime", "openvino"):
        made = artifact(tmp_path / runtime, path.read_bytes(), runtime)
        looks.append(open_model(made, made.file().model_copy(update=settings), runtime, False).look(scene(1)))
    np.testing.assert_allclose(looks[0].patches_ND, looks[1].patches_ND, atol=1e-3)


def test_what_cannot_run_has_its_reason(tmp_path):
    artifact(tmp_path / "onnx", b"no graph")
    artifact(tmp_path / "engine", runtime="tensorrt_rtx", target="rtx-fp16")
    models = Models(
        joined([tmp_path / n for n in ("onnx", "engine")], [find(tmp_path / n) for n in ("onnx", "engine")]).choices
    )
    with pytest.raises(EnvironmentFailed, match=r"Nothing can run on this machine \(small onnx-fp32 32 px: onnxruntime"):
        models.try_all()
    models = Models([Choice("flat", flat_model), *models.choices.values()])
    models.try_all()
    assert models.names() == ["flat"]
    with pytest.raises(UserError, match="small rtx-fp16 32 px cannot run here"):
        models["small rtx-fp16 32 px"]


def test_a_changed_file_is_refused(tmp_path):
    artifact(tmp_path / "a", b"0123456789")
    (tmp_path / "a" / "model_32.onnx").write_bytes(b"0123456780")
    with pytest.raises(UserError, match="was changed since it was exported"):
        Models(find(tmp_path / "a").choices).try_all()


def test_names_differ_and_the_index_lies_with_the_first(tmp_path):
    for name in ("a", "b"):
        artifact(tmp_path / name)
    found = joined([tmp_path / "a", tmp_path / "b"], [find(tmp_path / "a"), find(tmp_path / "b")])
    assert [c.name for c in found.choices] == ["small onnx-fp32 32 px", "small onnx-fp32 32 px (b)"]
    assert found.index == tmp_path / "a.index"
    with pytest.raises(UserError, match="name each run, bundle or artifact once"):
        joined([tmp_path / "a"] * 3, [find(tmp_path / "a")] * 3)
    artifact(tmp_path / "run" / "export" / "small" / "onnx-fp16", target="onnx-fp16")
    artifact(tmp_path / "run" / "export" / "small" / "onnx-fp32")
    run = find(tmp_path / "run")
    assert [c.name for c in run.choices] == ["small onnx-fp32 32 px", "small onnx-fp16 32 px"], "FP32 first"
    assert run.index == tmp_path / "run" / "demo-index"
    for path, said in ((tmp_path / "none", "There is no"), (tmp_path, "is no run's folder")):
        with pytest.raises(UserError, match=said):
            find(path)
