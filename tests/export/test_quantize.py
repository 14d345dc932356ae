"""Q/DQ: which layers, which scales, what it costs in accuracy, what it saves in bytes."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from foreign import foreign
from onnx import ModelProto, TensorProto, helper, numpy_helper
from tiny import pictures

from distill.errors import UserError
from export.engine import build_engine
from export.graph import (
    constants,
    element_types,
    linear_nodes,
    load_graph,
    quantized_linears,
    serialize,
    type_counts,
    verify_precision,
)
from export.quantize import Calibration, LayerCalibration, QuantizeConfig, calibrate, quantize
from export.quantizing.naive import quantize_everything
from export.sessions import exact_session

DEFAULT = QuantizeConfig()
PLAIN = QuantizeConfig(smooth=None, offset=False, bias_correction=False, rounding="nearest", weights="minmax")
EVERYTHING = QuantizeConfig(smooth="search", offset=True, bias_correction=True, rounding="compensated", weights="mse")


@pytest.fixture(scope="module", params=["mlp", "swiglu"])
def made(request, graphs):
    """(FP32 path, size, calibration, INT8 model, plan, FP16 path) of a network, with the default settings."""
    _, path, size = graphs[f"{request.param}-fp32"]
    calibration = calibrate(path, pictures(32, size), DEFAULT)
    return path, size, calibration, *quantize(load_graph(path), calibration, DEFAULT), graphs[f"{request.param}-fp16"][1]


def run(model: ModelProto | bytes, images: torch.Tensor) -> list[torch.Tensor]:
    data = model if isinstance(model, bytes) else serialize(model)
    session = exact_session(data, 1, entries={"session.qdq_matmulnbits_accuracy_level": "1"})  # weights-only products in FP32
    return [torch.from_numpy(a).float() for a in session.run(["cls", "patches"], {"images": images.numpy()})]


def worst_cosine(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return min(float(torch.cosine_similarity(x, y, dim=-1).min()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("batch", [1, 7])
def test_close_to_fp32_on_images_that_did_not_calibrate(made, batch):
    path, size, calibration, model, _, half = made
    images = pictures(batch, size, seed=9)
    want, got = run(path.read_bytes(), images), run(model, images)
    assert 0.99 < worst_cosine(got, want) < 0.999999, "equal outputs would mean that nothing was quantized"
    half_int8, _ = quantize(load_graph(half), calibration.with_codes(model), DEFAULT)
    assert worst_cosine(run(half_int8, images), want) > 0.99


def test_every_linear_layer_and_nothing_else(made):
    path, _, _, model, plan, _ = made
    linears = [n.name for n in linear_nodes(load_graph(path))]
    assert [e.layer for e in plan if e.quantized] == linears == [n.name for n in linear_nodes(model)]
    assert quantized_linears(model) == set(linears)
    readers: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            assert readers[node.output[0]] == ["DequantizeLinear"]
        if node.op_type == "DequantizeLinear":
            assert readers[node.output[0]] == ["MatMul"]
    assert type_counts(model) == {"FLOAT": 1 + 2 * 2, "INT8": 8}  # patch embedding, QK^T and attention x V of two blocks stay
    verify_precision(model, "int8")


@pytest.mark.parametrize("config", [DEFAULT, EVERYTHING])
def test_zero_points_are_int8_zeros_and_biases_float(graphs, config):
    _, path, size = graphs["mlp-fp32"]
    model, _ = quantize(load_graph(path), calibrate(path, pictures(4, size), config), config)
    stored, types = constants(model), element_types(model)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = numpy_helper.to_array(stored[node.input[2]])
            assert zero.dtype == np.int8
            assert not zero.any()
    assert {types[t] for t in stored if not t.endswith(".half")} == {"FLOAT", "INT8", "INT64"}
    biases = [i for n in model.graph.node if n.op_type == "Add" for i in n.input if i in stored]
    assert biases
    assert {types[b] for b in biases} == {"FLOAT"}


def test_weights_per_output_channel_within_half_a_step(graphs):
    _, path, size = graphs["mlp-fp32"]
    model, plan = quantize(load_graph(path), calibrate(path, pictures(4, size), PLAIN), PLAIN)
    before, after = constants(load_graph(path)), constants(model)
    for entry in plan:
        if not entry.quantized:
            continue
        weight = numpy_helper.to_array(before[f"{entry.layer}.weight"])
        ints, scale = (numpy_helper.to_array(after[f"{entry.layer}.weight_{what}"]) for what in ("int8", "scale"))
        assert entry.weight_shape == weight.shape == ints.shape
        assert scale.shape == (weight.shape[1],)
        assert (entry.weight_scale_min, entry.weight_scale_max) == (scale.min(), scale.max())
        assert np.all(np.abs(ints).max(0) == 127), "each channel uses the whole range"
        assert np.all(np.abs(ints * scale - weight) <= scale / 2 * 1.001)
        assert f"{entry.layer}.weight" not in after, "the float weight must not stay in the file"


@pytest.mark.parametrize("config", [DEFAULT, EVERYTHING])
def test_the_fp16_graph_has_the_same_codes_and_half_scales(graphs, config):
    _, path, size = graphs["mlp-fp32"]
    calibration = calibrate(path, pictures(8, size), config)
    model, plan = quantize(load_graph(path), calibration, config)
    stored = Calibration.from_json(calibration.to_json())
    if config.rounding == "compensated":
        with pytest.raises(UserError, match=r"codes of blocks\.0\.attn\.qkv are in its quantized graph"):
            quantize(load_graph(graphs["mlp-fp16"][1]), stored, config)
    half, half_plan = quantize(load_graph(graphs["mlp-fp16"][1]), stored.with_codes(model), config)
    types = element_types(half)
    assert type_counts(half) == {"FLOAT16": 5, "INT8": 8}
    assert {types[n.input[1]] for n in half.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")} == {"FLOAT16"}
    for name, tensor in constants(model).items():
        if name.endswith("_int8") and name.startswith("blocks"):
            assert tensor.raw_data == constants(half)[name].raw_data
    for entry, half_entry in zip(plan, half_plan, strict=True):
        if entry.quantized:
            assert half_entry.input_scale == float(np.float16(entry.input_scale))
    images = pictures(5, size, seed=3)
    assert worst_cosine(run(half, images), run(model, images)) > 0.999


def test_a_quarter_of_the_bytes(graphs):
    _, path, size = graphs["mlp-fp32"]
    sizes = {}
    for precision in ("int8", "fp8", "w8", "w4"):
        calibration = calibrate(path, pictures(4, size), DEFAULT, precision)
        sizes[precision] = len(serialize(quantize(load_graph(path), calibration, DEFAULT, precision)[0])) / path.stat().st_size
    assert max(sizes["int8"], sizes["fp8"], sizes["w8"]) < 0.35
    assert sizes["w4"] < 0.25


def test_deterministic_and_the_source_untouched(graphs):
    _, path, size = graphs["swiglu-fp32"]
    source = load_graph(path)
    first = serialize(quantize(source, calibrate(source, pictures(8, size), EVERYTHING), EVERYTHING)[0])
    second = serialize(quantize(load_graph(path), calibrate(path, pictures(8, size), EVERYTHING), EVERYTHING)[0])
    assert first == second
    assert serialize(source) == path.read_bytes()


@pytest.mark.parametrize("precision", ["int8", "fp8", "w8", "w4"])
@pytest.mark.parametrize("name", ["mlp-fp16", "swiglu-fp32"])
def test_every_precision_runs_and_is_close(graphs, precision, name):
    _, path, size = graphs[name.replace("16", "32")]
    calibration = calibrate(path, pictures(32, size), EVERYTHING, precision)
    reference, _ = quantize(load_graph(path), calibration, EVERYTHING, precision)
    model, plan = quantize(load_graph(graphs[name][1]), calibration.with_codes(reference), EVERYTHING, precision)
    verify_precision(model, precision)
    assert {o.version for o in model.opset_import if not o.domain} == {21 if precision in ("fp8", "w4") else 20}
    images = pictures(4, size, seed=5)
    cosine = worst_cosine(run(model, images), run(path.read_bytes(), images))
    assert {"int8": 0.995, "fp8": 0.96, "w8": 0.999, "w4": 0.97}[precision] < cosine < 0.9999999
    for entry in plan:
        if entry.quantized:
            assert (entry.input_scale is None) == (precision in ("w8", "w4"))


def test_keep_and_patch_embed(graphs):
    _, path, size = graphs["mlp-fp32"]
    config = QuantizeConfig(keep=["blocks.0.*", "blocks.1.mlp.fc2"], patch_embed=True)
    calibration = calibrate(path, pictures(4, size), config)
    model, plan = quantize(load_graph(path), calibration, config)
    chosen = [e for e in plan if e.quantized]
    assert [e.layer for e in chosen] == ["patch_embed.proj", "blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc1"]
    assert [e.kind for e in chosen] == ["Conv", "Linear", "Linear", "Linear"]
    assert set(calibration.layers) == {e.layer for e in chosen}
    assert chosen[0].weight_shape == (192, 3, 8, 8)
    assert constants(model)["patch_embed.proj.weight_scale"].dims == [192]
    images = pictures(3, size, seed=5)
    assert worst_cosine(run(model, images), run(path.read_bytes(), images)) > 0.99


@pytest.mark.parametrize("keep", [["blocks.0.attn.qkv"], ["blocks.0.attn.proj"], ["blocks.*.mlp.fc1", "blocks.1.attn.qkv"]])
def test_layers_may_be_kept_after_calibration(graphs, keep):
    """The search of the accuracy budget does: what is smoothed around a layer in floating point must still cancel."""
    _, path, size = graphs["mlp-fp32"]
    calibration = calibrate(path, pictures(8, size), EVERYTHING)
    images = pictures(4, size, seed=5)
    model, plan = quantize(load_graph(path), calibration, EVERYTHING.model_copy(update={"keep": keep}))
    assert quantized_linears(model) == {e.layer for e in plan if e.quantized}
    assert len(quantized_linears(model)) < 8
    assert worst_cosine(run(model, images), run(path.read_bytes(), images)) > 0.995


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_attention_products(graphs, precision):
    _, path, size = graphs["mlp-fp32"]
    config = EVERYTHING.model_copy(update={"attention": True})
    calibration = calibrate(path, pictures(8, size), config, precision)
    model, plan = quantize(load_graph(path), calibration, config, precision)
    nodes = {n.name: n for n in model.graph.node}
    makers = {o: n for n in model.graph.node for o in n.output}
    for name in ("blocks.0.attn.qk", "blocks.1.attn.av"):
        assert next(e for e in plan if e.layer == name).decision == precision
        assert [makers[i].op_type for i in nodes[name].input] == ["DequantizeLinear"] * 2
    left = makers[makers[makers[nodes["blocks.0.attn.qk"].input[0]].input[0]].input[0]]
    assert left.op_type == "Mul", "the scale is in Q before QK^T, and Q/DQ behind it"
    assert type_counts(model) == {"FLOAT": 1, precision.upper(): 12}
    images = pictures(4, size, seed=5)
    assert worst_cosine(run(model, images), run(path.read_bytes(), images)) > 0.98


@pytest.mark.parametrize("precision", ["int8", "fp8", "w4"])
def test_engines_compile_from_fp16(graphs, precision, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx has no wheels for this platform")
    _, path, size = graphs["mlp-fp32"]
    config = EVERYTHING.model_copy(update={"patch_embed": precision != "w4"})
    calibration = calibrate(path, pictures(4, size), config, precision)
    reference, _ = quantize(load_graph(path), calibration, config, precision)
    model, _ = quantize(load_graph(graphs["mlp-fp16"][1]), calibration.with_codes(reference), config, precision)
    (tmp_path / "g.onnx").write_bytes(serialize(model))
    gpu = "8.6" if precision != "fp8" else "8.9"
    info = build_engine(tmp_path / "g.onnx", tmp_path / "m.engine", "tensorrt_rtx", precision, (1, 4, 16), [gpu])
    assert info.bytes == (tmp_path / "m.engine").stat().st_size > 100_000


@pytest.mark.parametrize("precision", ["int8", "fp8", "w4"])
def test_graphs_of_others(precision):
    model = foreign()
    calibration = calibrate(model, pictures(16, 32), EVERYTHING, precision)
    if precision == "int8":
        smoothed = {n.split("/")[3] for n, layer in calibration.layers.items() if layer.smooth is not None}
        assert smoothed == {"query", "key", "value", "fc1"}, (
            "the values' way to the output has shapes that are computed in the graph"
        )
    got, plan = quantize(model, calibration, EVERYTHING, precision)
    assert sum(e.quantized for e in plan) == 12
    images = pictures(4, 32, seed=5)
    assert 0.99 < worst_cosine(run(got, images), run(model, images)) < 0.9999999


def test_everything_quantized_is_far_worse(graphs):
    _, path, size = graphs["mlp-fp32"]
    images = pictures(8, size, seed=5)
    want = run(path.read_bytes(), images)
    model = quantize_everything(path, pictures(8, size))
    assert type_counts(model) == {"INT8": 13}
    makers = {o: n for n in model.graph.node for o in n.output}
    for node in model.graph.node:
        if node.op_type in ("LayerNormalization", "Gelu", "Softmax", "MatMul"):
            assert makers[node.input[0]].op_type == "DequantizeLinear", node.name
    ours, _ = quantize(load_graph(path), calibrate(path, pictures(8, size), DEFAULT), DEFAULT)
    assert 1 - worst_cosine(run(model, images), want) > 3 * (1 - worst_cosine(run(ours, images), want))
    with pytest.raises(UserError, match="needs calibration images"):
        quantize_everything(path, pictures(0, size))


TWO = Calibration("int8", {name: LayerCalibration(input_scale=0.1) for name in ("a", "b")})


def test_calibrations_that_do_not_fit(graphs):
    _, path, size = graphs["mlp-fp32"]
    with pytest.raises(UserError, match=r"no scale for blocks\.0\.attn\.qkv"):
        quantize(load_graph(path), Calibration("int8", {}), DEFAULT)
    calibration = calibrate(path, pictures(2, size), DEFAULT)
    with pytest.raises(UserError, match="is of int8, not of fp8; export onnx-fp8 again"):
        quantize(load_graph(path), calibration, DEFAULT, "fp8")
    with pytest.raises(UserError, match="fp16 is not a quantized precision"):
        quantize(load_graph(path), calibration, DEFAULT, "fp16")
    layers = {n: replace(c, weight_scale=np.ones(3, np.float32)) for n, c in calibration.layers.items()}
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.qkv has weight scales \[3\], the graph needs \[576\]"):
        quantize(load_graph(path), replace(calibration, layers=layers), DEFAULT)


def two_products_of_one_weight() -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["images", "w"], ["h"], name="a"),
        helper.make_node("MatMul", ["h", "w"], ["y"], name="b"),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4]) for n in ("images", "y")]
    return helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:], [weight]), opset_imports=[helper.make_opsetid("", 20)]
    )


def test_a_weight_that_two_layers_share():
    """The exporter stores equal weights once: quantizing one layer must not take the other's floats away."""
    model, plan = quantize(two_products_of_one_weight(), TWO, DEFAULT)
    assert sum(e.quantized for e in plan) == 2
    assert quantized_linears(model) == {"a", "b"}
    model, _ = quantize(two_products_of_one_weight(), TWO, QuantizeConfig(keep=["b"]))
    assert {"w", "a.weight_int8"} <= set(constants(model))
    assert quantized_linears(model) == {"a"}
