"""Calibration: clipping points, smoothing that cancels, corrections that help, numbers that survive JSON."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from onnx import helper, numpy_helper
from tiny import pictures

from distill.errors import UserError
from export.graph import constants, load_graph, serialize
from export.graphs.segments import Pieces
from export.quantize import Calibration, LayerCalibration, QuantizeConfig, calibrate, quantize
from export.quantizing.calibrate import row_weights
from export.quantizing.histogram import BINS, Histogram
from export.quantizing.quantize_config import FP8, INT4, INT8
from export.quantizing.rounding import round_compensated, round_nearest, spread, weight_scales
from export.quantizing.smoothing import find_folds, smoothing_factors
from export.sessions import exact_session

PLAIN = QuantizeConfig(
    smooth=None, offset=False, bias_correction=False, rounding="nearest", weights="minmax", patch_embed=False
)
SETTINGS = {"smooth": "search", "offset": True, "bias_correction": True, "rounding": "compensated"}


def run(data: bytes, images: torch.Tensor) -> list[torch.Tensor]:
    session = exact_session(data, 1, entries={"session.qdq_matmulnbits_accuracy_level": "1"})
    return [torch.from_numpy(a) for a in session.run(["cls", "patches"], {"images": images.numpy()})]


def loss(path, config: QuantizeConfig, size: int, precision: str = "int8") -> float:
    """1 - mean cosine to FP32 over tokens of images that did not calibrate."""
    model, _ = quantize(load_graph(path), calibrate(path, pictures(32, size), config, precision), config, precision)
    images = pictures(12, size, seed=7)
    pairs = zip(run(serialize(model), images), run(path.read_bytes(), images), strict=True)
    return 1 - float(torch.cat([torch.cosine_similarity(a, b, dim=-1).flatten() for a, b in pairs]).mean())


@pytest.fixture(scope="module")
def outliers(graphs, tmp_path_factory):
    """The MLP network with what training leaves behind: a few channels of every LayerNorm much larger than the others, undone in
    the Linear layer behind it."""
    _, path, size = graphs["mlp-fp32"]
    model = load_graph(path)
    stored = constants(model)
    rng = np.random.default_rng(0)
    readers = {n.input[0]: n for n in model.graph.node if n.op_type == "MatMul"}
    for norm in (n for n in model.graph.node if n.op_type == "LayerNormalization" and n.output[0] in readers):
        factors = np.ones(192, np.float32)
        factors[rng.choice(192, 4, replace=False)] = 40
        for k, name in enumerate(norm.input[1:]):
            fresh = numpy_helper.from_array(numpy_helper.to_array(stored[name]) * factors, f"{norm.name}.{k}")
            model.graph.initializer.append(fresh)
            norm.input[k + 1] = fresh.name
        weight = stored[readers[norm.output[0]].input[1]]
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) / factors[:, None], weight.name))
    out = tmp_path_factory.mktemp("outliers") / "m.onnx"
    out.write_bytes(serialize(model))
    return out, size


@pytest.mark.parametrize("smooth", [0.5, "search"])
def test_smoothing_brings_outlier_channels_in(outliers, smooth):
    path, size = outliers
    assert loss(path, PLAIN.model_copy(update={"smooth": smooth}), size) < 0.3 * loss(path, PLAIN, size)


def test_offset_halves_the_step_behind_gelu(graphs):
    _, path, size = graphs["mlp-fp32"]
    moved = PLAIN.model_copy(update={"offset": True, "calibration": "minmax"})
    before = calibrate(path, pictures(8, size), PLAIN.model_copy(update={"calibration": "minmax"})).layers
    after = calibrate(path, pictures(8, size), moved).layers
    assert [n for n, c in after.items() if c.offset] == ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"]
    for name in ("blocks.0.mlp.fc2", "blocks.1.mlp.fc2"):
        assert 0.45 < after[name].input_scale / before[name].input_scale < 0.6
        assert 60 < after[name].offset <= 127
    only = {"keep": ["*.attn.*", "*.fc1"], "weights": "mse"}
    assert loss(path, moved.model_copy(update=only), size) < 0.6 * loss(path, PLAIN.model_copy(update=only), size)


@pytest.mark.parametrize("name", ["mlp", "swiglu"])
def test_smoothing_changes_nothing_but_the_rounding(graphs, name):
    """With weights that stay exact, the smoothed graph is the float one: every fold found a place that takes its factors."""
    _, path, size = graphs[f"{name}-fp32"]
    model = load_graph(path)
    found = calibrate(path, pictures(8, size), PLAIN.model_copy(update={"smooth": 0.6}))
    smoothed = [n for n, c in found.layers.items() if c.smooth is not None]
    assert len(smoothed) == (8 if name == "swiglu" else 6), "swiglu's fc2 too: the half behind no activation takes its factors"
    assert all(np.abs(np.log2(found.layers[n].smooth)).max() > 0.2 for n in smoothed)
    for layer in smoothed:
        keep = [n for n in found.layers if n != layer]
        got = {}
        for smooth in (found.layers[layer].smooth, None):
            only = Calibration("w8", {layer: LayerCalibration(smooth=smooth)})
            graph, _ = quantize(model, only, PLAIN.model_copy(update={"keep": keep}), "w8")
            got[smooth is None] = run(serialize(graph), pictures(3, size, seed=2))
        want = run(path.read_bytes(), pictures(3, size, seed=2))
        for result in got.values():  # one layer's 8-bit weights are all that differs
            assert min(float(torch.cosine_similarity(a, b, dim=-1).min()) for a, b in zip(result, want, strict=True)) > 0.9998


def test_values_are_not_smoothed_where_attention_is_quantized(graphs):
    model = load_graph(graphs["mlp-fp32"][1])
    assert len(find_folds(model, False)) == 6
    assert {f.kind for f in find_folds(model, True).values()} == {"norm"}


@pytest.mark.parametrize("change", [{"rounding": "compensated"}, {"weights": "mse"}])
def test_four_bit_weights_need_more_than_the_nearest(graphs, change):
    _, path, size = graphs["mlp-fp32"]
    least = {"rounding": 0.75, "weights": 0.95}[next(iter(change))]
    assert loss(path, PLAIN.model_copy(update=change), size, "w4") < least * loss(path, PLAIN, size, "w4")


def test_bias_correction_takes_the_mean_error_off(graphs):
    """Clipping that is far too tight shifts the mean of what a layer gives; the class token counts as much as a tenth of all tokens."""
    _, path, size = graphs["mlp-fp32"]
    images = pictures(16, size)
    model = load_graph(path)
    tight = {"calibration": "percentile", "percentile": 90.0, "keep": ["*.attn.*", "*.fc1", "blocks.1.*"]}
    means = {}
    for corrected in (None, False, True):
        graph = load_graph(path)
        if corrected is not None:
            config = PLAIN.model_copy(update={**tight, "bias_correction": corrected})
            graph, _ = quantize(model, calibrate(path, images, config), config)
        graph.graph.output.append(helper.make_empty_tensor_value_info("blocks.0"))
        session = exact_session(serialize(graph), 1)
        values = session.run(["blocks.0"], {"images": images.numpy()})[0]
        weights = row_weights(values, values.shape[0] * values.shape[1])
        means[corrected] = weights @ values.reshape(len(weights), -1) / weights.sum()
    before, after = (np.abs(means[c] - means[None]).max() for c in (False, True))
    assert before > 1e-3
    assert after < 0.02 * before


def test_compensated_rounding_is_gptq():
    """Against the textbook loop with an explicit inverse, and better than the nearest codes on the inputs it was made for."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(2000, 96)) @ rng.normal(size=(96, 96)) ** 3
    weight = rng.normal(size=(96, 24))
    second, scale = inputs.T @ inputs / len(inputs), weight_scales(weight, INT4, "mse")
    codes = round_compensated(weight, scale, INT4, second)
    left, order = weight.copy(), np.argsort(-np.diag(second), kind="stable")
    damped = second + np.eye(96) * 0.01 * np.diag(second).mean()
    want = np.empty_like(weight)
    for i, k in enumerate(order):
        rest = order[i:]
        inverse = np.linalg.inv(damped[np.ix_(rest, rest)])
        want[k] = np.clip(np.rint(left[k] / scale), -7, 7)
        left[rest] -= np.outer(inverse[:, 0] / inverse[0, 0], left[k] - want[k] * scale)
    assert (codes == want).mean() > 0.999  # sums in another order may tip a code
    errors = [
        float((((c * scale) - weight).T @ second @ ((c * scale) - weight)).trace())
        for c in (codes, round_nearest(weight, scale, INT4))
    ]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize(("grid", "block"), [(INT8, None), (INT4, 32), (FP8, None)])
