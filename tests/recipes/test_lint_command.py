"""`decant lint`: exit codes, the table, JSON, and SARIF that code review accepts."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from export.lint import all_rules
from recipes.cli import app


def run(*arguments: object):
    return CliRunner().invoke(app, ["lint", *map(str, arguments)])


def linear(weight: np.ndarray) -> ModelProto:
    """images [batch, 17, 32] -> y [batch, 17, 16] by one layer called fc."""
    x = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 17, 32])]
    y = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 17, 16])]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")]
    graph = helper.make_graph(nodes, "g", x, y, [numpy_helper.from_array(weight.astype(np.float32), "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def healthy(tmp_path) -> Path:
    path = tmp_path / "healthy.onnx"
    onnx.save(linear(np.ones((32, 16))), path)
    return path


@pytest.fixture
def broken(tmp_path) -> Path:
    """FP32 under an FP16 name, and NaN in the weight."""
    weight = np.ones((32, 16))
    weight[3, 4] = np.nan
    path = tmp_path / "broken_fp16.onnx"
    onnx.save(linear(weight), path)
    return path


def test_a_healthy_file(healthy):
    result = run(healthy)
    assert result.exit_code == 0
    assert "nothing found" in result.stdout


def test_errors_end_with_1_and_a_cure(broken):
    result = run(broken)
    assert result.exit_code == 1
    words = " ".join(result.stdout.split())
    assert "2 errors" in words
    assert "nan-weights w" in words
    assert "Cure: Export again from a checkpoint without it" in words


def test_warnings_end_with_0(tmp_path):
    model = linear(np.ones((32, 16)))
    model.graph.node[0].input[0] = "half_way_back"
    for i, (source, to, out) in enumerate((("x", TensorProto.FLOAT16, "half"), ("half", TensorProto.FLOAT, "half_way_back"))):
        model.graph.node.insert(i, helper.make_node("Cast", [source], [out], name=f"cast{i}", to=to))
    onnx.save(model, tmp_path / "m.onnx")
    result = run(tmp_path / "m.onnx", "--json")
    assert [(f["rule"], f["severity"]) for f in json.loads(result.stdout)[0]["findings"]] == [("cast-ping-pong", "warning")]
    assert result.exit_code == 0


def test_precision_by_option(healthy):
    result = run(healthy, "--precision", "int8")
    assert result.exit_code == 1
    assert "precision-mismatch" in result.stdout
    assert run(healthy, "--precision", "fp32").exit_code == 0
    refused = run(healthy, "--precision", "int9")
    assert (refused.exit_code, refused.stderr.strip()) == (
        2,
        "--precision int9 is none of fp32, fp16, bf16, int8, fp8, w8, w4.",
    )
    assert run(healthy, "--for", "tflite").exit_code == 2


def test_several_files_as_json(healthy, broken):
    result = run(healthy, broken, "--json")
    assert result.exit_code == 1
    value = json.loads(result.stdout)
    assert [v["file"] for v in value] == [str(healthy), str(broken)]
    assert value[0]["findings"] == []
    assert {f["rule"] for f in value[1]["findings"]} == {"nan-weights", "precision-mismatch"}
    assert all(set(f) >= {"rule", "severity", "where", "message", "cure"} for f in value[1]["findings"])


def test_what_cannot_be_read_ends_with_2(tmp_path, healthy):
    (tmp_path / "cut.onnx").write_bytes(healthy.read_bytes()[:60])
    for path, said in ((tmp_path / "cut.onnx", "is truncated"), (tmp_path / "none.onnx", "no file"), (tmp_path, "a folder")):
        result = run(healthy, path)
        assert result.exit_code == 2
        assert said in result.stderr
        assert "Traceback" not in result.stderr


# --- SARIF 2.1.0: what the schema requires and what GitHub requires on top ---


def test_sarif_for_code_review(healthy, broken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(healthy.name, broken.name, "--sarif", "out.sarif")
    assert result.exit_code == 1
    assert "2 errors" in result.stdout, "the table is shown as well"
    log = json.loads((tmp_path / "out.sarif").read_text())
    check_sarif(log)
    results = log["runs"][0]["results"]
    assert {r["ruleId"] for r in results} == {"nan-weights", "precision-mismatch"}
    location = next(r for r in results if r["ruleId"] == "nan-weights")["locations"][0]
    assert location["physicalLocation"]["artifactLocation"]["uri"] == "broken_fp16.onnx", "relative to the repository"
    assert location["logicalLocations"] == [{"name": "w", "fullyQualifiedName": "broken_fp16.onnx::w", "kind": "element"}]


def test_sarif_on_the_standard_output(broken):
    result = run(broken, "--sarif", "-")
    assert result.exit_code == 1
    check_sarif(json.loads(result.stdout))
    both = run(broken, "--sarif", "-", "--json")
    assert both.exit_code == 2
    assert "both print to the standard output" in both.stderr


def test_sarif_without_findings_still_names_the_rules(healthy):
    log = json.loads(run(healthy, "--sarif", "-").stdout)
    check_sarif(log)
    assert log["runs"][0]["results"] == []
    assert len(log["runs"][0]["tool"]["driver"]["rules"]) == len(all_rules()) >= 30


def test_sarif_that_cannot_be_written(broken, tmp_path):
    (tmp_path / "file").write_text("")
    result = run(broken, "--sarif", tmp_path / "file" / "out.sarif")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr


def check_sarif(log: dict) -> None:
    """SARIF 2.1.0 sections 3.13, 3.14, 3.27, 3.49 and GitHub's "SARIF support for code scanning"."""
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-2.1.0.json")
    assert len(log["runs"]) == 1
    driver = log["runs"][0]["tool"]["driver"]
    assert driver["name"]
    ids = [r["id"] for r in driver["rules"]]
    assert len(ids) == len(set(ids))
    for rule in driver["rules"]:
        for field in ("shortDescription", "fullDescription", "help"):
            assert 0 < len(rule[field]["text"]) <= 1024, (rule["id"], field)
        assert rule["defaultConfiguration"]["level"] in ("error", "warning", "note")
        assert "Cure" in rule["help"]["markdown"]
    for result in log["runs"][0]["results"]:
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("error", "warning", "note")
        assert result["message"]["text"]
        assert result["partialFingerprints"]
        for location in result["locations"]:
            uri = location["physicalLocation"]["artifactLocation"]["uri"]
            assert "\\" not in uri
            assert " " not in uri
            assert location["physicalLocation"]["region"]["startLine"] >= 1
