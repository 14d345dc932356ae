"""Photometric changes against torchvision's, crop by crop; and how often each is drawn."""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from distill.data.crops import CropsConfig
from distill.data.photometric import Changes, apply_changes, gaussian_blur

torch.set_num_threads(1)  # small tensors: a second thread costs more than it does


@dataclass(frozen=True)
class One:
    """One crop's parameters."""

    jitter: tuple[float, ...] = (1.0, 1.0, 1.0, 0.0)
    order: tuple[int, ...] = (0, 1, 2, 3)
    grey: bool = False
    sigma: float = 0.0
    solarise: bool = False


def together(ones: list[One]) -> Changes:
    kinds = {"jitter": np.float32, "sigma": np.float32}
    return Changes(**{f.name: np.array([getattr(o, f.name) for o in ones], kinds.get(f.name)) for f in fields(One)})


def apart(changes: Changes) -> list[One]:
    columns = [getattr(changes, f.name).tolist() for f in fields(One)]
    return [One(tuple(j), tuple(o), *rest) for j, o, *rest in zip(*columns, strict=True)]


NOTHING = One()
OPS = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
# torchvision rounds luma's red to 0.2989; hue divides by spans that may be tiny.
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 3e-4}


@pytest.fixture
def crops() -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.rand(6, 3, 17, 23)
    x[1] = x[1].mean(0)  # grey: no hue, no saturation
    x[2] = 0.0
    x[3] = 1.0
    x[4, 0] = x[4, 1]  # two channels tie
    x[5] = (x[5] * 4).round() / 4
    return x


def theirs(x: torch.Tensor, change: One) -> torch.Tensor:
    """The same change by torchvision's functions, one crop [3, H, W]."""
    for op in change.order:
        if change.jitter[op] != NOTHING.jitter[op]:
            x = OPS[op](x, change.jitter[op])
    if change.grey:
        x = tv.rgb_to_grayscale(x, num_output_channels=3)
    if change.sigma:
        x = tv.gaussian_blur(x, [9, 9], [change.sigma, change.sigma])
    if change.solarise:
        x = tv.solarize(x, 128 / 255)
    return x


def factors(op: int, value: float) -> tuple[float, float, float, float]:
    neutral = [1.0, 1.0, 1.0, 0.0]
    neutral[op] = value
    return (neutral[0], neutral[1], neutral[2], neutral[3])


