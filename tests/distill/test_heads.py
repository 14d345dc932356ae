"""Projection heads and the backbone that wears them. Their numbers are held by tests/golden."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from distill.losses.targets import Dense
from distill.models.backbone import Backbone, BackboneConfig
from distill.models.headed import HeadedBackbone, frozen_copy
from distill.models.heads import DINOHead, HeadConfig, head_parameters

torch.set_num_threads(1)  # small tensors: a second thread costs more than it does

SMALL: dict[str, Any] = {"prototypes": 24, "hidden": 32, "bottleneck": 16, "init": "fan_in"}
BACKBONE = BackboneConfig(dim=32, depth=2, heads=2, patch=8, image_size=32, layer_scale=1.0, init="fan_in")


def head(dim: int = 32, **changes) -> Any:
    torch.manual_seed(0)
    return DINOHead(dim, HeadConfig(**(SMALL | changes)))


def headed(shared: bool = False) -> Any:
    torch.manual_seed(0)
    return HeadedBackbone(Backbone(BACKBONE), head(), None if shared else head(prototypes=12))


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_by_formula(layers, bias):
    made = head(layers=layers, bias=bias)
    assert head_parameters(32, made.config) == sum(p.numel() for p in made.parameters())
    assert made(torch.randn(3, 5, 32)).shape == (3, 5, 24)


@pytest.mark.parametrize(("dim", "bottleneck"), [(384, 256), (1536, 384)])
def test_parameters_at_full_scale(dim, bottleneck):
    config = HeadConfig(prototypes=131072, bottleneck=bottleneck)
    with torch.device("meta"):
        assert head_parameters(dim, config) == sum(p.numel() for p in DINOHead(dim, config).parameters())


def test_logits_are_cosines_times_g():
    made, x = head(), torch.randn(50, 32)
    z = made.bottleneck(x)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(50))
    cosines = z @ F.normalize(made.last_layer.weight_v, dim=1).T
    torch.testing.assert_close(made(x), cosines)
    with torch.no_grad():
        made.last_layer.weight_v *= torch.rand(24, 1) * 9 + 0.1  # the length of v does not matter, that of g does
        made.last_layer.weight_g *= 3
    torch.testing.assert_close(made(x), 3 * cosines, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_row_is_finite(dtype):
    made = head(bias=False).to(dtype)
    x = torch.zeros(2, 32, dtype=dtype, requires_grad=True)
    y = made(x)
    assert y.isfinite().all()
    if dtype != torch.float16:  # whose range ends below 1/eps; nothing is trained in it
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_init():
    fan_in, dinov2 = head(hidden=512), head(hidden=512, init="dinov2")
    assert fan_in.mlp[2].weight.std().item() == pytest.approx(512**-0.5, rel=0.05)
    assert dinov2.mlp[2].weight.std().item() == pytest.approx(0.02, rel=0.05)
    for made in (fan_in, dinov2):
        assert not made.mlp[0].bias.any()
        assert torch.equal(made.last_layer.weight_g, torch.ones(24, 1))
        assert made.last_layer.weight_v.abs().max() <= 16**-0.5


@pytest.mark.parametrize("changes", [{"prototypes": 0}, {"hidden": -3}, {"bottleneck": 0}, {"layers": 0}], ids=str)
def test_problems_of_measures_that_no_head_has(changes):
    config: Any = HeadConfig(**(SMALL | changes))
    assert config.problems()


@torch.no_grad()
def test_what_is_used_of_a_pass_is_the_backbones_features():
    model = headed().eval()
    crops, masks = torch.randn(4, 3, 32, 32), torch.zeros(4, 16, dtype=torch.bool)
    masks[0, :5] = masks[3, 7] = True
    whole = model(crops, None, lambda m, f: (m, f))
    assert whole[0] is model
    torch.testing.assert_close(whole[1].patches, model.backbone(crops).patches)
    masked = model(crops, masks, lambda _, f: f)
    torch.testing.assert_close(masked.cls, model.backbone(crops, masks).cls)
    assert not torch.allclose(masked.cls, whole[1].cls)
    kept = model(None, None, lambda _, f: f, whole[1])  # features already there: no pass
    assert kept is whole[1]


def test_the_pass_takes_gradients_to_the_backbone_unless_it_is_frozen():
    model, crops = headed().train(), torch.randn(2, 3, 32, 32)
    assert model(crops, None, lambda _, f: f).cls.requires_grad
    model.backbone.requires_grad_(False)
    model.train()
    assert model.backbone_frozen
    assert not model.backbone.training
    assert model.dino.training
    cls = model(crops, None, lambda m, f: m.dino(f.cls))
    assert cls.requires_grad
    cls.sum().backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.dino.parameters())


def test_a_shared_head_serves_both():
    model = headed(shared=True)
    assert list(model.parts()) == ["backbone", "dino"]
    assert list(model.heads()) == ["dino"]
    assert model.patch_head is model.dino
    own = headed()
    assert own.patch_head is own.ibot
    assert HeadedBackbone(own.backbone).patch_head is None
    assert list(HeadedBackbone(own.backbone).parts()) == ["backbone"]


@torch.no_grad()
def test_logits_of_bottleneck_vectors_are_the_heads():
    made, x = head(), torch.randn(7, 32)
    made.last_layer.weight_g.mul_(torch.rand(24, 1) + 0.5)
    torch.testing.assert_close(made.logits(made.bottleneck(x)), made(x))
    with torch.autocast("cpu", torch.bfloat16):
        low = made.logits(made.bottleneck(x))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), made(x), rtol=0, atol=0.02)
    made.last_layer.weight_v.neg_()
    torch.testing.assert_close(made.logits(made.bottleneck(x)), made(x))  # and follows the prototypes


@pytest.mark.parametrize("bf16", [False, True])
def test_the_heads_cross_entropy_is_that_of_its_logits(bf16):
    made = head()
    with torch.no_grad():
        made.last_layer.weight_g.mul_(torch.rand(24, 1) + 0.5)
    x, targets, weights = torch.randn(9, 32, requires_grad=True), torch.softmax(torch.randn(9, 24) * 3, -1), torch.rand(9)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = made.cross_entropy(x, Dense(targets), weights, 0.1)
    loss.backward()
    got = [x.grad, *(p.grad for p in made.parameters())]
    x.grad = None
    made.zero_grad()
    want = -(targets * F.log_softmax(made(x) / 0.1, -1)).sum(-1) @ weights
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=5e-3 if bf16 else 1e-5)
    for a, b in zip(got, [x.grad, *(p.grad for p in made.parameters())], strict=True):
        if bf16:
            assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_frozen_copy_is_independent():
    model = headed().train()
    copy: Any = frozen_copy(model)
    assert not copy.training
    assert model.training
    assert not any(p.requires_grad for p in copy.parameters())
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        model.backbone.cls_token += 1
    assert not torch.equal(copy.backbone.cls_token, model.backbone.cls_token)


def test_a_frozen_copy_shares_a_frozen_backbone():
    model = headed()
    model.backbone.requires_grad_(False)
    copy: Any = frozen_copy(model)
    assert copy.backbone is model.backbone
    assert copy.dino is not model.dino
    assert not any(p.requires_grad for p in copy.parameters())
    assert all(p.requires_grad for p in model.dino.parameters())
