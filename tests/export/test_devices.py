"""A bundle on devices, through a fake `ssh` that runs everything on this machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from device_lab import QUIET, Lab, beside_selftest, device, gone, waited
from interrupts import heeds_interrupts
from tiny_bundle import tiny_artifacts, tiny_bundle
from typer.testing import CliRunner

from distill.errors import EnvironmentFailed, GateFailed
from distill.files import sha256_file, write_json
from distill.rows import Row, read_rows, write_rows
from export.bundle import BundleConfig
from export.bundling.keys import make_keys
from export.bundling.verify import Trust, verify
from export.devices.fleet import DeviceRun, Job, run_fleet
from export.devices.ssh import REMOTE, DeviceFailed, Ssh
from export.report import write_report
from export.reporting import device_report
from export.reporting.report_schema import Report
from recipes.cli import app
from recipes.device import clean, look
from recipes.device import run as run_command
from recipes.lock import locked

FAST = ("--seconds", "0.02", "--openings", "3", "--rounds", "2")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    return tiny_bundle(folder, tiny_artifacts(folder, ["onnx-fp32"]), BundleConfig(golden_images=2))


def exported(run: Path, bundle: Path) -> Path:
    """A run's folder whose exports are those of the bundle."""
    shutil.copytree(bundle.parent / "onnx-fp32", run / "export/small/onnx-fp32")
    return run


@pytest.fixture
def job(bundle) -> Job:
    return Job(verify(bundle), sha256_file(bundle), "students/small", FAST, backoff=0.01)


@pytest.fixture
def lab(tmp_path, monkeypatch) -> Lab:
    made = Lab(tmp_path / "lab")
    monkeypatch.setenv("PATH", str(made.folder / "bin"), prepend=":")
    return made


def test_two_devices_at_once_and_a_dead_one(lab, job, tmp_path):
    good, dead, other = run_fleet(job, [device("one"), device("dead"), device("two")], tmp_path / "out", QUIET)
    assert (good.status, good.reason, other.status) == ("done", None, "done")
    assert dead.status == "unreachable"
    assert "No route to host" in str(dead.reason)
    (lost,) = read_rows(tmp_path / "out/dead/rows.jsonl")
    assert (lost.status, lost.conditions["on_device"]) == ("not measured", "dead")
    assert lost.reason == "it could not be reached"
    told = json.loads((tmp_path / "out/dead/device.json").read_text())
    assert "No route to host" in told["reason"]  # the whole text stays with who ran it
    rows = read_rows(tmp_path / "out/one/rows.jsonl")
    assert rows == good.rows
    timed = [r for r in rows if r.metric == "latency_p50_ms"]
    assert {(r.subject, r.target, r.conditions["resolution"]) for r in timed} == {
        ("students/small", "onnx-fp32", s) for s in (32, 48)
    }
    for r in timed:
        assert r.value is not None
        assert r.low is not None
        assert r.high is not None
        assert r.low <= r.value <= r.high
        assert r.conditions["on_device"] == "one"
        assert r.conditions["bundle_sha256"] == job.sha256
    assert not any(r.metric == "latency_p99_ms" and (r.n or 0) < 1000 for r in rows)
    assert {r.conditions["from"] for r in rows if r.metric == "end_to_end_p50_ms"} == {"PNG file", "decoded picture"}
    assert {r.conditions["resolution"] for r in rows if r.metric == "cosine_min" and (r.value or 0) > 0.999} == {32, 48}
    for name in ("device.json", "bench.json", "selftest.json"):
        assert json.loads((tmp_path / "out/one" / name).read_text())
    assert good.steps["build"]["status"] == "skipped"  # no TensorRT here


def test_a_second_run_copies_nothing_and_keeps_the_first_results(lab, job, tmp_path):
    for _ in range(2):
        (outcome,) = run_fleet(job, [device("one")], tmp_path / "out", QUIET)
        assert outcome.status == "done"
    assert len(lab.asked("receive")) == 1
    assert (tmp_path / "out/one/previous/rows.jsonl").is_file()


def test_an_interrupted_copy_goes_on_where_it_broke_off(lab, job, tmp_path):
    (lab.folder / "cut-receive").write_text("200000")
    (outcome,) = run_fleet(job, [device("one")], tmp_path / "out", QUIET)
    assert outcome.status == "done"
    first, second = lab.asked("receive")
    assert first["from"] == 0
    assert 100_000 < second["from"] < 200_000


