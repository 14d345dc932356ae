"""The loop: it learns, resumes bit for bit, survives NaN and signals, and a frozen teacher stays frozen."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.data.crops import CropsConfig
from distill.data.loader import MasksConfig
from distill.data.scenes import ScenesConfig
from distill.errors import DecantError
from distill.models.backbone import Backbone, BackboneConfig
from distill.models.headed import HeadedBackbone
from distill.models.heads import DINOHead, HeadConfig
from distill.objectives import ObjectivesConfig
from distill.optim import OptimConfig
from distill.progress import Progress
from distill.runtime import RuntimeConfig, TrainLog, stop_requests, uses_bf16
from distill.train import TrainConfig, train

HEAD = HeadConfig(prototypes=16, hidden=32, bottleneck=16, init="fan_in")
CROPS = CropsConfig(global_size=32, local_size=16, local_count=2, blur=(0.5, 0.1, 0.5))
RUNTIME = RuntimeConfig(workers=0, threads=1, checkpoint_every=3, log_every=1)


def model(seed: int = 0, dim: int = 32, **backbone) -> Any:
    torch.manual_seed(seed)
    config = BackboneConfig(patch=8, image_size=32, dim=dim, depth=2, heads=2, layer_scale=1.0, init="fan_in", **backbone)
    return HeadedBackbone(Backbone(config), DINOHead(dim, HEAD), DINOHead(dim, HEAD))


def settings(steps: int = 8, **changes) -> TrainConfig:
    base: dict[str, Any] = {"images": 8 * steps, "batch": 8, "crops": CROPS, "masks": MasksConfig(), "mask_input": True}
    return TrainConfig(**(base | {"optim": OptimConfig(lr=0.02), "precision": "fp32"} | changes))


def run(folder: Path, config: TrainConfig, students=None, teacher=None, runtime=RUNTIME) -> dict[str, Any]:
    source = ScenesConfig(count=40, size=32).build()
    students = students or {"one": model()}
    return train(config, students, teacher, source, "per_image", folder, 5, runtime, Progress("quiet"))


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def losses(path: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


def test_pretraining_lowers_its_loss_and_moves_the_average(tmp_path):
    start = model()
    trained = run(tmp_path, settings(60, objectives=ObjectivesConfig(teacher_temperature=(0.04, 0.04))))["one"]
    logged = losses(tmp_path / "train.jsonl")
    assert sum(logged[-5:]) < 0.97 * sum(logged[:5])
    assert not same(start.backbone, trained.backbone)
    assert not trained.training


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize("centring", ["sinkhorn", "centre"])
def test_interrupted_training_ends_in_the_same_weights(tmp_path, drop_path, centring):
    config = settings(8, objectives=ObjectivesConfig(centring=centring))
    whole = run(tmp_path / "whole", config, {"one": model(drop_path=drop_path)})["one"]

    class Kill(BaseException):
        pass

    class Dies(Progress):
        def task(self, *args, **kwargs):
            task = super().task(*args, **kwargs)
            return _Dying(task, Kill, after=5)

    source = ScenesConfig(count=40, size=32).build()
    with pytest.raises(Kill):
        train(
            config, {"one": model(drop_path=drop_path)}, None, source, "per_image", tmp_path / "cut", 5, RUNTIME, Dies("quiet")
        )
    assert (tmp_path / "cut" / "checkpoint.safetensors").exists()
    resumed = run(tmp_path / "cut", config, {"one": model(seed=99, drop_path=drop_path)})["one"]
    assert same(whole, resumed)
    assert losses(tmp_path / "cut" / "train.jsonl") == losses(tmp_path / "whole" / "train.jsonl")


class _Dying:
    """A task that raises after some steps: between two checkpoints, like a kill."""

    def __init__(self, task, error, after):
        self.task, self.error, self.after = task, error, after

    def __enter__(self):
        self.inner = self.task.__enter__()
        return self

    def __exit__(self, *args):
        return self.task.__exit__(*args)

    def advance(self, n=1, **shown):
        self.after -= 1
        if self.after == 0:
            raise self.error
        self.inner.advance(n, **shown)


def test_number_of_workers_changes_nothing(tmp_path):
    config = settings(3)
    none = run(tmp_path / "0", config)["one"]
    two = run(tmp_path / "2", config, runtime=RUNTIME.model_copy(update={"workers": 2}))["one"]
    assert same(none, two)


def test_distillation_of_two_students_equals_each_alone_and_freezes_the_teacher(tmp_path):
    teacher = model(7, dim=48)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    config = settings(4, masks=None, mask_input=False)
    both = run(tmp_path / "both", config, {"a": model(1), "b": model(2, dim=16)}, teacher)
    alone = run(tmp_path / "alone", config, {"b": model(2, dim=16)}, teacher)
    assert same(both["b"], alone["b"])
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert (tmp_path / "both" / "a" / "train.jsonl").exists()
    assert torch.equal(both["a"].backbone.mask_token, torch.zeros_like(both["a"].backbone.mask_token))


def frozen_backbone(seed: int = 0) -> Any:
    made = model()
    torch.manual_seed(seed)
    made.dino, made.ibot = (
        DINOHead(32, HEAD),
        DINOHead(32, HEAD),
    )  # the backbone is the same for every seed: it came from a file
    made.backbone.requires_grad_(False)
    return made


def test_interrupted_fitting_of_heads_ends_in_the_same_weights(tmp_path):
    config = settings(6, masks=None, mask_input=False, objectives=ObjectivesConfig(koleo=0.0))
    whole = run(tmp_path / "whole", config, {"one": frozen_backbone()})["one"]

    class Kill(BaseException):
        pass

    class Dies(Progress):
        def task(self, *args, **kwargs):
            return _Dying(super().task(*args, **kwargs), Kill, after=5)

    source = ScenesConfig(count=40, size=32).build()
    with pytest.raises(Kill):
        train(config, {"one": frozen_backbone()}, None, source, "per_image", tmp_path / "cut", 5, RUNTIME, Dies("quiet"))
    resumed = run(tmp_path / "cut", config, {"one": frozen_backbone(seed=99)})["one"]
    assert same(whole, resumed)
    assert same(whole.backbone, model().backbone)
    assert not torch.equal(whole.dino.last_layer.weight_v, model().dino.last_layer.weight_v)


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_running_blocks_again_changes_no_bit(tmp_path, drop_path):
    recompute = RUNTIME.model_copy(update={"recompute_blocks": True})
    kept = run(tmp_path / "kept", settings(3), {"one": model(drop_path=drop_path)})["one"]
    again = run(tmp_path / "again", settings(3), {"one": model(drop_path=drop_path)}, runtime=recompute)["one"]
    assert same(kept, again)


def test_micro_batches_train_the_same(tmp_path):
    config = settings(4, objectives=ObjectivesConfig(koleo_group=2))
    runs = {n: run(tmp_path / str(n), config, runtime=RUNTIME.model_copy(update={"micro_batch": n}))["one"] for n in (2, 8)}
    assert losses(tmp_path / "2" / "train.jsonl") == pytest.approx(losses(tmp_path / "8" / "train.jsonl"), rel=1e-5)
    a, b = (runs[n].backbone.blocks[0].mlp.fc1.weight for n in runs)
    assert (a - b).norm() < 1e-4 * b.norm()


def test_without_frozen_teacher_only_one_student(tmp_path):
    with pytest.raises(ValueError, match="exactly one student"):
        run(tmp_path, settings(1), {"a": model(), "b": model()})


def test_steps_that_are_not_finite_change_nothing_and_then_stop_the_run(tmp_path):
    broken = model()
    with torch.no_grad():
        broken.dino.last_layer.weight_g.fill_(float("nan"))
    with pytest.raises(DecantError, match="not finite in 5 steps"):
        run(tmp_path, settings(20), {"one": broken})
    assert torch.isfinite(broken.backbone.patch_embed.proj.weight).all()


def test_batches_smaller_than_two_and_masks_without_input_are_refused():
    assert any("at least 2" in p for p in settings(batch=1).problems())
    assert any("mask_input" in p for p in settings(masks=None).problems())
    assert settings().problems() == []


def test_log_drops_lines_after_the_checkpoint_and_a_cut_line(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"step": 0, "loss": 1}\n{"step": 1, "loss": 1}\n{"step": 2, "lo')
    TrainLog(path, 1)
    assert path.read_text() == '{"step": 0, "loss": 1}\n'


def test_signals_end_the_loop_after_a_whole_step():
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


SCRIPT = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from test_train import *
run(Path(sys.argv[1]), settings(40), runtime=RUNTIME)
"""


