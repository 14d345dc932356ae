"""The plan: what is quantized, what is not and why, in our graphs and in others'."""

import json

import pytest
from foreign import foreign

from distill.errors import UserError
from export.graph import load_graph
from export.quantizing.plan import attention_roles, plan_graph
from export.quantizing.quantize_config import QuantizeConfig

LINEARS = [f"blocks.{b}.{n}" for b in (0, 1) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def quantized(plan):
    return [e.layer for e in plan if e.quantized]


def test_linear_layers_are_quantized_and_the_rest_is_named(graphs):
    plan = plan_graph(load_graph(graphs["mlp-fp32"][1]), QuantizeConfig())
    assert quantized(plan) == LINEARS
    kept = {e.layer: e for e in plan if not e.quantized}
    assert "0 %" in kept["residual adds (4)"].why
    assert "fused" in kept["blocks.0.attn.qk"].why
    assert kept["patch_embed.proj"].kind == "Conv"
    classes = [e.layer for e in plan if e.kind == "Class"]
    assert classes == [
        "residual adds (4)", "biases (8)", "positions (1)", "LayerNorm (5)", "softmax (2)", "activation functions (2)",
    ]  # fmt: skip


def test_operations_for_one_image(graphs):
    _, path, size = graphs["mlp-fp32"]
    plan = {e.layer: e for e in plan_graph(load_graph(path), QuantizeConfig())}
    tokens, dim, head = (size // 8) ** 2 + 1, 192, 64
    assert plan["blocks.0.mlp.fc1"].mflops == pytest.approx(2 * tokens * dim * 4 * dim / 1e6)
    assert plan["patch_embed.proj"].mflops == pytest.approx(2 * (tokens - 1) * dim * 3 * 64 / 1e6)
    assert plan["blocks.0.attn.qk"].mflops == pytest.approx(2 * 3 * tokens * tokens * head / 1e6)
    assert plan["blocks.0.attn.av"].mflops == plan["blocks.0.attn.qk"].mflops


def test_what_the_recipe_asks_for(graphs):
    model = load_graph(graphs["mlp-fp32"][1])
    plan = plan_graph(model, QuantizeConfig(attention=True, patch_embed=True, keep=["blocks.0.*"]))
    assert quantized(plan) == ["patch_embed.proj", "blocks.1.attn.qkv", "blocks.1.attn.qk", "blocks.1.attn.av",
                               "blocks.1.attn.proj", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]  # fmt: skip
    assert {e.decision for e in plan} == {"int8", "keep"}
    assert {e.why for e in plan if e.layer.startswith("blocks.0.")} == {"the recipe keeps it in floating point"}


def test_of_attention_the_product_of_queries_and_keys_alone(graphs):
    plan = {e.layer: e for e in plan_graph(load_graph(graphs["mlp-fp32"][1]), QuantizeConfig(attention="qk"))}
    assert [plan[f"blocks.{i}.attn.qk"].decision for i in range(2)] == ["int8", "int8"]
    assert [plan[f"blocks.{i}.attn.av"].decision for i in range(2)] == ["keep", "keep"]
    assert "QK^T alone" in plan["blocks.0.attn.av"].why


@pytest.mark.parametrize(("precision", "count"), [("fp8", 8), ("w8", 8), ("w4", 8)])
def test_other_precisions(graphs, precision, count):
    plan = plan_graph(load_graph(graphs["mlp-fp32"][1]), QuantizeConfig(attention=precision != "fp8"), precision)
    assert quantized(plan) == LINEARS[:count]
    assert {e.decision for e in plan if e.quantized} == {precision}


def test_inputs_that_do_not_divide_into_blocks_stay(graphs):
    plan = {e.layer: e for e in plan_graph(load_graph(graphs["swiglu-fp32"][1]), QuantizeConfig(), "w4")}
    inputs = plan["blocks.0.mlp.fc2"].weight_shape[0]
    assert inputs % 32
    assert plan["blocks.0.mlp.fc2"].decision == "keep"
    assert f"its {inputs} inputs do not divide" in plan["blocks.0.mlp.fc2"].why
    assert plan["blocks.0.attn.qkv"].decision == "w4"


@pytest.mark.parametrize(
    ("keep", "precision", "message"),
    [
        (["blocks.7.*"], "int8", r"keep names 'blocks.7.\*', which no layer matches; layers are called like blocks.0.attn.qkv"),
        (["*"], "int8", "Nothing is left to quantize to int8"),
    ],
)
def test_a_plan_that_cannot_be(graphs, keep, precision, message):
    with pytest.raises(UserError, match=message):
        plan_graph(load_graph(graphs["mlp-fp32"][1]), QuantizeConfig(keep=keep), precision)


def test_json_has_what_the_report_reads(graphs):
    value = json.loads(json.dumps([e.to_json() for e in plan_graph(load_graph(graphs["mlp-fp32"][1]), QuantizeConfig())]))
    assert set(value[0]) == {
        "layer", "kind", "decision", "why", "input_scale", "weight_shape", "weight_scale_min", "weight_scale_max", "mflops",
    }  # fmt: skip
    assert next(e for e in value if e["layer"] == "blocks.0.attn.qkv")["weight_shape"] == [192, 576]


def test_a_graph_of_others():
    model = foreign()
    assert attention_roles(model) == {
        "/blocks/blocks.0/MatMul": "qk", "/blocks/blocks.0/MatMul_1": "av",
        "/blocks/blocks.1/MatMul": "qk", "/blocks/blocks.1/MatMul_1": "av",
    }  # fmt: skip
    plan = plan_graph(model, QuantizeConfig())
    assert len(quantized(plan)) == 12
    assert "/blocks/blocks.0/query/MatMul" in quantized(plan)
    assert {e.layer for e in plan if e.kind == "Class"} >= {"residual adds (4)", "LayerNorm (5)", "softmax (2)"}
    assert all(e.mflops > 0 for e in plan if e.kind != "Class")
