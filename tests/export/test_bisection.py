"""Bisection: what is broken is named, by block and layer, in ONNX Runtime, OpenVINO and from torch; what is not is not."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, numpy_helper
from test_runtimes import artifact_of
from tiny import backbone, pictures
from torch import Tensor

from distill.models.backbone import Backbone
from export.bisection import Guilty, Unbisectable, explain, first_guilty, least_cosine
from export.graph import torch_graph
from export.graphs.nodes import constants, element_types, serialize
from export.graphs.typed import retype
from export.probes import OnnxProbe, OpenVinoProbe, TorchProbe, residual_stream, tapped

DEPTH, SIZE, GATE = 8, 32, 0.99


@pytest.fixture(scope="module")
def model() -> Backbone:
    return backbone(depth=DEPTH)


@pytest.fixture(scope="module")
def good(model) -> ModelProto:
    return torch_graph(model, SIZE)


def scaled(source: ModelProto, layer: str, factor: float) -> ModelProto:
    """The graph with one layer's weights in part multiplied: the direction of its outputs changes, not only their length."""
    out = ModelProto()
    out.CopyFrom(source)
    weight = constants(out)[f"{layer}.weight"]
    values = numpy_helper.to_array(weight).copy()
    values[:, ::2] *= factor
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    return out


@pytest.mark.parametrize("layer", ["blocks.3.mlp.fc1", "blocks.3.attn.qkv", "blocks.0.attn.proj", "blocks.7.mlp.fc2"])
def test_a_broken_layer_is_named_with_its_block(good, layer):
    found = first_guilty(OnnxProbe(good), OnnxProbe(scaled(good, layer, -1.0)), pictures(3, SIZE), GATE)
    assert found is not None
    assert (found.block, found.layer) == (layer.rsplit(".", 2)[0], layer)
    assert found.after < GATE < found.before
    assert found.layer_cosine is not None
    assert found.layer_cosine < GATE


def test_a_broken_patch_embedding(good):
    broken = scaled(good, "patch_embed.proj", -1.0)
    found = first_guilty(OnnxProbe(good), OnnxProbe(broken), pictures(2, SIZE), GATE)
    assert found is not None
    assert (found.block, found.layer) == ("patch_embed", "patch_embed.proj")


def test_a_broken_final_norm(good):
    broken = ModelProto()
    broken.CopyFrom(good)
    norm = [n for n in broken.graph.node if n.op_type == "LayerNormalization"][-1]
    values = np.ones(32, np.float32)
    values[::2] = -1
    broken.graph.initializer.append(numpy_helper.from_array(values, "flipped"))
    norm.input[1] = "flipped"
    found = first_guilty(OnnxProbe(good), OnnxProbe(broken), pictures(2, SIZE), GATE)
    assert found is not None
    assert (found.block, found.layer) == ("norm", None)


def test_nothing_is_named_when_nothing_is_broken(good):
    images = pictures(2, SIZE)
    assert first_guilty(OnnxProbe(good), OnnxProbe(retype(good, "fp16")), images, 0.999) is None
    assert first_guilty(OnnxProbe(good), OnnxProbe(retype(good, "bf16")), images, 0.99) is None


def test_the_search_is_binary(good):
    class Counting(OnnxProbe):
        looked: list[str] = []  # noqa: RUF012

        def run(self, images: Tensor, tensors: Sequence[str]) -> dict[str, np.ndarray]:
            self.looked.extend(t for t in tensors if t in self.stream())
            return super().run(images, tensors)

    suspect = Counting(scaled(good, "blocks.6.mlp.fc1", -1.0))
    found = first_guilty(OnnxProbe(good), suspect, pictures(1, SIZE), GATE)
    assert found is not None
    assert found.block == "blocks.6"
    assert len(set(suspect.looked)) <= 4, "8 blocks take 3 looks, or 4"


def test_values_that_are_not_finite_are_below_every_gate(good):
    found = first_guilty(OnnxProbe(good), OnnxProbe(scaled(good, "blocks.2.mlp.fc2", np.nan)), pictures(2, SIZE), -0.5)
    assert found is not None
    assert (found.block, found.layer) == ("blocks.2", "blocks.2.mlp.fc2")
    assert "blocks.2 (in it blocks.2.mlp.fc2, cosine not finite)" in found.sentence()


