"""The report: report.json (the truth), report.csv, report.md, and index.html, one file that needs no network.

Everything is derived from rows and from the training logs of the run folder; nothing is read back from a page or a table.
"""

import csv
import io
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from distill.config import Config
from distill.files import read_json, write_bytes, write_json, write_text
from distill.rows import Row
from export.fingerprint import fingerprint as fingerprint_now
from export.reporting import compression_report, device_report, tables
from export.reporting.advice import presets
from export.reporting.candidates import candidates_of
from export.reporting.page import render
from export.reporting.panels import Panel
from export.reporting.report_schema import SCHEMA, VERSION
from export.reporting.reproduce import families, whole_run
from export.reporting.summary import summary
from export.reporting.tables import Book, console_table, headline_table
from export.reporting.trackers import Tracker

__all__ = ["ReportConfig", "console_table", "headline_table", "write_report"]

STAGES = (
    "load",
    "pretrain",
    "high_res",
    "fit_heads",
    "distill",
    "control",
    "pruned",
    "qad",
    "export",
    "parity",
    "evaluate",
    "benchmark",
)


class ReportConfig(Config):
    """How the report is presented; no number depends on it.

    Attributes:
        title: heading of the page; the recipe's name without one.
        accuracy: which accuracy stands in the plot and in the table of artifacts.
        trackers: where else rows and training curves go: `tensorboard`, `mlflow`, `trackio` (export/reporting/trackers.py), if installed.
    """

    title: str | None = None
    accuracy: Literal["knn_top1", "linear_top1"] = "knn_top1"
    trackers: list[Tracker] = Field(default_factory=list)

    def problems(self) -> list[str]:
        twice = len(set(self.trackers)) < len(self.trackers)
        return [f"trackers names one twice: {', '.join(self.trackers)}"] if twice else []


def write_report(
    run_folder: Path,
    out_folder: Path,
    rows: Sequence[Row],
    config: ReportConfig | None = None,
    *,
    strip: bytes | None = None,
    pictures: Sequence[Panel] = (),
    fingerprint: dict[str, Any] | None = None,
    commands: Sequence[str] | None = None,
    models: Collection[str] | None = None,
    stages: Collection[str] | None = None,
) -> Path:
    """Write report.json, report.csv, report.md and index.html into `out_folder`; returns the page's path.

    Args:
        run_folder: its recipe.yaml, run.json, the models' train.jsonl and the stages' done.json are read, if they exist.
        rows: all of the run.
        strip: PNG of `pictures.pca_strip`.
        pictures: more pictures for the page, of `export/reporting/panels.py` or of your own; their names are unique.
        fingerprint: of the machine that measured; without it RUN/benchmark/fingerprint.json, and without that this machine's.
        commands: what reproduces the run; without them, the general ones.
        models, stages: subjects and stages that belong to the recipe; None: all that lie in the folder, where an earlier recipe's may too.
    """
    config = config or ReportConfig()
    report = collect(run_folder, rows, config, fingerprint, commands, models, stages) | {"pictures": _about(pictures)}
    page = render(report, rows, config.accuracy, strip, pictures)
    write_json(out_folder / "report.json", report)
    write_text(out_folder / "report.csv", csv_text([*rows, *device_report.rows_of(report["devices"])]))
    write_text(out_folder / "report.md", markdown(report, rows))
    if strip:
        write_bytes(out_folder / "pictures.png", strip)
    write_text(out_folder / "index.html", page)
    return out_folder / "index.html"


def collect(
    run_folder: Path,
    rows: Sequence[Row],
    config: ReportConfig,
    fingerprint: dict[str, Any] | None,
    commands: Sequence[str] | None,
    models: Collection[str] | None,
    stages: Collection[str] | None,
) -> dict[str, Any]:
    """All that the report knows, JSON-ready: what report.json holds and what the page is made of."""
    run = _json_or(run_folder / "run.json", {})
    stored = _json_or(run_folder / "benchmark" / "fingerprint.json", None)
    found = fingerprint or stored or fingerprint_now()
    recipe, name = run_folder / "recipe.yaml", run_folder.resolve().name
    curves = {s: log for s, log in training_curves(run_folder).items() if models is None or s in models}
    return {
        "schema": SCHEMA,
        "schema_version": VERSION,
        "title": config.title or run.get("recipe") or run_folder.name,
        "run": {"name": name, **run},
        "summary": summary(rows, {subject: log[-1].get("images") for subject, log in curves.items()}),
        "rows": [row.model_dump(exclude_none=True) for row in rows],
        "advice": _advice(rows, config.accuracy),
        "fingerprint": found,
        "fingerprint_of": "the machine that measured" if fingerprint or stored else "the machine that wrote this report",
        "compression": compression_report.collect(run_folder, rows),
        "devices": device_report.collect(run_folder),
        "recipe": recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        "curves": curves,
        "stages": [s for s in stage_times(run_folder) if stages is None or s["stage"] in stages],
        "commands": list(commands or whole_run(found.get("commit"), name)),
        "reproduce": [asdict(family) for family in families(rows, f"runs/{name}")],
    }


