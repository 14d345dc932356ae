"""Segmentation: mIoU is torchmetrics', ignored pixels do not exist, and what is linear in the tokens is found."""

import numpy as np
import pytest
import torch
from dense_cases import Maps, Memory, enlarged, tokens_of
from pydantic import ValidationError

from distill.data.maps import SceneMapsConfig
from distill.errors import UserError
from distill.evaluate.dense_fit import FitSettings, Tokens, cosines, histograms, train
from distill.evaluate.linear_head import Head, predict
from distill.evaluate.segmentation import SegmentationTask, _miou, overlaps
from distill.evaluate.task import Stored, Unfit
from distill.progress import Progress

QUIET = Progress("quiet")
MAPS = {"kind": "scenes", "count": 2}
GRID, PX = 4, 6


def task(**more) -> SegmentationTask:
    return SegmentationTask.model_validate({"train": MAPS, "test": MAPS, "steps": 150, "batch": 64, **more})


def quadrants(n: int, seed: int, classes=(0, 1, 2)) -> tuple[Maps, tuple[np.ndarray, np.ndarray]]:
    """n maps of one class a patch, and tokens in which the classes are linearly separable."""
    rng = np.random.default_rng(seed)
    ids = rng.choice(classes, (n, GRID, GRID))
    tokens = tokens_of(np.eye(max(classes) + 1)[ids.reshape(n, -1)], rng)
    cls = rng.normal(size=(1, n, 12)).astype(np.float32)
    name = f"set-{seed}"
    return Maps(name, [enlarged(i, PX).astype(np.int64) for i in ids], ["road", "car", "sky", "tree"]), (cls, tokens)


def run(job: SegmentationTask, train_set, test_set):
    reader = Memory({train_set[0].name: train_set[1], test_set[0].name: test_set[1]})
    sources = {"train": train_set[0], "test": test_set[0]}
    head = job.fit(reader, sources, QUIET)
    scores = job.scores(head, reader, sources, QUIET)
    assert set(reader.asked) == {"squash"}
    return head, {s.metric if s.metric != "class_iou" else s.conditions["class_name"]: s for s in scores}


def patchwise(head: Head, tokens: np.ndarray) -> np.ndarray:
    """The class of each patch: at the size of the grid, upsampling changes nothing."""
    return predict(head, tokens, np.zeros((len(tokens), 1)), (GRID, GRID))


