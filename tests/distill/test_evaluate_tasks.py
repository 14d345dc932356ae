"""Tasks beside the main gallery and test set: classification on further sets, and what the machinery does for every kind."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from distill.data.preprocess import Preprocess
from distill.data.sources import DatasetsConfig, ParquetConfig
from distill.encoder import Features, RawPixels
from distill.errors import UserError
from distill.evaluate import linear
from distill.evaluate.classify import ClassificationTask, ClassifyConfig, classify, head_of
from distill.evaluate.config import EvaluateConfig
from distill.evaluate.judged import Judged, Outcome
from distill.evaluate.kept_heads import head_path, kept_heads
from distill.evaluate.linear_head import Head
from distill.evaluate.pairs import Predictions
from distill.evaluate.reader import ImageSets, Subject, SubjectReader
from distill.evaluate.scores import Score, ScoreBook
from distill.evaluate.split import Split
from distill.evaluate.store import FeatureStore
from distill.evaluate.suite import Evaluation, evaluate
from distill.evaluate.task import Stored, Unfit, Unscored
from distill.evaluate.tasks import KINDS, takes_part
from distill.files import write_bytes
from distill.progress import Progress

QUIET = Progress("quiet")
P = Preprocess(size=32, resize=32, normalize="none")
SMALL = {"ks": [3, 5], "probe_lrs": [1.0], "probe_steps": 30}


class Colours:
    """Single-coloured noisy images: label = hue."""

    def __init__(self, labels, seed=0, name="colours", classes=None):
        self._labels = None if labels is None else np.array(labels, np.int64)
        self.n, self.seed, self.name, self.classes = len(labels or range(12)), seed, name, classes

    def __len__(self):
        return self.n

    def labels(self):
        return self._labels

    def fingerprint(self):
        return f"{self.name}-{self.seed}-{self._labels}"

    def image(self, i):
        rng = np.random.default_rng((self.seed, i))
        hues = [(150, 90, 90), (90, 150, 90), (90, 90, 150), (150, 150, 90)]
        hue = hues[0 if self._labels is None else self._labels[i]]
        return Image.fromarray(np.clip(hue + rng.normal(0, 60, (32, 32, 3)), 0, 255).astype(np.uint8))


class Seen:
    """The picture at 4 x 4 px with noise of a seed, at three layers; counts what it is asked."""

    target = "torch-fp32"
    depth = 3

    def __init__(self, noise: float = 0.0):
        self.noise, self.images, self.opened = noise, 0, 0
        self.conditions = {"runtime": "seen"}

    def layers(self, x: torch.Tensor, n: int) -> list[Features]:
        self.images += len(x)
        cells = torch.nn.functional.avg_pool2d(x, 8).flatten(1)
        g = torch.Generator().manual_seed(int(x.sum() * 100) % 2**31)
        cells = cells + self.noise * torch.randn(cells.shape, generator=g)
        return [Features(cells + i, cells.unflatten(1, (16, 3))) for i in range(n)]

    def __call__(self, x: torch.Tensor) -> Features:
        return self.layers(x, 1)[0]


class CannotRun(Exception):
    pass


def subject(name: str, encoder: Any, weights: str | None = "") -> Subject:
    def opened():
        if isinstance(encoder, Exception):
            raise encoder
        encoder.opened += 1
        return encoder

    return Subject(name, "torch-fp32", opened, P, name if weights == "" else weights)


MAIN = Colours([0, 1, 2] * 20), Colours([0, 1, 2] * 10, seed=1)
FINE = {"train": Colours([0, 1, 2, 3] * 10, name="fine"), "test": Colours([3, 2, 1, 0] * 9, seed=1, name="fine/test")}
TASK = ClassificationTask(train="x", test="y", **SMALL)


def config(**tasks) -> EvaluateConfig:
    return EvaluateConfig(**SMALL).model_copy(update={"tasks": tasks})


def run(tmp_path, subjects, sources=FINE, task=TASK, pairs=(), main=MAIN) -> Evaluation:
    return evaluate(config(fine=task), subjects, *main, tmp_path, QUIET, (CannotRun,), {"fine": sources}, pairs)


def of_task(rows, metric=None, status="measured"):
    return [r for r in rows if r.conditions.get("task") == "fine" and metric in (None, r.metric) and r.status == status]


def test_a_further_set_gives_the_same_kinds_of_rows(tmp_path):
    found = run(tmp_path, [subject("teacher", Seen()), subject("students/a", Seen(0.3))])
    rows = of_task(found.rows)
    assert [(r.subject, r.metric) for r in rows] == [
        (s, m) for s in ("teacher", "students/a") for m in ("knn_top1", *["knn_top1_at_k"] * 2, "linear_top1")
    ]
    for row in rows:
        c = row.conditions
        assert (c["kind"], c["data"], c["gallery"], c["resolution"], c["runtime"]) == (
            "classification",
            "fine/test",
            "fine",
            32,
            "seen",
        )
        assert (c["gallery_size"], c["classes"], row.n) == (40, 4, 36)
        assert c["data_fingerprint"] == FINE["test"].fingerprint()
        assert all(isinstance(v, str | int | float | bool) for v in c.values())
    assert of_task(found.rows, "knn_top1")[0].value == 100
    assert of_task(found.rows, "knn_top1")[0].conditions["chosen_k"] in (3, 5)
    # The main pair asked about the same images says the same.
    same = evaluate(config(), [subject("teacher", Seen())], FINE["train"], FINE["test"], tmp_path / "b", QUIET)
    by_metric = {r.metric: r.value for r in same.rows if r.metric in ("knn_top1", "linear_top1")}
    assert by_metric == {r.metric: r.value for r in rows[:4] if r.metric != "knn_top1_at_k"}


def test_switches_logistic_few_shot_and_layers(tmp_path):
    more = {"knn": False, "logistic": True, "few_shot": [1, 5], "few_shot_draws": 2, "probe_layers": [1, 2, 9]}
    task = TASK.model_copy(update=more)
    assert task.metrics() == ("linear_top1", "logistic_top1", "few_shot_top1")
    found = run(tmp_path, [subject("teacher", Seen()), subject("students/a", Seen(0.3))], task=task)
    rows = of_task(found.rows)[:4]
    assert [(r.metric, r.conditions.get("shots")) for r in rows] == [
        ("linear_top1", None),
        ("logistic_top1", None),
        ("few_shot_top1", 1),
        ("few_shot_top1", 5),
    ]
    linear = rows[0].conditions
    assert (linear["probe_layers"], linear["probe_layers_lacking"]) == ("1, 2", "9")
    assert rows[1].value == 100
    assert rows[1].conditions["converged"] is True
    assert rows[2].conditions["draws"] == 2
    book = ScoreBook.load(tmp_path / "scores.safetensors")
    assert {"fine/teacher/torch-fp32@32/few_shot_top1-shots1", "fine/teacher/torch-fp32@32/logistic_top1"} <= book.stats.keys()


def test_the_main_pair_has_them_too_and_differences(tmp_path):
    main = EvaluateConfig(**SMALL, logistic=True, few_shot=[2], few_shot_draws=3)
    subjects = [subject("teacher", Seen()), subject("students/a", Seen(1.0))]
    found = evaluate(main, subjects, *MAIN, tmp_path, QUIET, pairs=[("teacher/torch-fp32", "students/a/torch-fp32")])
    values = {(r.subject, r.metric): r for r in found.rows if r.status == "measured"}
    for metric in ("knn_top1", "linear_top1", "logistic_top1", "few_shot_top1"):
        a, b = (values[s, metric] for s in ("teacher", "students/a"))
        (difference,) = (r for r in found.rows if r.metric == f"{metric}_difference")
        assert difference.value == pytest.approx(a.value - b.value)
        assert a.low <= a.value <= a.high
        assert a.n == 30
    assert set(Predictions.load(tmp_path / "predictions.safetensors").said) == {
        f"{s}/torch-fp32@32/{m}" for s in ("teacher", "students/a") for m in ("knn_top1", "linear_top1", "logistic_top1")
    }


def test_differences_of_a_task_are_paired(tmp_path):
    subjects = [subject("teacher", Seen()), subject("students/a", Seen(1.0)), subject("raw", Seen(2.0), None)]
    names = [f"{s.subject}/torch-fp32" for s in subjects]
    found = run(tmp_path, subjects, pairs=[(names[0], names[1]), (names[0], names[2]), (names[0], "students/b/torch-fp32")])
    values = {(r.subject, r.metric): r.value for r in of_task(found.rows)}
    rows = [r for r in of_task(found.rows) if r.metric.endswith("_difference")]
    assert [(r.metric, r.conditions["versus"]) for r in rows] == [
        (f"{m}_difference", v) for v in names[1:] for m in ("knn_top1", "linear_top1")
    ]
    assert rows[0].value == pytest.approx(values["teacher", "knn_top1"] - values["students/a", "knn_top1"])
    assert rows[0].low <= rows[0].value <= rows[0].high


def test_differences_are_those_of_the_same_resolution():
    book, right = ScoreBook(), np.stack([np.arange(40) % 2, np.ones(40)], 1)
    for name, sizes in (("a", (32, 48)), ("b", (32,)), ("c", (64,))):
        for size in sizes:
            stats = np.roll(right, size == 48, 0) * (1 if name == "a" else [[0, 1]])
            book.rows(name, "t", {"task": "x", "resolution": size}, [Score("map", "percent", stats)])
    ab, bc, ac = (book.differences([pair]) for pair in (("a/t", "b/t"), ("b/t", "c/t"), ("a/t", "c/t")))
    assert [(r.value, r.conditions["resolution"], r.conditions.get("versus_resolution")) for r in ab] == [(50, 32, None)]
    assert [(r.value, r.conditions["versus_resolution"]) for r in bc] == [(0, 64)]
    assert ac == []  # which of the two it should be nobody can say


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (FINE | {"train": Colours(None, name="bare")}, "gallery bare has no labels"),
        (FINE | {"test": Colours(None, name="bare")}, "test set bare has no labels"),
        (FINE | {"train": FINE["test"]}, "same images"),
    ],
)
def test_sets_that_cannot_be_judged_are_a_sentence_and_the_rest_goes_on(tmp_path, sources, words):
    mine = Seen()
    found = run(tmp_path, [subject("teacher", mine)], sources)
    rows = of_task(found.rows, status="not measured")
    assert [r.metric for r in rows] == ["knn_top1", "linear_top1"]
    assert all(words in r.reason for r in rows)
    assert [r.status for r in found.rows if r.metric == "knn_top1" and "task" not in r.conditions] == ["measured"]
    assert mine.opened == 1  # for the main pair


def test_columns_of_several_labels(tmp_path):
    """Found by itself such a column is no label; named, it is refused before anything starts."""
    import datasets

    table = {"image": [Image.new("RGB", (8, 8))] * 4, "labels": [[0], [1, 2], [], [0]]}
    table_ = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
    table_.to_parquet(tmp_path / "multi.parquet")
    assert ParquetConfig(path=str(tmp_path / "multi.parquet")).build().labels() is None
    with pytest.raises(UserError, match=r"The column 'labels' of .* cannot be its label"):
        ParquetConfig(path=str(tmp_path / "multi.parquet"), label="labels").build()


class Lengths(ClassificationTask):
    """A dense kind: the images' count as a score; a subject called students/bad is unfit for it."""

    kind: Any = "lengths"
    unfit: bool = False

    def metrics(self):
        return "length", "width"

    def judge_and_head(self, reader, sources, progress):
        if reader.subject.subject == "students/bad":
            raise Unfit("Its tokens fill no square grid.")
        n = len(reader.read(sources["test"], patches=True).patches[0])
        return [Score("length", "share", np.ones((n, 2))), Unscored("width", "Nothing is wide.")], None


