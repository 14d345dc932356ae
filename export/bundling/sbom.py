"""`sbom.cdx.json` of a bundle: CycloneDX 1.6 (ECMA-424), an ML-BOM: models with their cards, training data, packages.

Deterministic: no time, and a serial number that is a UUIDv5 of everything else in it. Component types, `modelCard` and the rest are
those of cyclonedx.org/docs/1.6/json.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote
from uuid import NAMESPACE_URL, uuid5

from distill.files import sha256_json
from distill.rows import Row
from export.artifact import Artifact
from export.bundling.model_card import INTENDED, LIMITS, WEIGHTS_LICENCE, conditions, missing, shown
from export.bundling.origin import NOT_STATED, said
from export.bundling.provenance import BUILDER

SCHEMA = "http://cyclonedx.org/schema/bom-1.6.schema.json"
OURS = [{"license": {"id": "Apache-2.0"}}]
STUDENT, TEACHER, DATA = "model/student", "model/teacher", "data/train"

Json = dict[str, Any]


def sbom(
    student: str,
    decant: str,
    artifacts: Sequence[Artifact],
    rows: Sequence[Row],
    about: Json,
    packages: Mapping[str, str],
    heads: Sequence[Json] = (),
) -> Json:
    """The bill of materials.

    Args:
        decant: this program's version. rows: of this student. about: the value of lineage.json.
        packages: name -> version of what built the bundle; those of each artifact and of the lineage are added.
        heads: as the manifest lists them, with their sha256.
    """
    made_from = about["lineage"]
    origins = [*teacher(made_from), *training_data(made_from)]
    files = [component for artifact in artifacts for component in models(student, artifact, rows)]
    files += [head_component(student, head) for head in heads]
    libraries = package_components([packages, made_from.get("packages") or {}, *(a.versions for a in artifacts)])
    bom: Json = {
        "$schema": SCHEMA,
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "tools": {"components": [{"type": "application", "name": "decant-vision", "version": decant, "licenses": OURS}]},
            "component": the_student(student, about, origins),
        },
        "components": [*files, *origins, *libraries],
        "dependencies": [
            {"ref": STUDENT, "dependsOn": [c["bom-ref"] for c in origins]},
            *({"ref": c["bom-ref"], "dependsOn": [STUDENT]} for c in files),
        ],
    }
    return bom | {"serialNumber": f"urn:uuid:{uuid5(NAMESPACE_URL, f'{BUILDER}#{sha256_json(bom)}')}"}


def the_student(student: str, about: Json, origins: Sequence[Json]) -> Json:
    """The model itself, in PyTorch: what the files of the bundle were exported from."""
    backbone = about["model"]["backbone"]
    return {
        "type": "machine-learning-model",
        "bom-ref": STUDENT,
        "name": student,
        "version": about["model"]["weights_sha256"][:16],
        "hashes": sha256(about["model"]["weights_sha256"]),
        "licenses": [
            {"license": {"name": f"of the weights: {WEIGHTS_LICENCE}. {said(about['lineage'].get('teacher_origin'))}"}}
        ],
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "self-supervised"},
                "task": "feature extraction",
                "architectureFamily": "Vision Transformer",
                "modelArchitecture": str(backbone.get("arch") or backbone.get("name") or backbone.get("kind")),
                "datasets": [{"ref": DATA}] if any(c["bom-ref"] == DATA for c in origins) else [],
            },
            "considerations": {"useCases": [INTENDED], "technicalLimitations": list(LIMITS)},
        },
    }


def models(student: str, artifact: Artifact, rows: Sequence[Row]) -> list[Json]:
    """A component for each file of an artifact; the numbers measured on it are its quantitative analysis."""
    found = []
    for entry in artifact.files:
        here = [r for r in rows if r.conditions.get("resolution", entry.resolution) == entry.resolution]
        card: Json = {
            "modelParameters": {
                "task": "feature extraction",
                "inputs": [{"format": f"{p.name}: {p.dtype} {p.shape}"} for p in entry.inputs],
                "outputs": [{"format": f"{p.name}: {p.dtype} {p.shape}"} for p in entry.outputs],
            },
            "quantitativeAnalysis": {"performanceMetrics": [metric(r) for r in shown(here, [artifact.target])]},
        }
        if unknown := missing(here, [artifact.target]):
            card["considerations"] = {"technicalLimitations": [f"not measured: {u}" for u in unknown]}
        path = f"artifacts/{artifact.target}/{entry.path}"
        found.append(
            {
                "type": "machine-learning-model",
                "bom-ref": path,
                "name": f"{student}/{artifact.target}/{entry.path}",
                "version": entry.sha256[:16],
                "hashes": sha256(entry.sha256),
                "modelCard": card,
                "properties": properties(
                    path=path, precision=artifact.precision, runtime=artifact.runtime, source=artifact.source, bytes=entry.bytes
                ),
            }
        )
    return found


def head_component(student: str, head: Json) -> Json:
    """A head that an evaluation trained on the student's features."""
    ports = {
        kind: [{"format": f"{p['name']}: {p['dtype']} {p['shape']}"} for p in head[kind]] for kind in ("inputs", "outputs")
    }
    return {
        "type": "machine-learning-model",
        "bom-ref": head["path"],
        "name": f"{student}/{head['path']}",
        "version": head["sha256"][:16],
        "hashes": sha256(head["sha256"]),
        "modelCard": {"modelParameters": {"approach": {"type": "supervised"}, "task": head["kind"], **ports}},
        "properties": properties(path=head["path"], resolution=head["resolution"], trained_on=head["trained_on"]),
    }


