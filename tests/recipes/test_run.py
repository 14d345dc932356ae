"""The run folder: what is skipped, what runs again and why, what survives a kill."""

import contextlib
import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.errors import EnvironmentFailed, GateFailed, UserError
from distill.files import read_json, write_text
from distill.progress import Progress
from distill.rows import Row, not_measured, read_rows, write_rows
from export.fingerprint import fingerprint
from recipes.run import Interrupted, Stage, decide, execute


class Kitchen:
    """Three stages that write what their settings and inputs say; `calls` records whose work was done."""

    def __init__(self, run: Path):
        self.run, self.calls = run, []
        self.settings = {"teacher": {"train": {"steps": 3}}, "students/small": {"dim": 32}, "report": {}}
        self.data = {"train": "abc"}
        self.salt = ""  # changes bytes without changing keys
        self.fail: dict[str, BaseException] = {}
        self.said: list[str] = []

    def work(self, name: str, inputs: tuple[str, ...]):
        def do(folder: Path, progress: Progress) -> None:
            self.calls.append(name)
            read = [(self.run / i / "out.txt").read_text() for i in inputs]
            write_text(folder / "out.txt", f"{name} {self.settings[name]} {read}{self.salt if name == 'teacher' else ''}")
            write_rows(folder / "rows.jsonl", [Row(metric="size_mb", value=1.0, subject=name, target="torch-fp32")])
            if name in self.fail:
                raise self.fail[name]

        return do

    def stages(self, **more) -> list[Stage]:
        def stage(name: str, *inputs: str, **given) -> Stage:
            return Stage(
                name, self.run / name, self.settings[name], self.work(name, inputs), inputs, **given | more.get(name, {})
            )

        return [stage("teacher", data=self.data), stage("students/small", "teacher"), stage("report", "students/small")]

    def cook(self, more: dict | None = None, recipe: str = "soup", **given) -> list[str]:
        """Execute; returns whose work was done."""
        self.calls.clear()
        progress = Progress("quiet")
        self.said.clear()
        progress.say = lambda text, warning=False: self.said.append(text)  # type: ignore[method-assign]
        execute(self.run, self.stages(**more or {}), progress, recipe=recipe, text="a: 1\n", **given)
        return list(self.calls)