def test_every_kind_is_run_alike(tmp_path):
    bad, random, raw = Seen(), Seen(), Seen()
    subjects = [
        subject("raw", raw, None),
        subject("random/teacher", random),
        subject("students/bad", bad),
        subject("students/gone", CannotRun("No GPU here.")),
        subject("teacher", Seen()),
    ]
    found = run(tmp_path, subjects, task=Lengths(train="x", test="y"), main=(None, None))
    rows = [r for r in found.rows if r.conditions.get("task") == "fine"]
    assert [(r.subject, r.metric, r.value, r.reason) for r in rows] == [
        ("students/bad", "length", None, "Its tokens fill no square grid."),
        ("students/bad", "width", None, "Its tokens fill no square grid."),
        ("students/gone", "length", None, "No GPU here."),
        ("students/gone", "width", None, "No GPU here."),
        ("teacher", "length", 1.0, None),
        ("teacher", "width", None, "Nothing is wide."),
    ]
    assert (raw.opened, random.opened) == (0, 0)
    main = [r for r in found.rows if "task" not in r.conditions]
    assert {r.reason for r in main} == {"The recipe names no test set (data.test)."}
    assert len(main) == 10


class Heads(Lengths):
    """A kind that trains something worth keeping."""

    def fit(self, reader, sources, progress):
        trained.append(reader.subject.subject)
        return SimpleNamespace(save=lambda path: write_bytes(path, b"head"))

    def scores(self, head, reader, sources, progress):
        return [Score("length", "share", np.ones((4, 2)))]


