"""Targets: a student's folder becomes artifact folders, each made from the ones before it."""

import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from tiny import backbone, pictures

from distill.data.preprocess import Preprocess
from distill.encoder import TorchEncoder
from distill.errors import EnvironmentFailed, UserError
from distill.files import read_json, sha256_file
from distill.models.checkpoints import save_model
from distill.progress import Progress
from export import builders
from export.artifact import read_artifact
from export.builders import build_target
from export.graph import load_graph, type_counts
from export.parity import artifact_parity, failed_gates
from export.quantize import QuantizeConfig
from export.targets import ExportConfig, Images, Target, at_resolution, in_order, prerequisites

CONFIG = ExportConfig(
    targets=["onnx-fp32", "onnx-int8", "rtx-fp16", "rtx-int8"],
    resolutions=[32, 48],
    max_batch=16,
    compute_capabilities=["8.6", "12.0"],
    quantize=QuantizeConfig(images=8),
)


class Exported:
    """A student and its artifacts; `build` makes one more."""

    def __init__(self, root: Path):
        self.root = root
        self.sources: dict[str, Path] = {}
        self.asked: list[int] = []
        self.model = backbone()
        save_model(root / "model", self.model, Preprocess(32, 40))

    def images(self) -> Images:
        def training(n: int, size: int) -> torch.Tensor:
            self.asked.append(size)
            return pictures(n, size)

        return Images(training, lambda n, size, avoid: pictures(n + avoid, size)[avoid:])

    def build(self, target: Any, config: ExportConfig = CONFIG):
        out = self.root / "export" / target
        made = build_target(target, config, "small", self.root / "model", self.sources, self.images(), out, Progress("quiet"))
        self.sources[target] = out
        return made


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Exported:
    done = Exported(tmp_path_factory.mktemp("targets"))
    for target in ("onnx-fp32", "onnx-int8", "onnx-fp16"):
        done.build(target)
    return done


def test_order_puts_what_is_needed_first():
    assert in_order(["rtx-int8"]) == ["onnx-fp16", "onnx-fp32", "onnx-int8", "rtx-int8"]
    assert in_order(["onnx-fp32", "onnx-int8"]) == ["onnx-fp32", "onnx-int8"]
    assert prerequisites("rtx-int8") == ["onnx-fp16", "onnx-int8"]
    for target in get_args(Target):
        order = in_order([target])
        assert order[-1] == target
        assert all(set(prerequisites(t)) <= set(order[: order.index(t)]) for t in order)


@pytest.mark.parametrize(("target", "precision", "source"), [
    ("onnx-fp32", "fp32", "torch-fp32"), ("onnx-fp16", "fp16", "torch-fp32"), ("onnx-int8", "int8", "onnx-fp32"),
])  # fmt: skip
def test_onnx_artifacts(exported, target, precision, source):
    artifact = read_artifact(exported.sources[target])
    assert (artifact.target, artifact.precision, artifact.source, artifact.student) == (target, precision, source, "small")
    assert (artifact.dim, artifact.patch, artifact.max_batch, artifact.runnable_here) == (32, 8, 16, True)
    assert [f.resolution for f in artifact.files] == [32, 48]
    for entry, tokens in zip(artifact.files, (16, 36), strict=True):
        assert entry.path == f"model_{entry.resolution}.onnx"
        assert entry.sha256 == sha256_file(artifact.path(entry))
        assert entry.inputs[0].shape == ["batch", 3, entry.resolution, entry.resolution]
        assert [(o.name, o.shape) for o in entry.outputs] == [("cls", ["batch", 32]), ("patches", ["batch", tokens, 32])]
        assert entry.preprocess["size"] == entry.resolution
        images = pictures(3, entry.resolution, seed=8)
        rows = artifact_parity(TorchEncoder(exported.model), artifact, images, "students/small", source, entry.resolution)
        assert failed_gates(rows, CONFIG.gates) == []
        types = artifact.details["matmul_types"][str(entry.resolution)]
        assert types == type_counts(load_graph(artifact.path(entry)))
    beside = {"plan.json", "calibration_32.json", "calibration_48.json"} if precision == "int8" else set()
    assert {p.name for p in artifact.folder.iterdir()} == {"artifact.json", "model_32.onnx", "model_48.onnx"} | beside


def test_the_int8_plan_is_readable_and_says_what_calibrated(exported):
    artifact = read_artifact(exported.sources["onnx-int8"])
    plan = read_json(artifact.folder / "plan.json")
    assert plan == artifact.details["plan"]
    decided = {e["layer"]: e for e in plan["48"]}
    assert decided["blocks.0.attn.qkv"]["decision"] == decided["blocks.0.mlp.fc2"]["decision"] == "int8"
    assert decided["patch_embed.proj"]["decision"] == decided["blocks.0.attn.qk"]["decision"] == "keep"
    assert decided["blocks.0.attn.qkv"]["mflops"] > 0
    other = {e["layer"]: e for e in plan["32"]}["blocks.0.attn.qkv"]
    assert other["input_scale"] != decided["blocks.0.attn.qkv"]["input_scale"], (
        "each resolution has its own positions and calibration"
    )
    assert exported.asked[:2] == [32, 48], "INT8 asks for images, once a resolution"
    assert artifact.details["calibration_images"] == 8
    assert artifact.details["calibration_sha256"]["32"] != artifact.details["calibration_sha256"]["48"]
    assert artifact.details["remainder"] == "fp32"
    assert [e.path for e in artifact.extras] == ["calibration_32.json", "calibration_48.json", "plan.json"]
    shares = artifact.details["proof"]["32"]["linear_flops_share"]
    assert shares == {"INT8": 1.0}
    assert not [f for f in artifact.details["lint"]["32"] if f["severity"] == "error"]


