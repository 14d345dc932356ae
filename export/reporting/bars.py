"""The small charts of the report's part on compression, as SVG text that the page's CSS colours: shares, damage a layer, a search.

Shapes carry what colour carries too: kept layers have a dot above the bar, artifacts that met a budget are filled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from export.reporting.plots import Canvas, padded, short

TYPES = {  # element type as the proofs name it -> (what people call it, colour class)
    "INT8": ("INT8", "c3"),
    "FP8": ("FP8", "c4"),
    "FP4": ("FP4", "c4"),
    "INT8-weight": ("INT8 weights", "c2"),
    "INT4-weight": ("INT4 weights", "c2"),
    "INT4": ("INT4", "c2"),
    "FLOAT16": ("FP16", "c1"),
    "BFLOAT16": ("BF16", "c1"),
    "FLOAT": ("FP32", "c5"),
}
WIDE, NARROW = (912, 250), (364, 250)


def type_name(element: str) -> str:
    return TYPES.get(element, (element, ""))[0]


def share_bar(shares: Mapping[str, float]) -> str:
    """One bar of 100 %, a segment a type; the numbers stand beside it."""
    parts, x = [], 0.0
    for element, share in shares.items():
        width = 160 * share
        style = TYPES.get(element, ("", "c0"))[1]
        tip = f"<title>{escape(type_name(element))}: {100 * share:.1f} %</title>"
        parts.append(f'<rect class="fill {style}" x="{x:.2f}" y="2" width="{width:.2f}" height="10">{tip}</rect>')
        x += width
    body = "".join(parts)
    return f'<svg class="bar shares" viewBox="0 0 160 14" width="160" height="14" aria-hidden="true">{body}</svg>'


@dataclass(frozen=True)
class Damage:
    """A layer's bar: `loss` is 1 - cosine_min when it alone is quantized (None: not finite), `group` its block."""

    layer: str
    group: str
    loss: float | None
    kept: bool
    tip: str


def damage_bars(found: Sequence[Damage], title: str, size: tuple[int, int], kind: str) -> str:
    """Vertical bars in the network's order on a logarithmic axis; a dot marks the layers left in floating point."""
    losses = [d.loss for d in found if d.loss is not None and d.loss > 0]
    low, high = padded(losses or [1e-3], log=True)
    low = min(low, high / 10) * 0.8
    canvas = Canvas(*size, (0, len(found)), (low, high), log_y=True, left=52, top=30, bottom=44, x_ticks=False)
    canvas.axes("layers in the order of execution, by block", "1 − least cosine (logarithmic)")
    bottom, step = canvas.inside()[3], canvas.x(1) - canvas.x(0)
    free = 0.0
    for i, d in enumerate(found):
        x = canvas.x(i) + 0.12 * step
        y = canvas.inside()[1] if d.loss is None else bottom if d.loss <= 0 else min(canvas.y(d.loss), bottom - 1)
        style = "c0" if d.kept else "c1"
        dot = f'<circle class="dot" cx="{x + 0.38 * step:.1f}" cy="{y - 6:.1f}" r="3"/>' if d.kept else ""
        canvas.parts.append(
            f'<g class="{style}"><title>{escape(d.tip)}</title><rect class="fill" x="{x:.1f}" y="{y:.1f}" '
            f'width="{0.76 * step:.1f}" height="{bottom - y:.1f}"/>{dot}</g>'
        )
        if (i == 0 or found[i - 1].group != d.group) and canvas.x(i) >= free:
            canvas.parts.append(f'<path class="frame" d="M{canvas.x(i):.1f} {bottom}v5"/>')
            canvas.parts.append(f'<text class="tick" x="{canvas.x(i) + 2:.1f}" y="{bottom + 16}">{escape(d.group)}</text>')
            free = canvas.x(i) + 8 + len(d.group) * 7
    worst = sorted((d for d in found if d.loss is not None), key=lambda d: -(d.loss or 0))[:5]
    described = "The most sensitive: " + ", ".join(f"{d.layer} {short(d.loss or 0)}" for d in worst)
    return canvas.svg(title, described, kind)


@dataclass(frozen=True)
class Tried:
    """An artifact of a search: layers kept, a measurement with its interval, whether the budget was met, whether it was chosen."""

    kept: int
    value: float
    met: bool
    chosen: bool
    tip: str
    interval: tuple[float, float] | None = None


def search_panel(tried: Sequence[Tried], title: str, limit: float | None = None) -> str:
    """Layers kept against a measurement: filled where the budget was met, ringed where chosen, a dashed line at the limit."""
    ys = [v for t in tried for v in (t.value, *(t.interval or ()))] + ([] if limit is None else [limit])
    most = max(t.kept for t in tried)
    canvas = Canvas(340, 210, (-0.5, most + 0.5), padded(ys), left=60, top=12, whole_x=True)
    canvas.axes("layers in floating point", "")
    if limit is not None:
        left, _, right, _ = canvas.inside()
        tip = f"<title>asked: {short(limit)}</title>"
        canvas.parts.append(f'<path class="limit" d="M{left} {canvas.y(limit):.1f}H{right}">{tip}</path>')
    for t in sorted(tried, key=lambda t: t.chosen):
        x, y = canvas.x(t.kept), canvas.y(t.value)
        ring = f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="8"/>' if t.chosen else ""
        if t.interval:
            low, high = (canvas.y(v) for v in t.interval)
            ring = f'<path class="whisker" d="M{x:.1f} {high:.1f}V{low:.1f}"/>{ring}'
        mark = "dot" if t.met else "dot hollow"
        canvas.parts.append(
            f'<g class="{"c0" if t.chosen else "c1"}"><title>{escape(t.tip)}</title>'
            f'{ring}<circle class="{mark}" cx="{x:.1f}" cy="{y:.1f}" r="4"/></g>'
        )
    return canvas.svg(title, "; ".join(t.tip for t in tried if t.chosen or t.kept in (0, most)), "panel")
