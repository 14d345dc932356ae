"""Each broken graph is caught by its own rule's name, and healthy graphs, ours and others', are left in peace."""

import numpy as np
import onnx
import onnxruntime
import pytest
from broken import BROKEN, add_constants, add_qdq, before_softmax, copy_of, insert_before, set_constant
from onnx import ModelProto, TensorProto, helper, numpy_helper
from requantized import requantized

from distill.errors import UserError
from export.graph import constants, load_graph
from export.lint import all_rules, claimed_precision, lint


@pytest.fixture(scope="module")
def fp32(graphs) -> ModelProto:
    return load_graph(graphs["mlp-fp32"][1])


@pytest.fixture(scope="module")
def fp16(graphs) -> ModelProto:
    return load_graph(graphs["mlp-fp16"][1])


def rules(findings, severity=None) -> set[str]:
    return {f.rule for f in findings if severity in (None, f.severity)}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_graph_is_caught_by_name(rule, fp32, fp16, tmp_path):
    build, name, companions = BROKEN[rule]
    model = build(fp32, fp16)
    path = tmp_path / name
    onnx.save(model, path)
    errors = rules(lint(path), "error")
    assert rule in errors
    assert errors <= {rule} | companions, "nothing else is an error"
    finding = next(f for f in lint(path) if f.rule == rule)
    assert finding.cure.endswith(".")
    assert set(finding.places) >= {finding.where.split(" and ")[0]}


def test_there_are_ten(fp32, fp16):
    assert len(BROKEN) == 10
    assert set(BROKEN) <= {r.id for r in all_rules()}


@pytest.mark.parametrize("name", ["mlp-fp32", "swiglu-fp32", "mlp-fp16", "swiglu-fp16"])
def test_our_float_graphs_are_healthy(graphs, name):
    path = graphs[name][1]
    assert rules(lint(path), "error") == set()
    assert rules(lint(path)) <= {"cast-ping-pong", "fp16-layernorm"}


@pytest.mark.parametrize("to", ["int8", "fp8", "w8", "w4"])
def test_quantized_graphs_are_healthy(fp32, fp16, to):
    for source in (fp32, fp16):
        found = lint(requantized(source, to), f"vit_{to}.onnx")
        assert rules(found, "error") == set()
        assert rules(found, "warning") <= {"cast-ping-pong"}


def test_a_quantized_graph_by_our_quantizer_is_healthy(graphs, tmp_path):
    from tiny import pictures

    from export import quantize as module

    source, size = graphs["mlp-fp32"][1], graphs["mlp-fp32"][2]
    config = module.QuantizeConfig()
    calibration = module.calibrate(source, pictures(4, size), config)
    model, _ = module.quantize(load_graph(source), calibration, config)
    assert rules(lint(model, "onnx-int8.onnx")) <= {"quantized-qkv-cut"}


# --- rules one by one: caught when broken, silent when not ---


def edited(model: ModelProto, **arrays: np.ndarray) -> ModelProto:
    out = copy_of(model)
    for name, value in arrays.items():
        set_constant(out, name.replace("__", "."), value)
    return out


def test_zero_points_and_scales(fp32):
    int8 = requantized(fp32, "int8")
    zero = edited(int8, blocks__0__attn__qkv__in_zero=np.array(3, np.int8))
    found = lint(zero, "m_int8.onnx")
    assert {"uint8-zero-point", "mismatched-scales"} & rules(found) == {"uint8-zero-point"}
    assert "zero point 3" in found[0].message
    for bad, said in ((0.0, "scale 0"), (-0.1, "scale -0.1"), (np.nan, "scale nan"), (np.inf, "scale inf")):
        found = lint(edited(int8, blocks__0__attn__qkv__in_scale=np.array(bad, np.float32)), "m_int8.onnx")
        assert rules(found, "error") == {"bad-scale"}
        assert said in found[0].message
    short = np.full(7, 0.1, np.float32)
    assert "scale-length" in rules(lint(edited(int8, blocks__0__attn__qkv__scale=short), "m_int8.onnx"), "error")