@pytest.mark.parametrize("target", ["rtx-fp16", "rtx-int8"])
def test_engines(exported, target):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx has no wheels for this platform")
    exported.build(target)
    artifact = read_artifact(exported.sources[target])
    assert (artifact.runtime, artifact.source, artifact.compute_capabilities) == ("tensorrt_rtx", "onnx-fp16", ["8.6", "12.0"])
    assert [f.path for f in artifact.files] == ["model_32.engine", "model_48.engine"]
    assert artifact.details["profile"] == {"min": 1, "opt": 8, "max": 16}
    counts = {"FLOAT16": 13} if target == "rtx-fp16" else {"FLOAT16": 5, "INT8": 12}  # qkv is three layers
    assert artifact.details["matmul_types"] == {"32": counts, "48": counts}
    assert artifact.versions["tensorrt_rtx"]
    assert artifact.build_seconds > 0
    if not torch.cuda.is_available():
        assert not artifact.runnable_here
        assert artifact.reason == "no CUDA GPU on this machine; the tensorrt_rtx engine is compiled for SM 8.6, 12.0"
    if target == "rtx-int8":
        plan = read_json(exported.sources["onnx-int8"] / "plan.json")["48"]
        graph = load_graph(artifact.folder / "graph_48.onnx")
        scales = {t.name: t for t in graph.graph.initializer}
        found = {float(np.frombuffer(t.raw_data, np.float16)[0]) for t in scales.values() if t.data_type == 10 and not t.dims}
        for entry in (e for e in plan if e["decision"] == "int8"):
            assert float(np.float16(entry["input_scale"])) in found, "the engine is calibrated as onnx-int8 was"
        assert [e.path for e in artifact.extras] == ["graph_32.onnx", "graph_48.onnx"]


def test_a_missing_runtime_is_told_before_work_is_done(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr(builders, "quantize", lambda *a: pytest.fail("worked in vain"))
    out = exported.root / "missing"
    with pytest.raises(EnvironmentFailed, match="tensorrt_rtx is not installed; pip install"):
        build_target(
            "rtx-int8", CONFIG, "small", exported.root / "model", exported.sources, exported.images(), out, Progress("quiet")
        )
    assert list(out.iterdir()) == []


def test_interrupted_while_replacing_leaves_no_artifact(exported, tmp_path, monkeypatch):
    one = CONFIG.model_copy(update={"resolutions": [32]})

    def build():
        return build_target(
            "onnx-int8", one, "small", exported.root / "model", exported.sources, images, tmp_path / "a", Progress("quiet")
        )

    images = Images(lambda n, size: pictures(4, size), lambda n, size, avoid: pictures(4, size))
    before = build()
    monkeypatch.setattr(builders, "write_json", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build()
    with pytest.raises(UserError, match="holds no artifact"):
        read_artifact(tmp_path / "a")
    monkeypatch.undo()
    again = build()
    assert [f.sha256 for f in again.files] == [f.sha256 for f in before.files], "the same settings give the same bytes"
    assert not [p for p in (tmp_path / "a").iterdir() if p.name.startswith(".part")]


def test_an_engine_whose_scales_are_of_other_resolutions(exported, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    one = CONFIG.model_copy(update={"resolutions": [32]})
    sources, folder, alone = (
        dict(exported.sources),
        exported.root / "model",
        {"onnx-fp32": only(exported, "onnx-fp32", 32, tmp_path)},
    )
    sources["onnx-int8"] = tmp_path / "int8"
    build_target("onnx-int8", one, "small", folder, alone, exported.images(), tmp_path / "int8", Progress("quiet"))
    with pytest.raises(UserError, match="has no calibration for 48 px; export onnx-int8 again"):
        build_target("rtx-int8", CONFIG, "small", folder, sources, exported.images(), tmp_path / "rtx", Progress("quiet"))


def only(exported: Exported, target: str, size: int, tmp_path):
    """The artifact of one resolution alone."""
    artifact = read_artifact(exported.sources[target])
    folder = tmp_path / target
    folder.mkdir()
    entry = artifact.file(size)
    (folder / entry.path).write_bytes(artifact.path(entry).read_bytes())
    artifact.model_copy(update={"files": [entry], "folder": folder}).write()
    return folder


def test_resolution_keeps_the_crops_share():
    assert at_resolution(Preprocess(224, 256), 448) == Preprocess(448, 512)
    assert at_resolution(Preprocess(48, 48, "bilinear", "per_image"), 96) == Preprocess(96, 96, "bilinear", "per_image")
    assert ExportConfig().sizes(Preprocess(48, 56)) == [48]
    assert ExportConfig(resolutions=[96]).sizes(Preprocess(48, 56)) == [96]


def test_problems_are_all_reported():
    assert ExportConfig().problems() == []
    bad = ExportConfig(
        targets=["rtx-fp16", "rtx-fp16"], resolutions=[48, 48], max_batch=4, opt_batch=8, compute_capabilities=["8.7"]
    )
    text = "\n".join(bad.problems())
    for expected in ("targets names one twice", "resolutions names one twice", "opt_batch must be", "not for 8.7"):
        assert expected in text
    empty = "\n".join(ExportConfig(targets=[], resolutions=[]).problems())
    assert "targets must name at least one" in empty
    assert "resolutions must be sizes" in empty
    assert "for the rtx targets" in "\n".join(ExportConfig(compute_capabilities=[]).problems())