@pytest.fixture(autouse=True)
def described_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine does not change between tests, and describing it starts other programs."""
    monkeypatch.setattr("recipes.decide.fingerprint", machine)


@functools.cache
def machine() -> dict:
    return fingerprint()


@pytest.fixture
def kitchen(tmp_path: Path) -> Kitchen:
    return Kitchen(tmp_path / "run")


ALL = ["teacher", "students/small", "report"]


def test_a_second_run_does_nothing_and_is_quick(kitchen: Kitchen):
    assert kitchen.cook() == ALL
    assert [r.subject for r in read_rows(kitchen.run / "rows.jsonl")] == ALL
    assert (kitchen.run / "recipe.yaml").read_text() == "a: 1\n"
    begun = time.monotonic()
    assert kitchen.cook() == []
    assert time.monotonic() - begun < 1
    assert kitchen.said == ["done before, nothing changed: teacher, students/small, report"]
    events = [json.loads(line)["event"] for line in (kitchen.run / "log.jsonl").read_text().splitlines()]
    assert events == ["started", "finished"] * 3 + ["skipped"] * 3


def test_done_json_tells_how_the_result_came_about(kitchen: Kitchen):
    kitchen.cook()
    done = read_json(kitchen.run / "students/small/done.json")
    assert done["identity"]["config"] == {"dim": 32}
    assert done["identity"]["inputs"] == {"teacher": read_json(kitchen.run / "teacher/done.json")["key"]}
    assert {o["path"] for o in done["outputs"]} == {"out.txt", "rows.jsonl"}
    assert all(len(o["sha256"]) == 64 and o["bytes"] > 0 for o in done["outputs"])
    assert done["machine"]["packages"]["torch"]
    assert done["machine"]["cpu"]["threads"] >= 1
    assert done["seconds"] >= 0
    assert not (kitchen.run / "students/small/started.json").exists()


def test_a_changed_setting_runs_what_depends_on_it_and_says_which(kitchen: Kitchen):
    kitchen.cook()
    kitchen.settings["students/small"] = {"dim": 48, "depth": 2}
    assert kitchen.cook() == ["students/small", "report"]
    assert any("depth: unset -> 2; dim: 32 -> 48" in s for s in kitchen.said)
    assert any("its input students/small changed" in s for s in kitchen.said)
    assert "48" in (kitchen.run / "report/out.txt").read_text()
    kitchen.data = {"train": "other"}
    assert kitchen.cook() == ALL
    assert any("the data train changed" in s for s in kitchen.said)
    assert kitchen.cook({"report": {"schema": 2}}) == ["report"]


def test_earlier_settings_bring_back_their_results(kitchen: Kitchen):
    kitchen.cook()
    before = (kitchen.run / "teacher/out.txt").read_bytes()
    kitchen.settings["teacher"] = {"train": {"steps": 4}}
    assert kitchen.cook() == ALL
    kitchen.settings["teacher"] = {"train": {"steps": 3}}
    assert [d.action for d in decide(kitchen.run, kitchen.stages())] == ["restore"] * 3
    assert kitchen.cook() == []
    assert (kitchen.run / "teacher/out.txt").read_bytes() == before
    assert not list((kitchen.run / "replaced").glob("*.restoring"))
    kitchen.settings["teacher"] = {"train": {"steps": 4}}
    assert kitchen.cook() == []


def test_deciding_changes_nothing(kitchen: Kitchen):
    assert [(d.action, d.why) for d in decide(kitchen.run, kitchen.stages())] == [
        ("run", "not done yet"),
        ("run", "not done yet"),
        ("run", "not done yet"),
    ]
    assert not kitchen.run.exists()
    kitchen.cook()
    os.utime(kitchen.run / "teacher/out.txt")
    kitchen.settings["students/small"] = {"dim": 8}
    before = {p: p.stat().st_mtime_ns for p in kitchen.run.rglob("*")}
    found = {d.stage.name: (d.action, d.why) for d in decide(kitchen.run, kitchen.stages())}
    assert found["teacher"] == ("skip", "nothing changed")
    assert found["students/small"] == ("run", "dim: 32 -> 8")
    assert found["report"][0] == "run"
    assert before == {p: p.stat().st_mtime_ns for p in kitchen.run.rglob("*")}


def test_lost_and_altered_outputs_are_made_again(kitchen: Kitchen):
    kitchen.cook()
    (kitchen.run / "teacher/out.txt").unlink()
    assert kitchen.cook() == ["teacher"]  # the same bytes again: what was made from them stands
    assert any("out.txt is missing" in s for s in kitchen.said)
    path = kitchen.run / "students/small/out.txt"
    path.write_text(path.read_text().replace("3", "4"))  # the same size
    assert kitchen.cook() == ["students/small"]
    assert any("out.txt was changed" in s for s in kitchen.said)


def test_a_new_file_time_alone_changes_nothing(kitchen: Kitchen):
    kitchen.cook()
    os.utime(kitchen.run / "teacher/out.txt", (1, 1))
    assert kitchen.cook() == []
    outputs = read_json(kitchen.run / "teacher/done.json")["outputs"]
    assert next(o for o in outputs if o["path"] == "out.txt")["mtime_ns"] == 1_000_000_000


def test_force_runs_again_and_followers_only_if_the_bytes_differ(kitchen: Kitchen):
    kitchen.cook()
    assert kitchen.cook(force=["students"]) == ["students/small"]
    kitchen.salt = "!"
    assert kitchen.cook(force=["teacher"]) == ALL
    assert any("its input teacher was made again and came out different" in s for s in kitchen.said)


def test_until_stops_behind_a_stage_or_group(kitchen: Kitchen):
    assert kitchen.cook(until="students") == ["teacher", "students/small"]
    assert [r.subject for r in read_rows(kitchen.run / "rows.jsonl")] == ALL[:2]
    assert kitchen.cook() == ["report"]
    assert kitchen.cook(until="teacher") == []
    assert [r.subject for r in read_rows(kitchen.run / "rows.jsonl")] == ALL  # the later ones are still valid
    kitchen.settings["teacher"] = {}
    kitchen.cook(until="teacher")
    assert [r.subject for r in read_rows(kitchen.run / "rows.jsonl")] == ["teacher"]


def test_an_unknown_stage_gets_a_hint(kitchen: Kitchen):
    with pytest.raises(UserError, match=r"no stage 'repotr'.*did you mean report"):
        kitchen.cook(until="repotr")
    with pytest.raises(UserError, match="teacher, students/small, report"):
        kitchen.cook(force=["zzz"])
    assert not kitchen.run.exists()


def test_a_failed_stage_is_not_done_and_the_rest_is_kept(kitchen: Kitchen):
    kitchen.fail = {"report": RuntimeError("a bug")}
    with pytest.raises(RuntimeError, match="a bug"):
        kitchen.cook()
    assert [r.subject for r in read_rows(kitchen.run / "rows.jsonl")] == ALL[:2]
    assert decide(kitchen.run, kitchen.stages())[2].action == "continue"
    kitchen.fail = {}
    assert kitchen.cook() == ["report"]
    assert read_json(kitchen.run / "report/done.json")["attempts"] == 2


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (RuntimeError("write failed: No space left on device (os error 28)"), "disk is full"),
        (MemoryError(), "memory does not suffice"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "memory does not suffice"),
    ],
)
def test_a_machine_at_its_limits_gets_a_sentence(kitchen: Kitchen, error: Exception, sentence: str):
    kitchen.fail = {"teacher": error}
    with pytest.raises(EnvironmentFailed, match=sentence):
        kitchen.cook({"teacher": {"optional": True}})
    kitchen.fail = {}
    assert kitchen.cook() == ALL


def test_an_optional_stage_without_its_package_becomes_not_measured(kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch):
    def rows(reason: str) -> list[Row]:
        return [not_measured("size_mb", "students/small", "trt-int8", reason)]

    more = {"students/small": {"optional": True, "rows_if_skipped": rows}}
    kitchen.fail = {"students/small": EnvironmentFailed("tensorrt is not installed.")}
    with pytest.raises(EnvironmentFailed):
        kitchen.cook({})
    kitchen.settings["report"] = {"reads": "no files"}
    kitchen.work = lambda name, inputs, old=kitchen.work: old(name, () if name == "report" else inputs)  # type: ignore[method-assign]
    assert kitchen.cook(more) == ["students/small", "report"]
    assert read_json(kitchen.run / "students/small/skipped.json") == {"reason": "tensorrt is not installed."}
    assert not (kitchen.run / "students/small/out.txt").exists()
    row = read_rows(kitchen.run / "rows.jsonl")[1]
    assert (row.status, row.reason) == ("not measured", "tensorrt is not installed.")
    assert kitchen.cook(more) == []
    monkeypatch.setattr("recipes.decide.fingerprint", lambda: machine() | {"packages": {"tensorrt": "11"}})
    kitchen.fail = {}
    assert kitchen.cook(more) == ["students/small", "report"]
    assert not (kitchen.run / "students/small/skipped.json").exists()


def test_a_failed_gate_lets_the_report_through_but_nothing_ships(kitchen: Kitchen):
    kitchen.fail = {"students/small": GateFailed("int8 lost 3 points, 1 is allowed.")}
    with pytest.raises(GateFailed, match="students/small: int8 lost 3 points"):
        kitchen.cook()
    assert kitchen.calls == ALL
    with pytest.raises(GateFailed, match="int8 lost 3 points"):  # still true when nothing runs
        kitchen.cook()
    assert kitchen.calls == []
    with pytest.raises(GateFailed):
        kitchen.cook({"report": {"needs_gates": True}}, force=["report"])
    assert kitchen.calls == []
    kitchen.fail = {}
    assert kitchen.cook({"report": {"needs_gates": True}}, force=["students/small"]) == ["students/small"]


def test_stages_may_lie_inside_each_other(tmp_path: Path):
    run, progress = tmp_path / "run", Progress("quiet")

    def stages(setting: int) -> list[Stage]:
        inner = Stage("inner", run / "outer/deep/inner", {}, lambda f, p: write_text(f / "a", "inner"))
        outer = Stage("outer", run / "outer", {"x": setting}, lambda f, p: write_text(f / "deep/b", f"outer {setting}"))
        return [inner, outer]

    execute(run, stages(1), progress, recipe="r", text="")
    assert [o["path"] for o in read_json(run / "outer/done.json")["outputs"]] == ["deep/b"]
    inner = (run / "outer/deep/inner/done.json").read_bytes()
    execute(run, stages(2), progress, recipe="r", text="")
    assert (run / "outer/deep/inner/done.json").read_bytes() == inner
    assert (run / "outer/deep/b").read_text() == "outer 2"
    assert (run / "replaced/outer/deep/b").read_text() == "outer 1"


def test_folders_that_are_not_this_recipes_run_are_left_alone(kitchen: Kitchen, tmp_path: Path):
    kitchen.cook()
    before = (kitchen.run / "run.json").read_bytes()
    with pytest.raises(UserError, match=r"holds a run of the recipe 'soup', not of 'salad'.*--out"):
        kitchen.cook(recipe="salad")
    assert (kitchen.run / "run.json").read_bytes() == before
    kitchen.run = tmp_path / "photos"
    kitchen.run.mkdir()
    (kitchen.run / "cat.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"not empty.*cat\.jpg"):
        kitchen.cook()
    assert [p.name for p in kitchen.run.iterdir()] == ["cat.jpg"]
    kitchen.run = kitchen.run / "cat.jpg"
    with pytest.raises(UserError, match="is a file"):
        kitchen.cook()


def test_a_cut_off_log_line_does_not_spoil_the_next(kitchen: Kitchen):
    kitchen.cook()
    with open(kitchen.run / "log.jsonl", "a") as f:
        f.write('{"time": "20')
    kitchen.cook()
    lines = (kitchen.run / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["event"] == "skipped"


class Killed(BaseException):
    """Nothing of decant catches it."""


@pytest.mark.parametrize("kept", [False, True])
def test_a_kill_at_any_file_operation_leaves_a_folder_that_comes_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
):
    """Every rename and removal in turn is the last thing that happens; the next command ends as if nothing had been."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # the power does not fail here
    for last in range(1, 200):
        kitchen = Kitchen(tmp_path / str(last))
        if kept:  # the settings that come below have been used before: their results are kept and come back
            kitchen.settings["teacher"] = {"train": {"steps": 4}}
            kitchen.cook()
            kitchen.settings["teacher"] = {"train": {"steps": 3}}
        kitchen.cook()
        kitchen.settings["teacher"] = {"train": {"steps": 4}}
        ended = dies_after(last, kitchen, monkeypatch)
        for steps in (4, 3):
            kitchen.settings["teacher"] = {"train": {"steps": steps}}
            kitchen.cook()
            assert kitchen.cook() == []
            text = (kitchen.run / "report/out.txt").read_text()
            assert f"'steps': {steps}" in text.replace("\\", "")
            assert f"'steps': {steps}" in (kitchen.run / "teacher/out.txt").read_text()
            assert [r.subject for r in read_rows(kitchen.run / "rows.jsonl")] == ALL
        assert not list(kitchen.run.rglob(".part-*"))
        if ended:
            assert last > 10
            return
    pytest.fail("the run never ended")


