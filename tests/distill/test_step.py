"""The step: micro-batches, cached targets, students that do not disturb each other, frozen backbones."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.data.crops import CropsConfig
from distill.data.loader import Batch, MasksConfig
from distill.errors import DecantError, UserError
from distill.losses.gram import GramConfig
from distill.losses.matching import MatchConfig
from distill.losses.targets import Dense
from distill.micro_batches import InOrder, in_order, joined, rows_of_crops, rows_of_patches
from distill.models.backbone import Backbone, BackboneConfig
from distill.models.headed import HeadedBackbone
from distill.models.heads import DINOHead, HeadConfig
from distill.models.match_head import MatchHead
from distill.models.timm_backbone import TimmBackbone, TimmConfig
from distill.objectives import ObjectivesConfig
from distill.optim import OptimConfig
from distill.runtime import RuntimeConfig
from distill.step import MAX_BAD_STEPS, Stepper
from distill.targets_cache import CacheConfig, TargetsCache
from distill.train import TrainConfig, micro_batches
from distill.training_state import Student, prepare_student

B, STEPS = 8, 3
HEAD = HeadConfig(prototypes=12, hidden=16, bottleneck=8, init="fan_in")


class OneProcess:
    num_processes = 1
    device = torch.device("cpu")

    def prepare_model(self, module: nn.Module) -> nn.Module:
        return module

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def model(dim: int = 32, patch: int = 8, seed: int = 0, match: int | None = None, shared: bool = False) -> Any:
    torch.manual_seed(seed)
    config = BackboneConfig(dim=dim, depth=2, heads=2, patch=patch, image_size=32, layer_scale=1.0, init="fan_in")
    heads = DINOHead(dim, HEAD), None if shared else DINOHead(dim, HEAD)
    return HeadedBackbone(Backbone(config), *heads, None if match is None else MatchHead(dim, match, 16))


def batch(step: int, images: int = B, local: int = 2) -> Batch:
    g = torch.Generator().manual_seed(100 + step)
    masks = torch.rand(2 * images, 16, generator=g) < 0.4
    masks[::3] = False
    masks[1] = True  # a batch's parts differ in how many patches are chosen
    crops = torch.randn(2 * images, 3, 32, 32, generator=g), torch.randn(local * images, 3, 16, 16, generator=g)
    return Batch(*crops, masks)


def settings(pretrain: bool = True, **changes: Any) -> TrainConfig:
    objectives = {"teacher_temperature": (0.07, 0.07)} | changes.pop("objectives", {})
    base: dict[str, Any] = {
        "images": B * 10,
        "batch": B,
        "crops": CropsConfig(global_size=32, local_size=16, local_count=2),
        "masks": MasksConfig() if pretrain else None,
        "mask_input": pretrain,
        "objectives": ObjectivesConfig(**objectives),
        "optim": OptimConfig(lr=0.01, warmup=0.0, freeze_last_layer=0.0, ema=(0.9, 1.0)),
        "precision": "fp32",
    }
    return TrainConfig(**(base | changes))


class Training:
    """Some steps on fixed crops, by hand."""

    def __init__(self, config: TrainConfig, students: dict[str, Any], teacher: Any = None, micro: int = 1, **more: Any):
        self.one, self.config = OneProcess(), config
        self.group: dict[str, Student] = {
            n: prepare_student(m, config.optim, config.objectives, config.mask_input, self.one) for n, m in students.items()
        }
        self.loop = Stepper(config, self.group, teacher, 10, self.one, RuntimeConfig(), micro, **more)
        self.terms: list[dict[str, dict[str, float]]] = []

    def go(self, steps: int = STEPS, first: int = 0) -> "Training":
        for step in range(first, first + steps):
            self.terms.append({n: t.terms for n, t in self.loop.step(step, batch(step)).items()})
        return self

    def weights(self, name: str = "one") -> dict[str, Tensor]:
        student = self.group[name]
        return {f"{part}.{k}": v for part in ("module", "average") for k, v in getattr(student, part).state_dict().items()}


def assert_same_training(a: Training, b: Training, name: str = "one", rel: float = 0.0) -> None:
    """The same losses and weights, bit for bit or relative to each tensor's norm (Adam makes steps of full size from gradients that are
    rounding, so single weights may differ more).
    """
    for x, y in zip(a.terms, b.terms, strict=True):
        assert x[name] == (pytest.approx(y[name], rel=rel, abs=1e-6) if rel else y[name])
    mine, theirs = a.weights(name), b.weights(name)
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        pair = [value, theirs[key]]
        if key.endswith("attn.qkv.bias"):  # a key's bias has no gradient but rounding
            pair = [torch.cat([v.chunk(3)[0], v.chunk(3)[2]]) for v in pair]
        assert (pair[0] - pair[1]).norm() <= 10 * rel * pair[1].norm(), key


OBJECTIVES: dict[str, dict[str, Any]] = {
    "sinkhorn": {"koleo_group": 2},
    "centre": {"koleo_group": 2, "centring": "centre"},
    "matching": {"koleo_group": 2, "dino": 0.0, "ibot": 0.0, "match": MatchConfig(standardize_steps=2)},
    "anchoring": {"koleo_group": 2, "gram": GramConfig(start=0.0, snapshot=0.0)},
}


@pytest.mark.parametrize("micro", [2, 4])
@pytest.mark.parametrize("pretrain", [True, False], ids=["pretrain", "distill"])
@pytest.mark.parametrize("asked", OBJECTIVES)
def test_micro_batches_change_nothing(asked, pretrain, micro):
    config = settings(pretrain, objectives=OBJECTIVES[asked])
    match = (32 if pretrain else 48) if asked == "matching" else None

    def training(micro: int) -> Training:
        return Training(config, {"one": model(match=match)}, None if pretrain else model(48, seed=7), micro)

    one, many = training(1).go(), training(micro).go()
    assert_same_training(one, many, rel=1e-5)
    assert many.terms[0]["one"] == pytest.approx(one.terms[0]["one"], rel=1e-6, abs=1e-7)  # no step taken yet
    for key, value in one.loop.extras.state_dict().items():
        torch.testing.assert_close(many.loop.extras.state_dict()[key], value, rtol=1e-5, atol=1e-5)


def test_koleo_without_groups_would_depend_on_micro_batches():
    """Which is why it is refused there."""
    terms = [Training(settings(), {"one": model()}, micro=m).go(1).terms[0]["one"]["koleo"] for m in (1, 2)]
    assert abs(terms[0] - terms[1]) > 1e-3


@pytest.mark.parametrize(
    ("objectives", "micro", "world", "parts"),
    [
        ({}, None, 1, 1),
        ({}, 8, 1, 1),
        ({}, 100, 1, 1),
        ({}, 4, 2, 1),
        ({"koleo": 0.0}, 2, 1, 4),
        ({"koleo": 0.0}, 1, 1, 8),
        ({"koleo_group": 2}, 2, 2, 2),
        ({"koleo_group": 4}, 4, 1, 2),
    ],
)
def test_number_of_micro_batches(objectives, micro, world, parts):
    config = settings(objectives=objectives)
    assert micro_batches(config, RuntimeConfig(micro_batch=micro), world) == parts


@pytest.mark.parametrize(
    ("objectives", "micro", "world", "said"),
    [
        ({}, None, 3, "multiple of the 3 processes"),
        ({}, None, 8, "at least 2 images"),
        ({"koleo": 0.0}, 3, 1, "micro_batch 3 must divide"),
        ({"koleo": 0.0}, 3, 2, "share of the batch, 4 images"),
        ({}, 4, 1, "set objectives.koleo_group"),
        ({"koleo_group": 4}, 2, 1, "koleo_group 4 must divide the 2 images"),
        ({"koleo_group": 3}, None, 1, "koleo_group 3 must divide the 8 images"),
    ],
)
def test_micro_batches_that_would_change_the_losses_are_refused(objectives, micro, world, said):
    with pytest.raises(UserError, match=said):
        micro_batches(settings(objectives=objectives), RuntimeConfig(micro_batch=micro), world)


def test_rows_of_parts_find_their_way_back():
    chosen = torch.rand(12, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    for n in (1, 2, 3):
        parts = Batch(torch.zeros(12, 3, 1, 1), torch.zeros(0, 3, 1, 1), chosen).parts(n)
        values = torch.arange(int(chosen.sum())).float()[:, None]
        spread = torch.zeros(12, 9)
        spread[chosen] = values[:, 0]
        whole = Batch(spread[:, :, None, None], torch.zeros(0, 3, 1, 1), chosen).parts(n)
        cut = [w.global_crops[..., 0, 0][p.masks][:, None] for w, p in zip(whole, parts, strict=True)]
        assert torch.equal(in_order(cut, chosen), values)
        for rows, c in zip(rows_of_patches(chosen, n), cut, strict=True):
            assert torch.equal(values[rows], c)
        crops = torch.arange(12)[:, None]
        assert torch.equal(joined([crops[r] for r in rows_of_crops(12, n, torch.device("cpu"))]), crops)


def cached(folder: Path, config: TrainConfig, micro: int = 1, seed: int = 0, steps: int = 6, broken: bool = False) -> Training:
    """A distillation with kept targets; a `broken` teacher shows whether it is asked for features."""
    assert config.cache is not None
    teacher = model(48, seed=7)
    if broken:
        for p in teacher.backbone.parameters():
            p.data.fill_(float("nan"))
    cache = TargetsCache(folder, {"teacher": 7}, config.cache, B)
    made = Training(config, {"one": model(seed=seed)}, teacher, micro, cache=cache)
    period = config.steps() if config.cache.replay is None else -(-config.cache.replay // B)
    for step in range(steps):
        made.terms.append({n: t.terms for n, t in made.loop.step(step, batch(step % period)).items()})
    cache.flush()
    return made


KEPT = [CacheConfig(replay=3 * B), CacheConfig(dino_k=5, replay=3 * B), CacheConfig(dino_k=5, ibot_k=4), CacheConfig(ibot_k=12)]


@pytest.mark.parametrize("kept", KEPT, ids=lambda c: str(c.model_dump(exclude_none=True)))
@pytest.mark.parametrize("micro", [1, 2])
def test_kept_targets_are_used_as_kept(tmp_path, kept, micro):
    config = settings(False, cache=kept, objectives={"koleo_group": 2})
    first = cached(tmp_path / "cache", config, micro)
    again = cached(tmp_path / "cache", config, micro, broken=True)
    assert_same_training(first, again)
    assert first.loop.cache is not None
    assert again.loop.cache is not None
    assert first.loop.cache.misses == (3 if kept.replay else 6)
    assert again.loop.cache.misses == 0
    if micro == 2:
        assert_same_training(first, cached(tmp_path / "other", config), rel=1e-5)
        assert_same_training(first, cached(tmp_path / "cache", config), rel=1e-5)


def test_kept_vectors_are_the_live_targets_up_to_float16(tmp_path):
    config = settings(False, cache=CacheConfig())
    live = Training(config, {"one": model()}, model(48, seed=7)).go(6)
    kept = cached(tmp_path, config)
    for a, b in zip(live.terms, kept.terms, strict=True):
        assert a["one"] == pytest.approx(b["one"], rel=2e-3)
    assert live.terms != kept.terms


@pytest.mark.parametrize("kept", [CacheConfig(), CacheConfig(dino_k=5, ibot_k=5)], ids=["vectors", "largest"])
@pytest.mark.parametrize("off", ["dino", "ibot"])
def test_kept_targets_of_one_objective_alone(tmp_path, kept, off):
    config = settings(False, cache=kept, objectives={off: 0.0})
    assert_same_training(cached(tmp_path, config), cached(tmp_path, config, broken=True))


def spoil(made: Any) -> Any:
    made.dino.last_layer.weight_g.data.fill_(float("nan"))
    return made


@pytest.mark.parametrize("order", [("bad", "good"), ("good", "bad")], ids="-".join)
def test_a_ruined_student_leaves_the_others_alone(order):
    config, made = settings(False), {"good": lambda: model(seed=1), "bad": lambda: spoil(model(seed=2))}
    alone = Training(config, {"good": model(seed=1)}, model(48, seed=7)).go()
    both = Training(config, {n: made[n]() for n in order}, model(48, seed=7))
    before = copy.deepcopy(both.weights("bad"))
    both.go()
    assert_same_training(alone, both, "good")
    assert all(torch.equal(v, before[k]) or not v.isfinite().all() for k, v in both.weights("bad").items())
    assert not both.group["bad"].optimizer.state
    assert (both.group["bad"].bad_steps, both.group["good"].bad_steps) == (STEPS, 0)
    both.go(MAX_BAD_STEPS - 1 - STEPS, STEPS)
    with pytest.raises(DecantError, match=f"not finite in {MAX_BAD_STEPS} steps in a row"):
        both.go(1, MAX_BAD_STEPS - 1)


def test_one_bad_batch_is_skipped_and_forgotten():
    training = Training(settings(), {"one": model()}).go(1)
    before, student = copy.deepcopy(training.weights()), training.group["one"]
    ruined = batch(1)
    ruined.local_crops[3, 0, 2, 2] = float("inf")
    told = training.loop.step(1, ruined)["one"]
    assert told.more["bad_steps"] == 1
    assert all(torch.equal(v, before[k]) for k, v in training.weights().items())
    training.go(1, 2)
    assert (student.bad_steps, student.bad_in_a_row) == (1, 0)
    assert not all(torch.equal(v, before[k]) for k, v in training.weights().items())
    assert all(v.isfinite().all() for v in training.weights().values())


def test_one_bad_batch_leaves_no_trace_in_batch_norms():
    backbone = TimmBackbone(TimmConfig(name="test_resnet"))
    made = HeadedBackbone(backbone, DINOHead(backbone.dim, HEAD), DINOHead(backbone.dim, HEAD))
    training = Training(settings(False), {"one": made}, model(48, seed=7)).go(1)
    before = copy.deepcopy(training.weights())
    ruined = batch(1)
    ruined.local_crops[3, 0, 2, 2] = float("inf")
    assert training.loop.step(1, ruined)["one"].more["bad_steps"] == 1
    training.go(1, 2)
    assert all(v.isfinite().all() for v in training.weights().values())
    assert not torch.equal(before["average.backbone.net.conv1.1.running_mean"], backbone.net.conv1[1].running_mean)


def test_anchoring_alone_waits_for_its_start():
    config = settings(False, objectives={"dino": 0.0, "ibot": 0.0, "koleo": 0.0, "gram": GramConfig(start=0.2)})
    training = Training(config, {"one": model()}, model(48, seed=7)).go(3)
    assert "gram" in training.terms[2]["one"]


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher_size": 64},
        {"masks": MasksConfig(), "mask_input": True},
    ],
    ids=str,
)
def test_a_frozen_backbones_features_are_handed_on_only_where_the_student_would_see_the_same(changes):
    config, found = settings(False, objectives={"koleo": 0.0}, **changes), []
    for share in (None, False):
        made = model()
        made.backbone.requires_grad_(False)
        training = Training(config, {"one": made})
        training.loop.shares_backbone &= share is None
        found.append(training.go(2))
    assert_same_training(found[0], found[1])


def counted(made: Any) -> list[int]:
    """How many images each pass of its backbone takes, from now on."""
    seen: list[int] = []
    made.backbone.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize("micro", [1, 2])
def test_heads_on_a_frozen_backbone(micro):
    made = model()
    made.backbone.requires_grad_(False)
    before = copy.deepcopy(made.backbone.state_dict())
    heads = copy.deepcopy(made.dino.state_dict())
    config = settings(False, objectives={"koleo": 0.0})
    training = Training(config, {"one": made}, None, micro)
    student: Any = training.group["one"]
    assert student.average.backbone is student.module.backbone
    passes = counted(made)
    training.go()
    # Local crops, and the global ones once for teacher and student.
    assert passes == ([2 * B // micro] * micro + [2 * B // micro] * micro) * STEPS
    assert all(torch.equal(v, before[k]) for k, v in made.backbone.state_dict().items())
    assert not any(torch.equal(v, heads[k]) for k, v in made.dino.state_dict().items() if "last_layer" in k)
    assert not torch.equal(student.average.dino.mlp[0].weight, made.dino.mlp[0].weight)
    assert all(p.grad is None for p in made.backbone.parameters())


def test_heads_on_a_frozen_backbone_lose_what_they_would_on_a_copy():
    """Handing features on saves a pass and changes no number."""
    config = settings(False, objectives={"koleo": 0.0})
    shared, own = model(), model()
    shared.backbone.requires_grad_(False)
    a = Training(config, {"one": shared}).go()
    own.backbone.requires_grad_(False)
    b = Training(config, {"one": own})
    b.loop.shares_backbone = False
    passes = counted(own)
    b.go()
    assert len(passes) == 3 * STEPS
    assert_same_training(a, b)


def test_one_teacher_pass_serves_all_students():
    teacher = model(48, seed=7)
    students = {"a": model(seed=1), "b": model(16, seed=2)}
    seen = [counted(m) for m in (teacher, *students.values())]
    Training(settings(False), students, teacher).go()
    assert seen[0] == [2 * B] * STEPS
    assert seen[1] == seen[2] == [2 * B, 2 * B] * STEPS  # two local crops an image, then two global ones


@pytest.mark.parametrize(
    "match",
    [
        None,
        MatchConfig(standardize=False),
        MatchConfig(),
    ],
    ids=["prototypes", "matching", "standardised matching"],
)
def test_students_of_other_patches_are_each_as_if_alone(match):
    """Patches of 8 px as the teacher's, and of 4 and 16 px, whose targets are resampled."""
    config, patches = settings(False, objectives={"match": match}), {"same": 8, "fine": 4, "coarse": 16}

    def student(name: str) -> Any:
        return model(patch=patches[name], seed=patches[name], match=48)

    together = Training(config, {n: student(n) for n in patches}, model(48, seed=7)).go()
    assert together.loop.grids == {"same": 0, "fine": 8, "coarse": 2}
    for name in patches:
        alone = Training(config, {name: student(name)}, model(48, seed=7))
        assert not alone.loop.chosen(batch(0), alone.loop.grids[name]).logical_not().any()
        alone.go()
        assert_same_training(alone, together, name)
        assert all(v > 0 for v in together.terms[-1][name].values())


