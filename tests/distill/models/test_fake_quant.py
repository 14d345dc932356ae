"""Fake-quantized layers: the arithmetic of a Q/DQ graph run by ONNX Runtime, gradients against autograd and finite differences, and the way
back to an ordinary backbone.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from distill.encoder import Features
from distill.errors import UserError
from distill.models.backbone import Backbone, BackboneConfig
from distill.models.fake_quant import (
    BLOCK,
    FakeQuantLinear,
    fake_quant_layers,
    least_squares_scale,
    strip,
    with_fake_quant,
)
from distill.models.timm_backbone import TimmBackbone, TimmConfig
from export.graph import export_onnx
from export.graphs.nodes import PRODUCTS, constants, linear_nodes, load_graph, serialize

torch.set_num_threads(1)
SHAPE: dict[str, Any] = {"dim": 48, "depth": 2, "heads": 2, "patch": 8, "image_size": 32, "layer_scale": 1.0, "init": "fan_in"}


def backbone(seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    made = Backbone(BackboneConfig(**{**SHAPE, **more}))
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim == 1:  # biases and gains that do something
                p.add_(torch.randn_like(p) * 0.1)
    return made.eval()


def pictures(n: int, size: int = 32, seed: int = 0) -> Tensor:
    coarse = torch.randn(n, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(size, size), mode="bicubic")


def tensors_of(features: Features) -> tuple[Tensor, Tensor]:
    return features.cls, features.patches


def names_of(model: nn.Module, conv: bool = False) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d) if conv else nn.Linear)]


def input_scales(model: nn.Module, names: list[str], images: Tensor, clip: float = 0.7) -> dict[str, float | None]:
    """From the largest magnitudes; a clipping point below them makes saturation part of what is compared."""
    found: dict[str, float | None] = {}
    hooks = [
        model.get_submodule(n).register_forward_pre_hook(
            lambda _, x, n=n: found.__setitem__(n, clip * x[0].abs().max().item() / 127)
        )
        for n in names
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


def move_scales(model: nn.Module, seed: int = 0) -> None:
    """As training would."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("_log_scale"):
                p.add_(torch.randn(p.shape, generator=g) * 0.1)


def layer(
    inputs: int = 40, outputs: int = 6, weights: Any = "int8", input_scale: float | None = 0.02, bias: bool = True
) -> Any:
    torch.manual_seed(1)
    plain = nn.Linear(inputs, outputs, bias=bias)
    return FakeQuantLinear(plain, weights, input_scale, least_squares_scale(plain.weight, weights) * 0.8, learn=True)


def reference(made: FakeQuantLinear, x: Tensor) -> Tensor:
    """The same by autograd: rounding passes gradients on, clamping stops them, scales' gradients are scaled as LSQ says."""

    def quantized(x: Tensor, scale: Tensor, low: int, high: int, n: int) -> Tensor:
        factor = (n * high) ** -0.5
        scale = (scale - scale * factor).detach() + scale * factor
        v = (x / scale).clamp(low, high)
        return scale * (v + (v.round() - v).detach())

    x_scale, w_scale = made.scales()
    levels = {"int8": 127, "w4": 7}[made.weights]
    spread = w_scale.repeat_interleave(made.block, 1)[:, : made.in_features]
    w = quantized(made.weight, spread, -levels, levels, made.block)
    x = x if x_scale is None else quantized(x, x_scale, -128, 127, x[0].numel())
    return F.linear(x, w, made.bias)


# ---- arithmetic


