"""The report of a believable run: what it says, that it says nothing more, and that the page stands alone."""

import csv
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from distill.data.preprocess import Preprocess
from distill.encoder import Features, RawPixels, TorchEncoder
from distill.files import write_json, write_text
from distill.models.backbone import Backbone, BackboneConfig
from distill.rows import Row, not_measured, read_rows, write_rows
from export import plots, tables
from export.pictures import like, pca_colours, pca_strip
from export.report import ReportConfig, console_table, headline_table, write_report
from export.summary import summary

N = 5000
NO_GPU = "no CUDA GPU on this machine; the tensorrt_rtx engine is compiled for SM 8.6, 8.9"
DATA = {"data": "scenes", "data_fingerprint": "ab12", "gallery_size": 4000, "resolution": 48, "preprocess": {"size": 48}}


def accuracy(metric, value, subject, target="torch-fp32", n=N, **more):
    half = 1.96 * math.sqrt(value * (100 - value) / n)
    interval = {"low": value - half, "high": value + half}
    return Row(metric=metric, value=value, n=n, subject=subject, target=target, conditions={**DATA, **more}, **interval)


def difference(value, half, subject, target, versus, metric="knn_top1"):
    interval = {"low": value - half, "high": value + half}
    conditions = {**DATA, "versus": versus, "agreement_percent": 91.2}
    row = {"metric": f"{metric}_difference", "value": value, "n": N, "subject": subject, "target": target}
    return Row(**row, conditions=conditions, **interval)


def timing(metric, value, target, subject="students/small", batch=1, spread=0.04, resolution=48, **more):
    conditions = {"resolution": resolution, "batch": batch, "runtime": "onnxruntime 1.32.0", "threads": 2, "device": "cpu"}
    conditions |= {"load_average": 0.3, "other_cores_busy": 0.05, "settled": True, **more}
    interval = {"low": value * (1 - spread), "high": value * (1 + spread)}
    return Row(metric=metric, value=value, n=1400, subject=subject, target=target, conditions=conditions, **interval)


def believable_rows():
    """What the stages of a quickstart run on a machine without a GPU hand in."""
    knn = {
        ("raw", "pixels"): (58.3, 55.9),
        ("random/teacher", "torch-fp32"): (66.4, 61.7),
        ("random/small", "torch-fp32"): (59.8, 55.2),
        ("teacher", "torch-fp32"): (78.6, 81.9),
        ("students/small", "torch-fp32"): (73.4, 76.8),
        ("control/small", "torch-fp32"): (66.1, 70.4),
        ("students/small", "onnx-fp32"): (73.4, 76.8),
        ("students/small", "onnx-int8"): (73.1, 76.4),
    }
    rows = []
    for (subject, target), (k, linear) in knn.items():
        rows.append(accuracy("knn_top1", k, subject, target, k=20))
        rows.append(accuracy("linear_top1", linear, subject, target, lr=1.0))
    mine = "students/small/torch-fp32"
    rows += [
        difference(12.2, 1.3, "teacher", "torch-fp32", "random/teacher/torch-fp32"),
        difference(20.3, 1.6, "teacher", "torch-fp32", "raw/pixels"),
        difference(7.3, 1.4, "students/small", "torch-fp32", "control/small/torch-fp32"),
        difference(-5.2, 1.2, "students/small", "torch-fp32", "teacher/torch-fp32"),
        difference(0.0, 0.1, "students/small", "onnx-fp32", mine),
        difference(-0.3, 0.5, "students/small", "onnx-int8", mine),
    ]
    for target, size, p50, rate, cos in (
        ("torch-fp32", 0.284, 1.42, 2210.0, None),
        ("onnx-fp32", 0.296, 0.412, 3350.0, 0.9999994),
        ("onnx-int8", 0.121, 0.291, 5120.0, 0.9962),
    ):
        rows.append(Row(metric="size_mb", value=size, subject="students/small", target=target, conditions={"resolution": 48}))
        rows.append(timing("latency_p50_ms", p50, target))
        rows.append(timing("latency_p50_ms", p50 * 5.5, target, batch=8))
        rows.append(timing("images_per_s", rate / 2, target))
        rows.append(timing("images_per_s", rate, target, batch=8))
        rows.append(Row(metric="peak_memory_mb", value=3.1, n=1, subject="students/small", target=target, conditions={"batch": 8}))
        for output in ("cls", "patches") if cos else ():
            conditions = {"resolution": 48, "output": output, "source": "torch-fp32"}
            value = cos - (0.003 if output == "patches" and cos < 0.999 else 0)
            rows.append(Row(metric="cosine_min", value=value, n=64, subject="students/small", target=target, conditions=conditions))
    rows.append(Row(metric="size_mb", value=0.61, subject="teacher", target="torch-fp32", conditions={"resolution": 48}))
    rows.append(timing("latency_p50_ms", 2.31, "torch-fp32", subject="teacher"))
    ratio = {"versus": "students/small/onnx-fp32", "verdict": "FASTER", "noise_floor_percent": 1.8}
    rows.append(timing("latency_ratio", 0.706, "onnx-int8", **ratio))
    rows.append(timing("latency_ratio", 3.45, "torch-fp32", **(ratio | {"verdict": "SLOWER"})))
    for target in ("rtx-fp16", "rtx-int8"):
        rows.append(Row(metric="size_mb", value=0.35, n=1, subject="students/small", target=target, conditions={"file": "engine"}))
        rows += [
            not_measured(metric, "students/small", target, NO_GPU, resolution=48, **more)
            for metric, more in (
                ("knn_top1", {}),
                ("linear_top1", {}),
                ("cosine_min", {"output": "cls"}),
                ("cosine_min", {"output": "patches"}),
                ("latency_p50_ms", {"batch": 1}),
                ("latency_p50_ms", {"batch": 8}),
                ("images_per_s", {"batch": 8}),
            )
        ]
    rows.append(Row(metric="noise_floor_percent", value=1.8, n=2, subject="all", target="all", conditions={"artifacts": "x"}))
    preprocess = {"photo": "640 x 480", "resolution": 48}
    rows.append(Row(metric="preprocess_p50_ms", value=1.9, subject="teacher", target="preprocess", conditions=preprocess))
    return rows


