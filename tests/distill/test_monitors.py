"""Monitors of collapse: the statistics against their definitions, what each of them can and cannot see, and when a run is stopped."""

import math
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill.errors import DecantError
from distill.losses.koleo import koleo_loss
from distill.losses.targets import sinkhorn_knopp
from distill.models.backbone import Backbone, BackboneConfig
from distill.models.heads import DINOHead, HeadConfig
from distill.monitors import (
    Limits,
    Monitor,
    MonitorConfig,
    assignment_sums,
    collapse_statistics,
    effective_rank,
    feature_std,
    monitor_rows,
    nearest_distances,
    prototype_entropy,
)

ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits(prototypes=64, samples=128, images=64, dim=48)
HEALTHY = {"effective_rank": 25.0, "nearest_distance": 0.5, "teacher_entropy": 2.0, "prototype_entropy": 4.1}
EVERY_STEP = MonitorConfig(after=0.0, patience=3)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x)


# The statistics


class Rows:
    """Assignments that are made a few rows at a time, and note how many at most."""

    def __init__(self, values: torch.Tensor):
        self.values, self.most = values, 0

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        self.most = max(self.most, stop - start)
        return self.values[start:stop]


def test_entropies_of_assignments():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])
    samples, total = assignment_sums(p)
    assert samples.item() == pytest.approx(entropy([0.5, 0.5]) + entropy([0.25, 0.75]))
    assert prototype_entropy(total).item() == pytest.approx(entropy([0.25, 0.375, 0.375]))
    uniform = assignment_sums(torch.full((5, 8), 1 / 8))
    assert uniform[0].item() == pytest.approx(5 * math.log(8))
    hard = assignment_sums(torch.eye(8))
    assert hard[0].item() == 0
    assert prototype_entropy(hard[1]).item() == pytest.approx(math.log(8))


def test_assignments_made_in_rows_are_never_made_whole():
    p = torch.softmax(torch.randn(50, 10) * 3, -1)
    in_rows = Rows(p)
    for got, expected in zip(assignment_sums(in_rows, at_once=70), assignment_sums(p), strict=True):
        torch.testing.assert_close(got, expected)
    assert in_rows.most == 7
    assert assignment_sums(Rows(p[:0]))[1].tolist() == [0] * 10


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (12, 12)])
def test_effective_rank_is_its_equation(shape):
    x = torch.randn(shape) * torch.logspace(0, -2, shape[1])
    singular = torch.linalg.svdvals(x.double())
    assert effective_rank(x) == pytest.approx(math.exp(entropy((singular / singular.sum()).tolist())), rel=1e-6)


def test_effective_rank_at_its_ends():
    assert effective_rank(torch.eye(9) * 3) == pytest.approx(9)
    assert effective_rank(torch.ones(300, 700) * torch.randn(700)) == pytest.approx(1, abs=1e-3)  # float32 would say 3
    assert effective_rank(torch.zeros(4, 6)) == pytest.approx(1)
    assert effective_rank(torch.randn(4, 6).bfloat16()) > 1
    assert math.isnan(effective_rank(torch.full((4, 6), torch.nan)))


def test_effective_rank_does_not_see_rotation_or_scale():
    x = torch.randn(20, 8) @ torch.randn(8, 8)
    turned = 7 * x @ torch.linalg.qr(torch.randn(8, 8))[0]
    assert effective_rank(turned) == pytest.approx(effective_rank(x), rel=1e-4)


def test_nearest_distances_by_hand():
    x = torch.randn(7, 5)
    unit = x / x.norm(dim=1, keepdim=True)
    expected = [min((unit[i] - unit[j]).norm().item() for j in range(7) if j != i) for i in range(7)]
    torch.testing.assert_close(nearest_distances(x), torch.tensor(expected))
    twins = torch.cat([x, 3 * x[:1]])
    assert nearest_distances(twins)[0] < 1e-6
    assert nearest_distances(twins)[-1] < 1e-6


