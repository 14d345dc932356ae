"""2:4 masks: the two largest of every four stay, through training, and a check that export can trust."""

from typing import Any

import pytest
import torch

from distill.data.crops import CropsConfig
from distill.data.scenes import ScenesConfig
from distill.errors import UserError
from distill.models.backbone import Backbone, BackboneConfig
from distill.models.headed import HeadedBackbone
from distill.models.heads import DINOHead, HeadConfig
from distill.models.timm_backbone import TimmBackbone, TimmConfig
from distill.objectives import ObjectivesConfig
from distill.optim import OptimConfig
from distill.progress import Progress
from distill.runtime import RuntimeConfig
from distill.sparsity import Sparsity24, block_linears, hold, is_2_4, mask_2_4
from distill.train import TrainConfig, train

torch.set_num_threads(1)


def tiny(**changes: Any) -> Backbone:
    torch.manual_seed(0)
    base: dict[str, Any] = {
        "dim": 32,
        "depth": 2,
        "heads": 2,
        "patch": 8,
        "image_size": 32,
        "layer_scale": 1.0,
        "init": "fan_in",
    }
    return Backbone(BackboneConfig(**(base | changes)))


def test_the_two_largest_of_four_stay():
    w = torch.tensor([[1.0, -3.0, 2.0, 0.5, 0.0, 0.0, 0.0, 0.0], [4.0, 4.0, 4.0, 4.0, -1.0, 0.0, 0.0, 2.0]])
    mask = mask_2_4(w)
    assert mask.tolist() == [
        [False, True, True, False, True, True, False, False],
        [True, True, False, False, True, False, False, True],
    ]
    assert not is_2_4(w)
    assert is_2_4(w * mask)


def test_three_of_four_or_an_odd_width_are_not_sparse():
    assert is_2_4(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert not is_2_4(torch.tensor([[1.0, 1.0, 1.0, 0.0]]))
    assert not is_2_4(torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0, 0.0]]))
    # Four in a row over the border of two groups are fine, three inside of one are not.
    assert is_2_4(torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]]))
    assert not is_2_4(torch.zeros(2, 2, 2))


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_masks_hold_through_training_in_the_model_and_its_average(ffn):
    model, average = tiny(ffn=ffn), tiny(ffn=ffn)
    sparse = Sparsity24(model)
    before = {n: m.weight.detach().clone() for n, m in block_linears(model).items()}
    assert len(before) == 8
    sparse.apply_()
    sparse.apply_(average)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model.train()
    for step in range(3):
        optimizer.zero_grad()
        out = model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(step)))
        out.cls.square().sum().backward()
        optimizer.step()
        assert not all(is_2_4(m.weight) for m in block_linears(model).values())  # the step fills the holes
        sparse.apply_()
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(p, 0.1)
    for name, layer in block_linears(model).items():
        assert is_2_4(layer.weight)
        assert is_2_4(block_linears(average)[name].weight)
        assert torch.equal(layer.weight != 0, mask_2_4(before[name]))  # where the largest were, and nowhere else
    assert not is_2_4(model.patch_embed.proj.weight.flatten(1))


def test_recovery_by_the_training_loop_keeps_the_zeros(tmp_path):
    head = HeadConfig(prototypes=16, hidden=32, bottleneck=16, init="fan_in")
    student, teacher, other = (HeadedBackbone(tiny(), DINOHead(32, head), DINOHead(32, head)) for _ in range(3))
    training = TrainConfig(
        images=24, batch=8, precision="fp32", crops=CropsConfig(global_size=32, local_size=16, local_count=1),
        objectives=ObjectivesConfig(koleo=0.0), optim=OptimConfig(lr=0.02),
    )  # fmt: skip
    found = train(
        training, {"sparse": student, "other": other}, teacher, ScenesConfig(count=20, size=32).build(), "per_image", tmp_path, 1,
        RuntimeConfig(workers=0, threads=1), Progress("quiet"), after_step=hold({"sparse": Sparsity24(student.backbone)}),
    )  # fmt: skip
    start = block_linears(tiny())
    for name, layer in block_linears(found["sparse"].backbone).items():
        assert is_2_4(layer.weight)
        assert not torch.equal(layer.weight, start[name].weight * mask_2_4(start[name].weight))  # what is left did learn
    assert not any(is_2_4(m.weight) for m in block_linears(found["other"].backbone).values())


def test_widths_and_networks_that_cannot_be_sparse_are_refused():
    with pytest.raises(UserError, match="multiples of 4"):
        Sparsity24(tiny(dim=30, heads=3))
    with pytest.raises(UserError, match="ours"):
        Sparsity24(TimmBackbone(TimmConfig(name="vit_tiny_patch16_224", options={"depth": 1}, image_size=32)))
