"""Pruning: what is worth nothing goes without a trace, what steers the network stays, targets and limits hold, the result is a student."""

import copy
import json
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from distill.data.crops import CropsConfig
from distill.data.loader import Batch
from distill.data.preprocess import Preprocess
from distill.data.scenes import ScenesConfig
from distill.errors import UserError
from distill.importance import Reader, Scores, activations, elimination, energy_scores, measure, taylor_scores, with_norms
from distill.models.backbone import Backbone, BackboneConfig
from distill.models.checkpoints import load_backbone, save_model
from distill.models.headed import HeadedBackbone
from distill.models.heads import DINOHead, HeadConfig
from distill.models.match_head import MatchHead
from distill.models.timm_backbone import TimmBackbone, TimmConfig
from distill.objectives import ObjectivesConfig
from distill.optim import OptimConfig
from distill.progress import Progress
from distill.prune import PruneConfig, macs, prune
from distill.runtime import RuntimeConfig
from distill.step import Stepper
from distill.train import TrainConfig, train
from distill.training_state import prepare_student
from distill.unit_groups import UnitGroups

torch.set_num_threads(1)

HEAD = HeadConfig(prototypes=16, hidden=32, bottleneck=16, init="fan_in")
VARIANTS: list[dict[str, Any]] = [{}, {"ffn": "swiglu"}, {"layer_scale": 0.0}, {"registers": 3}]
RUNTIME = RuntimeConfig(workers=0, threads=1, log_every=1)


