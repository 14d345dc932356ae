"""What students are asked: terms and their weights, two grids, resampling, and the teacher's one pass."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.data.loader import Batch
from distill.encoder import Features
from distill.losses.gram import GramConfig, gram_loss
from distill.losses.ibot import patch_weights
from distill.losses.koleo import koleo_loss
from distill.losses.matching import MatchConfig, match_losses
from distill.losses.targets import sinkhorn_knopp
from distill.models.backbone import Backbone, BackboneConfig
from distill.models.headed import HeadedBackbone, frozen
from distill.models.heads import DINOHead, HeadConfig
from distill.models.match_head import MatchHead
from distill.objectives import Guide, ObjectivesConfig, Targets, global_terms, local_terms, make_centrings, resampled

B, L, K = 4, 3, 12
HEAD = HeadConfig(prototypes=K, hidden=16, bottleneck=8, init="fan_in")


def model(dim: int = 32, patch: int = 8, seed: int = 0, shared: bool = False, match: int | None = None) -> Any:
    torch.manual_seed(seed)
    config = BackboneConfig(dim=dim, depth=1, heads=2, patch=patch, image_size=32, layer_scale=1.0, init="fan_in")
    ibot = None if shared else DINOHead(dim, HEAD.model_copy(update={"prototypes": 10}))
    return HeadedBackbone(Backbone(config), DINOHead(dim, HEAD), ibot, None if match is None else MatchHead(dim, match, 0))


def batch(seed: int = 0, images: int = B) -> Batch:
    g = torch.Generator().manual_seed(seed)
    masks = torch.rand(2 * images, 16, generator=g) < 0.4
    masks[1] = False
    return Batch(
        torch.randn(2 * images, 3, 32, 32, generator=g), torch.randn(L * images, 3, 16, 16, generator=g), masks
    )  # fmt: skip


def guide(teacher: Any, config: ObjectivesConfig, grids: tuple[int, ...] = (0,), size: int | None = None) -> Guide:
    return Guide(frozen(teacher), config, make_centrings(config, teacher, grids), size)


def log_probabilities(logits: Tensor) -> Tensor:
    return F.log_softmax(logits.double() / 0.1, -1)


@pytest.mark.parametrize("shared", [False, True])
def test_local_and_global_parts_add_up_to_the_whole_loss(shared):
    """As written in the papers, from matrices of logits, and so do the gradients."""
    student, teacher, part = model(shared=shared).train(), model(48, seed=1, shared=shared), batch()
    config = ObjectivesConfig(dino=2.0, ibot=0.5, koleo=0.3)
    targets = guide(teacher, config)
    (t,) = targets.targets(targets.look([part]), [part.masks], 0.07)
    local = student(part.local_crops, None, partial(local_terms, targets=t, config=config, local_crops=L))
    whole = partial(global_terms, targets=t, config=config, local_crops=L, chosen=part.masks)
    terms = local | student(part.global_crops, part.masks, whole)
    assert set(terms) == {"dino_local", "dino_global", "ibot", "koleo"}
    torch.stack(list(terms.values())).sum().backward()
    got = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()

    with torch.no_grad():
        seen = teacher.backbone(part.global_crops)
        q = sinkhorn_knopp(teacher.dino(seen.cls), 0.07).view(2, B, K)
        r = sinkhorn_knopp(teacher.patch_head(seen.patches[part.masks]), 0.07)
    features = student.backbone(part.global_crops, part.masks)
    globals_ = log_probabilities(student.dino(features.cls)).view(2, B, K)
    locals_ = log_probabilities(student.dino(student.backbone(part.local_crops).cls)).view(L, B, K)
    pairs = 2 + 2 * L
    want = {
        "dino_global": -2.0 * sum((q[1 - i] * globals_[i]).sum(-1).mean() for i in range(2)) / pairs,
        "dino_local": -2.0 * sum((q[i] * locals_[j]).sum(-1).mean() for i in range(2) for j in range(L)) / pairs,
        "ibot": -0.5
        * ((r * log_probabilities(student.patch_head(features.patches[part.masks]))).sum(-1) @ weights(part.masks)),
        "koleo": 0.3 * (koleo_loss(features.cls[:B]) + koleo_loss(features.cls[B:])),
    }
    for name, value in want.items():
        assert terms[name].item() == pytest.approx(torch.as_tensor(value).item(), rel=1e-5), name
    torch.stack([torch.as_tensor(v).double() for v in want.values()]).sum().backward()
    wanted = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def weights(masks: Tensor) -> Tensor:
    """1 / (crops x chosen patches of the crop), for every chosen patch."""
    return torch.cat([torch.full((int(m.sum()),), 1 / int(m.sum()) / len(masks)) for m in masks if m.any()]).double()


def asked(student: Any, teacher: Any, config: ObjectivesConfig, anchored: bool = True) -> dict[str, Tensor]:
    part, targets = batch(), guide(teacher, config)
    (t,) = targets.targets(targets.look([part]), [part.masks], 0.07)
    use = partial(global_terms, targets=t, config=config, local_crops=L, chosen=part.masks, anchored=anchored)
    return student(part.global_crops, part.masks, use)


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({}, {"dino_global", "ibot", "koleo"}),
        ({"koleo": 0.0}, {"dino_global", "ibot"}),
        ({"ibot": 0.0}, {"dino_global", "koleo"}),
        ({"dino": 0.0}, {"ibot", "koleo"}),
        ({"dino": 0.0, "ibot": 0.0, "match": MatchConfig()}, {"koleo", "match_cls", "match_patches"}),
        ({"gram": GramConfig()}, {"dino_global", "ibot", "koleo", "gram"}),
    ],
    ids=str,
)
def test_a_weight_of_zero_leaves_its_term_out(changes, left):
    terms = asked(model(match=48), model(48, seed=1), ObjectivesConfig(**changes))
    assert terms.keys() == left
    assert all(v.isfinite() for v in terms.values())


def test_anchoring_begins_when_told():
    config = ObjectivesConfig(gram=GramConfig())
    assert "gram" not in asked(model(), model(48, seed=1), config, anchored=False)


def test_nothing_chosen_is_a_zero_with_a_gradient():
    """Else a process whose crops have no mask would leave its head out of the exchange."""
    student, part = model(), batch()
    none, config = torch.zeros_like(part.masks), ObjectivesConfig(dino=0.0, koleo=0.0)
    targets = guide(model(48, seed=1), config)
    (t,) = targets.targets(targets.look([part]), [none], 0.07)
    terms = student(part.global_crops, None, partial(global_terms, targets=t, config=config, local_crops=L, chosen=none))
    assert terms["ibot"].item() == 0
    terms["ibot"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in student.ibot.parameters())


@pytest.mark.parametrize("grid", [2, 4, 7, 8, 11])
def test_patches_on_another_grid(grid):
    features = Features(torch.randn(3, 5), torch.randn(3, 64, 5))
    found = resampled(features, grid)
    assert found.cls is features.cls
    maps = features.patches.transpose(1, 2).reshape(3, 5, 8, 8)
    want = F.interpolate(maps, (grid, grid), mode="bilinear", antialias=grid < 8).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found.patches, want)
    flat = resampled(Features(features.cls, torch.ones(3, 64, 5)), grid)
    torch.testing.assert_close(flat.patches, torch.ones(3, grid * grid, 5))


def test_patches_keep_their_places():
    """Rows first: the patch of the upper right corner stays there."""
    patches = torch.zeros(1, 8, 8, 1)
    patches[0, :4, 4:] = 1
    small = resampled(Features(torch.zeros(1, 1), patches.flatten(1, 2)), 2).patches.view(2, 2)
    assert small[0, 1] > 0.7  # antialiasing mixes neighbours in
    assert small.flatten().sort().values[:3].max() < 0.15


@pytest.mark.parametrize("grid", [0, 8])
def test_the_own_grid_is_left_as_it_is(grid):
    features = Features(torch.randn(3, 5), torch.randn(3, 64, 5))
    assert resampled(features, grid) is features


def test_targets_for_two_grids_come_from_one_pass():
    """Students with patches of 8 and of 16 px, a teacher with patches of 4 px."""
    config = ObjectivesConfig(match=MatchConfig(standardize=False), centring="centre")
    teacher, part = model(48, patch=4, seed=1), batch()
    both = guide(teacher, config, (4, 2))
    assert set(both.centrings) == {"dino", "ibot4", "ibot2"}
    passes: list[Any] = []
    teacher.backbone.register_forward_hook(lambda *_: passes.append(1))
    features = both.look([part])
    assert features[0].patches.shape == (2 * B, 64, 48)
    for grid in (4, 2):
        chosen = torch.rand(2 * B, grid * grid) < 0.5
        (t,) = both.targets(features, [chosen], 0.07, grid)
        rows = resampled(features[0], grid).patches[chosen]
        assert t.ibot is not None
        torch.testing.assert_close(t.ibot.rows(0, len(t.ibot)), torch.softmax(teacher.ibot(rows) / 0.07, -1))
        assert both.centrings.state_dict()[f"ibot{grid}.centre"].any()
        assert t.features is not None
        assert t.features.patches.shape == (2 * B, grid * grid, 48)
        torch.testing.assert_close(t.weights, patch_weights(chosen))
    assert len(passes) == 1


def test_the_teacher_sees_its_own_crops_at_its_own_size():
    part = batch()
    teacher, config = model(48, seed=1), ObjectivesConfig()
    own = Batch(part.global_crops, part.local_crops, part.masks, teacher_crops=part.global_crops * 2 + 1)
    (seen,) = guide(teacher, config).look([own])
    torch.testing.assert_close(seen.cls, teacher.backbone(part.global_crops * 2 + 1).cls)
    for size in (16, 48):
        (seen,) = guide(teacher, config, size=size).look([part])
        crops = F.interpolate(part.global_crops, (size, size), mode="bicubic", antialias=size < 32)
        torch.testing.assert_close(seen.patches, teacher.backbone(crops).patches)
    (seen,) = guide(teacher, config, size=32).look([part])
    torch.testing.assert_close(seen.cls, teacher.backbone(part.global_crops).cls)


@pytest.mark.parametrize("centring", ["sinkhorn", "centre"])
def test_micro_batches_are_centred_together(centring):
    teacher, part = model(48, seed=1), batch()
    config = ObjectivesConfig(centring=centring, match=MatchConfig())
    one, many = guide(teacher, config), guide(teacher, config)
    for _ in range(2):
        (whole,) = one.targets(one.look([part]), [part.masks], 0.07)
        parts = part.parts(2)
        found = many.targets(many.look(parts), [p.masks for p in parts], 0.07)
        assert whole.dino is not None
        dino = torch.cat([t.dino for t in found if t.dino is not None], 1)
        torch.testing.assert_close(dino, whole.dino, rtol=1e-4, atol=1e-6)
        assert whole.features is not None
        cls = torch.cat([t.features.cls.view(2, -1, 48) for t in found if t.features is not None], 1)
        torch.testing.assert_close(cls.flatten(0, 1), whole.features.cls, rtol=1e-4, atol=1e-5)
        total = sum(len(t.ibot) for t in found if t.ibot is not None)
        assert whole.ibot is not None
        assert total == len(whole.ibot) == int(part.masks.sum())
    for key, value in one.centrings.state_dict().items():
        torch.testing.assert_close(many.centrings.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_matching_and_anchoring_are_their_losses_on_the_teachers_features():
    config = ObjectivesConfig(dino=0.0, ibot=0.0, koleo=0.0, match=MatchConfig(standardize=False), gram=GramConfig(weight=3.0))
    student, teacher, part = model(match=48), model(48, seed=1), batch()
    terms = asked(student, teacher, config)
    with torch.no_grad():
        seen, own = teacher.backbone(part.global_crops), student.backbone(part.global_crops, part.masks)
        assert config.match is not None
        want = match_losses(student.match(own), seen, config.match)
        want["gram"] = 3.0 * gram_loss(own.patches, seen.patches)
    assert terms.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(terms[name].detach(), value)


def test_anchors_may_be_anothers():
    config = ObjectivesConfig(gram=GramConfig())
    teacher, part = model(48, seed=1), batch()
    g = guide(teacher, config)
    anchors = [torch.randn(2 * B, 16, 5)]
    (t,) = g.targets(g.look([part]), [part.masks], 0.07, anchors=anchors)
    assert t.anchor is anchors[0]
    assert t.features is None
    assert t.seen is None


def test_a_shared_backbones_features_are_handed_on_as_they_are():
    config = ObjectivesConfig(match=MatchConfig())
    g, part = guide(model(48, seed=1), config), batch()
    features = g.look([part])
    g.observe(features)
    (t,) = g.targets(features, [part.masks], 0.07, share_features=True)
    assert t.seen is features[0]
    assert t.features is not None
    assert not torch.equal(t.features.cls, features[0].cls)  # which are standardised


def test_what_has_a_state():
    teacher = model(48)
    assert set(make_centrings(ObjectivesConfig(), teacher)) == {"dino", "ibot"}
    assert set(make_centrings(ObjectivesConfig(ibot=0.0), teacher)) == {"dino"}
    assert {"ibot", "ibot7", "standardise"} <= set(
        make_centrings(ObjectivesConfig(dino=0.0, match=MatchConfig()), teacher, (0, 7))
    )
    shared = make_centrings(ObjectivesConfig(centring="centre"), model(48, shared=True))
    assert shared["ibot"] is not shared["dino"]  # one head, two populations: each has its centre
    bare = HeadedBackbone(teacher.backbone)
    assert set(make_centrings(ObjectivesConfig(dino=0.0, ibot=0.0, match=MatchConfig()), bare)) == {"standardise"}


def test_targets_carry_no_gradient():
    teacher, part = model(48, seed=1), batch()
    config = ObjectivesConfig(match=MatchConfig(), gram=GramConfig())
    g = Guide(teacher, config, make_centrings(config, teacher))  # its parameters ask for gradients, as an average's do not
    (t,) = g.targets(g.look([part]), [part.masks], 0.07)
    assert isinstance(t, Targets)
    assert t.dino is not None
    assert t.ibot is not None
    assert t.features is not None
    found = [t.dino, t.ibot.rows(0, 3), t.features.cls, t.features.patches, t.anchor]
    assert not any(x.requires_grad for x in found if x is not None)
