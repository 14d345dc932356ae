"""Scores as sums over items: values, intervals, paired differences, and what is kept of them."""

import numpy as np
import pytest

from distill.errors import UserError
from distill.evaluate.intervals import paired as paired_shares
from distill.evaluate.scores import FEW, Score, ScoreBook, interval, paired, percent_right

CONDITIONS = {"task": "flowers", "kind": "retrieval", "data": "flowers/val", "resolution": 224}


def test_percent_has_the_mean_and_an_interval_as_wide_as_theory_says():
    right = np.random.default_rng(0).random(400) < 0.7
    score = percent_right("knn_top1", right)
    assert score.value() == pytest.approx(100 * right.mean())
    low, high = interval(score)
    p = right.mean()
    assert (high - low) / 2 == pytest.approx(196 * np.sqrt(p * (1 - p) / 400), rel=0.1)
    assert low < score.value() < high


def test_mean_iou_leaves_out_classes_that_never_occur():
    # Two images, three classes; intersections, then unions. Class 2 occurs nowhere.
    stats = np.array([[1, 2, 0, 2, 4, 0], [1, 0, 0, 2, 1, 0]], float)
    assert Score("miou", "mean_iou", stats).value() == pytest.approx(100 * (2 / 4 + 2 / 5) / 2)


def test_root_is_the_root_of_the_whole_mean():
    assert Score("rmse_m", "root", np.array([[4.0, 2], [12.0, 2]])).value() == pytest.approx(2.0)


def test_micro_ap_by_hand():
    # From the most similar down: a copy, then another pair and a copy together.
    stats = np.array([[1, 1, 0, 1]], float)
    assert Score("micro_ap", "micro_ap", stats).value() == pytest.approx(100 * (1 * 1 + 2 / 3) / 2)


def test_pairing_sees_what_separate_intervals_cannot():
    generator = np.random.default_rng(1)
    hard = generator.normal(0, 20, 300)
    a, b = (percent_right("map", (50 + hard + shift + generator.normal(0, 1, 300)) / 100) for shift in (1, 0))
    alone = interval(a)
    found = paired(a, b)
    assert found.value == pytest.approx(1, abs=0.3)
    assert found.interval[0] > 0
    assert found.interval[1] - found.interval[0] < (alone[1] - alone[0]) / 5


def test_of_right_and_wrong_items_the_intervals_are_wilsons_and_tangos():
    right, wrong = np.ones(50), np.r_[np.ones(49), 0.0]
    low, high = interval(percent_right("map", right))
    assert low < 95
    assert high == 100
    same = paired(percent_right("map", right), percent_right("map", right))
    assert same.interval[0] < 0 < same.interval[1]
    exact = paired_shares(right == 1, wrong == 1)
    found = paired(percent_right("map", right), percent_right("map", wrong))
    assert (found.value, found.interval) == (exact.difference, (exact.low, exact.high))
    # Items that do not count (queries with nothing to find) are left out.
    more = np.r_[np.stack([right, np.ones(50)], 1), np.zeros((10, 2))]
    assert interval(Score("map", "percent", more)) == (low, high)


def test_one_item_has_no_interval_and_none_that_counts_is_not_measured():
    assert interval(percent_right("map", np.array([True]))) is None
    (row,) = ScoreBook().rows("teacher", "torch-fp32", CONDITIONS, [Score("map", "percent", np.zeros((3, 2)))])
    assert row.status == "not measured"
    assert "can be scored" in row.reason


def test_a_book_keeps_headlines_compares_them_and_comes_back_from_disk(tmp_path):
    book = ScoreBook()
    generator = np.random.default_rng(2)
    base = generator.random(50) < 0.5
    better = base | (generator.random(50) < 0.3)
    for target, right in (("onnx-int8", better), ("torch-fp32", base)):
        rows = book.rows(
            "students/small",
            target,
            CONDITIONS,
            [percent_right("map", right), Score("recall_at_k", "percent", np.ones((50, 2)), {"k": 5}, headline=False)],
        )
        assert [r.metric for r in rows] == ["map", "recall_at_k"]
        assert rows[0].n == 50
        assert rows[0].low < rows[0].value < rows[0].high
        assert rows[0].conditions["task"] == "flowers"
        assert "few_samples" not in rows[0].conditions
    pairs = [("students/small/onnx-int8", "students/small/torch-fp32")]
    (difference,) = book.differences(pairs)
    assert difference.metric == "map_difference"
    assert difference.value == pytest.approx(100 * (better.mean() - base.mean()))
    assert difference.low > 0
    assert difference.conditions["versus"] == "students/small/torch-fp32"
    book.save(tmp_path / "scores.safetensors")
    assert ScoreBook.load(tmp_path / "scores.safetensors").differences(pairs) == [difference]


def test_scores_of_few_items_say_so():
    (row,) = ScoreBook().rows("teacher", "torch-fp32", CONDITIONS, [percent_right("map", np.ones(FEW - 1))])
    assert row.conditions["few_samples"] is True


def test_scores_of_other_items_are_not_compared():
    book = ScoreBook()
    book.rows("a", "torch-fp32", CONDITIONS, [percent_right("map", np.ones(40))])
    book.rows("b", "torch-fp32", CONDITIONS | {"data": "other"}, [percent_right("map", np.ones(40))])
    assert book.differences([("a/torch-fp32", "b/torch-fp32")]) == []


def test_a_damaged_file_is_a_sentence(tmp_path):
    (tmp_path / "scores.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="holds no scores"):
        ScoreBook.load(tmp_path / "scores.safetensors")