def test_a_foreign_beginning_is_not_continued(lab, job, tmp_path):
    archives = lab.home("one") / "archives"
    archives.mkdir(parents=True)
    (lab.home("one") / ".decant-device").write_text("")
    (archives / f"{job.sha256}.part").write_bytes(b"x" * 1000)
    (outcome,) = run_fleet(job, [device("one")], tmp_path / "out", QUIET)
    assert outcome.status == "done"
    assert [r["from"] for r in lab.asked("receive")] == [0]


def test_a_step_that_loses_its_connection_is_done_again(lab, job, tmp_path):
    (lab.folder / "cut-work").write_text(str(len(REMOTE.read_bytes())))
    (outcome,) = run_fleet(job, [device("one")], tmp_path / "out", QUIET)
    assert outcome.status == "done"


def test_what_was_changed_on_the_device_is_refused(lab, job, tmp_path):
    (outcome,) = run_fleet(job, [device("one")], tmp_path / "out", QUIET)
    assert outcome.status == "done"
    verified = {"sha256": job.sha256, "manifest_sha256": job.bundle.manifest_sha256}
    ssh = Ssh(device("one").address(), device("one").python, None, tmp_path / "log", tmp_path)
    work = {"script": "selftest.py", "arguments": [], "env": {}, "limit": 10, **verified}
    unpacked = lab.home("one") / "unpacked" / job.sha256
    with open(unpacked / "infer.py", "a") as f:
        f.write("\nprint('mine')\n")
    with pytest.raises(DeviceFailed, match=r"infer\.py on the device is missing or was changed"):
        ssh.ask("work", **work)
    archive = lab.home("one") / "archives" / f"{job.sha256}.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-1] + b"x")
    with pytest.raises(DeviceFailed, match="the archive on the device was changed"):
        ssh.ask("unpack", **verified)
    (again,) = run_fleet(job, [device("one")], tmp_path / "out", QUIET)  # copied and unpacked again
    assert again.status == "done"
    (unpacked / "numpy.py").write_text("print('mine')")
    with pytest.raises(DeviceFailed, match=r"numpy\.py on the device is not part of the bundle"):
        ssh.ask("work", **work)


def test_a_failed_selftest_is_exit_code_1_and_keeps_the_times(lab, job, tmp_path):
    report = {
        "format": "decant-selftest-1",
        "exit_code": 1,
        "results": [{"check": "onnx-fp32", "status": "FAIL", "text": "cosine 0.1"}],
    }
    env = beside_selftest(tmp_path / "site", f"print({json.dumps(json.dumps(report))}, flush=True)\nos._exit(1)")
    (outcome,) = run_fleet(job, [device("one", env=env)], tmp_path / "out", QUIET)
    assert (outcome.status, outcome.exit_code) == ("failed", 1)
    assert "onnx-fp32: cosine 0.1" in str(outcome.reason)
    assert any(r.metric == "latency_p50_ms" and r.status == "measured" for r in outcome.rows)


def test_a_step_that_hangs_is_ended_with_its_children(lab, job, tmp_path):
    lines = f"if not os.fork():\n    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    env = beside_selftest(tmp_path / "site", lines, "bench.py")
    (outcome,) = run_fleet(job, [device("one", env=env, timeout=3.0)], tmp_path / "out", QUIET)
    assert outcome.status == "failed"
    assert "bench.py did not end within 3 s" in str(outcome.reason)
    assert gone(int(waited(tmp_path / "pid")))


def test_stopping_ends_the_work_there_and_keeps_what_came_home(lab, job, tmp_path):
    lines = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    env = beside_selftest(tmp_path / "site", lines)
    run = DeviceRun(job, device("one", env=env), tmp_path / "out/one", tmp_path, QUIET)
    thread = threading.Thread(target=run.run)
    thread.start()
    pid = int(waited(tmp_path / "pid"))
    run.ssh.stop()
    thread.join(20)
    assert run.outcome.status == "stopped"
    assert gone(pid)
    assert any(r.metric == "latency_p50_ms" and r.status == "measured" for r in read_rows(tmp_path / "out/one/rows.jsonl"))


def test_two_runs_do_not_share_a_folder_but_a_run_takes_over_from_itself(lab, tmp_path):
    def ssh() -> Ssh:
        return Ssh(device("one").address(), device("one").python, None, tmp_path / "log", tmp_path)

    with ssh().held("a"):
        with pytest.raises(DeviceFailed, match="another `decant device` is at work"), ssh().held("b", wait=0):
            pass
        with pytest.raises(DeviceFailed, match="another `decant device` is at work"):
            ssh().ask("clean")
        with ssh().held("a", wait=5):  # as after a lost connection that the device has not noticed
            pass


