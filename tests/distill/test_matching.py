"""Feature matching against its equations, and the standardisation: exact, joint over micro-batches and ranks, frozen, resumable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill.encoder import Features
from distill.losses.matching import FeatureStandardizer, MatchConfig, RunningMoments, match_distance, match_losses

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def cosine_by_hand(a: torch.Tensor, b: torch.Tensor) -> float:
    rows = zip(a.flatten(0, -2).double(), b.flatten(0, -2).double(), strict=True)
    values = [1 - (x @ y / (x.norm() * y.norm())).item() for x, y in rows]
    return sum(values) / len(values)


def smooth_l1_by_hand(a: torch.Tensor, b: torch.Tensor) -> float:
    d = (a - b).abs().double()
    return torch.where(d < 1, d * d / 2, d - 0.5).mean().item()


@pytest.mark.parametrize("shape", [(4, 6), (4, 5, 6)])
def test_the_three_kinds_are_their_equations(shape):
    a, b = torch.randn(*shape) * 2, torch.randn(*shape) * 2
    cosine, smooth = cosine_by_hand(a, b), smooth_l1_by_hand(a, b)
    assert match_distance(a, b, "cosine").item() == pytest.approx(cosine, rel=1e-5)
    assert match_distance(a, b, "smooth_l1").item() == pytest.approx(smooth, rel=1e-5)
    assert match_distance(a, b, "both", 0.9).item() == pytest.approx(0.9 * cosine + 0.1 * smooth, rel=1e-5)
    assert match_distance(a, b, "both", 0.5).item() == pytest.approx(0.5 * cosine + 0.5 * smooth, rel=1e-5)


def test_cosine_is_blind_to_scale_and_smooth_l1_is_not():
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    assert match_distance(3 * a, b, "cosine").item() == pytest.approx(match_distance(a, b, "cosine").item(), rel=1e-5)
    assert match_distance(3 * a, a, "cosine").item() < 1e-6
    assert match_distance(3 * a, a, "smooth_l1").item() > 0.1


def test_weights_leave_terms_out_and_scale_them():
    student, teacher = (Features(torch.randn(4, 6), torch.randn(4, 5, 6)) for _ in range(2))
    terms = match_losses(student, teacher, MatchConfig(cls=2.0, patches=0.5))
    assert terms["match_cls"].item() == pytest.approx(2 * match_distance(student.cls, teacher.cls).item(), rel=1e-6)
    assert terms["match_patches"].item() == pytest.approx(
        0.5 * match_distance(student.patches, teacher.patches).item(), rel=1e-6
    )
    assert list(match_losses(student, teacher, MatchConfig(cls=0.0))) == ["match_patches"]
    assert list(match_losses(student, teacher, MatchConfig(patches=0.0))) == ["match_cls"]


def test_gradient_reaches_the_student_only():
    student, teacher = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    match_distance(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_half_precision_is_computed_in_float32_also_under_autocast():
    a = torch.randn(8, 64).bfloat16()
    b = (a.float() * (1 + 0.01 * torch.randn(8, 64))).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = match_distance(a, b, "cosine")
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(cosine_by_hand(a.float(), b.float()), rel=1e-2)  # bfloat16 would give 0 or 0.0039


def test_a_zero_vector_has_a_finite_gradient():
    a = torch.zeros(2, 6, requires_grad=True)
    match_distance(a, torch.randn(2, 6)).backward()
    assert a.grad.isfinite().all()


def test_moments_of_several_updates_are_those_of_all_tokens_even_far_from_zero():
    x = torch.randn(300, 4) * torch.tensor([1.0, 30.0, 0.5, 5.0]) + torch.tensor([0.0, 200.0, -3.0, 1000.0])
    moments = RunningMoments(4)
    for part in x.split([50, 1, 149, 100]):
        moments.update([part])
    torch.testing.assert_close(moments.mean, x.double().mean(0).float())
    torch.testing.assert_close(moments.squares / moments.count, x.double().var(0, correction=0).float(), rtol=1e-3, atol=0)
    out = moments(x)
    torch.testing.assert_close(out.mean(0), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(out.std(0, correction=0), torch.ones(4), atol=1e-2, rtol=0)


def test_a_dead_dimension_is_not_blown_up():
    x = torch.randn(200, 3)
    x[:, 1] = 5 + 1e-7 * torch.randn(200)
    moments = RunningMoments(3)
    moments.update([x])
    x[:, 1] += 1e-4
    assert moments(x)[:, 1].abs().max() < 0.2


def test_before_anything_was_seen_features_pass_unchanged():
    f = Features(torch.randn(2, 4), torch.randn(2, 3, 4))
    torch.testing.assert_close(FeatureStandardizer(4, 3)(f).cls, f.cls)


def features(crops: int = 6, offset: float = 3.0) -> Features:
    return Features(torch.randn(crops, 4) * 2 + offset, torch.randn(crops, 5, 4) * 7 - offset)


def test_cls_and_patches_have_statistics_of_their_own():
    f = features(400)
    standard = FeatureStandardizer(4, 3)
    standard.observe([f])
    out = standard(f)
    for x in (out.cls, out.patches.flatten(0, 1)):
        torch.testing.assert_close(x.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(x.std(0, correction=0), torch.ones(4), atol=1e-3, rtol=0)


def test_micro_batches_equal_one_batch():
    f = features()
    whole, parts = FeatureStandardizer(4, 3), FeatureStandardizer(4, 3)
    whole.observe([f])
    parts.observe([Features(f.cls[i : i + 2], f.patches[i : i + 2]) for i in (0, 2, 4)])
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_statistics_freeze_after_their_steps_and_resume_where_they_were():
    batches = [features(offset=o) for o in (0.0, 5.0, 9.0, -40.0)]
    whole = FeatureStandardizer(4, 3)
    for b in batches[:3]:
        whole.observe([b])
    expected = whole(batches[0]).cls
    whole.observe([batches[3]])
    assert torch.equal(whole(batches[0]).cls, expected)

    first = FeatureStandardizer(4, 3)
    first.observe([batches[0]])
    second = FeatureStandardizer(4, 3)
    second.load_state_dict(first.state_dict())
    for b in batches[1:]:
        second.observe([b])
    assert torch.equal(second(batches[0]).cls, expected)


def test_a_batch_that_is_not_finite_leaves_no_trace():
    f = features()
    standard = FeatureStandardizer(4, 5)
    standard.observe([f])
    before = standard(f)
    standard.observe([Features(torch.full((2, 4), torch.nan), torch.full((2, 5, 4), torch.inf))])
    assert torch.equal(standard(f).cls, before.cls)
    assert torch.equal(standard(f).patches, before.patches)


RANKS = """
import os, sys, torch, torch.distributed as dist
from distill.encoder import Features
from distill.losses.matching import FeatureStandardizer
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
torch.manual_seed(0)
f = Features(torch.randn(6, 4) * 3 + 1, torch.randn(6, 5, 4))
whole, share = FeatureStandardizer(4, 3), FeatureStandardizer(4, 3)
mine = slice(0, 2) if sys.argv[2] == "0" else slice(2, 6)  # unequal shares: sums, not means, are what ranks exchange
share.observe([Features(f.cls[mine], f.patches[mine])])
dist.barrier(); dist.destroy_process_group()
whole.observe([f])
for (name, a), b in zip(whole.state_dict().items(), share.state_dict().values()):
    torch.testing.assert_close(a, b, msg=name)
"""


def test_two_ranks_have_the_statistics_of_one(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [subprocess.Popen([sys.executable, "-c", RANKS, str(tmp_path / "meet"), str(i)], env=environment) for i in range(2)]
    assert [r.wait(timeout=60) for r in ranks] == [0, 0]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"cls": 0.0, "patches": 0.0}, "weights"),
        ({"cls": -1.0}, "weights"),
        ({"cosine_share": 1.5}, "cosine_share"),
        ({"kind": "cosine", "cosine_share": 0.5}, "cosine_share"),
        ({"hidden": -1}, "hidden"),
        ({"standardize_steps": 0}, "standardize_steps"),
        ({"standardize": False, "standardize_steps": 5}, "standardize_steps"),
    ],
)
def test_problems_are_named(changes, word):
    assert any(word in p for p in MatchConfig(**changes).problems())


def test_defaults_have_no_problems():
    for config in (MatchConfig(), MatchConfig(kind="cosine"), MatchConfig(standardize=False), MatchConfig(hidden=0)):
        assert config.problems() == []
