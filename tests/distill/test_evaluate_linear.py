"""The linear probe against scikit-learn's logistic regression and against torch's own SGD."""

import time

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from distill.encoder import Features
from distill.evaluate import linear
from distill.evaluate.linear import Columns, ProbeSettings, feature_sets, probe, probe_features, scaled_lr, train_heads

LRS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def data(n: int, seed: int, dim: int = 64, classes: int = 8, separation: float = 0.35):
    centres = separation * torch.randn(classes, dim, generator=torch.Generator().manual_seed(7))
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=g)
    return centres[labels] + torch.randn(n, dim, generator=g) * torch.logspace(0.5, -0.5, dim), labels


def features(cls: torch.Tensor, mean_patch: torch.Tensor | None = None) -> Features:
    return Features(cls, (torch.zeros_like(cls) if mean_patch is None else mean_patch)[:, None])


@pytest.mark.parametrize("separation", [0.2, 0.5, 2.0])
def test_close_to_logistic_regression(separation):
    (x, y), (tx, ty) = (data(1500, s, separation=separation) for s in (0, 1))
    ours = 100 * (probe(features(x), y, features(tx), ProbeSettings(LRS)).predicted == ty).float().mean().item()
    scaled = (x - x.mean(0)) / x.std(0), (tx - x.mean(0)) / x.std(0)
    theirs = max(100 * LogisticRegression(C=c, max_iter=500).fit(scaled[0], y).score(scaled[1], ty) for c in (1e-3, 1e-2, 0.1))
    assert ours > 12.5 + 10  # chance, and well above
    assert ours > theirs - 2.5


def test_no_signal_gives_chance():
    (x, _), (tx, _) = data(1500, 0), data(1500, 1)
    g = torch.Generator().manual_seed(0)
    y, ty = torch.randint(8, (1500,), generator=g), torch.randint(8, (1500,), generator=g)
    assert 8 < 100 * (probe(features(x), y, features(tx), ProbeSettings(LRS)).predicted == ty).float().mean().item() < 17


def test_mean_patch_is_chosen_where_it_carries_the_label():
    (x, y), (tx, ty) = (data(1000, s) for s in (0, 1))
    noise = torch.randn(1000, 64, generator=torch.Generator().manual_seed(5))
    hidden = probe(features(noise, x), y, features(noise, tx), ProbeSettings(LRS))
    assert hidden.features == "cls+mean_patch"
    assert (hidden.predicted == ty).float().mean() > 0.4
    assert probe(features(x, noise), y, features(tx, noise), ProbeSettings(LRS)).features == "cls"


@pytest.mark.parametrize("standardize", [True, False])
def test_heads_are_torchs_sgd(standardize):
    """All heads at once equal each head trained alone by autograd, torch.optim.SGD and its cosine schedule."""
    x, y = data(40, 0, dim=6, classes=3)
    wide = torch.cat([x, x**2], 1)
    lrs = (0.5, 40.0) if standardize else (0.5, 2.0)  # 40: the bound on the bias binds
    settings = ProbeSettings(lrs, steps=25, batch=16, standardize=standardize, seed=3)
    together = train_heads([x, wide], y, 3, settings)
    g = torch.Generator().manual_seed(3)
    order = [i for _ in range(13) for i in torch.randperm(40, generator=g)[:32].split(16)][:25]
    for features_, heads in zip((x, wide), together, strict=True):
        z = (features_ - features_.mean(0)) / features_.std(0, correction=0) if standardize else features_
        for i, lr in enumerate(settings.lrs):
            layer = nn.Linear(z.shape[1], 3)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
            rate = scaled_lr(lr, 16)
            rates = (rate / z.shape[1], min(rate, 1.0)) if standardize else (rate, rate)
            groups = [{"params": [p], "lr": r} for p, r in zip((layer.weight, layer.bias), rates, strict=True)]
            optimizer = torch.optim.SGD(groups, momentum=0.9)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 25)
            for index in order:
                optimizer.zero_grad()
                F.cross_entropy(layer(z[index]), y[index]).backward()
                optimizer.step()
                schedule.step()
            torch.testing.assert_close(heads.logits(features_)[:, i], layer(z), atol=2e-4, rtol=2e-4)


