"""The page of the report: rows and what `report.collect` found -> one HTML text that needs no network.

Every chart is drawn here as SVG, so that the page is complete without a script; our own small scripts (templates/*.js) then make the
charts and the choice of a file answer back. A plotting library would do so too: Plotly alone is over 3 MB, and a page has to stay
under 5 MB.
"""

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from distill.rows import Row
from export.reporting import compression_report, device_report, plots, tables
from export.reporting.advice import presets
from export.reporting.candidates import Candidate, candidates_of, runtimes_of
from export.reporting.labels import METRICS, label_of, metric_name
from export.reporting.panels import Panel
from export.reporting.pictures import captions
from export.reporting.report_charts import SHAPES, curve_panels, headline_bars, styles_of, tradeoff_charts
from export.reporting.report_schema import json_schema
from export.reporting.reproduce import artifact_commands
from export.reporting.tables import Book
from export.reporting.task_report import task_views

SECTIONS = {
    "accuracy": "Accuracy of frozen features",
    "artifacts": "What ships",
    "compression": "Compression",
    "tasks": "Other tasks",
    "devices": "On devices",
    "features": "What the features see",
    "training": "Training",
    "missing": "Not measured",
    "conditions": "Conditions",
    "reproduce": "Reproduce",
}
MOST_ROWS = 2500  # of the table of all numbers; report.csv has the rest


def render(
    report: dict[str, Any], rows: Sequence[Row], metric: str, strip: bytes | None, pictures: Sequence[Panel] = ()
) -> str:
    """The page as one HTML text. `metric`: the accuracy that stands in the plot and the choice."""
    book = Book(rows)
    styles = styles_of([subject for subject, _ in book.subjects()] + list(report["curves"]))
    headline = tables.headline_table(rows)
    charts, shapes = tradeoff_charts(book, metric, styles)
    compression = compression_report.view(report["compression"], book, metric, report["fingerprint"])
    tasks = task_views(book)
    shown = {"compression": bool(compression), "tasks": bool(tasks), "devices": bool(report["devices"])}
    sections = [name for name in SECTIONS if shown.get(name, True)]
    found = candidates_of(book, metric)
    machine = dict.fromkeys(("cpu", "memory_gb", "os", "python", "commit")) | {"gpus": [], "packages": {}}
    schema = json.dumps(json_schema(), indent=2)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report | {"fingerprint": machine | report["fingerprint"]},
            sections={name: (i, SECTIONS[name]) for i, name in enumerate(sections, 1)},
            number=Counter(),
            compression=compression,
            tasks=tasks,
            devices=device_report.views(report["devices"]),
            device_lines=device_report.device_lines(device_report.rows_of(report["devices"])),
            book=book,
            headline=headline,
            bars=headline_bars(headline, styles),
            artifacts=tables.artifact_table(book, metric),
            accuracy=METRICS[metric],
            charts=charts,
            shapes=shapes,
            presets=presets(found, metric),
            runtimes=runtimes_of(found),
            batches=sorted({int(b) for c in found if c.ships for b in c.latency}),
            data=_data(found, styles, METRICS[metric]),
            details=[_details(c, book, report) for c in found if c.ships],
            panels=curve_panels(report["curves"], styles),
            legend=[(label_of(s, "torch-fp32"), styles[s]) for s in report["curves"]],
            missing=tables.missing_table(rows),
            strip_rows=captions(strip) if strip else [],
            strip=base64.b64encode(strip).decode() if strip else None,
            pictures=[(p, base64.b64encode(p.image).decode(), p.size) for p in pictures],
            noise=next(iter(book.all("noise_floor_percent")), None),
            preprocess=book.all("preprocess_p50_ms"),
            busy=max((r.conditions.get("other_cores_busy") or 0.0 for r in rows), default=0.0),
            numbers=all_numbers(rows),
            most_rows=MOST_ROWS,
            schema=base64.b64encode(schema.encode()).decode(),
        )
    )