def test_huge_channels_of_the_residual_stream_hide_nothing(good):
    """Two channels a thousand times the others make every raw cosine of the stream 1; the norms' small weights for them do not."""
    source = ModelProto()
    source.CopyFrom(good)
    huge, small = np.zeros(32, np.float32), np.ones(32, np.float32)
    huge[3], huge[4], small[3:5] = 3000, -3000, 1e-3
    source.graph.initializer.extend([numpy_helper.from_array(huge, "huge"), numpy_helper.from_array(small * 400, "small")])
    embedded = next(n for n in source.graph.node if n.op_type == "LayerNormalization").input[0]
    tokens = next(n for n in source.graph.node if embedded in n.output)
    tokens.output[0] = "plain"
    at = list(source.graph.node).index(tokens)
    source.graph.node.insert(at + 1, onnx.helper.make_node("Add", ["plain", "huge"], [embedded]))
    for node in source.graph.node:
        if node.op_type == "LayerNormalization":
            node.input[1] = "small"
    broken, images = scaled(source, "blocks.3.mlp.fc2", -1.0), pictures(2, SIZE)
    raw = [OnnxProbe(g).run(images, ["blocks.3"])["blocks.3"] for g in (source, broken)]
    assert least_cosine(*raw) > 0.999
    found = first_guilty(OnnxProbe(source), OnnxProbe(broken), images, GATE)
    assert found is not None
    assert found.block == "blocks.3"


def test_from_torch_to_onnx(model, good):
    images = pictures(3, SIZE)
    assert first_guilty(TorchProbe(model), OnnxProbe(good), images, 0.999999) is None
    found = first_guilty(TorchProbe(model), OnnxProbe(scaled(good, "blocks.3.mlp.fc1", -1.0)), images, GATE)
    assert found is not None
    assert found.layer == "blocks.3.mlp.fc1"


def test_every_layer_of_torch_is_the_same_tensor_in_onnx(good, model):
    images, torch_probe, onnx_probe = pictures(2, SIZE), TorchProbe(model), OnnxProbe(good)
    layers = torch_probe.layers()
    assert len(layers) == 1 + 4 * DEPTH
    for layer, hooked in layers.items():
        tensor = onnx_probe.layers()[layer]
        a, b = torch_probe.run(images, [hooked])[hooked], onnx_probe.run(images, [tensor])[tensor]
        assert np.abs(a - b).max() < 1e-4 * np.abs(a).max(), layer


def test_openvino(good):
    pytest.importorskip("openvino")
    images, broken = pictures(2, SIZE), scaled(good, "blocks.3.mlp.fc1", -1.0)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    assert first_guilty(OnnxProbe(good), OpenVinoProbe(serialize(good), good, properties=exact), images, 0.999) is None
    found = first_guilty(OnnxProbe(good), OpenVinoProbe(serialize(broken), broken, properties=exact), images, GATE)
    assert found is not None
    assert (found.block, found.layer) == ("blocks.3", "blocks.3.mlp.fc1")


def test_an_ir_is_compared_by_the_names_it_kept(good, tmp_path):
    ov = pytest.importorskip("openvino")
    broken = scaled(good, "blocks.3.mlp.fc1", -1.0)
    ov.save_model(ov.Core().read_model(serialize(broken)), tmp_path / "m.xml", compress_to_fp16=False)
    ir = (tmp_path / "m.xml").read_bytes(), (tmp_path / "m.bin").read_bytes()
    found = first_guilty(OnnxProbe(good), OpenVinoProbe(ir, good), pictures(2, SIZE), GATE)
    assert found is not None
    assert (found.block, found.layer) == ("blocks.3", "blocks.3.mlp.fc1")


def anonymous(model: ModelProto) -> ModelProto:
    """As another exporter would name it."""
    out = ModelProto()
    out.CopyFrom(model)
    for node in out.graph.node:
        node.name = ""
        node.input[:] = [x.replace("blocks.", "t_") for x in node.input]
        node.output[:] = [x.replace("blocks.", "t_") for x in node.output]
    for tensor in out.graph.initializer:
        tensor.name = tensor.name.replace("blocks.", "t_")
    return out


