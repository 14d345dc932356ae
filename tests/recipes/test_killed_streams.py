"""kill -9 in the middle of an epoch of a stream, in pretraining and in distillation, live and from kept targets: the same command ends in
the weights of a run that nobody stopped, bit for bit.
"""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.data.scenes import ScenesConfig

HEAD = {"prototypes": 16, "hidden": 32, "bottleneck": 16, "init": "fan_in"}
VIT = {"patch": 8, "image_size": 32, "dim": 32, "depth": 2, "heads": 2, "layer_scale": 1.0, "init": "fan_in"}
STEPS, BATCH, SHARD, SHARDS = 60, 8, 31, 4  # an epoch of 124 images ends in the middle of a batch


def wanted(data: Path, cache: dict[str, Any] | None, workers: int) -> dict[str, Any]:
    train = {"images": STEPS * BATCH, "batch": BATCH, "crops": {"global_size": 32, "local_size": 16, "local_count": 1}}
    source = {"kind": "datasets", "name": "parquet", "data_files": f"{data}/*.parquet", "streaming": True, "buffer": 16}
    return {
        "name": "stream",
        "data": {"train": source},
        "input": {"size": 32, "normalize": "per_image"},
        "teacher": {
            "backbone": VIT,
            "dino_head": HEAD,
            "ibot_head": HEAD,
            "train": train | {"masks": {}, "mask_input": True},
        },
        "students": {"a": {"backbone": VIT}},
        "distill": train | {"cache": cache, "objectives": {"teacher_temperature": [0.05, 0.05]}},
        "export": {"targets": ["onnx-fp32"]},
        "runtime": {"workers": workers, "threads": 1, "checkpoint_every": 5, "log_every": 5},
    }


def start(recipe: Path, run: Path) -> subprocess.Popen:
    words = ["run", str(recipe), "--out", str(run), "--until", "distill", "--quiet"]
    return subprocess.Popen([sys.executable, "-m", "recipes.cli", *words], stderr=subprocess.PIPE, text=True, process_group=0)


def to_the_end(recipe: Path, run: Path) -> str:
    process = start(recipe, run)
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 0, said[-3000:]
    return said


def weights(run: Path) -> dict[str, bytes]:
    folders = (run / "teacher", run / "students")
    return {str(p.relative_to(run)): p.read_bytes() for f in folders for p in sorted(f.rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    import datasets

    folder, scenes = tmp_path_factory.mktemp("shards"), ScenesConfig(count=SHARD * SHARDS, size=40).build()
    for shard in range(SHARDS):
        rows = []
        for i in range(shard * SHARD, (shard + 1) * SHARD):
            file = io.BytesIO()
            scenes.image(i).save(file, "PNG")
            rows.append({"image": {"bytes": file.getvalue(), "path": None}})
        kind = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_list(rows, features=kind).to_parquet(folder / f"part-{shard}.parquet")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cache", "workers"), [(None, 0), ({}, 2), ({"dino_k": 4, "ibot_k": 4, "replay": 200}, 0)], ids=["live", "kept", "replayed"]
)
def test_kill_9_in_the_middle_of_an_epoch_changes_nothing(shards, tmp_path, cache, workers):
    recipe, whole, killed = tmp_path / "stream.yaml", tmp_path / "whole", tmp_path / "killed"
    recipe.write_text(yaml.safe_dump(wanted(shards, cache, workers)))
    to_the_end(recipe, whole)
    kills = 0
    for home in (killed / "teacher", killed / "teacher", killed / "students", killed / "students"):
        checkpoint = home / "checkpoint.safetensors"
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = start(recipe, killed)
        while process.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > before):
            time.sleep(0.001)
        time.sleep(0.03)  # some steps further
        os.killpg(process.pid, signal.SIGKILL)  # its workers too
        process.communicate()
        kills += not (home / "model.json").exists() and not (home / "a/model.json").exists()
    assert kills >= 3, "trainings were over before they were killed"
    said = to_the_end(recipe, killed)
    assert "distill: continues" in said
    assert weights(killed) == weights(whole)
    assert not [p for p in killed.rglob(".*") if p.is_file() and p.name != ".lock"]
    if cache is not None:
        assert {p.name for p in (killed / "targets").iterdir() if not p.name.startswith("rank")} == {"meta.json"}
