"""What is said of devices, where, and how: the terminal's blocks, the page, reasons that name no host."""

import io
import json
from pathlib import Path

import pytest
from device_lab import QUIET, Lab, device, without
from rich.console import Console
from tiny_bundle import tiny_artifacts, tiny_bundle
from typer.testing import CliRunner

from distill.errors import EnvironmentFailed
from distill.files import sha256_file, write_json
from distill.rows import Row, not_measured, write_rows
from export.bundling.bundle_config import BundleConfig
from export.bundling.verify import Trust, verify
from export.devices.fleet import Job, run_fleet
from export.devices.telling import clause, reason_told, told_of, unnamed
from export.report import write_report
from recipes.bench_table import device_gaps, device_table
from recipes.cli import app
from recipes.device import look
from recipes.device import run as run_command

ALL_RUNTIMES = ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    return tiny_bundle(folder, tiny_artifacts(folder, ["onnx-fp32"]), BundleConfig(golden_images=2))


@pytest.fixture
def lab(tmp_path, monkeypatch) -> Lab:
    made = Lab(tmp_path / "lab")
    monkeypatch.setenv("PATH", str(made.folder / "bin"), prepend=":")
    return made


def test_hosts_users_and_folders_are_not_told():
    text = (
        "me@orin.local: /home/me/x.onnx of orin.local is damaged, see ssh://orin/x; tensorrt 10.3.0.26, artifacts/a/model.onnx"
    )
    told = unnamed(text, "orin.local")
    assert told == "[...] [...] of the device is damaged, see [...] tensorrt 10.3.0.26, artifacts/a/model.onnx"
    assert reason_told("3 MB are free there and 5 are needed", "orin", "failed") == "3 MB are free there and 5 are needed"
    for named in ("the folder /data/x holds other files", "orin is busy", "no route to 10.0.0.7", "me@x: no"):
        assert reason_told(named, "orin", "nothing ran") == "nothing could run there"
    assert clause("word " * 100).endswith("word ...")
    assert clause("a\x1b[31m") == "a?[31m"


def test_an_earlier_version_s_results_tell_their_status_only(tmp_path):
    folder = tmp_path / "run/devices/one"
    folder.mkdir(parents=True)
    reason = "the connection was lost 4 times (ssh: connect to host 10.0.0.7 port 1: Connection refused)"
    step = {"status": "skipped", "why": "see /home/me"}
    about = {"name": "one", "status": "unreachable", "reason": reason, "machine": {"memory_gb": "25.3", "odd_thing": "7"}}
    write_json(folder / "device.json", about | {"steps": {"copy": step}, "ended": "today", "bundle_sha256": "0" * 64})
    write_rows(folder / "rows.jsonl", [not_measured("latency_p50_ms", "students/small", "all", reason, on_device="one")])
    own = Row(metric="latency_p50_ms", value=9.0, subject="students/small", target="onnx-fp32", conditions={"batch": 1})
    page = write_report(tmp_path / "run", tmp_path / "report", [own]).read_text()
    assert "</span>: it could not be reached</td>" in page
    assert "Unreachable: it could not be reached. Last tried today" in page
    assert "memory 25.3 GB; odd thing 7." in page
    assert "Copy: skipped<" in page
    for file in (tmp_path / "report").iterdir():
        assert "10.0.0.7" not in file.read_text("utf-8", "replace")
    assert told_of({"told": {"reason": "x", "steps": {}}, "reason": "y"})["reason"] == "x"


def test_the_terminal_s_table_fits_80_columns():
    def rows(target: str, batch: int) -> list[Row]:
        where = {"resolution": 48, "batch": batch, "on_device": "orin-nano"}
        names = {"latency_p50_ms": 0.108, "images_per_s": 3778.0, "cosine_min": 0.99999, "end_to_end_p50_ms": 0.3}
        more = {"end_to_end_p50_ms": {"from": "PNG file"}}
        return [
            Row(metric=m, value=v, low=v, high=v, subject="students/small", target=target, conditions=where | more.get(m, {}))
            for m, v in names.items()
        ]

    found = rows("onnx-fp16", 1) + rows("onnx-int8-static", 8)
    found.append(not_measured("latency_p50_ms", "students/small", "onnx-fp16", "it takes 8", resolution=48, batch=64))
    found.append(not_measured("latency_p50_ms", "students/small", "onnx-fp32", "it takes 8", resolution=48, batch=64))
    out = io.StringIO()
    Console(file=out, width=80).print(device_table(found))
    lines = [line for line in out.getvalue().splitlines() if "0.108" in line]
    assert [line.split()[:2] for line in lines] == [["onnx-fp16", "1"], ["onnx-int8-static", "8"]]
    assert device_gaps(found) == ["not measured: onnx-fp16 48 px batch 64, onnx-fp32 48 px batch 64: it takes 8"]


def test_a_device_that_lacks_packages_answers_and_runs_nothing(lab, bundle, tmp_path, capsys):
    bare = device("one", env=without(tmp_path / "bare", "numpy", "PIL", *ALL_RUNTIMES))
    with pytest.raises(EnvironmentFailed) as failed:
        run_command(bundle, [bare], Trust(), tmp_path / "out", None, (), None, False, QUIET)
    assert str(failed.value) == "Not every device could be measured (one: numpy and PIL missing on the device)."
    printed = capsys.readouterr().out
    assert "one: nothing ran, numpy and PIL missing on the device" in printed
    assert printed.count("missing") == 1
    assert json.loads((tmp_path / "out/one/device.json").read_text())["status"] == "nothing ran"
    look([bare], None, False)
    assert "missing: numpy, Pillow, a runtime" in " ".join(capsys.readouterr().out.split())
    look([bare], None, True)
    assert json.loads(capsys.readouterr().out)[0]["missing"] == ["numpy", "Pillow", "a runtime"]


def test_a_name_without_a_host_is_refused_at_once(lab, bundle, tmp_path):
    job = Job(verify(bundle), sha256_file(bundle), "students/small", backoff=0.01)
    (outcome,) = run_fleet(job, [device("nowhere")], tmp_path / "out", QUIET)
    assert (outcome.status, outcome.told["reason"]) == ("unreachable", "its name led to no host")
    assert "no host has its name (ssh: Could not resolve hostname nowhere" in str(outcome.reason)
    assert len(lab.asked()) == 1


@pytest.mark.parametrize("command", ["list", "clean"])
def test_list_and_clean_take_a_file_in_both_ways(lab, tmp_path, command):
    file = tmp_path / "devices.yaml"
    file.write_text("devices:\n  - {name: mine, on: ssh://locked}\n")
    for given in ([str(file)], ["--devices", str(file)]):
        done = CliRunner().invoke(app, ["device", command, *given])
        assert done.exit_code == 3
        assert "mine: ssh cannot log in" in done.output
    both = CliRunner().invoke(app, ["device", command, str(file), "--devices", "other.yaml"])
    assert both.exit_code == 2
    assert "both name a device file" in both.output