trained: list[str] = []


def test_heads_are_kept_and_outlive_the_evaluations_folder(tmp_path):
    trained.clear()
    one, task = subject("students/a", Seen()), Heads(train="x", test="y")
    names = []
    for folder in ("a", "b"):  # as when a stage's settings change: its folder goes, what is kept stays
        evaluate(config(fine=task), [one], None, None, tmp_path / folder, QUIET, (), {"fine": FINE}, (), tmp_path / "kept")
        head = head_path(tmp_path / folder, "fine", one)
        assert head.read_bytes() == b"head"
        names.append(head.relative_to(tmp_path / folder))
    assert trained == ["students/a"]
    assert str(names[0]) == "tasks/fine/head-students.a-torch-fp32-32.safetensors"
    for path in (tmp_path / "kept" / "judged").glob("*.head.safetensors"):
        path.unlink()
    evaluate(config(fine=task), [one], None, None, tmp_path / "c", QUIET, (), {"fine": FINE}, (), tmp_path / "kept")
    assert trained == ["students/a"] * 2


def test_who_takes_part():
    assert [takes_part(TASK, s) for s in ("raw", "random/a", "teacher")] == [True, True, True]
    dense = TASK.model_copy(update={"kind": "depth"})
    assert [takes_part(dense, s) for s in ("raw", "random/a", "teacher", "control/a")] == [False, False, True, True]


