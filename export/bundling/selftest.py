"""`decant selftest`: verify a bundle, unpack it to a temporary folder, and let its own selftest.py judge it on this machine."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from distill.errors import EnvironmentFailed, GateFailed
from distill.progress import Progress
from export.bundling.archive import shown
from export.bundling.verify import ANYONE, Trust, unpack, verify

TIMEOUT_S = 1800.0
MAX_OUTPUT = 4 << 20


class SelftestResult(BaseModel):
    """One line of a self-test: the machine, the files, the preprocessing, or an artifact. More numbers ride along."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    check: str
    status: Literal["PASS", "FAIL", "SKIP"]
    text: str

    def line(self) -> str:
        return f"{self.status}  {shown(self.check):<12}  {''.join(c if c.isprintable() else '?' for c in self.text)}"


def selftest(
    path: Path, progress: Progress, seconds: float = 0.5, timeout: float = TIMEOUT_S, trust: Trust = ANYONE
) -> list[SelftestResult]:
    """Run a bundle's self-test here and say each result.

    The bundle's selftest.py runs in this Python's isolated mode: no PYTHONPATH, no user packages, nothing of this program. It
    is code of the bundle nevertheless; hashes do not tell who wrote it, `trust` does.

    Args:
        seconds: time for the latency of each file; 0 leaves it out.
        timeout: seconds after which the test counts as failed.
        trust: who must have signed the bundle.
    Raises:
        GateFailed: the bundle does not verify, or a check fails.
        EnvironmentFailed: none of its artifacts can run here, or the disk is full.
        UserError: there is no such file.
    """
    progress.say(verify(path, trust=trust).summary())
    with tempfile.TemporaryDirectory(prefix="decant-selftest-", ignore_cleanup_errors=True) as folder:
        unpack(path, Path(folder), trust=trust)  # verifies again what it writes: what runs is what was checked
        report = run_in(Path(folder), path, seconds, timeout)
    results = read_results(report, path)
    for result in results:
        progress.say(result.line())
    if failed := [r for r in results if r.status == "FAIL"]:
        raise GateFailed(f"{path} fails its self-test: {'; '.join(r.line()[6:] for r in failed)}.")
    skipped = [r for r in results if r.status == "SKIP"]
    if report.get("exit_code") == 3:
        raise EnvironmentFailed(f"Nothing of {path} can run here: {'; '.join(r.line()[6:] for r in skipped)}.")
    if report.get("exit_code") != 0:
        raise GateFailed(
            f"{path}: its self-test gave exit code {shown(str(report.get('exit_code')))} without saying what failed."
        )
    return results


def run_in(folder: Path, path: Path, seconds: float, timeout: float) -> dict[str, Any]:
    """Run FOLDER/selftest.py -> its report."""
    command = [sys.executable, "-I", "-B", str(folder / "selftest.py"), "--json", "--seconds", str(seconds)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            done = subprocess.run(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired as e:
            raise GateFailed(f"{path}: its self-test did not end within {timeout:.0f} s and was stopped.") from e
        out.seek(0)
        try:
            report = json.loads(out.read(MAX_OUTPUT))
        except (ValueError, RecursionError):
            report = None
        if not isinstance(report, dict):
            err.seek(0, 2)
            err.seek(max(0, err.tell() - 2000))
            last = shown((err.read().decode("utf-8", "replace").strip().splitlines() or ["no message"])[-1])
            raise GateFailed(f"{path}: its self-test ended with exit code {done.returncode} and no report ({last}).")
    if done.returncode != report.get("exit_code"):  # a crash on the way out is no success
        raise GateFailed(
            f"{path}: its self-test reports exit code {shown(str(report.get('exit_code')))} and ended with {done.returncode}."
        )
    return report


def read_results(report: dict[str, Any], path: Path) -> list[SelftestResult]:
    try:
        return [SelftestResult.model_validate(r) for r in report["results"]]
    except (KeyError, TypeError, ValidationError) as e:
        raise GateFailed(f"{path}: the report of its self-test is not one that this version reads.") from e
