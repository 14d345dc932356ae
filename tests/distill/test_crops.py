"""Where crops are cut: always inside, of the asked share of the area, from images of every shape."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from distill.data.crops import CropsConfig, make_views, random_box
from distill.data.photometric import Changes

SHAPES = [(1, 1), (2, 1), (1, 3), (1000, 1), (1, 1000), (640, 480), (37, 1200), (3000, 5), (16, 16)]
PLAIN = CropsConfig(global_size=32, local_size=16, local_count=3, flip=0.0)


def boxes(width: int, height: int, scale: tuple[float, float], n: int = 3000, seed: int = 0) -> np.ndarray:
    g = np.random.default_rng(seed)
    return np.array([random_box(g, width, height, scale) for _ in range(n)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32), (1.0, 1.0), (0.001, 0.001)], ids=str)
def test_boxes_lie_inside(shape, scale):
    left, top, right, bottom = boxes(shape[0], shape[1], scale, 300).T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right > left).all()
    assert (bottom > top).all()
    assert (right <= shape[0]).all()
    assert (bottom <= shape[1]).all()


@pytest.mark.parametrize("scale", [(0.05, 0.32), (0.1, 0.6)], ids=str)
def test_area_and_aspect_of_boxes(scale):
    left, top, right, bottom = boxes(1000, 1000, scale).T
    share, aspect = (right - left) * (bottom - top) / 1e6, (right - left) / (bottom - top)
    assert share.min() >= scale[0] - 0.003
    assert share.max() <= scale[1] + 0.003
    assert share.mean() == pytest.approx(sum(scale) / 2, abs=4.5 * (scale[1] - scale[0]) / 12**0.5 / 3000**0.5)
    assert aspect.min() >= 0.74
    assert aspect.max() <= 1.35
    assert np.log(aspect).mean() == pytest.approx(0, abs=4.5 * 2 * math.log(4 / 3) / 12**0.5 / 3000**0.5)
    middle = (left + right) / 2
    assert np.corrcoef(middle, share)[0, 1] == pytest.approx(0, abs=0.08)
    assert middle.mean() == pytest.approx(500, abs=15)


@pytest.mark.parametrize("shape", [(640, 480), (300, 100), (1000, 90)], ids=str)
def test_boxes_are_distributed_as_torchvisions(shape):
    """Its RandomResizedCrop is what DINOv2 uses; on narrow images many tries fail, and both end in the centre."""
    torch.manual_seed(0)
    image, scale = torch.empty(3, shape[1], shape[0]), (0.32, 1.0)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(3000)])  # top left h w
    left, top, right, bottom = boxes(shape[0], shape[1], scale).T
    for ours, other in (
        (left, theirs[:, 1]),
        (top, theirs[:, 0]),
        (right - left, theirs[:, 3]),
        (bottom - top, theirs[:, 2]),
    ):
        spread = max(ours.std(), other.std(), 0.3)
        assert abs(ours.mean() - other.mean()) < 4.5 * spread * (2 / 3000) ** 0.5
        assert abs(ours.std() - other.std()) < 0.1 * spread


def test_every_place_is_reached():
    found = boxes(5, 5, (0.35, 0.37))  # 3 x 3, or nearly
    assert {tuple(b) for b in found} >= {(x, y, x + 3, y + 3) for x in range(3) for y in range(3)}


def test_the_centre_when_nothing_fits():
    assert random_box(np.random.default_rng(0), 1000, 1, (0.9, 1.0)) == (499, 0, 500, 1)
    assert random_box(np.random.default_rng(0), 1000, 30, (0.9, 1.0)) == (480, 0, 520, 30)
    assert random_box(np.random.default_rng(0), 30, 1000, (0.9, 1.0)) == (0, 480, 30, 520)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_views_of_every_shape(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (shape[1], shape[0], 3), np.uint8)
    views = make_views(Image.fromarray(pixels), PLAIN, np.random.default_rng(1))
    assert [p.shape for p in views.pixels] == [(32, 32, 3)] * 2 + [(16, 16, 3)] * 3
    assert all(p.dtype == np.uint8 for p in views.pixels)
    assert len(views.changes) == 5
    assert all(isinstance(c, Changes) for c in views.changes)
    assert not any(c.solarise for c in [views.changes[0], *views.changes[2:]])


def test_a_whole_crop_is_the_resized_image():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    config = CropsConfig(global_size=32, local_count=0, flip=0.0, global_scale=(1.0, 1.0))
    found = [make_views(image, config, np.random.default_rng(s)).pixels[0] for s in range(40)]
    whole = [p for p in found if np.array_equal(p, np.asarray(image))]  # where the aspect came out as 1, or all tries failed
    assert whole
    flipped = CropsConfig(global_size=32, local_count=0, flip=1.0, global_scale=(1.0, 1.0))
    for seed, straight in enumerate(found):
        assert np.array_equal(make_views(image, flipped, np.random.default_rng(seed)).pixels[0], straight[:, ::-1])


def test_half_of_the_crops_are_flipped():
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 1, 3)))
    config = CropsConfig(global_size=16, local_size=8, local_count=2)
    views = [make_views(ramp, config, np.random.default_rng(s)).pixels for s in range(300)]
    for i in range(4):
        flipped = np.mean([v[i][:, 0].mean() > v[i][:, -1].mean() for v in views])
        assert abs(flipped - 0.5) < 4.5 * 0.5 / 300**0.5


def test_global_crops_are_large_and_local_ones_small():
    """The range of a ramp's values inside a crop tells how wide the crop was."""
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (256, 1, 3)))
    config = CropsConfig(global_size=64, local_size=64, local_count=2)
    widths = np.array(
        [[np.ptp(p) / 255 for p in make_views(ramp, config, np.random.default_rng(s)).pixels] for s in range(100)]
    )
    assert widths[:, :2].mean() > 0.7
    assert widths[:, 2:].mean() < 0.5
    assert widths[:, :2].min() > (0.32 * 0.75) ** 0.5 - 0.05
    assert widths[:, 2:].max() < (0.32 * 4 / 3) ** 0.5 + 0.05