def test_a_pair_with_two_scales(fp32):
    model = requantized(fp32, "int8")
    add_constants(model, {"other": np.array(0.1, np.float32)})
    dequantize = next(n for n in model.graph.node if n.name == "blocks.0.attn.qkv.in_dq")
    dequantize.input[1] = "other"
    found = lint(model, "m_int8.onnx")
    assert rules(found, "error") == {"mismatched-scales"}
    assert found[0].where == "blocks.0.attn.qkv.in_dq"


def test_tiny_half_scales(fp16):
    int8 = requantized(fp16, "int8")
    assert "tiny-half-scale" not in rules(lint(int8, "m_int8.onnx"))
    tiny = edited(int8, blocks__0__attn__qkv__in_scale=np.array(1e-6, np.float16))
    assert "tiny-half-scale" in rules(lint(tiny, "m_int8.onnx"), "warning")


def test_granularity(fp32):
    model = requantized(fp32, "int8")
    set_constant(model, "blocks.0.mlp.fc1.scale", np.array(0.01, np.float32))
    set_constant(model, "blocks.0.mlp.fc1.zero", np.array(0, np.int8))
    width = constants(model)["blocks.0.attn.qkv.q"].dims[0]
    set_constant(model, "blocks.0.attn.qkv.in_scale", np.full(width, 0.1, np.float32))
    set_constant(model, "blocks.0.attn.qkv.in_zero", np.zeros(width, np.int8))
    for node in model.graph.node:
        if node.name.startswith("blocks.0.attn.qkv.in_"):
            node.attribute.append(helper.make_attribute("axis", 2))
    found = lint(model, "m_int8.onnx")
    assert rules(found, "error") == {"per-channel-activation"}
    assert rules(found, "warning") == {"per-tensor-weight"}


def test_float_weights_behind_q(fp32):
    model = copy_of(fp32)
    node = next(n for n in model.graph.node if n.name == "blocks.0.mlp.fc1")
    node.input[1] = add_qdq(model, node, node.input[1], "weight")
    found = lint(model, "m.onnx")
    assert "float-weight-behind-q" in rules(found, "warning")
    assert "MB of floats" in next(f.message for f in found if f.rule == "float-weight-behind-q")


@pytest.mark.parametrize(
    ("op", "rule"), [("LayerNormalization", "quantized-norm"), ("Softmax", "quantized-softmax"), ("Gelu", "quantized-gelu")]
)
def test_what_stays_in_floating_point(fp32, op, rule):
    model = copy_of(fp32)
    node = next(n for n in model.graph.node if n.op_type == op)
    node.input[0] = add_qdq(model, node, node.input[0], "input")
    assert rule in rules(lint(model, "m.onnx"), "warning")
    assert rule not in rules(lint(requantized(fp32, "int8"), "m_int8.onnx"))


def test_quantized_positions(fp32):
    model = copy_of(fp32)
    stored = constants(model)
    add = next(
        n for n in model.graph.node if n.op_type == "Add" and any(i in stored and len(stored[i].dims) == 3 for i in n.input)
    )
    add.input[0] = add_qdq(model, add, add.input[0], "tokens")
    assert "quantized-positions" in rules(lint(model, "m.onnx"), "warning")


def test_attention_that_is_scaled_late(fp32):
    found = lint(before_softmax(fp32, "Mul", np.array(0.125, np.float32)), "m.onnx")
    assert [(f.rule, f.severity) for f in found] == [("attention-scale", "warning")]
    assert found[0].where == "blocks.0.attn.qk"


@pytest.mark.parametrize(("op", "attributes"), [("Tanh", {}), ("Sigmoid", {}), ("Transpose", {"perm": [0, 1, 3, 2]})])
def test_what_stands_in_the_way_of_fused_attention(fp32, op, attributes):
    found = lint(before_softmax(fp32, op, **attributes), "m.onnx")
    assert rules(found, "error") == {"unfused-attention"}
    assert f"{op} inserted stands between QK^T and the softmax" in found[0].message


def test_a_softmax_over_another_axis(fp32):
    model = copy_of(fp32)
    softmax = next(n for n in model.graph.node if n.op_type == "Softmax")
    del softmax.attribute[:]
    softmax.attribute.append(helper.make_attribute("axis", 2))
    assert "runs over axis 2" in next(f.message for f in lint(model, "m.onnx") if f.rule == "unfused-attention")