def qdq(path: Path, quantization: dict[str, Any], backbone: nn.Module) -> onnx.ModelProto:
    """The exported graph with Q/DQ around the layers of a quantization.json, straight from its numbers."""
    model = load_graph(path)
    stored, nodes, tensors = constants(model), [], []
    more: dict[str, Any]
    chosen = {n.output[0] for n in linear_nodes(model, PRODUCTS) if n.name in quantization["layers"]}
    four = quantization["weights"] == "w4"
    for node in model.graph.node:
        if node.output[0] in chosen:
            about, name = quantization["layers"][node.name], node.name
            scale = np.array(about["weight_scale"], np.float32)
            w = numpy_helper.to_array(stored[node.input[1]])
            axis = 0 if node.op_type == "Conv" else 1
            if four:
                spread = np.repeat(scale, BLOCK, 1)[:, : w.shape[0]].T
                ints = np.clip(np.round(w / spread), -7, 7).astype(np.int8)
                tensors.append(helper.make_tensor(f"{name}.w", TensorProto.INT4, ints.shape, ints.ravel()))
                more, scale = {"axis": 0, "block_size": BLOCK}, scale.T
            else:
                shaped = scale.reshape([-1 if i == axis else 1 for i in range(w.ndim)])
                ints = np.clip(np.round(w / shaped), -127, 127).astype(np.int8)
                tensors.append(numpy_helper.from_array(ints, f"{name}.w"))
                more = {"axis": axis}
            tensors.append(numpy_helper.from_array(np.ascontiguousarray(scale), f"{name}.s"))
            nodes.append(helper.make_node("DequantizeLinear", [f"{name}.w", f"{name}.s"], [f"{name}.dq"], **more))
            node.input[1] = f"{name}.dq"
            if about["input_scale"] is not None:
                tensors += [numpy_helper.from_array(np.array(about["input_scale"], np.float32), f"{name}.xs")]
                tensors += [numpy_helper.from_array(np.array(0, np.int8), f"{name}.z")]
                both = [f"{name}.xs", f"{name}.z"]
                nodes.append(helper.make_node("QuantizeLinear", [node.input[0], *both], [f"{name}.q"]))
                nodes.append(helper.make_node("DequantizeLinear", [f"{name}.q", *both], [f"{name}.xdq"]))
                node.input[0] = f"{name}.xdq"
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(tensors)
    model.opset_import[0].version = max(21 if four else 0, model.opset_import[0].version)
    return model


def run(model: onnx.ModelProto, images: Tensor, level: Any) -> tuple[np.ndarray, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.intra_op_num_threads = level, 1
    session = onnxruntime.InferenceSession(serialize(model), options, providers=["CPUExecutionProvider"])
    return session.run(["cls", "patches"], {"images": images.numpy()})


@pytest.mark.parametrize(
    ("weights", "conv", "shape"),
    [("int8", False, {}), ("int8", True, {"ffn": "swiglu"}), ("w4", False, {"dim": 64})],
)
def test_the_exported_graph_computes_what_was_trained(tmp_path, weights, conv, shape):
    plain = backbone(**shape)
    names = names_of(plain, conv)
    scales = input_scales(plain, names, pictures(4)) if weights == "int8" else dict.fromkeys(names)
    made = with_fake_quant(plain, scales, "w4" if weights == "w4" else "int8")
    move_scales(made)
    stripped, quantization = strip(made)
    quantization = json.loads(json.dumps(quantization))  # as it is kept
    export_onnx(stripped, tmp_path / "fp32.onnx", 32)
    graph = qdq(tmp_path / "fp32.onnx", quantization, stripped)
    images = pictures(6, seed=5)
    with torch.no_grad():
        mine, exact = tensors_of(made(images)), tensors_of(plain(images))
    levels = onnxruntime.GraphOptimizationLevel
    for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_BASIC):
        for got, want, other in zip(run(graph, images, level), mine, exact, strict=True):
            # An image where a sum lies on the edge of two integers differs by a step of that layer; the others by float32's rounding.
            errors = (torch.from_numpy(got) - want).abs().flatten(1).amax(1)
            effect = (want - other).abs().flatten(1).amax(1)
            assert errors.median() < 1e-5
            assert errors.max() < 0.2 * effect.max()
            assert effect.median() > 0.01  # what is reproduced is no rounding error


