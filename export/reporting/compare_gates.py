"""Gates: bounds on what may change between two runs, such as `knn>=-0.3`, judged by value or by the whole interval."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from distill.errors import UserError
from distill.rows import Row
from export.compare import HIGHER, LOWER, Change, Comparison, named
from export.reporting.labels import SHIPPED

ALIASES = {
    "knn": "knn_top1",
    "linear": "linear_top1",
    "logistic": "logistic_top1",
    "latency": "latency_p50_ms",
    "size": "size_mb",
    "throughput": "images_per_s",
    "memory": "peak_memory_mb",
    "rmse": "rmse_m",
    "cosine": "cosine_min",
}
GATE = re.compile(
    r"^\s*(?P<metric>\w+)\s*(?:@(?P<who>[^<>=\s]+))?\s*(?P<op>>=|<=)\s*(?P<bound>[-+]?\d+(?:\.\d+)?)\s*(?P<unit>%?)\s*$"
)


@dataclass(frozen=True)
class Gate:
    """A bound on b - a: `knn>=-0.3`, `latency<=+5%`, `knn@students/small/onnx-int8>=-0.3`.

    Attributes:
        who: subject, or subject/target, that it is for; None: the teacher and all that ships, and no yardstick.
        relative: the bound is in percent of a's value.
    """

    text: str
    metric: str
    who: str | None
    at_least: bool
    bound: float
    relative: bool

    @staticmethod
    def parse(text: str) -> "Gate":
        """Raises: UserError: it cannot be read, or bounds a number from the side that says nothing."""
        found = GATE.match(text)
        if not found:
            raise UserError(
                f"--gate {text!r} cannot be read. Write METRIC[@SUBJECT[/TARGET]] then >= or <= and a number, such as 'knn>=-0.3', "
                "'latency<=5%' or 'size@students/small/onnx-int8<=0'; numbers are the second run minus the first."
            )
        metric = ALIASES.get(found["metric"], found["metric"])
        if metric not in HIGHER | LOWER:
            known = ", ".join(sorted([*ALIASES, *HIGHER, *LOWER]))
            raise UserError(f"--gate {text!r}: {found['metric']} is no metric that can be compared. Choose from {known}.")
        at_least = found["op"] == ">="
        if at_least != (metric in HIGHER):
            good = "higher" if metric in HIGHER else "lower"
            raise UserError(
                f"--gate {text!r}: {metric} is better when {good}, so bound it with {'>=' if metric in HIGHER else '<='}."
            )
        return Gate(text, metric, found["who"], at_least, float(found["bound"]), bool(found["unit"]))

    def covers(self, number: "Change | Row") -> bool:
        if number.metric != self.metric:
            return False
        if self.who is None:
            return number.subject.split("/")[0] in ("teacher", *SHIPPED)
        return self.who in (number.subject, f"{number.subject}/{number.target}")


@dataclass(frozen=True)
class Judged:
    """A gate on one change (None: it found nothing to judge)."""

    gate: Gate
    change: Change | None
    passed: bool
    why: str


def judge(comparison: Comparison, gates: Sequence[Gate], strict: bool = False) -> list[Judged]:
    """Each gate on each number that it covers. A gate that covers none has failed: what was to be shown was not.

    Args:
        strict: the whole interval must be on the good side, not only the value.
    """
    found = []
    for gate in gates:
        covered = [c for c in comparison.changes if gate.covers(c)]
        found += [_judged(gate, c, strict) for c in covered]
        lost = [row for row in comparison.lost if gate.covers(row)]
        found += [Judged(gate, None, False, f"the second run has no {named(row)}, which the first has") for row in lost]
        if not covered and not lost:
            found.append(Judged(gate, None, False, "neither run has such a number in common with the other"))
    return found


def _judged(gate: Gate, change: Change, strict: bool) -> Judged:
    if change.verdict == "NOT COMPARED":
        return Judged(gate, change, False, f"not compared: {change.how}")
    scale = 100 / abs(change.a) if gate.relative and change.a else 1.0
    sign = 1 if gate.at_least else -1
    unit = " %" if gate.relative else ""
    value, worst = change.difference * scale, change.low if gate.at_least else change.high
    meets = sign * value >= sign * gate.bound
    said = f"{value:+.3g}{unit}"
    if worst is None:
        why = said + ("" if change.how == "exact" else ", without an interval")
        return Judged(gate, change, meets and not (strict and change.how != "exact"), why)
    beyond = sign * worst * scale < sign * gate.bound
    reach = f", and its interval reaches {worst * scale:+.3g}{unit}" if beyond and meets else ""
    return Judged(gate, change, meets and not (strict and beyond), said + reach)
