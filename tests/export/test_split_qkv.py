"""Three layers instead of one: the same numbers, and the compiler keeps them in 8 bits."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto
from requantized import requantized
from tiny import pictures

from export.engine import build_engine
from export.graph import load_graph
from export.graphs.split_qkv import split_qkv
from export.lint import lint
from export.proof import prove


@pytest.fixture(scope="module")
def fp32(graphs) -> ModelProto:
    return load_graph(graphs["mlp-fp32"][1])


def outputs(model: ModelProto) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Its own fusions differ between the two graphs; without them both are computed as written.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": pictures(2, 32).numpy()})


def test_the_same_numbers(fp32):
    whole = requantized(fp32, "int8")
    parts = split_qkv(whole)
    onnx.checker.check_model(parts, full_check=True)
    for a, b in zip(outputs(whole), outputs(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    names = {n.name for n in parts.graph.node if n.op_type == "MatMul"}
    assert {"blocks.0.attn.qkv.q", "blocks.0.attn.qkv.k", "blocks.1.attn.qkv.v"} <= names
    assert "blocks.0.attn.qkv" not in names
    assert parts.ByteSize() < 1.05 * whole.ByteSize(), "the whole weight is gone"


def test_what_is_not_quantized_stays(fp32):
    for model in (fp32, requantized(fp32, "w8"), requantized(fp32, "w4")):
        assert [n.name for n in split_qkv(model).graph.node] == [n.name for n in model.graph.node]
    kept = split_qkv(requantized(fp32, "int8", skip="blocks.1"))
    names = {n.name for n in kept.graph.node}
    assert {"blocks.0.attn.qkv.q", "blocks.1.attn.qkv"} <= names


def test_lint_names_the_cut(fp32):
    whole = requantized(fp32, "int8")
    found = lint(whole, "m_int8.onnx")
    assert [(f.rule, f.severity, f.where) for f in found] == [("quantized-qkv-cut", "note", "blocks.0.attn.qkv and 1 more")]
    assert lint(split_qkv(whole), "m_int8.onnx") == []


@pytest.mark.parametrize(("to", "type_"), [("int8", "INT8"), ("fp8", "FP8")])
def test_the_compiler_keeps_them_in_8_bits(graphs, tmp_path, to, type_):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx has no wheels for this platform")
    model = split_qkv(requantized(load_graph(graphs["mlp-fp16"][1]), to))
    assert prove(model).attention["fusable"] == 2
    onnx.save(model, tmp_path / "m.onnx")
    proof = build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", "tensorrt_rtx", to, (1, 4, 16), ["8.9"]).proof
    assert proof.source == "compiled plan"
    assert proof.flops_share(("linear",)) == {type_: 1.0}
    assert proof.attention["fused"] == 2