def _environment() -> Environment:
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
        "difference": tables.difference,
        "cosine": tables.cosine,
        "count": tables.count,
        "plain": tables.plain,
        "digits": tables.digits,
        "duration": duration,
        "short": plots.short,
        "tenths": lambda v: f"{v:.1f}",
        "moment": lambda text: str(text).replace("T", " ").replace("+00:00", "Z").replace("+0000", "Z").replace("Z", " UTC"),
        "condition": condition,
    }
    environment.tests["measured"] = tables.measured
    return environment


def _data(found: Sequence[Candidate], styles: dict[str, str], accuracy: str) -> Markup:
    """What the scripts read: a JavaScript object; no text in it can end the script."""
    points = []
    for c in found:
        kept = {k: v for k, v in asdict(c).items() if v is not None}
        points.append(kept | {"style": styles[c.subject], "shape": SHAPES.get(c.precision, "circle")})
    runtimes = {c.runtime: name for c in found for key, name in [*runtimes_of(found), ("torch", "PyTorch")] if key == c.runtime}
    subjects = {s: label_of(s, "torch-fp32") for s in dict.fromkeys(c.subject for c in found)}
    text = json.dumps(
        {"accuracy": accuracy, "points": points, "runtimes": runtimes, "subjects": subjects}, separators=(",", ":")
    )
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


@dataclass(frozen=True)
class Details:
    """All numbers of one file, where it lies, and what measures it again. `numbers`: (name, row)."""

    label: str
    path: str
    sha256: str | None
    numbers: list[tuple[str, Row]]
    commands: list[str]


def _details(c: Candidate, book: Book, report: dict[str, Any]) -> Details:
    mine = [
        r
        for r in book.of(c.subject, c.target)
        if c.resolution is None or r.conditions.get("resolution", c.resolution) == c.resolution
    ]
    sha = next((str(r.conditions["sha256"]) for r in mine if r.conditions.get("sha256")), None)
    numbers = [(_name(r), r) for r in mine if r.status == "measured"]
    path = f"export/{c.subject.partition('/')[2]}/{c.target}"
    return Details(c.label, path, sha, numbers, artifact_commands(mine, f"runs/{report['run']['name']}"))


def _name(row: Row) -> str:
    """The metric in words, with what tells it from its siblings."""
    name = row.metric.replace("_", " ") if metric_name(row) == "parity" else metric_name(row)
    output, versus, task = (row.conditions.get(k) for k in ("output", "versus", "task"))
    name += f" of {output}" if output else ""
    name += f" to {label_of(*str(versus).rpartition('/')[::2])}" if versus else ""
    return f"{task}: {name}" if task else name


@dataclass(frozen=True)
class Numbers:
    """The rows of one metric: `shared` conditions are the same in all of them, `lines` are (row, its own conditions)."""

    metric: str
    shared: str
    lines: list[tuple[Row, str]]


def all_numbers(rows: Iterable[Row]) -> list[Numbers]:
    """Every row by metric, what a metric's rows have in common said once: a page of thousands of rows stays small."""
    by_metric: dict[str, list[Row]] = {}
    for row in rows:
        by_metric.setdefault(row.metric, []).append(row)
    found, left = [], MOST_ROWS
    for metric, mine in by_metric.items():
        common = {k: v for k, v in mine[0].conditions.items() if all(r.conditions.get(k) == v for r in mine)}
        common = common if len(mine) > 1 else {}
        lines = [(r, _conditions({k: v for k, v in r.conditions.items() if k not in common})) for r in mine[: max(left, 0)]]
        left -= len(lines)
        if lines:
            found.append(Numbers(metric, _conditions(common), lines))
    return found


def _conditions(values: dict[str, Any]) -> str:
    return "; ".join(f"{k}={condition(v)}" for k, v in sorted(values.items()))


def condition(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else "" if value is None else str(value)


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