def test_a_killed_evaluation_repeats_neither_features_nor_judgements(tmp_path, monkeypatch):
    judged: list[str] = []
    real = ClassificationTask.judge_and_head

    def judge(self, reader, sources, progress):
        if reader.subject.subject == "students/b" and not judged.count("again"):
            raise KeyboardInterrupt
        judged.append(reader.subject.subject)
        return real(self, reader, sources, progress)

    monkeypatch.setattr(ClassificationTask, "judge_and_head", judge)
    encoders = [Seen(i / 10) for i in range(3)]
    subjects = [subject(name, e) for name, e in zip(("teacher", "students/a", "students/b"), encoders, strict=True)]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", subjects)
    assert judged == ["teacher", "students/a"]
    asked = [e.images for e in encoders]
    judged[:] = ["again"]
    found = run(tmp_path / "a", subjects)
    assert judged == ["again", "students/b"]
    assert [e.images for e in encoders] == [*asked[:2], asked[2] + 76]
    judged[:] = ["again"]
    assert found.rows == run(tmp_path / "b", subjects).rows
    changed = run(tmp_path / "a", subjects, task=TASK.model_copy(update={"probe_steps": 31}))
    assert of_task(changed.rows)[3].conditions["probe_steps"] == 31


def test_kept_judgements_are_only_trusted_whole_and_of_the_same(tmp_path):
    store, one = Judged(tmp_path), subject("teacher", Seen())
    key = store.key(one, {"test": "f"}, {"steps": 3})
    outcome = Outcome({"runtime": "r"}, [({"metric": "a"}, np.arange(6.0).reshape(3, 2)), ({"metric": "b"}, None)])
    store.put(key, outcome)
    back = store.get(key)
    assert back.conditions == outcome.conditions
    assert [said for said, _ in back.records] == [{"metric": "a"}, {"metric": "b"}]
    assert np.array_equal(back.records[0][1], outcome.records[0][1])
    assert back.records[1][1] is None
    assert store.get(store.key(replace(one, weights="other"), {"test": "f"}, {"steps": 3})) is None
    assert store.key(replace(one, weights=None), {}, {}) is None
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:50])
    assert store.get(key) is None