def test_weight_scales(grid, block):
    weight = np.random.default_rng(0).standard_t(3, (64, 10))
    full, best = (weight_scales(weight, grid, m, block) for m in ("minmax", "mse"))
    assert full.shape == best.shape == ((10,) if block is None else (2, 10))
    error = [((grid.fake(weight, spread(s, 64)) - weight) ** 2).sum() for s in (full, best)]
    assert error[1] <= error[0]
    assert (
        np.abs(grid.fake(weight, spread(full, 64)) - weight).max()
        <= (np.abs(weight).max() / (16 if grid is FP8 else grid.high)) * 0.51
    )
    assert (weight_scales(np.zeros((64, 3)), grid, "mse", block) > 0).all()


def test_smoothing_factors_are_smoothquants():
    peaks, weights = np.array([1.0, 8.0, 0.0]), np.array([2.0, 0.5, 1.0])
    factors = smoothing_factors(peaks, weights, 0.75)
    assert factors[1] / factors[0] == pytest.approx(8**0.75 / 0.5**0.25 * 2**0.25)
    assert factors[2] == 1
    assert factors[0] * factors[1] == pytest.approx(1)


def test_json_holds_everything_but_the_codes(graphs):
    _, path, size = graphs["swiglu-fp32"]
    config = QuantizeConfig(**SETTINGS)
    found = calibrate(path, pictures(8, size), config)
    stored = json.loads(json.dumps(found.to_json()))
    again = Calibration.from_json(stored)
    assert again.to_json() == stored
    assert (again.images, again.images_sha256, again.chosen_codes) == (8, found.images_sha256, True)
    reference, plan = quantize(load_graph(path), found, config)
    model, again_plan = quantize(load_graph(path), again.with_codes(reference), config)
    assert serialize(model) == serialize(reference)
    assert plan == again_plan
    for broken in (
        {},
        [],
        {**stored, "format": "x"},
        {**stored, "layers": {"a": {"shift": {"float32": "!", "shape": [1]}}}},
        {**stored, "layers": 3},
    ):
        with pytest.raises(UserError, match="export the quantized target again"):
            Calibration.from_json(broken)
    with pytest.raises(UserError, match="quantizes none of the calibration's layers"):
        again.with_codes(load_graph(path))


