"""Quantization-aware distillation by the ordinary loop: it repairs what rounding broke and resumes bit for bit, and averages keep scales of
their own. Projections after every step reach averages too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import CROPS, HEAD, RUNTIME, _Dying, losses, same
from torch import Tensor, nn
from torch.nn import functional as F

from distill.data.preprocess import Preprocess
from distill.data.scenes import ScenesConfig
from distill.errors import UserError
from distill.losses.matching import MatchConfig
from distill.models.backbone import Backbone, BackboneConfig
from distill.models.checkpoints import load_backbone, save_model
from distill.models.fake_quant import fake_quant_layers, strip, with_fake_quant
from distill.models.headed import HeadedBackbone
from distill.models.heads import DINOHead
from distill.models.match_head import identity_match_head
from distill.objectives import ObjectivesConfig
from distill.optim import OptimConfig, Schedules, make_optimizer, set_step
from distill.progress import Progress
from distill.targets_cache import CacheConfig, TargetsCache
from distill.train import TrainConfig, train

torch.set_num_threads(1)
OBJECTIVES: dict[str, Any] = {"koleo": 0.0, "teacher_temperature": (0.07, 0.07)}
OPTIM: dict[str, Any] = {"weight_decay": (0.0, 0.0), "ema": (0.9, 0.99), "layer_decay": 1.0, "freeze_last_layer": 0.0}


def model(seed: int = 0, dim: int = 32, match: bool = False) -> Any:
    torch.manual_seed(seed)
    config = BackboneConfig(patch=8, image_size=32, dim=dim, depth=2, heads=2, layer_scale=1.0, init="fan_in")
    backbone = Backbone(config)
    if match:
        return HeadedBackbone(backbone, match=identity_match_head(dim))
    return HeadedBackbone(backbone, DINOHead(dim, HEAD), DINOHead(dim, HEAD))


def quantized(plain: HeadedBackbone, weights: Any = "int8", learn: bool = True, spread: float = 1.0) -> Any:
    """The student with all Linear layers quantized; `spread` below 1 makes inputs saturate."""
    backbone: Any = plain.backbone
    found: dict[str, float] = {}
    names = [n for n, m in backbone.named_modules() if isinstance(m, nn.Linear)]
    hooks = [
        backbone.get_submodule(n).register_forward_pre_hook(
            lambda _, x, n=n: found.__setitem__(n, spread * x[0].abs().max().item() / 127)
        )
        for n in names
    ]
    with torch.no_grad():
        backbone.eval()(images(16))
    for hook in hooks:
        hook.remove()
    layers = {n: None if weights == "w4" else found[n] for n in names}
    return HeadedBackbone(with_fake_quant(backbone, layers, weights, learn), plain.dino, plain.ibot, plain.match)


def images(n: int, first: int = 0) -> Tensor:
    source, prepare = ScenesConfig(count=first + n, size=32).build(), Preprocess(32, 32, normalize="per_image")
    return torch.stack([torch.from_numpy(prepare(source.image(i))) for i in range(first, first + n)])


def settings(steps: int = 8, lr: float = 1e-3, **changes: Any) -> TrainConfig:
    base: dict[str, Any] = {"images": 8 * steps, "batch": 8, "crops": CROPS, "precision": "fp32"}
    return TrainConfig(
        **(base | {"optim": OptimConfig(lr=lr, **OPTIM), "objectives": ObjectivesConfig(**OBJECTIVES)} | changes)
    )


def run(folder: Path, config: TrainConfig, student: Any, teacher: Any, progress: Any = None, **more: Any) -> Any:
    source = ScenesConfig(count=40, size=32).build()
    runtime = RUNTIME.model_copy(update=more.pop("runtime", {}))
    return train(
        config, {"one": student}, teacher, source, "per_image", folder, 5, runtime, progress or Progress("quiet"), **more
    )["one"]


def log_of(folder: Path) -> list[float]:
    return losses(folder / "one" / "train.jsonl")


def scales_of(model: Any) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if k.endswith("_log_scale")}


class Kill(BaseException):
    pass


class Dies(Progress):
    def task(self, *args: Any, **kwargs: Any) -> Any:
        return _Dying(super().task(*args, **kwargs), Kill, after=5)


MATCHING = ObjectivesConfig(dino=0.0, ibot=0.0, koleo=0.0, match=MatchConfig(hidden=0, standardize=False))


def cosine(a: nn.Module, b: nn.Module) -> float:
    x = images(32, first=40)
    with torch.no_grad():
        return F.cosine_similarity(a(x).patches, b(x).patches, dim=-1).mean().item()


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("weights", ["int8", "w4"])
def test_training_repairs_what_rounding_broke(tmp_path, weights, learn):
    """The student is its own teacher in floating point: all that is left to learn is the rounding."""
    plain = model(match=True)
    student = quantized(plain, weights, learn, spread=0.15 if weights == "int8" else 1.0)
    before = cosine(student.backbone.eval(), plain.backbone)
    crops = CROPS.model_copy(update={"local_count": 0})
    optim = OptimConfig(lr=0.01, scale_lr=0.02 if weights == "int8" else 0.001, **OPTIM)
    config = settings(60, optim=optim, objectives=MATCHING, crops=crops)
    teacher = HeadedBackbone(model(match=True).backbone)
    trained = run(tmp_path, config, student, teacher)
    logged = log_of(tmp_path)
    assert sum(logged[-6:]) < 0.75 * sum(logged[:6])
    assert 1 - cosine(trained.backbone, plain.backbone) < 0.75 * (1 - before)
    moved = any(bool(v.abs().max() > 0) for v in scales_of(trained).values())
    assert moved is learn


def test_averages_hold_scales_of_their_own(tmp_path):
    teacher, student = model(7), quantized(model())
    trained = run(tmp_path, settings(6, lr=0.02), student, teacher)
    assert list(fake_quant_layers(trained.backbone)) == list(fake_quant_layers(student.backbone))
    own, averaged = scales_of(student), scales_of(trained)
    name = "backbone.blocks.0.mlp.fc2.weight_log_scale"
    assert 0 < averaged[name].abs().mean() < own[name].abs().mean()  # behind the student, which left 0
    for layer in fake_quant_layers(trained.backbone).values():
        assert all(bool((s > 0).all()) for s in layer.scales() if s is not None)
    stripped, quantization = strip(trained.backbone)
    save_model(tmp_path / "model", stripped, Preprocess(32, 32), {"dino": trained.dino})
    kept = json.loads(json.dumps(quantization))["layers"]
    again = with_fake_quant(
        load_backbone(tmp_path / "model"),
        {n: q["input_scale"] for n, q in kept.items()},
        weight_scales={n: torch.tensor(q["weight_scale"]) for n, q in kept.items()},
    )
    with torch.no_grad():
        assert torch.equal(again(images(4)).cls, trained.backbone(images(4)).cls)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("weights", ["int8", "w4"])
def test_interrupted_training_ends_in_the_same_weights_and_scales(tmp_path, weights, precision):
    config = settings(8, lr=0.02, precision=precision)
    whole = run(tmp_path / "whole", config, quantized(model(), weights), model(7))
    with pytest.raises(Kill):
        run(tmp_path / "cut", config, quantized(model(), weights), model(7), Dies("quiet"))
    assert (tmp_path / "cut" / "checkpoint.safetensors").exists()
    resumed = run(tmp_path / "cut", config, quantized(model(), weights), model(7))
    assert same(whole, resumed)
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    assert all(bool(v.abs().max() > 0) for v in scales_of(resumed).values())


def test_cached_targets_teach_as_live_ones(tmp_path):
    kept = CacheConfig()
    config = settings(4, lr=0.02, cache=kept)
    live = run(tmp_path / "live", settings(4, lr=0.02), quantized(model()), model(7))
    identity = {"made": "for this test"}
    for folder in ("first", "second"):  # made, then read
        cache = TargetsCache(tmp_path / "targets", identity, kept, 8, (0, 1))
        cached = run(tmp_path / folder, config, quantized(model()), model(7), cache=cache)
        assert log_of(tmp_path / folder) == pytest.approx(log_of(tmp_path / "live"), rel=0.01)
        weight = lambda m: m.backbone.blocks[0].mlp.fc1.weight  # noqa: E731
        assert F.cosine_similarity(weight(cached).flatten(), weight(live).flatten(), dim=0) > 0.99


def test_scales_take_no_weight_decay_and_steps_of_their_own():
    student = quantized(model())
    config = OptimConfig(lr=0.5, scale_lr=0.003, warmup=0.0)
    optimizer = make_optimizer(student.parts(), 2, config)
    groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    layer = student.backbone.blocks[0].mlp.fc1
    schedules = Schedules(config, 1024, 10)
    set_step(optimizer, schedules, 0)
    assert groups[id(layer.weight)]["weight_decay"] > 0
    assert groups[id(layer.weight)]["lr"] == pytest.approx(0.5 * 0.9**2)
    for p in (layer.input_log_scale, layer.weight_log_scale):
        assert groups[id(p)]["weight_decay"] == 0
        assert groups[id(p)]["lr"] == pytest.approx(0.003)  # of the first block too
    set_step(optimizer, schedules, 5)
    assert groups[id(layer.weight_log_scale)]["lr"] == pytest.approx(0.0015)
    assert any("scale_lr must be at least 0" in p for p in OptimConfig(scale_lr=-1.0).problems())


def test_micro_batches_and_recomputed_blocks_train_the_same(tmp_path):
    found = {}
    for name, changes in {"whole": {}, "cut": {"micro_batch": 4, "recompute_blocks": True}}.items():
        run(tmp_path / name, settings(3), quantized(model()), model(7), runtime=changes)
        found[name] = log_of(tmp_path / name)
    assert found["cut"] == pytest.approx(found["whole"], rel=1e-3)


# ---- projections


def mask(models: dict[str, Any]) -> None:
    assert list(models) == ["one"]
    models["one"].backbone.blocks[0].mlp.fc1.weight[:, ::2] = 0.0


def test_projections_hold_for_student_and_average_and_over_a_kill(tmp_path):
    config, more = settings(8, lr=0.02), {"after_step": mask}
    student = model()
    whole = run(tmp_path / "whole", config, student, model(7), **more)
    for which in (student, whole):
        weight = which.backbone.blocks[0].mlp.fc1.weight
        assert bool((weight[:, ::2] == 0).all())
        assert bool((weight[:, 1::2] != 0).any(0).all())
    assert not same(whole, run(tmp_path / "free", config, model(), model(7)))
    with pytest.raises(Kill):
        run(tmp_path / "cut", config, model(), model(7), Dies("quiet"), **more)
    assert same(whole, run(tmp_path / "cut", config, model(), model(7), **more))


def test_the_first_step_already_sees_projected_weights(tmp_path):
    projected = model()
    with torch.no_grad():
        mask({"one": projected})
    run(tmp_path / "a", settings(1), projected, model(7))
    run(tmp_path / "b", settings(1), model(), model(7), after_step=mask)
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")


def test_projections_of_sharded_weights_are_refused():
    from distill.training_state import Student

    plain = model()
    student = Student(plain, plain, torch.optim.SGD(plain.parameters()), plain, shape=plain)
    with pytest.raises(UserError, match=r"drop runtime\.shard"):
        student.project("one", mask)


# ---- several processes


@pytest.mark.slow
def test_weights_spread_over_processes_learn_the_same(tmp_path):
    """Two processes that run this file, with weights whole and sharded, against one."""
    run(tmp_path / "one", settings(3, lr=0.005), quantized(model()), model(7))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, str(tmp_path)]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ("whole", "sharded"):
        assert log_of(tmp_path / name) == pytest.approx(log_of(tmp_path / "one"), rel=1e-4)
    whole, sharded = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "sharded"))
    assert all(bool(v.abs().max() > 0) for v in whole.values())
    for name, scale in whole.items():
        torch.testing.assert_close(sharded[name], scale, rtol=1e-2, atol=1e-6)


def _two_processes(folder: Path) -> None:
    for name in ("whole", "sharded"):
        runtime = {"shard": name == "sharded"}
        trained = run(folder / name, settings(3, lr=0.005), quantized(model()), model(7), runtime=runtime)
        if os.environ["RANK"] == "0":
            save_file(scales_of(trained), folder / f"{name}.safetensors")


if __name__ == "__main__":
    _two_processes(Path(sys.argv[1]))
