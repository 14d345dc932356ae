"""A device that answers whatever it likes: it fails by itself, with a clause, and takes nothing with it."""

import json
import sys
import time
from pathlib import Path

import pytest
from device_lab import QUIET, device
from tiny_bundle import tiny_artifacts, tiny_bundle

from distill.errors import EnvironmentFailed
from distill.files import sha256_file
from distill.rows import Row, read_rows
from export.bundle import BundleConfig
from export.bundling.verify import verify
from export.devices import ssh as ssh_module
from export.devices.address import parse_address
from export.devices.answers import read_answer, read_report
from export.devices.fleet import Job, run_fleet
from export.devices.rows import rows_home
from export.devices.ssh import DeviceFailed, Ssh
from export.report import csv_text
from recipes.device import clean, look

FAKE = """#!{python}
import json, os, shlex, sys
request = json.loads(shlex.split(sys.argv[-1])[-1])
answers = json.load(open({file!r}))
print({mark!r} + answers.get(request.get("script", request["do"]), '{{"ok": true}}'), flush=True)
while request["do"] == "hold" and os.read(0, 1 << 16):
    pass
"""
ROW = {
    "metric": "latency_p50_ms",
    "target": "onnx-fp32",
    "value": 1.0,
    "n": 5,
    "status": "measured",
    "conditions": {"resolution": 32, "batch": 1},
}


def worked(report: str, code: int = 0) -> str:
    return json.dumps({"ok": True, "code": code, "late": False, "seconds": 1, "stdout": report, "has_engines": False})


def report(form: str, **more) -> str:
    return json.dumps({"format": form, "exit_code": 0, **more})


