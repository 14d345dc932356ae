"""Q/DQ: which layers, which scales, what it costs in accuracy, what it saves in bytes."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tiny import pictures

from distill.errors import UserError
from export import quantize as module
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
from export.quantize import Histogram, QuantizeConfig, activation_scales, plan_scales, quantize

DEFAULT = QuantizeConfig()


@pytest.fixture(scope="module", params=["mlp", "swiglu"])
def made(request, graphs):
    """(FP32 path, size, scales, INT8 model, plan, FP16 path) of a network, with the default settings."""
    _, path, size = graphs[f"{request.param}-fp32"]
    scales = activation_scales(path, pictures(32, size), DEFAULT)
    return path, size, scales, *quantize(load_graph(path), scales, DEFAULT), graphs[f"{request.param}-fp16"][1]


def run(data: bytes, images: torch.Tensor) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(data, module.quiet_options(1), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(a) for a in session.run(["cls", "patches"], {"images": images.numpy()})]


def worst_cosine(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return min(float(torch.cosine_similarity(x, y, dim=-1).min()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("batch", [1, 7])
def test_close_to_fp32_on_images_that_did_not_calibrate(made, batch):
    path, size, _, model, _, half = made
    images = pictures(batch, size, seed=9)
    want, got = run(path.read_bytes(), images), run(serialize(model), images)
    assert 0.99 < worst_cosine(got, want) < 0.99999, "equal outputs would mean that nothing was quantized"
    scales = made[2]
    half_int8, _ = quantize(load_graph(half), scales, DEFAULT)
    assert worst_cosine(run(serialize(half_int8), images), want) > 0.99


def test_every_linear_layer_and_nothing_else(made):
    path, _, _, model, plan, _ = made
    linears = [n.name for n in linear_nodes(load_graph(path))]
    assert [e.node for e in plan] == linears == [n.name for n in linear_nodes(model)]
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


def test_zero_points_are_int8_zeros_and_biases_float(made):
    model = made[3]
    stored, types = constants(model), element_types(model)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = numpy_helper.to_array(stored[node.input[2]])
            assert zero.dtype == np.int8
            assert not zero.any()
    assert {types[t] for t in stored} == {"FLOAT", "INT8", "INT64"}


def test_weights_per_output_channel_within_half_a_step(made):
    path, _, _, model, plan, _ = made
    before, after = constants(load_graph(path)), constants(model)
    for entry in plan:
        weight = numpy_helper.to_array(before[f"{entry.node}.weight"])
        ints, scale = (numpy_helper.to_array(after[f"{entry.node}.weight_{what}"]) for what in ("int8", "scale"))
        assert entry.weight_shape == weight.shape == ints.shape
        assert scale.shape == (weight.shape[1],)
        assert np.all(np.abs(ints).max(0) == 127), "each channel uses the whole range"
        assert np.all(np.abs(ints * scale - weight) <= scale / 2 * 1.001)
        assert f"{entry.node}.weight" not in after, "the float weight must not stay in the file"


def test_the_fp16_graph_takes_the_same_scales_as_half_floats(made):
    _, _, scales, _, plan, half = made
    model, half_plan = quantize(load_graph(half), plan_scales([e.to_json() for e in plan]), DEFAULT)
    types = element_types(model)
    assert type_counts(model) == {"FLOAT16": 5, "INT8": 8}
    used = {types[n.input[1]] for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")}
    assert used == {"FLOAT16"}
    for entry in half_plan:
        assert entry.scale == float(np.float16(scales[entry.node]))


def test_a_quarter_of_the_bytes(graphs):
    _, path, size = graphs["mlp-fp32"]
    model, _ = quantize(load_graph(path), activation_scales(path, pictures(4, size), DEFAULT), DEFAULT)
    assert len(serialize(model)) < 0.35 * path.stat().st_size


def test_deterministic_and_the_source_untouched(graphs):
    _, path, size = graphs["swiglu-fp32"]
    source = load_graph(path)
    first = serialize(quantize(source, activation_scales(path, pictures(8, size), DEFAULT), DEFAULT)[0])
    second = serialize(quantize(load_graph(path), activation_scales(path, pictures(8, size), DEFAULT), DEFAULT)[0])
    assert first == second
    assert serialize(source) == path.read_bytes()


def test_skip_and_patch_embed(graphs):
    _, path, size = graphs["mlp-fp32"]
    config = QuantizeConfig(skip=["blocks.0.*", "blocks.1.mlp.fc2"], patch_embed=True)
    scales = activation_scales(path, pictures(4, size), config)
    model, plan = quantize(load_graph(path), scales, config)
    assert [e.node for e in plan] == ["patch_embed.proj", "blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc1"]
    assert [e.kind for e in plan] == ["Conv", "Linear", "Linear", "Linear"]
    assert set(scales) == {e.node for e in plan}
    assert plan[0].weight_shape == (192, 3, 8, 8)
    assert constants(model)["patch_embed.proj.weight_scale"].dims == [192]
    images = pictures(3, size, seed=5)
    assert worst_cosine(run(serialize(model), images), run(path.read_bytes(), images)) > 0.99


@pytest.mark.parametrize(("skip", "message"), [(["blocks.7.*"], "names 'blocks.7.\\*', which no"), (["*"], "leaves no layer")])
def test_skip_that_cannot_be(graphs, skip, message):
    _, path, size = graphs["mlp-fp32"]
    with pytest.raises(UserError, match=message):
        activation_scales(path, pictures(1, size), QuantizeConfig(skip=skip))


def test_scales_missing_or_no_images(graphs):
    _, path, size = graphs["mlp-fp32"]
    with pytest.raises(UserError, match=r"no scale for blocks\.0\.attn\.qkv"):
        quantize(load_graph(path), {}, DEFAULT)
    with pytest.raises(UserError, match="needs calibration images and got none"):
        activation_scales(path, pictures(0, size), DEFAULT)


def test_images_setting_limits_what_calibrates(graphs):
    _, path, size = graphs["mlp-fp32"]
    images = pictures(12, size)
    images[8:] *= 50
    few = activation_scales(path, images, QuantizeConfig(images=8, calibration="minmax", patch_embed=True))
    assert few["patch_embed.proj"] == pytest.approx(float(images[:8].abs().max()) / 127)
    every = activation_scales(path, images, QuantizeConfig(images=12, calibration="minmax", patch_embed=True))
    assert every["patch_embed.proj"] == pytest.approx(float(images.abs().max()) / 127)


def test_a_diverged_network_is_named(graphs):
    _, path, size = graphs["mlp-fp32"]
    images = pictures(2, size)
    images[1, 0, 0, 0] = float("inf")
    with pytest.raises(UserError, match="not finite on the calibration images"):
        activation_scales(path, images, DEFAULT)


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
    model, plan = quantize(two_products_of_one_weight(), {"a": 0.1, "b": 0.1}, DEFAULT)
    assert len(plan) == 2
    assert sum(t.name == "w_int8" for t in model.graph.initializer) == 1
    model, _ = quantize(two_products_of_one_weight(), {"a": 0.1, "b": 0.1}, QuantizeConfig(skip=["b"]))
    assert {"w", "w_int8"} <= set(constants(model))
    assert quantized_linears(model) == {"a"}


class TestHistogram:
    values = np.random.default_rng(0).standard_t(3, 50_000).astype(np.float32)

    def of(self, *chunks: np.ndarray) -> Histogram:
        histogram = Histogram()
        for chunk in chunks:
            histogram.add(chunk)
        return histogram

    def test_one_pass_in_any_order_is_the_histogram_of_all(self):
        once = self.of(self.values)
        small_first = self.of(*np.array_split(self.values[np.argsort(np.abs(self.values))], 9))
        assert once.counts.sum() == len(self.values)
        assert once.range == small_first.range >= once.peak == np.abs(self.values).max()
        assert np.array_equal(once.counts, small_first.counts)

    def test_zeros_first(self):
        histogram = self.of(np.zeros(10, np.float32), self.values)
        assert histogram.counts.sum() == len(self.values) + 10

    def test_minmax_and_percentile(self):
        histogram, magnitudes = self.of(self.values), np.abs(self.values)
        assert histogram.clip_point(QuantizeConfig(calibration="minmax")) == magnitudes.max()
        for q in (90.0, 99.0, 99.9, 99.99):
            point = histogram.clip_point(QuantizeConfig(calibration="percentile", percentile=q))
            kept, without_its_bin = ((magnitudes <= p).mean() * 100 for p in (point, point - histogram.range / module.BINS))
            assert without_its_bin - 100 / len(magnitudes) <= q <= kept
        assert histogram.clip_point(QuantizeConfig(calibration="percentile", percentile=100.0)) == magnitudes.max()

    @pytest.mark.parametrize(("calibration", "exponent"), [("mse", 2), ("l3", 3)])
    def test_the_least_error_and_an_outlier_let_go(self, calibration, exponent):
        values = np.append(np.random.default_rng(1).normal(size=400_000), 20.0).astype(np.float32)

        def error(point: float) -> float:
            step = point / 127
            return float((np.abs(np.clip(np.round(values / step), -127, 127) * step - values) ** exponent).mean())

        point = self.of(values).clip_point(QuantizeConfig(calibration=calibration))
        assert error(point) < 1.02 * min(error(p) for p in np.geomspace(2, 20, 60))
        assert error(point) < (0.5 if calibration == "mse" else 0.9) * error(20.0)
        assert point < (12 if calibration == "mse" else 19)

    def test_l3_lies_between_mse_and_minmax(self):
        points = [self.of(self.values).clip_point(QuantizeConfig(calibration=c)) for c in ("mse", "l3", "minmax")]
        assert points[0] < points[1] <= points[2]

    def test_a_dead_input(self):
        assert self.of(np.zeros(5, np.float32)).clip_point(DEFAULT) == 1.0


def test_problems():
    assert QuantizeConfig().problems() == []
    found = QuantizeConfig(percentile=10.0, images=0).problems()
    assert len(found) == 2
    assert "percentile" in found[0]
    assert "images" in found[1]