def test_feature_std_is_full_on_a_sphere_and_zero_when_all_are_alike():
    assert feature_std(torch.randn(4000, 16)).item() == pytest.approx(0.25, rel=0.02)
    assert feature_std(torch.ones(5, 16)).item() < 1e-6


def test_statistics_of_a_step_carry_what_was_possible_and_no_gradient():
    cls = torch.randn(300, 6, requires_grad=True)
    values, limits = collapse_statistics(torch.eye(8), cls)
    assert limits == Limits(prototypes=8, samples=8, images=256, dim=6)
    assert values["nearest_distance_min"] <= values["nearest_distance"]
    assert values["prototype_entropy"] == pytest.approx(math.log(8))
    by_crop = torch.softmax(torch.randn(2, 4, 8), -1)  # the loop's shape: crops, images, prototypes
    assert collapse_statistics(by_crop, cls) == collapse_statistics(by_crop.flatten(0, 1), cls)
    assert collapse_statistics(Rows(by_crop.flatten(0, 1)), cls)[0] == pytest.approx(collapse_statistics(by_crop, cls)[0])
    without, _ = collapse_statistics(None, cls)
    assert set(without) == {"effective_rank", "nearest_distance", "nearest_distance_min", "feature_std"}


# What each of them sees


def dead(values: dict[str, float], limits: Limits) -> set[str]:
    """The monitors that are beyond their default threshold."""
    found = set()
    for name, (side, threshold, _) in MonitorConfig().thresholds(limits).items():
        if name in values and (values[name] < threshold if side == "below" else values[name] > threshold):
            found.add(name)
    return found


@pytest.mark.parametrize("dim", [48, 384, 1536])
@pytest.mark.parametrize("images", [16, 64, 256])
@pytest.mark.parametrize("spread", [0.001, 0.01])
def test_sinkhorn_hides_collapsed_features_but_not_from_rank_and_distance(dim, images, spread):
    """Sinkhorn stretches the last differences over all prototypes: its targets are sharp and balanced, and the features are dead."""
    cls = torch.randn(dim) + spread * torch.randn(images, dim)
    logits = (cls - cls.mean(0)) / spread @ torch.randn(dim, 32) / dim**0.5  # a head that has scaled the remainders up
    values, limits = collapse_statistics(sinkhorn_knopp(logits, 0.5), cls)
    assert values["prototype_entropy"] > 0.95 * math.log(min(32, images))
    assert dead(values, limits) == {"effective_rank", "nearest_distance"}


@pytest.mark.parametrize("dim", [48, 384, 1536])
@pytest.mark.parametrize("images", [8, 64, 256])
def test_features_that_differ_are_not_dead_even_beside_a_large_common_part(dim, images):
    """A tenth of the norm is image, the rest is the same in all: a narrow set of images, or a network at its start."""
    cls = torch.randn(dim) + 0.1 * torch.randn(images, dim)
    assert dead(*collapse_statistics(torch.softmax(torch.randn(images, 32) * 2, -1), cls)) == set()
    clusters = torch.randn(8, dim)[torch.randint(8, (images,))] + 0.2 * torch.randn(images, dim)
    assert dead(*collapse_statistics(None, clusters)) == set()


def test_one_prototype_for_all_and_uniform_targets_are_dead():
    cls = torch.randn(64, 48)
    same = torch.softmax(torch.randn(1, 64) * 8 + torch.randn(64, 64), -1)
    assert dead(*collapse_statistics(same, cls)) == {"prototype_entropy"}
    uniform = torch.softmax(torch.randn(64, 64) * 0.1, -1)
    assert dead(*collapse_statistics(uniform, cls)) == {"teacher_entropy"}