def test_a_teacher_at_another_size_has_another_grid():
    config = settings(False, teacher_size=64)
    training = Training(config, {"one": model()}, model(48, seed=7)).go(1)
    assert training.loop.grids == {"one": 4}
    assert all(v > 0 for v in training.terms[0]["one"].values())


def test_the_gram_anchor_is_the_average_of_its_snapshot():
    """Of ten steps: taken at step 2, applied from step 4 on."""
    config = settings(objectives={"gram": GramConfig(snapshot=0.2, start=0.4, refresh=0.0)})
    training = Training(config, {"one": model()}).go(2)
    then = copy.deepcopy(training.group["one"].average.backbone.state_dict())
    training.go(4, 2)
    assert all(torch.equal(v, then[k]) for k, v in training.loop.extras["anchor"].state_dict().items())
    assert not torch.equal(then["cls_token"], training.group["one"].average.backbone.state_dict()["cls_token"])
    assert ["gram" in t["one"] for t in training.terms] == [False] * 4 + [True] * 2


def test_monitors_only_where_watched():
    training = Training(settings(), {"one": model()})
    bare, watched = (training.loop.step(i, batch(i), watch)["one"] for i, watch in enumerate((False, True)))
    assert bare.limits is None
    assert watched.limits is not None
    assert {
        "teacher_entropy",
        "prototype_entropy",
        "effective_rank",
        "nearest_distance",
    } <= watched.more.keys() - bare.more.keys()
    assert {"grad_norm_backbone", "grad_norm_dino", "grad_norm_ibot"} <= bare.more.keys()


