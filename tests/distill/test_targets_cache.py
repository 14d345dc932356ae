"""The cache of teacher targets: exact within the mass lost, compact, whole after a kill, for one set of settings and crops and any number
of processes.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill import files, target_shards, targets_cache
from distill.errors import EnvironmentFailed, UserError
from distill.losses import assignments
from distill.losses.assignments import TopK, dense, sinkhorn_loses, top_k
from distill.losses.targets import sinkhorn_knopp
from distill.models.heads import DINOHead, HeadConfig
from distill.target_shards import Target, decode, encode, row_bytes
from distill.targets_cache import CacheConfig, Cached, TargetsCache, estimate_bytes

B, N, K = 6, 16, 300
IDENTITY: dict[str, Any] = {
    "teacher": {"sha256": "a" * 64, "temperature": (0.04, 0.07)},
    "crops": {"global_size": 48, "global_scale": (0.4, 1.0)},
    "masks": None,
    "seed": 1,
}
CONFIG = CacheConfig(dino_k=12, ibot_k=5)


class Step:
    """One step of the global batch: crops that look different, block-like masks with unequal counts (none in some), sharp targets."""

    def __init__(self, step: int, batch: int = B, prototypes: int = K):
        g = torch.Generator().manual_seed(1000 + step)
        self.batch = batch
        self.crops = torch.randn(2 * batch, 3, 1, 1, generator=g) + torch.randn(2 * batch, 3, 8, 8, generator=g)
        self.crops[..., :4] += torch.randn(2 * batch, 1, 1, 1, generator=g)
        self.chosen = torch.rand(2 * batch, N, generator=g) < torch.rand(2 * batch, 1, generator=g) - 0.2
        m = int(self.chosen.sum())
        self.dino = sinkhorn_knopp(torch.randn(2 * batch, prototypes, generator=g).mul_(0.2), 0.05)
        self.ibot = sinkhorn_knopp(torch.randn(m, prototypes, generator=g).mul_(0.2), 0.05)

    def of(self, rank: int, world: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(crops, chosen, dino, ibot) of one process: its images of both views."""
        images = torch.arange(self.batch)[rank * self.batch // world : (rank + 1) * self.batch // world]
        mine = torch.cat([images, self.batch + images])
        crop_of_row = torch.nonzero(self.chosen)[:, 0]
        rows = torch.cat([torch.nonzero(crop_of_row == c)[:, 0] for c in mine])
        return self.crops[mine], self.chosen[mine], self.dino[mine], self.ibot[rows]


def cache(
    folder: Path, share: tuple[int, int] = (0, 1), config: CacheConfig = CONFIG, batch: int = B, **other: Any
) -> TargetsCache:
    return TargetsCache(folder, {**IDENTITY, **other}, config, batch, share)


def put(c: TargetsCache, step: int, **kwargs: Any) -> Cached:
    return c.put(step, *Step(c.slot(step), **kwargs).of(*c.share))


def get(c: TargetsCache, step: int, **kwargs: Any) -> Cached | None:
    return c.get(step, *Step(c.slot(step), **kwargs).of(*c.share)[:2])


def sparse(target: Target | None) -> TopK:
    assert isinstance(target, TopK)
    return target


def assert_equal(a: Cached | None, b: Cached | None) -> None:
    assert a is not None
    assert b is not None
    for x, y in ((sparse(a.dino), sparse(b.dino)), (sparse(a.ibot), sparse(b.ibot))):
        assert torch.equal(x.values, y.values)
        assert torch.equal(x.indices, y.indices)
    assert a[2:] == b[2:]


def fill(folder: Path, steps: range, world: int = 1, config: CacheConfig = CONFIG) -> None:
    for rank in range(world):
        c = cache(folder, (rank, world), config)
        for step in steps:
            put(c, step)
        c.flush()


# Sparse assignments


def test_top_k_keeps_the_largest_and_says_what_it_lost():
    t = torch.tensor([[0.1, 0.6, 0.1, 0.2], [0.25, 0.25, 0.25, 0.25]])
    kept, lost = top_k(t, 2)
    assert kept.indices[0].tolist() == [1, 3]
    torch.testing.assert_close(kept.values[0], torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(lost, torch.tensor([0.2, 0.5]))
    torch.testing.assert_close(dense(kept, 4)[0], torch.tensor([0.0, 0.75, 0.0, 0.25]))


def test_all_prototypes_kept_is_the_target_itself():
    t = Step(0).dino
    kept, lost = top_k(t, K + 5)
    torch.testing.assert_close(dense(kept, K), t / t.sum(1, keepdim=True))
    assert lost.max() < 1e-5


class ByRows:
    """Targets that never exist in full."""

    def __init__(self, whole: Tensor):
        self.whole, self.most = whole, 0

    def __len__(self) -> int:
        return len(self.whole)

    def rows(self, start: int, stop: int) -> Tensor:
        self.most = max(self.most, stop - start)
        return self.whole[start:stop].clone()


def test_targets_may_come_a_few_rows_at_a_time(tmp_path, monkeypatch):
    s, few = Step(0), 3
    want = put(cache(tmp_path / "whole"), 0)
    monkeypatch.setattr(assignments, "AT_ONCE", few * K)
    dino, ibot = ByRows(s.dino), ByRows(s.ibot)
    assert_equal(cache(tmp_path / "c").put(0, s.crops, s.chosen, dino, ibot), want)
    assert (dino.most, ibot.most) == (few, few)
    nothing, lost = top_k(ByRows(s.dino[:0]), 4)
    assert nothing.values.shape == (0, 4)
    assert lost.shape == (0,)


@pytest.mark.parametrize("k", [1, 4, 16, 64])
def test_the_distance_to_the_live_target_is_twice_the_mass_lost(k):
    t = Step(0).dino
    kept, lost = top_k(t, k)
    torch.testing.assert_close((dense(kept, K) - t).abs().sum(1), 2 * lost, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 4, 16, 64])
@pytest.mark.parametrize("stored", [False, True])
def test_loss_and_gradient_agree_within_the_mass_lost(k, stored):
    t, temperature = Step(1).dino, 0.1
    kept, lost = top_k(t, k)
    rounding = 0.0
    if stored:
        kept, rounding = sparse(decode(encode(kept, K))), 2**-10
    z = torch.randn(len(t), K, generator=torch.Generator().manual_seed(5)).mul_(0.3).requires_grad_()

    def loss_and_gradient(target: Tensor) -> tuple[Tensor, Tensor]:
        ce = -(target * torch.log_softmax(z / temperature, 1)).sum(1)
        return ce.detach(), torch.autograd.grad(ce.sum(), z)[0]

    (live, live_grad), (cached, cached_grad) = loss_and_gradient(t), loss_and_gradient(dense(kept, K))
    spread = (z.amax(1) - z.amin(1)).detach()
    assert ((live - cached).abs() <= (lost + rounding) * spread / temperature + 1e-4).all()
    assert ((live_grad - cached_grad).abs().sum(1) <= 2 * (lost + rounding) / temperature + 1e-4).all()
    assert (live - cached).abs().max() > 1e-6  # the test compares two different targets


def test_a_row_of_zeros_and_one_that_is_not_finite():
    t = torch.zeros(2, 8)
    t[1, 3] = torch.nan
    kept, _ = top_k(t, 2)
    assert kept.values[0].tolist() == [0, 0]
    assert kept.values[1].isnan().any()


@pytest.mark.parametrize(("samples", "k"), [(16, 8), (16, 64), (64, 32), (512, 4)])
def test_what_sinkhorn_loses_at_least(samples, k):
    """Teachers as sharp as can be: nearly all of a softmax target is one prototype, and Sinkhorn still spreads it."""
    logits = torch.randn(samples, 2048, generator=torch.Generator().manual_seed(1)) * 0.5
    assert top_k(torch.softmax(logits / 0.02, 1), k)[1].mean() < 0.1
    _, lost = top_k(sinkhorn_knopp(logits, 0.02), k)
    assert lost.mean() > sinkhorn_loses(k, samples, 2048) - 0.01
    if samples * k <= 1024:
        assert lost.mean() < sinkhorn_loses(k, samples, 2048) + 0.05
    assert sinkhorn_loses(k, 10**6, 2048) == 0


# Bytes


@pytest.mark.parametrize("prototypes", [2, 256, 257, 65536, 65537, 131072, 2**24])
def test_indices_survive_at_every_size(prototypes):
    g = np.random.default_rng(0)
    indices = torch.from_numpy(g.integers(0, prototypes, (50, 13)))
    indices[0, 0], indices[0, 1] = prototypes - 1, 0
    values = torch.rand(50, 13).sort(1, descending=True).values
    values /= values.sum(1, keepdim=True)
    rows = encode(TopK(values, indices), prototypes)
    back = sparse(decode(rows))
    assert torch.equal(back.indices, indices)
    torch.testing.assert_close(back.values, values, rtol=2**-10, atol=1e-7)
    assert back.values.dtype == torch.float32
    if prototypes >= 13:
        assert sum(a[0].nbytes for a in rows.values()) == row_bytes(13, prototypes, 256)


def test_stored_values_sum_to_one_and_differ_little():
    kept, _ = top_k(Step(0).dino, 64)
    back = sparse(decode(encode(kept, K)))
    torch.testing.assert_close(back.values.sum(1), torch.ones(len(back.values)), atol=1e-6, rtol=0)
    assert (back.values - kept.values).abs().sum(1).max() < 2**-10
    assert (back.values.diff(dim=1) <= 0).all()


@pytest.mark.parametrize(("prototypes", "steps"), [(300, 60), (70000, 10)])
def test_the_estimate_is_the_size(tmp_path, prototypes, steps):
    config = CacheConfig(dino_k=64, ibot_k=None if prototypes == 300 else 16)
    c = cache(tmp_path / "c", config=config)
    for step in range(steps):
        put(c, step, prototypes=prototypes)
    head = HeadConfig(prototypes=prototypes, bottleneck=prototypes)
    c.flush()
    chosen = sum(int(Step(s, prototypes=16).chosen.sum()) for s in range(steps))
    size = sum(p.stat().st_size for p in (tmp_path / "c").glob("*.safetensors"))
    assert estimate_bytes(config, steps * B, chosen / (steps * B), head, head) == pytest.approx(size, rel=0.03)
    assert c.statistics()["bytes"] == size


def test_the_estimate_stops_at_the_replayed_images():
    small, large = HeadConfig(prototypes=65536, bottleneck=256), HeadConfig(prototypes=131072, bottleneck=384)
    once = estimate_bytes(CacheConfig(replay=1000), 1000, 40, small, small)
    assert once == 1000 * (2 * (20 + 512) + 40 * 512)
    assert estimate_bytes(CacheConfig(replay=1000), 50_000, 40, small, small) == once
    assert estimate_bytes(CacheConfig(), 50_000, 40, small, small) == 50 * once
    for config in (CacheConfig(), CacheConfig(ibot_k=16)):
        assert estimate_bytes(config, 1000, 40, small, large) > estimate_bytes(config, 1000, 40, small, small)


# First use and replay


def test_first_use_and_replay_are_the_same_numbers(tmp_path):
    first = cache(tmp_path / "c")
    assert get(first, 0) is None
    used = [put(first, step) for step in range(4)]
    for step in range(4):
        assert_equal(get(first, step), used[step])  # from memory
    first.flush()
    assert_equal(get(first, 2), used[2])  # from the file
    again = cache(tmp_path / "c")
    for step in (3, 0, 1, 2):
        assert_equal(get(again, step), used[step])
    assert get(again, 4) is None
    assert (again.hits, again.misses) == (4, 1)


def test_cached_losses_follow_the_live_ones(tmp_path):
    """Image and patch terms, weighted as the objectives weight them: within the mass lost, and closer with more prototypes."""
    s = Step(3)
    g = torch.Generator().manual_seed(9)
    image, patches = (torch.randn(n, K, generator=g) * 0.3 for n in (2 * B, len(s.ibot)))
    weights = torch.cat([torch.full((int(n),), 1 / int(n)) for n in s.chosen.sum(1) if n]) / (2 * B)

    def losses(dino: Tensor, ibot: Tensor) -> Tensor:
        other_crop = dino.view(2, B, K).flip(0).flatten(0, 1)
        terms = [-(t * torch.log_softmax(z / 0.1, 1)).sum(1) for t, z in ((other_crop, image), (ibot, patches))]
        return torch.stack([terms[0].mean(), (terms[1] * weights).sum()])

    live, before = losses(s.dino, s.ibot), torch.full((2,), torch.inf)
    spread = max(float(x.max() - x.min()) for x in (image, patches)) / 0.1
    for k in (2, 20, 200):
        c = put(cache(tmp_path / str(k), config=CacheConfig(dino_k=k, ibot_k=k)), 3)
        difference = (losses(dense(sparse(c.dino), K), dense(sparse(c.ibot), K)) - live).abs()
        assert difference[0] <= (c.dino_lost + 2**-10) * spread
        assert difference[1] <= (float((top_k(s.ibot, k)[1] * weights).sum()) + 2**-10) * spread
        assert (difference < before).all()
        before = difference


@pytest.mark.parametrize("written_as", [torch.float32, torch.bfloat16])
def test_bottleneck_vectors_give_the_live_targets(tmp_path, written_as):
    """Where Sinkhorn over few images makes any top-k lose most of the mass."""
    torch.manual_seed(0)
    head = DINOHead(32, HeadConfig(prototypes=4096, hidden=64, bottleneck=64, init="fan_in")).eval()
    s = Step(0)
    with torch.no_grad():
        z_dino, z_ibot = (head.bottleneck(torch.randn(n, 32)).to(written_as) for n in (2 * B, len(s.ibot)))
        live = [sinkhorn_knopp(head.last_layer(z.float()), 0.04) for z in (z_dino, z_ibot)]
        c = cache(tmp_path / "c", config=CacheConfig())
        used = c.put(0, s.crops, s.chosen, z_dino, z_ibot)
        c.flush()
        again = cache(tmp_path / "c", config=CacheConfig()).get(0, s.crops, s.chosen)
        assert again is not None
        for z, first, later, target in zip((z_dino, z_ibot), used[:2], again[:2], live, strict=True):
            assert isinstance(first, Tensor)
            assert isinstance(later, Tensor)
            assert torch.equal(first, later)
            if written_as is torch.bfloat16:
                assert torch.equal(first, z.float())  # nothing at all is lost
            distance = (sinkhorn_knopp(head.last_layer(later), 0.04) - target).abs().sum(1)
            assert distance.max() < 2e-3
        assert top_k(live[0], 64)[1].mean() > 0.8
    assert (again.dino_lost, again.ibot_lost) == (0, 0)


@pytest.mark.parametrize("read", [2, 3])
def test_bottleneck_vectors_are_those_of_their_crops(tmp_path, read):
    config = CacheConfig(dino_k=None, ibot_k=3)
    c = cache(tmp_path / "c", config=config)
    s = Step(0)
    s.dino = torch.arange(2 * B).float()[:, None].expand(2 * B, 7)
    c.put(0, *s.of(0, 1))
    c.flush()
    for rank in range(read):
        crops, chosen, dino, _ = s.of(rank, read)
        found = cache(tmp_path / "c", (rank, read), config).get(0, crops, chosen)
        assert found is not None
        assert isinstance(found.dino, Tensor)
        assert torch.equal(found.dino, dino)


def test_the_mean_mass_lost_is_reported(tmp_path):
    c = cache(tmp_path / "c")
    for step in range(3):
        put(c, step)
    dino = torch.cat([top_k(Step(s).dino, 12)[1] for s in range(3)]).mean().item()
    ibot = torch.cat([top_k(Step(s).ibot, 5)[1] for s in range(3)]).mean().item()
    waiting = c.statistics()
    c.flush()
    for statistics in (waiting, c.statistics(), cache(tmp_path / "c").statistics()):
        assert statistics["dino_lost"] == pytest.approx(dino, rel=1e-3)
        assert statistics["ibot_lost"] == pytest.approx(ibot, rel=1e-3)
        assert (statistics["steps"], statistics["images"]) == (3, 3 * B)
    one = get(c, 1)
    assert one is not None
    assert one.dino_lost == pytest.approx(top_k(Step(1).dino, 12)[1].mean().item(), rel=1e-3)


def test_replayed_steps_share_their_targets(tmp_path):
    c = cache(tmp_path / "c", config=CacheConfig(dino_k=12, ibot_k=5, replay=4 * B - 1))  # rounded up to 4 whole batches
    used = [put(c, step) for step in range(4)]
    assert [c.slot(s) for s in range(9)] == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert_equal(get(c, 6), used[2])
    assert_equal(put(c, 5), used[1])  # not stored twice
    c.flush()
    assert (c.statistics()["steps"], c.statistics()["images"]) == (4, 4 * B)


def test_nothing_chosen_for_ibot(tmp_path):
    c = cache(tmp_path / "c")
    crops, chosen, dino, ibot = Step(0).of(0, 1)
    c.put(0, crops, torch.zeros_like(chosen), dino, ibot[:0])
    c.flush()
    found = cache(tmp_path / "c").get(0, crops, torch.zeros_like(chosen))
    assert found is not None
    assert sparse(found.ibot).values.shape == (0, 5)
    assert sparse(found.dino).values.shape == (2 * B, 12)


def test_a_last_crop_with_nothing_chosen(tmp_path):
    """Its rows lie at the very end of the file, where there is nothing to slice."""
    c = cache(tmp_path / "c")
    crops, chosen, dino, ibot = Step(0).of(0, 1)
    chosen = chosen.clone()
    dropped = int(chosen[-1].sum())
    chosen[-1] = False
    want = c.put(0, crops, chosen, dino, ibot[: len(ibot) - dropped])
    c.flush()
    assert_equal(cache(tmp_path / "c").get(0, crops, chosen), want)
    last = cache(tmp_path / "c", (B - 1, B)).get(0, crops[[B - 1, -1]], chosen[[B - 1, -1]])
    assert last is not None
    assert len(sparse(last.ibot).values) == int(chosen[B - 1].sum())


@pytest.mark.parametrize("k", [5, None])
def test_an_objective_that_the_run_does_without(tmp_path, k):
    config = CacheConfig(dino_k=k, ibot_k=k)
    s = Step(0)
    for name, dino, ibot in (("patches", None, s.ibot), ("image", s.dino, None)):
        c = cache(tmp_path / name, config=config)
        used = c.put(0, s.crops, s.chosen, dino, ibot)
        c.flush()
        found = cache(tmp_path / name, config=config).get(0, s.crops, s.chosen)
        assert found is not None
        assert (
            (found.dino is None, found.ibot is None) == (used.dino is None, used.ibot is None) == (dino is None, ibot is None)
        )
        assert found[2:] == used[2:]
        half = cache(tmp_path / name, (1, 2), config).get(0, *s.of(1, 2)[:2])
        assert half is not None
        assert (half.dino is None, half.ibot is None) == (dino is None, ibot is None)


def test_targets_that_are_not_finite_stay_so(tmp_path):
    c = cache(tmp_path / "c")
    crops, chosen, dino, ibot = Step(0).of(0, 1)
    c.put(0, crops, chosen, dino * torch.nan, ibot)
    c.flush()
    found = cache(tmp_path / "c")
    again = found.get(0, crops, chosen)
    assert again is not None
    assert sparse(again.dino).values.isnan().all()
    assert found.statistics()["dino_lost"] == 0


# Rows belong to crops


def test_rows_are_those_of_their_crops(tmp_path):
    """Every crop's targets name the crop itself: target c of CLS is prototype c, every patch of crop c has prototype 100 + c."""
    c = cache(tmp_path / "c", config=CacheConfig(dino_k=1, ibot_k=1))
    s = Step(0)
    crop_of_row = torch.nonzero(s.chosen)[:, 0]
    s.dino = torch.nn.functional.one_hot(torch.arange(2 * B), K).float()
    s.ibot = torch.nn.functional.one_hot(100 + crop_of_row, K).float()
    c.put(0, *s.of(0, 1))
    c.flush()
    for world in (1, 2, 3, 6):
        for rank in range(world):
            crops, chosen, _, _ = s.of(rank, world)
            found = cache(tmp_path / "c", (rank, world), CacheConfig(dino_k=1, ibot_k=1)).get(0, crops, chosen)
            assert found is not None
            images = list(range(rank * B // world, (rank + 1) * B // world))
            mine = images + [B + i for i in images]
            assert sparse(found.dino).indices[:, 0].tolist() == mine
            assert sparse(found.ibot).indices[:, 0].tolist() == [100 + c for c in mine for _ in range(int(s.chosen[c].sum()))]


@pytest.mark.parametrize("written", [1, 2, 3])
@pytest.mark.parametrize("read", [1, 2, 3, 6])
def test_any_number_of_processes_reads_what_any_other_wrote(tmp_path, written, read):
    fill(tmp_path / "c", range(3), written)
    whole = cache(tmp_path / "whole")
    for step in range(3):
        want = put(whole, step)
        found = [get(cache(tmp_path / "c", (rank, read)), step) for rank in range(read)]
        dino = torch.zeros(2 * B, K)
        for rank, f in enumerate(found):
            assert f is not None
            images = torch.arange(rank * B // read, (rank + 1) * B // read)
            dino[torch.cat([images, B + images])] = dense(sparse(f.dino), K)
        assert torch.equal(dino, dense(sparse(want.dino), K))
        assert torch.equal(torch.cat([sparse(f.ibot).indices for f in found if f]).sum(), sparse(want.ibot).indices.sum())


def mirrored(crops: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    return crops.flip(-1), chosen


def upside_down(crops: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    return crops.flip(-2), chosen


def shifted(crops: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    return crops.roll(1, 0), chosen


def views_swapped(crops: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    return crops.roll(B, 0), chosen.roll(B, 0)


def one_of_them_other(crops: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([crops[:-1], crops[-1:] + 0.1]), chosen


def other_mask_of_equal_size(crops: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    return crops, chosen.flip(1)


def other_patches(crops: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    return crops, torch.ones_like(chosen)


@pytest.mark.parametrize(
    "change",
    [mirrored, upside_down, shifted, views_swapped, one_of_them_other, other_mask_of_equal_size, other_patches],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("from_file", [False, True])
def test_other_crops_or_masks_are_refused(tmp_path, change, from_file):
    c = cache(tmp_path / "c")
    put(c, 7)
    if from_file:
        c.flush()
        c = cache(tmp_path / "c")
    crops, chosen, _, _ = Step(7).of(0, 1)
    with pytest.raises(UserError, match=r"belong to other crops or masks .*step 7\).*Delete the folder"):
        c.get(7, *change(crops, chosen))
    assert c.get(7, crops + 1e-4, chosen) is not None  # rounding of another machine is no other crop


# Settings


def test_other_settings_are_named_with_both_values(tmp_path):
    fill(tmp_path / "c", range(2))
    with pytest.raises(UserError) as e:
        cache(
            tmp_path / "c",
            batch=2 * B,
            config=CacheConfig(dino_k=12, ibot_k=6),
            teacher={"sha256": "b" * 64, "temperature": (0.04, 0.07)},
            crops={"global_size": 64, "global_scale": (0.4, 1.0), "flip": 0.5},
        )
    text = str(e.value)
    for part in (
        "batch (6 there, 12 here)",
        "crops.global_size (48 there, 64 here)",
        "crops.flip (absent there, 0.5 here)",
        "ibot_k (5 there, 6 here)",
        "teacher.sha256 (aaaaaaaaaaaa... there, bbbbbbbbbbbb... here)",
        "Delete the folder, or leave the cache out",
    ):
        assert part in text
    assert "temperature" not in text
    assert "\n" not in text
    assert get(cache(tmp_path / "c"), 1) is not None  # refusing harmed nothing


@pytest.mark.parametrize("other", [{"seed": 2}, {"masks": {}}, {"more": 1}, {"crops": {"global_size": 48}}], ids=str)
def test_any_difference_is_refused(tmp_path, other):
    fill(tmp_path / "c", range(1))
    with pytest.raises(UserError, match=next(iter(other))):
        cache(tmp_path / "c", **other)


def test_settings_are_readable_and_replay_is_none_of_them(tmp_path):
    fill(tmp_path / "c", range(2))
    settings = json.loads((tmp_path / "c" / "meta.json").read_text())["settings"]
    assert settings["teacher"]["sha256"] == "a" * 64
    assert (settings["batch"], settings["dino_k"]) == (B, 12)
    longer = cache(tmp_path / "c", config=CacheConfig(dino_k=12, ibot_k=5, replay=2 * B))
    assert get(longer, 3) is not None


def test_problems():
    assert CacheConfig().problems() == CacheConfig(dino_k=64, ibot_k=16, replay=1000).problems() == []
    assert len(CacheConfig(dino_k=0, ibot_k=0, replay=0).problems()) == 3


# Damage


def test_a_damaged_or_foreign_file_is_one_sentence(tmp_path):
    fill(tmp_path / "c", range(3))
    shard = next((tmp_path / "c").glob("*.safetensors"))
    whole = shard.read_bytes()
    for content in (whole[:-5], whole[: len(whole) // 2], whole[:4], b"", b"\x00" * 50, b"{}"):
        shard.write_bytes(content)
        with pytest.raises(UserError, match=r"not a whole file of cached targets .*Delete this file") as e:
            cache(tmp_path / "c")
        assert "\n" not in str(e.value)
        assert shard.name in str(e.value)
    shard.unlink()
    assert get(cache(tmp_path / "c"), 0) is None  # what the sentence asks for, works

    shard.write_bytes(whole)
    (tmp_path / "c" / "model.safetensors").write_bytes(whole)
    with pytest.raises(UserError, match=r"model\.safetensors is no file of a cache"):
        cache(tmp_path / "c")


def test_safetensors_that_are_no_shard(tmp_path):
    from safetensors.numpy import save_file

    fill(tmp_path / "c", range(1))
    shard = next((tmp_path / "c").glob("*.safetensors"))
    save_file({"steps": np.zeros(3, np.int64)}, shard)
    with pytest.raises(UserError, match="format None"):
        cache(tmp_path / "c")
    save_file({"steps": np.zeros(3, np.int64)}, shard, {"format": target_shards.FORMAT, "about": "{}"})
    with pytest.raises(UserError, match="not a whole file"):
        cache(tmp_path / "c")


def test_a_shard_of_another_cache_is_refused(tmp_path):
    fill(tmp_path / "c", range(1))
    other = cache(tmp_path / "other", seed=2)
    put(other, 0)
    other.flush()
    shard = next((tmp_path / "other").glob("*.safetensors"))
    shard.rename(tmp_path / "c" / shard.name)
    with pytest.raises(UserError, match="holds targets of other settings"):
        cache(tmp_path / "c")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "x"}', '{"format": "decant-targets-1", "settings": 3}'])
def test_a_damaged_meta_is_one_sentence(tmp_path, text):
    fill(tmp_path / "c", range(1))
    (tmp_path / "c" / "meta.json").write_text(text)
    with pytest.raises(UserError, match=r"meta\.json|were made with other settings") as e:
        cache(tmp_path / "c")
    assert "\n" not in str(e.value)


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="no cache of targets"):
        cache(tmp_path)
    assert os.listdir(tmp_path) == ["photo.jpg"]


# Interruption


def test_a_full_disk_is_a_sentence_and_nothing_is_lost(tmp_path, monkeypatch):
    c = cache(tmp_path / "c")
    used = [put(c, step) for step in range(2)]
    c.flush()
    used.append(put(c, 2))

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as m:
        m.setattr(files.os, "fsync", full)
        with pytest.raises(EnvironmentFailed, match="disk is full"):
            c.flush()
        m.setattr(targets_cache, "SHARD_BYTES", 1)
        with pytest.raises(EnvironmentFailed, match="disk is full"):
            put(c, 3)
    assert_equal(get(cache(tmp_path / "c"), 1), used[1])
    assert_equal(get(c, 2), used[2])
    c.flush()  # space was freed
    assert [get(cache(tmp_path / "c"), s) is not None for s in range(5)] == [True] * 4 + [False]


def test_shards_hold_many_steps_and_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(targets_cache, "SHARD_BYTES", 20_000)
    c = cache(tmp_path / "c")
    for step in range(60):
        put(c, step)
        assert c._waiting < 20_000
    shards = len(list((tmp_path / "c").glob("*.safetensors")))
    assert 2 < shards < 20


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
from distill import targets_cache
from tests.distill.test_targets_cache import cache, put
targets_cache.SHARD_BYTES = 15_000
torch.set_num_threads(1)
c = cache(Path(sys.argv[1]))
for step in range(10**6):
    put(c, step)
    if step == 20:
        print("going", flush=True)
"""


def test_a_kill_leaves_only_whole_shards(tmp_path):
    root = Path(__file__).resolve().parents[2]
    folder = tmp_path / "c"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(folder), str(root)], stdout=subprocess.PIPE, cwd=root) as p:
        assert p.stdout is not None
        assert p.stdout.readline() == b"going\n"
        time.sleep(0.05)
        p.send_signal(signal.SIGKILL)
    c = cache(folder)
    steps = int(c.statistics()["steps"])
    assert steps > 10
    assert sorted(c._known) == list(range(steps))
    for step in (0, steps - 1):
        assert_equal(get(c, step), put(cache(tmp_path / f"new{step}"), step))
    assert get(c, steps) is None
    put(c, steps)  # and it goes on
    c.flush()
    assert get(cache(folder), steps) is not None


def test_what_a_kill_left_unfinished_is_swept_and_a_write_in_progress_is_not(tmp_path):
    fill(tmp_path / "c", range(1))
    old, new = (
        tmp_path / "c" / ".part-1-rank0of1-000001-ab.safetensors",
        tmp_path / "c" / ".part-2-rank0of1-000001-cd.safetensors",
    )
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    cache(tmp_path / "c")
    assert not old.exists()
    assert new.exists()


def test_steps_that_a_kill_took_from_one_process_are_made_again_by_all(tmp_path):
    """Rank 0 wrote steps 0..3, rank 1 only 0 and 1: the rest counts as missing for one process as for any other number."""
    for rank, last in ((0, 4), (1, 2)):
        c = cache(tmp_path / "c", (rank, 2))
        for step in range(last):
            put(c, step)
        c.flush()
    one = cache(tmp_path / "c")
    assert [get(one, s) is not None for s in range(4)] == [True, True, False, False]
    for rank in (0, 1):
        c = cache(tmp_path / "c", (rank, 2))
        for step in (2, 3):
            put(c, step)
        c.flush()
    assert all(get(cache(tmp_path / "c"), s) is not None for s in range(4))


TWO = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch, torch.distributed as dist
from tests.distill.test_targets_cache import cache, get
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=int(sys.argv[3]), world_size=2)
c = cache(Path(sys.argv[1]) / "c", (dist.get_rank(), 2))
print([get(c, s) is not None for s in range(4)], flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_agree_on_what_is_there(tmp_path):
    """Rank 0 could read its own rows of steps 2 and 3, but then only rank 1 would ask the teacher."""
    for rank, last in ((0, 4), (1, 2)):
        c = cache(tmp_path / "c", (rank, 2))
        for step in range(last):
            put(c, step)
        c.flush()
    root = Path(__file__).resolve().parents[2]
    both = [
        subprocess.Popen([sys.executable, "-c", TWO, str(tmp_path), str(root), str(rank)], stdout=subprocess.PIPE, cwd=root)
        for rank in (0, 1)
    ]
    for process in both:
        assert process.communicate(timeout=60)[0].decode().strip() == "[True, True, False, False]"


def test_two_runs_may_fill_one_cache(tmp_path):
    first, second = cache(tmp_path / "c"), cache(tmp_path / "c")
    a, b = put(first, 0), put(second, 1)
    first.flush()
    second.flush()
    both = cache(tmp_path / "c")
    assert_equal(get(both, 0), a)
    assert_equal(get(both, 1), b)