def student(dim: int = 48, match: int | None = None, seed: int = 0, **backbone: Any) -> Any:
    torch.manual_seed(seed)
    base: dict[str, Any] = {"dim": dim, "depth": 3, "heads": 3, "patch": 8, "image_size": 32}
    model = Backbone(BackboneConfig(**(base | {"layer_scale": 1.0, "init": "fan_in"} | backbone)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bias" in name or "token" in name or "gamma" in name:
                p.copy_(torch.randn_like(p) * 0.3 + ("gamma" in name))
    heads = DINOHead(dim, HEAD), DINOHead(dim, HEAD)
    return HeadedBackbone(model, *heads, None if match is None else MatchHead(dim, match, 16)).eval()


def images(n: int = 4, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.randn(n, 3, 6, 6, generator=g), size=(32, 32), mode="bicubic")


def ones(model: Any) -> Scores:
    config = model.backbone.config
    full = [torch.ones(b.heads).double() for b in config.widths()], [torch.ones(b.hidden).double() for b in config.widths()]
    return Scores("magnitude", *full, torch.ones(config.shape()[0]).double())


def outputs(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Features, and what both heads make of them."""
    with torch.no_grad():
        f = model.backbone(x)
        return [f.cls, f.patches, model.dino(f.cls), model.ibot(f.patches)]


def silence(model: Any, block: int, heads: list[int], hidden: list[int]) -> None:
    """Units that write nothing: their columns in the reading layer are zero."""
    b = model.backbone.blocks[block]
    with torch.no_grad():
        for h in heads:
            b.attn.proj.weight[:, h * b.attn.head_dim : (h + 1) * b.attn.head_dim] = 0
        b.mlp.fc2.weight[:, hidden] = 0


@pytest.mark.parametrize("seen", [False, True], ids=["plain", "fitted"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_units_worth_nothing_go_without_a_trace(changes, seen):
    model = student(**changes)
    hidden = model.backbone.config.hidden()
    silence(model, 0, [1], list(range(3, 3 + 16)))
    silence(model, 2, [0, 2], list(range(hidden - 24, hidden)))
    known = activations(model.backbone, [images(8)])
    scores = energy_scores(UnitGroups(model), known)
    full = macs(model.backbone.config)
    config = PruneConfig(macs=0.5, parts=["heads", "mlp"], importance="activation", round_to=8, least=0.05)
    # Just what is worth nothing: 3 heads and 40 hidden units.
    t, (dim, _, _, ffn) = 17 + model.backbone.config.registers, model.backbone.config.shape()
    free = 3 * (t * 4 * dim * 16 + 2 * t * t * 16) + 40 * t * dim * (3 if ffn == "swiglu" else 2)
    pruned, report = prune(model, config, full - free, scores, seen=known if seen else None)
    assert [b.heads for b in pruned.backbone.config.widths()] == [2, 3, 1]
    assert [hidden - b.hidden for b in pruned.backbone.config.widths()] == [16, 0, 24]
    assert report.cost_after == macs(pruned.backbone.config) == full - free
    assert report.lost["heads"] < 1e-6
    assert report.lost["mlp"] < 1e-6
    for before, after in zip(outputs(model, images()), outputs(pruned, images()), strict=True):
        assert torch.allclose(before, after, atol=1e-5)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_channel_that_is_constantly_the_mean_of_the_others_changes_only_its_own_feature(changes):
    """Norms see the same statistics up to the count of channels, which their rescaled gains make up for."""
    model = student(**changes)
    gone = [3, 17, 18, 19, 30, 31, 40, 47]
    with torch.no_grad():
        b: Any = model.backbone
        for name, p in b.named_parameters():
            if "token" in name or "pos_embed" in name:
                p[..., gone] = 0
                p -= p.mean(-1, keepdim=True)  # the mean of all channels is 0, and so is every one of these
                p[..., gone] = 0
            if name.startswith("patch_embed") or "proj" in name or "fc2" in name:
                p[gone] = 0
    # The stream's own mean must be 0 where it is written: centre every writing layer over the channels that stay.
    stay = [i for i in range(48) if i not in gone]
    with torch.no_grad():
        for name, p in b.named_parameters():
            if "token" in name or "pos_embed" in name:
                p[..., stay] -= p[..., stay].mean(-1, keepdim=True)
            if name.startswith("patch_embed") or "proj" in name or "fc2" in name:
                gamma = None
                if name.startswith("blocks"):
                    block = b.blocks[int(name.split(".")[1])]
                    gamma = getattr(block.ls1 if "proj" in name else block.ls2, "gamma", None)
                scale = torch.ones(48) if gamma is None else gamma
                shape = (-1, *[1] * (p.ndim - 1))
                scaled = p * scale.view(shape)
                scaled[stay] -= scaled[stay].mean(0, keepdim=True)
                p.copy_(scaled / scale.view(shape))
        for norm in [n for x in b.blocks for n in (x.norm1, x.norm2)] + [b.norm]:
            norm.weight[gone], norm.bias[gone] = 0, 0
    known = activations(model.backbone, [images(8)])
    scores = ones(model)
    scores.dim[gone] = 0
    config = PruneConfig(macs=0.9, parts=["dim"], round_to=8)
    pruned, report = prune(model, config, macs(model.backbone.config) - 1, scores, seen=known)
    assert report.after["dim"] == 40
    before, after = outputs(model, images()), outputs(pruned, images())
    for a, c in zip([before[0][:, stay], before[1][..., stay], *before[2:]], after, strict=True):
        assert torch.allclose(a, c, atol=1e-3), (a - c).abs().max()
    model.backbone.mask_token.data[:, gone] = 0
    masks = torch.zeros(4, 16, dtype=torch.bool)
    masks[:, :5] = True
    assert pruned.backbone(images(), masks).cls.shape == (4, 40)


def test_heads_of_all_kinds_follow_the_embedding():
    model = student(match=24)
    config = PruneConfig(macs=0.5, parts=["dim"], round_to=16)
    scores = ones(model)
    scores.dim[:16] = 0
    pruned, _ = prune(model, config, macs(model.backbone.config) * 0.7, scores)
    assert pruned.backbone.dim == 32
    assert torch.equal(pruned.dino.mlp[0].weight, model.dino.mlp[0].weight[:, 16:])
    assert torch.equal(pruned.ibot.mlp[0].weight, model.ibot.mlp[0].weight[:, 16:])
    matched = pruned.match(pruned.backbone(images()))
    assert matched.cls.shape == (4, 24)
    assert model.dino.mlp[0].in_features == 48  # the given model is left as it was
    assert all(p.requires_grad for p in pruned.parameters())


def test_whole_blocks_go_and_the_rest_moves_up():
    model = student(registers=2)
    scores = ones(model)
    scores.heads[1].zero_()
    scores.hidden[1].zero_()
    config = PruneConfig(macs=0.7, parts=["blocks"])
    pruned, report = prune(model, config, macs(model.backbone.config) * 0.7, scores)
    assert report.blocks_cut == [1]
    assert pruned.backbone.n_blocks == len(pruned.backbone.blocks) == 2
    with torch.no_grad():
        x = model.backbone.tokens(images())
        want = model.backbone.norm(model.backbone.blocks[2](model.backbone.blocks[0](x)))
    assert torch.allclose(pruned.backbone(images()).cls, want[:, 0], atol=1e-6)


def test_fitting_again_beats_cutting_alone():
    """On images that were not seen."""
    model = student(dim=64, heads=4)
    known = activations(model.backbone, [images(64, 5)])
    scores = energy_scores(UnitGroups(model), known)
    config = PruneConfig(macs=0.7, parts=["heads", "mlp"], round_to=8)
    target, x = macs(model.backbone.config) * 0.7, images(16, 6)
    want = outputs(model, x)[1]
    errors = [
        float((outputs(prune(model, config, target, scores, seen=s)[0], x)[1] - want).square().mean()) for s in (None, known)
    ]
    assert errors[1] < 0.7 * errors[0]


def test_elimination_spares_what_the_others_cannot_say():
    """Of units 0 and 1, which always agree, one is worth nothing; the other is worth both."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 4, generator=g).double()
    x[:, 1] = x[:, 0]
    cov = x.T @ x / len(x)
    w = torch.tensor([[1.0, 1.0, 0.5, 0.1]]).double()
    found = elimination([Reader(w, cov, 1.0)], 1, at_once=1)
    first = min(float(found[0]), float(found[1]))
    second = max(float(found[0]), float(found[1]))
    assert first < 0.01
    assert 3.5 < second < 4.5  # (1 + 1)^2
    assert 0.2 < float(found[2]) < 0.3
    # Heads of two columns: a unit is judged as a whole.
    assert len(elimination([Reader(w, cov, 1.0)], 2)) == 2


def test_a_channel_that_sets_the_norms_is_kept():
    model = student()
    with torch.no_grad():
        model.backbone.pos_embed[..., 5] = 20 * (1 + torch.rand(17))
        for n in [n for b in model.backbone.blocks for n in (b.norm1, b.norm2)] + [model.backbone.norm]:
            n.weight[5] = 1e-3  # nobody reads it
    known = activations(model.backbone, [images(8)])
    scores = energy_scores(UnitGroups(model), known)
    assert int(scores.dim.argmin()) == 5
    assert int(with_norms(scores, known).dim.argmax()) == 5


@pytest.mark.parametrize("part", ["heads", "mlp", "dim", "blocks"])
def test_only_what_is_allowed_is_cut(part):
    model = student()
    scores = energy_scores(UnitGroups(model), None)
    config = PruneConfig(macs=0.8, parts=[part], round_to=8)
    pruned, report = prune(model, config, macs(model.backbone.config) * 0.85, scores)
    before, after = model.backbone.config, pruned.backbone.config
    assert macs(after) <= macs(before) * 0.85
    changed = {
        "heads": [b.heads for b in after.widths()] != [3] * after.shape()[1],
        "mlp": [b.hidden for b in after.widths()] != [192] * after.shape()[1],
        "dim": after.shape()[0] != 48,
        "blocks": after.shape()[1] != 3,
    }
    assert [name for name, yes in changed.items() if yes] == [part]
    assert after.problems() == []
    json.dumps(report.to_json())


@pytest.mark.parametrize("round_to", [8, 16, 32])
def test_widths_are_multiples_and_least_holds_over_rounds(round_to):
    model = student(dim=64, heads=4, depth=4)
    original = model.backbone.config
    config = PruneConfig(macs=0.35, steps=3, round_to=round_to, least=0.5)
    full = macs(original)
    assert config.targets(full)[-1] == pytest.approx(0.35 * full)
    for target in config.targets(full):
        scores = energy_scores(UnitGroups(model), None)
        model, report = prune(model, config, target, scores, original=original)
        assert report.cost_after <= target
    for b in model.backbone.config.widths():
        assert b.hidden % round_to == 0
        assert b.hidden >= 128
        assert b.heads >= 2
    assert model.backbone.dim % round_to == 0
    assert model.backbone.dim >= 32
    assert model.backbone.n_blocks >= 2
    with pytest.raises(UserError, match="out of reach"):
        prune(model, config, 0.05 * full, energy_scores(UnitGroups(model), None), original=original)


def test_another_cost_leads_to_other_widths():
    """If only heads took time, only heads would go."""
    model = student()
    scores = energy_scores(UnitGroups(model), None)

    def cost(config: BackboneConfig) -> float:
        return 1.0 + sum(b.heads for b in config.widths())

    pruned, report = prune(model, PruneConfig(latency_ms=7, parts=["heads", "mlp", "dim"], least=0.3), 7, scores, cost)
    assert report.cost_after == 7
    assert sum(b.heads for b in pruned.backbone.config.widths()) == 6
    assert pruned.backbone.dim == 48
    assert [b.hidden for b in pruned.backbone.config.widths()] == [192] * 3


class OneProcess:
    num_processes = 1
    device = torch.device("cpu")

    def prepare_model(self, module: torch.nn.Module) -> torch.nn.Module:
        return module

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def batch() -> Batch:
    g = torch.Generator().manual_seed(9)
    crops = torch.randn(16, 3, 32, 32, generator=g), torch.randn(16, 3, 16, 16, generator=g)
    return Batch(*crops, torch.zeros(16, 16, dtype=torch.bool))


def loss(model: Any, teacher: Any, training: TrainConfig) -> float:
    """What the training loop says of its first step, before it changes anything."""
    one = OneProcess()
    copied = prepare_student(copy.deepcopy(model), training.optim, training.objectives, False, one)
    loop = Stepper(training, {"one": copied}, copy.deepcopy(teacher), 4, one, RUNTIME)
    return sum(loop.step(0, batch(), watch=False)["one"].terms.values())


def test_taylor_scores_are_what_removal_changes_to_first_order():
    """Against the loss itself: a head's columns scaled by 1 - e."""
    model, teacher = student(), student(dim=64, heads=4, seed=3)
    training = TrainConfig(
        images=32, batch=8, precision="fp32", crops=CropsConfig(global_size=32, local_size=16, local_count=2),
        objectives=ObjectivesConfig(koleo=0.0, teacher_temperature=(0.07, 0.07)), optim=OptimConfig(lr=0.01),
    )  # fmt: skip
    groups = UnitGroups(model)
    scores = taylor_scores(groups, teacher, [batch()], training)
    e, b = 1e-3, model.backbone.blocks[1]
    base = loss(model, teacher, training)
    with torch.no_grad():
        b.attn.proj.weight[:, 16:32] *= 1 - e
    assert abs(loss(model, teacher, training) - base) / e == pytest.approx(float(scores.heads[1][1]), rel=0.05)
    with torch.no_grad():
        b.attn.proj.weight[:, 16:32] /= 1 - e
        b.mlp.fc2.weight[:, 7] *= 1 - 10 * e
    changed = abs(loss(model, teacher, training) - base) / (10 * e)
    assert changed == pytest.approx(float(scores.hidden[1][7]), rel=0.1)


def test_measured_pruned_recovered_saved(tmp_path):
    """The whole way, two rounds: importance by Taylor, cuts, recovery by distillation, a folder that rebuilds it."""
    teacher = student(dim=64, heads=4, seed=3)
    model = student()
    training = TrainConfig(
        images=96, batch=16, precision="fp32", crops=CropsConfig(global_size=32, local_size=16, local_count=1),
        objectives=ObjectivesConfig(koleo=0.0), optim=OptimConfig(lr=0.01),
    )  # fmt: skip
    config = PruneConfig(macs=0.5, steps=2, round_to=8, images=32)
    source, original = ScenesConfig(count=40, size=32).build(), model.backbone.config
    for i, target in enumerate(config.targets(macs(original)), 1):
        scores, seen = measure(config.importance, config.images, model, teacher, training, source, "per_image", 0, RUNTIME)
        assert scores.kind == "taylor"
        model, report = prune(model, config, target, scores, seen=seen, original=original)
        assert report.importance == "taylor"
        model = train(
            training, {"one": model}, teacher, source, "per_image", tmp_path / f"round-{i}", 5, RUNTIME, Progress("quiet")
        )["one"]
        lines = [json.loads(line) for line in (tmp_path / f"round-{i}" / "one" / "train.jsonl").read_text().splitlines()]
        assert lines[-1]["loss"] < lines[0]["loss"]
    assert macs(model.backbone.config) <= 0.5 * macs(original)
    save_model(tmp_path / "model", model.backbone, Preprocess(size=32, resize=32, normalize="per_image"), model.heads())
    again = load_backbone(tmp_path / "model")
    assert again.config == model.backbone.config
    assert torch.equal(again(images()).cls, model.backbone(images()).cls)


def test_only_ours_can_be_pruned():
    model = HeadedBackbone(TimmBackbone(TimmConfig(name="vit_tiny_patch16_224", options={"depth": 1}, image_size=32)))
    with pytest.raises(UserError, match="Only backbones of ours"):
        UnitGroups(model)


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({}, "macs or latency_ms"),
        ({"macs": 0.5, "latency_ms": 3.0}, "macs or latency_ms"),
        ({"macs": 0.0}, "macs is the share"),
        ({"macs": 1.5}, "macs is the share"),
        ({"macs": 1.0}, "macs 1 prunes nothing"),
        ({"latency_ms": float("nan")}, "latency_ms must be above 0"),
        ({"macs": 0.5, "parts": []}, "parts must name"),
        ({"macs": 0.5, "parts": ["dim", "dim"]}, "parts names a part twice"),
        ({"macs": 0.5, "steps": 0}, "steps must be"),
        ({"macs": 0.5, "images": 0}, "images must be"),
        ({"macs": 0.5, "least": 1.5}, "least is a share"),
    ],
    ids=str,
)
def test_wrong_settings_are_said(settings, start):
    assert any(p.startswith(start) for p in PruneConfig(**settings).problems())


def test_settings_that_are_right():
    assert PruneConfig(macs=0.5).problems() == []
    assert PruneConfig(macs=1.0, sparsity="2:4").problems() == []
    assert PruneConfig(latency_ms=5.0, steps=2).targets(20.0) == [10.0, 5.0]
    with pytest.raises(UserError, match="takes 4 ms"):
        PruneConfig(latency_ms=5.0).targets(4.0)
