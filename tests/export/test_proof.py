"""FLOPs are counted by hand here, and a file whose products are not what its name says is refused by the first that is not."""

import numpy as np
import onnx
import onnxruntime
import pytest
from broken import add_constants, copy_of, insert_before
from onnx import ModelProto, TensorProto, helper, numpy_helper
from requantized import requantized

from distill.errors import GateFailed
from export.graph import load_graph
from export.graphs.anatomy import Anatomy
from export.graphs.attention_blocks import attention_blocks
from export.proof import CLAIMS, prove, refuse


@pytest.fixture(scope="module")
def fp32(graphs) -> ModelProto:
    return load_graph(graphs["mlp-fp32"][1])


@pytest.fixture(scope="module")
def fp16(graphs) -> ModelProto:
    return load_graph(graphs["mlp-fp16"][1])


def test_flops_by_hand(graphs, fp32):
    """192 wide, 2 blocks, 3 heads of 64, 16 patches of 8 px and a class token."""
    dim, tokens, blocks = 192, 17, 2
    patch = 2 * 16 * dim * 3 * 8 * 8
    linear = 2 * tokens * dim * dim * (3 + 1 + 4 + 4)
    attention = 2 * 2 * tokens * tokens * dim
    proof = prove(fp32)
    assert sum(p.flops or 0 for p in proof.products) == patch + blocks * (linear + attention)
    kinds = {p.name: p.kind for p in proof.products}
    assert list(kinds.values()).count("linear") == 8
    assert kinds["patch_embed.proj"] == "conv"
    assert kinds["blocks.0.attn.qk"] == kinds["blocks.1.attn.av"] == "attention"
    assert proof.flops_share() == {"FLOAT": 1.0}
    assert proof.attention == {"blocks": 2, "fusable": 2, "fused": None}
    assert (proof.source, proof.reformats, proof.qdq_pairs, proof.casts) == ("graph", None, 0, 0)


def test_shares_of_an_int8_graph(fp16):
    proof = prove(requantized(fp16, "int8"), "int8")
    linear = sum(p.flops for p in proof.products if p.kind == "linear")
    total = sum(p.flops for p in proof.products)
    assert proof.flops_share() == pytest.approx({"INT8": linear / total, "FLOAT16": 1 - linear / total})
    assert proof.flops_share(("linear",)) == {"INT8": 1.0}
    assert proof.qdq_pairs == 8
    assert proof.casts == sum(n.op_type == "Cast" for n in fp16.graph.node) > 0
    value = proof.to_json()
    assert set(value) >= {"source", "flops_share", "casts", "reformats", "attention", "layers", "notes"}
    assert value["flops_share"]["INT8"] == pytest.approx(linear / total, abs=1e-6)
    assert value["notes"] == []


@pytest.mark.parametrize(("to", "type_"), [("int8", "INT8"), ("fp8", "FP8"), ("w8", "INT8-weight"), ("w4", "INT4-weight")])
def test_every_precision_has_its_type(fp16, to, type_):
    proof = prove(requantized(fp16, to))
    assert proof.flops_share(("linear",)) == {type_: 1.0}
    assert CLAIMS[to] == type_
    refuse(proof, to, kept=[])
    for other in set(CLAIMS) - {to}:
        with pytest.raises(GateFailed, match=f"called {other}"):
            refuse(proof, other)


def test_the_first_layer_that_lies_is_named(fp32, fp16):
    with pytest.raises(
        GateFailed, match=r"m.onnx is called fp16 but only 0% of its FLOPs are FLOAT16: patch_embed.proj is FLOAT"
    ):
        refuse(prove(fp32), "fp16", "m.onnx")
    refuse(prove(fp32), "fp32")
    refuse(prove(fp16), "fp16")
    mixed = prove(requantized(fp32, "int8", skip="blocks.0.attn"))
    with pytest.raises(
        GateFailed, match=r"2 of its 8 products are not INT8 and no plan keeps them so: blocks.0.attn.qkv is FLOAT\."
    ):
        refuse(mixed, "int8", kept=[])
    with pytest.raises(GateFailed, match=r"1 of its 8 .* blocks.0.attn.proj is FLOAT"):
        refuse(mixed, "int8", kept=["blocks.0.attn.qkv"])
    refuse(mixed, "int8", kept=["blocks.0.attn.*"])
    refuse(mixed, "int8")  # without a plan the share decides, and it is 83 %
    with pytest.raises(GateFailed, match=r"only 83% of its FLOPs are INT8: blocks.0.attn.qkv"):
        refuse(mixed, "int8", least_share=0.9)


