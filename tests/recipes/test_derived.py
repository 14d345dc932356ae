"""Pruned models and models trained for their quantization: what a recipe may say, and a whole run through the real command."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from test_schema import recipe

from distill.files import read_json
from distill.models.backbone import Backbone, flops_per_image
from distill.models.checkpoints import load_backbone
from distill.rows import read_rows
from export.artifact import read_artifact

RECIPE = """
name: derived
data:
  train: {kind: scenes, count: 96, size: 32}
  test: {kind: scenes, count: 64, size: 32, split: test}
input: {size: 32, normalize: per_image}
teacher:
  backbone: {arch: vit_giant, patch: 8, image_size: 32, dim: 32, depth: 2, heads: 2, layer_scale: 1.0, init: fan_in}
  dino_head: {prototypes: 16, hidden: 32, bottleneck: 16, init: fan_in}
  ibot_head: {prototypes: 16, hidden: 32, bottleneck: 16, init: fan_in}
  train: {images: 96, batch: 8, crops: &crops {global_size: 32, local_size: 16, local_count: 1}, masks: {}, mask_input: true}
students:
  small:
    backbone: {arch: vit_small, patch: 8, image_size: 32, dim: 64, depth: 2, heads: 4, layer_scale: 1.0, init: fan_in}
distill: {images: 96, batch: 8, crops: *crops, objectives: {dino: 0, ibot: 0, koleo: 0.1, match: {hidden: 32}}}
pruned:
  half: {of: small, macs: 0.5, steps: 2, round_to: 32, images: 16, importance: taylor, recovery: {images: 160}, control: true}
  sparse: {of: half, macs: 1.0, sparsity: "2:4", images: 16, importance: magnitude, recovery: {images: 32}}
qad:
  tuned8: {of: half, weights: int8, train: {images: 32}}
  tuned4: {of: small, weights: w4, teacher: itself, train: {images: 32}}
export:
  targets: [onnx-int8, onnx-w4]
  quantize: {images: 16, budget: {cosine_min: 0.9, images: 8, evaluations: 4}}
  gates: {int8: 0.8, w4: 0.5}  # of networks that have seen a hundred images
