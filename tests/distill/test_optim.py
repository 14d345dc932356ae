"""Parameter groups, schedules written into them, clipping by module, and the moving average. Multipliers are held by tests/golden."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from distill.models.backbone import Backbone, BackboneConfig
from distill.models.headed import HeadedBackbone, frozen_copy
from distill.models.heads import DINOHead, HeadConfig
from distill.optim import OptimConfig, Schedules, clip_each, make_optimizer, set_step, teacher_temperature, update_average

torch.set_num_threads(1)
HEAD = HeadConfig(prototypes=8, hidden=16, bottleneck=8, init="fan_in")


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = BackboneConfig(dim=16, depth=2, heads=2, patch=8, image_size=16, layer_scale=1.0, init="fan_in", registers=2)
    return HeadedBackbone(Backbone(config), DINOHead(16, HEAD), DINOHead(16, HEAD))


def group_of(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict:
    found = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    assert len(found) == 1
    return found[0]


def test_every_parameter_is_in_one_group():
    m = model()
    optimizer = make_optimizer(m.parts(), 2, OptimConfig())
    grouped = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(m.parameters()))
    for p in m.parameters():
        group_of(optimizer, p)


def test_frozen_parameters_are_left_out():
    m = model()
    m.backbone.mask_token.requires_grad_(False)
    m.ibot.requires_grad_(False)
    grouped = {id(p) for g in make_optimizer(m.parts(), 2, OptimConfig()).param_groups for p in g["params"]}
    assert id(m.backbone.mask_token) not in grouped
    assert not grouped & {id(p) for p in m.ibot.parameters()}
    assert len(grouped) == len([p for p in m.parameters() if p.requires_grad])


def test_factors_and_decay():
    m, config = model(), OptimConfig(layer_decay=0.5, patch_embed_lr=0.2)
    optimizer = make_optimizer(m.parts(), 2, config)
    b = m.backbone
    wanted = [
        (b.patch_embed.proj.weight, 0.5**3 * 0.2, True, False),
        (b.patch_embed.proj.bias, 0.5**3 * 0.2, False, False),
        (b.cls_token, 0.5**3, True, False),
        (b.register_tokens, 0.5**3, True, False),
        (b.blocks[0].attn.qkv.weight, 0.5**2, True, False),
        (b.blocks[1].norm2.weight, 0.5, False, False),
        (b.blocks[1].ls1.gamma, 0.5, False, False),
        (b.norm.weight, 1.0, False, False),
        (m.dino.mlp[0].weight, 1.0, True, False),
        (m.dino.mlp[0].bias, 1.0, False, False),
        (m.dino.last_layer.weight_v, 1.0, True, True),
        (m.ibot.last_layer.weight_g, 1.0, True, True),
    ]
    for parameter, factor, decayed, last in wanted:
        group = group_of(optimizer, parameter)
        assert (group["factor"], group["decayed"], group["last_layer"]) == (pytest.approx(factor), decayed, last)
    assert all(g["betas"] == (0.9, 0.999) for g in optimizer.param_groups)


def test_a_step_writes_rates_and_decay():
    m, config = model(), OptimConfig(lr=0.01, warmup=0.2, freeze_last_layer=0.3, layer_decay=0.5, weight_decay=(0.1, 0.5))
    optimizer, schedules = make_optimizer(m.parts(), 2, config), Schedules(config, 64, 50)
    for step in (0, 3, 9, 14, 15, 30, 49):
        set_step(optimizer, schedules, step)
        lr, decay = schedules.lr(step), schedules.weight_decay(step)
        assert group_of(optimizer, m.dino.mlp[0].weight)["lr"] == pytest.approx(lr)
        assert group_of(optimizer, m.backbone.blocks[0].attn.qkv.weight)["lr"] == pytest.approx(lr / 4)
        assert group_of(optimizer, m.dino.last_layer.weight_v)["lr"] == (0.0 if step < 15 else pytest.approx(lr))
        assert group_of(optimizer, m.dino.mlp[0].weight)["weight_decay"] == pytest.approx(decay)
        assert group_of(optimizer, m.dino.mlp[0].bias)["weight_decay"] == 0


def test_schedules_in_shares_of_the_run():
    config = OptimConfig(lr=0.016, min_lr=1e-5, warmup=0.25, weight_decay=(0.04, 0.4), ema=(0.9, 1.0))
    s = Schedules(config, 256, 200)
    assert s.lr(0) == 0
    assert s.lr(49) == pytest.approx(0.008)  # at a quarter of 1,024 images half the rate
    assert max(s.lr(i) for i in range(200)) == pytest.approx(0.008)
    assert s.lr(199) < 2e-5
    assert s.lr(200) == 1e-5
    assert (s.weight_decay(0), s.weight_decay(200)) == (pytest.approx(0.04), 0.4)
    assert (s.ema(0), s.ema(200)) == (pytest.approx(0.9), 1.0)
    assert s.ema(100) == pytest.approx(0.95)
    longer = Schedules(config, 256, 2000)
    assert longer.lr(1000) == pytest.approx(s.lr(100), rel=0.02)


@pytest.mark.parametrize("total", [1, 2, 3, 10])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_short_runs_have_finite_schedules(total, warmup):
    s = Schedules(OptimConfig(warmup=warmup, freeze_last_layer=1.0), 8, total)
    temperature = teacher_temperature((0.04, 0.07), warmup, total)
    for step in range(total + 1):
        for value in (s.lr(step), s.weight_decay(step), s.ema(step), s.last_layer_lr(step), temperature(step)):
            assert math.isfinite(value)
            assert value >= 0
        assert 0.04 <= temperature(step) <= 0.07


def test_a_frozen_last_layer_stays_while_its_moments_go_on():
    m, config = model(), OptimConfig(lr=0.01, warmup=0.0, freeze_last_layer=0.5)
    optimizer, schedules = make_optimizer(m.parts(), 2, config), Schedules(config, 64, 4)
    before = m.dino.last_layer.weight_v.clone()
    for step in range(4):
        set_step(optimizer, schedules, step)
        optimizer.zero_grad()
        m.dino(torch.randn(6, 16)).square().sum().backward()
        optimizer.step()
        assert torch.equal(before, m.dino.last_layer.weight_v) == (step < 2)
        assert optimizer.state[m.dino.last_layer.weight_v]["step"] == step + 1


def test_each_module_is_clipped_by_itself():
    m = model()
    for p in m.backbone.parameters():
        p.grad = torch.full_like(p, 10.0)
    for p in m.dino.parameters():
        p.grad = torch.full_like(p, 1e-4)
    large = sum(p.numel() for p in m.backbone.parameters()) ** 0.5 * 10
    small = sum(p.numel() for p in m.dino.parameters()) ** 0.5 * 1e-4
    norms = clip_each(m.parts().values(), 3.0)
    assert [n.item() for n in norms] == [pytest.approx(large), pytest.approx(small), 0.0]  # the iBOT head has no gradient
    after = sum(p.grad.square().sum() for p in m.backbone.parameters()) ** 0.5
    assert after.item() == pytest.approx(3, rel=1e-4)
    assert all(torch.equal(p.grad, torch.full_like(p, 1e-4)) for p in m.dino.parameters())


def test_a_norm_that_is_not_finite_is_told():
    m = model()
    m.backbone.cls_token.grad = torch.full_like(m.backbone.cls_token, float("nan"))
    assert not clip_each([m.backbone], 3.0)[0].isfinite()


def test_the_average():
    a, b = model(0), model(1)
    average = frozen_copy(a)
    update_average(average, b, 0.75)
    for name, p in average.named_parameters():
        want = 0.75 * dict(a.named_parameters())[name] + 0.25 * dict(b.named_parameters())[name]
        torch.testing.assert_close(p, want.detach())
        assert not p.requires_grad
    assert not average.training


@pytest.mark.parametrize(("momentum", "equals"), [(1.0, 0), (0.0, 1)])
def test_momenta_at_the_ends(momentum, equals):
    models = (model(0), model(1))
    average = frozen_copy(models[0])
    update_average(average, models[1], momentum)
    for p, q in zip(average.parameters(), models[equals].parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=0, atol=0)


def test_the_models_have_no_buffers():
    """The average takes parameters alone: a buffer would need to be copied."""
    assert list(model().buffers()) == []


def test_the_average_of_a_constant_is_reached_geometrically():
    average, target = nn.Linear(2, 2), nn.Linear(2, 2)
    start = (average.weight - target.weight).abs().max().item()
    for _ in range(20):
        update_average(average, target, 0.9)
    assert (average.weight - target.weight).abs().max().item() == pytest.approx(start * 0.9**20, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 1e-7}, "at least min_lr"),
        ({"lr": float("nan")}, "must be finite"),
        ({"min_lr": -1.0}, "at least 0"),
        ({"warmup": 1.1}, "warmup is a share"),
        ({"freeze_last_layer": -0.1}, "freeze_last_layer is a share"),
        ({"ema": (0.9, 1.1)}, "ema holds two momenta"),
        ({"weight_decay": (-0.1, 0.4)}, "weight_decay holds"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"layer_decay": 0.0}, "layer_decay"),
        ({"beta2": 1.0}, "beta2"),
    ],
)
def test_problems(changes, said):
    found = OptimConfig(**changes).problems()
    assert len(found) == 1
    assert said in found[0]
    assert OptimConfig().problems() == []


@pytest.mark.parametrize("changes", [{"patch_embed_lr": -1.0}, {"lr": float("inf")}, {"clip": float("nan")}], ids=str)
def test_problems_of_values_that_ruin_a_run(changes):
    assert OptimConfig(**changes).problems()


def test_norms_of_any_name_are_not_decayed():
    """`bn1` of a CNN, `layers.1` of a projector; and biases that are no Linear's, such as Eva's `q_bias`."""
    projector = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4))
    network = nn.ModuleDict({"conv1": nn.Conv2d(3, 4, 1), "bn1": nn.BatchNorm2d(4)})
    network.register_parameter("q_bias", nn.Parameter(torch.zeros(4)))
    parts = {"backbone": network, "match": projector}
    found = make_optimizer(parts, 1, OptimConfig()).param_groups
    decayed = {p for group in found if group["decayed"] for p in group["params"]}
    assert decayed == {network["conv1"].weight, projector[0].weight, projector[3].weight}
    assert sum(len(group["params"]) for group in found) == sum(len(list(m.parameters())) for m in parts.values())
