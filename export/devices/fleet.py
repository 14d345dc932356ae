"""One bundle on several devices at once: each is copied to, verified, rebuilt, tested and timed by itself, and fails by itself.

What comes home: device.json (what became of it), rows.jsonl, build.json, selftest.json, bench.json, log (its stderr), where
results.py says.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from distill.files import write_json
from distill.progress import Progress
from distill.rows import Row, write_rows
from export.bundling.archive import shown
from export.bundling.verify import Manifest, VerifyResult
from export.devices.answers import read_report
from export.devices.config import DeviceConfig
from export.devices.results import ABOUT, LOG, ROWS, begin, place
from export.devices.rows import lost_row, rows_home
from export.devices.ssh import DeviceFailed, Lost, Ssh, Stopped, Unreachable, sockets
from export.devices.telling import clause, reason_told, unnamed
from export.devices.transfer import copy

T = TypeVar("T")
TRIES = 4  # of one step, when the connection is lost
BACKOFF_S = 2.0
FORMAT = "decant-device-1"
ENGINES = "{engines}"  # the device's folder of engines, filled in there
FORMATS = {"build": "decant-rebuild-1", "bench": "decant-device-bench-1", "selftest": "decant-selftest-1"}


@dataclass(frozen=True)
class Job:
    """What is to be done on every device.

    Attributes:
        bundle: as verified here. sha256: of its archive. subject: the student in rows, e.g. `students/small`.
        bench: options of bench.py. config: for ssh.
    """

    bundle: VerifyResult
    sha256: str
    subject: str
    bench: tuple[str, ...] = ()
    config: Path | None = None
    backoff: float = BACKOFF_S


@dataclass
class Outcome:
    """What became of one device.

    Attributes:
        status: `done`; `failed`: one of its checks did; `unreachable`: it was not there or went away; `nothing ran`: it answered, and
            cannot run anything; `stopped`.
        reason: a clause; None when it is done. told: reason and steps for rows and reports, without names of hosts.
        reports: of build, bench and self-test, as far as they came home. machine: as bench.py (or else selftest.py) tells it.
    """

    name: str
    status: str = "stopped"
    reason: str | None = "it was stopped before it began"
    machine: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return {"done": 0, "failed": 1}.get(self.status, 3)

    def to_json(self) -> dict[str, Any]:
        kept = ("name", "status", "reason", "machine", "steps", "told")
        return {"format": FORMAT, "exit_code": self.exit_code, **{k: getattr(self, k) for k in kept}}


def run_fleet(job: Job, devices: Sequence[DeviceConfig], out: Path, progress: Progress) -> list[Outcome]:
    """Do the job on all devices at once -> what became of each, in their order. What came home is in `out` by then.

    Raises:
        KeyboardInterrupt: the user's; work on the devices was ended, and what had come home is kept.
    """
    with sockets() as folder:
        runs = [DeviceRun(job, d, out / d.name, folder, progress) for d in devices]
        return at_once([r.run for r in runs], [r.ssh for r in runs])


class DeviceRun:
    """The job on one device."""

    def __init__(self, job: Job, device: DeviceConfig, folder: Path, sockets: Path, progress: Progress):
        self.job, self.device, self.folder, self.progress = job, device, folder, progress
        self.new = begin(folder)
        self.ssh = Ssh(device.address(), device.python, job.config, self.new / LOG, sockets)
        self.outcome = Outcome(device.name)
        self.token = uuid.uuid4().hex
        self.begun = time.strftime("%Y-%m-%dT%H:%M:%S%z")

    def run(self) -> Outcome:
        """Never raises what is the device's fault: it becomes the outcome."""
        o = self.outcome
        try:
            self.steps()
            self.concluded()
        except Stopped:
            self.ended("stopped", "it was stopped")
        except Unreachable as e:
            self.ended("unreachable", str(e), e.told)
        except DeviceFailed as e:
            self.ended("failed" if o.steps else "nothing ran", str(e), e.told)
        except Lost as e:
            lost = ("the connection was lost", "times") if self.ssh.answered else ("it could not be reached in", "tries")
            told = "the connection was lost" if self.ssh.answered else None
            self.ended("unreachable", f"{lost[0]} {TRIES} {lost[1]} ({e})", told or "it could not be reached")
        finally:
            self.keep()
        if o.reason:
            self.progress.say(f"{o.name}: {o.status}", warning=True)
        return o

    def concluded(self) -> None:
        """What the steps amount to, once all were gone through."""
        steps = self.outcome.steps
        failed = [f"{name}: {s['why']}" for name, s in steps.items() if s["status"] == "failed"]
        missing = {name: s["why"] for name, s in steps.items() if s["status"] == "nothing"}
        if failed:
            whole = "; ".join(failed)
            self.ended("failed", whole, self.unnamed(whole))
        elif missing:  # bench.py and selftest.py say the same in other words
            why = next(iter(missing.values()))
            whole = why if len(missing) > 1 else f"{next(iter(missing))}: {why}"
            self.ended("nothing ran", whole, self.unnamed(whole))
        else:
            self.ended("done", None)

    def ended(self, status: str, reason: str | None, told: str | None = None) -> None:
        o = self.outcome
        o.status, o.reason = status, reason
        o.told["reason"] = told or (reason_told(reason, self.ssh.address.host, status) if reason else None)

    def unnamed(self, text: str) -> str:
        return unnamed(text, self.ssh.address.host)

    def steps(self) -> None:
        """Copy, unpack, rebuild, time, test; a step whose connection is lost is tried again from where it stands."""
        job = self.job
        verified: dict[str, Any] = {"sha256": self.job.sha256, "manifest_sha256": self.job.bundle.manifest_sha256}
        left = [
            ("copy", lambda: self.copied()),
            ("unpack", lambda: self.ssh.ask("unpack", timeout=900.0, **verified)),
            ("build", lambda: self.work("build", "build_engine.py", ["--json", "--out", ENGINES], verified)),
            ("bench", lambda: self.work("bench", "bench.py", ["--json", *job.bench, *self.engines()], verified)),
            ("selftest", lambda: self.work("selftest", "selftest.py", ["--json", "--seconds", "0", *self.engines()], verified)),
        ]
        tries = 0
        while left:
            try:
                with self.ssh.held(self.token):
                    while left:
                        name, step = left[0]
                        self.progress.say(f"{self.device.name}: {name}")
                        step()
                        self.outcome.steps.setdefault(name, {"status": "done"})
                        left.pop(0)
                        tries = 0
            except Lost as e:
                tries += 1
                if tries >= TRIES:
                    raise
                self.progress.say(f"{self.device.name}: connection lost ({e}); trying again", warning=True)
                if self.ssh.stopped.wait(self.job.backoff * 2 ** (tries - 1)):
                    raise Stopped from e

    def copied(self) -> None:
        copy(self.ssh, self.job.bundle.path, self.job.sha256, self.job.bundle.unpacked, self.progress, self.device.name)

    def engines(self) -> list[str]:
        """Options for what was rebuilt there, if anything was."""
        return ["--engines", ENGINES] if self.outcome.steps.get("build", {}).get("engines") else []

    def work(self, name: str, script: str, arguments: list[str], verified: dict[str, Any]) -> None:
        """Run a script of the bundle there, and bring its report home at once."""
        d = self.device
        step: dict[str, Any] = {"status": "done"}
        asked: dict[str, Any] = {"script": script, "arguments": arguments, "env": d.env, **verified}
        found = self.ssh.ask("work", timeout=d.timeout + 120.0, limit=d.timeout, **asked)
        if found.get("absent"):
            self.outcome.steps[name] = {"status": "absent", "why": f"the bundle has no {script}"}
            return
        step |= {"seconds": round(found["seconds"], 3), "code": found["code"], "engines": found["has_engines"]}
        if found["late"]:
            step |= {"status": "failed", "why": f"{script} did not end within {d.timeout:g} s and was stopped"}
        else:
            step |= self.judged(name, script, found)
        self.outcome.steps[name] = step

    def judged(self, name: str, script: str, found: dict[str, Any]) -> dict[str, Any]:
        """A script's report, kept, and what it means."""
        try:
            report = read_report(found["stdout"], FORMATS[name])
        except ValueError as e:
            why = (
                f"{script} ended with exit code {found['code']} and no report that this version reads ({e}); its log says more"
            )
            return {"status": "failed", "why": why}
        self.outcome.reports[name] = report
        write_json(self.new / f"{name}.json", report)
        # One script's description alone, so that a machine has one id however far a run came.
        if name != "build" and report.get("machine") and not self.outcome.machine:
            self.outcome.machine = {shown(str(k)): self.unnamed(shown(str(v))) for k, v in sorted(report["machine"].items())}
        if found["code"] == 0 and report.get("exit_code") == 0:
            return {}
        if found["code"] == 3:  # no TensorRT for the kit is no failure: the ONNX files still run
            return {
                "status": "skipped" if name == "build" else "nothing",
                "why": problem_of(report) or "nothing of it can run there",
            }
        return {"status": "failed", "why": problem_of(report) or f"{script} ended with exit code {found['code']}"}

    def keep(self) -> None:
        """Write what is known: rows that were measured, and a row that says why the rest was not."""
        o, job = self.outcome, self.job
        about = {"bundle_sha256": job.sha256, "on_device": o.name}
        o.told["steps"] = {
            name: step | ({"why": self.unnamed(step["why"])} if "why" in step else {}) for name, step in o.steps.items()
        }
        found = rows_home(o.reports, job.subject, about, o.machine, file_hashes(job.bundle.manifest))
        o.rows = [r.model_copy(update={"reason": self.unnamed(r.reason)}) if r.reason else r for r in found]
        if not any(r.metric == "latency_p50_ms" for r in o.rows):
            o.rows.append(lost_row(job.subject, o.told.get("reason") or "bench.py gave no latency", about))
        when = {"begun": self.begun, "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "bundle_sha256": job.sha256}
        try:
            write_rows(self.new / ROWS, o.rows)
        finally:
            write_json(self.new / ABOUT, {**o.to_json(), **when})
            place(self.folder)


def file_hashes(manifest: Manifest) -> dict[tuple[str, int], str]:
    """(target, resolution) -> sha256 of the file that a bundle has for it."""
    listed = {f.path: f.sha256 for f in manifest.files}
    return {(a.target, f.resolution): listed[f.path] for a in manifest.artifacts for f in a.files}


def problem_of(report: dict[str, Any]) -> str | None:
    """What failed or was skipped in a report, short, without anything that a terminal would obey."""
    lines = [r for key in ("results", "rows") for r in report.get(key, []) if isinstance(r, dict)]
    wrong = [r for r in lines if r.get("status") == "FAIL" or (r.get("conditions") or {}).get("failed")]
    wrong = wrong or [r for r in lines if r.get("status") in ("SKIP", "not measured")]
    texts: dict[str, list[str]] = {}
    for r in wrong:
        texts.setdefault(str(r.get("text", r.get("reason"))), []).append(str(r.get("check", r.get("target"))))
    told = [t if who[0] in ("all", "machine") or len(texts) == 1 < len(who) else f"{who[0]}: {t}" for t, who in texts.items()]
    return "; ".join(clause(t) for t in told[:3]) or None


def ask_all(
    devices: Sequence[DeviceConfig], config: Path | None, do: Callable[[Ssh, DeviceConfig], dict[str, Any]]
) -> list[tuple[DeviceConfig, dict[str, Any] | None, str | None]]:
    """One request to every device at once -> (device, its answer or None, why there is none)."""

    def one(device: DeviceConfig, ssh: Ssh) -> tuple[DeviceConfig, dict[str, Any] | None, str | None]:
        try:
            return device, do(ssh, device), None
        except (DeviceFailed, Lost) as e:
            return device, None, str(e)

    with sockets() as folder:
        made = [(d, Ssh(d.address(), d.python, config, folder / f"{uuid.uuid4().hex}.log", folder)) for d in devices]
        return at_once([partial(one, *pair) for pair in made], [ssh for _, ssh in made])


def at_once(calls: Sequence[Callable[[], T]], sshs: Sequence[Ssh]) -> list[T]:
    """Results of all calls, each in a thread of its own; what interrupts them here stops the connections too."""
    with ThreadPoolExecutor(len(calls)) as pool:
        try:
            futures = [pool.submit(call) for call in calls]
            waiting: set[Future[T]] = set(futures)
            while waiting:
                waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)[1]  # a signal gets its turn in between
        except BaseException:
            for ssh in sshs:
                ssh.stop()
            raise
    return [f.result() for f in futures]
