"""The objectives against loops written from their equations, at their edges and in half precision."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.losses.dino import dino_global, dino_local
from distill.losses.ibot import patch_weights
from distill.losses.koleo import koleo_loss
from distill.losses.prototypes import prototype_cross_entropy
from distill.losses.targets import Dense
from distill.objectives import ObjectivesConfig

torch.set_num_threads(1)
T = 0.1


def distributions(*shape: int) -> torch.Tensor:
    return torch.softmax(torch.randn(*shape) * 3, -1)


def cross_entropy(target: torch.Tensor, logits: torch.Tensor, temperature: float = T) -> torch.Tensor:
    return -(target * torch.log(torch.softmax(logits.double() / temperature, -1))).sum(-1)


def dino_loss(student_GBK: Tensor, small_LBK: Tensor, targets_GBK: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The parts of global and local crops, straight from logits."""
    ce = partial(prototype_cross_entropy, temperature=temperature)
    count = len(small_LBK)
    return (
        dino_global(student_GBK.flatten(0, 1), targets_GBK, count, ce),
        dino_local(small_LBK.flatten(0, 1), targets_GBK, count, ce),
    )


def ibot_loss(student_MK: Tensor, targets_MK: Tensor, weights_M: Tensor, temperature: float) -> Tensor:
    return prototype_cross_entropy(student_MK, Dense(targets_MK), weights_M, temperature)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("globals_", [2, 3])
@pytest.mark.parametrize("locals_", [0, 1, 8])
def test_dino_is_the_mean_over_all_pairs(globals_, locals_):
    b, k = 5, 7
    student, small, targets = torch.randn(globals_, b, k), torch.randn(locals_, b, k), distributions(globals_, b, k)
    pairs, of_globals, of_locals = 0, 0.0, 0.0
    for t in range(globals_):
        for s in range(globals_):
            if s != t:
                of_globals += cross_entropy(targets[t].double(), student[s]).mean().item()
                pairs += 1
        for s in range(locals_):
            of_locals += cross_entropy(targets[t].double(), small[s]).mean().item()
            pairs += 1
    assert globals_ != 2 or pairs == 2 + 2 * locals_
    got_global, got_local = dino_loss(student, small, targets, T)
    assert got_global.item() == pytest.approx(of_globals / pairs, rel=1e-5)
    assert got_local.item() == pytest.approx(of_locals / pairs, rel=1e-5, abs=1e-12)


def test_dino_compares_no_crop_with_itself():
    student, targets = torch.randn(2, 4, 6), distributions(2, 4, 6)
    gradients = []
    for first in (targets[0], distributions(4, 6)):
        x = student.clone().requires_grad_()
        dino_loss(x, torch.zeros(0, 4, 6), torch.stack([first, targets[1]]), T)[0].backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert torch.equal(gradients[0][0], gradients[1][0])  # the first crop does not see its own target
    assert (gradients[0][1] - gradients[1][1]).abs().max() > 1e-3


def test_dino_is_least_where_student_and_teacher_agree():
    targets = distributions(1, 4, 6).expand(2, -1, -1).contiguous()
    agreeing = targets.log() * T
    entropy = cross_entropy(targets.double(), agreeing).mean().item()
    small = agreeing[:1].expand(3, -1, -1).contiguous()
    whole, part = dino_loss(agreeing, small, targets, T)
    assert (whole + part).item() == pytest.approx(entropy, rel=1e-5)
    assert sum(dino_loss(agreeing + 0.1 * torch.randn_like(agreeing), small, targets, T)) > entropy


@pytest.mark.parametrize(("dtype", "rel"), [(torch.bfloat16, 5e-3), (torch.float16, 5e-4)])
def test_cross_entropies_are_float32(dtype, rel):
    """Sums at least; logits over the temperature keep the digits of their format."""
    student, targets = torch.randn(2, 4, 6).to(dtype), distributions(2, 4, 6)
    got, want = (torch.stack(dino_loss(s, s[:1], targets, T)) for s in (student, student.float()))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=rel, atol=0)
    flat, weights = targets.flatten(0, 1), torch.ones(8)
    got, want = (ibot_loss(s.flatten(0, 1), flat, weights, T) for s in (student, student.float()))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=rel, atol=0)


def test_huge_student_logits_are_finite():
    student = torch.randn(2, 4, 6) * 1e5
    assert all(x.isfinite() for x in dino_loss(student, student, distributions(2, 4, 6), T))


def test_patch_weights():
    masks = torch.zeros(4, 6, dtype=torch.bool)
    masks[0, :3] = masks[2, 5] = True
    masks[3] = True
    third, sixth = [1 / 3] * 3, [1 / 6] * 6  # and all four crops count, the one without a mask too
    torch.testing.assert_close(patch_weights(masks), torch.tensor([*third, 1.0, *sixth]) / 4)
    assert patch_weights(torch.zeros(4, 6, dtype=torch.bool)).shape == (0,)