BENCH, SELFTEST = "decant-device-bench-1", "decant-selftest-1"
GOOD = {
    "offer": '{"ok": true, "whole": true}',
    "unpack": '{"ok": true, "folder": "x", "again": false}',
    "build_engine.py": '{"ok": true, "absent": true}',
    "bench.py": worked(report(BENCH, rows=[ROW], machine={"cpu": "x", "threads": 2})),
    "selftest.py": worked(report(SELFTEST, results=[])),
}


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    folder = tmp_path_factory.mktemp("bundle")
    bundle = tiny_bundle(folder, tiny_artifacts(folder, ["onnx-fp32"]), BundleConfig(golden_images=1))
    return Job(verify(bundle), sha256_file(bundle), "students/small", backoff=0.01)


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """A function that says what the device answers, by request or script."""
    (tmp_path / "bin").mkdir()
    file = tmp_path / "answers.json"
    script = FAKE.format(python=sys.executable, file=str(file), mark=ssh_module.MARK.decode())
    (tmp_path / "bin/ssh").write_text(script)
    (tmp_path / "bin/ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    return lambda **found: file.write_text(json.dumps(GOOD | {k.replace("__", "."): v for k, v in found.items()}))


@pytest.mark.parametrize(
    ("do", "text"),
    [
        ("offer", '{"ok": true}'),
        ("offer", '{"ok": true, "whole": false, "bytes": "x", "sha256": ""}'),
        ("receive", '{"ok": true}'),
        ("receive", '{"ok": true, "bytes": -1}'),
        ("work", '{"ok": true, "code": 0}'),
        ("work", '{"ok": true, "code": 0, "late": false, "seconds": 1, "stdout": 5, "has_engines": false}'),
        ("work", '{"ok": true, "code": 0, "late": false, "seconds": NaN, "stdout": "", "has_engines": false}'),
        ("work", '{"ok": true, "code": 0, "late": false, "seconds": 1e999, "stdout": "", "has_engines": false}'),
        ("about", '{"ok": true, "about": 5}'),
        ("about", '{"ok": true, "about": {"a": [1]}}'),
        ("clean", '{"ok": true, "bytes": "all"}'),
        ("clean", '{"ok": "yes", "bytes": 1}'),
        ("clean", "[1]"),
        ("clean", '{"ok": true, "bytes": 1, "bytes": 2}'),
        ("clean", '{"ok": true, "bytes": 1' + "0" * 30 + "}"),
    ],
)
def test_malformed_answers_are_refused(do, text):
    with pytest.raises(ValueError, match=r"^its answer "):
        read_answer(do, text.encode())


@pytest.mark.parametrize(
    "more",
    [
        '"results": 5',
        '"rows": [7]',
        '"rows": [{"conditions": [1]}]',
        '"rows": [{"text": 3}]',
        '"machine": [1]',
        '"x": NaN',
        '"x": -Infinity',
        '"x": 1e999',
        '"x": "\\ud800"',
        '"\\udfff": 1',
        '"x": ' + "[" * 900 + "]" * 900,
        '"exit_code": "0"',
    ],
)
def test_malformed_reports_are_refused(more):
    rest = f'"format": "{BENCH}"' + ("" if "exit_code" in more else ', "exit_code": 0')
    with pytest.raises(ValueError, match=r"^its report "):
        read_report(f"{{{more}, {rest}}}", BENCH)
    assert read_report(report(BENCH, rows=[ROW], new=[{"é": 1.5}]), BENCH)["rows"] == [ROW]


def test_a_device_fails_by_itself(answers, job, tmp_path):
    answers(offer='{"ok": true}')
    (outcome,) = run_fleet(job, [device("one")], tmp_path / "out", QUIET)
    assert outcome.exit_code == 3
    assert "its answer to `offer` is none that this version reads" in str(outcome.reason)
    answers(bench__py=worked(report(BENCH, machine={"a": float("nan")})))
    (outcome,) = run_fleet(job, [device("one")], tmp_path / "out", QUIET)
    assert (outcome.status, outcome.steps["selftest"]["status"]) == ("failed", "done")
    assert "NaN is not JSON" in str(outcome.reason)
    assert json.loads((tmp_path / "out/one/device.json").read_text())["reason"] == outcome.reason
    answers()
    (outcome,) = run_fleet(job, [device("one")], tmp_path / "out", QUIET)
    assert (outcome.status, outcome.reason) == ("done", None)
    (row,) = read_rows(tmp_path / "out/one/rows.jsonl")
    listed = {f.path: f.sha256 for f in job.bundle.manifest.files}
    assert row.conditions["artifact_sha256"] == listed["artifacts/onnx-fp32/model_32.onnx"]


def test_results_that_were_measured_outlive_later_attempts(answers, job, tmp_path):
    """Measured, failed, failed, measured, failed: the last measured numbers stay in place, and those before them in `previous`."""
    out = tmp_path / "out/one"

    def run(value: float | None) -> None:
        rows = [] if value is None else [{**ROW, "value": value}]
        answers(bench__py=worked(report(BENCH, rows=rows)))
        run_fleet(job, [device("one")], tmp_path / "out", QUIET)

    def value(folder: Path) -> float | None:
        return read_rows(folder / "rows.jsonl")[0].value

    run(1.0)
    run(None)
    assert (value(out), value(out / "last_attempt")) == (1.0, None)
    run(None)
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["last_attempt"]
    run(2.0)
    assert (value(out), value(out / "previous")) == (2.0, 1.0)
    run(None)
    assert (value(out), value(out / "previous"), value(out / "last_attempt")) == (2.0, 1.0, None)


def test_rows_keep_only_what_the_scripts_measure():
    def home(**change) -> list[Row]:
        return rows_home({"bench": {"rows": [{**ROW, **change}]}}, "students/small", {}, {})

    assert len(home()) == 1
    wrong = [
        {"value": -3.0}, {"n": 0}, {"low": 9.0, "high": 2.0}, {"low": -1.0, "high": 2.0}, {"metric": "knn_top1"}, {"value": float("inf")},
        {"metric": "cosine_min", "value": -1.5},
    ]  # fmt: skip
    assert [home(**w) for w in wrong] == [[]] * len(wrong)
    (row,) = home(conditions={"resolution": 32, "batch": float("nan"), "load": float("inf"), "artifact_sha256": "mine"})
    assert row.conditions == {"resolution": 32}
    assert len(home(metric="cosine_min", value=-0.5)) == 1


def test_no_cell_of_the_table_is_a_formula():
    row = Row(metric="latency_p50_ms", value=1.5, low=-2.0, subject="s", target="=cmd|x", conditions={"@a": "+1", "b": -1})
    head, line = csv_text([row]).splitlines()
    assert head.endswith(",'@a,b")
    assert line == "s,'=cmd|x,latency_p50_ms,1.5,-2.0,,,measured,,'+1,-1"


def test_list_and_clean_take_nothing_malformed_and_keep_the_names(answers, capsys):
    answers(about='{"ok": true, "about": {"name": "mine", "reason": "x", "on": "y", "python": "3.9"}}')
    look([device("one")], None, True)
    told = {"name": "one", "on": "ssh://one", "reason": None, "python": "3.9"}
    assert json.loads(capsys.readouterr().out) == [told | {"missing": ["numpy", "Pillow", "a runtime"]}]
    answers(about='{"ok": true}')
    with pytest.raises(EnvironmentFailed, match="its answer to `about` is none"):
        look([device("one")], None, False)
    answers(clean='{"ok": false, "why": "busy"}')
    with pytest.raises(EnvironmentFailed, match=r"Not every device was cleaned \(one: busy\)"):
        clean([device("one")], None, False)
    assert "not cleaned: busy" in capsys.readouterr().out


def test_floods_end_at_the_limit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setattr(ssh_module, "MOST_ANSWER", 1 << 20)
    monkeypatch.setattr(ssh_module, "MOST_ERRORS", 1 << 20)
    (tmp_path / "bin").mkdir()

    def ssh(body: str) -> Ssh:
        (tmp_path / "bin/ssh").write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin/ssh").chmod(0o755)
        return Ssh(parse_address("ssh://x"), "python3", None, tmp_path / "log", tmp_path)

    begun = time.monotonic()
    with pytest.raises(DeviceFailed, match="more than 1 MB"):
        ssh("exec yes").ask("about", timeout=600)
    with pytest.raises(DeviceFailed, match="more than 1 MB"), ssh("exec yes").held("t"):
        pass
    assert time.monotonic() - begun < 300
    with pytest.raises(ssh_module.Unreachable, match=r"me@x: Permission denied"):
        ssh("yes flood | head -c 3000000 >&2; echo 'me@x: Permission denied (publickey).' >&2; exit 255").ask(
            "about", timeout=60
        )
    assert (1 << 20) <= (tmp_path / "log").stat().st_size < (1 << 20) + 100
