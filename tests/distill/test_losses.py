"""The objectives against loops written from their equations, at their edges and in half precision."""

import math

import pytest
import torch
from torch.nn import functional as F

from distill.losses.dino import dino_loss
from distill.losses.ibot import ibot_loss, patch_weights
from distill.losses.koleo import koleo_loss
from distill.models.headed import Outputs
from distill.objectives import ObjectivesConfig, Targets, student_losses, target_statistics

torch.set_num_threads(1)
T = 0.1


def distributions(*shape: int) -> torch.Tensor:
    return torch.softmax(torch.randn(*shape) * 3, -1)


def cross_entropy(target: torch.Tensor, logits: torch.Tensor, temperature: float = T) -> torch.Tensor:
    return -(target * torch.log(torch.softmax(logits.double() / temperature, -1))).sum(-1)


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
    student, targets = torch.randn(2, 4, 6, requires_grad=True), distributions(2, 4, 6)
    only_first = targets.clone()
    only_first[1] = 0
    dino_loss(student, torch.zeros(0, 4, 6), only_first, T)[0].backward()
    assert student.grad is not None
    assert not student.grad[0].any()
    assert student.grad[1].abs().max() > 0


def test_dino_is_least_where_student_and_teacher_agree():
    targets = distributions(1, 4, 6).expand(2, -1, -1).contiguous()
    agreeing = targets.log() * T
    entropy = cross_entropy(targets.double(), agreeing).mean().item()
    small = agreeing[:1].expand(3, -1, -1).contiguous()
    whole, part = dino_loss(agreeing, small, targets, T)
    assert (whole + part).item() == pytest.approx(entropy, rel=1e-5)
    assert sum(dino_loss(agreeing + 0.1 * torch.randn_like(agreeing), small, targets, T)) > entropy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cross_entropies_are_float32(dtype):
    student, targets = torch.randn(2, 4, 6).to(dtype), distributions(2, 4, 6)
    got, want = (torch.stack(dino_loss(s, s[:1], targets, T)) for s in (student, student.float()))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)
    flat, weights = targets.flatten(0, 1), torch.ones(8)
    torch.testing.assert_close(
        ibot_loss(student.flatten(0, 1), flat, weights, 2, T), ibot_loss(student.float().flatten(0, 1), flat, weights, 2, T)
    )


def test_huge_student_logits_are_finite():
    student = torch.randn(2, 4, 6) * 1e5
    assert all(x.isfinite() for x in dino_loss(student, student, distributions(2, 4, 6), T))


def test_patch_weights():
    masks = torch.zeros(4, 6, dtype=torch.bool)
    masks[0, :3] = masks[2, 5] = True
    masks[3] = True
    third, sixth = [1 / 3] * 3, [1 / 6] * 6
    torch.testing.assert_close(patch_weights(masks), torch.tensor([*third, 1.0, *sixth]))
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
    got = ibot_loss(student[masks], targets[masks], patch_weights(masks), crops, T)
    assert got.item() == pytest.approx(want / crops, rel=1e-5)


def test_ibot_without_a_masked_patch_is_zero_with_a_gradient():
    student = torch.randn(4, 7, requires_grad=True)
    none = torch.zeros(2, 3, dtype=torch.bool)
    loss = ibot_loss(student[:0], torch.zeros(0, 7), patch_weights(none), 2, T)
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


B, K, M = 4, 6, 5


def outputs_and_targets(m: int = M) -> tuple[Outputs, Targets]:
    out = Outputs(torch.randn(2 * B, 8), torch.randn(2 * B, K), torch.randn(3 * B, K), torch.randn(m, K))
    return out, Targets(distributions(2, B, K), distributions(m, K), torch.rand(m))


def test_the_terms_are_weighted_and_named():
    out, targets = outputs_and_targets()
    config = ObjectivesConfig(dino=2.0, ibot=0.5, koleo=0.3, student_temperature=0.2)
    terms = student_losses(out, targets, config)
    dino = dino_loss(out.dino_global.view(2, B, K), out.dino_local.view(3, B, K), targets.dino, 0.2)
    torch.testing.assert_close(terms["dino_global"], 2 * dino[0])
    torch.testing.assert_close(terms["dino_local"], 2 * dino[1])
    torch.testing.assert_close(terms["ibot"], 0.5 * ibot_loss(out.ibot, targets.ibot, targets.weights, 2 * B, 0.2))
    torch.testing.assert_close(terms["koleo"], 0.3 * (koleo_loss(out.cls[:B]) + koleo_loss(out.cls[B:])))
    assert len(terms) == 4


@pytest.mark.parametrize(
    ("weights", "left"),
    [
        ({"koleo": 0.0}, {"dino_global", "dino_local", "ibot"}),
        ({"ibot": 0.0}, {"dino_global", "dino_local", "koleo"}),
        ({"dino": 0.0}, {"ibot", "koleo"}),
    ],
)
def test_a_weight_of_zero_leaves_its_term_out(weights, left):
    assert student_losses(*outputs_and_targets(), ObjectivesConfig(**weights)).keys() == left


def test_no_local_crops_leave_the_global_pairs():
    out, targets = outputs_and_targets()
    terms = student_losses(out._replace(dino_local=out.dino_global[:0]), targets, ObjectivesConfig())
    assert terms["dino_local"].item() == 0
    alone = dino_loss(out.dino_global.view(2, B, K), torch.zeros(0, B, K), targets.dino, T)[0]
    torch.testing.assert_close(terms["dino_global"], alone)


def test_there_is_always_something_to_optimise():
    """The loop adds the terms up by stacking them."""
    terms = student_losses(*outputs_and_targets(0), ObjectivesConfig(dino=0.0, koleo=0.0))
    torch.stack(list(terms.values())).sum()


def test_statistics_of_targets():
    sharp = Targets(torch.eye(6)[:, :].view(2, 3, 6), torch.zeros(0, 6), torch.zeros(0))
    assert target_statistics(sharp) == pytest.approx({"teacher_entropy": 0.0, "prototype_entropy": math.log(6)})
    collapsed = Targets(torch.eye(6)[:1].expand(6, 6).reshape(2, 3, 6), torch.zeros(0, 6), torch.zeros(0))
    assert target_statistics(collapsed) == pytest.approx({"teacher_entropy": 0.0, "prototype_entropy": 0.0})
    flat = Targets(torch.full((2, 3, 6), 1 / 6), torch.zeros(0, 6), torch.zeros(0))
    assert target_statistics(flat) == pytest.approx({"teacher_entropy": math.log(6), "prototype_entropy": math.log(6)})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dino": -1.0}, "at least 0"),
        ({"dino": 0.0, "ibot": 0.0}, "nothing else ties student to teacher"),
        ({"student_temperature": 0.0}, "temperatures"),
        ({"teacher_temperature": (0.04, -0.1)}, "temperatures"),
        ({"temperature_warmup": 1.1}, "temperature_warmup"),
    ],
)
def test_problems(changes, said):
    found = ObjectivesConfig(**changes).problems()
    assert len(found) == 1
    assert said in found[0]
    assert ObjectivesConfig().problems() == []