evaluate: {ks: [5, 10], probe_steps: 20}
benchmark: {batches: [1], seconds: 0.05, warmup_seconds: 0.05}
runtime: {workers: 0, threads: 1, checkpoint_every: 2, log_every: 5}
"""


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "recipes.cli", *map(str, words)]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "derived.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def finished(path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "derived"
    done = subprocess.run(command("run", path, "--out", folder), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_a_pruned_model_costs_what_was_asked_and_says_what_was_cut(finished):
    about = read_json(finished / "pruned" / "half" / "pruning.json")
    model, student = (load_backbone(finished / name) for name in ("pruned/half", "students/small"))
    assert isinstance(model, Backbone)
    assert isinstance(student, Backbone)
    assert flops_per_image(model.config, 32) <= 0.5 * flops_per_image(student.config, 32)
    assert about["macs_after"] == flops_per_image(model.config, 32) // 2
    assert len(about["steps"]) == 2
    assert about["blocks"] == [b.model_dump() for b in model.config.widths()]
    cut, recovered = (load_file(finished / "pruned/half/round-2" / n / "backbone.safetensors") for n in ("cut", "recovered"))
    assert any((cut[k] != recovered[k]).any() for k in cut), "recovery has trained"
    assert (finished / "pruned/half/match.safetensors").exists(), "the projector goes on with the model"
    control = load_backbone(finished / "control" / "half")
    assert control.config == model.config


def test_two_of_four_weights_stay_zero(finished):
    weights = load_file(finished / "pruned" / "sparse" / "backbone.safetensors")
    for name, w in weights.items():
        if name.startswith("blocks.") and w.ndim == 2:
            assert ((w.reshape(-1, 4) != 0).sum(1) <= 2).all(), name


def test_a_trained_quantization_ships_with_its_own_scales(finished):
    scales = read_json(finished / "qad" / "tuned8" / "quantization.json")["layers"]
    artifact = read_artifact(finished / "export" / "tuned8" / "onnx-int8")
    plan = {e["layer"]: e for e in artifact.details["plan"]["32"] if e["decision"] == "int8"}
    assert plan.keys() == scales.keys()
    assert all(plan[n]["input_scale"] == pytest.approx(scales[n]["input_scale"], rel=1e-6) for n in scales)
    assert not (finished / "export" / "tuned8" / "onnx-w4").exists(), "it ships in no other precision"
    assert read_json(finished / "qad" / "tuned4" / "quantization.json")["weights"] == "w4"
    assert (finished / "export" / "tuned4" / "onnx-w4" / "artifact.json").exists()


def test_every_model_is_judged_compared_and_bundled(finished):
    rows = read_rows(finished / "rows.jsonl")
    judged = {r.subject for r in rows if r.metric == "knn_top1" and r.value is not None}
    assert {"students/small", "pruned/half", "cut/half", "control/half", "pruned/sparse", "qad/tuned8", "qad/tuned4"} <= judged
    compared = {(r.subject, json.dumps(r.conditions)) for r in rows if r.metric == "knn_top1_difference"}
    assert any(s == "pruned/half" and "cut/half" in c for s, c in compared)
    assert any(s == "qad/tuned8" and "pruned/half" in c for s, c in compared)
    names = {p.name for p in (finished / "bundles").glob("*.tar.gz")}
    assert names == {f"{n}.tar.gz" for n in ("small", "half", "sparse", "tuned8", "tuned4")}
    page = (finished / "report" / "index.html").read_text(encoding="utf-8")
    assert "Pruned half" in page


def test_a_budget_is_met_by_measured_artifacts(finished):
    artifact = read_artifact(finished / "export" / "small" / "onnx-int8")
    budget = artifact.details["budget"]
    assert budget["met"] is True
    assert budget["reached"]["cosine_min"] >= 0.9
    assert len(budget["sensitivity"]) == 8
    assert budget["naive"]["cosine_min"] is not None
    assert not list((finished / "export").rglob("candidate_*"))


def test_a_kill_in_the_middle_of_a_recovery_changes_nothing(path, finished, tmp_path):
    folder = tmp_path / "killed"
    begun = subprocess.Popen(command("run", path, "--out", folder, "--until", "pruned/half"), stderr=subprocess.DEVNULL)
    checkpoint, end = folder / "pruned/half/round-1/recovered/checkpoint.safetensors", time.monotonic() + 200
    while not checkpoint.exists():
        assert begun.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(begun.pid, signal.SIGKILL)
    begun.wait()
    assert not (folder / "pruned/half/model.json").exists()
    again = command("run", path, "--out", folder, "--until", "pruned/half")
    done = subprocess.run(again, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("backbone.safetensors", "match.safetensors"):
        assert (folder / "pruned/half" / name).read_bytes() == (finished / "pruned/half" / name).read_bytes()


GOOD = {"of": "small", "macs": 0.5, "recovery": {"images": 640}}
TIMM = {"backbone": {"kind": "timm", "name": "vit_tiny_patch16_224", "patch": 8, "image_size": 48}}


@pytest.mark.parametrize(("changes", "where", "says"), [
    ({"pruned": {"half": GOOD | {"of": "smal"}}}, "pruned.half.of", "neither a student nor a pruned model; there are: small"),
    ({"pruned": {"small": GOOD}}, "pruned.small", "the name of another model too"),
    ({"pruned": {"a": GOOD | {"of": "b"}, "b": GOOD | {"of": "a"}}}, "pruned.a.of", "comes from a itself"),
    ({"pruned": {"half": GOOD | {"latency_ms": 5.0}}}, "pruned.half.macs", "one of both"),
    ({"pruned": {"half": {"of": "small", "macs": 0.5, "steps": 2}}}, "pruned.half.steps", "give recovery"),
    ({"pruned": {"half": {"of": "small", "macs": 0.5, "control": True}}}, "pruned.half.control", "give recovery"),
    ({"students": {"t": TIMM}, "pruned": {"half": GOOD | {"of": "t"}}}, "pruned.half.of", "only our own networks"),
    ({"qad": {"q": {"of": "small", "train": {"images": 640}}}}, "qad.q.weights", "no target of export.targets is int8"),
    ({"qad": {"q": {"of": "none", "train": {"images": 640}}}}, "qad.q.of", "there are: small"),
    ({"qad": {"q/1": {"of": "small", "train": {"images": 640}}}}, "qad.q/1", "names a folder"),
    ({"export__quantize": {"budget": {"cosine_min": 0.9}}}, "export.quantize", "nothing to judge"),
])  # fmt: skip
def test_contradictions_are_told(changes, where, says):
    found = recipe(**changes).problems()
    assert any(p.startswith(where) and says in s for p, s in found), found


def test_a_good_recipe_of_derived_models():
    pruned = {"half": GOOD, "third": GOOD | {"of": "half", "macs": 0.7, "control": True}}
    made = recipe(pruned=pruned, qad={"q": {"of": "third", "train": {"images": 640}}}, export__targets=["onnx-int8"])
    assert made.problems() == []
    assert list(made.subjects().values()) == ["students/small", "pruned/half", "pruned/third", "qad/q"]
    assert made.student_of("q") == "small"
    assert made.seen_images("third") == 640 * 3
    assert made.targets_of("q") == ["onnx-fp32", "onnx-int8"]