@pytest.mark.parametrize("value", [0.0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize("op", [0, 1, 2], ids=["brightness", "contrast", "saturation"])
def test_factors(crops, op, value):
    change = replace(NOTHING, jitter=factors(op, value))
    got = apply_changes(crops.clone(), together([change] * 6))
    torch.testing.assert_close(got, torch.stack([OPS[op](x, value) for x in crops]), **CLOSE)


@pytest.mark.parametrize("shift", [-0.5, -0.1, -0.01, 0.0, 0.05, 0.1, 0.3, 0.5])
def test_hue(crops, shift):
    got = apply_changes(crops.clone(), together([replace(NOTHING, jitter=factors(3, shift))] * 6))
    torch.testing.assert_close(got, torch.stack([tv.adjust_hue(x, shift) for x in crops]), **CLOSE)
    torch.testing.assert_close(got.amax(1), crops.amax(1))  # value and chroma stay
    torch.testing.assert_close(got.amin(1), crops.amin(1))


def test_greyscale(crops):
    got = apply_changes(crops.clone(), together([replace(NOTHING, grey=True)] * 6))
    torch.testing.assert_close(got, tv.rgb_to_grayscale(crops, num_output_channels=3), **CLOSE)
    assert torch.equal(got[:, 0], got[:, 2])


def test_solarise():
    levels = torch.arange(256).div(255).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    got = apply_changes(levels.clone(), together([replace(NOTHING, solarise=True)]))
    want = tv.solarize((levels * 255).round().to(torch.uint8), 128)  # as Pillow, and so as the DINO paper's code
    assert torch.equal((got * 255).round().to(torch.uint8), want)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur(crops, sigma):
    got = apply_changes(crops.clone(), together([replace(NOTHING, sigma=sigma)] * 6))
    torch.testing.assert_close(got, tv.gaussian_blur(crops, [9, 9], [sigma, sigma]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (5, 40)])
def test_blur_of_crops_smaller_than_its_kernel(size):
    x = torch.rand(2, 3, *size)
    got = gaussian_blur(x, torch.tensor([0.5, 2.0]))
    assert got.shape == x.shape
    assert got.min() >= x.min() - 1e-6
    assert got.max() <= x.max() + 1e-6
    torch.testing.assert_close(gaussian_blur(torch.full_like(x, 0.3), torch.tensor([0.5, 2.0])), torch.full_like(x, 0.3))


def drawn(n: int, config: CropsConfig, view: int, seed: int = 0) -> list[One]:
    return apart(Changes.draw(np.random.default_rng(seed).random((n, Changes.DRAWS)), config, view))


def test_a_batch_is_its_crops_one_by_one_and_torchvisions():
    """Every parameter is the crop's own: order of the jitter, factors, deviation, greyscale, solarisation."""
    torch.manual_seed(1)
    x, changes = torch.rand(24, 3, 20, 20), drawn(24, CropsConfig(blur=(0.5, 0.5, 0.5), grey=0.3, solarise=0.5), 1)
    assert len({c.order for c in changes}) > 5
    got = apply_changes(x.clone(), together(changes))
    for i, change in enumerate(changes):
        torch.testing.assert_close(got[i], apply_changes(x[i : i + 1].clone(), together([change]))[0], rtol=0, atol=1e-6)
        if not change.solarise:  # which jumps at 128, so that rounding before it shows
            torch.testing.assert_close(got[i], theirs(x[i], change), **CLOSE)
        else:
            far = (theirs(x[i], replace(change, solarise=False)) - 128 / 255).abs() > 1e-3
            torch.testing.assert_close(got[i][far], theirs(x[i], change)[far], **CLOSE)


def test_no_change_changes_nothing(crops):
    assert torch.equal(apply_changes(crops.clone(), together([NOTHING] * 6)), crops)
    neutral = replace(NOTHING, jitter=(1.0, 1.0, 1.0, 0.0))
    assert torch.equal(apply_changes(crops.clone(), together([neutral] * 6)), crops)


def test_values_stay_in_range():
    x, wild = torch.rand(40, 3, 8, 8), CropsConfig(jitter=(1.0, 1.0, 1.0, 0.5), jitter_p=1.0, solarise=1.0)
    got = apply_changes(x, together(drawn(40, wild, 1)))
    assert got.min() >= -1e-6
    assert got.max() <= 1 + 1e-6


def share(values: list[bool], p: float) -> None:
    assert abs(np.mean(values) - p) <= 4.5 * max(p * (1 - p), 1e-9) ** 0.5 / len(values) ** 0.5 + 1e-9


@pytest.mark.parametrize(("view", "blur", "solarise"), [(0, 1.0, 0.0), (1, 0.1, 0.2), (2, 0.5, 0.0)])
def test_probabilities_of_each_view(view, blur, solarise):
    """Blur as in the DINO paper: always on the first global crop, seldom on the second, on half of the local ones."""
    changes = drawn(4000, CropsConfig(), view)
    share([c.sigma > 0 for c in changes], blur)
    share([c.solarise for c in changes], solarise)
    share([c.grey for c in changes], 0.2)
    share([c.jitter != NOTHING.jitter for c in changes], 0.8)
    blurred = [c.sigma for c in changes if c.sigma]
    assert min(blurred) >= 0.1
    assert max(blurred) <= 2.0
    assert np.mean(blurred) == pytest.approx(1.05, abs=4.5 * 1.9 / 12**0.5 / len(blurred) ** 0.5)


def test_ranges_of_the_jitter():
    changes = [c for c in drawn(6000, CropsConfig(), 0) if c.jitter != NOTHING.jitter]
    values = np.array([c.jitter for c in changes])
    for column, middle, reach in zip(values.T, (1, 1, 1, 0), (0.4, 0.4, 0.2, 0.1), strict=True):
        assert column.min() >= middle - reach
        assert column.max() <= middle + reach
        assert column.mean() == pytest.approx(middle, abs=4.5 * 2 * reach / 12**0.5 / len(values) ** 0.5)
        assert column.std() == pytest.approx(2 * reach / 12**0.5, rel=0.05)
    assert np.abs(np.corrcoef(values.T) - np.eye(4)).max() < 0.07
    firsts = np.bincount([c.order[0] for c in changes], minlength=4) / len(changes)
    assert np.abs(firsts - 0.25).max() < 4.5 * (0.25 * 0.75 / len(changes)) ** 0.5
    assert all(sorted(c.order) == [0, 1, 2, 3] for c in changes)


def test_certain_and_impossible_changes():
    always = CropsConfig(jitter_p=1.0, grey=1.0, blur=(1.0, 1.0, 1.0), solarise=1.0)
    never = CropsConfig(jitter_p=0.0, grey=0.0, blur=(0.0, 0.0, 0.0), solarise=0.0)
    for view in range(3):
        assert all(
            c.jitter != NOTHING.jitter and c.grey and c.sigma and c.solarise == (view == 1) for c in drawn(200, always, view)
        )
        assert all(replace(c, order=(0, 1, 2, 3)) == NOTHING for c in drawn(200, never, view))


def test_settings_do_not_shift_the_stream():
    """What is left on is the same whatever else is switched off."""
    base = drawn(50, CropsConfig(), 0)
    for changed in ({"jitter_p": 0.0}, {"grey": 1.0}, {"jitter": (0.0, 0.0, 0.0, 0.0)}, {"blur": (0.0, 0.0, 0.0)}):
        got = drawn(50, CropsConfig(**changed), 0)
        for name in ("jitter", "grey", "sigma"):
            if not any(name in key for key in changed) and not (name == "sigma" and "blur" in changed):
                assert [getattr(c, name) for c in got] == [getattr(c, name) for c in base], (changed, name)


def test_any_part_of_the_crops_may_be_changed_in_turn():
    x, changes = torch.rand(30, 3, 12, 12), together(drawn(30, CropsConfig(blur=(0.5, 0.5, 0.5)), 1))
    whole = apply_changes(x.clone(), changes)
    parts = torch.cat([apply_changes(x[s : s + 7].clone(), changes[s : s + 7]) for s in range(0, 30, 7)])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)
    assert apart(changes[:4] + changes[4:]) == apart(changes)
