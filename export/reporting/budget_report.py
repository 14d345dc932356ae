"""An accuracy budget's search as a page can show it: what each layer costs, what was tried, what was kept, the naive plan beside."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from export.reporting import bars
from export.reporting.labels import label_of
from export.reporting.tables import MISSING, digits

POINTS = {"knn_points": "kNN points lost", "linear_points": "linear-probe points lost"}
PANELS = {"cosine_min": "Least cosine", "cosine_mean": "Mean cosine", **POINTS, "latency_ms": "Latency at batch 1, ms"}


@dataclass(frozen=True)
class BudgetView:
    """One search. `charts`: sensitivity, wide and narrow. `table`: (plan, layers kept, cosine, points, latency, size) as text."""

    label: str
    met: bool
    sentence: str
    kept: str
    layers: int
    charts: list[Markup]
    panels: list[tuple[str, Markup]]
    table: list[tuple[str, ...]]


def budget_views(artifacts: Sequence[Mapping[str, Any]]) -> list[BudgetView]:
    found = []
    for artifact in artifacts:
        budget = artifact.get("budget")
        if isinstance(budget, dict) and isinstance(budget.get("reached"), dict):
            found.append(_view(label_of(artifact["subject"], artifact["target"]), budget))
    return found


def _view(label: str, budget: Mapping[str, Any]) -> BudgetView:
    kept = set(budget.get("kept") or [])
    curve = [p for p in budget.get("curve") or [] if isinstance(p, dict) and isinstance(p.get("kept"), list)]
    sensitivity = [s for s in budget.get("sensitivity") or [] if isinstance(s, dict) and "layer" in s]
    alone = {s["layer"]: s for s in sensitivity}
    return BudgetView(
        label=label,
        met=bool(budget.get("met")),
        sentence=_sentence(budget, len(sensitivity), len(curve)),
        kept=", ".join(f"{layer} ({_alone(alone.get(layer))})" for layer in budget.get("kept") or []),
        layers=len(kept),
        charts=_charts(label, sensitivity, kept),
        panels=_panels(budget, curve, kept),
        table=_table(budget, curve, kept),
    )


def _sentence(budget: Mapping[str, Any], layers: int, tried: int) -> str:
    asked, reached = budget.get("asked") or {}, budget["reached"]
    wanted = [f"cosine of at least {asked['cosine_min']:g}"] if asked.get("cosine_min") is not None else []
    wanted += [f"at most {asked[k]:g} {words}" for k, words in POINTS.items() if asked.get(k) is not None]
    got = [
        f"{words[0].lower() if k.startswith('cos') else words[0]}{words[1:]} {_number(k, reached.get(k))}"
        for k, words in PANELS.items()
        if k in asked or k == "cosine_min"
    ]
    kept = len(budget.get("kept") or [])
    said = (
        f"Asked: {' and '.join(wanted)}. {'Met' if budget.get('met') else 'Not met: the best found is kept,'} with {kept} of "
    )
    said += f"{budget.get('layers', layers)} layers in floating point ({'; '.join(got)}), found by measuring {tried} artifacts."
    said += " These cosines are of images that the search did not see." if budget.get("confirmed") else ""
    if budget.get("met") and kept:
        fewer = [p for p in budget.get("curve") or [] if p.get("met") and len(p["kept"]) < kept]
        if budget.get("minimal"):
            said += " Quantizing any single one of them again was measured to break the budget."
        elif fewer and budget.get("confirmed"):
            said += " Fewer met it on the images of the search, and did not on the others."
        else:
            said += " The search ran out before it had tried to give each of them back."
    return said


def _number(name: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return MISSING
    if name.startswith("cosine"):
        return f"{int(value * 1e5) / 1e5:.5f}"
    return f"{value:.2f}".replace("-", "−") if name.endswith("points") else digits(value)


def _alone(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return MISSING
    return _number("cosine_min", found.get("cosine_min"))


def _charts(label: str, sensitivity: Sequence[Mapping[str, Any]], kept: set[str]) -> list[Markup]:
    if not sensitivity:
        return []
    in_order = sorted(sensitivity, key=lambda s: _natural(s["layer"]))
    found = []
    for s in in_order:
        cosine = s.get("cosine_min")
        tip = f"{s['layer']}: least cosine {_number('cosine_min', cosine)}, mean {_number('cosine_mean', s.get('cosine_mean'))}"
        share = s.get("flops_share")
        tip += f", {100 * share:.1f} % of the FLOPs" if isinstance(share, int | float) else ""
        tip += ", kept in floating point" if s["layer"] in kept else ""
        block = re.search(r"blocks\.(\d+)\.", s["layer"])
        loss = 1 - cosine if isinstance(cosine, int | float) else None
        found.append(bars.Damage(s["layer"], block[1] if block else s["layer"].split(".")[0], loss, s["layer"] in kept, tip))
    title = f"Sensitivity of {label}"
    sizes = ((bars.WIDE, "wide"), (bars.NARROW, "narrow"))
    return [Markup(bars.damage_bars(found, title, size, kind)) for size, kind in sizes]


PLACES = ("patch_embed", "qkv", "qk", "av", "proj", "fc1", "w12", "fc2", "w3")


def _natural(layer: str) -> tuple[int, int, str]:
    """The network's order: patch embedding, then by block, then by place in the block."""
    block = re.search(r"blocks\.(\d+)\.", layer)
    place = layer.split(".")[0 if block is None else -1]
    return int(block[1]) if block else -1, PLACES.index(place) if place in PLACES else len(PLACES), layer


