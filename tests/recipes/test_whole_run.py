"""A whole run of a tiny recipe through the real command: every stage, the second run, kill -9 in the middle of each stage."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from distill.rows import Row, read_rows

RECIPE = """
name: tiny
data:
  train: {kind: scenes, count: 96, size: 32}
  test: {kind: scenes, count: 64, size: 32, split: test}
input: {size: 32, normalize: per_image}
teacher:
  backbone: {arch: vit_giant, patch: 8, image_size: 32, dim: 32, depth: 2, heads: 2, layer_scale: 1.0, init: fan_in, registers: 2}
  dino_head: {prototypes: 16, hidden: 32, bottleneck: 16, init: fan_in}
  ibot_head: {prototypes: 16, hidden: 32, bottleneck: 16, init: fan_in}
  train: &train
    images: 320
    batch: 8
    crops: &crops {global_size: 32, local_size: 16, local_count: 1}
    masks: {}
    mask_input: true
students:
  a:
    backbone: {arch: vit_small, patch: 8, image_size: 32, dim: 32, depth: 2, heads: 2, layer_scale: 1.0, init: fan_in}
    control: true
  b:
    backbone: {arch: vit_small, patch: 8, image_size: 32, dim: 16, depth: 1, heads: 2, layer_scale: 1.0, init: fan_in}
distill: {images: 320, batch: 8, crops: *crops}
export:
  resolutions: [32, 48]
  quantize: {images: 16}
  gates: {int8: 0.9}  # of 16-wide blocks that have seen a few hundred images
evaluate:
  ks: [5, 10]
  probe_steps: 50
  tasks:
    shapes:
      kind: segmentation
      steps: 20
      train: &maps {kind: scenes, count: 24, size: 32}
      test: &asked {kind: scenes, count: 16, size: 32, split: test}
    far:
      kind: depth
      steps: 20
      train: {kind: scenes, count: 24, size: 32, map: depth}
      test: {kind: scenes, count: 16, size: 32, split: test, map: depth}
    views: {kind: matching, data: *asked}