def qad(layers: dict, weights: str = "int8") -> dict:
    return {"format": "decant-quantization-1", "weights": weights, "layers": layers}


@pytest.mark.parametrize("weights", ["int8", "w4"])
def test_trained_scales_are_used_as_they_are(graphs, weights):
    _, path, _ = graphs["mlp-fp32"]
    stored = constants(load_graph(path))
    rng, layers = np.random.default_rng(0), {}
    for name in ("blocks.0.attn.qkv", "blocks.1.mlp.fc2"):
        inputs, outputs = stored[f"{name}.weight"].dims
        shape = (outputs,) if weights == "int8" else (outputs, inputs // 32)
        scale = rng.uniform(0.001, 0.01, shape).astype(np.float32)
        layers[name] = {"input_scale": 0.0123 if weights == "int8" else None, "weight_scale": scale.tolist()}
    calibration = Calibration.from_qad(json.loads(json.dumps(qad(layers, weights))))
    config = PLAIN.model_copy(update={"keep": ["blocks.0.attn.proj", "blocks.0.mlp.*", "blocks.1.attn.*", "blocks.1.mlp.fc1"]})
    model, plan = quantize(load_graph(path), calibration, config, weights)
    after = constants(model)
    for name, entry in layers.items():
        scale = np.asarray(entry["weight_scale"], np.float32)
        values = numpy_helper.to_array(after[f"{name}.weight_scale"])
        assert np.array_equal(values, scale if weights == "int8" else scale.T)
        ints = numpy_helper.to_array(after[f"{name}.weight_{'int8' if weights == 'int8' else 'int4'}"]).astype(np.float32)
        wide = scale[None] if weights == "int8" else np.repeat(scale.T, 32, 0)
        limit = 127 if weights == "int8" else 7
        assert np.array_equal(ints, np.clip(np.rint(numpy_helper.to_array(stored[f"{name}.weight"]) / wide), -limit, limit))
        line = next(e for e in plan if e.layer == name)
        assert line.input_scale == (pytest.approx(0.0123, rel=1e-6) if weights == "int8" else None)
    unchanged = {n for n in after if "bias" in n or "norm" in n}
    assert all(after[n].raw_data == stored[n].raw_data for n in unchanged), "nothing is smoothed or corrected"


def test_scales_per_channel_may_come_as_one_block():
    found = Calibration.from_qad(qad({"a": {"input_scale": 0.1, "weight_scale": [[0.1], [0.2]]}}))
    assert found.layers["a"].weight_scale.tolist() == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "is not of format"),
        (qad({"a": {"input_scale": 0.1, "weight_scale": [0.0]}}), "a scale of a is not a positive number"),
        (qad({"a": {"input_scale": -1.0, "weight_scale": [1.0]}}), "a scale of a is not a positive number"),
        (qad({"a": {"weight_scale": [1.0]}}), "is damaged"),
        (qad({"a": {"input_scale": 0.1, "weight_scale": [[1.0]]}}, "w4"), "is damaged"),
        (qad({}), "in 0 layers"),
        (qad({"a": {"input_scale": 0.1, "weight_scale": [1.0]}}, "int3"), "weights 'int3'"),
    ],
)
def test_trained_scales_that_are_none(value, message):
    with pytest.raises(UserError, match=message):
        Calibration.from_qad(value)