def test_a_shared_head_serves_both_objectives():
    training = Training(settings(), {"one": model(shared=True)}).go()
    assert set(training.terms[0]["one"]) == {"dino_local", "dino_global", "ibot", "koleo"}
    assert training.group["one"].average.ibot is None


def test_no_local_crops():
    config = settings(crops=CropsConfig(global_size=32, local_size=16, local_count=0))
    training = Training(config, {"one": model()})
    told = training.loop.step(0, batch(0, local=0))["one"]
    assert set(told.terms) == {"dino_global", "ibot", "koleo"}


def test_a_moving_centre_moves_once_a_step_whether_vectors_are_kept_or_read(tmp_path):
    config = settings(False, objectives={"centring": "centre"}, cache=CacheConfig())

    def trained() -> Training:
        kept = TargetsCache(tmp_path / "targets", {}, CacheConfig(), B)
        done = Training(config, {"one": model(seed=1)}, model(seed=2), cache=kept).go()
        kept.flush()
        return done

    assert_same_training(trained(), trained())


def test_a_teacher_of_timm_in_bf16():
    torch.manual_seed(2)
    backbone = TimmBackbone(TimmConfig(name="vit_tiny_patch16_224", image_size=32, patch=8, options={"depth": 2}))
    teacher = HeadedBackbone(backbone, DINOHead(backbone.dim, HEAD), DINOHead(backbone.dim, HEAD))
    done = Training(settings(False, precision="bf16"), {"one": model(seed=1)}, teacher).go(1)
    assert all(torch.isfinite(torch.tensor(list(done.terms[0]["one"].values()))))


def test_assignments_of_micro_batches_are_made_in_the_order_of_the_batch():
    chosen = torch.rand(12, 9, generator=torch.Generator().manual_seed(1)) < 0.4
    values = torch.rand(int(chosen.sum()), 5, generator=torch.Generator().manual_seed(2))
    for n in (1, 2, 3):
        parts = InOrder([Dense(values[rows]) for rows in rows_of_patches(chosen, n)], chosen)
        assert len(parts) == len(values)
        for start, stop in ((0, len(values)), (3, 11), (7, 8), (4, 4)):
            assert torch.equal(parts.rows(start, stop), values[start:stop]), (n, start, stop)
