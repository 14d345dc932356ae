"""Which file should I ship: answers worked out by hand, and the page's script held to the same ones."""

import itertools
import json
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import export
from distill.rows import Row, not_measured
from export.reporting.advice import Constraints, advise, presets
from export.reporting.candidates import candidates_of
from export.reporting.tables import Book

SCRIPT = Path(export.__file__).parent / "templates" / "advice.js"
SMALL = "students/small"


def rows_of(subject, target, knn, ms, mb, lost=None, half=1.0):
    about = {"resolution": 48}
    found = [Row(metric="size_mb", value=mb, subject=subject, target=target, conditions=about)]
    if knn is not None:
        interval = {"low": knn - half, "high": knn + half}
        found.append(Row(metric="knn_top1", value=knn, n=400, subject=subject, target=target, conditions=about, **interval))
    if ms is not None:
        for batch, value in ((1, ms), (8, 6 * ms)):
            interval = {"low": value * 0.9, "high": value * 1.1}
            conditions = {**about, "batch": batch}
            found.append(
                Row(
                    metric="latency_p50_ms",
                    value=value,
                    n=99,
                    subject=subject,
                    target=target,
                    conditions=conditions,
                    **interval,
                )
            )
    if lost is not None:
        conditions = {**about, "versus": f"{subject}/torch-fp32"}
        interval = {"low": -lost - 0.4, "high": -lost + 0.4}
        found.append(
            Row(
                metric="knn_top1_difference",
                value=-lost,
                n=400,
                subject=subject,
                target=target,
                conditions=conditions,
                **interval,
            )
        )
    return found


def kitchen():
    """Three files that run, one that does not, and two models in PyTorch."""
    return Book(
        [
            *rows_of("teacher", "torch-fp32", 90.0, 9.0, 4.0),
            *rows_of(SMALL, "torch-fp32", 84.0, 3.0, 1.2),
            *rows_of(SMALL, "onnx-fp32", 84.0, 2.0, 1.0, lost=0.0),
            *rows_of(SMALL, "onnx-int8", 83.2, 1.0, 0.3, lost=0.8),
            *rows_of(SMALL, "openvino-int8", 82.5, 0.5, 0.35, lost=1.5),
            *rows_of(SMALL, "rtx-int8", None, None, 0.4),
            not_measured("knn_top1", SMALL, "rtx-int8", "no GPU", resolution=48),
        ]
    )


def chosen(**wanted):
    return advise(kitchen(), Constraints(**wanted))


def test_the_best_is_the_most_accurate_file_that_meets_all():
    assert chosen().best == "students/small/onnx-fp32@48"  # the teacher is more accurate, and no file
    assert chosen(latency_ms=1.5).best == "students/small/onnx-int8@48"
    assert chosen(latency_ms=0.6).best == "students/small/openvino-int8@48"
    assert chosen(size_mb=0.32).best == "students/small/onnx-int8@48"
    assert chosen(runtime="openvino").best == "students/small/openvino-int8@48"
    assert chosen(prefer="latency", loss_points=1).best == "students/small/onnx-int8@48"
    assert chosen(prefer="latency").best == "students/small/openvino-int8@48"
    assert chosen(batch=8, latency_ms=7).best == "students/small/onnx-int8@48"
    assert chosen(latency_ms=1.0).best == "students/small/onnx-int8@48"  # inclusive


def test_reasons_name_the_number_and_the_limit():
    others = {label: reasons for _, label, reasons in chosen(latency_ms=1.5, loss_points=1).others}
    assert others["small, ONNX FP32"] == ["its latency at batch 1, 2.00 ms (1.80 to 2.20), is above 1.5 ms"]
    assert others["small, OpenVINO INT8"] == [
        "its loss against the same model in FP32, 1.5 points (1.1 to 1.9), is above 1 points",
    ]
    assert others["small, TensorRT-RTX INT8"] == [
        "its kNN accuracy was not measured",
        "its latency at batch 1 was not measured",
        "its loss against the same model in FP32 was not measured",
    ]


def test_intervals_that_cross_a_limit_are_said():
    advice = chosen(latency_ms=1.05)
    assert advice.notes[0] == (
        "Its latency at batch 1, 1.00 ms (0.900 to 1.10), meets 1.05 ms, but the interval reaches beyond."
    )
    reasons = next(r for _, label, r in chosen(latency_ms=0.95).others if label == "small, ONNX INT8")
    assert reasons == ["its latency at batch 1, 1.00 ms (0.900 to 1.10), is above 0.95 ms, though the interval reaches it"]


