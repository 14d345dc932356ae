"""`decant device`: a bundle on other machines, their numbers brought home into a run's report."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from distill.config import Config
from distill.errors import EnvironmentFailed, GateFailed, UserError
from distill.files import sha256_file
from distill.progress import Progress
from distill.rows import read_rows
from export.bundling.archive import shown
from export.bundling.verify import Trust, verify
from export.devices.address import parse_address
from export.devices.config import DeviceConfig
from export.devices.fleet import Job, Outcome, ask_all, file_hashes, run_fleet
from export.devices.results import check_place, lock_folder
from export.devices.ssh import Ssh
from export.reporting.device_report import hashes_in
from export.reporting.labels import SHIPPED
from recipes.loading import Draft
from recipes.lock import locked

FORMAT = "decant-devices-1"
RUNTIMES = ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx")  # as a device names them


class DevicesFile(Config):
    """A device file: `devices:` and a list."""

    devices: list[DeviceConfig]

    def problems(self) -> list[tuple[str, str]]:
        """(dotted path, sentence) of everything that is wrong."""
        found = [(f"devices.{i}", sentence) for i, d in enumerate(self.devices) for sentence in d.problems()]
        if not self.devices:
            found.append(("devices", "names no device"))
        if not found:
            for what, of in (("name", lambda d: d.name), ("place", lambda d: d.address())):
                keys = [of(d) for d in self.devices]
                found += [(f"devices.{i}", f"has the {what} of an earlier device") for i, k in enumerate(keys) if k in keys[:i]]
        return found


def read_devices(file: Path) -> list[DeviceConfig]:
    """The devices of a file.

    Raises:
        UserError: a line for every problem, with its line number.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"The device file {file} cannot be read: {e}.") from e
    draft = Draft(str(file), text)
    if draft.unreadable and not text.lstrip().startswith(("{", "devices")):
        raise UserError(f"{file}:1: a device file begins with `devices:`, and below it a list of `name` and `on`.")
    found = None if draft.unreadable else draft.validated(DevicesFile)
    if draft.problems or found is None:
        raise UserError("\n".join(draft.sentences()))
    return found.devices


def devices_of(on: Sequence[str], file: Path | None, python: str | None, timeout: float | None) -> list[DeviceConfig]:
    """Devices of the command line and of the file; options hold for those that the file does not settle.

    Raises:
        UserError: there is none, or something is wrong with one.
    """
    given: dict[str, Any] = {**({"python": python} if python else {}), **({} if timeout is None else {"timeout": timeout})}
    named = [DeviceConfig(name=parse_address(text).name, on=text, **given) for text in on]
    listed = [] if file is None else read_devices(file)
    found = [*named, *(d.model_copy(update={k: v for k, v in given.items() if k not in d.model_fields_set}) for d in listed)]
    if not found:
        raise UserError("Name a device with --on ssh://user@host, or a file of devices with --devices FILE.")
    if problems := DevicesFile(devices=found).problems():
        raise UserError("\n".join(f"Device {found[int(where.split('.')[1])].name}: {text}." for where, text in problems))
    return found


def run(
    bundle: Path,
    devices: Sequence[DeviceConfig],
    trust: Trust,
    out: Path,
    subject: str | None,
    bench: Sequence[str],
    config: Path | None,
    as_json: bool,
    progress: Progress,
) -> None:
    """The bundle on every device; rows and reports come home into `out`.

    Args:
        subject: as in Row; None: the student of the bundle's manifest.
        bench: options of the bundle's bench.py.
        config: a configuration file for ssh.

    Raises:
        UserError: `out` is no folder, holds files of others, or takes the results of another run now.
        GateFailed: the bundle is refused here, or a device failed a check.
        EnvironmentFailed: a device could not be reached, or can run nothing.
    """
    result = verify(bundle, trust=trust)
    progress.say(result.summary())
    job = Job(result, sha256_file(bundle), subject or f"students/{shown(result.manifest.student)}", tuple(bench), config)
    with ExitStack() as stack:
        for folder in (out / d.name for d in devices):
            check_place(folder)
            lock_folder(folder).mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(lock_folder(folder)))
        outcomes = run_fleet(job, devices, out, progress)
    show(outcomes, as_json)
    progress.say(f"Rows, reports and logs: {out}")
    judge(outcomes)


def judge(outcomes: Sequence[Outcome]) -> None:
    """A failed check counts before an absent device."""
    told = "; ".join(f"{o.name}: {o.reason}" for o in outcomes if o.exit_code)
    code = exit_code(outcomes)
    if code == 1:
        raise GateFailed(f"Not every device passes ({told}).")
    if code:
        raise EnvironmentFailed(f"Not every device could be measured ({told}).")


def exit_code(outcomes: Sequence[Outcome]) -> int:
    codes = {o.exit_code for o in outcomes}
    return 1 if 1 in codes else 3 if 3 in codes else 0


