"""Other people's quantizers: their files run, are INT8 inside, near the source, the same every time, and quietly made."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import ModelProto, numpy_helper
from test_runtimes import OPENVINO, artifact_of
from tiny import pictures

from distill.encoder import TorchEncoder
from distill.errors import EnvironmentFailed, UserError
from distill.files import sha256_file
from export.artifact import ExtraFile
from export.graph import load_graph, quantized_linears, torch_graph, type_counts
from export.graphs.nodes import constants, linear_nodes
from export.graphs.onnx_module import OnnxModule
from export.quantizing.others import OTHERS, with_scales
from export.runtimes import open_artifact

NEEDS = {"onnx-int8-dynamic": "onnxruntime", "onnx-int8-modelopt": "modelopt", "openvino-int8-nncf": "nncf"}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return pictures(12, 32, seed=4)


@pytest.fixture(scope="module")
def made(graphs, images, tmp_path_factory) -> dict[str, list[Path]]:
    """Every quantizer that is installed here, run once."""
    found = {}
    for target, quantizer in OTHERS.items():
        try:
            __import__(NEEDS[target])
        except ImportError:
            continue
        found[target] = quantizer(graphs["mlp-fp32"][1], images, tmp_path_factory.mktemp(target))
    return found


def files_of(made: dict[str, list[Path]], target: str) -> list[Path]:
    if target not in made:
        pytest.skip(f"{NEEDS[target]} is not installed")
    return made[target]


@pytest.mark.parametrize("target", list(OTHERS))
def test_near_the_source_on_the_runtime_that_serves_it(graphs, made, target, tmp_path):
    model, source, size = graphs["mlp-fp32"]
    first, *rest = files_of(made, target)
    openvino = target.startswith("openvino")
    changes = {**OPENVINO, "details": {"openvino": {"inference_precision": "f32"}}} if openvino else {}
    artifact = artifact_of(first, tmp_path / "a", size, **{**changes, "target": target, "precision": "int8"})
    for path in rest:
        (artifact.folder / path.name).write_bytes(path.read_bytes())
    extras = [ExtraFile(path=p.name, sha256=sha256_file(p), bytes=p.stat().st_size) for p in rest]
    images = pictures(4, size, seed=9)
    got = open_artifact(artifact.model_copy(update={"extras": extras}), threads=1)(images)
    want = TorchEncoder(model)(images)
    cosine = torch.cosine_similarity(got.patches, want.patches, dim=-1)
    assert 0.98 < cosine.min() < 0.999999, "near, and not the same"
    assert sum(p.stat().st_size for p in (first, *rest)) < 0.45 * source.stat().st_size


@pytest.mark.parametrize("target", list(OTHERS))
def test_only_its_files_are_left_behind(made, target):
    files = files_of(made, target)
    assert [p.suffix for p in files] == ([".xml", ".bin"] if target.startswith("openvino") else [".onnx"])
    assert sorted(files[0].parent.iterdir()) == sorted(files)


@pytest.mark.parametrize("target", list(OTHERS))
def test_the_same_bytes_again(graphs, images, made, target, tmp_path):
    before = [hashlib.sha256(p.read_bytes()).hexdigest() for p in files_of(made, target)]
    after = [hashlib.sha256(p.read_bytes()).hexdigest() for p in OTHERS[target](graphs["mlp-fp32"][1], images, tmp_path)]
    assert after == before


@pytest.mark.parametrize("target", list(OTHERS))
def test_quietly(graphs, target, tmp_path):
    pytest.importorskip(NEEDS[target])
    script = (
        "import sys; from pathlib import Path; from tiny import pictures; from export.quantizing.others import OTHERS\n"
        f"OTHERS[{target!r}](Path(sys.argv[1]), pictures(2, 32), Path(sys.argv[2]))"
    )
    here = Path(__file__).resolve()
    path = f"{here.parents[2]}{os.pathsep}{here.parent}"
    done = subprocess.run(
        [sys.executable, "-c", script, str(graphs["mlp-fp32"][1]), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "INFO" not in done.stderr
    assert "%" not in done.stderr, "a progress bar"


@pytest.mark.parametrize(("target", "missing"), [("onnx-int8-modelopt", "modelopt"), ("openvino-int8-nncf", "nncf")])
def test_without_the_package(graphs, images, target, missing, tmp_path, monkeypatch):
    if missing == "nncf":
        pytest.importorskip("openvino")
    for name in [m for m in sys.modules if m.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    extra = {"modelopt": "modelopt", "nncf": "openvino"}[missing]
    with pytest.raises(EnvironmentFailed, match=rf"{missing} is not installed; pip install 'decant-vision\[{extra}\]'"):
        OTHERS[target](graphs["mlp-fp32"][1], images, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["onnx-int8-modelopt", "openvino-int8-nncf"])
def test_without_images(graphs, images, target, tmp_path):
    pytest.importorskip(NEEDS[target])
    with pytest.raises(UserError, match=f"{target} needs calibration images and got none"):
        OTHERS[target](graphs["mlp-fp32"][1], images[:0], tmp_path)


def test_model_optimizer_quantizes_every_linear_layer_and_the_convolution(graphs, made):
    (path,) = files_of(made, "onnx-int8-modelopt")
    source, graph = load_graph(graphs["mlp-fp32"][1]), load_graph(path)
    layers = {n.name for n in linear_nodes(source, ("MatMul", "Conv"))}
    assert quantized_linears(graph) == layers
    assert type_counts(graph) == {"FLOAT": 4, "INT8": 9}  # attention's own products stay
    assert not any(t.data_type == 1 and len(t.dims) > 1 and t.name.endswith("weight") for t in graph.graph.initializer)


def test_model_optimizers_scales_are_the_largest_magnitudes(graphs, made, images):
    """Its INT8 default is min-max: what its quantizers hold can be recomputed."""
    (path,) = files_of(made, "onnx-int8-modelopt")
    source, stored = load_graph(graphs["mlp-fp32"][1]), constants(load_graph(path))
    weight = numpy_helper.to_array(constants(source)["blocks.1.mlp.fc1.weight"])
    scale = numpy_helper.to_array(stored["blocks.1.mlp.fc1.scale"])
    assert np.allclose(scale, np.abs(weight).max(0) / 127, rtol=1e-6)
    inside = float(numpy_helper.to_array(stored["patch_embed.proj.input_scale"]))
    assert inside == pytest.approx(float(images.abs().max()) / 127, rel=1e-6)


def test_an_engine_from_model_optimizers_graph(made, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    from export.engine import build_engine

    (path,) = files_of(made, "onnx-int8-modelopt")
    info = build_engine(path, tmp_path / "m.engine", "tensorrt_rtx", "int8", (1, 4, 16), ["8.6"])
    assert info.matmul_types["INT8"] == 9


@pytest.mark.parametrize("name", ["mlp-fp32", "swiglu-fp32"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_graph_as_a_pytorch_module(graphs, name, batch):
    model, path, size = graphs[name]
    images = pictures(batch, size)
    module = OnnxModule(load_graph(path)).eval()
    with torch.no_grad():
        cls, patches = module(images)
        want = model(images)
    assert (cls - want.cls).abs().max() < 2e-5
    assert (patches - want.patches).abs().max() < 2e-5
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    assert [n.replace("__", ".") for n in module.layers] == linears


def test_a_graph_with_an_operation_that_is_not_known():
    from tiny import backbone

    graph = ModelProto()
    graph.CopyFrom(torch_graph(backbone(), 32))
    next(n for n in graph.graph.node if n.op_type == "Gelu").op_type = "Erf"
    with pytest.raises(UserError, match="The graph holds Erf, which cannot be turned back into PyTorch"):
        OnnxModule(graph)


def test_scales_go_around_the_named_layers_only(graphs):
    source = load_graph(graphs["mlp-fp32"][1])
    out = with_scales(source, {"blocks.0.mlp.fc1": (0.1, np.full(768, 0.01, np.float32))})
    assert quantized_linears(out) == {"blocks.0.mlp.fc1"}
    assert quantized_linears(source) == set(), "the source is left as it is"
