"""Gram anchoring against its equation; what it must not see (rotation, scale, width) and must (geometry); its memory."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from distill.losses import gram
from distill.losses.gram import GramConfig, gram_loss


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def by_hand(student: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
    """The equation as it reads, in double precision, with autograd's gradient."""
    total = torch.zeros((), dtype=torch.float64)
    for s, a in zip(student.double(), anchor.double(), strict=True):
        s, a = s / s.norm(dim=-1, keepdim=True), a / a.norm(dim=-1, keepdim=True)
        for i in range(len(s)):
            for j in range(len(s)):
                total = total + (s[i] @ s[j] - a[i] @ a[j]) ** 2
    return total / (len(student) * student.shape[1] ** 2)


def rotation(width: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width))[0]


@pytest.mark.parametrize("chunk", [1, 60, 2**24])
def test_value_and_gradient_are_those_of_the_equation_whatever_the_chunk(chunk, monkeypatch):
    monkeypatch.setattr(gram, "CHUNK", chunk)
    student, anchor = torch.randn(5, 5, 6), torch.randn(5, 5, 9)
    ours, theirs = student.clone().requires_grad_(), student.double().requires_grad_()
    loss, expected = gram_loss(ours, anchor), by_hand(theirs, anchor)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-4, atol=1e-7)


def test_gradient_holds_numerically():
    anchor = torch.randn(3, 4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: gram_loss(x, anchor), torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    )


def test_equal_features_cost_nothing_and_pull_nowhere():
    x = torch.randn(2, 9, 8, requires_grad=True)
    loss = gram_loss(x, x.detach().clone())
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert x.grad.abs().max() < 1e-7


def test_rotations_scales_and_widths_are_free():
    student, anchor = torch.randn(2, 9, 8), torch.randn(2, 9, 8)
    expected = gram_loss(student, anchor).item()
    assert expected > 0.01
    assert gram_loss(student @ rotation(8), anchor).item() == pytest.approx(expected, rel=1e-5)
    assert gram_loss(student, anchor @ rotation(8)).item() == pytest.approx(expected, rel=1e-5)
    assert gram_loss(student * (torch.rand(2, 9, 1) + 0.5), anchor).item() == pytest.approx(expected, rel=1e-5)
    assert gram_loss(F.pad(student, (0, 5)), anchor).item() == pytest.approx(expected, rel=1e-5)
    # The same for all patches of an image, so its own; a patch of its own is geometry.
    assert gram_loss(student @ rotation(8), student).item() < 1e-10
    turned = torch.stack([x @ rotation(8) for x in student.flatten(0, 1)]).view_as(student)
    assert gram_loss(turned, student).item() > 0.01


def test_patches_are_compared_within_their_image_only():
    first, second = torch.randn(2, 1, 6, 8)
    apart = (gram_loss(first, second) + gram_loss(second, first)) / 2
    assert gram_loss(torch.cat([first, second]), torch.cat([second, first])).item() == pytest.approx(apart.item(), rel=1e-5)
    # Swapping whole images of both changes nothing, swapping them in one of them does.
    both = torch.cat([first, second])
    assert gram_loss(both.flip(0), both.flip(0)).item() < 1e-10
    assert gram_loss(both.flip(0), both).item() > 0.01


def test_descent_recovers_the_anchors_geometry():
    anchor = torch.randn(2, 6, 5)
    student = torch.randn(2, 6, 4).requires_grad_()
    start = gram_loss(student, anchor).item()
    optimizer = torch.optim.Adam([student], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        gram_loss(student, anchor).backward()
        optimizer.step()
    assert gram_loss(student, anchor).item() < 0.2 * start


def test_gradient_reaches_the_student_only():
    student, anchor = torch.randn(2, 4, 6, requires_grad=True), torch.randn(2, 4, 6, requires_grad=True)
    gram_loss(student, anchor).backward()
    assert student.grad.abs().sum() > 0
    assert anchor.grad is None


def test_half_precision_is_computed_in_float32():
    student, anchor = torch.randn(2, 16, 32).bfloat16(), torch.randn(2, 16, 32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = gram_loss(student, anchor)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(by_hand(student.float(), anchor.float()).item(), rel=1e-5)


def test_zero_vectors_and_empty_batches_stay_finite():
    student = torch.zeros(1, 4, 6, requires_grad=True)
    loss = gram_loss(student, torch.randn(1, 4, 6))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    empty = torch.zeros(0, 4, 6, requires_grad=True)
    gram_loss(empty, torch.zeros(0, 4, 3)).backward()
    assert empty.grad is not None


def test_no_gram_matrix_is_kept_for_the_backward_pass():
    student, anchor = torch.randn(3, 50, 8, requires_grad=True), torch.randn(3, 50, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        gram_loss(student, anchor)
    assert kept
    assert max(kept) <= student.numel()


def test_an_anchor_on_another_grid_is_refused():
    with pytest.raises(Exception, match="n"):
        gram_loss(torch.randn(2, 4, 6), torch.randn(2, 9, 6))


def test_the_papers_schedule_in_its_own_numbers():
    config = GramConfig()
    assert config.first_step(1_200_000) == pytest.approx(1_000_000, rel=0.01)
    snapshots = config.snapshots(1_200_000)
    assert snapshots[0] == pytest.approx(200_000, rel=0.03)
    assert [b - a for a, b in pairwise(snapshots[1:])] == [9600, 9600]
    assert len(snapshots) == 4


def test_the_anchor_exists_before_it_is_used_and_stays_in_the_run():
    for total in (7, 100, 313):
        for config in (GramConfig(), GramConfig(start=0.0), GramConfig(start=0.5, snapshot=0.5, refresh=0.2, refreshes=9)):
            snapshots = config.snapshots(total)
            assert snapshots[0] <= config.first_step(total)
            assert all(0 <= s < total for s in snapshots)
            assert snapshots == sorted(snapshots)
    assert GramConfig(start=0.5, snapshot=0.1, refresh=0.2, refreshes=9).snapshots(100) == [10, 70, 90]
    assert GramConfig(start=0.5, snapshot=0.1, refresh=0.0).snapshots(100) == [10]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"weight": 0.0}, "weight"),
        ({"start": 1.2}, "start"),
        ({"refresh": -0.1}, "refresh"),
        ({"snapshot": 0.9}, "snapshot"),
        ({"refreshes": -1}, "refreshes"),
    ],
)
def test_problems_are_named(changes, word):
    assert any(word in p for p in GramConfig(**changes).problems())


def test_defaults_and_distillation_have_no_problems():
    assert GramConfig().problems() == []
    assert GramConfig(start=0.0).problems() == []