def test_sigterm_writes_a_checkpoint_and_the_next_start_continues(tmp_path):
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.PIPE)
    log = tmp_path / "train.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 4):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"KeyboardInterrupt" in err
    from safetensors import safe_open

    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as f:
        assert 4 < json.loads(f.metadata()["state"])["step"] < 40
    assert same(run(tmp_path, settings(40))["one"], run(tmp_path / "whole", settings(40))["one"])


def test_bf16_is_chosen_by_width_and_machine(monkeypatch):
    monkeypatch.setattr("distill.runtime.native_bf16", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert uses_bf16("bf16", 8)
    assert not uses_bf16("fp32", 4096)
    assert uses_bf16("auto", 192)
    assert not uses_bf16("auto", 64)


def test_bf16_training_stays_close_to_fp32(tmp_path):
    exact = run(tmp_path / "fp32", settings(4))
    rough = run(tmp_path / "bf16", settings(4, precision="bf16"))
    assert losses(tmp_path / "bf16" / "train.jsonl")[0] == pytest.approx(losses(tmp_path / "fp32" / "train.jsonl")[0], rel=0.02)
    a, b = (m["one"].backbone.blocks[0].attn.qkv.weight for m in (exact, rough))
    assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99


def test_monitors_values_are_there_once_all_steps_are_done(tmp_path, monkeypatch):
    """A kill after the last checkpoint leaves no step that could say them again."""
    subjects = {"one": "teacher"}
    source = ScenesConfig(count=40, size=32).build()
    go = lambda: train(  # noqa: E731
        settings(3), {"one": model()}, None, source, "per_image", tmp_path, 5, RUNTIME, Progress("quiet"), subjects=subjects
    )

    def killed(*_: Any) -> None:
        raise SystemExit

    monkeypatch.setattr("distill.training_state.Student.whole_average", killed)
    with pytest.raises(SystemExit):
        go()
    monkeypatch.undo()
    before = (tmp_path / "rows.jsonl").read_text()
    assert "effective_rank" in before
    go()
    assert (tmp_path / "rows.jsonl").read_text() == before
