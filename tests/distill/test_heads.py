"""Projection heads and the backbone that wears them. Their numbers are held by tests/golden."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

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
def test_a_students_pass_is_its_parts():
    model = headed().eval()
    globals_, locals_ = torch.randn(4, 3, 32, 32), torch.randn(6, 3, 16, 16)
    masks = torch.zeros(4, 16, dtype=torch.bool)
    masks[0, :5] = masks[3, 7] = True
    out = model(globals_, locals_, masks, masks)
    masked = model.backbone(globals_, masks)
    torch.testing.assert_close(out.cls, masked.cls)
    torch.testing.assert_close(out.dino_global, model.dino(masked.cls))
    torch.testing.assert_close(out.dino_local, model.dino(model.backbone(locals_).cls))
    torch.testing.assert_close(out.ibot, model.ibot(masked.patches[masks]))
    whole = model(globals_, locals_, None, masks)
    torch.testing.assert_close(whole.ibot, model.ibot(model.backbone(globals_).patches[masks]))
    assert not torch.allclose(whole.cls, out.cls)


@torch.no_grad()
def test_no_local_crops_and_no_chosen_patches():
    model = headed().eval()
    none = torch.zeros(4, 16, dtype=torch.bool)
    out = model(torch.randn(4, 3, 32, 32), torch.zeros(0, 3, 1, 1), None, none)
    assert out.dino_local.shape == (0, 24)
    assert out.ibot.shape == (0, 12)


@torch.no_grad()
def test_the_teacher_sees_whole_crops():
    model = headed().eval()
    crops, chosen = torch.randn(4, 3, 32, 32), torch.rand(4, 16) < 0.3
    cls, patches = model.teach(crops, chosen)
    features = model.backbone(crops)
    torch.testing.assert_close(cls, model.dino(features.cls))
    torch.testing.assert_close(patches, model.ibot(features.patches[chosen]))


@torch.no_grad()
def test_a_shared_head_serves_both():
    model = headed(shared=True).eval()
    assert list(model.parts()) == ["backbone", "dino"]
    assert list(model.heads()) == ["dino"]
    crops, chosen = torch.randn(2, 3, 32, 32), torch.ones(2, 16, dtype=torch.bool)
    torch.testing.assert_close(model.teach(crops, chosen)[1], model.dino(model.backbone(crops).patches[chosen]))


def test_a_frozen_copy_is_independent():
    model = headed().train()
    copy = frozen_copy(model)
    assert not copy.training
    assert model.training
    assert not any(p.requires_grad for p in copy.parameters())
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        model.backbone.cls_token += 1
    assert not torch.equal(copy.backbone.cls_token, model.backbone.cls_token)
