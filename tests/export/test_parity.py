"""Parity rows and gates: what is close passes, what is not is named, what cannot be run is not measured."""

import copy
import math

import pytest
import torch
from test_runtimes import artifact_of
from tiny import backbone, pictures
from torch import Tensor

from distill.encoder import Features, TorchEncoder
from distill.rows import Row
from export import runtimes
from export.bisection import explain
from export.graph import export_onnx
from export.parity import METRICS, Gates, artifact_parity, failed_gates, parity_rows, unmeasured_parity
from export.quantizing.others import OTHERS

CONDITIONS = {"runtime": "fake 1.0", "precision": "int8", "device": "cpu", "resolution": 32, "artifact_sha256": "abc"}


class Fake:
    """Features that are a fixed function of the images, plus what `change` does to them."""

    def __init__(self, change=lambda cls, patches: (cls, patches)):
        self.target, self.conditions, self.change = "onnx-int8", CONDITIONS, change

    def __call__(self, images: Tensor) -> Features:
        patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(len(images), 16, -1)
        return Features(*self.change(patches.mean(1), patches.clone()))


def value(rows: list[Row], metric: str, output: str) -> float:
    (row,) = [r for r in rows if r.metric == metric and r.conditions["output"] == output]
    assert row.value is not None
    return row.value


def test_rows_of_equal_encoders():
    rows = parity_rows(Fake(), Fake(), pictures(5, 32), "students/small", "onnx-fp32", batch=2)
    assert [(r.metric, r.conditions["output"]) for r in rows] == [(m, o) for o in ("cls", "patches") for m in METRICS]
    assert {r.n for r in rows if r.conditions["output"] == "cls"} == {5}
    assert {r.n for r in rows if r.conditions["output"] == "patches"} == {5 * 16}
    for row in rows:
        assert row.value == pytest.approx(1.0 if "cosine" in row.metric else 0.0)
        assert (row.subject, row.target) == ("students/small", "onnx-int8")
        assert row.conditions["source"] == "onnx-fp32"
        assert row.conditions["artifact_sha256"] == "abc"
    assert failed_gates(rows, Gates(int8=0.999999)) == []