def test_deterministic_and_leaves_global_state_alone():
    x, y = data(600, 0)
    torch.manual_seed(0)
    torch.set_num_threads(2)  # as it was before the test once the fixture is done
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    first, second = (probe(features(x), y, features(x), ProbeSettings(LRS)) for _ in range(2))
    assert torch.equal(first.predicted, second.predicted)
    assert (first.lr, first.features, first.held_out_top1) == (second.lr, second.features, second.held_out_top1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads


def test_labels_may_be_any_numbers():
    x, y = data(600, 0, classes=3, separation=2.0)
    names = torch.tensor([5, 17, 900])
    predicted = probe(features(x), names[y], features(x), ProbeSettings(LRS)).predicted
    assert (predicted == names[y]).float().mean() > 0.95


def test_diverging_heads_are_not_chosen_and_all_diverging_is_a_sentence():
    x, y = data(600, 0, separation=0.1)
    plain = {"steps": 100, "standardize": False}
    mixed = probe(features(x), y, features(x), ProbeSettings((0.1, 3e38), **plain))
    assert mixed.lr == 0.1
    only = probe(features(x), y, features(x), ProbeSettings((3e38,), **plain))
    assert isinstance(only, str)
    assert "diverged" in only


def test_constant_features_do_no_harm():
    x, y = data(600, 0, separation=1.0)
    constant = torch.cat([x, torch.full((600, 3), 3.7)], 1)
    plain = probe(features(x), y, features(x), ProbeSettings(LRS))
    moved = torch.cat([x, torch.full((600, 3), 3.7001)], 1)
    padded = probe(features(constant), y, features(moved), ProbeSettings(LRS))
    assert (plain.predicted == padded.predicted).float().mean() > 0.97


def test_tiny_gallery_is_a_sentence():
    x, _ = data(2, 0)
    assert "too small" in str(probe(features(x), torch.tensor([0, 1]), features(x), ProbeSettings(LRS)))


def test_probe_features_of_a_backbones_last_blocks():
    from distill.models.backbone import Backbone, BackboneConfig

    backbone = Backbone(BackboneConfig(dim=32, depth=2, heads=2, patch=8, image_size=32, layer_scale=1.0, init="fan_in")).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        layers, out = backbone.intermediate(images, [0, 1]), backbone(images)
    x = probe_features(layers, avgpool=True)
    assert x.shape == (3, 96)
    torch.testing.assert_close(x[:, 32:], torch.cat([out.cls, out.patches.mean(1)], 1))


def test_fast():
    """4,000 x 64 gallery, 5,000 test images, eight learning rates, two feature sets: seconds of one core."""
    (x, y), (tx, _) = data(4000, 0), data(5000, 1)
    before = time.process_time()
    probe(features(x), y, features(tx), ProbeSettings(LRS))
    assert time.process_time() - before < 5


def test_layers_widen_the_grid_and_the_best_is_named():
    """The label is in the third layer from the end alone: only sets of four layers can see it."""
    (x, y), (tx, ty) = (data(1000, s, separation=0.6) for s in (0, 1))
    g = torch.Generator().manual_seed(5)

    def layers(hidden: torch.Tensor) -> list[Features]:
        noise = [torch.randn(1000, 64, generator=g) for _ in range(3)]
        return [features(f) for f in (noise[0], hidden, noise[1], noise[2])]

    gallery, test = layers(x), layers(tx)
    deep = probe(gallery, y, test, ProbeSettings(LRS, steps=200, layers=(1, 4)))
    assert deep.features.startswith("last4_cls")
    assert (deep.predicted == ty).float().mean() > 0.5
    shallow = probe(gallery, y, test, ProbeSettings(LRS, steps=200))
    assert shallow.features in ("cls", "cls+mean_patch")
    assert (shallow.predicted == ty).float().mean() < 0.25
    assert list(feature_sets(gallery, (1, 4))) == ["cls", "cls+mean_patch", "last4_cls", "last4_cls+mean_patch"]
    assert list(feature_sets(gallery[-2:], (1, 4))) == ["cls", "cls+mean_patch"]
    assert "more than these features have" in str(probe(gallery[-1], y, test[-1], ProbeSettings(LRS, layers=(4,))))


def test_columns_are_what_one_tensor_would_be():
    x, y = data(90, 0, dim=6, classes=3)
    index = torch.randperm(90, generator=torch.Generator().manual_seed(1))[:50]
    settings = ProbeSettings((0.3, 1.0), steps=20, batch=16)
    whole = train_heads([torch.cat([x, x**2], 1)[index]], y[index], 3, settings)[0]
    parts = train_heads([Columns([x, x**2]).some(index)], y[index], 3, settings)[0]
    for name in ("weight", "bias", "shift", "scale"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))


def test_results_do_not_depend_on_how_many_rows_are_judged_at_once(monkeypatch):
    x, y = data(600, 0)
    whole = probe(features(x), y, features(x), ProbeSettings(LRS, steps=100))
    monkeypatch.setattr(linear, "CHUNK_ELEMENTS", 1000)
    sliced = probe(features(x), y, features(x), ProbeSettings(LRS, steps=100))
    assert torch.equal(whole.predicted, sliced.predicted)
    assert (whole.lr, whole.features, whole.held_out_top1) == (sliced.lr, sliced.features, sliced.held_out_top1)