def dies_after(last: int, kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Cook with so many file operations before nothing works any more; whether they sufficed."""
    count = 0

    def counted(real):
        def operation(*args, **kwargs):
            nonlocal count
            count += 1
            if count > last:
                raise Killed
            return real(*args, **kwargs)

        return operation

    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (os, "unlink"), (shutil, "rmtree"), (os, "rmdir")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        with contextlib.suppress(Killed):
            kitchen.cook()
    return count <= last


# What follows is killed for real. The stage `slow` counts to STEPS in a file, a step a call of the file's owner.
SCRIPT = """
import os, sys, time, types
from pathlib import Path
# The machine's description needs torch, which takes seconds to import and has no part in this.
sys.modules["export.fingerprint"] = types.SimpleNamespace(fingerprint=lambda: {"gpus": [], "packages": {}})
from distill.files import write_text
from distill.progress import Progress
from recipes.run import Stage, execute
from distill.errors import DecantError

run, setting, mode = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def first(folder, progress):
    write_text(folder / "out.txt", "first")
    print("FIRST", flush=True)

def slow(folder, progress):
    state = folder / "state.txt"
    step = int(state.read_text()) if state.exists() else 0
    print(f"FROM {step}", flush=True)
    if mode == "fork" and os.fork() == 0:
        time.sleep(30)
        os._exit(0)
    for step in range(step + 1, 31):
        write_text(state, str(step))
        print(f"STEP {step}", flush=True)
        time.sleep(0.02 if mode == "quick" else 0.2)
    state.unlink()
    write_text(folder / "out.txt", f"counted to 30 with {setting}")

stages = [Stage("first", run / "first", {}, first), Stage("slow", run / "slow", {"s": setting}, slow, ("first",))]
try:
    execute(run, stages, Progress("quiet"), recipe="slow", text="")
except DecantError as e:
    print(f"{type(e).__name__}: {e}", flush=True)
    sys.exit(e.exit_code)
"""


def start(run: Path, setting: str = "a", mode: str = "slow") -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(run), setting, mode], stdout=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for said in process.stdout:
        if said.strip() == line:
            return
    pytest.fail(f"the run ended before it said {line}")


def end(process: subprocess.Popen[str], number: int) -> str:
    process.send_signal(number)
    return process.communicate(timeout=20)[0]


def test_kill_9_continues_and_skips_what_was_done(tmp_path: Path):
    run = tmp_path / "run"
    process = start(run)
    wait_for(process, "STEP 3")
    end(process, signal.SIGKILL)
    assert (run / "slow/started.json").exists()
    assert not (run / "slow/done.json").exists()
    assert not (run / "slow/out.txt").exists()
    again = start(run, mode="quick")
    said = again.communicate(timeout=20)[0]
    assert again.returncode == 0
    assert "FIRST" not in said
    assert int(said.split("FROM ")[1].split()[0]) >= 3
    assert (run / "slow/out.txt").read_text() == "counted to 30 with a"
    assert not list(run.rglob(".part-*"))


def test_half_done_work_of_other_settings_is_not_continued(tmp_path: Path):
    run = tmp_path / "run"
    process = start(run)
    wait_for(process, "STEP 3")
    end(process, signal.SIGKILL)
    said = start(run, "b", "quick").communicate(timeout=20)[0]
    assert "FROM 0" in said
    assert (run / "slow/out.txt").read_text() == "counted to 30 with b"
    said = start(run, "a", "quick").communicate(timeout=20)[0]  # the half-done work was kept
    assert int(said.split("FROM ")[1].split()[0]) >= 3
    assert (run / "slow/out.txt").read_text() == "counted to 30 with a"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_says_that_the_same_command_continues(tmp_path: Path, number: int, code: int):
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a background shell has it ignored, and children inherit that
    try:
        process = start(tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for(process, "STEP 1")
    assert "the same command continues" in end(process, number)
    assert process.returncode == code
    assert json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])["event"] == "stopped"


def test_a_live_run_keeps_others_out_and_a_killed_one_does_not(tmp_path: Path):
    run = tmp_path / "run"
    process = start(run, mode="fork")  # with a child that outlives it, as data workers may
    wait_for(process, "STEP 1")
    other = start(run)
    said = other.communicate(timeout=20)[0]
    assert other.returncode == 2
    assert f"process {process.pid}" in said
    assert "--out" in said
    process.kill()
    process.wait(timeout=20)
    again = start(run, mode="quick")
    again.communicate(timeout=20)
    assert again.returncode == 0


def test_two_runs_in_one_process_exclude_each_other(kitchen: Kitchen):
    def nested(folder: Path, progress: Progress) -> None:
        execute(kitchen.run, [Stage("again", kitchen.run / "again", {}, nested)], progress, recipe="soup", text="")

    with pytest.raises(UserError, match=f"process {os.getpid()}"):
        execute(kitchen.run, [Stage("again", kitchen.run / "again", {}, nested)], Progress("quiet"), recipe="soup", text="")


def test_keyboard_interrupt_inside_this_process(kitchen: Kitchen):
    kitchen.fail = {"teacher": KeyboardInterrupt()}
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="same command continues"):
        kitchen.cook()
    assert signal.getsignal(signal.SIGTERM) is handler