def test_ibot_is_the_mean_over_crops_of_the_mean_over_their_masked_patches():
    crops, n, k = 5, 9, 7
    masks = torch.rand(crops, n) < 0.4
    masks[1] = False  # counts in the denominator
    student, targets = torch.randn(crops, n, k), distributions(crops, n, k)
    want = 0.0
    for c in range(crops):
        terms = [cross_entropy(targets[c, i].double(), student[c, i]).item() for i in range(n) if masks[c, i]]
        want += sum(terms) / len(terms) if terms else 0.0
    got = ibot_loss(student[masks], targets[masks], patch_weights(masks), T)
    assert got.item() == pytest.approx(want / crops, rel=1e-5)


def test_ibot_without_a_masked_patch_is_zero_with_a_gradient():
    student = torch.randn(4, 7, requires_grad=True)
    none = torch.zeros(2, 3, dtype=torch.bool)
    loss = ibot_loss(student[:0], torch.zeros(0, 7), patch_weights(none), T)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_koleo_is_minus_the_mean_log_distance_to_the_nearest():
    x = torch.randn(12, 5)
    rows = F.normalize(x.double(), dim=1)
    distances = torch.cdist(rows, rows) + torch.eye(12).double() * 9
    assert koleo_loss(x).item() == pytest.approx(-distances.min(1).values.log().mean().item(), rel=1e-4)
    torch.testing.assert_close(koleo_loss(x * 7), koleo_loss(x))  # length does not matter


def test_koleo_spreads():
    x = (torch.randn(16, 8) * 0.05 + torch.ones(8)).requires_grad_()
    optimizer, before = torch.optim.SGD([x], 0.5), koleo_loss(x).item()
    for _ in range(50):
        optimizer.zero_grad()
        loss = koleo_loss(x)
        loss.backward()
        optimizer.step()
    assert loss.item() < before - 0.5


def test_koleo_of_one_row_is_zero():
    x = torch.randn(1, 5, requires_grad=True)
    loss = koleo_loss(x)
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert not x.grad.any()
    assert koleo_loss(torch.zeros(0, 5)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["duplicates", "zeros", "nearly equal", "plain"])
def test_koleo_is_finite_with_a_finite_gradient(dtype, kind):
    x = torch.randn(6, 8)
    if kind == "duplicates":
        x[3] = x[0]
        x[5] = x[4] * 2
    elif kind == "zeros":
        x[:3] = 0
    elif kind == "nearly equal":
        x = torch.ones(6, 8) + 1e-4 * x
    x = x.to(dtype).requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert loss.item() <= -math.log(1e-8) + 1
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_koleo_under_autocast_is_float32():
    x = torch.randn(6, 8)
    x[1], x[2] = (
        x[0] + 0.02 * torch.randn(8),
        x[0] + 1e-4 * torch.randn(8),
    )  # in bf16 both are x[0], and the first would be taken
    rows = F.normalize(x.double(), dim=1)
    distances = torch.cdist(rows, rows) + torch.eye(6).double() * 9
    with torch.autocast("cpu", torch.bfloat16):
        got = koleo_loss(x)
    assert got.item() == pytest.approx(-distances.min(1).values.log().mean().item(), rel=1e-3)


def test_koleo_in_groups_looks_for_neighbours_within_each():
    x = torch.randn(12, 5, requires_grad=True)
    got = koleo_loss(x, 4)
    got.backward()
    each = torch.stack([koleo_loss(part) for part in x.detach().split(4)])
    torch.testing.assert_close(got.detach(), each.mean())
    assert x.grad is not None
    for i, part in enumerate(x.detach().split(4)):
        alone = part.clone().requires_grad_()
        koleo_loss(alone).backward()
        assert alone.grad is not None
        torch.testing.assert_close(x.grad[4 * i : 4 * i + 4], alone.grad / 3)
    x = x.detach()
    assert not torch.isclose(got.detach(), koleo_loss(x))  # among all twelve the nearest is nearer
    for group in (12, 100):
        torch.testing.assert_close(koleo_loss(x, group), koleo_loss(x))
    uneven = koleo_loss(x[:10], 4)  # 4, 4, 2
    parts = [koleo_loss(p) * len(p) for p in x[:10].split(4)]
    torch.testing.assert_close(uneven, torch.stack(parts).sum() / 10)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dino": -1.0}, "at least 0"),
        ({"dino": 0.0, "ibot": 0.0}, "nothing else ties student to teacher"),
        ({"student_temperature": 0.0}, "temperatures"),
        ({"teacher_temperature": (0.04, -0.1)}, "temperatures"),
        ({"temperature_warmup": 1.1}, "temperature_warmup"),
        ({"koleo_group": 1}, "koleo_group"),
    ],
)
def test_problems(changes, said):
    found = ObjectivesConfig(**changes).problems()
    assert len(found) == 1
    assert said in found[0]
    assert ObjectivesConfig().problems() == []