def test_a_folder_of_others_is_left_alone(lab, tmp_path):
    lab.home("one").mkdir(parents=True)
    (lab.home("one") / "thesis.txt").write_text("")
    ssh = Ssh(device("one").address(), device("one").python, None, tmp_path / "log", tmp_path)
    with pytest.raises(DeviceFailed, match="holds other files"), ssh.held("a"):
        pass
    clean([device("one")], None, False)
    assert [p.name for p in lab.home("one").iterdir()] == ["thesis.txt"]


def test_list_and_clean(lab, job, tmp_path, capsys):
    run_fleet(job, [device("one")], tmp_path / "out", QUIET)
    with pytest.raises(EnvironmentFailed, match=r"locked: ssh cannot log in .*Permission denied"):
        look([device("one"), device("locked")], None, True)
    one, locked = json.loads(capsys.readouterr().out)
    assert one["numpy"]
    assert one["free_gb"] > 0
    assert "Permission denied" in locked["reason"]
    (lab.home("one") / "archives/mine.txt").write_text("kept")
    clean([device("one")], None, False)
    assert "freed_mb" in capsys.readouterr().out
    assert [p.name for p in lab.home("one").rglob("*") if p.is_file() and not p.name.startswith(".")] == ["lock", "mine.txt"]
    (lab.home("one") / "archives/mine.txt").unlink()
    clean([device("one")], None, False)
    assert not lab.home("one").exists()


def test_a_bundle_of_the_wrong_key_reaches_no_device(lab, bundle, tmp_path):
    _, _, key = make_keys(tmp_path / "keys", None)
    with pytest.raises(GateFailed, match="not signed"):
        run_command(bundle, [device("one")], Trust((key,)), tmp_path / "out", None, FAST, None, False, QUIET)
    assert lab.asked() == []


def test_a_device_without_python_or_room(lab, job, tmp_path):
    (outcome,) = run_fleet(job, [device("one", python="no-python")], tmp_path / "out", QUIET)
    assert "it has no no-python" in str(outcome.reason)
    large = replace(job, bundle=replace(job.bundle, unpacked=1 << 60))
    (outcome,) = run_fleet(large, [device("two")], tmp_path / "out", QUIET)
    assert "MB are free there" in str(outcome.reason)
    assert {outcome.exit_code} == {3}


def test_rows_land_in_the_report(lab, bundle, tmp_path, capsys, monkeypatch):
    run, devices = exported(tmp_path / "run", bundle), [device("one"), device("dead")]
    monkeypatch.setattr("export.devices.fleet.TRIES", 1)
    with pytest.raises(EnvironmentFailed, match="dead: it could not be reached in 1 tries"):
        run_command(bundle, devices, Trust(), run / "devices", "pruned/small", FAST, None, True, QUIET)
    printed = json.loads(capsys.readouterr().out)
    assert (printed["format"], printed["exit_code"]) == ("decant-devices-1", 3)
    own = Row(
        metric="latency_p50_ms",
        value=9.0,
        subject="pruned/small",
        target="onnx-fp32",
        conditions={"resolution": 32, "batch": 1},
    )
    page = write_report(run, tmp_path / "report", [own])
    report = json.loads((tmp_path / "report/report.json").read_text())
    Report.model_validate(report)
    assert [d["name"] for d in report["devices"]] == ["dead", "one"]
    assert report["devices"][1]["machine"]["numpy"]
    assert report["devices"][1]["machine_id"] == next(r["conditions"]["machine"] for r in report["devices"][1]["rows"])
    assert len(report["rows"]) == 1  # the run's own numbers stay its own
    assert "| one | pruned small, ONNX FP32 | 32 | 1 |" in (tmp_path / "report/report.md").read_text()
    assert "On devices" in page.read_text()
    assert "Unreachable: it could not be reached. Last tried" in page.read_text()
    assert "Time: done in" in page.read_text()
    for file in (*(tmp_path / "report").iterdir(), run / "devices/dead/rows.jsonl", run / "devices/one/rows.jsonl"):
        assert not [
            word for word in ("ssh:", "No route", str(tmp_path), "port 22") if word in file.read_text("utf-8", "replace")
        ]
    write_json(run / "devices/one/last_attempt/device.json", {"ended": "today", "told": {"reason": "it was off"}})
    artifact = run / "export/small/onnx-fp32/artifact.json"
    write_json(artifact, json.loads(artifact.read_text().replace(sha256_file(artifact.with_name("model_32.onnx")), "0" * 64)))
    _, one = device_report.collect(run)
    assert {r["conditions"]["resolution"] for r in one["rows"]} == {48}
    assert "numbers are of files that the run no longer has" in one["reason"]
    assert "a later attempt (today) measured nothing: it was off" in one["reason"]
    assert set(device_report.fingerprints(run)) == {"device dead", "device one", "device one, later attempt"}
    assert ",pruned/small,onnx-fp32,latency_p50_ms," in "," + (tmp_path / "report/report.csv").read_text().replace("\n", "\n,")


