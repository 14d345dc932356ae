"""The estimate of a training's memory against measured peaks, and the refusal of what does not fit."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from distill.data.crops import CropsConfig
from distill.data.loader import MasksConfig
from distill.errors import EnvironmentFailed
from distill.memory import Shape, activation_bytes, estimate, refuse_if_too_large
from distill.models.backbone import BackboneConfig
from distill.models.heads import HeadConfig
from distill.models.timm_backbone import TimmConfig
from distill.objectives import ObjectivesConfig
from distill.runtime import RuntimeConfig
from distill.train import TrainConfig

# Each is dominated by another term. Small heads have few prototypes and are narrow, so that they weigh nothing.
SMALL_HEAD: dict[str, Any] = {"prototypes": 64, "hidden": 64, "bottleneck": 32}
CROPS: dict[str, Any] = {"global": 48, "local": 24, "count": 4}
TINY = {"embed_dim": 96, "depth": 4, "num_heads": 2}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], bool]] = {
    "activations": ({"dim": 96, "depth": 4}, SMALL_HEAD, CROPS | {"batch": 96}, True),
    "local crops": ({"dim": 96, "depth": 4}, SMALL_HEAD, {"batch": 48, "global": 32, "local": 32, "count": 10}, True),
    "many tokens": (
        {"dim": 96, "depth": 4, "patch": 4},
        SMALL_HEAD,
        {"batch": 24, "global": 64, "local": 16, "count": 2},
        True,
    ),
    "swiglu": ({"arch": "vit_giant", "dim": 96, "depth": 4}, SMALL_HEAD, CROPS | {"batch": 96}, False),
    "bf16": ({"dim": 96, "depth": 6}, SMALL_HEAD, CROPS | {"batch": 96, "precision": "bf16"}, True),
    "micro-batches": ({"dim": 96, "depth": 4}, SMALL_HEAD, CROPS | {"batch": 144, "micro_batch": 48}, True),
    "blocks again": ({"dim": 96, "depth": 8}, SMALL_HEAD, CROPS | {"batch": 128, "recompute_blocks": True}, True),
    "weights": ({"dim": 384, "depth": 5}, SMALL_HEAD, {"batch": 2, "global": 32, "local": 16, "count": 1}, False),
    "logits": ({"dim": 32}, SMALL_HEAD | {"prototypes": 4096}, CROPS | {"batch": 48}, False),
    "prototypes": (
        {"dim": 32},
        {"prototypes": 32768, "hidden": 64, "bottleneck": 128},
        {"batch": 4, "global": 32, "local": 16, "count": 2},
        True,
    ),
    "images": ({"dim": 32, "patch": 32}, SMALL_HEAD, {"batch": 16, "global": 224, "local": 96, "count": 2}, True),
    "wide heads": ({"dim": 32}, {"prototypes": 64}, CROPS | {"batch": 32}, False),
    "timm vit": ({"name": "vit_tiny_patch16_224", "patch": 8, "options": TINY}, SMALL_HEAD, CROPS | {"batch": 96}, True),
    "timm cnn": ({"name": "efficientnet_lite0"}, SMALL_HEAD, {"batch": 8, "global": 96, "local": 64, "count": 2}, True),
}

SCRIPT = """
import gc, json, sys, tempfile
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from test_memory import CASES, configs, settings
from distill.data.scenes import ScenesConfig
from distill.memory import training_bytes_of
from distill.models.kinds import make_backbone
from distill.models.headed import HeadedBackbone
from distill.models.heads import DINOHead
from distill.progress import Progress
from distill.train import train

def model(backbone, head):
    made = make_backbone(backbone)
    return HeadedBackbone(made, DINOHead(made.dim, head), DINOHead(made.dim, head))

def memory(kind):
    return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(kind))

def run(name):
    training, backbone, head, alone = configs(name)
    runtime = settings(name)
    source = ScenesConfig(count=40, size=training.crops.global_size).build()
    teacher, student = None if alone else model(backbone, head), model(backbone, head)
    needed = training_bytes_of(training, teacher, [student], 1, runtime)
    with tempfile.TemporaryDirectory() as folder:
        train(training, {"one": student}, teacher, source, "per_image", Path(folder), 0, runtime, Progress("quiet"))
    return needed

