"""Training by several processes: one result, written once, the same each time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

RECIPE = """
name: pair
data:
  train: {kind: scenes, count: 64, size: 32}
input: {size: 32, normalize: per_image}
teacher:
  backbone: {arch: vit_giant, patch: 8, image_size: 32, dim: 32, depth: 2, heads: 2, layer_scale: 1.0, init: fan_in}
  dino_head: {prototypes: 16, hidden: 32, bottleneck: 16, init: fan_in}
  ibot_head: {prototypes: 16, hidden: 32, bottleneck: 16, init: fan_in}
  train: {images: 96, batch: 8, crops: {global_size: 32, local_size: 16, local_count: 1}, masks: {}, mask_input: true}
students:
  a: {backbone: {arch: vit_small, patch: 8, image_size: 32, dim: 16, depth: 1, heads: 2, layer_scale: 1.0, init: fan_in}}
distill: {images: 48, batch: 8, crops: {global_size: 32, local_size: 16, local_count: 1}}
runtime: {workers: 0, threads: 1, checkpoint_every: 4, log_every: 1}
"""


def launch(folder: Path, recipe: Path, *more: str) -> subprocess.CompletedProcess:
    """Two CPU processes. `accelerate launch --cpu` starts several only through MPI; torch's launcher sets what Accelerator reads."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "recipes.cli", "run", str(recipe), "--out", str(folder), "--until", "distill", *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path):
    recipe = tmp_path / "pair.yaml"
    recipe.write_text(RECIPE)
    runs = {
        "again": launch(tmp_path / "again", recipe),
        "copied": launch(tmp_path / "copied", recipe),
        "sharded": launch(tmp_path / "sharded", recipe, "--set", "runtime.shard=true"),
        "alone": run_alone(tmp_path / "alone", recipe),
    }
    for name, done in runs.items():
        assert done.returncode == 0, (name, done.stderr[-3000:])
    for model in ("teacher", "students/a"):
        kept = {name: load_file(tmp_path / name / model / "backbone.safetensors") for name in runs}
        assert all(kept["again"][k].equal(v) for k, v in kept["copied"].items()), model
        for name in ("copied", "sharded"):
            assert kept[name].keys() == kept["alone"].keys()
            for key, value in kept["alone"].items():  # keys' biases have no gradient, and Adam makes steps of its rounding
                if not key.endswith("qkv.bias"):
                    assert (kept[name][key] - value).norm() <= 1e-4 * max(value.norm().item(), 1e-3), (name, model, key)
        steps = [json.loads(line)["step"] for line in (tmp_path / "copied" / model / "train.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps)), "each step is logged once"
        assert len(steps) == (12 if model == "teacher" else 6)


def run_alone(folder: Path, recipe: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "recipes.cli", "run", str(recipe), "--out", str(folder), "--until", "distill"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    recipe = tmp_path / "pair.yaml"
    recipe.write_text(RECIPE)
    refused = launch(tmp_path / "run", recipe, "--set", "teacher.train.batch=7")
    assert refused.returncode != 0
    assert "must be a multiple of the 2 processes" in refused.stderr
