"""Where crops are cut: always inside, of the asked share of the area, from images of every shape."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from distill.data.crops import DRAWS, TRIES, CropsConfig, batch_draws, make_views, random_boxes, useful_side, view_changes

SHAPES = [(1, 1), (2, 1), (1, 3), (1000, 1), (1, 1000), (640, 480), (37, 1200), (3000, 5), (16, 16)]
PLAIN = CropsConfig(global_size=32, local_size=16, local_count=3, flip=0.0)


def boxes(width: int, height: int, scale: tuple[float, float], n: int = 3000, seed: int = 0) -> np.ndarray:
    u = np.random.default_rng(seed).random((n, TRIES, 4))
    return random_boxes(u, width, height, np.array([scale] * n))


def views_of(image: Image.Image, config: CropsConfig, seed: int = 0, place: int = 0) -> list[np.ndarray]:
    """Crops [h, w, 3]."""
    draws = batch_draws(seed, 0, range(place, place + 1), 2 + config.local_count)[0]
    return [v.permute(1, 2, 0).numpy() for v in make_views(image, config, draws)]


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
    assert tuple(boxes(1000, 1, (0.9, 1.0), 1)[0]) == (499, 0, 500, 1)
    assert tuple(boxes(1000, 30, (0.9, 1.0), 1)[0]) == (480, 0, 520, 30)
    assert tuple(boxes(30, 1000, (0.9, 1.0), 1)[0]) == (0, 480, 30, 520)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_views_of_every_shape(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (shape[1], shape[0], 3), np.uint8)
    views = views_of(Image.fromarray(pixels), PLAIN, 1)
    assert [p.shape for p in views] == [(32, 32, 3)] * 2 + [(16, 16, 3)] * 3
    assert all(p.dtype == np.uint8 for p in views)


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def boxes_of(config: CropsConfig, draws: np.ndarray, size: tuple[int, int]) -> list[list[int]]:
    scale = np.array([config.global_scale] * 2 + [config.local_scale] * config.local_count)
    return random_boxes(draws[:, : 4 * TRIES].reshape(-1, TRIES, 4), size[0], size[1], scale).tolist()


def pillows(image: Image.Image, box: list[int], side: int) -> np.ndarray:
    """[3, side, side] int: cut, then resized, as torchvision's RandomResizedCrop does it with Pillow."""
    cut = image.crop((box[0], box[1], box[2], box[3])).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(cut).transpose(2, 0, 1).astype(int)


@pytest.mark.parametrize("size", [(500, 375), (96, 128), (24, 20)])
def test_crops_are_pillows(size):
    image = smooth(*size)
    config = CropsConfig(global_size=64, local_size=40, local_count=6, flip=0.0, local_scale=(0.01, 0.3))
    assert useful_side(config) > 375 / 2
    draws = batch_draws(3, 0, range(1), 8)[0]
    views = make_views(image, config, draws)
    for view, box in zip(views, boxes_of(config, draws, size), strict=True):
        assert abs(view.numpy() - pillows(image, box, view.shape[1])).max() <= 2


def test_large_images_are_reduced_first():
    """By whole pixels, and never so far that a crop would lack detail."""
    config = CropsConfig(
        global_size=32, local_size=16, local_count=2, flip=0.0, global_scale=(0.4, 1.0), local_scale=(0.3, 0.5)
    )
    side = useful_side(config)
    assert side == math.ceil(32 / (0.4 * 0.75) ** 0.5)
    large = smooth(8 * side, 8 * side + 5)
    draws = batch_draws(0, 0, range(1), 4)[0]
    for ours, from_small in zip(make_views(large, config, draws), make_views(large.reduce(8), config, draws), strict=True):
        assert torch.equal(ours, from_small)
    slightly = smooth(2 * side - 1, 2 * side)
    box = boxes_of(config, draws, slightly.size)[0]
    assert abs(make_views(slightly, config, draws)[0].numpy() - pillows(slightly, box, 32)).max() <= 2


def test_a_whole_crop_is_the_resized_image():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    config = CropsConfig(global_size=32, local_count=0, flip=0.0, global_scale=(1.0, 1.0))
    found = [views_of(image, config, s)[0] for s in range(40)]
    whole = [p for p in found if np.array_equal(p, np.asarray(image))]  # where the aspect came out as 1, or all tries failed
    assert whole
    flipped = CropsConfig(global_size=32, local_count=0, flip=1.0, global_scale=(1.0, 1.0))
    for seed, straight in enumerate(found):
        assert np.array_equal(views_of(image, flipped, seed)[0], straight[:, ::-1])


def test_half_of_the_crops_are_flipped():
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 1, 3)))
    config = CropsConfig(global_size=16, local_size=8, local_count=2)
    views = [views_of(ramp, config, s) for s in range(300)]
    for i in range(4):
        flipped = np.mean([v[i][:, 0].mean() > v[i][:, -1].mean() for v in views])
        assert abs(flipped - 0.5) < 4.5 * 0.5 / 300**0.5


def test_global_crops_are_large_and_local_ones_small():
    """The range of a ramp's values inside a crop tells how wide the crop was."""
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (256, 1, 3)))
    config = CropsConfig(global_size=64, local_size=64, local_count=2)
    widths = np.array([[np.ptp(p) / 255 for p in views_of(ramp, config, s)] for s in range(100)])
    assert widths[:, :2].mean() > 0.7
    assert widths[:, 2:].mean() < 0.5
    assert widths[:, :2].min() > (0.32 * 0.75) ** 0.5 - 0.05
    assert widths[:, 2:].max() < (0.32 * 4 / 3) ** 0.5 + 0.05


def test_a_slice_of_a_batch_draws_what_the_batch_does():
    whole = batch_draws(5, 7, range(12), 3)
    assert whole.shape == (12, 3, DRAWS)
    for images in (range(1), range(3, 7), range(11, 12), range(4, 4)):
        assert np.array_equal(batch_draws(5, 7, images, 3), whole[images.start : images.stop])
    others = [batch_draws(*key, range(12), 3) for key in ((5, 8), (6, 7), (7, 5))]
    assert not any(np.isin(other, whole).any() for other in others)
    assert len(np.unique(whole)) == whole.size
    assert whole.mean() == pytest.approx(0.5, abs=4.5 / 12**0.5 / whole.size**0.5)


def test_views_depend_on_their_draws_alone():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    one, same, other = views_of(image, PLAIN, 5, 3), views_of(image, PLAIN, 5, 3), views_of(image, PLAIN, 5, 4)
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_solarisation_is_for_the_second_global_crop_alone():
    draws = batch_draws(0, 0, range(200), 1)[:, 0]
    assert [view_changes(CropsConfig(), draws, v).solarise.any() for v in range(3)] == [False, True, False]


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