def test_scores_that_are_read_twice(fp32):
    model = copy_of(fp32)
    softmax = next(n for n in model.graph.node if n.op_type == "Softmax")
    model.graph.output.append(helper.make_empty_tensor_value_info(softmax.output[0]))
    found = lint(model, "m.onnx")
    assert "unfused-attention" in rules(found, "error")
    assert "is also an output" in next(f.message for f in found if f.rule == "unfused-attention")


def test_a_mask_is_no_obstacle(fp32):
    mask = np.where(np.eye(17), -np.inf, 0).astype(np.float32)
    assert rules(lint(before_softmax(fp32, "Add", mask), "m.onnx")) == set()


def test_casts_back_and_forth(fp32):
    model = copy_of(fp32)
    node = next(n for n in model.graph.node if n.name == "blocks.0.mlp.fc1")
    insert_before(model, node, helper.make_node("Cast", [node.input[0]], ["half"], name="down", to=TensorProto.FLOAT16))
    insert_before(model, node, helper.make_node("Cast", ["half"], ["back"], name="up", to=TensorProto.FLOAT))
    node.input[0] = "back"
    found = lint(model, "m.onnx")
    assert rules(found) == {"cast-ping-pong"}
    assert "down and up cast FLOAT to FLOAT16 and back" in found[0].message


def test_large_weights_overflow_only_in_fp16(fp32):
    large = edited(fp32, blocks__0__mlp__fc1__weight=numpy_helper.to_array(constants(fp32)["blocks.0.mlp.fc1.weight"]) * 1e7)
    assert rules(lint(large, "m_fp32.onnx")) == set()
    assert "fp16-overflow" in rules(lint(large, "m_fp16.onnx"), "error")


def test_norms_in_half_precision(fp16, fp32):
    model = copy_of(fp16)
    norm = next(n for n in model.graph.node if n.op_type == "LayerNormalization")
    made = {o: n for n in model.graph.node for o in n.output}
    cast = made[norm.input[0]]
    assert cast.op_type == "Cast", "decant casts in front of every norm"
    norm.input[0] = cast.input[0]
    assert "fp16-layernorm" in rules(lint(model, "m_fp16.onnx"), "note"), "it asks for FLOAT inside"
    next(a for a in norm.attribute if a.name == "stash_type").i = TensorProto.FLOAT16
    assert "fp16-layernorm" in rules(lint(model, "m_fp16.onnx"), "warning")
    assert "fp16-layernorm" not in rules(lint(fp16, "m_fp16.onnx"))


def test_an_old_export_spells_layernorm_out():
    model = chained_norm()
    assert rules(lint(model, "m.onnx"), "warning") == {"unfused-layernorm"}


def chained_norm() -> ModelProto:
    """x -> (x - mean) / sqrt(var + eps), as exporters wrote LayerNorm before opset 17."""
    axes = {"axes": [-1], "keepdims": 1}
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], **axes),
        helper.make_node("Sub", ["x", "mean"], ["centred"]),
        helper.make_node("Pow", ["centred", "two"], ["squared"]),
        helper.make_node("ReduceMean", ["squared"], ["variance"], **axes),
        helper.make_node("Add", ["variance", "eps"], ["safe"]),
        helper.make_node("Sqrt", ["safe"], ["deviation"]),
        helper.make_node("Div", ["centred", "deviation"], ["y"], name="norm"),
    ]
    inits = [numpy_helper.from_array(np.array(v, np.float32), k) for k, v in (("two", 2), ("eps", 1e-6))]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 17, 32]) for n in "xy"]
    graph = helper.make_graph(nodes, "norm", info[:1], info[1:], inits)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)


def test_axes_and_batch(fp32):
    model = copy_of(fp32)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[2].dim_param = "height"
    assert "dynamic-spatial-axes" in rules(lint(model, "m.onnx"), "warning")
    model = copy_of(fp32)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    assert "fixed-batch" in rules(lint(model, "m.onnx"), "note")