def test_the_command(lab, bundle, tmp_path, capsys):
    run, python = exported(tmp_path / "run", bundle), ["--python", sys.executable]
    write_json(run / "run.json", {"format": "decant-run-1", "recipe": "tiny"})
    own = Row(metric="size_mb", value=1.0, subject="qad/small", target="onnx-fp32")
    write_rows(run / "rows.jsonl", [own])
    options = ["--on", "ssh://one", "--run", str(run), "--seconds", "0.02", "--json", *python]
    done = CliRunner().invoke(app, ["device", "run", str(bundle), *options])
    assert done.exit_code == 0, done.output
    assert {r.subject for r in read_rows(run / "devices/one/rows.jsonl")} == {"qad/small"}
    assert set(device_report.fingerprints(run)) == {"device one"}
    both = CliRunner().invoke(app, ["device", "run", str(bundle), *options, "--out", str(tmp_path)])
    assert both.exit_code == 2
    assert "give one of them" in both.output
    shutil.rmtree(run / "export/small")
    foreign = CliRunner().invoke(app, ["device", "run", str(bundle), *options])
    assert foreign.exit_code == 2
    assert "is no bundle of what" in foreign.output


def test_bad_usage_is_exit_code_2_at_once(lab, bundle, tmp_path):
    file, mine = tmp_path / "file", tmp_path / "mine/locked"
    file.write_text("")
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("")
    cases = {
        "ssh://user@host": ["--on", "ssh://-x"],
        "does not exist": ["--ssh-config", "/nope"],
        "is a file, and results need a folder": ["--out", str(file)],
        "holds thesis.txt": ["--out", str(tmp_path / "mine")],
        "--seconds must lie": ["--seconds", "inf"],
        "timeout must lie": ["--timeout", "0"],
    }
    for sentence, options in cases.items():
        done = CliRunner().invoke(
            app, ["device", "run", str(bundle), "--out", str(tmp_path / "o"), "--on", "ssh://locked", *options]
        )
        assert (done.exit_code, sentence in done.output) == (2, True), done.output
    assert lab.asked() == []
    run = ["device", "run", str(bundle), "--on", "ssh://locked", "--out", str(tmp_path / "o")]
    (tmp_path / "o/.attempts/locked").mkdir(parents=True)
    with locked(tmp_path / "o/.attempts/locked"):
        busy = CliRunner().invoke(app, run)
    assert (busy.exit_code, "is in use by another run" in busy.output) == (2, True)
    assert CliRunner().invoke(app, run).exit_code == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupt_stops_all_and_keeps_what_came_home(lab, bundle, tmp_path, number, code):
    """As by Ctrl-C in a terminal, by a scheduler, and by a terminal that closes."""
    lines = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    env = beside_selftest(tmp_path / "site", lines)
    file = tmp_path / "devices.yaml"
    file.write_text(f"devices:\n  - {{name: one, on: 'ssh://one', python: '{sys.executable}', env: {json.dumps(env)}}}\n")
    command = [sys.executable, "-m", "recipes.cli", "device", "run", str(bundle), "--devices", str(file), "--seconds", "0.02"]
    (tmp_path / "t").mkdir()
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path / "t")},
        preexec_fn=heeds_interrupts,
    )
    pid = int(waited(tmp_path / "pid"))
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == code
    assert gone(pid)
    assert json.loads((tmp_path / "out/one/device.json").read_text())["status"] == "stopped"
    assert any(r.metric == "latency_p50_ms" and r.status == "measured" for r in read_rows(tmp_path / "out/one/rows.jsonl"))
    assert list((tmp_path / "t").glob("dd-*")) == []


def test_an_interrupt_ends_list_at_once(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ssh").write_text(f"#!/bin/sh\necho $$ > {tmp_path / 'pid'}\nexec sleep 600\n")
    (tmp_path / "bin/ssh").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "recipes.cli", "device", "list", "--on", "ssh://x"]
    process = subprocess.Popen(command, env=env, preexec_fn=heeds_interrupts)
    pid = int(waited(tmp_path / "pid"))
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert gone(pid)


def test_list_uses_the_environment_of_the_device_file(lab, tmp_path, capsys):
    (tmp_path / "onnxruntime.py").write_text("__version__ = 'of mine'")
    look([device("one", env={"PYTHONPATH": str(tmp_path)})], None, True)
    assert json.loads(capsys.readouterr().out)[0]["onnxruntime"] == "of mine"
