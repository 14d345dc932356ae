"""The tables that `decant bench` ends with, and the sentences below them: what was not measured, the noise floor, who else worked."""

from collections.abc import Iterable

from rich import box
from rich.table import Table

from distill.rows import Row
from export.reporting.device_report import device_lines
from export.reporting.labels import METRICS

VERDICTS = {"FASTER": "[green]FASTER[/]", "SLOWER": "[red]SLOWER[/]", "INCONCLUSIVE": "INCONCLUSIVE"}
NOTHING = "not measured"
SHOWN = {
    **METRICS,
    "energy_mj_per_image": "energy",
    "gpu_latency_p50_ms": "GPU time alone",
    "preprocess_p50_ms": "preprocessing",
}
COSTS = {
    "size_mb": "size MB",
    "load_s": "load s",
    "peak_memory_mb": "peak MB",
    "energy_mj_per_image": "mJ/image",
    "build_s": "build s",
}
AT = ("resolution", "batch", "threads")  # conditions that tell timings of one file apart


def number(value: float | None) -> str:
    """Three significant figures, thousands whole."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def interval(row: Row) -> str:
    return "" if row.low is None or row.high is None else f"{number(row.low)} – {number(row.high)}"


def name_of(subject: str, target: str) -> str:
    return f"{subject} {target}"


def several(rows: Iterable[Row], condition: str) -> bool:
    return len({r.conditions.get(condition) for r in rows}) > 1


def new_table(title: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("file", overflow="fold")
    return table


def place(row: Row, shown: list[str]) -> list[str]:
    return [str(row.conditions.get(c, "")) for c in shown]


def latency_table(rows: list[Row]) -> Table:
    """A line a file, batch and number of threads."""
    timed = [r for r in rows if r.metric == "latency_p50_ms"]
    shown = [c for c in AT if c == "batch" or several(timed, c)]
    others = {(r.metric, r.subject, r.target, *place(r, list(AT))): r for r in rows}
    gpu = any(r.metric == "gpu_latency_p50_ms" for r in rows)
    table = new_table("Latency, ms a call")
    columns = ["p50", "95 % interval", "p90", "p99", *(["GPU alone"] if gpu else []), "a second"]
    for column in [*("px" if c == "resolution" else c for c in shown), *columns]:
        table.add_column(column, justify="right", no_wrap=True)
    for r in timed:
        if r.value is None:  # a sentence says why
            continue
        key = (r.subject, r.target, *place(r, list(AT)))
        name = name_of(r.subject, r.target)
        p90, p99, alone, rate = (
            others.get((m, *key)) for m in ("latency_p90_ms", "latency_p99_ms", "gpu_latency_p50_ms", "images_per_s")
        )
        cells = [number(r.value), interval(r), number(p90.value if p90 else None), "" if p99 is None else number(p99.value)]
        cells += [number(alone.value if alone else None)] if gpu else []
        table.add_row(name, *place(r, shown), *cells, number(rate.value if rate else None))
    return table


def comparison_table(rows: list[Row], base: tuple[str, str]) -> Table:
    """A line a file against the base."""
    ratios = [r for r in rows if r.metric == "latency_ratio"]
    shown = [c for c in AT if several(ratios, c)]
    table = new_table(f"Time as a multiple of {name_of(*base)}'s")
    for column in [*("px" if c == "resolution" else c for c in shown), "ratio", "95 % interval"]:
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for r in ratios:
        verdict = VERDICTS[r.conditions["verdict"]]
        table.add_row(name_of(r.subject, r.target), *place(r, shown), number(r.value), interval(r), verdict)
    return table


def file_table(rows: list[Row]) -> Table:
    """A line a file: what it takes besides time; memory and energy at its largest measured batch. What no file has is left out."""
    metrics = {m: title for m, title in COSTS.items() if any(r.metric == m and r.value is not None for r in rows)}
    table = new_table("Files")
    for title in metrics.values():
        table.add_column(title, justify="right")
    for subject, target, resolution in dict.fromkeys(
        (r.subject, r.target, r.conditions.get("resolution")) for r in rows if r.metric == "size_mb"
    ):
        own = [r for r in rows if (r.subject, r.target) == (subject, target)]
        here = [r for r in own if r.conditions.get("resolution", resolution) == resolution and r.value is not None]
        here.sort(key=lambda r: r.conditions.get("batch", 0))
        found = [next((r.value for r in reversed(here) if r.metric == m), None) for m in metrics]
        sizes = [r for r in own if r.metric == "size_mb"]
        table.add_row(name_of(subject, target) + (f" {resolution} px" if len(sizes) > 1 else ""), *map(number, found))
    return table


def sentences(rows: list[Row], processors: int, busy: float) -> list[str]:
    """What a reader must know besides."""
    found = []
    floor = next((r for r in rows if r.metric == "noise_floor_percent"), None)
    if floor is not None and floor.value is not None:
        what = floor.conditions["artifacts"]
        found.append(f"Noise floor {number(floor.value)} %: {what}, opened twice, differed from itself by that much.")
    others = max((r.conditions.get("other_cores_busy", 0.0) for r in rows), default=0.0)
    if others > busy:
        found.append(
            f"Other processes kept {others:.1f} of {processors} processors busy meanwhile: times are too long and intervals wide; "
            "measure again on a quiet machine."
        )
    if any(r.metric == "latency_p50_ms" and r.value is not None and r.low is None for r in rows):
        found.append("A file without an interval was too slow for the time given; raise --seconds.")
    if any("inference_precision" in r.conditions for r in rows):
        used = sorted({str(r.conditions["inference_precision"]) for r in rows if "inference_precision" in r.conditions})
        found.append(f"OpenVINO computed floating-point operations in {' and '.join(used)}.")
    reasons: dict[str, list[Row]] = {}
    for r in rows:
        if r.status == "not measured":
            reasons.setdefault(str(r.reason), []).append(r)
    files = {(r.subject, r.target) for r in rows if r.metric == "size_mb"}
    for reason, missing in reasons.items():
        what = ", ".join(dict.fromkeys(SHOWN.get(r.metric, r.metric) for r in missing))
        who = dict.fromkeys((r.subject, r.target) for r in missing)
        names = "" if files <= who.keys() else " of " + ", ".join(name_of(*key) for key in who)
        found.append(f"Not measured: {what}{names}: {reason}")
    return found


def device_table(rows: list[Row]) -> Table:
    """One device's files, a line for each resolution and batch that was timed."""
    lines = [line for line in device_lines(rows) if line.latency.value is not None]
    shown = [c for c in AT[:2] if several([line.latency for line in lines], c)]
    png = any(line.end_to_end for line in lines)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("file", overflow="fold")
    for column in [*("px" if c == "resolution" else c for c in shown), "p50 ms", "95 %", "a second"]:
        table.add_column(column, justify="right", no_wrap=True)
    for column in [*(["PNG ms"] if png else []), "cosine"]:
        table.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        named = [number(r.value) if r else "" for r in (line.throughput, *([line.end_to_end] if png else []))]
        cosine = "" if line.cosine is None or line.cosine.value is None else f"{line.cosine.value:.5f}"
        cells = [*place(line.latency, shown), number(line.latency.value), interval(line.latency), *named, cosine]
        table.add_row(line.latency.target, *cells)
    return table


def device_gaps(rows: list[Row]) -> list[str]:
    """One device's latencies that were not measured, a line for each reason."""
    reasons: dict[str, list[str]] = {}
    for r in rows:
        if r.metric == "latency_p50_ms" and r.value is None:
            where = [f"{r.conditions[k]} px" for k in ("resolution",) if k in r.conditions]
            where += [f"batch {r.conditions[k]}" for k in ("batch",) if k in r.conditions]
            reasons.setdefault(str(r.reason), []).append(" ".join(["all files" if r.target == "all" else r.target, *where]))
    return [f"not measured: {', '.join(dict.fromkeys(what))}: {reason}" for reason, what in reasons.items()]