def test_a_foreign_graph_by_its_shape(good):
    foreign, broken = anonymous(good), anonymous(scaled(good, "blocks.3.mlp.fc1", -1.0))
    assert residual_stream(foreign) == {f"blocks.{i}": f"t_{i}" for i in range(DEPTH)}
    found = first_guilty(OnnxProbe(foreign), OnnxProbe(broken), pictures(2, SIZE), GATE)
    assert found is not None
    assert (found.block, found.layer) == ("blocks.3", None)
    other_way = first_guilty(OnnxProbe(good), OnnxProbe(broken), pictures(2, SIZE), GATE)
    assert other_way is not None
    assert other_way.block == "blocks.3"


def test_a_graph_without_a_residual_stream():
    nodes = [onnx.helper.make_node("Relu", ["images"], ["cls"]), onnx.helper.make_node("Neg", ["images"], ["patches"])]
    value = onnx.helper.make_tensor_value_info
    names = [value(n, 1, ["batch", 3, SIZE, SIZE]) for n in ("cls", "patches")]
    graph = onnx.helper.make_graph(nodes, "g", [value("images", 1, ["batch", 3, SIZE, SIZE])], names)
    plain = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    with pytest.raises(Unbisectable, match="a convolutional net names no residual stream"):
        first_guilty(OnnxProbe(plain, "a convolutional net"), OnnxProbe(plain), pictures(1, SIZE), GATE)


def test_taps_are_float_outside_and_change_nothing_inside(good):
    half = retype(good, "fp16")
    types = element_types(half)
    assert types["blocks.1"] == "FLOAT16"
    probe = tapped(half, ["blocks.1", "cls"])
    assert [o.type.tensor_type.elem_type for o in probe.graph.output] == [1, 1]
    assert [n.name for n in probe.graph.node][: len(half.graph.node)] == [n.name for n in half.graph.node]


def test_a_tapped_half_graph_compiles_into_an_engine(good, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    from export.engine import build_engine

    (tmp_path / "m.onnx").write_bytes(serialize(tapped(retype(good, "fp16"), ["blocks.1"])))
    info = build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", "tensorrt_rtx", "fp16", (1, 4, 16), ["8.6"])
    assert info.bytes > 1000


def test_an_artifact_is_explained_in_words(model, good, tmp_path):
    (tmp_path / "m.onnx").write_bytes(serialize(scaled(good, "blocks.3.mlp.fc1", -1.0)))
    artifact = artifact_of(tmp_path / "m.onnx", tmp_path / "a", SIZE)
    words = explain(model, artifact, pictures(2, SIZE), GATE)
    assert words.startswith("the first guilty block is blocks.3 (in it blocks.3.mlp.fc1, cosine ")
    fine = tmp_path / "fine.onnx"
    fine.write_bytes(serialize(good))
    assert explain(model, artifact_of(fine, tmp_path / "b", SIZE), pictures(2, SIZE), GATE) == (
        "on 2 images every block is above the gate"
    )


def test_an_openvino_artifact_is_explained(model, good, tmp_path):
    pytest.importorskip("openvino")
    path = tmp_path / "m.onnx"
    path.write_bytes(serialize(scaled(good, "blocks.3.mlp.fc1", -1.0)))
    changes = {"runtime": "openvino", "target": "openvino-fp32", "details": {"openvino": {"inference_precision": "f32"}}}
    artifact = artifact_of(path, tmp_path / "a", SIZE, **changes)
    assert "blocks.3 (in it blocks.3.mlp.fc1" in explain(model, artifact, pictures(2, SIZE), GATE)


def test_an_engine_without_a_gpu_says_so(model, tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    (tmp_path / "m.engine").write_bytes(b"plan")
    engine = {"target": "rtx-fp16", "precision": "fp16", "runtime": "tensorrt_rtx", "compute_capabilities": ["8.6"]}
    words = explain(model, artifact_of(tmp_path / "m.engine", tmp_path / "a", SIZE, **engine), pictures(1, SIZE), GATE)
    assert words.startswith("which block is to blame could not be found: no CUDA GPU on this machine")


def test_the_sentence():
    guilty = Guilty("blocks.3", "blocks.3.mlp.fc1", 0.99991, 0.412, 0.37, 5)
    assert guilty.sentence() == (
        "the first guilty block is blocks.3 (in it blocks.3.mlp.fc1, cosine 0.37000): "
        "cosine 0.99991 in front of it, 0.41200 behind it"
    )
