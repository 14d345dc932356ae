"""report.json against its published schema, whatever run it is of; and which command measures what again."""

import json

import pytest

from distill.files import write_json
from export.report import write_report
from export.reporting.report_schema import VERSION, json_schema
from export.reporting.reproduce import families, whole_run
from tests.export import compressed_run as sample
from tests.export.test_report import believable_rows, believable_run

jsonschema = pytest.importorskip("jsonschema")


def check(folder):
    validator = jsonschema.Draft202012Validator(json_schema())
    found = json.loads((folder / "report.json").read_text())
    assert [f"{list(e.absolute_path)}: {e.message}" for e in validator.iter_errors(found)] == []
    return found


def test_the_schema_is_one_and_carries_its_version():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$id"] == f"urn:decant:report:{VERSION}"
    assert schema["properties"]["schema_version"]["const"] == VERSION
    assert {"rows", "fingerprint", "advice", "reproduce"} <= set(schema["required"])


def test_reports_meet_their_schema(tmp_path):
    run = believable_run(tmp_path / "r")
    write_report(run, run / "report", believable_rows())
    found = check(run / "report")
    assert [c["name"] for c in found["advice"]] == ["Fastest within 1 point", "Smallest within 1 point", "Most accurate"]
    assert found["advice"][0]["best"] == "students/small/onnx-int8@48"
    full = sample.run(tmp_path / "compressed")
    write_report(full, full / "report", sample.rows())
    assert check(full / "report")["compression"]["artifacts"]
    (tmp_path / "empty").mkdir()
    write_report(tmp_path / "empty", tmp_path / "empty" / "report", [])
    check(tmp_path / "empty" / "report")


def test_damaged_files_do_not_break_it(tmp_path):
    run = believable_run(tmp_path / "r")
    with (run / "teacher" / "train.jsonl").open("a") as log:
        log.write('{"step": 9, "images": 99999, "loss": NaN}\n')
    write_json(run / "run.json", {"format": "decant-run-1", "name": "mine", "more": [1, {"x": None}]})
    write_report(run, run / "report", believable_rows())
    check(run / "report")


def test_what_is_wrong_does_not_meet_it(tmp_path):
    run = believable_run(tmp_path / "r")
    write_report(run, run / "report", believable_rows())
    found = json.loads((run / "report" / "report.json").read_text())
    validator = jsonschema.Draft202012Validator(json_schema())
    for change in ({"schema": "decant-report-9"}, {"surprise": 1}, {"rows": [{"metric": "x"}]}, {"summary": "text"}):
        assert not validator.is_valid(found | change)


def test_every_number_has_its_command():
    found = {f.command: f.names for f in families(believable_rows(), "runs/q")}
    assert list(found) == ["decant eval runs/q", "decant bench runs/q"]
    assert found["decant eval runs/q"] == ["kNN", "linear probe", "kNN difference", "parity"]
    assert "latency" in found["decant bench runs/q"]
    assert "size" in found["decant bench runs/q"]
    assert whole_run("c0ffee-modified", "q")[:2] == [
        "# the code differed from this commit: see the fingerprint",
        "git checkout c0ffee",
    ]


def test_the_command_prints_it():
    from typer.testing import CliRunner

    from recipes.cli import app

    assert json.loads(CliRunner().invoke(app, ["schema", "--report"]).stdout) == json_schema()