def test_images(graphs):
    _, path, size = graphs["mlp-fp32"]
    with pytest.raises(UserError, match="needs calibration images and got none"):
        calibrate(path, pictures(0, size), PLAIN)
    images = pictures(12, size)
    images[8:] *= 50
    config = PLAIN.model_copy(update={"calibration": "minmax", "patch_embed": True, "images": 8})
    few = calibrate(path, images, config)
    assert few.layers["patch_embed.proj"].input_scale == pytest.approx(float(images[:8].abs().max()) / 127)
    assert few.images == 8
    every = calibrate(path, images, config.model_copy(update={"images": 12}))
    assert every.layers["patch_embed.proj"].input_scale == pytest.approx(float(images.abs().max()) / 127)
    assert every.images_sha256 != few.images_sha256


def test_memory_limits_the_images(graphs, monkeypatch):
    from export.quantizing import calibrate as module

    _, path, size = graphs["mlp-fp32"]
    monkeypatch.setattr(module, "LIVE_BYTES", 5 * 10**5)
    few = calibrate(path, pictures(32, size), PLAIN)
    assert 1 < few.images < 32


def test_a_diverged_network_is_named(graphs):
    _, path, size = graphs["mlp-fp32"]
    images = pictures(2, size)
    images[1, 0, 0, 0] = float("inf")
    with pytest.raises(UserError, match="not finite on the calibration images"):
        calibrate(path, images, PLAIN)


