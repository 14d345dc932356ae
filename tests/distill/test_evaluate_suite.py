"""The whole evaluation on rendered scenes and on data that cannot be judged."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from distill.config import Config
from distill.data.preprocess import Preprocess
from distill.data.scenes import ScenesConfig
from distill.data.sources import FolderConfig
from distill.encoder import Features, TorchEncoder
from distill.errors import UserError
from distill.evaluate.pairs import Predictions, paired_rows
from distill.evaluate.split import align
from distill.evaluate.suite import EvaluateConfig, Subject, evaluate
from distill.models.backbone import Backbone, BackboneConfig
from distill.progress import Progress
from distill.rows import read_rows, write_rows

QUIET = Progress("quiet")
P = Preprocess(size=32, resize=32, normalize="per_image")
CONFIG = EvaluateConfig(ks=[5, 10, 1000], probe_lrs=[0.3, 3.0], probe_steps=60)
SMALL = BackboneConfig(dim=32, depth=2, heads=2, patch=8, image_size=32, layer_scale=1.0, init="fan_in")


class Plain:
    """The preprocessed pixels as they are, with their mean as the only patch."""

    target = "pixels"

    def __init__(self):
        self.conditions = {"runtime": "none"}

    def __call__(self, images: torch.Tensor) -> Features:
        return Features(images.flatten(1), images.mean((2, 3))[:, None])


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Counted:
    """An encoder that counts images; another seed is another network."""

    target = "torch-fp32"

    def __init__(self, seed: int = 0):
        torch.manual_seed(seed)
        self.inner, self.images = TorchEncoder(Backbone(SMALL)), 0
        self.conditions = {"runtime": "counted", "device": "cpu"}

    def __call__(self, x):
        self.images += len(x)
        return self.inner(x)


class Colours:
    """Single-coloured images with a little noise: label = colour. Any labels, classes, size."""

    def __init__(self, labels, classes=None, seed=0, name="colours"):
        self._labels = None if labels is None else np.array(labels, np.int64)
        self.n, self.classes, self.seed, self.name = 60 if labels is None else len(labels), classes, seed, name

    def __len__(self):
        return self.n

    def labels(self):
        return self._labels

    def fingerprint(self):
        return f"{self.seed}-{self._labels}"

    def image(self, i):
        rng = np.random.default_rng((self.seed, i))
        label = 0 if self._labels is None else self._labels[i]
        name = self.classes[label] if self.classes and label >= 0 else str(label)
        colour = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}.get(
            name, (40 * label, 128, 200 - 40 * label)
        )
        pixels = np.clip(np.array(colour) + rng.normal(0, 10, (32, 32, 3)), 0, 255)
        return Image.fromarray(pixels.astype(np.uint8))


PLAIN = replace(P, normalize="none")


def raw(preprocess=PLAIN) -> Subject:
    return Subject("raw", "pixels", Plain, preprocess)


def by_metric(rows, metric):
    return [r for r in rows if r.metric == metric]


@pytest.fixture(scope="module")
def scenes():
    return ScenesConfig(count=160, size=32).build(), ScenesConfig(count=90, size=32, split="test").build()


def test_rows_say_what_is_needed_to_read_them(scenes, tmp_path):
    found = evaluate(CONFIG, [raw(P), Subject("teacher", "torch-fp32", Counted, P, "w")], *scenes, tmp_path, QUIET)
    assert [(r.subject, r.metric) for r in found.rows] == [
        (s, m) for s in ("raw", "teacher") for m in ("knn_top1", *["knn_top1_at_k"] * 3, "linear_top1")
    ]
    for row in found.rows:
        c = row.conditions
        assert (c["data"], c["gallery"]) == (scenes[1].name, scenes[0].name)
        assert (c["data_fingerprint"], c["gallery_fingerprint"]) == (scenes[1].fingerprint(), scenes[0].fingerprint())
        assert (c["gallery_size"], c["classes"], c["resolution"], c["normalize"], c["batch"]) == (160, 8, 32, "per_image", 64)
        assert "few_samples" not in c
        assert all(isinstance(v, str | int | float | bool) for v in c.values())
        if row.status == "measured":
            assert row.n == 90
            assert 0 <= row.low <= row.value <= row.high <= 100
    knn = by_metric(found.rows, "knn_top1")[1]
    assert knn.conditions["k"] in (5, 10)
    assert knn.conditions["k_chosen"] == "held-out gallery"
    assert knn.conditions["runtime"] == "counted"
    at_k = {r.conditions["k"]: r for r in by_metric(found.rows, "knn_top1_at_k")[3:]}
    assert at_k[knn.conditions["k"]].value == knn.value
    assert at_k[1000].status == "not measured"
    assert "160" in at_k[1000].reason
    linear = by_metric(found.rows, "linear_top1")[1]
    assert linear.conditions["lr"] in (0.3, 3.0)
    assert linear.conditions["features"] in ("cls", "cls+mean_patch")
    write_rows(tmp_path / "rows.jsonl", found.rows)
    assert read_rows(tmp_path / "rows.jsonl") == found.rows


def test_easy_data_is_solved_and_correctness_matches_the_rows(tmp_path):
    names = ["red", "green", "blue"]
    gallery, test = Colours([0, 1, 2] * 30, names), Colours([0, 1, 2] * 15, names, seed=1)
    found = evaluate(CONFIG, [raw()], gallery, test, tmp_path, QUIET)
    values = {r.metric: r.value for r in found.rows if r.metric in ("knn_top1", "linear_top1")}
    assert values == {"knn_top1": 100, "linear_top1": 100}
    kept = Predictions.load(tmp_path / "predictions.safetensors")
    right = {key: 100 * float((said == kept.labels).float().mean()) for key, said in kept.said.items()}
    assert right == {f"raw/pixels@32/{m}": v for m, v in values.items()}


def test_same_again_is_the_same_and_a_killed_evaluation_redoes_nothing(scenes, tmp_path):
    made: list[Counted] = []
    config = EvaluateConfig(ks=[5, 10], probe_lrs=[1.0], probe_steps=10)

    def opened(fail_at=None):
        def open_(i):
            if i == fail_at:
                raise KeyboardInterrupt
            made.append(Counted(i))
            return made[-1]

        return [Subject(f"students/{i}", "torch-fp32", lambda i=i: open_(i), P, f"weights {i}") for i in range(3)]

    with pytest.raises(KeyboardInterrupt):
        evaluate(config, opened(fail_at=2), *scenes, tmp_path / "a", QUIET)
    assert [m.images for m in made] == [250, 250]
    made.clear()
    resumed = evaluate(config, opened(), *scenes, tmp_path / "a", QUIET)
    assert [m.images for m in made] == [250]  # what is done is not even opened
    fresh = evaluate(config, opened(), *scenes, tmp_path / "b", QUIET)
    assert resumed.rows == fresh.rows
    for key, said in fresh.predictions.said.items():
        assert torch.equal(said, resumed.predictions.said[key])


def test_subjects_of_one_preprocessing_read_the_images_once(tmp_path):
    class Reads(Colours):
        count = 0

        def image(self, i):
            self.count += 1
            return super().image(i)

    gallery, test = Reads([0, 1] * 30), Reads([0, 1] * 30, seed=1)
    other = replace(PLAIN, size=16, resize=16)
    subjects = [raw(), raw(other), Subject("teacher", "torch-fp32", Counted, PLAIN)]
    found = evaluate(CONFIG, subjects, gallery, test, tmp_path, QUIET)
    assert (gallery.count, test.count) == (120, 120)
    assert [(r.subject, r.conditions["resolution"]) for r in by_metric(found.rows, "linear_top1")] == [
        ("raw", 32),
        ("raw", 16),
        ("teacher", 32),
    ]


def test_paired_differences(scenes, tmp_path):
    subjects = [
        Subject("students/small", "torch-fp32", lambda: Counted(0), P),
        Subject("control/small", "torch-fp32", lambda: Counted(1), P),
        Subject("teacher", "torch-fp32", lambda: Counted(1), replace(P, resize=40)),
        raw(replace(P, size=16, resize=16)),
    ]
    found = evaluate(CONFIG, subjects, *scenes, tmp_path, QUIET)
    values = {(r.subject, r.metric): r.value for r in found.rows}
    names = ["students/small/torch-fp32", "control/small/torch-fp32", "raw/pixels", "control/small/onnx-int8"]
    rows = paired_rows(Predictions.load(tmp_path / "predictions.safetensors"), [(names[0], other) for other in names])
    assert [r.metric for r in rows] == ["knn_top1_difference", "linear_top1_difference"] * 4
    for row in rows[2:4]:
        metric = row.metric.removesuffix("_difference")
        assert row.value == pytest.approx(values["students/small", metric] - values["control/small", metric])
        assert row.low < row.value < row.high
        assert (row.subject, row.target, row.n) == ("students/small", "torch-fp32", 90)
        c = row.conditions
        assert (c["versus"], c["data"], c["resolution"]) == (names[1], scenes[1].name, 32)
        assert row.value == pytest.approx(100 * (c["gained"] - c["lost"]) / 90)
        assert 0 < c["agreement_percent"] < 100
        assert 0 <= c["mcnemar_p"] <= 1
    assert all(r.value == 0 and r.conditions["agreement_percent"] == 100 for r in rows[:2])
    # The same images at another resolution are still the same images.
    assert [(r.status, r.conditions["versus_resolution"]) for r in rows[4:6]] == [("measured", 16)] * 2
    assert rows[4].value == pytest.approx(values["students/small", "knn_top1"] - values["raw", "knn_top1"])
    assert all(r.status == "not measured" and "onnx-int8 was not measured" in r.reason for r in rows[6:])


class CannotRun(Exception):
    pass


def test_unrunnable_and_wrong_encoders(scenes, tmp_path):
    def no_gpu():
        raise CannotRun("No GPU here: this engine needs one.")

    class FailsLater(Counted):
        def __call__(self, x):
            raise CannotRun("The engine does not execute here.")

    subjects = [Subject("students/a", "rtx-fp16", no_gpu, P), Subject("students/b", "torch-fp32", FailsLater, P, "w"), raw(P)]
    found = evaluate(CONFIG, subjects, *scenes, tmp_path, QUIET, unrunnable=(CannotRun,))
    assert [r.reason for r in found.rows[:4]] == ["No GPU here: this engine needs one."] * 2 + [
        "The engine does not execute here."
    ] * 2
    assert by_metric(found.rows, "knn_top1")[2].status == "measured"
    with pytest.raises(CannotRun):
        evaluate(CONFIG, subjects, *scenes, tmp_path, QUIET)
    with pytest.raises(AssertionError, match="measured as"):
        evaluate(CONFIG, [Subject("raw", "onnx-int8", Plain, P)], *scenes, tmp_path, QUIET)


def test_features_that_are_not_finite_count_as_wrong(tmp_path):
    class Broken(Plain):
        """NaN for every image that is hardly blue, as a half-precision overflow would be."""

        def __call__(self, x):
            f = super().__call__(x)
            bad = x[:, 2].mean((1, 2)) < 0.4
            f.cls[bad] = float("nan")
            return f

    gallery, test = Colours([0, 1, 2, 3] * 20), Colours([0, 1, 2, 3] * 10, seed=1)
    config = EvaluateConfig(ks=[5, 10])
    found = evaluate(config, [Subject("raw", "pixels", Broken, PLAIN)], gallery, test, tmp_path, QUIET)
    for metric in ("knn_top1", "linear_top1"):
        (row,) = by_metric(found.rows, metric)
        assert row.value == 75
        assert row.conditions["not_finite"] == 30
    assert (found.predictions.said["raw/pixels@32/knn_top1"] == -1).sum() == 10


def test_all_features_nan_is_a_sentence(tmp_path):
    class Nan(Plain):
        def __call__(self, x):
            f = super().__call__(x)
            return Features(f.cls * float("nan"), f.patches)

    data = Colours([0, 1] * 30), Colours([0, 1] * 30, seed=1)
    found = evaluate(CONFIG, [Subject("raw", "pixels", Nan, PLAIN)], *data, tmp_path, QUIET)
    assert {r.status for r in found.rows} == {"not measured"}
    assert "NaN" in found.rows[0].reason


@pytest.mark.parametrize(
    ("gallery", "test", "words"),
    [
        (Colours(None), Colours([0, 1]), "gallery .* no labels"),
        (Colours([0, 1]), Colours(None), "test set .* no labels"),
        (Colours([0, 1]), Colours([-1, -1]), "test set .* no labels"),
        (Colours([1, 1, 1]), Colours([1, 0]), "one class"),
        (Colours([0, 1]), Colours([0, 1]), "same images"),
        (Colours([0, 1]), Colours([]), "holds no image"),
        (Colours([0, 1], ["red", "blue"]), Colours([0, 0], ["green"], seed=1), "No image of the test set"),
    ],
)
def test_what_cannot_be_judged_is_a_sentence(gallery, test, words, tmp_path):
    made = []
    subject = Subject("teacher", "torch-fp32", lambda: made.append(1), PLAIN)
    found = evaluate(CONFIG, [subject, raw()], gallery, test, tmp_path, QUIET)
    assert [(r.subject, r.metric, r.status) for r in found.rows] == [
        (s, m, "not measured") for s in ("teacher", "raw") for m in ("knn_top1", "linear_top1")
    ]
    assert all(re.search(words, r.reason) for r in found.rows)
    assert made == []
    rows = paired_rows(found.predictions, [("teacher/torch-fp32", "raw/pixels")])
    assert [r.status for r in rows] == ["not measured"] * 2


def test_labels_are_matched_by_class_name_and_unknown_ones_left_out(tmp_path):
    gallery = Colours([0, 1, 2] * 30, ["blue", "green", "red"])
    test = Colours([0, 1, 2, -1] * 20, ["red", "violet", "blue"], seed=1)
    split = align(gallery, test)
    assert split.test.tolist() == [i for i in range(80) if i % 4 in (0, 2)]
    assert split.test_labels.tolist() == [2, 0] * 20
    assert split.left_out == 40
    found = evaluate(CONFIG, [raw()], gallery, test, tmp_path, QUIET)
    (row,) = by_metric(found.rows, "knn_top1")
    assert (row.value, row.n, row.conditions["test_left_out"]) == (100, 40, 40)


def test_few_images_are_flagged_and_small_galleries_are_graceful(tmp_path):
    gallery, test = Colours([0, 1, 0, 1, 0, 1]), Colours([0, 1] * 5, seed=1)
    config = EvaluateConfig(ks=[2, 20], probe_lrs=[1.0], probe_steps=20)
    rows = evaluate(config, [raw()], gallery, test, tmp_path, QUIET).rows
    assert all(r.conditions["few_samples"] is True for r in rows)
    (knn,) = by_metric(rows, "knn_top1")
    assert (knn.status, knn.conditions["k"], knn.conditions["k_chosen"]) == ("measured", 2, "the only one given")
    rows = evaluate(EvaluateConfig(probe_steps=20), [raw()], gallery, test, tmp_path / "b", QUIET).rows
    (knn,) = by_metric(rows, "knn_top1")
    assert "6 images, fewer than the smallest k (10)" in knn.reason
    assert by_metric(rows, "linear_top1")[0].status == "measured"


def test_shots(tmp_path):
    gallery, test = Colours([0, 1, 2] * 30), Colours([0, 1, 2] * 15, seed=1)
    config = EvaluateConfig(ks=[3], shots=4, probe_lrs=[1.0], probe_steps=20)
    rows = evaluate(config, [raw()], gallery, test, tmp_path, QUIET).rows
    assert all((r.conditions["gallery_size"], r.conditions["shots"]) == (12, 4) for r in rows)


def test_unreadable_images_of_a_folder_are_left_out(tmp_path):
    for role, n in (("gallery", 12), ("test", 6)):
        for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
            folder = tmp_path / role / name
            folder.mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (40, 30), tuple(c + (i + 1) * (role == "test") for c in colour)).save(folder / f"{i}.png")
        (tmp_path / role / "red" / "broken.png").write_bytes(b"\x89PNG nothing more")
    gallery, test = (FolderConfig(path=str(tmp_path / role), labels=True).build() for role in ("gallery", "test"))
    config = EvaluateConfig(ks=[3], probe_lrs=[1.0], probe_steps=20)
    rows = evaluate(config, [raw()], gallery, test, tmp_path / "out", QUIET).rows
    (knn,) = by_metric(rows, "knn_top1")
    assert (knn.value, knn.n, knn.conditions["gallery_size"]) == (100, 12, 24)


def test_predictions_of_an_absent_or_damaged_file(tmp_path):
    for content in (None, b"junk"):
        path = tmp_path / "predictions.safetensors"
        if content:
            path.write_bytes(content)
        with pytest.raises(UserError, match="Run the evaluation"):
            Predictions.load(path)


def test_config_problems():
    assert issubclass(EvaluateConfig, Config)
    assert EvaluateConfig().problems() == []
    bad = EvaluateConfig(ks=[0, 5], temperature=0.0, shots=-1, probe_lrs=[], probe_steps=0)
    assert len(bad.problems()) == 5
    assert EvaluateConfig(ks=[5, 5]).problems()


def test_an_accidental_duplicate_refuses_nothing_and_is_told(tmp_path):
    for split, n in (("train", 6), ("test", 110)):
        for i in range(n):
            path = tmp_path / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), (7 * i + (split == "test")) % 251, np.uint8)).save(path)
    copied = tmp_path / "train" / "a" / "0.png"
    (tmp_path / "test" / "a" / "copy.png").write_bytes(copied.read_bytes())
    train, test = (FolderConfig(path=str(tmp_path / split), labels=True).build() for split in ("train", "test"))
    assert align(train, test).conditions()["test_in_gallery"] == 1
    for i in range(6):
        (tmp_path / "test" / "b" / f"copy{i}.png").write_bytes(copied.read_bytes())
    assert "are also in" in align(train, FolderConfig(path=str(tmp_path / "test"), labels=True).build())