def test_a_plan_that_keeps_everything_is_no_int8(fp32):
    with pytest.raises(GateFailed, match=r"is called int8 but only 0% of its FLOPs are INT8"):
        refuse(prove(fp32), "int8", kept=["*"])
    with pytest.raises(
        GateFailed, match=r"called w4 but only 0% .* multiples of quantize.block, prune with a round_to that is"
    ):
        refuse(prove(fp32), "w4", kept=["*"])


def test_a_graph_without_products():
    x = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 4])]
    y = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 4])]
    model = helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", x, y))
    with pytest.raises(GateFailed, match="holds no matrix product"):
        refuse(prove(model), "fp32")


def test_one_sided_quantization_is_not_int8(fp32):
    """Only the weight, or only the activation, behind Q/DQ: the product runs in floating point."""
    model = requantized(fp32, "int8")
    node = next(n for n in model.graph.node if n.name == "blocks.0.mlp.fc1")
    made = {o: n for n in model.graph.node for o in n.output}
    node.input[0] = made[made[node.input[0]].input[0]].input[0]
    types = {p.name: p.type for p in prove(model).products}
    assert (types["blocks.0.mlp.fc1"], types["blocks.0.mlp.fc2"]) == ("INT8-weight", "INT8")


def test_quantization_is_seen_through_layout_and_casts(fp16):
    model = requantized(fp16, "int8")
    node = next(n for n in model.graph.node if n.name == "blocks.0.mlp.fc1")
    insert_before(model, node, helper.make_node("Cast", [node.input[1]], ["w32"], name="c1", to=TensorProto.FLOAT))
    insert_before(model, node, helper.make_node("Cast", ["w32"], ["w16"], name="c2", to=TensorProto.FLOAT16))
    node.input[1] = "w16"
    assert prove(model).flops_share(("linear",)) == {"INT8": 1.0}
    assert prove(model).casts == prove(fp16).casts, "casts of weights are folded"


def test_integer_operators_count_as_int8(graphs, tmp_path):
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(graphs["mlp-fp32"][1], tmp_path / "d.onnx")
    proof = prove(load_graph(tmp_path / "d.onnx"))
    assert proof.flops_share(("linear",)) == {"INT8": 1.0}
    assert sum(p.op == "MatMulInteger" for p in proof.products) == 8


def test_shapes_are_followed_through_spelt_out_arithmetic(fp32):
    """Exporters write a Reshape's sizes as Shape, Gather, Mul, Concat of the tensor's own; FLOPs are the same."""
    model = copy_of(fp32)
    reshape = next(n for n in model.graph.node if n.op_type == "Reshape" and n.input[0] == "linear")
    size = numpy_helper.to_array({t.name: t for t in model.graph.initializer}[reshape.input[1]])
    tokens_at = 1
    zero, one = np.array([0], np.int64), np.array([tokens_at], np.int64)
    rest = size[2:].astype(np.int64)
    add_constants(model, {"at0": zero, "at1": one, "rest": rest})
    for node in (
        helper.make_node("Shape", [reshape.input[0]], ["all"], name="s"),
        helper.make_node("Gather", ["all", "at0"], ["b"], name="g0"),
        helper.make_node("Gather", ["all", "at1"], ["t"], name="g1"),
        helper.make_node("Concat", ["b", "t", "rest"], ["sizes"], name="cat", axis=0),
    ):
        insert_before(model, reshape, node)
    reshape.input[1] = "sizes"
    onnx.checker.check_model(model, full_check=True)
    assert [(p.name, p.flops) for p in prove(model).products] == [(p.name, p.flops) for p in prove(fp32).products]


def test_unknown_shapes_are_said(fp32):
    model = copy_of(fp32)
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = "size"
    proof = prove(model)
    assert "shapes of" in proof.notes[0]
    assert any(p.flops is None for p in proof.products)
    refuse(proof, "fp32")


def test_an_attention_operator(fp32):
    model = attention_op()
    proof = prove(model)
    assert proof.attention == {"blocks": 1, "fusable": 1, "fused": None}
    assert proof.flops_share() == {"FLOAT16": 1.0}
    assert sum(p.flops for p in proof.products) == 4 * 3 * 17 * 17 * 64
    assert attention_blocks(Anatomy(model))[0].tokens == 17


def attention_op() -> ModelProto:
    """One Attention of opset 23 on [1, 3, 17, 64] in half precision."""
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, [1, 3, 17, 64]) for n in "qkvy"]
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="attention")
    graph = helper.make_graph([node], "g", info[:3], info[3:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def test_the_counted_graph_is_the_one_that_runs(graphs, fp32):
    """The requantized graphs of these tests are valid for a runtime, not only for the counter."""
    model = requantized(fp32, "int8")
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    out = session.run(None, {"images": np.zeros((1, 3, 32, 32), np.float32)})
    assert all(np.isfinite(o).all() for o in out)
