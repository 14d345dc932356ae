"""The graph that OpenVINO gets: fewer operations around the same integers, the same features."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto
from tiny import backbone, pictures

from export.graph import INPUT, OUTPUTS, export_onnx, load_graph
from export.graphs.openvino_graph import for_openvino
from export.quantize import QuantizeConfig, calibrate, quantize
from export.runtimes import load_openvino
from export.sessions import exact_session

SIZE = 32
PLAIN = QuantizeConfig(images=8).plain()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    model = backbone()
    with torch.no_grad():  # LayerScale that a fold could get wrong: of both signs, and a dead channel
        for block in model.blocks:
            for scale in (block.ls1, block.ls2):
                scale.gamma.copy_(torch.linspace(-1.5, 2.0, len(scale.gamma)))
                scale.gamma[3] = 0.0
    path = tmp_path_factory.mktemp("graphs") / "model_32.onnx"
    export_onnx(model, path, SIZE)
    return path


def quantized(source, **changes) -> ModelProto:
    config = PLAIN.model_copy(update=changes)
    return quantize(load_graph(source), calibrate(source, pictures(8, SIZE), config), config)[0]


def features(model: ModelProto, images: np.ndarray) -> list[np.ndarray]:
    session = exact_session(model.SerializeToString(), 1)
    return session.run(list(OUTPUTS), {INPUT: images})


@pytest.mark.parametrize("attention", [False, True, "qk"])
def test_the_same_features_with_fewer_operations(source, attention):
    model = quantized(source, attention=attention)
    before = model.SerializeToString()
    rewritten = for_openvino(model)
    assert model.SerializeToString() == before, "the graph that was given stays as it is"
    images = pictures(4, SIZE, seed=3).numpy()
    for a, b in zip(features(model, images), features(rewritten, images), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3 * np.abs(a).max())
    ops, fewer = (Counter(n.op_type for n in m.graph.node) for m in (model, rewritten))
    assert fewer["Mul"] == 0 < ops["Mul"], "LayerScale and the query's scale went into weights"
    assert fewer["Slice"] < ops["Slice"]
    names = {n.name for n in rewritten.graph.node}
    if not attention:
        assert {"blocks.0.attn.qkv.q", "blocks.0.attn.qkv.k", "blocks.1.attn.qkv.v"} <= names
        assert "blocks.0.attn.qkv" not in names


@pytest.mark.parametrize("attention", [False, "qk"])
def test_k_is_turned_by_itself_in_front_of_its_product(source, attention):
    rewritten = for_openvino(quantized(source, attention=attention))
    maker = {o: n for n in rewritten.graph.node for o in n.output}
    for block in range(2):
        product = next(n for n in rewritten.graph.node if n.name == f"blocks.{block}.attn.qk")
        turn = maker[product.input[1]]
        assert (turn.op_type, list(turn.attribute[0].ints)) == ("Transpose", [0, 1, 3, 2])
        behind = "DequantizeLinear" if attention else "Transpose"
        assert maker[turn.input[0]].op_type == behind


def test_integers_stay_the_same(source):
    model = quantized(source)
    before = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    after = {t.name: onnx.numpy_helper.to_array(t) for t in for_openvino(model).graph.initializer}
    codes = before["blocks.0.attn.qkv.weight_int8"]
    parts = [after[f"blocks.0.attn.qkv.{part}_int8"] for part in "qkv"]
    assert np.array_equal(np.concatenate(parts, 1), codes)


def test_a_quantized_patch_convolution_goes_back_to_floats(source):
    model = quantized(source, patch_embed=True)
    maker = {o: n for n in model.graph.node for o in n.output}
    conv = next(n for n in model.graph.node if n.op_type == "Conv")
    assert maker[conv.input[0]].op_type == maker[conv.input[1]].op_type == "DequantizeLinear"
    rewritten = for_openvino(model)
    conv = next(n for n in rewritten.graph.node if n.op_type == "Conv")
    assert conv.input[0] == INPUT
    assert next(t for t in rewritten.graph.initializer if t.name == conv.input[1]).data_type == onnx.TensorProto.FLOAT
    images = pictures(4, SIZE, seed=3).numpy()
    for a, b in zip(features(model, images), features(rewritten, images), strict=True):
        cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        assert cosine.min() > 0.99


def test_a_float_graph_stays_as_it_is(source):
    model = load_graph(source)
    assert [n.op_type for n in for_openvino(model).graph.node] == [n.op_type for n in model.graph.node]


def test_openvino_runs_it_in_int8(source):
    pytest.importorskip("openvino")
    ov = load_openvino()
    rewritten = for_openvino(quantized(source))
    compiled = ov.Core().compile_model(ov.Core().read_model(rewritten.SerializeToString()), "CPU")
    images = pictures(2, SIZE, seed=3).numpy()
    found = compiled({INPUT: images})
    for name, want in zip(OUTPUTS, features(rewritten, images), strict=True):
        cosine = (found[name] * want).sum(-1) / np.linalg.norm(found[name], axis=-1) / np.linalg.norm(want, axis=-1)
        assert cosine.min() > 0.98
