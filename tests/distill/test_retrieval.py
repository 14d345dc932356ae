"""Retrieval, copy detection and dense matching against scikit-learn and by hand."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from sklearn.metrics import average_precision_score

from distill.evaluate.copies import CopyDetectionTask, pair_counts
from distill.evaluate.dense_matching import MatchingTask, SecondViews, grid_centres, view_of
from distill.evaluate.retrieval import RetrievalTask, rank
from distill.evaluate.scores import Score
from distill.evaluate.task import Stored, Unfit
from distill.progress import Progress

QUIET = Progress("quiet")


class Labelled:
    """A source with labels and nothing to see."""

    classes = None

    def __init__(self, labels, name="set"):
        self._labels, self.name = None if labels is None else np.array(labels, np.int64), name

    def __len__(self):
        return len(self._labels)

    def labels(self):
        return self._labels

    def fingerprint(self):
        return self.name


class FakeReader:
    resolution, depth = 32, 1

    def __init__(self, features):
        self.features = features

    def read(self, source, *, patches=False, layers=1, fit="crop"):
        found = self.features[source.name]
        return found if isinstance(found, Stored) else Stored(found[None], found[None])


def features(n, d=8, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def test_average_precision_is_scikit_learns():
    queries, database = (torch.from_numpy(features(n, seed=n)) for n in (20, 60))
    asked, labels = torch.arange(20) % 5, torch.arange(60) % 6
    found = rank(queries, database, asked, labels)
    sims = torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(database, dim=1).T
    wanted = [average_precision_score((labels == a).numpy(), s.numpy()) for a, s in zip(asked, sims, strict=True)]
    np.testing.assert_allclose(found.average_precision, wanted, atol=1e-6)
    first = [1 + int(np.flatnonzero((labels == a)[s.argsort(descending=True)])[0]) for a, s in zip(asked, sims, strict=True)]
    assert found.first.tolist() == first


def test_a_query_among_its_own_database_does_not_find_itself():
    task = RetrievalTask(data="x", ks=[1, 2])
    values = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9], [-1, -1]], np.float32)
    scores = task.judge(FakeReader({"set": values}), {"data": Labelled([0, 0, 1, 1, 7])}, QUIET)
    named = {(s.metric, s.conditions.get("k")): s for s in scores}
    assert named["map", None].value() == 100  # the fifth has no partner and does not count
    assert named["map", None].stats[:, 1].tolist() == [1, 1, 1, 1, 0]
    assert named["recall_at_k", 1].headline
    assert not named["recall_at_k", 2].headline


def test_queries_of_their_own_are_aligned_with_the_database():
    reader = FakeReader({"db": np.eye(3, dtype=np.float32), "ask": np.eye(3, dtype=np.float32)[[2, 0, 1]]})
    scores = RetrievalTask(data="x", queries="y").judge(
        reader, {"data": Labelled([0, 1, 2], "db"), "queries": Labelled([2, 0, 9], "ask")}, QUIET
    )
    assert scores[0].value() == 100
    assert len(scores[0].stats) == 2
    about = {"gallery_size": 3, "classes": 3, "test_left_out": 1}
    assert all(about.items() <= s.conditions.items() for s in scores)


def test_queries_that_are_in_the_database_are_a_sentence():
    class Part(Labelled):
        def shared_with(self, other):
            return 2

    sources = {"data": Part([0, 1, 2], "photos"), "queries": Part([0, 1, 2], "few")}
    with pytest.raises(Unfit, match="2 of the 3 items of the test set few are also in photos"):
        RetrievalTask(data="x", queries="y").judge(FakeReader({}), sources, QUIET)


def test_sets_that_cannot_be_searched_say_why():
    reader = FakeReader({"set": features(4)})
    with pytest.raises(Unfit, match="has no labels"):
        RetrievalTask(data="x").judge(reader, {"data": Labelled(None)}, QUIET)
    with pytest.raises(Unfit, match="nothing to retrieve"):
        RetrievalTask(data="x").judge(reader, {"data": Labelled([0, 1, 2, 3])}, QUIET)
    with pytest.raises(Unfit, match="copies are images of one label"):
        CopyDetectionTask(data="x").judge(reader, {"data": Labelled([0, 1, 2, 3])}, QUIET)
    assert RetrievalTask(data="x", ks=[0]).problems()
    assert CopyDetectionTask(data="x", ks=[]).problems()
    assert MatchingTask(data="x", alphas=[1.5]).problems()


def test_nan_features_find_nothing_and_break_nothing():
    values = features(6)
    values[0] = np.nan
    scores = RetrievalTask(data="x").judge(FakeReader({"set": values}), {"data": Labelled([0, 0, 1, 1, 2, 2])}, QUIET)
    assert np.isfinite(scores[0].stats).all()


def test_micro_ap_between_thresholds_is_near_the_exact_one():
    n, generator = 240, np.random.default_rng(3)
    groups = np.arange(n) % 80
    values = torch.from_numpy((generator.normal(size=(80, 16))[groups] + generator.normal(0, 0.8, (n, 16))).astype(np.float32))
    labels = torch.from_numpy(groups)
    stats = pair_counts(values, values, labels, labels)
    unit = torch.nn.functional.normalize(values, dim=1)
    sims, same, apart = unit @ unit.T, labels[:, None] == labels[None], ~torch.eye(n, dtype=bool)
    exact = 100 * average_precision_score(same[apart].numpy(), sims[apart].numpy())
    assert Score("micro_ap", "micro_ap", stats).value() == pytest.approx(exact, abs=0.5)
    assert 20 < exact < 95
    assert stats[:, : stats.shape[1] // 2].sum() == (same & apart).sum()  # every copy is counted once


def test_distractors_are_nobodys_copies():
    reader = FakeReader({"set": features(6), "noise": features(5, seed=9)})
    sources = {"data": Labelled([0, 0, 1, 1, 2, 2]), "distractors": Labelled([0, 0, 0, 0, 0], "noise")}
    scores = CopyDetectionTask(data="x", distractors="y").judge(reader, sources, QUIET)
    assert scores[0].stats[:, 1].sum() == 6
    assert {s.metric for s in scores} == {"map", "recall_at_k", "micro_ap"}
    assert {s.conditions["pooling"] for s in scores} == {"mean, not whitened"}
    scores = CopyDetectionTask(data="x", features="cls").judge(reader, {"data": sources["data"]}, QUIET)
    assert {(s.conditions["features"], s.conditions["pooling"]) for s in scores} == {("cls", "none")}


class Pictures:
    """Random dots on a ground, wider than high."""

    name, classes = "dots", None

    def __len__(self):
        return 6

    def labels(self):
        return None

    def fingerprint(self):
        return "dots"

    def image(self, index):
        image = Image.new("RGB", (160, 120), (30, 30, 30))
        draw = ImageDraw.Draw(image)
        x, y = np.random.default_rng(index).integers(60, 90, 2)
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=(250, 250, 250))
        return image


def bright(picture):
    """Where the dot is, in shares of width and height."""
    grey = np.asarray(picture.convert("L"), float)
    return (np.argwhere(grey > 0.9 * grey.max()).mean(0)[::-1] + 0.5) / np.array(picture.size)


def test_a_second_view_shows_each_point_where_its_matrix_says():
    for i in range(6):
        image = Pictures().image(i)
        view = view_of(i, 0, image.width / image.height)
        first, second = bright(image), bright(view.of(image))
        np.testing.assert_allclose(view.matrix[:, :2] @ second + view.matrix[:, 2], first, atol=0.02)


def test_second_views_are_the_same_every_time_and_named_by_their_seed():
    a, b = SecondViews(Pictures(), 0), SecondViews(Pictures(), 1)
    assert a.image(2).tobytes() == SecondViews(Pictures(), 0).image(2).tobytes()
    assert a.fingerprint() != b.fingerprint() != Pictures().fingerprint()
    assert np.asarray(a.image(2)).shape == (120, 160, 3)


def test_features_that_know_their_place_match_perfectly_and_noise_does_by_chance():
    side, source = 12, Pictures()
    places = grid_centres(side)
    coded = lambda xy: np.stack([np.cos(2 * xy), np.sin(2 * xy)], -1).reshape(*xy.shape[:-1], 4)  # noqa: E731
    first = np.stack([coded(places)] * 6).astype(np.float16)
    second = []
    for i in range(6):
        matrix = view_of(i, 0, 160 / 120).matrix
        second.append(coded(places @ matrix[:, :2].T + matrix[:, 2]))
    nothing = np.zeros((1, 6, 4), np.float32)
    features = {
        "dots": Stored(nothing, nothing, first[None]),
        "dots seen again": Stored(nothing, nothing, np.stack(second).astype(np.float16)[None]),
    }
    scores = {
        (s.metric, s.conditions["alpha"]): s
        for s in MatchingTask(data="x").judge(FakeReader(features), {"data": source}, QUIET)
    }
    assert scores["pck", 0.1].value() == 100
    assert scores["pck", 0.1].headline
    noise = np.random.default_rng(0).normal(size=(1, 6, side * side, 16)).astype(np.float16)
    features["dots seen again"] = Stored(nothing, nothing, noise)
    features["dots"] = Stored(nothing, nothing, noise[:, ::-1].copy())
    scores = {
        (s.metric, s.conditions["alpha"]): s
        for s in MatchingTask(data="x").judge(FakeReader(features), {"data": source}, QUIET)
    }
    assert scores["pck", 0.1].value() == pytest.approx(scores["pck_by_chance", 0.1].value(), abs=1.5)


@pytest.mark.parametrize(("side", "alpha"), [(2, 0.05), (3, 0.2), (12, 0.1)])
def test_the_ceiling_of_a_grid_is_that_of_the_nearest_centre(side, alpha):
    rng = np.random.default_rng(1)
    tokens = rng.normal(size=(1, 6, side * side, 4)).astype(np.float16)
    stored = Stored(np.zeros((1, 6, 4), np.float32), tokens[:, :, 0], tokens)
    reader = FakeReader({"dots": stored, "dots seen again": stored})
    found = MatchingTask(data="x", alphas=[alpha], seed=3).judge(reader, {"data": Pictures()}, QUIET)
    scores = {s.metric: s for s in found}
    assert set(scores) == {"pck", "pck_by_chance", "pck_at_best"}
    assert all(s.conditions == {"alpha": alpha, "grid": side, "seed": 3} for s in found)
    assert [s.metric for s in found if s.headline] == ["pck"]
    near = total = 0
    for i in range(6):
        matrix = view_of(i, 3, 160 / 120).matrix
        for x, y in grid_centres(side):
            u, v = matrix @ [x, y, 1]
            if 0 <= u <= 1 and 0 <= v <= 1:
                total += 1
                u0, v0 = ((np.clip(np.floor(w * side), 0, side - 1) + 0.5) / side for w in (u, v))
                near += (u - u0) ** 2 + (v - v0) ** 2 <= alpha**2
    assert scores["pck_at_best"].value() == pytest.approx(100 * near / total)
    assert scores["pck"].value() <= scores["pck_at_best"].value()


@pytest.mark.parametrize("broken", ["dots", "dots seen again"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_views_without_finite_features_are_a_sentence(broken, value):
    tokens = np.random.default_rng(0).normal(size=(1, 6, 9, 4)).astype(np.float16)
    spoiled = tokens.copy()
    spoiled[0, 5, 8, 3] = value
    stored = {
        name: Stored(np.zeros((1, 6, 4), np.float32), t[:, :, 0], t)
        for name in ("dots", "dots seen again")
        for t in [spoiled if name == broken else tokens]
    }
    with pytest.raises(Unfit, match=r"NaN or infinity .*above 65,504"):
        MatchingTask(data="x").judge(FakeReader(stored), {"data": Pictures()}, QUIET)
