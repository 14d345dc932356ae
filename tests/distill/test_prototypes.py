"""Cross-entropy over prototypes in slices, against the whole matrices in float64 and autograd."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.cast_cache import CastCache
from distill.losses import prototypes
from distill.losses.assignments import top_k
from distill.losses.prototypes import prototype_cross_entropy
from distill.losses.targets import Assignment, Dense, Soft, Sparse

S, K, E = 24, 17, 8
T = 0.1


def rows(kind: str, samples: int = S) -> Assignment:
    """Targets of every kind a loss is given."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(samples, K, generator=g)
    full = torch.softmax(logits / 0.3, -1)
    if kind == "dense":
        return Dense(full)
    if kind == "repeated":
        return Dense(full[: samples // 3], repeat=3)
    if kind == "soft":
        return Soft(logits, torch.randn(K, generator=g), 0.5)
    if kind == "soft, of bf16 logits":
        return Soft(logits.bfloat16(), torch.randn(K, generator=g), 0.5)
    return Sparse(top_k(full, 5)[0], K)


KINDS = ["dense", "repeated", "soft", "soft, of bf16 logits", "sparse"]


def inputs(samples: int = S) -> tuple[Tensor, Tensor, Tensor]:
    """z, v, g; rows of z have length 1, as a bottleneck's do."""
    g = torch.Generator().manual_seed(2)
    z = F.normalize(torch.randn(samples, E, generator=g), dim=-1)
    v, gain = torch.randn(K, E, generator=g) * 3, torch.rand(K, 1, generator=g) + 0.5
    return z, v, gain


def by_autograd(z: Tensor, v: Tensor, g: Tensor, targets: Assignment, weights: Tensor, above: float = 1.0) -> list[Tensor]:
    """Loss and gradients of z, v, g from [S, K] matrices in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (z, v, g)]
    logits = leaves[0] @ (leaves[2] * leaves[1] / leaves[1].norm(dim=1, keepdim=True)).T
    p = targets.rows(0, len(targets)).double()
    loss = (-(p * F.log_softmax(logits / T, -1)).sum(-1) * weights.double()).sum()
    (above * loss).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def ours(
    z: Tensor, v: Tensor, g: Tensor, targets: Assignment, weights: Tensor, above: float = 1.0, cast: CastCache | None = None
) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (z, v, g)]
    loss = prototype_cross_entropy(leaves[0], targets, weights, T, leaves[1], leaves[2], cast)
    (above * loss).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_close(got: list[Tensor], want: list[Tensor], rel: float) -> None:
    assert len(got) == len(want) == 4
    for name, a, b in zip(("loss", "z", "v", "g"), got, want, strict=True):
        error = (a.double() - b).abs().max() / b.abs().max()
        assert error < rel, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("logits_at_once", "at_once"), [(2**24, 2**20), (5 * K, 2 * K), (K, 1), (7 * K, 10**6)], ids=["whole", "5/2", "1/1", "7/7"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_dense_formula_with_its_gradients(monkeypatch, kind, logits_at_once, at_once):
    monkeypatch.setattr(prototypes, "LOGITS_AT_ONCE", logits_at_once)
    monkeypatch.setattr(prototypes, "AT_ONCE", at_once)
    targets, weights = rows(kind), torch.rand(S, generator=torch.Generator().manual_seed(3))
    assert_close(ours(*inputs(), targets, weights), by_autograd(*inputs(), targets, weights), 3e-6)


def test_no_slice_is_larger_than_allowed(monkeypatch):
    monkeypatch.setattr(prototypes, "LOGITS_AT_ONCE", 6 * K)
    monkeypatch.setattr(prototypes, "AT_ONCE", 4 * K)
    asked: list[tuple[int, int]] = []

    class Noting(Dense):
        def rows(self, start: int, stop: int) -> Tensor:
            asked.append((start, stop))
            return super().rows(start, stop)

    targets = rows("dense")
    assert isinstance(targets, Dense)
    ours(*inputs(), Noting(targets.values), torch.ones(S))
    assert asked == [(0, 4), (4, 6), (6, 10), (10, 12), (12, 16), (16, 18), (18, 22), (22, 24)]


def test_what_stands_above_the_loss_multiplies_the_gradients():
    targets, weights = rows("soft"), torch.ones(S)
    assert_close(ours(*inputs(), targets, weights, -2.5), by_autograd(*inputs(), targets, weights, -2.5), 3e-6)


@pytest.mark.parametrize("kind", ["dense", "sparse", "soft"])
def test_from_logits(kind, monkeypatch):
    monkeypatch.setattr(prototypes, "LOGITS_AT_ONCE", 5 * K)
    targets, weights = rows(kind), torch.rand(S)
    x = torch.randn(S, K)
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    got = prototype_cross_entropy(a, targets, weights, T)
    got.backward()
    want = -(targets.rows(0, S).double() * F.log_softmax(b / T, -1)).sum(-1) @ weights.double()
    want.backward()
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    assert b.grad is not None
    torch.testing.assert_close(a.grad, b.grad.float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(a.detach(), x)  # the caller's logits are not the scratch space


def test_rows_of_weight_zero_and_no_rows_at_all():
    targets, weights = rows("dense"), torch.ones(S)
    weights[3:9] = 0
    got = ours(*inputs(), targets, weights)
    assert_close(got, by_autograd(*inputs(), targets, weights), 3e-6)
    assert not got[1][3:9].any()
    empty: list[tuple[Assignment, Tensor]] = [
        (Dense(torch.zeros(0, K)), torch.zeros(0)),
        (Dense(torch.zeros(4, K), repeat=0), torch.zeros(0)),
        (Soft(torch.zeros(0, K), torch.zeros(K), 0.1), torch.zeros(0)),
    ]
    for none, w in empty:
        loss, dz, dv, dg = ours(*inputs(0), none, w)
        assert loss.item() == 0
        assert dz.shape == (0, E)
        assert not dv.any()
        assert not dg.any()


def test_bf16_is_close_and_sums_in_float32():
    targets, weights = rows("soft"), torch.rand(S)
    z, v, g = inputs()
    exact = by_autograd(z, v, g, targets, weights)
    rough = ours(z.bfloat16(), v, g, targets, weights)
    assert rough[0].dtype == torch.float32
    assert rough[0].item() == pytest.approx(exact[0].item(), rel=5e-3)
    assert [x.dtype for x in rough[1:]] == [torch.bfloat16, torch.float32, torch.float32]
    for a, b in zip(rough[1:], exact[1:], strict=True):
        assert F.cosine_similarity(a.double().flatten(), b.flatten(), dim=0) > 0.999


def test_gradients_are_slopes():
    """Of the loss in float64, by finite differences."""
    targets, weights = rows("soft"), torch.rand(S)
    z, v, g = inputs()
    _, dz, dv, dg = ours(z, v, g, targets, weights)
    for i, slope in enumerate((dz, dv, dg)):
        way = torch.randn(slope.shape, generator=torch.Generator().manual_seed(5))
        losses = []
        for sign in (-1, 1):
            moved = [z, v, g]
            moved[i] = moved[i] + sign * 1e-3 * way
            losses.append(by_autograd(moved[0], moved[1], moved[2], targets, weights)[0])
        assert (losses[1] - losses[0]).item() / 2e-3 == pytest.approx((slope * way).sum().item(), rel=5e-3)


def test_two_losses_of_one_head_add_up():
    """A shared head serves both objectives: the second loss must not overwrite what the first has left for the backward pass."""
    cast, a, b = CastCache(), rows("dense"), rows("soft")
    leaves: list[Any] = [x.clone().requires_grad_() for x in inputs()]
    weights = torch.rand(S)
    total = sum(prototype_cross_entropy(leaves[0], t, weights, T, leaves[1], leaves[2], cast) for t in (a, b))
    assert isinstance(total, Tensor)
    total.backward()
    want = [x + y for x, y in zip(by_autograd(*inputs(), a, weights), by_autograd(*inputs(), b, weights), strict=True)]
    assert_close([total.detach(), *(leaf.grad for leaf in leaves)], want, 3e-6)


def test_frozen_prototypes_and_frozen_vectors():
    targets, weights = rows("dense"), torch.rand(S)
    want = by_autograd(*inputs(), targets, weights)
    z, v, g = inputs()
    z.requires_grad_()
    prototype_cross_entropy(z, targets, weights, T, v, g).backward()
    torch.testing.assert_close(z.grad, want[1].float(), rtol=1e-4, atol=1e-5)
    z, v, g = inputs()
    v.requires_grad_()
    g.requires_grad_()
    prototype_cross_entropy(z, targets, weights, T, v, g).backward()
    torch.testing.assert_close(v.grad, want[2].float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(g.grad, want[3].float(), rtol=1e-4, atol=1e-5)
    assert z.grad is None


@torch.no_grad()
def test_without_gradient_it_is_the_loss_alone():
    targets, weights = rows("dense"), torch.rand(S)
    z, v, g = inputs()
    loss = prototype_cross_entropy(z, targets, weights, T, v, g)
    assert not loss.requires_grad
    with torch.enable_grad():
        want = by_autograd(z, v, g, targets, weights)[0]
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)


def test_huge_logits_are_finite():
    z, v, g = inputs()
    got = ours(z * 1e4, v, g, rows("dense"), torch.ones(S))
    assert all(x.isfinite().all() for x in got)


def test_autocast_around_changes_no_sum():
    targets, weights = rows("soft"), torch.rand(S)
    alone = ours(*inputs(), targets, weights)
    with torch.autocast("cpu", torch.bfloat16):
        within = ours(*inputs(), targets, weights)
    assert all(torch.equal(a, b) for a, b in zip(alone, within, strict=True))