def test_external_data_that_is_not_there(fp32, tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(copy_of(fp32), path, save_as_external_data=True, location="m.data", size_threshold=1024)
    assert rules(lint(path)) == set(), "beside the file it is found"
    (tmp_path / "m.data").write_bytes((tmp_path / "m.data").read_bytes()[:1000])
    assert "external-data-missing" in rules(lint(path), "error")
    (tmp_path / "m.data").unlink()
    found = [f for f in lint(path) if f.rule == "external-data-missing"]
    assert "m.data" in found[0].message


def test_external_data_outside_of_the_folder_is_not_opened(fp32, tmp_path):
    (tmp_path / "inside").mkdir()
    path = tmp_path / "inside" / "m.onnx"
    onnx.save(copy_of(fp32), path, save_as_external_data=True, location="m.data", size_threshold=1024)
    (tmp_path / "inside" / "m.data").rename(tmp_path / "m.data")
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../m.data" if entry.key == "location" else entry.value
    path.write_bytes(model.SerializeToString())
    assert "external-data-missing" in rules(lint(path), "error")


def test_what_only_tensorrt_minds_is_a_note_for_others(fp32, fp16):
    build, name, _ = BROKEN["uint8-zero-point"]
    model = build(fp32, fp16)
    assert rules(lint(model, name), "error") == {"uint8-zero-point"}
    assert rules(lint(model, name, reader="onnxruntime"), "error") == set()
    assert "uint8-zero-point" in rules(lint(model, name, reader="onnxruntime"), "note")
    residual = BROKEN["quantized-residual"][0](fp32, fp16)
    assert rules(lint(residual, name, reader="openvino"), "error") == {"quantized-residual"}, "wrong for everyone"


def test_layers_kept_in_floating_point_are_a_note(fp32):
    found = lint(requantized(fp32, "int8", skip="blocks.0.attn"), "m_int8.onnx")
    assert {f.severity for f in found} == {"note"}
    assert "2 of 8 products are not INT8" in next(f.message for f in found if f.rule == "precision-mismatch")
    assert "precision-mismatch" in rules(lint(requantized(fp32, "int8", skip="mlp"), "m_int8.onnx"), "error")


def test_operators_of_onnxruntime(graphs, tmp_path):
    """onnxruntime's own optimization writes operators that TensorRT does not know."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(graphs["mlp-fp32"][1]), options, providers=["CPUExecutionProvider"])
    found = lint(tmp_path / "optimized.onnx")
    assert "foreign-operator" in rules(found, "error")
    assert "invalid-graph" not in rules(found)


def test_onnxruntimes_default_quantization(graphs, tmp_path):
    """Its defaults give TensorRT both an unsigned zero point and an INT32 bias, and quantize residual Adds."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from tiny import pictures

    source, size = graphs["mlp-fp32"][1], graphs["mlp-fp32"][2]

    class Pictures(CalibrationDataReader):
        def __init__(self):
            self.left = list(pictures(2, size).numpy())

        def get_next(self):
            return {"images": self.left.pop()[None]} if self.left else None

    out = tmp_path / "ort_int8.onnx"
    quantize_static(source, out, Pictures(), quant_format=QuantFormat.QDQ)
    found = lint(out)
    assert {"uint8-zero-point", "quantized-residual"} <= rules(found, "error")


@pytest.mark.parametrize(
    ("path", "precision"),
    [
        ("vit_fp16.onnx", "fp16"),
        ("vit-int8.onnx", "int8"),
        ("vit.bf16.onnx", "bf16"),
        ("rtx-int8/graph_48.onnx", "int8"),
        ("onnx-w4/model_224.onnx", "w4"),
        ("fp16/model.onnx", None),
        ("refp16ed.onnx", None),
        ("vit_s_focus.onnx", None),
        ("model_half.onnx", "fp16"),
    ],
)
def test_the_precision_that_a_name_claims(path, precision, tmp_path):
    assert claimed_precision(tmp_path / path) == precision


def test_files_that_are_none(tmp_path, graphs):
    whole = graphs["mlp-fp32"][1].read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        (tmp_path / "m.onnx").write_bytes(content)
        with pytest.raises(UserError, match=r"m\.onnx is not an ONNX file"):
            lint(tmp_path / "m.onnx")
    with pytest.raises(UserError, match="There is no file"):
        lint(tmp_path / "absent.onnx")
    with pytest.raises(UserError, match="is a folder"):
        lint(tmp_path)
