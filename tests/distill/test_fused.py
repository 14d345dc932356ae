"""The halves of a block that save memory, against timm's plain block: outputs, every gradient, what is kept for the backward pass."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from timm.layers.mlp import SwiGLUPacked
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from distill.cast_cache import CastCache
from distill.models import fused
from distill.models.backbone import Backbone, BackboneConfig
from distill.models.blocks import Block
from distill.models.fused import SlicedAttention, attend, swiglu

DIM, HEADS = 32, 4


def block(ffn: str = "mlp", scale: float | None = 0.5, bias: bool = True, dim: int = DIM, seed: int = 0) -> Any:
    """A block whose every parameter, biases and norms too, differs from its start."""
    torch.manual_seed(seed)
    layer: Any = SwiGLUPacked if ffn == "swiglu" else Mlp
    made: Any = Block(
        dim, HEADS, mlp_ratio=4.0, qkv_bias=bias, proj_bias=bias, init_values=scale, mlp_layer=layer,
        act_layer=nn.SiLU if ffn == "swiglu" else nn.GELU,
    )  # fmt: skip
    made.drop_rate, made.recompute, made.plain, made.cast = 0.0, False, False, CastCache()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3))
    return made.train()


def outcome(made: Any, x: Tensor, forward: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Output and gradients of the input and every parameter, for a loss that weighs every output differently."""
    x = x.clone().requires_grad_()
    made.zero_grad()
    out = (forward or made)(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    (out * weights).sum().backward()
    assert x.grad is not None
    missing = [n for n, p in made.named_parameters() if p.grad is None]
    assert not missing
    return {"out": out.detach(), "x": x.grad} | {n: p.grad.clone() for n, p in made.named_parameters()}


def plain(made: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: TimmBlock.forward(made, x)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], rel: float) -> None:
    """Relative to the largest number of each tensor: a sum of many terms is exact to that."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        error = (got[name] - value).abs().max() / value.abs().max().clamp_min(1e-30)
        assert got[name].dtype == value.dtype
        assert error < rel, f"{name}: {error:.2e}"


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("scale", [0.5, None], ids=["LayerScale", "no LayerScale"])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"])
def test_is_timms_block(ffn, scale, bias, dtype, rel):
    made = block(ffn, scale, bias).to(dtype)
    x = torch.randn(3, 11, DIM, dtype=dtype)
    assert_same(outcome(made, x), outcome(made, x, plain(made)), rel)


@pytest.mark.parametrize("tokens", [fused.SHORT - 1, fused.SHORT + 1])
def test_is_timms_block_for_short_and_long_sequences(tokens):
    made = block().double()
    x = torch.randn(2, tokens, DIM, dtype=torch.float64)
    assert_same(outcome(made, x), outcome(made, x, plain(made)), 1e-10)


def test_nothing_is_asked_of_frozen_parts():
    made = block()
    made.attn.requires_grad_(False)
    made.norm1.requires_grad_(False)
    x = torch.randn(2, 5, DIM)
    made(x).square().sum().backward()
    assert made.attn.qkv.weight.grad is None
    got = made.mlp.fc1.weight.grad.clone()
    made.zero_grad()
    plain(made)(x).square().sum().backward()
    torch.testing.assert_close(got, made.mlp.fc1.weight.grad, rtol=1e-4, atol=1e-5)


def test_modules_may_hold_a_frozen_weight_with_a_trained_scale():
    made = block()
    made.mlp.fc2.requires_grad_(False)
    made.attn.proj.weight.requires_grad_(False)
    x = torch.randn(2, 5, DIM)
    made(x).square().sum().backward()
    got = [made.ls2.gamma.grad.clone(), made.ls1.gamma.grad.clone()]
    made.zero_grad()
    plain(made)(x).square().sum().backward()
    for a, b in zip(got, [made.ls2.gamma.grad, made.ls1.gamma.grad], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def backbone(**changes: Any) -> Any:
    torch.manual_seed(0)
    base: dict[str, Any] = {"patch": 8, "image_size": 32, "dim": DIM, "depth": 2, "heads": HEADS, "init": "fan_in"}
    made = Backbone(BackboneConfig(**(base | {"layer_scale": 0.5, "registers": 3} | changes)))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return made.train()


def features(made: Any, images: Tensor, masks: Tensor) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        found = made(images + x, masks)
        return torch.cat([found.cls[:, None], found.patches], 1)

    return forward


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_a_whole_backbone_with_registers_and_masks(ffn):
    made = backbone(ffn=ffn).double()
    images, masks = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.rand(3, 16) < 0.4
    forward, zero = features(made, images, masks), torch.zeros(3, 3, 32, 32, dtype=torch.float64)
    got = outcome(made, zero, forward)
    made.eval()  # where blocks are timm's
    assert_same(got, outcome(made, zero, forward), 1e-10)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("batch", [2, 7])
def test_stochastic_depth_takes_the_plain_blocks_subsets(ffn, batch):
    made, x = block(ffn).double(), torch.randn(batch, 6, DIM, dtype=torch.float64)
    made.drop_rate = 0.4
    found = []
    for made.plain in (False, True):
        torch.manual_seed(3)
        found.append(outcome(made, x))
    assert_same(found[0], found[1], 1e-10)
    made.drop_rate = 0.0
    assert not torch.allclose(outcome(made, x)["out"], found[0]["out"])


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_blocks_run_again_in_the_backward_pass_change_no_bit(ffn, drop_path, bf16):
    made, images, masks = backbone(ffn=ffn, drop_path=drop_path), torch.randn(5, 3, 32, 32), torch.rand(5, 16) < 0.4
    found = []
    for recompute in (False, True):
        made.train_with(recompute=recompute, compiled=False)
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found.append(outcome(made, torch.zeros_like(images), features(made, images, masks)))
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks():
    made, images, masks = backbone(depth=1), torch.randn(4, 3, 32, 32), torch.rand(4, 16) < 0.4
    forward = features(made, images, masks)
    want = outcome(made, torch.zeros_like(images), forward)
    made.train_with(recompute=False, compiled=True)
    assert_same(outcome(made, torch.zeros_like(images), forward), want, 1e-4)


@pytest.mark.parametrize("scale", [0.5, None], ids=["LayerScale", "no LayerScale"])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_bf16_is_close_and_the_stream_stays_float32(ffn, scale):
    made, x = block(ffn, scale), torch.randn(6, 17, DIM)
    exact = outcome(made, x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = outcome(made, x)
    for name, value in exact.items():
        assert rough[name].dtype == torch.float32
        got, want = rough[name], value
        if name == "attn.qkv.bias":  # the gradient of a key's bias is zero up to rounding
            got, want = (torch.cat([v[:DIM], v[2 * DIM :]]) for v in (got, want))
        assert F.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.999, name
        assert not torch.equal(got, want)


def test_a_teacher_in_bf16_is_close_without_gradient():
    made, x = block().eval(), torch.randn(6, 17, DIM)
    with torch.no_grad():
        exact = made(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = made(x)
            for linear in (m for m in made.modules() if isinstance(m, nn.Linear)):
                linear.weight.data = linear.weight.data.bfloat16()
            held = made(x)
    assert rough.dtype == held.dtype == torch.float32
    assert F.cosine_similarity(rough.flatten(), exact.flatten(), dim=0) > 0.9999
    assert F.cosine_similarity(held.flatten(), rough.flatten(), dim=0) > 0.9999


def attention(qkv: Tensor, heads: int) -> Tensor:
    b, t, d3 = qkv.shape
    q, k, v = qkv.view(b, t, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d3 // 3)


@pytest.mark.parametrize("at_once", [1, 2 * HEADS * 49, 10**6], ids=["1 a slice", "2 a slice", "one slice"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
def test_attention_in_slices_is_the_fused_kernels(monkeypatch, at_once, dtype, atol):
    monkeypatch.setattr(fused, "SCORES_AT_ONCE", at_once)
    assert len(fused._slices(5, 7, HEADS)) == {1: 5, 2 * HEADS * 49: 3, 10**6: 1}[at_once]
    torch.manual_seed(0)
    qkv, grad = torch.randn(5, 7, 3 * DIM).to(dtype), torch.randn(5, 7, DIM).to(dtype)
    found = []
    for function in (SlicedAttention.apply, attention):
        x = qkv.clone().requires_grad_()
        out = function(x, HEADS)
        out.backward(grad)
        found += [(out.detach(), x.grad)]
    for a, b in zip(*found, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=atol, atol=atol)


@pytest.mark.parametrize("tokens", [5, fused.SHORT, fused.SHORT + 1])
def test_attention_takes_a_gradient_that_is_not_contiguous(tokens):
    x, y = (torch.randn(2, tokens, 3 * DIM, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    grad = torch.randn(2, DIM, tokens).transpose(1, 2)
    attend(x, HEADS).backward(grad)
    attention(y, HEADS).backward(grad)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)


def test_swiglu():
    x = torch.randn(3, 4, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, (x,))
    a, b = x.chunk(2, -1)
    torch.testing.assert_close(swiglu(x), F.silu(a) * b)


@contextmanager
def saved_bytes(made: nn.Module) -> Iterator[Callable[[], int]]:
    """Bytes that are kept for the backward pass, each storage once, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in made.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # else an address could be another tensor's

    def note(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            alive.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        yield lambda: sum(kept.values())


def kept_by(made: Any, x: Tensor, forward: Callable[[Tensor], Tensor], bf16: bool = False) -> float:
    """Per token and width, in numbers of 4 bytes."""
    with saved_bytes(made) as total, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        forward(x.clone().requires_grad_())
        return total() / 4 / x.numel()


@pytest.mark.parametrize(
    ("ffn", "bf16", "most", "factor"),
    [("mlp", False, 10.1, 1.78), ("mlp", True, 6.1, 1.68), ("swiglu", False, 12.1, 1.48), ("swiglu", True, 7.1, 1.44)],
)
def test_what_is_kept_for_the_backward_pass(ffn, bf16, most, factor):
    """Of an MLP in float32: two inputs, q k v, attention's result and the inner values, 2 + 3 + 1 + 4 = 10 widths a token; the plain
    block keeps 18.
    """
    dim = 96
    made, x = block(ffn, dim=dim), torch.randn(64, 33, dim)
    ours = kept_by(made, x, made, bf16)
    assert ours < most
    assert kept_by(made, x, plain(made), bf16) > factor * ours


def test_recomputed_blocks_keep_their_input_alone():
    made, x = block(dim=96), torch.randn(8, 33, 96)
    made.recompute = True
    assert kept_by(made, x, made) <= 1.01