def test_integers_are_those_of_the_graphs_operators():
    """Halves to even, saturation at -128 and 127 of activations, float32 division: every integer is the same."""
    scale = 0.0317
    edges = (torch.arange(-140, 140).float() + 0.5) * scale
    x = torch.cat([edges, torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 2])[:, None]
    one = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        one.weight.fill_(1.0)
    made = FakeQuantLinear(one, "int8", scale, torch.ones(1, 1), learn=True)
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 1])],
        [helper.make_tensor_value_info("q", TensorProto.INT8, [None, 1])],
        [numpy_helper.from_array(np.array(scale, np.float32), "s"), numpy_helper.from_array(np.array(0, np.int8), "z")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (want,) = session.run(None, {"x": x.numpy()})
    assert want.min() == -128
    assert want.max() == 127
    input_scale, _ = made.scales()
    with torch.no_grad():
        got = made(x) / input_scale
    assert torch.equal(got.round(), torch.from_numpy(want).float())


@pytest.mark.parametrize("weights", ["int8", "w4"])
def test_weights_are_integers_times_scales_within_symmetric_levels(weights):
    made = layer(70, 5, weights, None, bias=False)
    with torch.no_grad():
        w = made(torch.eye(70)).T
    levels, block = {"int8": (127, 70), "w4": (7, BLOCK)}[weights]
    spread = made.scales()[1].repeat_interleave(block, 1)[:, :70]
    ints = w / spread
    assert (ints - ints.round()).abs().max() < 1e-4
    assert ints.round().abs().max() == levels
    assert (w - made.weight).abs().max() > 1e-4
    inside = made.weight.abs() <= levels * spread
    assert not bool(inside.all())  # 0.8 of the best scale clips something
    assert ((w - made.weight).abs() <= spread / 2 + 1e-6)[inside].all()


def test_bf16_multiplies_integers_exactly():
    """The only roundings are those of the integers' sum and of the result; a plain bf16 product of the same numbers is further off."""
    made = layer(512, 64, input_scale=0.03)
    x = torch.randn(200, 512)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = made(x)
    with torch.no_grad():
        exact, (x_scale, w_scale) = made(x), made.scales()
        w = (made.weight / w_scale).round().clamp(-127, 127) * w_scale
        x_hat = (x / x_scale).round().clamp(-128, 127) * x_scale
        usual = F.linear(x_hat.bfloat16(), w.bfloat16(), made.bias.bfloat16()).float()
    assert low.dtype == torch.bfloat16
    allowed = 1.01 * 2**-8 * ((exact - made.bias).abs() + exact.abs())
    assert ((low.float() - exact).abs() <= allowed).all()
    assert not ((usual - exact).abs() <= allowed).all()


# ---- gradients


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("weights", "input_scale"), [("int8", 0.02), ("int8", None), ("w4", None)])
def test_gradients_are_those_of_straight_through_and_lsq(weights, input_scale, bias):
    made = layer(40, 6, weights, input_scale, bias).double()
    x = torch.randn(3, 5, 40, dtype=torch.float64).requires_grad_()
    weigh = torch.randn(3, 5, 6, dtype=torch.float64)
    found = []
    for forward in (made, lambda x: reference(made, x)):
        out = forward(x)
        wanted = [x, *made.parameters()]
        found.append([out.detach(), *torch.autograd.grad((out * weigh).sum(), wanted)])
    for got, want in zip(*found, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_clipped_values_take_no_gradient_and_pull_the_scale():
    made = layer(40, 6, input_scale=0.01).double()
    x = torch.randn(4, 40, dtype=torch.float64).requires_grad_()
    made(x).square().sum().backward()
    assert x.grad is not None
    outside = (x / made.scales()[0]).abs() > 128
    assert 0 < outside.sum() < x.numel()
    assert bool((x.grad[outside] == 0).all())
    assert bool((x.grad[~outside] != 0).all())
    # Where everything is clipped, the output is linear in the scale: a finite difference is exact there.
    far = torch.full((2, 40), 50.0, dtype=torch.float64)

    def loss(log_scale: float) -> Tensor:
        with torch.no_grad():
            made.input_log_scale.fill_(log_scale)
        return made(far).sum()

    made.zero_grad()
    loss(0.1).backward()
    h = 1e-5
    slope = (loss(0.1 + h) - loss(0.1 - h)).item() / (2 * h)
    assert made.input_log_scale.grad.item() == pytest.approx(slope * (40 * 127) ** -0.5, rel=1e-6)


@pytest.mark.parametrize("which", ["input", "weight"])
def test_a_scales_gradient_is_the_slope_of_the_quantization_error(which):
    """Rounding is no smooth function; its mean error over many numbers is, and there LSQ's gradient is the finite difference."""
    torch.manual_seed(3)
    numbers = torch.randn(400, 400, dtype=torch.float64) * 2
    plain = nn.Linear(400, 400, bias=False)
    with torch.no_grad():
        plain.weight.copy_(numbers if which == "weight" else torch.eye(400))
    scale = torch.full((400, 1), 0.2 if which == "weight" else 1.0)
    made: Any = FakeQuantLinear(plain, "int8", None if which == "weight" else 0.2, scale, learn=True).double()
    p, x = (made.weight_log_scale, torch.eye(400).double()) if which == "weight" else (made.input_log_scale, numbers)
    want = numbers.T if which == "weight" else numbers

    def error(log_scale: float) -> Tensor:
        with torch.no_grad():
            p.fill_(log_scale)
        return (made(x) - want).square().mean()

    error(0.0).backward()
    slope = (error(0.1) - error(-0.1)).item() / 0.2
    assert p.grad.sum().item() * (400 * 127) ** 0.5 == pytest.approx(slope, rel=0.03)


# ---- in a network


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("some", [False, True])
def test_blocks_in_training_compute_what_plain_modules_do(ffn, some):
    """With all layers quantized, and with quantized and ordinary ones mixed in one block: outputs and gradients."""
    plain = backbone(ffn=ffn)
    names = names_of(plain)
    scales = input_scales(plain, names, pictures(4), clip=1.0)
    if some:
        scales = {
            n: s for n, s in scales.items() if n.endswith(("blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.1.attn.qkv"))
        }
    outcomes = []
    for training in (True, False):
        made = with_fake_quant(plain, scales).double().train(training)  # double: no number lies on the edge of a step
        out = made(pictures(2).double())
        (out.cls.square().sum() + out.patches.sum()).backward()
        outcomes.append([out.cls, out.patches, *(p.grad for n, p in made.named_parameters() if n != "mask_token")])
    for got, want in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("recompute", [False, True])
def test_bf16_training_of_blocks_is_near_float32(recompute):
    plain = backbone()
    made = with_fake_quant(plain, input_scales(plain, names_of(plain), pictures(4), clip=1.0)).train()
    made.train_with(recompute=recompute, compiled=False)
    images, gradients = pictures(4, seed=2), []
    for low in (False, True):
        made.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            out = made(images)
        (out.cls.float().square().sum() + out.patches.float().sum()).backward()
        gradients.append({n: p.grad.flatten().clone() for n, p in made.named_parameters() if p.grad is not None})
    exact, rough = gradients
    assert exact.keys() == rough.keys() >= {"blocks.0.attn.qkv.input_log_scale", "blocks.1.mlp.fc2.weight_log_scale"}
    for name in ("blocks.0.attn.qkv.weight", "blocks.0.mlp.fc2.weight", "blocks.1.attn.proj.weight", "blocks.1.mlp.fc1.bias"):
        assert F.cosine_similarity(exact[name], rough[name], dim=0) > 0.98, name


def test_the_callers_backbone_is_left_alone():
    plain = backbone()
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    made = with_fake_quant(plain, {"blocks.0.mlp.fc1": 0.05})
    with torch.no_grad():
        made.blocks[0].mlp.fc1.weight.zero_()
    assert list(fake_quant_layers(made)) == ["blocks.0.mlp.fc1"]
    assert not fake_quant_layers(plain)
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items())