def test_a_faster_one_that_may_be_as_accurate_is_named():
    assert chosen().notes == [
        "small, ONNX INT8 takes less time, 1.00 ms (0.900 to 1.10), and its interval of accuracy reaches the same value."
    ]


def test_nothing_meets_it_and_what_comes_nearest():
    advice = chosen(latency_ms=0.4)
    assert advice.best is None
    assert advice.nearest == "students/small/openvino-int8@48"  # 25 % above; the next 150 %
    assert advice.sentence.startswith("Nothing measured meets this. Nearest comes small, OpenVINO INT8: kNN accuracy 82.5 %")
    assert advice.sentence.endswith("its latency at batch 1, 0.500 ms (0.450 to 0.550), is above 0.4 ms.")
    assert chosen(runtime="rtx").nearest is None
    assert advise(Book([]), Constraints()).sentence == "Nothing measured meets this."


def test_loss_against_the_teacher_is_told_as_not_paired():
    """No paired row: 90 - 83.2 with the interval of two independent shares, sqrt(1 + 1) to each side."""
    candidate = next(c for c in candidates_of(kitchen()) if c.target == "onnx-int8")
    lost = candidate.loss["teacher"]
    assert lost.value == pytest.approx(6.8)
    assert (lost.low, lost.high) == (pytest.approx(6.8 - 2**0.5), pytest.approx(6.8 + 2**0.5))
    assert not candidate.paired["teacher"]
    assert candidate.paired["fp32"]
    assert "not paired" in chosen(loss_points=7, versus="teacher", latency_ms=1.5).sentence


def test_presets():
    found = candidates_of(kitchen())
    assert [(p.name, p.choice.target) for p in presets(found, "knn_top1")] == [
        ("Fastest within 1 point", "onnx-int8"),
        ("Smallest within 1 point", "onnx-int8"),
        ("Most accurate", "onnx-fp32"),
    ]


def many():
    """Ties, missing numbers and crossing intervals by chance."""
    random = np.random.default_rng(0)
    rows = rows_of("teacher", "torch-fp32", 90.0, 9.0, 4.0)
    for i, (runtime, precision) in enumerate(itertools.product(("onnx", "openvino", "rtx"), ("fp32", "int8", "fp16", "w8"))):
        knn = None if i % 5 == 4 else float(np.round(random.normal(83, 1), 1))
        ms = None if i % 7 == 6 else float(random.choice([0.5, 1.0, 1.37, 2.25]))
        lost = None if i % 4 == 3 else float(np.round(random.normal(0.8, 0.8), 2))
        rows += rows_of(SMALL, f"{runtime}-{precision}", knn, ms, float(random.choice([0.3, 0.5, 1.0])), lost)
    return candidates_of(Book(rows))


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_page_gives_the_same_answers(tmp_path):
    values = {
        "latency_ms": (None, 0.4, 1, 1.05),
        "size_mb": (None, 0.2, 0.5),
        "loss_points": (None, 0, 1.2),
        "versus": ("fp32", "teacher"),
        "runtime": ("any", "rtx", "trt"),
        "batch": (None, 8),
        "prefer": ("accuracy", "latency", "size"),
    }
    cases = [dict(zip(values, case, strict=True)) for case in itertools.product(*values.values())]
    for found in (many(), candidates_of(kitchen()), []):
        points = [{k: v for k, v in asdict(c).items() if v is not None} for c in found]
        (tmp_path / "cases.json").write_text(json.dumps({"points": points, "cases": cases}))
        code = SCRIPT.read_text() + (
            "\nconst given = JSON.parse(require('fs').readFileSync(process.argv[2], 'utf8'));"
            "\nconsole.log(JSON.stringify(given.cases.map((c) => advise(given.points, c, 'kNN'))));"
        )
        (tmp_path / "run.js").write_text(code)
        told = subprocess.run(
            ["node", tmp_path / "run.js", tmp_path / "cases.json"], capture_output=True, text=True, check=True
        )
        for case, theirs in zip(cases, json.loads(told.stdout), strict=True):
            ours = json.loads(json.dumps(asdict(advise(found, Constraints(**case)))))
            assert ours == theirs, case