def test_calibration_is_of_an_fp32_graph(graphs):
    with pytest.raises(UserError, match=r"runs on an FP32 graph, but blocks\.0\.attn\.qkv is FLOAT16"):
        calibrate(graphs["mlp-fp16"][1], pictures(2, 32), PLAIN)


def test_pieces_make_the_whole(graphs):
    """A graph run piece by piece, with its own weights fed in, gives what it gives at once."""
    _, path, size = graphs["swiglu-fp32"]
    model, stored = load_graph(path), constants(load_graph(path))
    images = pictures(3, size).numpy()
    cuts = ["blocks.0.attn.proj", "blocks.1.attn.qkv", "blocks.1.mlp.fc2"]
    pieces, live = Pieces(model, cuts), {"images": images}
    for i in range(len(cuts) + 1):
        fed = {}
        if i:
            first = pieces.layer(i - 1)
            fed = {
                "fed.0": live[first.input[0]],
                "fed.1": numpy_helper.to_array(stored[first.input[1]]),
                "fed.shift": np.zeros((), np.float32),
            }
        live.update(pieces.session(i, [0, 1] if i else []).run(live, fed))
        if i < len(cuts):
            live = {k: v for k, v in live.items() if k in pieces.survivors(i)}
    want = run(path.read_bytes(), torch.from_numpy(images))
    np.testing.assert_allclose(live["cls"], want[0], atol=1e-4)
    np.testing.assert_allclose(live["patches"], want[1], atol=1e-4)


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
        assert np.array_equal(once.counts, np.histogram(np.abs(self.values), BINS, (0, once.range))[0])

    def test_zeros_first(self):
        histogram = self.of(np.zeros(10, np.float32), self.values)
        assert histogram.counts.sum() == len(self.values) + 10

    def test_minmax_and_percentile(self):
        histogram, magnitudes = self.of(self.values), np.abs(self.values)
        assert histogram.clip_point(QuantizeConfig(calibration="minmax")) == magnitudes.max()
        for q in (90.0, 99.0, 99.9, 99.99):
            point = histogram.clip_point(QuantizeConfig(calibration="percentile", percentile=q))
            kept, without_its_bin = ((magnitudes <= p).mean() * 100 for p in (point, point - histogram.range / BINS))
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

    def test_entropy_lets_outliers_go_and_keeps_a_flat_distribution(self):
        config = QuantizeConfig(calibration="entropy")
        rng = np.random.default_rng(1)
        flat = rng.uniform(-3, 3, 200_000).astype(np.float32)
        assert self.of(flat).clip_point(config) > 2.8
        tailed = np.append(rng.normal(size=400_000), rng.uniform(50, 60, 20)).astype(np.float32)
        assert 2 < self.of(tailed).clip_point(config) < 10

    def test_fp8_clips_later(self):
        """Floats have fine steps near zero whatever the scale: only what exceeds 448 of them is lost."""
        points = [self.of(self.values).clip_point(QuantizeConfig(calibration="mse"), g) for g in (INT8, FP8)]
        assert points[0] < points[1]

    def test_a_dead_input(self):
        assert self.of(np.zeros(5, np.float32)).clip_point(QuantizeConfig()) == 1.0


def test_problems():
    assert QuantizeConfig().problems() == []
    found = QuantizeConfig(percentile=10.0, images=0, smooth=1.5, block=24).problems()
    assert [f.split(" ")[0] for f in found] == ["percentile", "images", "smooth", "block"]
    assert replace(LayerCalibration(), offset=3).to_json() == {"offset": 3}