def test_settings():
    assert {name: kind.model_fields["kind"].default for name, kind in KINDS.items()} == {name: name for name in KINDS}
    asked = {"fine": {"kind": "classification", "train": "a", "test": {"kind": "datasets", "name": "b"}}}
    found = EvaluateConfig.model_validate({"tasks": asked}).tasks["fine"]
    assert isinstance(found, ClassificationTask)
    assert found.sources() == {"train": "a", "test": DatasetsConfig(name="b")}
    with pytest.raises(ValidationError, match="kind"):
        EvaluateConfig.model_validate({"tasks": {"fine": {"kind": "nonsense"}}})
    assert ClassifyConfig().headlines() == ("knn_top1", "linear_top1")
    assert len(EvaluateConfig(few_shot=[0], few_shot_draws=0, probe_layers=[], batch=0).problems()) == 4
    off = ClassificationTask(train="a", test="b", knn=False, linear=False, seed=-1)
    assert len(off.problems()) == 2


def test_no_kind_takes_a_negative_seed():
    scenes, clips = {"kind": "scenes", "map": "depth"}, {"path": "clips"}
    data = {"segmentation": {"kind": "scenes"}, "depth": scenes, "video": clips}
    for kind in (k for k, config in KINDS.items() if "seed" in config.model_fields):
        name = "data" if "data" in KINDS[kind].model_fields else "train"
        sets = dict.fromkeys([name, *(["test"] if name == "train" else [])], data.get(kind, "x"))
        read = KINDS[kind].model_validate({"kind": kind, **sets, "seed": -1})
        assert read.problems() == ["seed must be at least 0, got -1"], kind


def test_parts_of_one_table_that_overlap_are_a_sentence(tmp_path):
    """A limit takes the beginning of a fixed order: the test images are all among those of the gallery."""
    import datasets

    table = {"image": [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(40)], "label": [0, 1] * 20}
    datasets.Dataset.from_dict(table).cast_column("image", datasets.Image()).to_parquet(tmp_path / "a.parquet")
    train, test = (ParquetConfig(path=str(tmp_path / "a.parquet"), limit=n).build() for n in (30, 10))
    found = run(tmp_path, [subject("teacher", Seen())], {"train": train, "test": test})
    reasons = {r.reason for r in of_task(found.rows, status="not measured")}
    assert len(reasons) == 1
    assert "10 of the 10 items of the test set" in reasons.pop()


def test_features_too_wide_for_logistic_regression_are_a_reason(monkeypatch):
    from distill.evaluate import classify as module

    monkeypatch.setattr(module, "WIDEST", 10)
    settings = ClassifyConfig(**SMALL, logistic=True, few_shot=[1])
    x = torch.randn(30, 20).numpy()[None]
    labels = torch.arange(30) % 3
    split = Split(torch.arange(30), labels, torch.arange(30), labels, 0)
    reader = SimpleNamespace(depth=1, read=lambda source, layers: Stored(x, x))
    answers = {a.metric: a for a in module.classify(settings, reader, split, *MAIN)}
    assert "20 numbers" in answers["logistic_top1"].reason
    assert "20 numbers" in answers["few_shot_top1"].reason
    assert answers["knn_top1"].predicted is not None


