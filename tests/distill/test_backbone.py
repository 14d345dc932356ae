"""The backbone: its size by formula and by timm, tokens, stochastic depth, resolutions. Its numbers are held by tests/golden."""

from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distill.models.backbone import ARCHS, Backbone, BackboneConfig, flops_per_image, parameter_count

torch.set_num_threads(1)  # small tensors: a second thread costs more than it does

TINY: dict[str, Any] = {"patch": 8, "image_size": 32, "dim": 32, "depth": 2, "heads": 2, "layer_scale": 1.0, "init": "fan_in"}


def tiny(**changes) -> Any:
    torch.manual_seed(0)
    return Backbone(BackboneConfig(**(TINY | changes)))


def random_tiny(**changes) -> Any:
    """Tokens differ from zero too, so that a missing or doubled one shows."""
    model = tiny(**changes)
    with torch.no_grad():
        for p in (model.cls_token, model.mask_token, model.register_tokens):
            if p is not None:
                p.normal_()
    return model.eval()


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"registers": 4},
    {"layer_scale": 0.0},
    {"image_size": 48},
    {"ffn": "swiglu"},
    {"dim": 40},
    {"patch": 4},
]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_parameters_by_formula(arch, changes):
    config = BackboneConfig(**(TINY | {"arch": arch} | changes))
    model = Backbone(config)
    assert parameter_count(config) == count(model)
    assert parameter_count(config, mask_token=False) == count(model) - model.mask_token.numel()


def test_hidden_width_of_swiglu_is_two_thirds_rounded_up_to_eight():
    for dim, want in ((1536, 4096), (32, 88), (64, 176), (96, 256), (40, 112)):
        assert BackboneConfig(arch="vit_giant", dim=dim).hidden() == want
        mlp: Any = Backbone(BackboneConfig(**(TINY | {"dim": dim, "ffn": "swiglu", "depth": 1}))).blocks[0].mlp
        assert tuple(mlp.fc1.weight.shape) == (2 * want, dim)
        assert tuple(mlp.fc2.weight.shape) == (dim, want)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("registers", [0, 4])
def test_full_scale_is_the_published_model(arch, registers):
    """Every parameter of timm's port by name and shape. timm folds the position of CLS into CLS where there are registers."""
    config = BackboneConfig(arch=arch, patch=14, image_size=518, registers=registers)
    with torch.device("meta"):
        published = timm.create_model(f"{arch}_patch14_{'reg4_' if registers else ''}dinov2", num_classes=0)
        ours = {n: tuple(p.shape) for n, p in Backbone(config).named_parameters()}
    theirs = {n.replace("reg_token", "register_tokens"): tuple(p.shape) for n, p in published.named_parameters()}
    if registers:
        theirs["pos_embed"] = (1, theirs["pos_embed"][1] + 1, theirs["pos_embed"][2])
    assert ours.pop("mask_token") == (1, config.shape()[0])
    assert ours == theirs
    folded = config.shape()[0] if registers else 0
    assert parameter_count(config, mask_token=False) == sum(p.numel() for p in published.parameters()) + folded


@pytest.mark.parametrize("changes", [{}, {"ffn": "swiglu", "registers": 3}, {"dim": 64, "depth": 3}], ids=str)
@pytest.mark.parametrize("size", [32, 64])
def test_flops_by_formula(changes, size):
    model = tiny(**changes).eval()
    # By the plain formula: the counter knows no fused attention on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, size, size))
    assert flops_per_image(model.config, size) == counter.get_total_flops()


@torch.no_grad()
def test_masked_patches_become_the_mask_token_before_positions_are_added():
    model = random_tiny(registers=2)
    images, other = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    masks = torch.rand(2, 16) < 0.4
    patches = model.tokens(images, masks)[:, 3:]
    expected = (model.mask_token + model.pos_embed[0, 1:]).expand(2, -1, -1)
    torch.testing.assert_close(patches[masks], expected[masks])
    torch.testing.assert_close(patches[~masks], model.tokens(images)[:, 3:][~masks])
    assert torch.equal(patches[masks], model.tokens(other, masks)[:, 3:][masks])
    assert not torch.equal(patches[~masks], model.tokens(other, masks)[:, 3:][~masks])


@torch.no_grad()
def test_registers_stand_after_cls_without_position_and_are_dropped_from_features():
    model = random_tiny(registers=4)
    tokens = model.tokens(torch.randn(2, 3, 32, 32))
    assert tokens.shape == (2, 1 + 4 + 16, 32)
    torch.testing.assert_close(tokens[0, 0], model.cls_token[0, 0] + model.pos_embed[0, 0])
    torch.testing.assert_close(tokens[:, 1:5], model.register_tokens.expand(2, -1, -1))
    features = model(torch.randn(2, 3, 32, 32))
    assert features.cls.shape == (2, 32)
    assert features.patches.shape == (2, 16, 32)