def subject_in(run_folder: Path, bundle: Path, trust: Trust) -> str | None:
    """Which of a run's models a bundle holds, by its name: `pruned/half` rather than `students/half` where that is in the rows.

    Raises:
        UserError: it is no run, or the bundle's artifacts are not those that the run has now.
    """
    from recipes.run import run_info

    run_info(run_folder)
    manifest = verify(bundle, trust=trust).manifest
    have = hashes_in(run_folder, manifest.student)
    for (target, resolution), sha256 in file_hashes(manifest).items():
        if have.get((target, resolution)) != sha256:
            what = f"{shown(manifest.student)}, {shown(target)} at {resolution} px"
            raise UserError(
                f"{bundle} is no bundle of what {run_folder} has exported ({what}, differs); bundle the run again, or use --out."
            )
    known = {r.subject for r in read_rows(run_folder / "rows.jsonl")}
    return next((f"{kind}/{manifest.student}" for kind in SHIPPED if f"{kind}/{manifest.student}" in known), None)


def show(outcomes: Sequence[Outcome], as_json: bool) -> None:
    if as_json:
        found = [o.to_json() | {"rows": [r.model_dump(exclude_none=True) for r in o.rows]} for o in outcomes]
        print(json.dumps({"format": FORMAT, "devices": found, "exit_code": exit_code(outcomes)}, indent=2, sort_keys=True))
        return
    from rich.console import Console
    from rich.markup import escape

    from recipes.bench_table import device_gaps, device_table

    console = Console(file=sys.stdout, highlight=False)
    for o in outcomes:
        console.print(f"[bold]{escape(o.name)}[/]: {o.status}{escape(f', {o.reason}') if o.reason else ''}")
        if o.steps:
            console.print(escape("steps: " + ", ".join(f"{name} {step['status']}" for name, step in o.steps.items())))
        if any(r.metric == "latency_p50_ms" and r.value is not None for r in o.rows):
            console.print(device_table(o.rows))
        for line in device_gaps([r for r in o.rows if not (r.target == "all" and o.reason)]):  # that reason was said above
            console.print(escape(line), soft_wrap=True)


def look(devices: Sequence[DeviceConfig], config: Path | None, as_json: bool) -> None:
    """`decant device list`.

    Raises:
        EnvironmentFailed: a device does not answer.
    """
    shown_as = ("python", "model", "gpu", "jetpack", "l4t", *RUNTIMES, "free_gb")
    words = ("reachable", "not reachable", "Not every device answers")

    def about(ssh: Ssh, device: DeviceConfig) -> dict[str, Any]:
        found = ssh.ask("about", env=device.env)["about"]
        return found | {"missing": lacking(found)}

    _report(devices, config, as_json, about, shown_as, words)


def lacking(about: Mapping[str, Any]) -> list[str]:
    """What a bundle needs and a device does not have, in words."""
    found = [word for key, word in (("numpy", "numpy"), ("pillow", "Pillow")) if key not in about]
    return found + (["a runtime"] if not any(name in about for name in RUNTIMES) else [])


def clean(devices: Sequence[DeviceConfig], config: Path | None, as_json: bool) -> None:
    """`decant device clean`.

    Raises:
        EnvironmentFailed: a device does not answer, or is at work.
    """

    def freed(ssh: Ssh, device: DeviceConfig) -> dict[str, Any]:
        return {"freed_mb": round(ssh.ask("clean")["bytes"] / 1e6, 1)}

    _report(devices, config, as_json, freed, ("freed_mb",), ("clean", "not cleaned", "Not every device was cleaned"))


def _report(
    devices: Sequence[DeviceConfig],
    config: Path | None,
    as_json: bool,
    do: Callable[[Ssh, DeviceConfig], dict[str, Any]],
    columns: Sequence[str],
    words: tuple[str, str, str],
) -> None:
    """A line for each device. words: the state of one that answers and of one that does not, and the latter as a sentence."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    answers = ask_all(devices, config, do)
    if as_json:
        print(json.dumps([{**(found or {}), "name": d.name, "on": d.on, "reason": why} for d, found, why in answers], indent=2))
    else:
        here = [c for c in columns if any(found and c in found for _, found, _ in answers)]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("device", "state", *here):
            table.add_column(column, overflow="fold")
        for d, found, why in answers:
            state = words[0] if found is not None else f"{words[1]}: {why}"
            state += f"; missing: {', '.join(missing)}" if (missing := (found or {}).get("missing")) else ""
            table.add_row(d.name, state, *(shown(str((found or {}).get(c, ""))) for c in here))
        Console(file=sys.stdout, highlight=False).print(table)
    if lost := [f"{d.name}: {why}" for d, _, why in answers if why]:
        raise EnvironmentFailed(f"{words[2]} ({'; '.join(lost)}).")