def _panels(budget: Mapping[str, Any], curve: Sequence[Mapping[str, Any]], kept: set[str]) -> list[tuple[str, Markup]]:
    found, asked = [], budget.get("asked") or {}
    for name, title in PANELS.items():
        if name == "cosine_mean" and asked.get("cosine_min") is not None:
            continue
        tried = [
            bars.Tried(
                len(p["kept"]),
                float(p[name]),
                bool(p.get("met")),
                set(p["kept"]) == kept,
                f"{len(p['kept'])} kept: {title.lower()} {_number(name, p[name])}{_interval(name, p)}",
                _ends(name, p),
            )
            for p in curve
            if isinstance(p.get(name), int | float)
        ]
        if tried:
            limit = asked.get(name)
            found.append((title, Markup(bars.search_panel(tried, title, limit))))
    return found


def _ends(name: str, point: Mapping[str, Any]) -> tuple[float, float] | None:
    """A measurement's interval; of a cosine the span to its value on the images that the search did not see."""
    stem, value = name.rpartition("_")[0], point.get(name)
    low, high = point.get(f"{stem}_low"), point.get(f"{stem}_high")
    if name.startswith("cosine") and isinstance(value, int | float):
        again = point.get(f"confirmed_{name}")
        low, high = (min(value, again), max(value, again)) if isinstance(again, int | float) else (None, None)
    return (low, high) if isinstance(low, int | float) and isinstance(high, int | float) else None


def _interval(name: str, point: Mapping[str, Any]) -> str:
    if name.startswith("cosine"):
        again = point.get(f"confirmed_{name}")
        return f", {_number(name, again)} on other images" if again is not None else ""
    ends = _ends(name, point)
    return f" ({_number(name, ends[0])} to {_number(name, ends[1])})" if ends else ""


def _table(budget: Mapping[str, Any], curve: Sequence[Mapping[str, Any]], kept: set[str]) -> list[tuple[str, ...]]:
    """The naive plan, ours with nothing kept, and the chosen one."""
    lines: list[tuple[str, Mapping[str, Any]]] = []
    naive = budget.get("naive")
    if isinstance(naive, dict) and naive:
        lines.append(("Naive: every layer, residual additions and attention too", naive))
    lines += [("Ours, every layer quantized", p) for p in curve if not p["kept"] and kept]
    lines.append((f"Ours, {len(kept)} layer{'s' if len(kept) != 1 else ''} in floating point", budget["reached"]))
    names = ("cosine_min", "knn_points", "latency_ms", "size_mb")
    return [(label, *(_number(n, p.get(n)) + _interval(n, p) for n in names)) for label, p in lines]
