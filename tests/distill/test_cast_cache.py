"""Copies of weights in another format are never older than the weight, and die with it."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.cast_cache import CastCache
from distill.models.backbone import Backbone, BackboneConfig
from distill.models.headed import HeadedBackbone, frozen_copy
from distill.models.heads import DINOHead, HeadConfig
from distill.optim import OptimConfig, make_optimizer, update_average

BF16 = torch.bfloat16


def weight(rows: int = 6, columns: int = 4, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))


def test_a_copy_is_made_once():
    cast, w = CastCache(), weight()
    first = cast(w, BF16)
    assert torch.equal(first, w.detach().bfloat16())
    assert not first.requires_grad
    assert cast(w, BF16) is first
    assert cast(w, torch.float32).data_ptr() == w.data_ptr()  # nothing to do
    assert not cast(w, torch.float32).requires_grad


def test_scale_and_norm():
    cast, w, scale, g = CastCache(), weight(), torch.rand(6), torch.rand(6, 1) + 0.5
    torch.testing.assert_close(cast(w, torch.float32, scale), scale[:, None] * w.detach())
    unit = w.detach() / w.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(cast(w, torch.float32, normed=True), unit)
    torch.testing.assert_close(cast(w, torch.float32, g, normed=True), g * unit)
    torch.testing.assert_close(cast(w, BF16, g, normed=True), (g * unit).bfloat16())


def test_uses_of_one_weight_do_not_mix():
    cast, w, g = CastCache(), weight(), torch.rand(6, 1)
    for _ in range(2):
        assert torch.equal(cast(w, BF16), w.detach().bfloat16())
        torch.testing.assert_close(cast(w, torch.float64), w.detach().double())
        assert cast(w, BF16, g, normed=True).float().norm(dim=1).sub(g[:, 0]).abs().max() < 0.01
        torch.testing.assert_close(cast(w, BF16, g), (g * w.detach()).bfloat16())


def add_in_place(w: nn.Parameter) -> None:
    with torch.no_grad():
        w.add_(1)


def copy_into_a_view(w: nn.Parameter) -> None:
    with torch.no_grad():
        w[2:4].copy_(torch.zeros(2, w.shape[1]))


def swap_storage(w: nn.Parameter) -> None:
    w.data = torch.randn_like(w)


def load(w: nn.Parameter) -> None:
    holder = nn.Module()
    holder.w = w
    holder.load_state_dict({"w": torch.randn_like(w)})


def average(w: nn.Parameter) -> None:
    mine, other = nn.Module(), nn.Module()
    mine.w, other.w = w, nn.Parameter(torch.randn_like(w))
    update_average(mine, other, 0.5)


def optimise(w: nn.Parameter) -> None:
    """By the optimiser of the training, whose fused kernel does not raise versions by itself."""
    holder = nn.Module()
    holder.w = w
    optimizer = make_optimizer({"head": holder}, 1, OptimConfig())
    assert all(g["fused"] for g in optimizer.param_groups)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for _ in range(2):
        w.grad = torch.randn_like(w)
        optimizer.step()


CHANGES: list[Callable[[nn.Parameter], None]] = [add_in_place, copy_into_a_view, swap_storage, load, average, optimise]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_changed_weight_is_cast_again(change, scaled):
    cast, w, scale = CastCache(), weight(), torch.rand(6) if scaled else None
    old = cast(w, BF16, scale).clone()
    change(w)
    fresh = (w.detach() if scale is None else w.detach() * scale[:, None]).bfloat16()
    assert torch.equal(cast(w, BF16, scale), fresh)
    assert not torch.equal(fresh, old)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_changed_scale_too(change):
    cast, w, g = CastCache(), weight(), weight(columns=1, seed=1)
    old = cast(w, BF16, g, normed=True).clone()
    change(g)
    fresh = (w.detach() * (g.detach() / w.detach().norm(dim=1, keepdim=True))).bfloat16()
    torch.testing.assert_close(cast(w, BF16, g, normed=True), fresh)
    assert not torch.equal(fresh, old)


def model() -> Any:
    torch.manual_seed(0)
    config = BackboneConfig(dim=16, depth=2, heads=2, patch=8, image_size=16, layer_scale=1.0, init="fan_in")
    head = HeadConfig(prototypes=8, hidden=16, bottleneck=8, init="fan_in")
    return HeadedBackbone(Backbone(config), DINOHead(16, head))


def output(made: Any, images: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", BF16):
        return made.dino.logits(made.dino.bottleneck(made.backbone(images).cls))


def without_cache(made: Any, images: Tensor) -> Tensor:
    fresh = model()
    fresh.load_state_dict(made.state_dict())
    return output(fresh.train(made.training), images)


def test_a_model_in_training_is_never_behind_its_weights():
    made, images = model().train(), torch.randn(4, 3, 16, 16)
    averaged = frozen_copy(made)
    optimizer = make_optimizer(made.parts(), 2, OptimConfig())
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    before = output(averaged, images)
    for _ in range(3):
        with torch.autocast("cpu", BF16):
            loss = made.dino(made.backbone(images).cls).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_average(averaged, made, 0.5)
        assert torch.equal(output(made, images), without_cache(made, images))
        assert torch.equal(output(averaged, images), without_cache(averaged, images))
    assert not torch.equal(before, output(averaged, images))


def test_a_deep_copy_shares_nothing():
    made, images = model().eval(), torch.randn(4, 3, 16, 16)
    before = output(made, images)
    other = copy.deepcopy(made)
    assert other.backbone.cast is not made.backbone.cast
    assert other.backbone.cast is other.backbone.blocks[0].cast
    assert len(other.backbone.cast._kept) == 0
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p))
    assert torch.equal(output(other, images), before)
    assert not torch.equal(output(made, images), before)


def test_a_cache_is_no_part_of_what_is_pickled():
    cast, w = CastCache(), weight()
    cast(w, BF16)
    assert len(pickle.loads(pickle.dumps(cast))._kept) == 0


def test_a_copy_dies_with_its_weight():
    cast, w = CastCache(), weight()
    kept = weakref.ref(cast(w, BF16))
    gc.collect()
    assert kept() is not None
    del w
    gc.collect()
    assert kept() is None
    assert len(cast._kept) == 0


def test_an_old_copy_dies_when_its_weight_changes():
    cast, w = CastCache(), weight()
    kept = weakref.ref(cast(w, BF16))
    add_in_place(w)
    cast(w, BF16)
    gc.collect()
    assert kept() is None


def test_switched_off_it_keeps_nothing():
    cast, w = CastCache(), weight()
    cast.enabled = False
    first = cast(w, BF16)
    w.data.mul_(2)  # tells no version
    assert torch.equal(cast(w, BF16), 2 * first)
    assert len(cast._kept) == 0
    assert not cast(w, BF16).requires_grad


def test_clear():
    cast, w = CastCache(), weight()
    first = cast(w, BF16)
    cast.clear()
    assert cast(w, BF16) is not first