def self_distil(temperature: float, centred: bool, koleo: float, lr: float = 3e-3) -> tuple[dict[str, float], Limits]:
    """Self-distillation of a small ViT on blotches: student, moving average as teacher, two views; the last step's statistics."""
    torch.manual_seed(1)
    shape = BackboneConfig(dim=32, depth=2, heads=2, patch=8, image_size=32, layer_scale=1.0, init="fan_in")
    head = HeadConfig(prototypes=32, hidden=64, bottleneck=16, init="fan_in")
    student = nn.ModuleList([Backbone(shape), DINOHead(32, head)])
    teacher = deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr)
    pictures = F.interpolate(torch.randn(128, 3, 4, 4), size=32, mode="bilinear")
    for _ in range(60):
        some = pictures[torch.randperm(128)[:16]]
        views = torch.cat([some + 0.3 * torch.randn_like(some) for _ in range(2)])
        logits = teacher[1](teacher[0](views).cls)
        targets = sinkhorn_knopp(logits, temperature) if centred else torch.softmax(logits / temperature, -1)
        cls = student[0](views).cls
        loss = -(targets.roll(16, 0) * F.log_softmax(student[1](cls) / 0.1, -1)).sum(-1).mean()
        optimizer.zero_grad()
        (loss + koleo * sum(koleo_loss(c) for c in cls.chunk(2))).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        optimizer.step()
        for mean, p in zip(teacher.parameters(), student.parameters(), strict=True):
            mean.lerp_(p, 0.1)
    return collapse_statistics(targets, cls[:16])


def test_a_training_that_works_is_left_alone_and_collapsed_ones_are_seen():
    assert dead(*self_distil(0.04, True, 0.1)) == set()
    fast = self_distil(0.04, True, 0.0, lr=0.3)  # a hundred times too fast
    assert fast[0]["prototype_entropy"] > 0.99 * math.log(32)  # Sinkhorn: full, though all images are the same to this network
    assert dead(*fast) == {"effective_rank", "nearest_distance", "teacher_entropy"}
    assert "prototype_entropy" in dead(*self_distil(0.02, False, 0.0))  # sharpening without centring


# When it stops


def test_it_stops_after_so_many_logged_steps_in_a_row_with_one_sentence():
    monitor = Monitor(EVERY_STEP, 1000, "students/small")
    bad = HEALTHY | {"effective_rank": 1.2}
    monitor.observe(10, bad, LIMITS)
    monitor.observe(20, bad, LIMITS)
    with pytest.raises(DecantError) as caught:
        monitor.observe(30, bad, LIMITS)
    sentence = str(caught.value)
    for part in ("students/small", "step 30", "effective_rank is 1.2", "below 1.94", "possible: 48", "3 logged steps", "koleo"):
        assert part in sentence
    assert sentence.endswith(".")
    assert ". " not in sentence.replace(". T", "")
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("name", "value"),
    [("effective_rank", 1.5), ("nearest_distance", 0.01), ("prototype_entropy", 0.6), ("teacher_entropy", 4.15)],
)
def test_each_monitor_fires_by_itself_and_can_be_turned_off(name, value):
    bad = HEALTHY | {name: value}
    monitor = Monitor(EVERY_STEP, 10)
    monitor.observe(0, bad, LIMITS)
    monitor.observe(1, bad, LIMITS)
    with pytest.raises(DecantError, match=name):
        monitor.observe(2, bad, LIMITS)
    off = Monitor(EVERY_STEP.model_copy(update={name: 1.0 if name == "teacher_entropy" else 0.0}), 10)
    for step in range(20):
        off.observe(step, bad, LIMITS)


def test_a_healthy_step_between_starts_the_count_anew():
    monitor = Monitor(EVERY_STEP, 10)
    for step in range(30):
        monitor.observe(step, HEALTHY if step % 3 == 2 else HEALTHY | {"effective_rank": 1.0}, LIMITS)


def test_nothing_counts_before_its_share_of_the_run():
    monitor = Monitor(MonitorConfig(after=0.5, patience=3), 100)
    bad = HEALTHY | {"nearest_distance": 0.0}
    for step in range(52):
        monitor.observe(step, bad, LIMITS)
    with pytest.raises(DecantError, match="step 52"):
        monitor.observe(52, bad, LIMITS)


def test_values_that_are_missing_or_not_finite_say_nothing():
    monitor = Monitor(EVERY_STEP, 10)
    bad = {"effective_rank": 1.0}
    monitor.observe(0, bad, LIMITS)
    monitor.observe(1, bad, LIMITS)
    monitor.observe(2, {"effective_rank": math.nan}, LIMITS)
    monitor.observe(3, {}, LIMITS)
    with pytest.raises(DecantError):
        monitor.observe(4, bad, LIMITS)