def _advice(rows: Sequence[Row], metric: str) -> list[dict[str, Any]]:
    """The presets' answers, without the reasons of all others: `advice.advise` gives those again from the rows."""
    return [
        {
            "name": p.name,
            "wanted": asdict(p.wanted),
            "best": p.advice.best,
            "nearest": p.advice.nearest,
            "sentence": p.advice.sentence,
            "notes": p.advice.notes,
        }
        for p in presets(candidates_of(Book(rows), metric), metric)
    ]


def _about(pictures: Sequence[Panel]) -> list[dict[str, Any]]:
    """The pictures as report.json tells of them: all but the bytes."""
    names = [p.name for p in pictures]
    if repeated := next((n for n in names if names.count(n) > 1), None):
        raise ValueError(f"two pictures are called {repeated!r}: names are unique in a report")
    return [{"name": p.name, "caption": p.caption, "alt": p.alt, "type": p.mime, "bytes": len(p.image)} for p in pictures]


def training_curves(run_folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Subject -> the records of its train.jsonl; a line that a kill cut short, or that holds no number, is left out.

    The recoveries of a model that was pruned in rounds follow one another.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for group in ("teacher", "students", "control", "pruned", "qad"):
        for path in sorted((run_folder / group).rglob("train.jsonl"), key=_natural):
            records = [r for line in path.read_text(encoding="utf-8").splitlines() if (r := _record(line))]
            subject = "/".join(path.parent.relative_to(run_folder).parts[:2])
            before = found.setdefault(subject, [])
            seen = before[-1]["images"] if before else 0
            before += [r | {"images": r["images"] + seen} for r in records]
    return {subject: records for subject, records in found.items() if records}


def _natural(path: Path) -> list[tuple[int, str]]:
    """round-2 before round-10."""
    return [(len(part), part) for part in path.parts]


def _record(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line, parse_constant=lambda name: None)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("images"), int | float) else None


def stage_times(run_folder: Path) -> list[dict[str, Any]]:
    """Stage, seconds and how it ended, of every finished stage, in the order of the main path."""
    found = []
    for path in sorted(run_folder.rglob("done.json")):
        done = _json_or(path, {})
        if "replaced" not in path.relative_to(run_folder).parts and "stage" in done and "seconds" in done:
            kept = {k: done[k] for k in ("stage", "seconds", "attempts", "gate", "skipped") if k in done}
            found.append(kept)
    rank = {name: i for i, name in enumerate(STAGES)}
    return sorted(found, key=lambda s: (rank.get(s["stage"].split("/")[0], len(rank)), s["stage"]))


def _json_or(path: Path, default: Any) -> Any:
    """A JSON file, or the default where it is absent or damaged: a report of a half-finished run is still a report."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return default


def csv_text(rows: Iterable[Row]) -> str:
    """A row a line; every condition that occurs is a column of its own."""
    rows = list(rows)
    names = sorted({name for row in rows for name in row.conditions})
    first = ["subject", "target", "metric", "value", "low", "high", "n", "status", "reason"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(csv_cell, first + names))
    for row in rows:
        values = [getattr(row, name) for name in first] + [row.conditions.get(name) for name in names]
        writer.writerow(map(csv_cell, values))
    return out.getvalue()


def csv_cell(value: Any) -> Any:
    """A value as a cell. What a table program would take for a formula gets an apostrophe: names and reasons may be a device's."""
    if isinstance(value, dict | list):
        return json.dumps(value)
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return "" if value is None else value


def markdown(report: dict[str, Any], rows: Sequence[Row]) -> str:
    """Summary, headline table, and what was not measured."""

    def safe(text: str) -> str:
        """Names and reasons are text: no markup of theirs, no cell or line that they end."""
        return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")

    lines = [f"# {safe(report['title'])}", "", safe(" ".join(report["summary"])), ""]
    lines += ["| | kNN % | linear % | n | latency ms | size MB |", "|---|---:|---:|---:|---:|---:|"]
    for line in headline_table(rows):
        accuracy = f"{tables.percent(line.knn)} | {tables.percent(line.linear)} | {tables.count(line.n)}"
        lines.append(
            f"| {safe(line.label)} | {accuracy} | {tables.significant(line.latency)} | {tables.significant(line.size)} |"
        )
    lines += ["", "In brackets: 95 % intervals. Latency is the median of one call at the smallest batch measured.", ""]
    if cells := device_report.table_cells(report["devices"], tables.significant):
        lines += ["## On devices", "", "| device | file | px | batch | latency ms | images a second | PNG to features ms |"]
        lines += ["|---|---|---:|---:|---:|---:|---:|", *(f"| {' | '.join(map(safe, line))} |" for line in cells), ""]
        lines += [f"{safe(d['name'])}: {safe(d['reason'])}." for d in report["devices"] if d["reason"]] + [""]
    missing = tables.missing_table(rows)
    lines += ["## Not measured", ""] + (["Everything that was asked for was measured."] if not missing else [])
    for group in missing:
        lines.append(f"- {safe(group.reason)}")
        lines += [f"  - {safe(what)}: {metrics}" for what, metrics in group.items]
    return "\n".join(lines) + "\n"
