"""The bill of materials against CycloneDX's own schema, the model card against the rows it is made from."""

import json
import re

import pytest

from distill.rows import Row, not_measured
from export.artifact import Artifact, ArtifactFile, TensorSpec
from export.bundling.model_card import cell, conditions, model_card, number
from export.bundling.origin import teacher_origin
from export.bundling.sbom import package_components, sbom

SPEC = [TensorSpec(name="images", dtype="float32", shape=["batch", 3, 32, 32])]
OUT = [TensorSpec(name="cls", dtype="float32", shape=["batch", 8])]
ABOUT = {
    "student": "small",
    "run": {"name": "demo", "seed": 1},
    "model": {"backbone": {"kind": "vit", "arch": "vit_small", "dim": 8}, "lineage": {}, "weights_sha256": "1" * 64},
    "lineage": {
        "teacher_sha256": "2" * 64,
        "train": {"name": "scenes-train-1", "fingerprint": "3" * 16},
        "packages": {"torch": "2.11.0+cpu", "torch-pruning": "1.6"},
        "commit": "4" * 40,
    },
}


def artifact(target: str = "onnx-int8", **changes) -> Artifact:
    files = [
        ArtifactFile(path=f"model_{r}.onnx", resolution=r, sha256=f"{r:064x}", bytes=7, inputs=SPEC, outputs=OUT, preprocess={})
        for r in (32, 48)
    ]
    about = {"student": "small", "target": target, "precision": "int8", "runtime": "onnxruntime", "source": "onnx-fp32"}
    shape = {"dim": 8, "patch": 8, "opset": 20, "max_batch": 4, "build_seconds": 1.0, "versions": {"onnx": "1.20.0"}}
    return Artifact(files=files, **{**about, **shape, **changes})


def rows() -> list[Row]:
    at = {"subject": "students/small", "target": "onnx-int8"}
    data = {"resolution": 32, "data": "scenes-test-1", "k": 10}
    return [
        Row(metric="knn_top1", value=84.26, low=83.2, high=85.3, n=5000, conditions=data, **at),
        Row(
            metric="knn_top1_difference",
            value=0.1,
            low=-0.3,
            high=0.5,
            n=5000,
            conditions={"resolution": 32, "versus": "x"},
            **at,
        ),
        Row(metric="latency_p50_ms", value=1.2345678, n=20, conditions={"resolution": 32, "batch": 1, "threads": 2}, **at),
        Row(metric="images_per_s", value=812.3, conditions={"resolution": 48, "batch": 8}, **at),
        Row(metric="energy_mj_per_image", value=3.0, conditions={"resolution": 48}, **at),
        Row(metric="rmse_m", value=0.25, conditions={"task": "depth | indoors"}, **at),
        Row(metric="cosine_min", value=0.9999996, n=64, **at),
        Row(metric="feature_std", value=1.0, **at),
        Row(metric="knn_top1", value=1.0, subject="students/small", target="rtx-int8"),
        *(not_measured(m, "students/small", "onnx-int8", "there are no masks") for m in ("miou", "foreground_iou", "miou")),
    ]


def bill(**changes) -> dict:
    return sbom("small", "0.1.0", [artifact()], rows(), {**ABOUT, **changes}, {"python": "3.11.7", "numpy": "2.1"})


def test_the_schema_of_cyclonedx_accepts_it():
    schema = pytest.importorskip("cyclonedx.schema")
    validation = pytest.importorskip("cyclonedx.validation.json")
    validator = validation.JsonStrictValidator(schema.SchemaVersion.V1_6)
    origin = {"teacher_origin": teacher_origin(LOADED)}
    for changes in ({}, {"lineage": {}}, {"lineage": {**ABOUT["lineage"], **origin}}):
        assert validator.validate_str(json.dumps(bill(**changes))) is None
    head = {"name": "rooms", "kind": "segmentation", "path": "heads/rooms.onnx", "resolution": 32, "trained_on": "torch-fp32"}
    ports = {"inputs": [{"name": "patches", "dtype": "float32", "shape": ["batch", "patches", 8]}], "outputs": []}
    with_head = sbom("small", "0.1.0", [artifact()], rows(), ABOUT, {}, [{**head, **ports, "sha256": "5" * 64}])
    assert validator.validate_str(json.dumps(with_head)) is None
    assert "heads/rooms.onnx" in {c["bom-ref"] for c in with_head["components"]}
    assert validator.validate_str(json.dumps(bill() | {"components": [{"type": "model", "name": "x"}]})) is not None