def test_without_stop_it_says_so_and_goes_on():
    monitor = Monitor(EVERY_STEP.model_copy(update={"stop": False}), 10)
    bad = HEALTHY | {"effective_rank": 1.0}
    for step in range(9):
        monitor.observe(step, bad, LIMITS)
    assert "effective_rank" in (monitor.judge(9, bad, LIMITS) or "")
    assert monitor.judge(10, HEALTHY, LIMITS) is None


def test_a_resumed_run_stops_at_the_same_step():
    bad = HEALTHY | {"teacher_entropy": 4.158}
    first = Monitor(EVERY_STEP, 10)
    first.observe(0, bad, LIMITS)
    first.observe(1, bad, LIMITS)
    second = Monitor(EVERY_STEP, 10)
    second.restore(first.state())
    with pytest.raises(DecantError, match="teacher_entropy"):
        second.observe(2, bad, LIMITS)


def test_what_is_possible_sets_the_thresholds():
    config = MonitorConfig()
    few = config.thresholds(Limits(prototypes=65536, samples=16, images=8, dim=384))
    assert few["prototype_entropy"][1] == pytest.approx(0.18 * math.log(16))
    assert few["teacher_entropy"][1] == pytest.approx(0.995 * math.log(65536))
    assert few["effective_rank"][1] == pytest.approx(1 + 0.02 * 7)
    # Feature matching has no prototypes, and a single image no neighbour.
    assert set(config.thresholds(Limits(0, 0, 8, 384))) == {"effective_rank", "nearest_distance"}
    assert config.thresholds(Limits(0, 0, 1, 384)) == {}


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"after": 1.5}, "after"), ({"patience": 0}, "patience"), ({"effective_rank": -0.1}, "effective_rank"),
     ({"nearest_distance": 3.0}, "nearest_distance"), ({"teacher_entropy": 1.1}, "teacher_entropy")],
)  # fmt: skip
def test_problems_are_named(changes, word):
    assert any(word in p for p in MonitorConfig(**changes).problems())
    assert MonitorConfig().problems() == []


# Rows and ranks


def test_rows_carry_values_with_what_was_possible():
    values, limits = collapse_statistics(torch.eye(8), torch.randn(64, 6))
    rows = {r.metric: r for r in monitor_rows(values, limits, "students/small", step=99, images_seen=6400)}
    assert set(rows) == set(values)
    assert rows["effective_rank"].value == values["effective_rank"]
    assert rows["effective_rank"].n == 64
    assert rows["effective_rank"].conditions["dim"] == 6
    assert rows["prototype_entropy"].n == 8
    assert rows["prototype_entropy"].conditions | {"step": 99, "images_seen": 6400, "prototypes": 8} == (
        rows["prototype_entropy"].conditions
    )
    broken = monitor_rows(values | {"effective_rank": math.nan}, limits, "teacher")
    assert [r.metric for r in broken if r.status == "not measured"] == ["effective_rank"]


RANKS = """
import sys, torch, torch.distributed as dist
from distill.monitors import collapse_statistics
torch.set_num_threads(1)
torch.manual_seed(0)
cls, p = torch.randn(12, 5), torch.softmax(torch.randn(24, 6), -1)
alone = collapse_statistics(p, cls)
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
shared = collapse_statistics(p[rank * 12 : rank * 12 + 12], cls[rank * 6 : rank * 6 + 6])
dist.barrier(); dist.destroy_process_group()
assert shared[1] == alone[1], (shared, alone)
for name, value in alone[0].items():
    assert abs(shared[0][name] - value) < 1e-5, (name, shared, alone)
"""


def test_two_ranks_see_what_one_sees(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [subprocess.Popen([sys.executable, "-c", RANKS, str(tmp_path / "meet"), str(i)], env=environment) for i in range(2)]
    assert [r.wait(timeout=60) for r in ranks] == [0, 0]