report: {trackers: [tensorboard]}
benchmark: {batches: [1], seconds: 0.05, warmup_seconds: 0.05}
runtime: {workers: 0, threads: 1, checkpoint_every: 7, log_every: 5}
"""
STAGES = ["pretrain", "distill", "control/a", "export/a/onnx-fp32", "export/a/onnx-int8", "export/b/rtx-int8"]
STAGES += ["parity", "evaluate", "benchmark", "report", "bundle"]
TRAININGS = ("pretrain", "distill", "control/a")
TIMED = ("latency", "images_per_s", "_s", "memory", "noise", "preprocess", "energy")


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "recipes.cli", *map(str, words)]


def decant(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    done = decant("run", recipe, "--out", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "index.html" in done.stdout
    assert "selftest" in done.stdout
    return folder


def weights(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*.safetensors")) if "cache" not in p.parts}


def comparable(rows: list[Row]) -> list[dict]:
    """Rows without those that time something, and without the hash of engines, whose builds are not bit-deterministic."""
    kept = []
    for row in rows:
        if any(t in row.metric for t in TIMED) or (row.metric == "size_mb" and row.target.startswith("rtx")):
            continue
        value = row.model_dump()
        if row.target.startswith("rtx"):
            value["conditions"].pop("artifact_sha256", None)
        kept.append(value)
    return kept


def test_every_subject_and_artifact_has_rows(finished):
    rows = read_rows(finished / "rows.jsonl")
    have = {(r.subject, r.target) for r in rows if r.metric == "knn_top1"}
    assert {("raw", "pixels"), ("random/teacher", "torch-fp32"), ("teacher", "torch-fp32"), ("control/a", "torch-fp32")} <= have
    for student in ("students/a", "students/b"):
        for target in ("torch-fp32", "onnx-fp32", "onnx-fp16", "onnx-int8", "rtx-fp16", "rtx-int8"):
            assert (student, target) in have
            latency = [r for r in rows if (r.subject, r.target, r.metric) == (student, target, "latency_p50_ms")]
            assert latency
            assert all(r.status == "measured" for r in latency) or "GPU" in latency[0].reason or "tensorrt" in latency[0].reason
    parity = [r for r in rows if r.metric == "cosine_min" and r.status == "measured"]
    assert {r.conditions["resolution"] for r in parity} == {32, 48}
    assert min(r.value for r in parity if r.target == "onnx-fp32") > 0.9999
    for task, metric in (("shapes", "miou"), ("far", "rmse_m"), ("views", "pck")):
        judged = {(r.subject, r.target): r for r in rows if r.metric == metric and r.conditions.get("task") == task}
        assert {("teacher", "torch-fp32"), ("students/a", "onnx-int8"), ("students/b", "rtx-int8")} <= judged.keys()
        assert judged["students/a", "onnx-int8"].low < judged["students/a", "onnx-int8"].value
        assert not any(subject.startswith(("raw", "random")) for subject, _ in judged)
        compared = {r.conditions["versus"] for r in rows if r.metric == f"{metric}_difference" and r.target == "onnx-int8"}
        assert {"students/a/torch-fp32", "teacher/torch-fp32"} <= compared
    difference = [r for r in rows if r.metric == "knn_top1_difference" and r.conditions["versus"] == "control/a/torch-fp32"]
    assert len(difference) == 1
    assert difference[0].n == 64


def test_the_report_shows_what_the_tasks_saw(finished):
    page = (finished / "report" / "index.html").read_text()
    for title in ("Nearest neighbours", "Segmentation: shapes", "Depth: far"):
        assert title in page
    heads = {p.name for p in (finished / "evaluate" / "tasks" / "shapes").iterdir()}
    assert {"head-teacher-torch-fp32-32.safetensors", "head-students.a-onnx-int8-48.safetensors"} <= heads
    assert list((finished / "report" / "trackers" / "tensorboard").glob("events.*"))


def test_the_students_weights_are_their_averages_and_differ_from_the_control(finished):
    student = load_file(finished / "students" / "a" / "backbone.safetensors")
    control = load_file(finished / "control" / "a" / "backbone.safetensors")
    assert student.keys() == control.keys()
    assert any((student[k] != control[k]).any() for k in student)
    assert not list(finished.rglob("checkpoint.safetensors"))


def test_second_run_skips_everything_in_little_more_than_it_takes_to_start(finished, recipe):
    """In CPU time, against that of starting torch: neither the wall clock nor the speed of a shared machine says anything about us."""

    def used(*words: object) -> float:
        start = os.times()
        done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        now = os.times()
        return now.children_user + now.children_system - start.children_user - start.children_system

    before = {p: p.stat().st_mtime_ns for p in finished.rglob("done.json")}
    mine, torch_alone = used(*command("run", recipe, "--out", finished)), used(sys.executable, "-c", "import torch")
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("done.json")} == before
    assert mine < 3 * torch_alone + 1, f"{mine:.1f} s of CPU, where torch alone takes {torch_alone:.1f} s"


def test_a_changed_setting_runs_only_what_depends_on_it(finished, recipe):
    said = decant("check", recipe, "--out", finished, "--set", "evaluate.ks=[5]").stdout
    would = {line.split()[1]: line.split()[3] for line in said.splitlines() if line.startswith("│") and len(line.split()) > 4}
    assert would["pretrain"] == "skip"
    assert would["export/a/onnx-fp32"] == "skip"
    assert would["evaluate"] == "run"
    assert "ks" in said


def test_bundles_verify_and_test_themselves(finished):
    bundle = finished / "bundles" / "a.tar.gz"
    assert decant("verify", bundle).returncode == 0
    tested = decant("selftest", bundle)
    assert tested.returncode == 0, tested.stdout + tested.stderr
    broken = finished.parent / "broken.tar.gz"
    data = bytearray(bundle.read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(data)
    refused = decant("verify", broken)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_bundles_hold_the_heads_that_the_evaluation_trained(finished):
    from export.bundling.verify import verify

    for student in ("a", "b"):
        manifest = verify(finished / "bundles" / f"{student}.tar.gz").manifest
        heads = {h.name: (h.kind, h.trained_on, h.resolution, h.expected.source) for h in manifest.heads}
        kinds = {"main": "classification", "shapes": "segmentation", "far": "depth"}
        assert heads == {name: (kind, "torch-fp32", 32, manifest.artifacts[0].target) for name, kind in kinds.items()}
        assert next(h.classes for h in manifest.heads if h.name == "main")


def test_another_recipe_and_a_foreign_folder_are_refused(finished, recipe, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(RECIPE.replace("name: tiny", "name: other"))
    refused = decant("run", other, "--out", finished)
    assert refused.returncode == 2
    assert "tiny" in refused.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    refused = decant("run", recipe, "--out", tmp_path / "mine")
    assert refused.returncode == 2
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_contradictions_are_reported_all_at_once_with_lines(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(RECIPE.replace("heads: 2, layer", "hedas: 2, layer", 1).replace("batch: 8, crops", "batch: eight, crops"))
    refused = decant("check", path)
    assert refused.returncode == 2
    lines = refused.stderr.strip().splitlines()
    assert any("did you mean heads" in line and "bad.yaml:8" in line for line in lines), lines
    assert any("distill.batch" in line for line in lines), lines
    path.write_text(RECIPE.replace("patch: 8, image_size: 32, dim: 16", "patch: 5, image_size: 30, dim: 16"))
    refused = decant("check", path)
    assert "is not a multiple of the patch of 5 px" in refused.stderr


@pytest.mark.slow
def test_kill_9_in_the_middle_of_every_stage_changes_nothing(finished, recipe, tmp_path):
    folder, missed = tmp_path / "tiny", []
    for stage in STAGES:
        process = subprocess.Popen(
            command("run", recipe, "--out", folder), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        home = folder / folder_of(stage)
        while process.poll() is None and not (home / "started.json").exists():
            time.sleep(0.001)
        # In the middle: trainings after their first checkpoint, the rest a moment into their work.
        while process.poll() is None and stage in TRAININGS and not (home / "checkpoint.safetensors").exists():
            time.sleep(0.001)
        time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (home / "done.json").exists():
            missed.append(stage)
    assert not set(missed) & {*TRAININGS, "evaluate", "benchmark"}
    assert len(missed) <= 2, f"done before the kill came: {missed}"
    again = decant("run", recipe, "--out", folder)
    assert again.returncode == 0, again.stderr[-3000:]
    assert weights(folder) == weights(finished)
    assert comparable(read_rows(folder / "rows.jsonl")) == comparable(read_rows(finished / "rows.jsonl"))
    assert not list(folder.rglob(".part-*")), "unfinished writes were left behind"


def folder_of(stage: str) -> str:
    return {"pretrain": "teacher", "distill": "students", "bundle": "bundles"}.get(stage, stage)


def test_log_of_events_is_json(finished):
    events = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert events