def test_what_the_bill_says():
    bom = bill()
    assert (bom["bomFormat"], bom["specVersion"], bom["version"]) == ("CycloneDX", "1.6", 1)
    assert "timestamp" not in bom["metadata"]
    student = bom["metadata"]["component"]
    assert (student["type"], student["hashes"]) == ("machine-learning-model", [{"alg": "SHA-256", "content": "1" * 64}])
    parameters = student["modelCard"]["modelParameters"]
    assert (parameters["approach"], parameters["modelArchitecture"]) == ({"type": "self-supervised"}, "vit_small")
    parts = {c["bom-ref"]: c for c in bom["components"]}
    assert parameters["datasets"] == [{"ref": "data/train"}]
    data = parts["data/train"]["data"][0]
    assert data["contents"]["properties"] == [{"name": "decant:fingerprint", "value": "3" * 16}]
    assert parts["model/teacher"]["hashes"] == [{"alg": "SHA-256", "content": "2" * 64}]
    first, second = (parts[f"artifacts/onnx-int8/model_{r}.onnx"] for r in (32, 48))
    assert first["hashes"] == [{"alg": "SHA-256", "content": f"{32:064x}"}]
    metrics = {m["type"]: m for m in first["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]}
    assert set(metrics) == {"knn_top1", "knn_top1_difference", "latency_p50_ms", "rmse_m", "cosine_min"}
    assert metrics["knn_top1"] == {
        "type": "knn_top1",
        "value": "84.26",
        "slice": "data scenes-test-1, resolution 32, k 10",
        "confidenceInterval": {"lowerBound": "83.2", "upperBound": "85.3"},
    }
    assert metrics["latency_p50_ms"]["value"] == "1.2345678"  # nothing is rounded before a page
    assert "images_per_s" in {m["type"] for m in second["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]}
    limits = first["modelCard"]["considerations"]["technicalLimitations"]
    assert limits == ["not measured: miou, foreground_iou of onnx-int8: there are no masks"]
    refs = [student["bom-ref"], *parts]
    assert len(refs) == len(set(refs)) == 1 + len(bom["components"])
    for entry in bom["dependencies"]:
        assert {entry["ref"], *entry["dependsOn"]} <= set(refs)


def test_the_serial_number_follows_from_the_content():
    serial = bill()["serialNumber"]
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}-[0-9a-f]{4}-5[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", serial)
    assert bill()["serialNumber"] == serial
    assert bill(run={"name": "another"})["serialNumber"] == serial  # the run's name is not in it
    assert bill(model={**ABOUT["model"], "weights_sha256": "9" * 64})["serialNumber"] != serial


def test_packages():
    found = package_components([{"python": "3.11.7", "Torch_Pruning": "1.6"}, {"torch-pruning": "1.6", "torch": "2.11.0+cpu"}])
    assert [c["purl"] for c in found] == [
        "pkg:generic/python@3.11.7",
        "pkg:pypi/torch@2.11.0%2Bcpu",
        "pkg:pypi/torch-pruning@1.6",
    ]
    assert [c["type"] for c in found] == ["platform", "library", "library"]


def test_numbers():
    written = {r.metric: (number(r), conditions(r)) for r in rows()[:7]}
    assert written == {
        "knn_top1": ("84.26 % [83.2, 85.3], n = 5000", "data scenes-test-1, resolution 32, k 10"),
        "knn_top1_difference": ("0.1 points [-0.3, 0.5], n = 5000", "resolution 32, versus x"),
        "latency_p50_ms": ("1.235 ms, n = 20", "resolution 32, batch 1, threads 2"),
        "images_per_s": ("812.3 images/s", "resolution 48, batch 8"),
        "energy_mj_per_image": ("3 mJ", "resolution 48"),
        "rmse_m": ("0.25 m", "task depth | indoors"),
        "cosine_min": ("1.000000, n = 64", ""),
    }
    assert cell("a | b\nc") == "a \\| b c"


def test_the_card():
    card = model_card("small", [artifact()], rows(), ABOUT).decode()
    assert "| `onnx-int8` | knn_top1 | 84.26 % [83.2, 85.3], n = 5000 | data scenes-test-1, resolution 32, k 10 |" in card
    assert "task depth \\| indoors" in card
    assert "- miou, foreground_iou of onnx-int8: there are no masks" in card
    assert "data: scenes-train-1, fingerprint `3333333333333333`" in card
    assert "Input: RGB, 32 px, 48 px" in card
    assert "rtx-int8" not in card  # what is not in the bundle
    assert "feature_std" not in card
    headings = [line for line in card.splitlines() if line.startswith("#")]
    assert headings == [
        "# Model card: small",
        "## What it is",
        "## Intended use",
        "## Training data and origin",
        "## Numbers",
        "## Limits",
        "## Licence",
    ]
    assert "\n\n\n" not in card
    bare = model_card("small", [artifact()], [], {**ABOUT, "lineage": {}}).decode()
    assert "None was measured." in bare
    assert "data: not told by `lineage.json`" in bare
    assert "\n\n\n" not in bare


LOADED = {"kind": "loaded", "format": "timm", "source": "timm resnet", "model": "resnet", "licence": "apache-2.0"}


@pytest.mark.parametrize(
    ("lineage", "stated", "origin", "words"),
    [
        (
            {"kind": "pretrain", "seed": 1},
            None,
            {"kind": "trained"},
            "trained in the run itself; the licence of the training data",
        ),
        (LOADED, None, ("resnet", "apache-2.0", "timm"), "resnet, whose licence is apache-2.0 according to timm"),
        (LOADED, "CC-BY-NC-4.0", ("resnet", "CC-BY-NC-4.0", "the recipe"), "CC-BY-NC-4.0 according to the recipe"),
        (
            {"kind": "loaded", "format": "official", "source": "/home/me/dinov2.pth"},
            None,
            ("dinov2.pth", None, None),
            "dinov2.pth, whose licence is not stated: find it out",
        ),
        (
            {"kind": "loaded", "format": "run", "source": "runs/a", "of": LOADED},
            None,
            ("resnet", "apache-2.0", "timm"),
            "apache-2.0 according to timm",
        ),
    ],
)
def test_the_teachers_licence_is_said_or_said_to_be_unknown(lineage, stated, origin, words):
    found = teacher_origin(lineage, stated)
    named = (
        {"kind": "loaded", **dict(zip(("name", "licence", "licence_from"), origin, strict=True))}
        if isinstance(origin, tuple)
        else origin
    )
    assert found == named
    about = {**ABOUT, "lineage": {**ABOUT["lineage"], "teacher_origin": found}}
    assert words in model_card("small", [artifact()], rows(), about).decode().split("## Licence")[1]
    bom = bill(lineage=about["lineage"])
    assert words in bom["metadata"]["component"]["licenses"][0]["license"]["name"]
    teacher = next(c for c in bom["components"] if c["bom-ref"] == "model/teacher")
    assert {p["name"]: p["value"] for p in teacher["properties"]}["decant:licence"] == (found.get("licence") or "not stated")
    assert teacher.get("licenses") == ([{"license": {"name": found["licence"]}}] if found.get("licence") else None)
    assert "/home/me" not in json.dumps(bom)  # where it lay on somebody's disk is nobody's business
