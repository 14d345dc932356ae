"""The report: report.json (the truth), report.csv, report.md, and index.html, one file that needs no network.

Everything is derived from rows and from the training logs of the run folder; nothing is read back from a page or a table.
"""

import base64
import csv
import io
import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from distill.config import Config
from distill.files import read_json, write_bytes, write_json, write_text
from distill.rows import Row
from export import compression_report, plots, tables
from export.fingerprint import fingerprint as fingerprint_now
from export.labels import METRICS, label_of
from export.pictures import captions
from export.report_charts import curve_panels, headline_bars, styles_of, tradeoff_charts
from export.summary import summary
from export.tables import Book, console_table, headline_table

__all__ = ["ReportConfig", "console_table", "headline_table", "write_report"]

SCHEMA = "decant-report-1"
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
SECTIONS = {
    "accuracy": "Accuracy of frozen features",
    "artifacts": "What ships",
    "compression": "Compression",
    "features": "What the features see",
    "training": "Training",
    "missing": "Not measured",
    "conditions": "Conditions",
    "reproduce": "Reproduce",
}


class ReportConfig(Config):
    """How the report is presented; no number depends on it.

    Attributes:
        title: heading of the page; the recipe's name without one.
        accuracy: which accuracy stands in the plot and in the table of artifacts.
    """

    title: str | None = None
    accuracy: Literal["knn_top1", "linear_top1"] = "knn_top1"


def write_report(
    run_folder: Path,
    out_folder: Path,
    rows: Sequence[Row],
    config: ReportConfig | None = None,
    *,
    strip: bytes | None = None,
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
        fingerprint: of the machine that measured; without it RUN/benchmark/fingerprint.json, and without that this machine's.
        commands: what reproduces the run; without them, the general ones.
        models, stages: subjects and stages that belong to the recipe; None: all that lie in the folder, where an earlier recipe's may too.
    """
    config = config or ReportConfig()
    report = collect(run_folder, rows, config, fingerprint, commands, models, stages)
    page = render(report, rows, config, strip)
    write_json(out_folder / "report.json", report)
    write_text(out_folder / "report.csv", csv_text(rows))
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
    recipe = run_folder / "recipe.yaml"
    curves = {name: log for name, log in training_curves(run_folder).items() if models is None or name in models}
    return {
        "schema": SCHEMA,
        "title": config.title or run.get("recipe") or run_folder.name,
        "run": {"name": run_folder.resolve().name, **run},
        "summary": summary(rows, {name: log[-1].get("images") for name, log in curves.items()}),
        "rows": [row.model_dump(exclude_none=True) for row in rows],
        "fingerprint": found,
        "fingerprint_of": "the machine that measured" if fingerprint or stored else "the machine that wrote this report",
        "compression": compression_report.collect(run_folder, rows),
        "recipe": recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        "curves": curves,
        "stages": [s for s in stage_times(run_folder) if stages is None or s["stage"] in stages],
        "commands": list(commands or reproduce(found.get("commit"), run_folder.resolve().name)),
    }


def reproduce(commit: str | None, name: str) -> list[str]:
    """The commands that make the same run again."""
    modified = bool(commit and commit.endswith("-modified"))
    checkout = [f"git checkout {commit.removesuffix('-modified')}"] if commit else []
    note = ["# the code differed from this commit: see the fingerprint"] if modified else []
    return [
        *note,
        *checkout,
        "python -m pip install .",
        "decant check recipe.yaml",
        f"decant run recipe.yaml --out runs/{name}-again",
    ]


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
    writer.writerow(first + names)
    for row in rows:
        values = [getattr(row, name) for name in first] + [row.conditions.get(name) for name in names]
        writer.writerow(["" if v is None else json.dumps(v) if isinstance(v, dict | list) else v for v in values])
    return out.getvalue()


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
    missing = tables.missing_table(rows)
    lines += ["## Not measured", ""] + (["Everything that was asked for was measured."] if not missing else [])
    for group in missing:
        lines.append(f"- {safe(group.reason)}")
        lines += [f"  - {safe(what)}: {metrics}" for what, metrics in group.items]
    return "\n".join(lines) + "\n"


def render(report: dict[str, Any], rows: Sequence[Row], config: ReportConfig, strip: bytes | None) -> str:
    """The page as one HTML text."""
    book = Book(rows)
    styles = styles_of([subject for subject, _ in book.subjects()] + list(report["curves"]))
    environment = Environment(
        loader=PackageLoader("export", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": tables.percent,
        "significant": tables.significant,
        "points": tables.points,
        "cosine": tables.cosine,
        "count": tables.count,
        "plain": tables.plain,
        "digits": tables.digits,
        "duration": duration,
        "short": plots.short,
        "tenths": lambda v: f"{v:.1f}",
        "moment": lambda text: str(text).replace("T", " ").replace("+00:00", "Z").replace("+0000", "Z").replace("Z", " UTC"),
        "condition": lambda v: json.dumps(v) if isinstance(v, dict | list) else "" if v is None else str(v),
    }
    environment.tests["measured"] = tables.measured
    headline = headline_table(rows)
    charts, shapes = tradeoff_charts(book, config.accuracy, styles)
    compression = compression_report.view(report["compression"], book, config.accuracy)
    sections = [name for name in SECTIONS if name != "compression" or compression]
    machine: dict[str, Any] = {
        "cpu": None,
        "memory_gb": None,
        "gpus": [],
        "os": None,
        "python": None,
        "packages": {},
        "commit": None,
    }
    return environment.get_template("report.html.j2").render(
        report=report | {"fingerprint": machine | report["fingerprint"]},
        sections={name: (i, SECTIONS[name]) for i, name in enumerate(sections, 1)},
        number=Counter(),
        compression=compression,
        book=book,
        headline=headline,
        bars=headline_bars(headline, styles),
        artifacts=tables.artifact_table(book, config.accuracy),
        accuracy=METRICS[config.accuracy],
        charts=charts,
        shapes=shapes,
        panels=curve_panels(report["curves"], styles),
        legend=[(label_of(s, "torch-fp32"), styles[s]) for s in report["curves"]],
        missing=tables.missing_table(rows),
        strip_rows=captions(strip) if strip else [],
        strip=base64.b64encode(strip).decode() if strip else None,
        noise=next(iter(book.all("noise_floor_percent")), None),
        preprocess=book.all("preprocess_p50_ms"),
        busy=max((r.conditions.get("other_cores_busy") or 0.0 for r in rows), default=0.0),
    )


class Counter:
    """Numbers tables and figures in the order in which the template comes to them."""

    def __init__(self) -> None:
        self.counts = {"table": 0, "figure": 0}

    def next(self, kind: str) -> int:
        self.counts[kind] += 1
        return self.counts[kind]


def duration(seconds: float) -> str:
    """4.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {s:02} s"
