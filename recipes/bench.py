"""`decant bench` on files: open them, time them in one interleaved run, print tables of 80 columns, write JSON or CSV."""

import csv
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from distill.errors import EnvironmentFailed, UserError
from distill.files import write_json, write_text
from distill.progress import Progress
from distill.rows import Row, not_measured
from export.artifact import NAME
from export.benchmark import BenchmarkConfig, benchmark
from export.fingerprint import fingerprint
from export.stopwatch.bench_files import GRAPH_RUNTIMES, NO_BUILD, Wanted, cases_of

FORMAT = "decant-bench-1"
BUSY = 0.2  # processors: more than this taken by others deserves a sentence
COLUMNS = ("subject", "target", "metric", "value", "low", "high", "n", "status", "reason")


def run_folder(targets: list[Path], options: list[str]) -> Path | None:
    """The run that is to be measured again, where the only target is one; None for files.

    Raises:
        UserError: a run among other targets, or with options.
    """
    runs = [t for t in targets if is_run(t)]
    if not runs:
        return None
    if len(targets) > 1:
        raise UserError(f"{runs[0]} is a run; name it alone, or name its artifacts, such as {runs[0]}/export/STUDENT/TARGET.")
    if options:
        raise UserError(
            f"{runs[0]} is a run, which is measured with its recipe's settings, without {options[0]}; "
            f"name its artifacts, such as {runs[0]}/export/STUDENT/TARGET, to choose others."
        )
    return runs[0]


def is_run(path: Path) -> bool:
    """Whether a folder can only be meant as a run."""
    return path.is_dir() and not any((path / name).is_file() for name in (NAME, "model.json"))


def bench_files(
    targets: list[Path],
    batches: list[int],
    resolution: int | None,
    threads: list[int],
    runtimes: list[str],
    seconds: float | None,
    rounds: int | None,
    versus: Path | None,
    cuda_graph: bool,
    as_json: Path | None,
    as_csv: Path | None,
    progress: Progress,
) -> None:
    """Measure and show.

    Raises:
        UserError: a target or an option that is wrong.
        EnvironmentFailed: nothing could be measured on this machine.
    """
    wanted = Wanted(resolution, tuple(checked_runtimes(runtimes)))
    for file in (as_json, as_csv):
        writable(file)
    with cases_of(targets, wanted) as by_target:
        cases = [case for found in by_target for case in found]
        base = by_target[base_index(targets, versus)][0].key
        fixed = sorted({c.only_batch or 1 for c in cases})
        asked: dict[str, Any] = {"seconds": seconds, "rounds": rounds, "threads": list(dict.fromkeys(threads)) or None}
        config = BenchmarkConfig(
            batches=sorted(set(batches)) or fixed,
            cuda_graph=cuda_graph,
            **{k: v for k, v in asked.items() if v is not None},
        )
        if problems := config.problems():
            raise UserError("; ".join(f"--{p}" for p in problems) + ".")
        rows = benchmark(config, cases, progress, base=base)
        built = {r.subject for r in rows if r.metric == "build_s"}
        for subject, target in dict.fromkeys(c.key for c in cases):
            rows += [] if subject in built else [not_measured("build_s", subject, target, NO_BUILD)]
    show(rows, base)
    write(rows, as_json, as_csv)
    timed = [r for r in rows if r.metric == "latency_p50_ms"]
    if not any(r.status == "measured" for r in timed):
        raise EnvironmentFailed(f"Nothing was measured: {timed[0].reason}")


def checked_runtimes(runtimes: list[str]) -> list[str]:
    if wrong := [r for r in runtimes if r not in GRAPH_RUNTIMES]:
        raise UserError(f"--runtime {wrong[0]} is none of {', '.join(GRAPH_RUNTIMES)}.")
    return list(dict.fromkeys(runtimes)) or ["onnxruntime"]


def base_index(targets: list[Path], versus: Path | None) -> int:
    """Which target the others are compared with.

    Raises:
        UserError: it is none of them.
    """
    if versus is None:
        return 0
    found = [i for i, t in enumerate(targets) if t.resolve() == versus.resolve()]
    if not found:
        raise UserError(f"--versus {versus} is none of the targets; name it among them: decant bench {targets[0]} {versus} ...")
    return found[0]


def writable(file: Path | None) -> None:
    """A folder that cannot be written is said before minutes of measuring."""
    if file is None:
        return
    nearest = next(p for p in file.absolute().parents if p.exists())
    if file.is_dir() or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{file} cannot be written; name a file in a folder that may be written.")


def write(rows: list[Row], as_json: Path | None, as_csv: Path | None) -> None:
    """JSON: {format, fingerprint, rows}. CSV: a line a row; its conditions as JSON in the last column."""
    try:
        if as_json is not None:
            values = [r.model_dump(exclude_none=True) for r in rows]
            write_json(as_json, {"format": FORMAT, "fingerprint": fingerprint(), "rows": values})
        if as_csv is not None:
            text = io.StringIO()
            lines = csv.writer(text, lineterminator="\n")
            lines.writerow([*COLUMNS, "batch", "threads", "conditions"])
            for r in rows:
                more = [r.conditions.get("batch"), r.conditions.get("threads"), json.dumps(r.conditions, sort_keys=True)]
                lines.writerow([*(getattr(r, c) for c in COLUMNS), *more])
            write_text(as_csv, text.getvalue())
    except OSError as e:
        raise UserError(f"{e.filename} cannot be written ({e.strerror}); name a file in a folder that may be written.") from e


def show(rows: list[Row], base: tuple[str, str]) -> None:
    from rich.console import Console

    from recipes.bench_table import comparison_table, file_table, latency_table, sentences

    console = Console(file=sys.stdout, highlight=False)
    console.print(latency_table(rows))
    if any(r.metric == "latency_ratio" for r in rows):
        console.print(comparison_table(rows, base))
    console.print(file_table(rows))
    for sentence in sentences(rows, os.cpu_count() or 1, BUSY):
        console.print(sentence, markup=False)
