"""Block masks: never more than asked, on grids of every shape. Their statistics are held by tests/golden."""

import numpy as np
import pytest

from distill.data.masks import batch_masks, block_mask

GRIDS = [(1, 1), (1, 7), (2, 2), (3, 3), (4, 6), (6, 4), (16, 16), (37, 5)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("min_block", [1, 4, 1000])
def test_never_more_than_the_target(grid, min_block):
    g, n = np.random.default_rng(0), grid[0] * grid[1]
    for target in sorted({0, 1, 2, n // 4, n // 2, n}):
        for _ in range(20):
            mask = block_mask(g, grid, target, min_block)
            assert mask.shape == grid
            assert mask.dtype == bool
            assert mask.sum() <= target


@pytest.mark.parametrize("grid", [(6, 6), (16, 16), (12, 20)], ids=str)
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_close_to_the_target(grid, share):
    g, target = np.random.default_rng(1), int(grid[0] * grid[1] * share)
    counts = [block_mask(g, grid, target).sum() for _ in range(200)]
    assert np.mean(counts) > 0.85 * target - 1
    assert min(counts) >= 1


def test_masks_are_blocks_all_over_the_grid():
    g = np.random.default_rng(2)
    masks = np.stack([block_mask(g, (12, 12), 36) for _ in range(800)])
    often = masks.mean(0)
    assert often.min() > 0.015  # the corners too, if seldom
    assert often.max() < 0.6
    for turned in (often[::-1], often[:, ::-1], often.T):
        np.testing.assert_allclose(often, turned, atol=0.08)
    neighbours = (masks[:, :, :-1] & masks[:, :, 1:]).sum() / masks[:, :, :-1].sum()
    assert neighbours > 0.6  # 0.25 if patches were drawn one by one


def test_the_smallest_block():
    """A single rectangle that fits the target is at least `min_block` large, but for rounding of its sides."""
    g = np.random.default_rng(3)
    firsts = [block_mask(g, (20, 20), 12, min_block=12).sum() for _ in range(200)]
    assert np.median(firsts) >= 9


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.5, 1.0])
def test_a_share_of_the_crops_is_masked(probability):
    g, places = np.random.default_rng(4), np.zeros(16)
    for _ in range(100):
        masks = batch_masks(g, 16, (8, 8), probability, (0.1, 0.5))
        assert masks.shape == (16, 64)
        assert masks.any(1).sum() == int(16 * probability)
        assert masks.sum(1).max(initial=0) <= 32
        places += masks.any(1)
    assert np.abs(places / 100 - probability).max() < 4.5 * 0.5 / 10 + 1e-9  # at any place of the batch


def test_every_batch_covers_the_range_of_ratios():
    g = np.random.default_rng(5)
    targets = np.sort([np.sort(batch_masks(g, 10, (16, 16), 1.0, (0.1, 0.5)).sum(1)) for _ in range(50)], axis=1)
    edges = 256 * np.linspace(0.1, 0.5, 11)
    means = targets.mean(0)
    assert ((means > edges[:-1] - 12) & (means < edges[1:])).all()  # block masks fall short by a few


def test_masks_depend_on_the_stream_alone():
    one, same, other = (batch_masks(np.random.default_rng(s), 8, (8, 8), 0.5, (0.1, 0.5)) for s in (6, 6, 7))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("probability", [0.3, 1.0])
def test_some_crops_get_the_masks_they_have_in_the_whole_batch(probability):
    def make(chosen=None):
        return batch_masks(np.random.default_rng(8), 12, (8, 8), probability, (0.1, 0.5), chosen=chosen)

    whole = make()
    for chosen in (range(12), [0, 1, 6, 7], [11], []):
        assert np.array_equal(make(chosen), whole[list(chosen)])
    assert len({m.tobytes() for m in whole if m.any()}) == int(12 * probability)


def test_no_crops():
    assert batch_masks(np.random.default_rng(0), 0, (4, 4), 0.5, (0.1, 0.5)).shape == (0, 16)
