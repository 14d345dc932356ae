"""Findings of `decant lint` as SARIF 2.1.0, the format that code review takes (GitHub: `codeql-action/upload-sarif`).

A graph has no lines: a finding points to the file, and to its nodes as logical locations.
"""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from export.lint import Finding, all_rules
from export.linting.lint_rules import Rule

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
MOST_PLACES = 100  # of one finding; GitHub takes at most 1,000 locations of a result


def sarif(findings: Mapping[Path, list[Finding]]) -> dict[str, Any]:
    """A SARIF log with one run: every rule with its help, one result for each finding of each file."""
    rules = all_rules()
    index = {r.id: i for i, r in enumerate(rules)}
    driver = {
        "name": "decant lint",
        "semanticVersion": version("decant-vision"),
        "rules": [_rule(r) for r in rules],
    }
    results = [_result(path, f, index[f.rule]) for path, found in findings.items() for f in found]
    artifacts = [{"location": {"uri": _uri(path)}} for path in findings]
    run = {"tool": {"driver": driver}, "artifacts": artifacts, "results": results, "columnKind": "utf16CodeUnits"}
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _rule(rule: Rule) -> dict[str, Any]:
    help_text = f"{rule.title}. Why: {rule.reason}. Cure: {rule.cure}"
    return {
        "id": rule.id,
        "name": "".join(w.capitalize() for w in rule.id.split("-")),
        "shortDescription": {"text": f"{rule.title}."},
        "fullDescription": {"text": f"{rule.title}: {rule.reason}."},
        "help": {"text": help_text, "markdown": f"**{rule.title}.**\n\n*Why*: {rule.reason}.\n\n*Cure*: {rule.cure}"},
        "defaultConfiguration": {"level": rule.severity},
        "properties": {"tags": ["onnx", "tensorrt"] if rule.tensorrt_only else ["onnx"]},
    }


def _result(path: Path, finding: Finding, rule_index: int) -> dict[str, Any]:
    places = finding.places[:MOST_PLACES]
    location = {
        "physicalLocation": {"artifactLocation": {"uri": _uri(path)}, "region": {"startLine": 1}},
        "logicalLocations": [{"name": p, "fullyQualifiedName": f"{path.name}::{p}", "kind": "element"} for p in places],
    }
    return {
        "ruleId": finding.rule,
        "ruleIndex": rule_index,
        "level": finding.severity,
        "message": {"text": f"{finding.message}. {finding.cure}"},
        "locations": [location],
        # The same finding of the next build is the same alert, whatever stands before it in the graph.
        "partialFingerprints": {"decantLint/v1": f"{path.name}:{finding.rule}:{finding.where}"},
    }


def _uri(path: Path) -> str:
    """Relative to the working directory where possible: GitHub wants paths inside the repository."""
    from urllib.parse import quote

    absolute = path.resolve()
    try:
        return quote(absolute.relative_to(Path.cwd().resolve()).as_posix())
    except ValueError:
        return absolute.as_uri()