def metric(row: Row) -> Json:
    """A row. CycloneDX has values as text; the shortest that reads back as the same number."""
    found: Json = {"type": row.metric, "value": repr(row.value), "slice": conditions(row)}
    if row.low is not None and row.high is not None:
        found["confidenceInterval"] = {"lowerBound": repr(row.low), "upperBound": repr(row.high)}
    return found


def teacher(made_from: Json) -> list[Json]:
    if not (weights := made_from.get("teacher_sha256")):
        return []
    origin = made_from.get("teacher_origin") or {}
    licence = origin.get("licence")
    name = {"type": "machine-learning-model", "bom-ref": TEACHER, "name": "teacher", "version": weights[:16]}
    known = properties(origin=origin.get("name") or origin.get("kind") or NOT_STATED, licence=licence or NOT_STATED)
    licences = {"licenses": [{"license": {"name": licence}}]} if licence else {}
    return [{**name, "hashes": sha256(weights), "scope": "excluded", **licences, "properties": known}]


def training_data(made_from: Json) -> list[Json]:
    """Named by its fingerprint, which is of decant's own kind and so a property, not a hash."""
    if not (train := made_from.get("train")):
        return []
    known = properties(fingerprint=train["fingerprint"])
    named = {"type": "data", "bom-ref": DATA, "name": train["name"], "version": train["fingerprint"], "scope": "excluded"}
    return [{**named, "data": [{"type": "dataset", "name": train["name"], "contents": {"properties": known}}]}]


def package_components(several: Sequence[Mapping[str, str]]) -> list[Json]:
    """The packages that made the bundle, each version once, in the order of their names."""
    pairs = {(re.sub(r"[-_.]+", "-", name).lower(), version) for packages in several for name, version in packages.items()}
    found = []
    for name, version in sorted(pairs):
        where = "generic" if name == "python" else "pypi"
        purl = f"pkg:{where}/{name}@{quote(version, safe='.-_~')}"
        kind = "platform" if name == "python" else "library"
        found.append({"type": kind, "bom-ref": purl, "name": name, "version": version, "purl": purl, "scope": "excluded"})
    return found


def sha256(digest: str) -> list[Json]:
    return [{"alg": "SHA-256", "content": digest}]


def properties(**values: Any) -> list[Json]:
    return [{"name": f"decant:{name}", "value": str(value)} for name, value in values.items()]
