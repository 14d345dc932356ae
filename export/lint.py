"""`decant lint`: what in an ONNX file, ours or foreign, TensorRT refuses, runs slowly or computes wrongly, with the reason and the cure.

The rules are in `export/linting/` (`lint_quantization.py`, `lint_precision.py`, `lint_structure.py`), each a function of an `Anatomy` that
yields the places where it does not hold. Nothing of the file is executed.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from onnx import ModelProto

from export.artifact import Precision
from export.graphs.anatomy import Anatomy, read_model
from export.linting import lint_precision, lint_quantization, lint_structure
from export.linting.lint_rules import Case, Rule, Severity

ORDER: tuple[Severity, ...] = ("error", "warning", "note")
Reader = Literal["tensorrt", "onnxruntime", "openvino"]
READERS: tuple[str, ...] = get_args(Reader)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
OTHER_NAMES: dict[str, Precision] = {
    "float32": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "w8a8": "int8",
    "qdq": "int8",
    "float8": "fp8",
    "e4m3": "fp8",
    "int4": "w4",
}
SPELLINGS: dict[str, Precision] = {**{p: p for p in PRECISIONS}, **OTHER_NAMES}
FOLDER = re.compile(r"(onnx|openvino|rtx|trt)-")


@dataclass(frozen=True)
class Finding:
    """One rule that does not hold.

    Attributes:
        rule: kebab-case id. severity: an error is refused, wrong, or not what the name says; a warning is slow or risky.
        where: the first node or tensor, and how many more. message: what is found there and why it matters. cure: what to do.
        places: all of them.
    """

    rule: str
    severity: Severity
    where: str
    message: str
    cure: str
    places: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The five fields that a report shows, and the number of places."""
        return {
            "rule": self.rule,
            "severity": self.severity,
            "where": self.where,
            "message": self.message,
            "cure": self.cure,
            "count": max(1, len(self.places)),
        }


def lint(
    path_or_model: Path | ModelProto,
    name: str | None = None,
    precision: Precision | None = None,
    reader: Reader = "tensorrt",
) -> list[Finding]:
    """Every finding in a file or model, errors first.

    Args:
        name: of a model in memory, for the precision that it claims; a file has its own.
        precision: what the products should run in; when None, what the name says (`vit_fp16.onnx`, `onnx-int8/model_224.onnx`).
        reader: who will run the file. For others than TensorRT (RTX included) what only TensorRT minds becomes a note.

    Raises:
        UserError: there is no such file, or it is no ONNX file or a truncated one.
    """
    if isinstance(path_or_model, ModelProto):
        anatomy, where = Anatomy(path_or_model), Path(name or "model.onnx")
    else:
        path = Path(path_or_model)
        anatomy, where = Anatomy(read_model(path), path.parent), Path(name) if name is not None else path
    case = Case(anatomy, precision or claimed_precision(where), where.name)
    findings = [f for rule in all_rules() for f in _findings(rule, case, reader)]
    return sorted(findings, key=lambda f: ORDER.index(f.severity))


def claimed_precision(path: Path) -> Precision | None:
    """The precision that a file's name claims, or that of the folder of an export target (`rtx-int8/`); None when there is none."""
    own = _words(path.stem)
    folder = _words(path.parent.name) if FOLDER.match(path.parent.name) else []
    return next((SPELLINGS[w] for w in (*reversed(own), *folder) if w in SPELLINGS), None)


def all_rules() -> list[Rule]:
    """Every rule, for documentation and for SARIF."""
    return [*lint_precision.RULES, *lint_quantization.RULES, *lint_structure.RULES]


def _words(text: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", text.lower())


def _findings(rule: Rule, case: Case, reader: Reader) -> list[Finding]:
    """One finding for each severity and reason; the places that share them together."""
    grouped: dict[tuple[Severity, str], list[tuple[str, str]]] = {}
    for hit in rule.check(case):
        severity = hit.severity or rule.severity
        if rule.tensorrt_only and reader != "tensorrt":
            severity = "note"
        grouped.setdefault((severity, hit.kind), []).append((hit.place, hit.detail))
    found = []
    for (severity, _), hits in grouped.items():
        places = tuple(dict.fromkeys(place for place, _ in hits))
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        message = f"{hits[0][1]}{more and f' ({len(places)} such)'}: {rule.reason}"
        found.append(Finding(rule.id, severity, places[0] + more, message, rule.cure, places))
    return found
