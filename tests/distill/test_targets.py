"""Teacher targets: Sinkhorn-Knopp's marginals and its extremes, the moving centre, and both over two processes."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from distill.losses import targets as targets_module
from distill.losses.targets import Centring, SinkhornKnopp, Soft, sinkhorn_centre, sinkhorn_knopp

torch.set_num_threads(1)


def logits(samples: int = 40, prototypes: int = 12, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(samples, prototypes, generator=torch.Generator().manual_seed(seed)) * scale


def assigned(kind: Centring | SinkhornKnopp, x: torch.Tensor, temperature: float) -> torch.Tensor:
    """The targets of one part, in full."""
    (found,) = kind([x], temperature)
    return found.whole()


def test_rows_sum_to_one_and_columns_share_the_batch():
    x = logits(40, 12, 0.05)
    q = sinkhorn_knopp(x, 0.07)
    torch.testing.assert_close(q.sum(1), torch.ones(40))
    assert (q >= 0).all()
    torch.testing.assert_close(sinkhorn_knopp(x, 0.07, 60).sum(0), torch.full((12,), 40 / 12), rtol=1e-4, atol=0)
    uneven = [(sinkhorn_knopp(x, 0.07, n).sum(0) - 40 / 12).abs().max().item() for n in (1, 3, 10)]
    assert uneven[0] > uneven[1] > uneven[2]


def test_is_the_papers_iteration():
    """In float64, as written: exp, total, and three times columns then rows."""
    x = logits(30, 7, 0.3).double()
    q = (x / 0.05).exp()
    q /= q.sum()
    for _ in range(3):
        q = q / q.sum(0, keepdim=True) / 7
        q = q / q.sum(1, keepdim=True) / 30
    torch.testing.assert_close(sinkhorn_knopp(x.float(), 0.05), (q * 30).float(), rtol=2e-5, atol=1e-7)


def test_a_constant_on_all_logits_and_a_larger_order_change_nothing():
    x = logits()
    torch.testing.assert_close(sinkhorn_knopp(x + 1000, 0.5), sinkhorn_knopp(x, 0.5), rtol=2e-3, atol=1e-5)
    order = torch.randperm(40)
    torch.testing.assert_close(sinkhorn_knopp(x[order], 0.1), sinkhorn_knopp(x, 0.1)[order])
    untouched = x.clone()
    sinkhorn_knopp(x, 0.1)
    assert torch.equal(x, untouched)


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
def test_huge_logits_are_finite(scale):
    q = sinkhorn_knopp(logits(scale=scale), 0.04)
    assert q.isfinite().all()
    assert (q >= 0).all()
    assert (q.sum(1) <= 1 + 1e-5).all()


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_logits_that_differ_little(offset):
    x = logits(scale=0.05) + offset
    torch.testing.assert_close(sinkhorn_knopp(x, 0.07).sum(1), torch.ones(40))


@pytest.mark.parametrize(("scale", "temperature"), [(3.0, 0.04), (2.0, 0.02), (1e4, 0.04)])
def test_every_sample_gets_a_target(scale, temperature):
    torch.testing.assert_close(sinkhorn_knopp(logits(64, 32, scale), temperature).sum(1), torch.ones(64))


def test_one_confident_sample_does_not_silence_the_others():
    x = logits(64, 32, 0.1)
    x[0, 0] = 5.0
    torch.testing.assert_close(sinkhorn_knopp(x, 0.04).sum(1), torch.ones(64))


def test_an_empty_batch():
    assert sinkhorn_knopp(torch.zeros(0, 5), 0.1).shape == (0, 5)
    assert assigned(SinkhornKnopp(), torch.zeros(0, 5), 0.1).shape == (0, 5)


def test_one_sample():
    q = sinkhorn_knopp(logits(1, 6), 0.1)
    torch.testing.assert_close(q, torch.full((1, 6), 1 / 6))  # it alone fills every column equally


def test_a_prototype_far_below_the_others_gets_its_share():
    """The reference drops it below exp(-88); the algorithm itself does not."""
    x = logits(20, 6, 0.1)
    x[:, 2] -= 1e4
    q = sinkhorn_knopp(x, 0.04)
    assert q.isfinite().all()
    torch.testing.assert_close(q.sum(1), torch.ones(20))
    torch.testing.assert_close(sinkhorn_knopp(x, 0.04, 60).sum(0), torch.full((6,), 20 / 6), rtol=1e-2, atol=0)
    torch.testing.assert_close(q, sinkhorn_knopp(logits(20, 6, 0.1), 0.04), rtol=0, atol=0.05)  # float32's digits at 1e4: 1e-3


def test_equal_logits_give_equal_shares():
    torch.testing.assert_close(sinkhorn_knopp(torch.full((8, 4), 3.0), 0.04), torch.full((8, 4), 0.25))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_taken_and_float32_given(dtype):
    x = logits(scale=0.5).to(dtype)
    for kind in (SinkhornKnopp(), Centring(12)):
        got = assigned(kind, x, 0.04)
        assert got.dtype == torch.float32
        fresh = Centring(12) if isinstance(kind, Centring) else SinkhornKnopp()
        torch.testing.assert_close(got, assigned(fresh, x.float(), 0.04))


def test_targets_carry_no_gradient():
    x = logits().requires_grad_()
    assert not sinkhorn_knopp(x, 0.1).requires_grad
    assert not assigned(Centring(12), x, 0.1).requires_grad


def test_sinkhorn_holds_no_state():
    assert SinkhornKnopp().state_dict() == {}
    kind, x = SinkhornKnopp(5), logits()
    assert torch.equal(assigned(kind, x, 0.1), assigned(kind, x, 0.1))
    assert torch.equal(assigned(kind, x, 0.1), sinkhorn_knopp(x, 0.1, 5))


def test_the_centre_moves_after_it_is_used():
    centring, a, b = Centring(12, momentum=0.8), logits(seed=1), logits(seed=2) + 1
    torch.testing.assert_close(assigned(centring, a, 0.1), torch.softmax(a / 0.1, -1))
    centre = 0.2 * a.mean(0, keepdim=True)
    torch.testing.assert_close(centring.centre, centre)
    torch.testing.assert_close(assigned(centring, b, 0.1), torch.softmax((b - centre) / 0.1, -1))
    torch.testing.assert_close(centring.centre, 0.8 * centre + 0.2 * b.mean(0, keepdim=True))


def test_the_centre_travels_with_the_state():
    a, b = Centring(12), Centring(12)
    a([logits()], 0.1)
    b.load_state_dict(a.state_dict())
    assert torch.equal(assigned(a, logits(seed=1), 0.1), assigned(b, logits(seed=1), 0.1))


def test_an_empty_batch_leaves_the_centre():
    centring = Centring(12)
    centring([logits()], 0.1)
    before = centring.centre.clone()
    assert assigned(centring, torch.zeros(0, 12), 0.1).shape == (0, 12)
    assert torch.equal(centring.centre, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_batch_does_not_stay_in_the_centre(bad):
    centring, x = Centring(12), logits()
    centring([x], 0.1)
    before = centring.centre.clone()
    x[3, 4] = bad
    centring([x], 0.1)
    assert torch.equal(centring.centre, before)


def test_centring_takes_a_common_offset_away():
    """What it is for: a prototype that wins everywhere stops winning."""
    centring = Centring(12)
    x = logits(200, 12, 0.1)
    x[:, 3] += 1
    assert (assigned(centring, x, 0.1).argmax(1) == 3).float().mean() > 0.95
    for _ in range(80):
        targets = assigned(centring, x, 0.1)
    assert (targets.argmax(1) == 3).float().mean() < 0.3


def plain_sinkhorn(x_SK: torch.Tensor, temperature: float, iterations: int = 3) -> torch.Tensor:
    """SwAV's three lines in float64; the largest logit is taken away first, which the total would divide out."""
    x_SK = x_SK.double()
    q = ((x_SK - x_SK.max()) / temperature).exp()
    q /= q.sum()
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / len(q)
    return q * len(q)


