"""The command line of `decant device`; what it does is in recipes/device.py."""

from pathlib import Path
from typing import Annotated

import typer

from distill.errors import UserError
from recipes.cli_parts import Bundle, Keys, Quiet, RequireSignature, collect_garbage, progress, sentences
from recipes.signals import TERM_AND_HANGUP, interrupting

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Test and time a bundle on other machines, over ssh.")

On = Annotated[
    list[str],
    typer.Option("--on", metavar="ADDRESS", help="ssh://user@host[:port][/dir]; may be repeated. /~/dir is in the home."),
]
Devices = Annotated[Path | None, typer.Option("--devices", metavar="FILE", help="A YAML file of devices.")]
File = Annotated[Path | None, typer.Argument(metavar="[FILE]", help="A YAML file of devices, as --devices names one too.")]
Python = Annotated[
    str | None, typer.Option("--python", help="The device's Python that has the runtimes, or a path there. By default python3.")
]
SshConfig = Annotated[
    Path | None,
    typer.Option(
        "--ssh-config", metavar="FILE", exists=True, dir_okay=False, help="A configuration file for ssh, in place of your own."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


@app.command()
def run(
    bundle: Bundle,
    on: On = [],  # noqa: B006  typer copies it
    devices: Devices = None,
    key: Keys = [],  # noqa: B006
    require_signature: RequireSignature = False,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="RUN", help="Put the results into this run's folder, for its report.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where results go without --run. By default devices.")
    ] = None,
    python: Python = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", metavar="S", help="Seconds that one step may take there. By default 1800.")
    ] = None,
    batch: Annotated[list[int], typer.Option("--batch", min=1, help="Images a call; may be repeated. By default 1.")] = [],  # noqa: B006
    seconds: Annotated[float, typer.Option("--seconds", help="Timed seconds of each file and batch.")] = 2.0,
    threads: Annotated[int, typer.Option("--threads", min=0, help="Of the device's CPU; 0: its runtime decides.")] = 0,
    ssh_config: SshConfig = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Copy a bundle to devices, verify it, rebuild its engines, self-test and time it there, and bring the numbers home.

    Uses your `ssh` with its keys, agent, aliases and jump hosts; `ssh HOST` must work without a question. It runs code of the bundle on
    the devices: --key says whose it must be. Exit code 1 when a device fails a check, 3 when one cannot be reached or can
    run nothing.
    """
    with sentences(), interrupting(TERM_AND_HANGUP):
        from export.reporting.device_report import FOLDER
        from recipes.device import devices_of, subject_in
        from recipes.device import run as run_on
        from recipes.signing import trust_in

        collect_garbage()
        if run is not None and out is not None:
            raise UserError("--run and --out both say where the results go; give one of them.")
        if not 0.01 <= seconds <= 86400:
            raise UserError(f"--seconds must lie in 0.01..86400, got {seconds:g}.")
        found = devices_of(on, devices, python, timeout)
        trust = trust_in(key, require_signature)
        options = ["--seconds", str(seconds), "--threads", str(threads), *(part for b in batch for part in ("--batch", str(b)))]
        subject = None if run is None else subject_in(run, bundle, trust)
        folder = (out or Path(FOLDER)) if run is None else run / FOLDER
        run_on(bundle, found, trust, folder, subject, options, ssh_config, as_json, progress(quiet))
        if run is not None and not as_json:
            typer.echo(f"Next:   decant report {run}")


def one_file(argument: Path | None, option: Path | None) -> Path | None:
    """The device file, which may be named in two ways.

    Raises:
        UserError: it was, with two names.
    """
    if argument is not None and option is not None:
        raise UserError(f"{argument} and --devices {option} both name a device file; give one of them.")
    return argument or option


@app.command("list")
def look(
    file: File = None,
    on: On = [],  # noqa: B006
    devices: Devices = None,
    python: Python = None,
    ssh_config: SshConfig = None,
    as_json: AsJson = False,
) -> None:
    """Say which devices answer, and what each has: Python, runtimes, GPU, JetPack, free disk."""
    with sentences(), interrupting(TERM_AND_HANGUP):
        from recipes.device import devices_of
        from recipes.device import look as look_at

        look_at(devices_of(on, one_file(file, devices), python, None), ssh_config, as_json)


@app.command()
def clean(
    file: File = None,
    on: On = [],  # noqa: B006
    devices: Devices = None,
    python: Python = None,
    ssh_config: SshConfig = None,
    as_json: AsJson = False,
) -> None:
    """Remove from devices what `decant device run` put there, and nothing else."""
    with sentences(), interrupting(TERM_AND_HANGUP):
        from recipes.device import clean as clean_up
        from recipes.device import devices_of

        clean_up(devices_of(on, one_file(file, devices), python, None), ssh_config, as_json)
