"""Batches: a pure function of (source, settings, seed, step), whoever makes them, from wherever they start, in slices or whole."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from distill.data.crops import CropsConfig
from distill.data.loader import Batch, LoaderSettings, MasksConfig, batches, normalize_batch, sample_index
from distill.data.preprocess import normalize
from distill.data.scenes import ScenesConfig

torch.set_num_threads(1)  # small tensors: a second thread costs more than it does

CROPS = CropsConfig(global_size=32, local_size=16, local_count=3)
# The whole image, unflipped, its colours as they are: a crop tells which image it is of.
BARE = CropsConfig(
    global_size=8, local_size=8, local_count=1, global_scale=(1.0, 1.0), local_scale=(1.0, 1.0),
    flip=0.0, jitter_p=0.0, grey=0.0, blur=(0.0, 0.0, 0.0), solarise=0.0,
)  # fmt: skip


def settings(**changes) -> LoaderSettings:
    base: dict[str, Any] = {"crops": CROPS, "masks": MasksConfig(), "patch": 8, "normalize": "per_image", "batch": 6, "seed": 3}
    return LoaderSettings(**(base | changes))


def flat(value: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (value, value, value))


class Flat:
    """Image i has the value i everywhere."""

    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return self.n

    def image(self, index: int) -> Image.Image:
        return flat(index)


class Endless:
    """A stream: position p has the value p (and the seed), and notes where reading began."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def iterate(self, seed: int, skip: int = 0, step: int = 1) -> Iterator[Image.Image]:
        self.asked.append((seed, skip))
        position = skip
        while True:
            yield flat((position + seed) % 256)
            position += step


def values(batch: Batch) -> list[int]:
    """Which images the first global crops are of."""
    half = batch.global_crops.shape[0] // 2
    return (batch.global_crops[:half, 0, 0, 0] * 255).round().int().tolist()


def same(a: Batch, b: Batch) -> bool:
    return (
        torch.equal(a.global_crops, b.global_crops)
        and torch.equal(a.local_crops, b.local_crops)
        and torch.equal(a.masks, b.masks)
    )


SOURCE = ScenesConfig(count=20, size=32).build()


def test_shapes_and_types():
    batch = next(batches(SOURCE, settings(), 0, 1, 0))
    assert batch.global_crops.shape == (12, 3, 32, 32)
    assert batch.local_crops.shape == (18, 3, 16, 16)
    assert batch.masks.shape == (12, 16)
    assert batch.global_crops.dtype == batch.local_crops.dtype == torch.float32
    assert batch.masks.dtype == torch.bool
    moved = batch.to(torch.device("cpu"))
    assert same(batch, moved)


def test_crops_are_crop_major():
    batch = next(batches(Flat(50), settings(crops=BARE, normalize="none"), 0, 1, 0))
    first, second = batch.global_crops[:6], batch.global_crops[6:]
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first, batch.local_crops)
    assert len(set(values(batch))) == 6


def test_masks():
    masked = next(batches(SOURCE, settings(), 0, 1, 0)).masks
    assert int(masked.any(1).sum()) <= 6
    assert masked.any()
    for none in (None, MasksConfig(probability=0.0)):
        assert not next(batches(SOURCE, settings(masks=none), 0, 1, 0)).masks.any()
    steps = [b.masks for b in batches(SOURCE, settings(), 0, 4, 0)]
    assert not torch.equal(steps[0], steps[1])


def test_masking_changes_no_pixel():
    with_masks, without = (next(batches(SOURCE, settings(masks=m), 2, 3, 0)) for m in (MasksConfig(), None))
    assert torch.equal(with_masks.global_crops, without.global_crops)
    assert torch.equal(with_masks.local_crops, without.local_crops)


def test_no_local_crops():
    batch = next(batches(SOURCE, settings(crops=CROPS.model_copy(update={"local_count": 0})), 0, 1, 0))
    assert batch.local_crops.shape[0] == 0
    assert batch.global_crops.shape == (12, 3, 32, 32)


@pytest.mark.parametrize("n", [1, 7, 20])
def test_every_epoch_is_a_fresh_permutation(n):
    epochs = [[sample_index(3, e * n + i, n) for i in range(n)] for e in range(6)]
    assert all(sorted(e) == list(range(n)) for e in epochs)
    if n > 1:
        assert len({tuple(e) for e in epochs}) > 3
    if n > 5:
        assert [sample_index(4, i, n) for i in range(n)] != epochs[0]


def test_batches_follow_the_permutation_across_epochs():
    s = settings(crops=BARE, normalize="none", batch=6)
    seen = [v for b in batches(Flat(20), s, 0, 10, 0) for v in values(b)]
    assert seen == [sample_index(3, p, 20) for p in range(60)]
    for epoch in range(3):
        assert sorted(seen[20 * epoch : 20 * (epoch + 1)]) == list(range(20))