def test_separable_tokens_give_every_patch_its_class():
    train_set, test_set = quadrants(40, 1), quadrants(10, 2)
    head, scores = run(task(), train_set, test_set)
    truth = np.stack([m[PX // 2 :: PX, PX // 2 :: PX] for m in test_set[0].maps])
    assert np.array_equal(patchwise(head, test_set[1][1][0]), truth)
    assert head.names == ["road", "car", "sky"]
    assert head.values.tolist() == [0, 1, 2]
    assert scores["miou"].conditions["held_out_miou"] == 100
    assert scores["miou"].stats.shape == (10, 8)
    assert "tree" not in scores  # neither shown nor said
    assert not scores["car"].headline
    assert scores["car"].conditions["class_index"] == 1


def test_maps_of_the_grids_own_size_are_read_back_whole():
    """No upsampling, no borders between patches: the score is exactly 100."""
    train_set, test_set = quadrants(40, 1), quadrants(10, 2)
    test_set[0].maps = [m[::PX, ::PX] for m in test_set[0].maps]
    _, scores = run(task(), train_set, test_set)
    assert scores["miou"].value() == scores["pixel_accuracy"].value() == scores["sky"].value() == 100


def test_the_numbers_are_those_of_torchmetrics():
    from torchmetrics.classification import MulticlassJaccardIndex

    train_set, test_set = quadrants(20, 1), quadrants(12, 2, (0, 1, 3))  # class 3 was never learned, 2 is said but not there
    rng = np.random.default_rng(5)
    for m in test_set[0].maps:
        m[rng.random(m.shape) < 0.2] = -1
    head, scores = run(task(), train_set, test_set)
    said = [predict(head, test_set[1][1][0][i : i + 1], np.zeros((1, 1)), m.shape)[0] for i, m in enumerate(test_set[0].maps)]
    index = {a: MulticlassJaccardIndex(4, average=a, ignore_index=-1) for a in ("macro", "none")}
    majority = MulticlassJaccardIndex(4, average="macro", ignore_index=-1)
    for s, m in zip(said, test_set[0].maps, strict=True):
        for metric in index.values():
            metric.update(torch.from_numpy(s)[None], torch.from_numpy(m)[None])
        majority.update(torch.full((1, *m.shape), int(head.constant)), torch.from_numpy(m)[None])
    assert scores["miou"].value() == pytest.approx(100 * index["macro"].compute().item(), abs=1e-4)
    for name, iou in zip(("road", "car", "sky", "tree"), index["none"].compute().tolist(), strict=True):
        if name in scores:
            assert scores[name].value() == pytest.approx(100 * iou, abs=1e-4)
    assert scores["tree"].value() == 0
    assert scores["miou_majority"].value() == pytest.approx(100 * majority.compute().item(), abs=1e-4)
    right = sum(((s == m) & (m >= 0)).sum() for s, m in zip(said, test_set[0].maps, strict=True))
    pixels = sum((m >= 0).sum() for m in test_set[0].maps)
    assert scores["pixel_accuracy"].value() == pytest.approx(100 * right / pixels)


def test_overlaps_by_hand():
    truth, said = np.array([[0, 0, 1], [2, -1, -1]]), np.array([[0, 1, 1], [0, 3, 0]])
    inside, union, true = overlaps(truth, said)
    assert inside.tolist() == [1, 1, 0]
    assert union.tolist() == [3, 2, 1]
    assert true.tolist() == [2, 1, 1]


def test_ignored_pixels_teach_nothing():
    """Half of the patches claim a wrong class, then half are ignored: the head is the same as without them."""
    (maps, features), test_set = quadrants(40, 1), quadrants(10, 2)
    for m in maps.maps:
        m[:, : m.shape[1] // 2] = -1
    head, scores = run(task(), (maps, features), test_set)
    other = Maps(maps.name, [m.copy() for m in maps.maps])
    for m in other.maps:
        m[:, : m.shape[1] // 2] = 1
    worse, _ = run(task(), (other, features), test_set)
    truth = np.stack([m[PX // 2 :: PX, PX // 2 :: PX] for m in test_set[0].maps])
    assert np.array_equal(patchwise(head, test_set[1][1][0]), truth)
    assert not np.array_equal(patchwise(worse, test_set[1][1][0]), truth)
    assert scores["miou"].conditions["classes"] == 3


def test_the_score_of_held_out_tokens_is_that_of_dense_choices(monkeypatch):
    rng = np.random.default_rng(4)
    truth = histograms(rng.integers(-1, 5, (6, 8, 8)), 4)
    said = torch.from_numpy(rng.integers(0, 5, 6 * 16))
    confusion = truth.toarray().T.astype(np.float64) @ np.eye(5)[said.numpy()]
    inside = confusion.diagonal()
    expected = 100 * (inside / (confusion.sum(0) + confusion.sum(1) - inside)).mean()
    monkeypatch.delattr(torch.nn.functional, "one_hot")  # int64 of every token and class: more than the logits take
    assert _miou(said, truth) == pytest.approx(expected, rel=1e-6)


def test_training_images_among_the_test_images_are_a_sentence():
    source = SceneMapsConfig(count=6).build()
    with pytest.raises(Unfit, match=r"4 of the 4 items of the test set scenes-train-0 are also in scenes-train-0"):
        task().judge(Memory({}), {"train": source, "test": SceneMapsConfig(count=4).build()}, QUIET)


def test_histograms_by_hand():
    ids = np.array([[0, 0, 2, 2, 2], [0, -1, 2, 1, 1], [-1, -1, 0, 0, 0], [-1, -1, 0, 0, 5]])
    found = histograms([ids, ids[::-1]], 2).toarray()
    assert found.shape == (8, 6)
    assert found[0, :3].tolist() == [0.75, 0, 0]  # columns 0, 1 of five: the centre of column 2 lies in the right patch
    assert found[1, :3] == pytest.approx([0, 2 / 6, 4 / 6])
    assert found[2].sum() == 0
    assert found[3] == pytest.approx([5 / 6, 0, 0, 0, 0, 1 / 6])
    assert np.array_equal(found[4:6], found[2:4])


def test_the_gradient_is_that_of_pixel_cross_entropy():
    """One step on all tokens against autograd on nearest-upsampled logits and every pixel by itself."""
    rng = np.random.default_rng(0)
    ids = rng.integers(-1, 3, (3, 4, 4))
    patches = rng.normal(size=(1, 3, 4, 5)).astype(np.float16)
    tokens = Tokens(Stored(np.zeros((1, 3, 5), np.float32), patches.mean(2), patches), cls=False)
    shift, scale = torch.zeros(5), torch.ones(5)
    settings = FitSettings((8.0,), 1, 12, 0)
    weight, bias = train(tokens, histograms(ids, 2), np.arange(3), shift, scale, settings)

    w, b = torch.zeros(5, 3, requires_grad=True), torch.zeros(3, requires_grad=True)
    logits = (torch.from_numpy(patches[0]).float() @ w + b).unflatten(1, (2, 2)).permute(0, 3, 1, 2)
    up = torch.nn.functional.interpolate(logits, size=(4, 4), mode="nearest")
    loss = torch.nn.functional.cross_entropy(up, torch.from_numpy(ids), ignore_index=-1, reduction="sum") / ids.size
    loss.backward()
    lr = 8.0 * 12 / 256
    assert torch.allclose(weight[:, 0], -lr / 5 * w.grad, atol=1e-6)
    assert torch.allclose(bias[0], -lr * b.grad, atol=1e-6)


def test_heads_of_a_grid_do_not_notice_each_other():
    _, (cls, patches) = quadrants(12, 3)
    maps, _ = quadrants(12, 3)
    tokens, targets = Tokens(Stored(cls, patches.mean(2), patches), cls=True), histograms(maps.maps, GRID)
    shift, scale = tokens.scaling(np.arange(12))
    x = tokens.at(np.arange(12 * 16))
    assert torch.allclose(shift, x.mean(0), atol=1e-5)
    assert torch.allclose(1 / scale, x.std(0, correction=0), atol=1e-5)
    both, _ = train(tokens, targets, np.arange(12), shift, scale, FitSettings((1e30, 10.0), 20, 32, 0))
    alone, _ = train(tokens, targets, np.arange(12), shift, scale, FitSettings((10.0,), 20, 32, 0))
    assert torch.allclose(both[:, 1], alone[:, 0], atol=1e-6)
    assert not torch.allclose(both[:, 0], alone[:, 0])


def test_all_cosines_are_a_rotation():
    full = cosines(7, 7)
    assert torch.allclose(full @ full.T, torch.eye(7), atol=1e-6)
    assert torch.allclose(full[0], torch.full((7,), 7**-0.5))


def test_a_head_survives_its_file(tmp_path):
    train_set, test_set = quadrants(20, 1), quadrants(4, 2)
    head, _ = run(task(), train_set, test_set)
    head.save(tmp_path / "head.safetensors")
    again = Head.load(tmp_path / "head.safetensors")
    assert (again.kind, again.layers, again.cls, again.names, again.training) == (
        head.kind,
        head.layers,
        head.cls,
        head.names,
        head.training,
    )
    assert np.array_equal(patchwise(again, test_set[1][1][0]), patchwise(head, test_set[1][1][0]))
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    for name in ("bad.safetensors", "none.safetensors"):
        with pytest.raises(UserError, match="holds no head"):
            Head.load(tmp_path / name)


def test_two_layers_are_put_side_by_side():
    """The classes lie in the first layer of two alone."""
    train_set, test_set = quadrants(40, 1), quadrants(10, 2)
    for maps, (cls, tokens) in (train_set, test_set):
        noise = np.random.default_rng(len(maps)).normal(size=tokens.shape).astype(np.float16)
        both = np.concatenate([cls, cls]), np.concatenate([tokens, noise])
        if maps is train_set[0]:
            train_set = maps, both
        else:
            test_set = maps, both
    truth = np.stack([m[PX // 2 :: PX, PX // 2 :: PX] for m in test_set[0].maps])
    one, _ = run(task(), train_set, test_set)
    two, _ = run(task(layers=2), train_set, test_set)
    wide = np.concatenate(list(test_set[1][1]), -1)
    assert (patchwise(one, test_set[1][1][1]) == truth).mean() < 0.7
    assert np.array_equal(patchwise(two, wide), truth)


def test_what_cannot_be_judged_says_why():
    train_set, test_set = quadrants(10, 1), quadrants(4, 2)
    broken = train_set[1][1].copy()
    broken[0, 3, 2, 1] = np.inf
    with pytest.raises(Unfit, match=r"NaN or infinity .*float16, in which a number above 65,504 becomes infinity"):
        run(task(), (train_set[0], (train_set[1][0], broken)), test_set)
    with pytest.raises(Unfit, match=r"NaN or infinity .*above 65,504"):
        run(task(), train_set, (test_set[0], (test_set[1][0], test_set[1][1] * np.float16(np.nan))))
    with pytest.raises(Unfit, match="square"):
        run(task(), (train_set[0], (train_set[1][0], train_set[1][1][:, :, :15])), test_set)
    blank = Maps(train_set[0].name, [np.full((8, 8), -1)] * 10)
    with pytest.raises(Unfit, match="0 classes"):
        run(task(), (blank, train_set[1]), test_set)
    with pytest.raises(Unfit, match="diverged"):
        run(task(lrs=[1e39]), train_set, test_set)


def test_settings_that_make_no_sense_are_named():
    depth = {"kind": "parquet", "path": "a.parquet", "map": "depth", "scale": 0.001}
    found = task(lrs=[0.0], layers=0, steps=0, test=depth, train={**MAPS, "map": "depth"}).problems()
    assert len(found) == 5
    assert task(seed=-1).problems() == ["seed must be at least 0, got -1"]
    wrong = {"kind": "parquet", "path": " ", "limit": 0}
    assert len(task(test=wrong).test.problems()) == 2
    assert task(test=wrong).problems() == []  # a recipe asks every section, and would say it twice
    assert "test is a depth map, segmentation needs class ids" in found
    assert task().problems() == []
    with pytest.raises(ValidationError):
        task(typo=1)
