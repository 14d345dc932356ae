"""Rows for trackers: names, values, the real TensorBoard and MLflow where installed, and a tracker that fails."""

import sys
import types

import pytest

from distill.rows import Row, not_measured
from export.reporting import trackers
from export.reporting.trackers import scalars, send, steps

ROWS = [
    Row(
        metric="knn_top1",
        value=80.0,
        low=78.0,
        high=82.0,
        subject="students/small",
        target="onnx-int8",
        conditions={"resolution": 48},
    ),
    Row(
        metric="latency_p50_ms",
        value=1.5,
        subject="students/small",
        target="onnx-int8",
        conditions={"batch": 8, "runtime": "x"},
    ),
    not_measured("latency_p50_ms", "students/small", "rtx-int8", "no GPU"),
]
CURVES = {"teacher": [{"images": 64, "step": 1, "loss": 3.0, "note": "text"}, {"images": 128, "step": 2, "loss": float("nan")}]}


def test_names_tell_rows_apart_and_absent_numbers_are_absent():
    assert scalars(ROWS) == {
        "students/small/onnx-int8/knn_top1/resolution 48": 80.0,
        "students/small/onnx-int8/knn_top1/resolution 48/low": 78.0,
        "students/small/onnx-int8/knn_top1/resolution 48/high": 82.0,
        "students/small/onnx-int8/latency_p50_ms/batch 8": 1.5,
    }


def test_curves_are_numbers_over_images():
    assert list(steps(CURVES)) == [("teacher/training/loss", 64, 3.0)]


def test_tensorboard_reads_back_what_was_sent(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # again: the old events are gone
        assert send("tensorboard", ROWS, CURVES, "run", tmp_path) is None
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert len(events.Tags()["scalars"]) == 5
    (value,) = events.Scalars("students/small/onnx-int8/knn_top1/resolution 48")
    assert value.value == 80.0
    assert [(e.step, e.value) for e in events.Scalars("teacher/training/loss")] == [(64, 3.0)]


def test_mlflow_and_trackio_get_every_number(tmp_path, monkeypatch):
    said = {}
    run = types.SimpleNamespace(__enter__=lambda s: s, __exit__=lambda s, *a: None)

    class Run:
        def __enter__(self):
            return run

        def __exit__(self, *a):
            return None

    mlflow = types.ModuleType("mlflow")
    mlflow.set_tracking_uri = lambda uri: said.update(uri=uri)
    mlflow.set_experiment = lambda name: None
    mlflow.start_run = lambda run_name: Run()
    mlflow.log_metrics = lambda values: said.update(values)
    mlflow.log_metric = lambda name, value, step: said.update({(name, step): value})
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert send("mlflow", ROWS, CURVES, "run", tmp_path) is None
    assert said["uri"].endswith("mlflow.db")
    assert said["students/small/onnx-int8/latency_p50_ms/batch 8"] == 1.5
    assert said["teacher/training/loss", 64] == 3.0

    logged = []
    trackio = types.ModuleType("trackio")
    trackio.init = lambda **kwargs: None
    trackio.log = lambda values, step: logged.append((step, values))
    trackio.finish = lambda: logged.append("finished")
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    assert send("trackio", ROWS, CURVES, "run", tmp_path) is None
    assert logged == [(64, {"teacher/training/loss": 3.0}), (65, scalars(ROWS)), "finished"]


def test_an_absent_or_failing_tracker_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert "pip install mlflow" in send("mlflow", ROWS, CURVES, "run", tmp_path)

    def refuse(*_):
        raise ConnectionError("no server at home\nmore")

    monkeypatch.setitem(trackers.SENDERS, "trackio", refuse)
    assert send("trackio", ROWS, CURVES, "run", tmp_path) == (
        "trackio took no rows (ConnectionError: no server at home). The report has them all."
    )