def log_sinkhorn(x_SK: torch.Tensor, temperature: float, iterations: int = 3) -> torch.Tensor:
    """The same with logarithms in float64: no exponential can overflow or vanish."""
    q = x_SK.double() / temperature
    for _ in range(iterations):
        q = q - q.logsumexp(0, keepdim=True)
        q = q - q.logsumexp(1, keepdim=True)
    return q.exp()


def assert_relatively_close(q: torch.Tensor, want: torch.Tensor, rel: float, least: float = 1e-12) -> None:
    """Every entry down to `least`, relative to itself."""
    torch.testing.assert_close(q.double(), want, rtol=rel, atol=rel * least / (1 - rel))


@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.04, 0.07, 0.1, 0.2])
def test_is_the_plain_algorithm_in_float64_at_every_temperature(temperature):
    """Bottleneck vectors and prototypes have length 1, so logits lie within -1 ... 1: of X/t, float32 keeps 2^-24 of 1/t."""
    for seed in range(20):
        x = logits(24 + seed, 5 + 3 * seed, 0.25, seed).clamp(-1, 1)
        exact = max(2e-6, 8 * 2**-24 / temperature)
        assert_relatively_close(sinkhorn_knopp(x, temperature), plain_sinkhorn(x, temperature), exact)


@pytest.mark.parametrize("span", [100, 300, 3000])
def test_beyond_the_exponentials_range(span):
    """X/t so wide that exp overflows or loses samples in float32, and in the end in float64 too."""
    for seed in range(10):
        x = logits(40, 24, 1.0, seed)
        x = x / (x.max() - x.min()) * span * 0.04
        q, want = sinkhorn_knopp(x, 0.04), log_sinkhorn(x, 0.04)
        assert q.isfinite().all()
        torch.testing.assert_close(q.sum(1), torch.ones(40))
        assert_relatively_close(q, want, max(2e-6, 8 * 2**-24 * span), least=1e-9)
    assert ((x / 0.04).max() - (x / 0.04).min()).item() == pytest.approx(span)