def test_raw_pixels_of_large_images_are_averaged_down():
    large = torch.rand(2, 3, 96, 96)
    found = RawPixels()(large)
    assert found.cls.shape == (2, 3 * 48 * 48)
    small = RawPixels()(torch.nn.functional.avg_pool2d(large, 2))
    assert torch.allclose(found.cls, small.cls, atol=1e-5)


@pytest.mark.parametrize("layers", [[1], [2]])
def test_a_classifiers_logits_are_the_probes(layers):
    """Of classes that overlap, are not equally many and whose features differ in scale, so that every array of the head matters."""
    g = torch.Generator().manual_seed(0)
    labels = torch.tensor([3, 3, 3, 3, 7, 7, 12]).repeat(30)
    noise = torch.randn(2, 2, len(labels), 10, generator=g) * torch.logspace(0, 2, 10)
    cls, mean_patch = (x + 5 + 0.1 * labels[:, None] for x in noise)
    order = torch.arange(len(labels))
    reader = SimpleNamespace(depth=2, read=lambda source, layers: Stored(cls[-layers:].numpy(), mean_patch[-layers:].numpy()))
    settings = ClassifyConfig(ks=[3], probe_lrs=[1.0], probe_steps=60, probe_layers=layers)
    answers = classify(settings, reader, Split(order, labels, order, labels, 0), *MAIN)
    (linear_,) = (a for a in answers if a.metric == "linear_top1")
    assert 55 < 100 * linear_.right.mean() < 95
    features = [Features(c, m[:, None]) for c, m in zip(cls, mean_patch, strict=True)][-layers[0] :]
    found = linear.probe(features, labels, features, settings.probe())
    head = head_of(answers)
    assert (head.layers, head.mean_patch, head.values.tolist()) == (layers[0], "mean_patch" in found.features, [3, 7, 12])
    inputs = linear.probe_features(features, head.mean_patch)
    logits = ((inputs.numpy() - head.shift) * head.scale) @ head.weight.T + head.bias
    np.testing.assert_allclose(logits, found.heads.logits(inputs)[:, 0].numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(head.values[logits.argmax(1)], linear_.predicted)


def test_the_linear_probes_classifier_is_kept_and_says_what_the_probe_said(tmp_path):
    one, raw = subject("students/a", Seen()), subject("raw", Seen(), None)
    hues = ["red", "green", "blue", "grey"]
    train = Colours([0, 1, 2, 3] * 10, name="fine", classes=hues)
    sources = {"train": train, "test": Colours([3, 2, 1, 0] * 9, seed=1, name="fine/test", classes=hues)}

    def judged(folder: str) -> Evaluation:
        arguments = (tmp_path / folder, QUIET, (), {"fine": sources}, (), tmp_path / "kept")
        return evaluate(config(fine=ClassificationTask(train="x", test="y", knn=False, **SMALL)), [raw, one], *MAIN, *arguments)

    found = judged("a")
    heads = kept_heads(tmp_path / "a", "students/a")
    assert [(h.task, h.target, h.resolution) for h in heads] == [("fine", "torch-fp32", 32), ("main", "torch-fp32", 32)]
    assert kept_heads(tmp_path / "a", "raw") == []  # a yardstick knows nothing worth keeping
    head = Head.load(heads[0].path)
    assert (head.kind, head.layers, head.cls) == ("classification", 1, True)
    assert head.names == [hues[int(v)] for v in head.values]
    mine = SubjectReader(one, FeatureStore(tmp_path / "read"), ImageSets(), 16, QUIET).read(sources["test"])
    inputs = np.concatenate([mine.cls[-1], *([mine.mean_patch[-1]] if head.mean_patch else [])], 1)
    said = head.values[(((inputs - head.shift) * head.scale) @ head.weight.T + head.bias).argmax(1)]
    value = next(r.value for r in of_task(found.rows, "linear_top1") if r.subject == "students/a")
    assert 100 * (said == sources["test"].labels()).mean() == pytest.approx(value)
    for path in (tmp_path / "kept" / "judged").glob("*.head.safetensors"):
        path.unlink()
    assert judged("b").rows == found.rows
    assert [h.path.read_bytes() for h in kept_heads(tmp_path / "b", "students/a")] == [h.path.read_bytes() for h in heads]
