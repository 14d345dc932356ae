"""Foreground: the first component finds what stands out, whichever way its sign fell."""

import numpy as np
import pytest
from dense_cases import Maps, Memory, enlarged, tokens_of

from distill.evaluate.foreground import ForegroundTask, otsu, pca_foreground
from distill.evaluate.task import Unfit
from distill.progress import Progress

QUIET = Progress("quiet")
GRID = 8


def objects(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """n masks [n, g, g] of a rectangle off the border, and tokens [1, n, N, D] in which it differs."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((n, GRID, GRID), bool)
    for m in mask:
        y, x = rng.integers(1, 3, 2)
        m[y : y + rng.integers(2, 5), x : x + rng.integers(2, 5)] = True
    return mask, tokens_of(mask.reshape(n, -1, 1).astype(float), rng)


@pytest.mark.parametrize("threshold", ["zero", "otsu"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_object_is_found_whatever_the_sign(threshold, sign):
    mask, tokens = objects(10)
    found = pca_foreground(tokens[0] * np.float16(sign), threshold)
    assert found.shape == (10, GRID * GRID)
    assert found.dtype == np.float32
    assert np.array_equal(found > 0, mask.reshape(10, -1))


def test_the_component_is_scikit_learns():
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(0)
    patches = (rng.normal(size=(130, 9, 6)) * [5, 2, 1, 1, 1, 1] + 7).astype(np.float16)  # more than one slice
    expected = PCA(1).fit_transform(patches.reshape(-1, 6).astype(np.float64))[:, 0].reshape(130, 9)
    found = pca_foreground(patches)
    middle = np.arange(9) == 4
    assert found[:, ~middle].mean() <= found[:, middle].mean()
    assert np.allclose(found, expected, atol=1e-3) or np.allclose(found, -expected, atol=1e-3)


def test_otsu_lies_between_two_groups():
    values = np.concatenate([np.linspace(0, 1, 300), np.linspace(9, 10, 40)])
    assert 1 < otsu(values) < 9
    assert otsu(values) == pytest.approx(5, abs=0.1)  # the middle of the gap
    best = max(np.linspace(0.01, 9.99, 999), key=lambda t: _between(values, t))
    assert _between(values, otsu(values)) == pytest.approx(_between(values, best), rel=1e-6)


def _between(values: np.ndarray, cut: float) -> float:
    low, high = values[values <= cut], values[values > cut]
    return len(low) * len(high) * (low.mean() - high.mean()) ** 2


def judged(maps: list[np.ndarray], tokens: np.ndarray, **more):
    task = ForegroundTask.model_validate({"test": {"kind": "scenes"}, "foreground": [2, 5], **more})
    source = Maps("test", maps)
    reader = Memory({"test": (np.zeros((1, len(maps), tokens.shape[3]), np.float32), tokens)})
    scores = {s.metric: s for s in task.judge(reader, {"test": source}, QUIET)}
    assert reader.asked == ["squash"]
    return scores


def test_iou_is_of_the_named_classes_over_the_pixels_that_count():
    mask, tokens = objects(6)
    maps = [np.where(m, 2, 0).astype(np.int64) for m in mask]
    scores = judged(maps, tokens)
    assert scores["foreground_iou"].value() == 100
    assert scores["foreground_iou_everything"].value() == pytest.approx(100 * mask.mean())
    assert not scores["foreground_iou_everything"].headline

    maps[0][mask[0]] = 5
    maps[1][mask[1]] = 1  # an object that is not wanted: it is all union
    maps[2][mask[2]] = -1  # and one that does not count
    expected = 100 * mask[[0, 3, 4, 5]].sum() / mask[[0, 1, 3, 4, 5]].sum()
    assert judged(maps, tokens)["foreground_iou"].value() == pytest.approx(expected)
    enlarged_maps = [enlarged(m, 5) for m in maps]
    assert judged(enlarged_maps, tokens, threshold="otsu")["foreground_iou"].value() == pytest.approx(expected, abs=15)


def test_what_cannot_be_judged_says_why():
    mask, tokens = objects(3)
    maps = [m.astype(np.int64) for m in mask]
    with pytest.raises(Unfit, match="NaN or infinity"):
        judged(maps, tokens * np.float16(np.inf))
    with pytest.raises(Unfit, match="square"):
        judged(maps, tokens[:, :, :-1])
    wrong = ForegroundTask.model_validate({"test": {"kind": "scenes", "count": 0}, "foreground": [1]})
    assert wrong.test.problems()
    assert wrong.problems() == []  # a recipe asks every section, and would say it twice
    task = ForegroundTask.model_validate({"test": {"kind": "scenes", "map": "depth"}, "foreground": []})
    assert len(task.problems()) == 2