run("logits")  # whatever is loaded and allocated once
for name in CASES:
    gc.collect()
    before = memory("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
    needed = run(name)
    print(json.dumps([name, memory("VmHWM") - before, needed]), flush=True)
"""


def configs(name: str) -> tuple[TrainConfig, BackboneConfig | TimmConfig, HeadConfig, bool]:
    """(training, backbone of teacher and student, head, whether the student's own average is the teacher)."""
    shape, head, crops, alone = CASES[name]
    masked = alone and shape.get("name") != "efficientnet_lite0"
    base = {"depth": 1, "heads": 2, "patch": 8, "image_size": crops["global"], "layer_scale": 1.0, "init": "fan_in"}
    training = TrainConfig(
        images=2 * crops["batch"],
        batch=crops["batch"],
        crops=CropsConfig(global_size=crops["global"], local_size=crops["local"], local_count=crops["count"]),
        masks=MasksConfig() if masked else None,
        mask_input=masked,
        objectives=ObjectivesConfig(koleo_group=2),
        precision=crops.get("precision", "fp32"),
    )
    backbone = TimmConfig(**shape) if "name" in shape else BackboneConfig(**(base | shape))
    return training, backbone, HeadConfig(**(head | {"init": "fan_in"})), alone


def settings(name: str) -> RuntimeConfig:
    own = {k: v for k, v in CASES[name][2].items() if k in RuntimeConfig.model_fields}
    return RuntimeConfig(workers=0, threads=1, checkpoint_every=100, log_every=1, **own)


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[int, int]]:
    """Peak of a training and its estimate, by case. One process for all; freed memory goes back to the system at once."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the high-water mark of memory can be reset under Linux only")
    ours = os.environ | {"MALLOC_MMAP_THRESHOLD_": "200000", "MALLOC_TRIM_THRESHOLD_": "200000", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", SCRIPT, os.path.dirname(__file__)]
    ran = subprocess.run(command, capture_output=True, text=True, env=ours | {"OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    return {name: (peak, estimate) for name, peak, estimate in rows}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_measured_peaks_lie_within_the_factor(measured, name):
    peak, estimate = measured[name]
    assert 0.7 <= peak / estimate <= 1.5, f"peak {peak / 1e6:.0f} MB, estimate {estimate / 1e6:.0f} MB"


def whole(training: TrainConfig, *students: Shape, teacher: Shape | None = None, processes: int = 1, **runtime: Any) -> int:
    return estimate(training, teacher, list(students), processes, RuntimeConfig(**runtime)).total()


def one(name: str) -> tuple[TrainConfig, Shape]:
    training, backbone, head, _ = configs(name)
    return training, Shape(backbone, head, head)


def test_what_grows_the_estimate():
    training, shape = one("activations")
    base = whole(training, shape)
    crops = training.crops
    for change in (
        {"batch": 192},
        {"crops": crops.model_copy(update={"global_size": 64})},
        {"crops": crops.model_copy(update={"local_count": 40})},
        {"masks": None},
    ):
        assert whole(training.model_copy(update=change), shape) > base, change
    many = HeadConfig(prototypes=65536, hidden=64, bottleneck=32)
    assert whole(training, replace(shape, dino=many)) > base
    assert whole(training, replace(shape, ibot=many)) > base
    deeper = replace(shape, backbone=shape.backbone.model_copy(update={"depth": 12}))
    assert whole(training, shape, teacher=deeper) > base
    assert whole(training, deeper) > base
    # Another student adds its weights; activations are those of the largest, for they go one after the other.
    assert base < whole(training, shape, shape) < 1.3 * base


def test_global_and_local_crops_do_not_add_up():
    training, shape = one("activations")
    none = training.model_copy(update={"crops": training.crops.model_copy(update={"local_count": 0})})
    assert activation_bytes(training, shape, 1, RuntimeConfig()) == activation_bytes(none, shape, 1, RuntimeConfig())


def test_what_lowers_the_estimate():
    training, shape = one("activations")
    for runtime in ({"micro_batch": 8}, {"recompute_blocks": True}):
        assert whole(training, shape, **runtime) < 0.8 * whole(training, shape), runtime
    four = activation_bytes(training, shape, 4, RuntimeConfig())
    assert four == pytest.approx(activation_bytes(training, shape, 1, RuntimeConfig()) / 4)
    frozen = replace(shape, backbone_frozen=True)
    assert whole(training, frozen) < 0.4 * whole(training, shape)


def test_sharding_divides_weights_and_not_activations():
    training, shape = one("weights")
    copied, cut = (estimate(training, shape, [shape], 4, RuntimeConfig(shard=shard)) for shard in (False, True))
    for part in ("teacher", "weights", "averages", "adam"):
        assert getattr(cut, part) == pytest.approx(getattr(copied, part) / 4)
    assert cut.gradients == pytest.approx(copied.gradients / 8)  # replicas exchange a copy
    assert cut.activations == copied.activations
    assert estimate(training, shape, [shape], 1, RuntimeConfig(shard=True)) == estimate(training, shape, [shape])


def test_half_precision_halves_the_blocks():
    training, shape = one("activations")
    full, half = (
        activation_bytes(training.model_copy(update={"precision": p}), shape, 1, RuntimeConfig()) for p in ("fp32", "bf16")
    )
    assert 0.5 * full < half < 0.75 * full


def test_the_papers_scale_is_far_beyond_one_machine_and_fits_when_sharded():
    head = HeadConfig(prototypes=131072)
    giant = Shape(BackboneConfig(arch="vit_giant", image_size=518, drop_path=0.4), head, head)
    training = TrainConfig(images=10**6, batch=3072, masks=MasksConfig(), mask_input=True, precision="bf16")
    assert whole(training, giant) > 2**40
    assert whole(training, giant, processes=256, shard=True) < 60 * 2**30


def test_too_much_is_refused_with_what_to_lower(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * 2**30))
    refuse_if_too_large(3 * 2**30, "pretrain")  # an estimate, so half as much again is let pass
    with pytest.raises(EnvironmentFailed) as e:
        refuse_if_too_large(4 * 2**30, "distill")
    text = str(e.value)
    assert text.startswith("distill needs about 4.0 GiB of memory and 2.0 GiB are free")
    for word in ("batch", "crops.local_count", "prototypes"):
        assert word in text