def believable_log(path, images, seed, floor):
    """A training log whose terms fall the way such terms fall, noise included."""
    random = np.random.default_rng(seed)
    steps = images // 64
    lines = []
    for step in range(0, steps, 5):
        t = step / steps
        terms = {
            "dino_global": 0.9 * (floor + (4.1 - floor) * math.exp(-4 * t)) + random.normal(0, 0.03),
            "ibot": 0.3 * (floor + 0.4 + 2.5 * math.exp(-3 * t)) + random.normal(0, 0.02),
            "koleo": 0.1 * (-1.2 + 2 * math.exp(-6 * t)) + random.normal(0, 0.004),
        }
        record = {"step": step, "images": (step + 1) * 64, "seconds": step * 0.3, "loss": sum(terms.values()), **terms}
        record["lr"] = 3e-3 * min(1, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * t))
        record["teacher_entropy"] = 1.4 + 2.2 * math.exp(-5 * t) + random.normal(0, 0.02)
        lines.append(json.dumps(record))
    write_text(path, "\n".join(lines) + "\n")


def believable_run(folder):
    write_json(folder / "run.json", {"format": "decant-run-1", "recipe": "quickstart", "made": "2026-01-31T10:00:00Z"})
    write_text(folder / "recipe.yaml", "# quickstart: rendered scenes\nname: quickstart\nseed: 0\nstudents:\n  small: {dim: 48}\n")
    for subject, images, seed, floor in (("teacher", 20000, 0, 1.9), ("students/small", 7680, 1, 2.2), ("control/small", 7680, 2, 2.6)):
        believable_log(folder / subject / "train.jsonl", images, seed, floor)
    for stage, where, seconds in (("pretrain", "teacher", 71.4), ("distill", "students", 33.0), ("evaluate", "evaluate", 21.0)):
        write_json(folder / where / "done.json", {"stage": stage, "seconds": seconds, "attempts": 1})
    return folder


def believable_strip():
    random = np.random.default_rng(0)
    grid = np.arange(96)
    pictures = []
    for i in range(8):
        wave = np.sin(grid / (3 + i))[None, :] * np.ones((96, 1)) if i % 2 else np.sin(grid / (3 + i))[:, None] * np.ones((1, 96))
        base = 128 + 90 * wave[..., None] * random.uniform(0.3, 1, 3)
        base[20 : 50 + i, 30 : 70 - i] = random.uniform(0, 255, 3)
        pictures.append(Image.fromarray(np.clip(base, 0, 255).astype(np.uint8)))
    config = {"heads": 2, "patch": 8, "image_size": 48, "layer_scale": 1.0, "init": "fan_in"}
    torch.manual_seed(0)
    encoders = {
        "teacher": TorchEncoder(Backbone(BackboneConfig(dim=64, depth=3, **config))),
        "students/small": TorchEncoder(Backbone(BackboneConfig(dim=48, depth=2, **config))),
    }
    return pca_strip(pictures, encoders, Preprocess(size=48, resize=48, normalize="per_image"))


@pytest.fixture(scope="module")
def strip():
    return believable_strip()


@pytest.fixture(scope="module")
def report(tmp_path_factory, strip):
    """Folder of a written report, for the tests that only read it."""
    run = believable_run(tmp_path_factory.mktemp("runs") / "quickstart")
    page = write_report(run, run / "report", believable_rows(), ReportConfig(), strip=strip)
    assert page == run / "report" / "index.html"
    return run / "report"