@pytest.mark.parametrize("learn", [True, False])
def test_scales_learn_only_if_asked(learn):
    made = with_fake_quant(backbone(), {"blocks.0.mlp.fc1": 0.05}, learn_scales=learn).train()
    out = made(pictures(2))
    (out.cls.sum() + out.patches.square().sum()).backward()
    layer = made.blocks[0].mlp.fc1
    for p in (layer.input_log_scale, layer.weight_log_scale):
        assert p.requires_grad is learn
        assert (p.grad is not None and bool(p.grad.abs().max() > 0)) is learn
    assert layer.weight.grad.abs().max() > 0


@pytest.mark.parametrize(("weights", "conv"), [("int8", True), ("w4", False)])
def test_strip_gives_an_ordinary_backbone_with_weights_on_the_grid(weights, conv):
    plain = backbone()
    names = names_of(plain, conv)
    made = with_fake_quant(plain, dict.fromkeys(names, 0.05 if weights == "int8" else None), weights)
    move_scales(made)
    stripped, quantization = strip(made)
    assert [type(m) for m in stripped.modules()] == [type(m) for m in plain.modules()]
    assert [(k, v.shape) for k, v in stripped.state_dict().items()] == [(k, v.shape) for k, v in plain.state_dict().items()]
    assert quantization["format"] == "decant-quantization-1"
    assert quantization["weights"] == weights
    assert list(quantization["layers"]) == names
    for name, about in json.loads(json.dumps(quantization))["layers"].items():
        layer, w = made.get_submodule(name), stripped.get_submodule(name).weight.detach().flatten(1)
        scale = torch.tensor(about["weight_scale"])
        assert scale.ndim == (2 if weights == "w4" else 1)
        spread = scale.repeat_interleave(BLOCK, 1)[:, : w.shape[1]] if weights == "w4" else scale[:, None]
        trained = (layer.weight.detach().flatten(1) / spread).round().clamp(*((-7, 7) if weights == "w4" else (-127, 127)))
        for dtype in (torch.float32, torch.float16):  # rounding the weights to half floats changes no integer
            assert torch.equal((w.to(dtype).float() / spread).round(), trained)
        assert about["input_scale"] == (None if weights == "w4" else layer.scales()[0].item())
    if weights == "w4":  # weights are all there is to quantize
        with torch.no_grad():
            for a, b in zip(tensors_of(made(pictures(2))), tensors_of(stripped(pictures(2))), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_scales_that_were_learned_can_be_given_again():
    plain = backbone()
    made = with_fake_quant(plain, {"blocks.0.mlp.fc1": 0.05, "blocks.1.attn.qkv": 0.02})
    move_scales(made)
    stripped, quantization = strip(made)
    layers = quantization["layers"]
    again = with_fake_quant(
        stripped,
        {n: q["input_scale"] for n, q in layers.items()},
        weight_scales={n: torch.tensor(q["weight_scale"]) for n, q in layers.items()},
    )
    with torch.no_grad():
        for a, b in zip(tensors_of(made(pictures(2))), tensors_of(again(pictures(2))), strict=True):
            assert torch.equal(a, b)


def test_networks_of_timm_have_their_own_names():
    torch.manual_seed(0)
    options: Any = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    plain = TimmBackbone(TimmConfig(name="vit_tiny_patch16_224", image_size=32, patch=8, options=options)).eval()
    name = "net.blocks.0.mlp.fc1"
    made = with_fake_quant(plain, {name: 0.02, "net.patch_embed.proj": 0.03})
    with torch.no_grad():
        assert 1e-4 < (made(pictures(2)).patches - plain(pictures(2)).patches).abs().max() < 0.5
    assert type(strip(made)[0].get_submodule(name)) is nn.Linear


@pytest.mark.parametrize("weights", ["int8", "w4"])
def test_chosen_scales_are_better_than_the_largest_magnitudes(weights):
    torch.manual_seed(0)
    w = torch.randn(16, 80) * torch.rand(16, 1)
    w[3] = 0.0
    levels, block = (7, BLOCK) if weights == "w4" else (127, 80)

    def errors(scale: Tensor) -> Tensor:
        spread = scale.repeat_interleave(block, 1)[:, :80]
        return ((w / spread).round().clamp(-levels, levels) * spread - w).square().sum(1)

    chosen = least_squares_scale(w, weights)
    peak = F.pad(w, (0, -80 % block)).unflatten(1, (-1, block)).abs().amax(2) / levels
    largest = torch.where(peak > 0, peak, 1.0)
    assert chosen.shape == (16, 3 if weights == "w4" else 1)
    assert (errors(chosen) <= errors(largest) + 1e-9).all()
    if weights == "w4":  # of 8 bits the largest magnitude is nearly always the best
        assert errors(chosen).sum() < 0.9 * errors(largest).sum()
    assert (chosen[3] == 1).all()


def test_copies_for_other_resolutions_stay_quantized():
    made = with_fake_quant(backbone(), dict.fromkeys(names_of(backbone()), 0.05))
    other = made.at_size(48)
    assert list(fake_quant_layers(other)) == list(fake_quant_layers(made))
    with torch.no_grad():
        torch.testing.assert_close(other(pictures(2, 48)).cls, made(pictures(2, 48)).cls, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layers", "weights", "sentence"),
    [
        ({}, "int8", "no layer to quantize"),
        (
            {"blocks.0.attn.kqv": 0.1},
            "int8",
            r"'blocks.0.attn.kqv': it is no layer of this network; layers are called like blocks.0.attn",
        ),
        ({"blocks.0.norm1": 0.1}, "int8", "neither a Linear layer nor a patch convolution"),
        ({"blocks.0.mlp.fc1": 0.0}, "int8", "above 0 and finite, got 0.0"),
        ({"blocks.0.mlp.fc1": -1.0}, "int8", "above 0"),
        ({"blocks.0.mlp.fc1": float("nan")}, "int8", "above 0"),
        ({"blocks.0.mlp.fc1": 0.1}, "w4", "weights only"),
        ({"blocks.0.mlp.fc1": None}, "int8", "needs the scale"),
    ],
)
def test_what_cannot_be_quantized_is_said(layers, weights, sentence):
    with pytest.raises(UserError, match=sentence):
        with_fake_quant(backbone(), layers, weights)


@pytest.mark.parametrize(
    ("scale", "sentence"), [(torch.ones(3), r"must be \[192, 1\], got \[3, 1\]"), (torch.zeros(192), "above 0")]
)
def test_wrong_scales_of_weights_are_said(scale, sentence):
    with pytest.raises(UserError, match=sentence):
        with_fake_quant(backbone(), {"blocks.0.mlp.fc1": 0.1}, weight_scales={"blocks.0.mlp.fc1": scale})
