"""Two kinds of chart as plain SVG text: points with intervals, and lines. No script; the page's CSS colours both themes.

Classes that the page styles: `frame`, `grid`, `tick`, `label`, `frontier`, `leader`; `c0` … `c5` and `dashed` for the series.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

LETTER = 0.54  # mean width of a letter over the font size, a little generous
Label = tuple[float, float, str, bool]  # x, y of the baseline, anchor, whether it needs a leader line
MOST_LABELS = 10
CROWD = 60  # points above which only the frontier is labelled: there is no free place among so many, and looking takes a minute
NEARBY = 45  # units from a point to a label that may be dropped
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Point:
    """A mark at (x, y) with optional intervals; `tip` is what hovering and screen readers get, `style` CSS classes."""

    x: float
    y: float
    label: str
    tip: str
    style: str = "c0"
    shape: str = "circle"  # circle, square, diamond, triangle, wedge
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Line:
    """One series of a line chart; xs ascend, and all ys are finite."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str = "c0"


@dataclass
class Canvas:
    """The frame of a chart: data coordinates -> SVG units, and the parts drawn so far."""

    width: int
    height: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log_x: bool = False
    log_y: bool = False
    font: int = 12
    left: int = 44
    right: int = 10
    top: int = 10
    bottom: int = 40
    x_ticks: bool = True
    whole_x: bool = False  # ticks at whole numbers only
    parts: list[str] = field(default_factory=list)

    def x(self, value: float) -> float:
        return self.left + _share(value, self.x_range, self.log_x) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        return self.height - self.bottom - _share(value, self.y_range, self.log_y) * (self.height - self.top - self.bottom)

    def inside(self) -> Box:
        return self.left, self.top, self.width - self.right, self.height - self.bottom

    def axes(self, x_label: str, y_label: str) -> None:
        """Grid, tick labels and axis labels; the vertical axis has its label above, where it reads without turning the head."""
        left, top, right, bottom = self.inside()
        free = -math.inf
        along = ticks(*self.x_range, self.log_x, max(4, (self.width - self.left) // 90)) if self.x_ticks else []
        along = [v for v in along if not self.whole_x or v == round(v)]
        for value, text in zip(along, tick_texts(along), strict=True):
            x = self.x(value)
            self.parts.append(f'<path class="grid" d="M{x:.1f} {top}V{bottom}"/>')
            half = len(text) * LETTER * self.font / 2
            if x - half > free and x + half <= self.width:
                self.parts.append(
                    f'<text class="tick" x="{x:.1f}" y="{bottom + self.font + 4}" text-anchor="middle">{text}</text>'
                )
                free = x + half + 4
        upward = ticks(*self.y_range, self.log_y, max(4, (self.height - self.bottom) // 50))
        for value, text in zip(upward, tick_texts(upward), strict=True):
            y = self.y(value)
            self.parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
            self.parts.append(
                f'<text class="tick" x="{left - 6}" y="{y + self.font * 0.35:.1f}" text-anchor="end">{text}</text>'
            )
        self.parts.append(f'<path class="frame" d="M{left} {top}V{bottom}H{right}"/>')
        self.parts.append(f'<text class="label" x="{right}" y="{self.height - 6}" text-anchor="end">{escape(x_label)}</text>')
        if y_label:
            self.parts.append(f'<text class="label" x="2" y="{self.font}">{escape(y_label)}</text>')

    def svg(self, title: str, description: str, kind: str) -> str:
        body = "".join(self.parts)
        return (
            f'<svg class="{kind}" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(title)}. '
            f'{escape(description)}" font-size="{self.font}" style="max-width:{self.width}px">{body}</svg>'
        )


def scatter(
    points: Sequence[Point], title: str, x_label: str, y_label: str, width: int = 900, height: int = 440, kind: str = "wide"
) -> str:
    """Points on a logarithmic x axis (smaller is better) and a linear y axis (larger is better), with the frontier of the best.

    Labels are set where they cover neither each other nor a point, with a leader line where that is farther away. Of more than
    MOST_LABELS points, those off the frontier that find no free place nearby go without; hovering names them.
    """
    assert points
    xs = [v for p in points for v in (p.x, *(p.x_interval or ()))]
    ys = [v for p in points for v in (p.y, *(p.y_interval or ()))]
    canvas = Canvas(width, height, padded(xs, log=True), padded(ys), log_x=True, top=28, font=13)
    canvas.axes(x_label, y_label)
    best = frontier(points)
    path = "".join(f"H{canvas.x(p.x):.1f}V{canvas.y(p.y):.1f}" for p in best[1:])
    canvas.parts.append(f'<path class="frontier" d="M{canvas.x(best[0].x):.1f} {canvas.y(best[0].y):.1f}{path}"/>')
    labels = place_labels(canvas, points, best, drop=len(points) > MOST_LABELS)
    for point, label in zip(points, labels, strict=True):
        canvas.parts.append(_mark(canvas, point, label))
    described = "; ".join(p.tip for p in points)
    return canvas.svg(title, described, kind)


def lines(series: Sequence[Line], title: str, x_label: str, width: int = 340, height: int = 210) -> str:
    """One panel of curves; the page names the series beside it. Hovering over a curve names it."""
    assert series
    xs = [x for line in series for x in line.xs]
    ys = [y for line in series for y in line.ys]
    low, high = padded(ys, share=0.04)
    canvas = Canvas(width, height, (min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1), (low, high), top=12, font=12)
    widest = max(len(short(v)) for v in ticks(low, high, False, 4))
    canvas.left = int(12 + widest * LETTER * canvas.font + 6)
    canvas.axes(x_label, "")
    for line in series:
        points = list(zip(line.xs, line.ys, strict=True))
        tip = f"<title>{escape(line.label)}: from {short(line.ys[0])} to {short(line.ys[-1])}</title>"
        if len(points) == 1:
            x, y = canvas.x(points[0][0]), canvas.y(points[0][1])
            canvas.parts.append(f'<circle class="dot {line.style}" cx="{x:.1f}" cy="{y:.1f}" r="2.5">{tip}</circle>')
            continue
        path = "L".join(f"{canvas.x(x):.1f} {canvas.y(y):.1f}" for x, y in points)
        canvas.parts.append(f'<path class="line {line.style}" d="M{path}">{tip}</path>')
    described = "; ".join(f"{s.label} from {short(s.ys[0])} to {short(s.ys[-1])}" for s in series)
    return canvas.svg(title, described, "panel")


def interval_bar(value: float, interval: tuple[float, float] | None, span: tuple[float, float], style: str) -> str:
    """A dot with its interval on a common scale, for a table's cell; the numbers stand beside it."""
    canvas = Canvas(120, 16, span, (0, 1), left=4, right=4, top=0, bottom=0)
    x = canvas.x(value)
    whisker = f'<path class="whisker" d="M{canvas.x(interval[0]):.1f} 8H{canvas.x(interval[1]):.1f}"/>' if interval else ""
    return (
        f'<svg class="bar {style}" viewBox="0 0 120 16" width="120" height="16" aria-hidden="true">'
        f'<path class="grid" d="M4 8H116"/>{whisker}<circle class="dot" cx="{x:.1f}" cy="8" r="3.4"/></svg>'
    )


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both directions, fastest first."""
    best: list[Point] = []
    for p in sorted(points, key=lambda p: (p.x, -p.y)):
        if not best or p.y > best[-1].y:
            best.append(p)
    return best


def _label_box(canvas: Canvas, p: Point, x: float, y: float, anchor: str) -> Box:
    """What a label covers, its baseline being at y."""
    wide = len(p.label) * LETTER * canvas.font
    start = x - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
    return start - 2, y - canvas.font * 0.85, start + wide + 2, y + canvas.font * 0.3


def _mark(canvas: Canvas, p: Point, label: Label | None) -> str:
    x, y = canvas.x(p.x), canvas.y(p.y)
    whiskers = ""
    if p.x_interval:
        whiskers += f'<path class="whisker" d="M{canvas.x(p.x_interval[0]):.1f} {y:.1f}H{canvas.x(p.x_interval[1]):.1f}"/>'
    if p.y_interval:
        whiskers += f'<path class="whisker" d="M{x:.1f} {canvas.y(p.y_interval[0]):.1f}V{canvas.y(p.y_interval[1]):.1f}"/>'
    shapes = {
        "circle": f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>',
        "square": f'<rect class="dot" x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10"/>',
        "diamond": f'<path class="dot" d="M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z"/>',
        "triangle": f'<path class="dot" d="M{x:.1f} {y - 6.5:.1f}l6.5 11.5h-13z"/>',
        "wedge": f'<path class="dot" d="M{x:.1f} {y + 6.5:.1f}l6.5 -11.5h-13z"/>',
    }
    lead = named = ""
    if label is not None:
        left, base, anchor, far = label
        lead = f'<path class="leader" d="M{x:.1f} {y:.1f}L{left:.1f} {base - 4:.1f}"/>' if far else ""
        named = f'<text class="name" x="{left:.1f}" y="{base:.1f}" text-anchor="{anchor}">{escape(p.label)}</text>'
    return f'<g class="point {p.style}"><title>{escape(p.tip)}</title>{lead}{whiskers}{shapes[p.shape]}{named}</g>'


def place_labels(canvas: Canvas, points: Sequence[Point], best: Sequence[Point] = (), drop: bool = False) -> list[Label | None]:
    """Where each point's label stands; with `drop`, None for those off the frontier that find no free place nearby.

    Greedy, in order of height (with `drop`, the frontier's first): of positions around the point at growing distance the first
    that overlaps nothing, else the one that overlaps least: other labels, points, their intervals, and the frontier through
    `best`. A position outside the frame is never taken unless there is no other.
    """
    size = canvas.font
    marks: list[Box] = []
    for p in points:
        x, y = canvas.x(p.x), canvas.y(p.y)
        marks.append((x - 7, y - 7, x + 7, y + 7))
        if p.x_interval:
            marks.append((canvas.x(p.x_interval[0]), y - 1, canvas.x(p.x_interval[1]), y + 1))
        if p.y_interval:
            marks.append((x - 1, canvas.y(p.y_interval[1]), x + 1, canvas.y(p.y_interval[0])))
    for a, b in pairwise(best):
        marks.append((canvas.x(a.x), canvas.y(a.y) - 1, canvas.x(b.x), canvas.y(a.y) + 1))
        marks.append((canvas.x(b.x) - 1, canvas.y(b.y), canvas.x(b.x) + 1, canvas.y(a.y)))
    taken = list(marks)
    found: dict[int, Label | None] = {}
    left, top, right, bottom = canvas.inside()
    for i in sorted(range(len(points)), key=lambda i: (drop and points[i] not in best, canvas.y(points[i].y))):
        if drop and len(points) > CROWD and points[i] not in best:
            found[i] = None
            continue
        x, y = canvas.x(points[i].x), canvas.y(points[i].y)
        options = []
        for distance in (0, 14, 28, 44, 62, 82):
            reach, far = 11 + distance, distance > 0
            for dx, dy, anchor in _AROUND:
                px, py = x + dx * reach, y + dy * reach + size * 0.35
                box = _label_box(canvas, points[i], px, py, anchor)
                outside = max(left - box[0], 0) + max(box[2] - right, 0) + max(top - box[1], 0) + max(box[3] - bottom, 0)
                options.append((1000 * outside + sum(_overlap(box, b) for b in taken), (px, py, anchor, far), box))
            if any(cost == 0 for cost, _, _ in options):  # farther ones cannot be better
                break
        cost, chosen, box = min(options, key=lambda o: o[0])  # the first of equals: the nearest
        if drop and points[i] not in best and (cost > 0 or abs(chosen[0] - x) + abs(chosen[1] - y) > NEARBY):
            found[i] = None
            continue
        found[i] = chosen
        taken.append(box)
    return [found[i] for i in range(len(points))]


# Directions in the order of preference: right, left, above, below, and the corners.
_AROUND = (
    (1, 0, "start"),
    (-1, 0, "end"),
    (0.6, -1.35, "start"),
    (0.6, 1.35, "start"),
    (-0.6, -1.35, "end"),
    (-0.6, 1.35, "end"),
    (0, -1.3, "middle"),
    (0, 1.5, "middle"),
)


def _overlap(a: Box, b: Box) -> float:
    """Area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _share(value: float, span: tuple[float, float], log: bool) -> float:
    f: Callable[[float], float] = math.log if log else float
    return (f(value) - f(span[0])) / (f(span[1]) - f(span[0]))


def padded(values: Sequence[float], share: float = 0.08, log: bool = False) -> tuple[float, float]:
    """The range of the values, a little wider; never empty."""
    low, high = min(values), max(values)
    if log:
        ratio = max((high / low) ** share, 1.15)
        return low / ratio, high * ratio
    more = (high - low) * share or abs(high) * 0.1 or 1.0
    return low - more, high + more


def ticks(low: float, high: float, log: bool = False, most: int = 6) -> list[float]:
    """Round numbers inside [low, high], at most about `most`."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            found = [s * 10.0**k for k in powers for s in steps if low <= s * 10.0**k <= high]
            if len(found) <= most:
                break
        if len(found) >= 2:
            return found
    raw = (high - low) / most
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """As `short`, with as many decimals as it takes to be right where three digits are not enough: cosines near 1."""
    step = min((b - a for a, b in pairwise(values)), default=math.inf)
    if all(abs(float(f"{v:.3g}") - v) <= step / 100 for v in values):
        return [short(v) for v in values]
    decimals = next(d for d in range(12) if all(abs(round(v, d) - v) <= step / 100 for v in values))
    return [f"{v:.{decimals}f}".replace("-", "−") for v in values]


def short(value: float) -> str:
    """A number as an axis shows it: 0, 0.02, −0.1, 15, 20k, 1.5M, 3e−5."""
    if value == 0:
        return "0"
    size = abs(value)
    text = f"{value:.3g}"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            text = f"{value / limit:.3g}{unit}"
            break
    if size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    return text.replace("-", "−")