@pytest.mark.parametrize("size", [(33, 32), (32, 28), (4, 4)])
def test_sizes_that_are_no_multiple_of_the_patch_are_named(size):
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} px do not divide into patches of 8 px"):
        tiny()(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("offset", [0.0, 0.1])
@torch.no_grad()
def test_positions_for_any_grid(offset):
    model = tiny(pos_offset=offset)
    assert model.position(4, 4) is model.pos_embed
    for h in range(1, 12):
        for w in (1, 2, 5, 16):
            position = model.position(h, w)
            assert position.shape == (1, 1 + h * w, 32)
            assert torch.equal(position[:, 0], model.pos_embed[:, 0])
    assert model(torch.randn(1, 3, 16, 64)).patches.shape == (1, 16, 32)  # as many patches as the native grid, another shape
    assert not torch.equal(model.position(2, 8), model.pos_embed)


@torch.no_grad()
def test_a_constant_position_stays_constant_at_every_resolution():
    model = tiny()
    model.pos_embed.copy_(torch.randn(32).expand(1, 17, 32))
    for grid in ((3, 3), (7, 5), (9, 9)):
        torch.testing.assert_close(model.position(*grid), model.pos_embed[:, :1].expand(1, 1 + grid[0] * grid[1], 32))


@torch.no_grad()
def test_intermediate_features_end_in_the_features():
    model = random_tiny(registers=2, depth=3)
    images = torch.randn(2, 3, 32, 32)
    first, last = model.intermediate(images, [0, 2])
    features = model(images)
    assert torch.equal(last.cls, features.cls)
    assert torch.equal(last.patches, features.patches)
    assert not torch.equal(first.cls, last.cls)
    bare = model.intermediate(images, [2], norm=False)[0]
    torch.testing.assert_close(model.norm(bare.cls), features.cls)


class Noted(nn.Module):
    """A layer that gives 1 everywhere and notes how many samples it was given."""

    def __init__(self, seen: list[int]):
        super().__init__()
        self.seen = seen

    def forward(self, x: torch.Tensor, **ignored: Any) -> torch.Tensor:
        self.seen.append(x.shape[0])
        return torch.ones_like(x)


def counting_block(seen: list[int], **changes) -> Any:
    """A block of a backbone whose two residuals are 1; `plain` keeps the modules' own arithmetic."""
    block = tiny(**changes).blocks[0]
    block.plain, block.attn, block.mlp = True, Noted(seen), Noted(seen)
    return block


@pytest.mark.parametrize(("rate", "batch", "kept"), [(0.4, 10, 6), (0.3, 3, 2), (0.9, 4, 1), (0.5, 1, 1), (0.0, 5, 5)])
@torch.no_grad()
def test_stochastic_depth_computes_a_subset_and_keeps_the_expectation(rate, batch, kept):
    seen: list[int] = []
    block = counting_block(seen, drop_path=rate).train()
    torch.manual_seed(0)
    draws = torch.stack([block(torch.zeros(batch, 1, 32))[..., 0].flatten() for _ in range(2000)])
    assert set(seen) == {kept}
    scale = batch / kept
    assert set(torch.round(draws / scale).unique().tolist()) <= {0.0, 1.0, 2.0}  # neither, one or both residuals
    torch.testing.assert_close(draws.sum(1), torch.full((2000,), 2.0 * batch))  # the batch's total is exact
    error = scale * (2 * kept / batch * (1 - kept / batch) / 2000) ** 0.5
    assert (draws.mean(0) - 2).abs().max() <= 4.5 * error + 1e-5


@torch.no_grad()
def test_stochastic_depth_only_in_training():
    seen: list[int] = []
    block = counting_block(seen, drop_path=0.4).eval()
    for low in (False, True):  # the second leaves timm's own forward
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            assert torch.equal(block(torch.zeros(10, 1, 32)), torch.full((10, 1, 32), 2.0))
    assert seen == [10] * 4
    model, images = tiny(drop_path=0.4).eval(), torch.randn(10, 3, 32, 32)
    assert torch.equal(model(images).cls, tiny().eval()(images).cls)
    assert not torch.allclose(model.train()(images).cls, tiny().train()(images).cls, atol=1e-3)
    torch.testing.assert_close(tiny().train()(images).cls, tiny().eval()(images).cls)


def test_samples_without_a_residual_take_its_gradient_nowhere():
    model = tiny(drop_path=0.5, depth=1).train()
    model(torch.randn(4, 3, 32, 32)).cls.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if n != "mask_token")


def test_init():
    wide: Any = Backbone(BackboneConfig(dim=256, depth=1, heads=4, patch=8, image_size=32))
    fan_in: Any = Backbone(BackboneConfig(dim=256, depth=1, heads=4, patch=8, image_size=32, init="fan_in"))
    assert wide.blocks[0].mlp.fc2.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert fan_in.blocks[0].mlp.fc2.weight.std().item() == pytest.approx(1024**-0.5, rel=0.05)
    assert fan_in.patch_embed.proj.weight.std().item() == pytest.approx(192**-0.5, rel=0.05)
    assert all(not p.any() for n, p in fan_in.named_parameters() if n.endswith("bias"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"heads": 5}, "dim 32 is not divisible by heads 5"),
        ({"image_size": 30}, "image_size 30 is not a multiple of patch 8"),
        ({"drop_path": 1.0}, "drop_path must be"),
        ({"drop_path": -0.1}, "drop_path must be"),
        ({"drop_path": float("nan")}, "drop_path must be"),
        ({"patch": 0}, "at least 1"),
        ({"dim": -32}, "at least 1"),
    ],
)
def test_problems(changes, said):
    found = BackboneConfig(**(TINY | changes)).problems()
    assert len(found) == 1
    assert said in found[0]
    assert BackboneConfig(**TINY).problems() == []


@pytest.mark.parametrize("changes", [{"dim": 0}, {"depth": 0}, {"heads": 0}, {"registers": -1}], ids=str)
def test_problems_of_measures_that_no_model_has(changes):
    assert BackboneConfig(**(TINY | changes)).problems()


def test_problems_of_an_offset_beyond_a_patch():
    assert BackboneConfig(**(TINY | {"pos_offset": 1.5})).problems()