def test_numbers_against_plain_formulas():
    noise = torch.randn(7, 16, 192, generator=torch.Generator().manual_seed(1)) * 0.1
    images = pictures(7, 32)
    done: list[int] = []

    def change(cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        start = sum(done)
        done.append(len(cls))
        return cls, patches + noise[start : start + len(cls)]

    rows = parity_rows(Fake(), Fake(change), images, "s", "onnx-fp32", batch=3)
    want = Fake()(images).patches
    cosines = torch.cosine_similarity(want, want + noise, dim=-1).flatten()
    assert value(rows, "cosine_min", "patches") == pytest.approx(float(cosines.min()), abs=1e-5)
    assert value(rows, "cosine_mean", "patches") == pytest.approx(float(cosines.mean()), abs=1e-5)
    assert value(rows, "cosine_p1", "patches") == pytest.approx(float(cosines.quantile(0.01)), abs=1e-5)
    assert value(rows, "max_abs", "patches") == pytest.approx(float(noise.abs().max()), rel=1e-4)
    assert value(rows, "mean_abs", "patches") == pytest.approx(float(noise.abs().mean()), rel=1e-4)
    assert value(rows, "cosine_min", "cls") == pytest.approx(1.0)


def test_one_bad_token_of_many_fails_the_gate_and_is_named():
    def change(cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        patches[0, 3] *= -1
        return cls, patches

    rows = parity_rows(Fake(), Fake(change), pictures(4, 32), "students/small", "onnx-fp32")
    (sentence,) = failed_gates(rows, Gates())
    assert sentence == (
        "onnx-int8 of students/small at 32 px: the worst of 64 patches vectors has cosine -1.00000 to onnx-fp32, "
        "below the gate of 0.98 for int8."
    )


@pytest.mark.parametrize(("precision", "gate"), list(Gates()))
def test_each_precision_has_its_gate(precision, gate):
    def row(v: float) -> Row:
        c = {"output": "cls", "source": "torch-fp32", "precision": precision, "resolution": 32}
        return Row(metric="cosine_min", value=v, n=3, subject="students/small", target="t", conditions=c)

    assert failed_gates([row(gate)], Gates()) == []
    assert len(failed_gates([row(gate - 1e-6)], Gates())) == 1
    assert failed_gates([row(gate - 1e-6)], Gates(**{precision: 0.5})) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["artifact", "source"])
def test_values_that_are_not_finite(bad, side):
    def change(cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        patches[1, 2, :5] = bad
        return cls, patches

    pair = (Fake(), Fake(change)) if side == "artifact" else (Fake(change), Fake())
    rows = parity_rows(*pair, pictures(3, 32), "students/small", "onnx-fp32")
    assert value(rows, "nan_count", "patches") == 5
    assert value(rows, "nan_count", "cls") == 0
    assert value(rows, "cosine_min", "cls") == pytest.approx(1)
    unmeasured = {r.metric: r.reason for r in rows if r.status == "not measured"}
    assert set(unmeasured) == {"cosine_min", "cosine_p1", "cosine_mean", "max_abs", "mean_abs"}
    assert unmeasured["cosine_min"] == f"5 of {3 * 16 * 192} values of patches are not finite"
    assert failed_gates(rows, Gates()) == ["onnx-int8 of students/small at 32 px: 5 values of patches are not finite."]


def test_real_artifacts_against_torch(graphs, tmp_path):
    model, path, size = graphs["mlp-fp32"]
    images = pictures(6, size, seed=3)
    reference = TorchEncoder(model)
    rows = artifact_parity(reference, artifact_of(path, tmp_path / "fp32", size), images, "students/small", "torch-fp32", size)
    assert failed_gates(rows, Gates()) == []
    assert value(rows, "cosine_min", "patches") > 0.999999
    (int8,) = OTHERS["onnx-int8-dynamic"](path, images, tmp_path)
    artifact = artifact_of(int8, tmp_path / "int8", size, target="onnx-int8-dynamic", precision="int8")
    rows = artifact_parity(reference, artifact, images, "students/small", "torch-fp32", threads=1)
    assert failed_gates(rows, Gates()) == []
    assert 0.98 < value(rows, "cosine_min", "patches") < value(rows, "cosine_mean", "patches") < 0.99999
    assert {r.conditions["threads"] for r in rows} == {1}
    assert failed_gates(rows, Gates(int8=0.99999)), "the gate reads the rows"


def test_a_failing_gate_names_the_first_guilty_block(tmp_path):
    model, size, images = backbone(depth=4), 32, pictures(4, 32)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_parameter("blocks.2.mlp.fc1.weight")[::2] *= -1
    export_onnx(broken, tmp_path / "m.onnx", size)
    artifact = artifact_of(tmp_path / "m.onnx", tmp_path / "a", size)
    rows = artifact_parity(TorchEncoder(model), artifact, images, "students/small", "torch-fp32", size)
    asked: list[Row] = []

    def explained(row: Row) -> str:
        asked.append(row)
        return explain(model, artifact, images, Gates().fp32, row.conditions["resolution"])

    first, second = failed_gates(rows, Gates(), explained)
    assert "below the gate of 0.9999 for fp32; the first guilty block is blocks.2 (in it blocks.2.mlp.fc1, cosine " in first
    assert first.endswith("behind it.")
    assert "guilty" not in second, "one explanation for a file, whatever fails in it"
    assert len(asked) == 1


def test_an_artifact_that_cannot_run_here(tmp_path, monkeypatch):
    monkeypatch.setattr(runtimes, "gpu_capability", lambda: None)
    (tmp_path / "m.engine").write_bytes(b"plan")
    engine = {"target": "rtx-int8", "precision": "int8", "runtime": "tensorrt_rtx", "compute_capabilities": ["8.6"]}
    artifact = artifact_of(tmp_path / "m.engine", tmp_path / "rtx-int8", 32, **engine)
    rows = artifact_parity(Fake(), artifact, pictures(2, 32), "students/small", "onnx-fp16")
    assert {r.metric for r in rows} == set(METRICS)
    assert {r.reason for r in rows} == {"no CUDA GPU on this machine; the tensorrt_rtx engine is compiled for SM 8.6"}
    assert {(r.status, r.target, r.conditions["artifact_sha256"]) for r in rows} == {
        ("not measured", "rtx-int8", artifact.files[0].sha256)
    }
    assert failed_gates(rows, Gates()) == []


def test_rows_of_a_target_that_was_never_built():
    rows = unmeasured_parity("rtx-int8", "students/small", "onnx-fp16", "tensorrt_rtx is not installed", resolution=48)
    assert len(rows) == 2 * len(METRICS)
    assert {(r.reason, r.conditions["resolution"]) for r in rows} == {("tensorrt_rtx is not installed", 48)}


def test_problems():
    assert Gates().problems() == []
    assert Gates(fp16=1.5, int8=-1.0).problems() == [
        "fp16 must be above -1 and at most 1, got 1.5",
        "int8 must be above -1 and at most 1, got -1.0",
    ]