def test_a_batch_depends_on_seed_and_step_alone():
    whole = list(batches(SOURCE, settings(), 0, 6, 0))
    assert len(whole) == 6
    assert all(same(a, b) for a, b in zip(whole[3:], batches(SOURCE, settings(), 3, 6, 0), strict=True))
    assert all(same(a, b) for a, b in zip(whole, batches(SOURCE, settings(), 0, 6, 2), strict=True))
    assert list(batches(SOURCE, settings(), 6, 6, 0)) == []
    assert not any(same(a, b) for i, a in enumerate(whole) for b in whole[:i])
    other = next(batches(SOURCE, settings(seed=4), 0, 1, 0))
    assert not torch.equal(other.global_crops, whole[0].global_crops)


def test_the_same_image_gets_other_crops_each_time():
    one = ScenesConfig(count=1, size=32).build()
    batch = torch.cat([b.global_crops for b in batches(one, settings(batch=3), 0, 3, 0)])
    assert batch.shape[0] == 18
    assert all(not torch.equal(a, b) for i, a in enumerate(batch) for b in batch[:i])


def by_image(x: Tensor, crops: int) -> Tensor:
    return x.view(crops, -1, *x.shape[1:])


@pytest.mark.parametrize(("batch", "world"), [(6, 2), (6, 3), (7, 2), (8, 3), (5, 5)])
def test_the_slices_of_all_ranks_tile_the_batch(batch, world):
    source = SOURCE
    s = settings(batch=batch, masks=None)
    for step in (0, 3):
        whole = next(batches(source, s, step, step + 1, 0))
        parts = [
            next(batches(source, settings(batch=batch, masks=None, share=(r, world)), step, step + 1, 0)) for r in range(world)
        ]
        for name, crops in (("global_crops", 2), ("local_crops", 3)):
            tiled = torch.cat([by_image(getattr(p, name), crops) for p in parts], 1)
            assert torch.equal(tiled, by_image(getattr(whole, name), crops))


@pytest.mark.parametrize(("batch", "world"), [(6, 2), (6, 3), (5, 5)])
def test_the_ranks_share_a_stream_and_decode_nothing_twice(batch, world):
    bare = {"crops": BARE, "normalize": "none", "batch": batch, "masks": None}
    for start in (0, 2):
        ranks = [[values(b) for b in batches(Endless(), settings(**bare, share=(r, world)), start, 5, 0)] for r in range(world)]
        for i, step in enumerate(range(start, 5)):
            together = [v for rank in ranks for v in rank[i]]
            assert sorted(together) == [p + 3 for p in range(step * batch, (step + 1) * batch)]  # the seed is 3
            assert {len(rank[i]) for rank in ranks} == {batch // world}


def test_ranks_mask_differently():
    masks = [next(batches(SOURCE, settings(batch=16, share=(r, 2)), 0, 1, 0)).masks for r in range(2)]
    assert masks[0].shape == masks[1].shape == (16, 16)
    assert not torch.equal(*masks)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_is_skipped_into_place(workers):
    s = settings(crops=BARE, normalize="none", batch=5, seed=2)
    whole = [values(b) for b in batches(Endless(), s, 0, 8, workers)]
    assert whole == [[(p + 2) % 256 for p in range(5 * i, 5 * i + 5)] for i in range(8)]
    source = Endless()
    late = [values(b) for b in batches(source, s, 3, 8, workers)]
    assert late == whole[3:]
    if workers == 0:
        assert source.asked == [(2, 15)]


def test_a_resumed_stream_gives_the_same_crops():
    s = settings()
    whole = list(batches(Endless(), s, 0, 5, 0))
    assert all(same(a, b) for a, b in zip(whole[2:], batches(Endless(), s, 2, 5, 0), strict=True))


def test_a_stream_is_not_read_before_it_is_needed():
    source = Endless()
    made = batches(source, settings(crops=BARE), 0, 100, 0)
    assert source.asked == []
    list(islice(made, 2))
    assert len(source.asked) == 1


@pytest.mark.parametrize("kind", ["imagenet", "per_image", "none"])
def test_normalisation_is_that_of_the_preprocessing(kind):
    torch.manual_seed(0)
    x = torch.rand(5, 3, 12, 9)
    x[1] = 0.25  # flat
    x[2, 1] = 1.0  # one flat channel
    want = np.stack([normalize(image.numpy(), kind) for image in x])
    np.testing.assert_allclose(normalize_batch(x, kind).numpy(), want, rtol=1e-4, atol=2e-5)


def test_crops_are_normalised():
    raw = next(batches(SOURCE, settings(normalize="none"), 0, 1, 0)).local_crops
    assert raw.min() >= -1e-6
    assert raw.max() <= 1 + 1e-6
    for kind in ("imagenet", "per_image"):
        made = next(batches(SOURCE, settings(normalize=kind), 0, 1, 0)).local_crops
        torch.testing.assert_close(made, normalize_batch(raw, kind))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"probability": 1.1}, "probability must be"),
        ({"ratio": (0.5, 0.1)}, "ratio must be"),
        ({"ratio": (-0.1, 0.1)}, "ratio must be"),
        ({"min_block": 0}, "min_block must be"),
    ],
)
def test_problems_of_masks(changes, said):
    found = MasksConfig(**changes).problems()
    assert len(found) == 1
    assert said in found[0]
    assert MasksConfig().problems() == []
