"""Depth: a plane that the tokens hold is found, the errors are Eigen's, and what is not measured does not count."""

import numpy as np
import pytest
from dense_cases import Maps, Memory, enlarged, tokens_of

from distill.data.maps import SceneMapsConfig
from distill.evaluate.dense_fit import histograms
from distill.evaluate.depth import DepthTask, _rmse, depth_errors
from distill.evaluate.linear_head import Head, predict
from distill.evaluate.task import Unfit
from distill.progress import Progress

QUIET = Progress("quiet")
MAPS = {"kind": "scenes", "count": 2, "map": "depth"}
GRID, PX = 6, 4


def task(**more) -> DepthTask:
    return DepthTask.model_validate({"train": MAPS, "test": MAPS, "steps": 400, "batch": 128, **more})


def planes(n: int, seed: int) -> tuple[Maps, tuple[np.ndarray, np.ndarray]]:
    """n slanted planes between 1 and 7 m, one depth a patch; tokens hold it among noise as a hat function of eight depths."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(*[np.linspace(-1, 1, GRID)] * 2, indexing="ij")
    slopes = rng.uniform(-1, 1, (n, 2, 1, 1))
    depth = rng.uniform(3, 5, (n, 1, 1)) + slopes[:, 0] * y + slopes[:, 1] * x
    hats = np.maximum(0, 1 - abs(depth.reshape(n, -1, 1) - np.arange(1, 9)))
    maps = [enlarged(d.astype(np.float32), PX) for d in depth]
    cls = rng.normal(size=(1, n, 12)).astype(np.float32)
    return Maps(f"planes-{seed}", maps), (cls, tokens_of(hats, rng))


def run(job: DepthTask, train_set, test_set):
    reader = Memory({train_set[0].name: train_set[1], test_set[0].name: test_set[1]})
    sources = {"train": train_set[0], "test": test_set[0]}
    head = job.fit(reader, sources, QUIET)
    scores = {s.metric: s for s in job.scores(head, reader, sources, QUIET)}
    assert set(reader.asked) == {"squash"}
    return head, scores


def test_a_plane_is_found():
    train_set, test_set = planes(150, 1), planes(20, 2)
    head, scores = run(task(), train_set, test_set)
    assert head.weight.shape[1] == 24  # token and CLS
    assert scores["rmse_m_constant"].value() > 0.7
    assert scores["rmse_m"].value() < 0.3
    assert scores["abs_rel"].value() < 0.06
    assert scores["delta1"].value() > 98
    assert not scores["rmse_m_constant"].headline
    assert head.constant == pytest.approx(np.mean(train_set[0].maps), abs=0.02)
    assert set(scores) == {*task().metrics(), "rmse_m_constant"}


def test_the_prediction_is_the_mean_of_the_bins():
    values = np.array([1.0, 2.0, 4.0], np.float32)
    head = Head("depth", np.zeros((3, 1)), np.log([1.0, 1.0, 2.0]), np.zeros(1), np.ones(1), values, 1, False, [], 0.0)
    head = Head(**{**head.__dict__, **{k: getattr(head, k).astype(np.float32) for k in ("weight", "bias", "shift", "scale")}})
    said = predict(head, np.zeros((2, 4, 1)), np.zeros((2, 1)), (3, 5))
    assert said.shape == (2, 3, 5)
    assert said.dtype == np.float32
    assert said == pytest.approx((1 + 2 + 2 * 4) / 4)


def test_predictions_are_upsampled_between_patch_centres():
    values = np.array([0.0, 8.0], np.float32)
    weight = np.array([[0.0], [1e3]], np.float32)
    zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    head = Head("depth", weight, np.zeros(2, np.float32), zero, one, values, 1, False, [], 0.0)
    left_right = np.array([[[-1.0], [1.0], [-1.0], [1.0]]])
    said = predict(head, left_right, np.zeros((1, 1)), (4, 4))[0]
    assert said[0].tolist() == [0, 2, 6, 8]
    assert np.array_equal(said, np.repeat(said[:1], 4, 0))


def test_errors_by_hand():
    rmse, rel, delta = depth_errors(np.array([1.0, 2.0, 4.0]), np.array([1.2, 1.0, 4.0]))
    assert rmse == pytest.approx(np.sqrt((0.04 + 1) / 3))
    assert rel == pytest.approx((0.2 + 0.5) / 3)
    assert delta == pytest.approx(2 / 3)
    assert np.isnan(depth_errors(np.zeros(0), np.zeros(0))).all()


def test_scores_are_means_over_images_of_their_valid_pixels():
    train_set, test_set = planes(60, 1), planes(5, 2)
    test_set[0].maps[0][3:9] = 0  # not measured
    test_set[0].maps[1][:] = 0
    test_set[0].maps[2][0, 0] = 99  # beyond max_depth
    head, scores = run(task(), train_set, test_set)
    cls, tokens = test_set[1]
    expected = []
    for i in (0, 2, 3, 4):
        truth = test_set[0].maps[i]
        said = predict(head, tokens[0, i : i + 1], cls[0, i : i + 1], truth.shape)[0]
        valid = (truth > 0) & (truth < 10)
        expected.append(np.sqrt(((said - truth)[valid] ** 2).mean()))
    assert scores["rmse_m"].value() == pytest.approx(np.mean(expected), rel=1e-5)
    assert scores["rmse_m"].stats.shape == (5, 2)
    assert scores["rmse_m"].stats[1].tolist() == [0, 0]


def test_unmeasured_pixels_teach_nothing():
    train_set, test_set = planes(60, 1), planes(5, 2)
    clean, _ = run(task(), train_set, test_set)
    for m in train_set[0].maps:
        m[: PX // 2] = 0  # half of the upper patches: their shares halve, their depth stays
    holes, scores = run(task(), train_set, test_set)
    assert np.array_equal(holes.values, clean.values)
    assert scores["rmse_m"].value() < 0.4
    blank = Maps(train_set[0].name, [np.zeros((8, 8), np.float32)] * 60)
    with pytest.raises(Unfit, match="No pixel"):
        run(task(), (blank, train_set[1]), test_set)


def test_rmse_from_histograms_is_that_of_the_pixels():
    bins = np.random.default_rng(0).integers(-1, 5, (3, 6, 6))
    values, said = np.arange(5.0), np.random.default_rng(1).uniform(0, 4, (3, 3, 3))
    expected = [np.sqrt(((enlarged(s, 2) - b)[b >= 0] ** 2).mean()) for s, b in zip(said, bins, strict=True)]
    assert _rmse(said.ravel(), histograms(bins, 3), values, 9) == pytest.approx(np.mean(expected), rel=1e-6)


def test_cls_of_another_width_is_left_out():
    train_set, test_set = planes(30, 1), planes(4, 2)
    for maps, (cls, tokens) in (train_set, test_set):
        wide = np.random.default_rng(0).normal(size=(1, len(maps), 500)).astype(np.float32)
        assert cls.shape[2] == tokens.shape[3]
        if maps is train_set[0]:
            train_set = maps, (wide, tokens)
        else:
            test_set = maps, (wide, tokens)
    head, scores = run(task(steps=20), train_set, test_set)
    assert not head.cls
    assert head.weight.shape[1] == 12
    assert scores["rmse_m"].conditions["cls"] is False


def test_a_depth_head_survives_its_file(tmp_path):
    train_set, test_set = planes(20, 1), planes(3, 2)
    head, _ = run(task(steps=20), train_set, test_set)
    head.save(tmp_path / "head.safetensors")
    again = Head.load(tmp_path / "head.safetensors")
    cls, tokens = test_set[1]
    assert again.constant == head.constant
    assert np.array_equal(predict(again, tokens[0], cls[0], (9, 7)), predict(head, tokens[0], cls[0], (9, 7)))


def test_training_images_among_the_test_images_are_a_sentence():
    train, test = (SceneMapsConfig(count=n, map="depth").build() for n in (4, 9))
    with pytest.raises(Unfit, match=r"4 of the 9 items of the test set"):
        task().judge(Memory({}), {"train": train, "test": test}, QUIET)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_cls_that_is_not_finite_is_a_sentence_where_it_is_used(value):
    train_set, (maps, (cls, tokens)) = planes(20, 1), planes(4, 2)
    cls[0, 2, 5] = value
    with pytest.raises(Unfit, match="NaN or infinity"):
        run(task(steps=20), train_set, (maps, (cls, tokens)))
    _, scores = run(task(steps=20, cls=False), train_set, (maps, (cls, tokens)))
    assert scores["rmse_m"].stats[:, 1].tolist() == [1, 1, 1, 1]


def test_an_answer_that_is_not_finite_leaves_no_image_out():
    """Finite features that overflow in the head: the image has depths, so it counts."""
    train_set, (maps, (cls, tokens)) = planes(20, 1), planes(4, 2)
    cls[0, 2] = 3e38
    with pytest.raises(Unfit, match="depths of 1 test images hold NaN or infinity"):
        run(task(steps=20), train_set, (maps, (cls, tokens)))


def test_settings_that_make_no_sense_are_named():
    ids = {"kind": "parquet", "path": "a.parquet"}
    found = task(train=ids, test={"kind": "scenes"}, bins=1, min_depth=5.0, max_depth=2.0).problems()
    assert len(found) == 4
    assert task(seed=-1).problems() == ["seed must be at least 0, got -1"]
    wrong = {"kind": "parquet", "path": " ", "limit": 0, "scale": 0.5}
    assert len(task(train=wrong).train.problems()) == 2
    assert task(train=wrong).problems() == []  # a recipe asks every section, and would say it twice
    assert any("train needs a scale" in p for p in found)
    assert any("test needs map: depth" in p for p in found)
    assert task().problems() == []