def test_the_two_references_agree():
    x = logits(30, 9, 0.3)
    torch.testing.assert_close(plain_sinkhorn(x, 0.05), log_sinkhorn(x, 0.05))


@pytest.mark.parametrize("cuts", [[10], [1, 2, 39], [0, 40], [7, 7, 20]], ids=str)
@pytest.mark.parametrize("kind", [SinkhornKnopp, lambda: Centring(12)], ids=["sinkhorn", "centre"])
def test_parts_are_centred_as_a_whole(cuts, kind):
    x, again = logits(scale=0.3), logits(scale=0.3, seed=1)
    whole, parts = kind(), kind()
    for step in (x, again):
        want = assigned(whole, step, 0.05)
        got = parts(step.tensor_split(cuts), 0.05)
        assert [len(p) for p in got] == [len(p) for p in step.tensor_split(cuts)]
        torch.testing.assert_close(torch.cat([p.whole() for p in got]), want, rtol=1e-5, atol=1e-7)


def test_slices_of_rows_change_nothing(monkeypatch):
    x = logits(scale=0.3)
    whole = sinkhorn_centre([x], 0.05)
    monkeypatch.setattr(targets_module, "AT_ONCE", 12 * 3)
    torch.testing.assert_close(sinkhorn_centre([x], 0.05), whole, rtol=0, atol=1e-7)


def test_soft_targets_are_made_row_by_row():
    x, centre = logits().bfloat16(), torch.randn(12)
    soft = Soft(x, centre, 0.07)
    want = torch.softmax((x.float() - centre) / 0.07, -1)
    torch.testing.assert_close(soft.whole(), want)
    torch.testing.assert_close(soft.rows(3, 11), want[3:11])
    soft.rows(0, 5).zero_()  # the caller's own
    torch.testing.assert_close(soft.whole(), want)
    assert len(soft) == 40
    exact = Soft(x.float(), centre, 0.07)
    kept = exact.logits.clone()
    exact.rows(0, 40)
    assert torch.equal(exact.logits, kept)


SHARES = {"even": [20, 20], "uneven": [5, 35], "one empty": [0, 40]}


def two_ranks(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = {}
    for name, (first, _) in SHARES.items():
        mine = slice(0, first) if rank == 0 else slice(first, 40)
        centring = Centring(12)
        steps = [assigned(centring, logits(seed=s, scale=0.3)[mine], 0.05) for s in range(3)]
        q = sinkhorn_knopp(logits(scale=0.3)[mine], 0.05)
        shifted = sinkhorn_knopp(logits(scale=0.3)[mine] + 1e3, 0.05)
        cuts = list(logits(scale=0.3)[mine].tensor_split([7, 7]))  # three parts, the second empty
        centre = sinkhorn_centre(cuts, 0.05)
        found[name] = (q, shifted, torch.cat(steps), centring.centre, centre)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_compute_what_one_does(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    multiprocessing.spawn(two_ranks, (port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    centring = Centring(12)
    steps = [assigned(centring, logits(seed=s, scale=0.3), 0.05) for s in range(3)]
    whole, shifted = sinkhorn_knopp(logits(scale=0.3), 0.05), sinkhorn_knopp(logits(scale=0.3) + 1e3, 0.05)
    for name in SHARES:
        parts = [r[name] for r in ranks]
        torch.testing.assert_close(torch.cat([p[0] for p in parts]), whole, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(torch.cat([p[1] for p in parts]), shifted, rtol=5e-3, atol=1e-6)  # 1e3 / t in float32
        for step in range(3):
            together = torch.cat([p[2].view(3, -1, 12)[step] for p in parts])
            torch.testing.assert_close(together, steps[step], rtol=1e-4, atol=1e-6)
        assert torch.equal(parts[0][3], parts[1][3])
        torch.testing.assert_close(parts[0][3], centring.centre)
        assert torch.equal(parts[0][4], parts[1][4])
        torch.testing.assert_close(parts[0][4], sinkhorn_centre([logits(scale=0.3)], 0.05), rtol=0, atol=1e-6)