def test_views_depend_on_the_stream_alone():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    one, same, other = (make_views(image, PLAIN, np.random.default_rng(s)) for s in ((5, 2, 7, 3), (5, 2, 7, 3), (5, 2, 7, 4)))
    assert all(np.array_equal(a, b) for a, b in zip(one.pixels, same.pixels, strict=True))
    assert one.changes == same.changes
    assert not all(np.array_equal(a, b) for a, b in zip(one.pixels, other.pixels, strict=True))
    assert one.changes != other.changes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"global_size": 0}, "global_size and local_size"),
        ({"local_count": -1}, "local_count"),
        ({"global_scale": (0.5, 0.4)}, "global_scale must be two shares"),
        ({"local_scale": (0.0, 0.4)}, "local_scale must be two shares"),
        ({"local_scale": (0.2, 1.1)}, "local_scale must be two shares"),
        ({"flip": 1.5}, "flip, jitter_p, grey and solarise"),
        ({"grey": -0.1}, "flip, jitter_p, grey and solarise"),
        ({"grey": float("nan")}, "flip, jitter_p, grey and solarise"),
        ({"blur": (0.0, 1.1, 0.0)}, "blur are probabilities"),
        ({"jitter": (0.4, 0.4, 0.2, 0.6)}, "hue at most 0.5"),
        ({"jitter": (-0.4, 0.4, 0.2, 0.1)}, "at least 0"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma"),
        ({"blur_sigma": (2.0, 1.0)}, "blur_sigma"),
    ],
)
def test_problems(changes, said):
    found = CropsConfig(**changes).problems()
    assert len(found) == 1
    assert said in found[0]
    assert CropsConfig().problems() == []
    assert CropsConfig(local_count=0, global_scale=(1.0, 1.0), blur=(0.0, 0.0, 0.0)).problems() == []
