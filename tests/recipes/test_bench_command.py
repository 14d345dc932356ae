"""`decant bench` on files: tables of 80 columns, JSON, CSV, exit codes; a run is still measured by its recipe."""

import csv
import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from distill.rows import Row
from recipes.bench import BUSY
from recipes.bench_table import number, sentences
from recipes.cli import app

SHORT = ("--seconds", "0.05", "--rounds", "6", "--threads", "1", "--quiet")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments, code=0):
        found = CliRunner().invoke(app, ["bench", *map(str, arguments)])
        assert found.exit_code == code, found.output
        return found

    return run


def network(path, width, shape=("batch", 16), layers=1):
    weight = numpy_helper.from_array(np.full((width, width), 1 / width, np.float32), "w")
    nodes = [helper.make_node("MatMul", [f"x{i}", "w"], [f"x{i + 1}"]) for i in range(layers)]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x0", shape), (f"x{layers}", None)))
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture
def files(tmp_path):
    return network(tmp_path / "a.onnx", 16), network(tmp_path / "large.onnx", 512, ("batch", 512), 20)


def test_files_against_each_other(bench, files, tmp_path):
    a, large = files
    out = bench(a, large, *SHORT, "--batch", 1, "--batch", 4, "--json", tmp_path / "o.json", "--csv", tmp_path / "o.csv").stdout
    assert max(map(len, out.splitlines())) <= 80
    words = " ".join(out.split())
    assert "Latency, ms a call" in words
    assert "Time as a multiple of a.onnx onnxruntime's" in words
    assert "Noise floor" in words
    assert "Not measured: build time: it was not built here" in words
    stored = json.loads((tmp_path / "o.json").read_text())
    assert stored["format"] == "decant-bench-1"
    assert stored["fingerprint"]["cpu"]["usable_threads"] >= 1
    rows = [Row(**r) for r in stored["rows"]]
    assert {r.metric for r in rows} >= {
        *("latency_p50_ms", "latency_p90_ms", "images_per_s", "latency_ratio", "size_mb", "load_s", "peak_memory_mb"),
        *("build_s", "energy_mj_per_image", "noise_floor_percent"),
    }
    ratios = [r for r in rows if r.metric == "latency_ratio"]
    assert [(r.subject, r.conditions["versus"], r.conditions["batch"]) for r in ratios] == [
        ("large.onnx", "a.onnx/onnxruntime", 1),
        ("large.onnx", "a.onnx/onnxruntime", 4),
    ]
    table = list(csv.DictReader((tmp_path / "o.csv").read_text().splitlines()))
    assert len(table) == len(rows)
    assert json.loads(table[0]["conditions"]) == rows[0].conditions
    assert {row["batch"] for row in table if row["metric"] == "latency_p50_ms"} == {"1", "4"}


def test_versus_and_a_grid_of_threads(bench, files, tmp_path):
    a, large = files
    bench(a, large, *SHORT, "--threads", 2, "--versus", large, "--json", tmp_path / "o.json")
    rows = [Row(**r) for r in json.loads((tmp_path / "o.json").read_text())["rows"]]
    found = [(r.subject, r.conditions["versus"], r.conditions["threads"]) for r in rows if r.metric == "latency_ratio"]
    assert found == [("a.onnx", "large.onnx/onnxruntime", n) for n in (1, 2)]


def test_a_fixed_batch_is_the_default(bench, tmp_path):
    out = bench(network(tmp_path / "fixed.onnx", 16, (3, 16)), *SHORT, "--json", tmp_path / "o.json")
    rows = [Row(**r) for r in json.loads((tmp_path / "o.json").read_text())["rows"]]
    assert [r.conditions["batch"] for r in rows if r.metric == "latency_p50_ms" and r.value] == [3]
    assert "Time as a multiple" not in out.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing.onnx"], "There is no file nothing.onnx"),
        (["letter.onnx"], "not an ONNX file"),
        (["a.onnx", "a.onnx"], "is named twice"),
        (["a.onnx", "--runtime", "tflite"], "--runtime tflite is none of onnxruntime, openvino"),
        (["a.onnx", "--versus", "b.onnx"], "--versus b.onnx is none of the targets"),
        (["a.onnx", "--rounds", "2"], "--rounds must be at least 6"),
        (["a.onnx", "--seconds", "-1"], "--seconds must be above 0"),
        (["ids.onnx"], "leaves dimension 1 (sequence) of its input x0 open"),
        (["a.onnx", "run"], "run is a run; name it alone"),
        (["run", "--batch", "2"], "measured with its recipe's settings, without --batch"),
        (["run"], "not a run's folder"),
        (["a.onnx", "--json", "letter.onnx/o.json"], "cannot be written"),
        (["b.tar.gz"], "was refused"),
    ],
)
def test_mistakes_are_one_sentence(bench, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    network(tmp_path / "a.onnx", 16)
    network(tmp_path / "ids.onnx", 16, ("batch", "sequence"))
    (tmp_path / "letter.onnx").write_text("Dear aunt,")
    (tmp_path / "b.tar.gz").write_bytes(b"not an archive")
    (tmp_path / "run").mkdir()
    found = bench(*arguments, "--quiet", code=2)
    assert sentence in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


def test_an_engine_without_a_gpu_is_not_measured(bench, tmp_path, monkeypatch):
    monkeypatch.setattr("export.stopwatch.bench_graphs.gpu_capability", lambda: None)
    (tmp_path / "m.engine").write_bytes(b"vtrt\0\0\0\0plan")
    found = bench(tmp_path / "m.engine", *SHORT, code=3)
    assert "no CUDA GPU on this machine" in found.stderr
    assert "Not measured: latency, throughput, load time: no CUDA GPU" in " ".join(found.stdout.split())
    beside = bench(network(tmp_path / "a.onnx", 16), tmp_path / "m.engine", *SHORT)  # something was measured
    assert "load time of m.engine tensorrt_rtx: no CUDA GPU" in " ".join(beside.stdout.split())


def test_openvino_that_is_missing(bench, files, monkeypatch):
    from distill.errors import EnvironmentFailed

    def missing():
        raise EnvironmentFailed("openvino is not installed; pip install 'decant-vision[openvino]'.")

    monkeypatch.setattr("export.stopwatch.bench_files.load_openvino", missing)
    assert "decant-vision[openvino]" in bench(files[0], "--runtime", "openvino", code=3).stderr


def test_others_at_work_are_told():
    conditions = {"other_cores_busy": 1.5, "batch": 1}
    row = Row(metric="latency_p50_ms", value=1.0, low=0.9, high=1.1, subject="a", target="onnxruntime", conditions=conditions)
    assert "Other processes kept 1.5 of 2 processors busy" in " ".join(sentences([row], 2, BUSY))
    quiet = row.model_copy(update={"conditions": {**conditions, "other_cores_busy": 0.05}})
    assert sentences([quiet], 2, BUSY) == []


def test_numbers():
    assert [number(x) for x in (None, 0.01234, 1.5, 99.96, 123.4, 12345.6)] == [
        *("not measured", "0.0123", "1.5", "100", "123", "12,346"),
    ]
