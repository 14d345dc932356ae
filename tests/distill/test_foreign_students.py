"""A timm Vision Transformer as a student: crops of several sizes, masks, drop path, gradients, saving, export; and what it measures."""

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from torch import Tensor

from distill.data.preprocess import Preprocess
from distill.errors import UserError
from distill.models.backbone import BackboneConfig, flops_per_image, parameter_count
from distill.models.checkpoints import load_backbone, save_model
from distill.models.kinds import (
    BackboneChoice,
    backbone_flops,
    backbone_measures,
    backbone_parameters,
    make_backbone,
    read_config,
    skeleton,
)
from distill.models.timm_backbone import TimmBackbone, TimmConfig
from export.graph import export_onnx

torch.set_num_threads(1)
SMALL: dict[str, Any] = {"embed_dim": 48, "num_heads": 3, "depth": 2}
STUDENTS = {
    "vit": TimmConfig(name="vit_tiny_patch16_224", image_size=48, patch=8, options={**SMALL, "init_values": 1.0}),
    "dinov2 with registers": TimmConfig(name="vit_small_patch14_reg4_dinov2", image_size=56, options=SMALL),
    "no class token": TimmConfig(name="vit_medium_patch16_gap_256", image_size=48, patch=8, options=SMALL),
    "deit": TimmConfig(name="deit_tiny_distilled_patch16_224", image_size=48, patch=8, options=SMALL),
    "clip": TimmConfig(name="vit_base_patch32_clip_224", image_size=64, patch=16, options=SMALL),
    "dinov3": TimmConfig(name="vit_small_patch16_dinov3", image_size=64, options=SMALL),
}


def student(config: TimmConfig) -> TimmBackbone:
    torch.manual_seed(0)
    made = make_backbone(config)
    assert isinstance(made, TimmBackbone)
    with torch.no_grad():
        assert made.mask_token is not None
        made.mask_token.normal_()
        for name, p in made.named_parameters():
            if p.ndim == 1 or "embed" in name or "token" in name:
                p.add_(0.3 * torch.randn_like(p))
            elif p.ndim == 2:
                p.normal_(std=p.shape[1] ** -0.5)
    return made


def images(size: int, n: int = 4) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", STUDENTS)
def test_students_learn_from_crops_of_two_sizes_and_masks(name):
    config = STUDENTS[name]
    model = student(config).train()
    size, local = config.image_size or 0, (config.image_size or 0) - model.patch
    n = (size // model.patch) ** 2
    masks = torch.zeros(4, n, dtype=torch.bool)
    masks[0, : n // 2] = True
    features = model(images(size), masks)
    assert features.cls.shape == (4, 48)
    assert features.patches.shape == (4, n, 48)
    other = model(images(local))
    assert other.patches.shape == (4, (local // model.patch) ** 2, 48)
    (features.cls.square().sum() + features.patches.square().sum() + other.cls.square().sum()).backward()
    without = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert without == [k for k in without if k.endswith("q_norm") or "attn.k" in k]
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    optimizer.step()


@pytest.mark.parametrize("name", STUDENTS)
@torch.no_grad()
def test_masks_replace_exactly_the_masked_patches(name):
    """A masked patch's pixels do not matter, another's do; without masks nothing depends on the mask token."""
    model = student(STUDENTS[name]).eval()
    size, p = STUDENTS[name].image_size or 0, model.patch
    masks = torch.zeros(1, (size // p) ** 2, dtype=torch.bool)
    masks[0, 1] = True  # first row, second column
    x, y, z = (images(size, 1).clone() for _ in range(3))
    y[:, :, :p, p : 2 * p] += 3
    z[:, :, p : 2 * p, :p] += 3
    want = model(x, masks)
    assert torch.equal(model(y, masks).patches, want.patches)
    assert not torch.allclose(model(z, masks).patches, want.patches, atol=1e-3)
    assert not torch.allclose(model(x).patches, want.patches, atol=1e-3)
    plain = model(x)
    assert model.mask_token is not None
    model.mask_token.add_(1)
    assert torch.equal(model(x).cls, plain.cls)
    net_own = model.net.forward_features(x)
    assert torch.equal(plain.patches, net_own[:, model.prefix :])


def test_drop_path_and_recomputation():
    config = STUDENTS["vit"].model_copy(update={"drop_path": 0.5})
    model = student(config).train()
    x = images(48, 16)
    assert not torch.equal(model(x).cls, model(x).cls)
    assert torch.equal(model.eval()(x).cls, student(STUDENTS["vit"]).eval()(x).cls)
    for name in ("vit", "dinov3"):
        gradients = []
        for recompute in (False, True):
            model = student(STUDENTS[name]).train()
            model.train_with(recompute=recompute, compiled=False)
            model(images(STUDENTS[name].image_size or 0)).cls.square().sum().backward()
            gradients.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for k, g in gradients[0].items():
            torch.testing.assert_close(gradients[1][k], g)


@pytest.mark.parametrize("name", STUDENTS)
@torch.no_grad()
def test_students_are_saved_whole(tmp_path, name):
    model = student(STUDENTS[name]).eval()
    save_model(tmp_path, model, Preprocess(48, 48))
    loaded = load_backbone(tmp_path)
    assert loaded.config == STUDENTS[name]
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    x = images(STUDENTS[name].image_size or 0)
    masks = torch.rand(4, model(x).patches.shape[1], generator=torch.Generator().manual_seed(2)) < 0.5
    assert torch.equal(loaded(x, masks).patches, model(x, masks).patches)


@pytest.mark.parametrize(
    ("name", "size", "precision"),
    [("vit", 112, "fp16"), ("dinov2 with registers", 84, "fp32"), ("no class token", 48, "fp32"), ("clip", 96, "fp32")],
)
@torch.no_grad()
def test_exported_students_compute_what_torch_does(tmp_path, name, size, precision):
    model = student(STUDENTS[name]).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    export_onnx(model, tmp_path / "m.onnx", size, precision)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"])
    for n in (1, 3):
        want = model(images(size, n))
        got = session.run(["cls", "patches"], {"images": images(size, n).numpy()})
        for a, b in zip(got, (want.cls, want.patches), strict=True):
            assert b.abs().max() > 1
            assert abs(a - b.numpy()).max() < (3e-5 if precision == "fp32" else 5e-2)


def test_what_cannot_be_masked_or_exported(tmp_path):
    cnn = make_backbone(TimmConfig(name="resnet10t")).eval()
    with pytest.raises(UserError, match="resnet10t cannot mask its input"):
        cnn(images(64), torch.zeros(4, 4, dtype=torch.bool))
    with pytest.raises(UserError, match="resnet10t cannot be exported"):
        export_onnx(cnn, tmp_path / "m.onnx", 64)


@pytest.mark.parametrize("size", [224, 112])
def test_operations_of_timms_models_by_counting_are_ours_by_formula(size):
    ours, theirs = BackboneConfig(patch=16), TimmConfig(name="vit_small_patch16_224", image_size=224)
    assert backbone_flops(theirs, size) == backbone_flops(ours, size) == flops_per_image(ours, size)
    made = timm.create_model("vit_small_patch16_224", num_classes=0)
    count = sum(p.numel() for p in made.parameters())
    assert backbone_parameters(theirs) == count + 384
    assert backbone_parameters(theirs, mask_token=False) == count
    assert backbone_parameters(ours) == parameter_count(ours)
    assert backbone_measures(theirs) == backbone_measures(ours) == (384, 16, 12)


def test_what_a_cnn_measures():
    lite = TimmConfig(name="tf_efficientnet_lite0")
    assert backbone_measures(lite) == (1280, 32, 7)
    assert 7.6e8 < backbone_flops(lite, 224) < 8.2e8  # published: 407 M multiply-adds with the classifier
    assert 3.3e6 < backbone_parameters(lite) < 3.5e6


def test_kinds_are_read_by_name():
    from pydantic import TypeAdapter, ValidationError

    choice: TypeAdapter[Any] = TypeAdapter(BackboneChoice)
    assert choice.validate_python({"arch": "vit_base"}) == BackboneConfig(arch="vit_base")
    assert choice.validate_python({"kind": "timm", "name": "resnet18"}) == TimmConfig(name="resnet18")
    assert choice.validate_python(TimmConfig(name="resnet18")) == TimmConfig(name="resnet18")
    with pytest.raises(ValidationError, match="nmae"):
        choice.validate_python({"kind": "timm", "nmae": "resnet18"})
    with pytest.raises(ValidationError, match="jax"):
        choice.validate_python({"kind": "jax"})
    assert read_config({"dim": 32}) == BackboneConfig(dim=32)
    assert read_config(TimmConfig(name="x", options={"depths": [1, 2]}).model_dump()).options == {"depths": [1, 2]}  # type: ignore[union-attr]


def test_models_without_memory_are_filled_not_initialised(tmp_path, monkeypatch):
    """No random number is drawn for weights that a file replaces."""
    model = make_backbone(BackboneConfig(dim=32, depth=1, heads=2, patch=8, image_size=32))
    save_model(tmp_path, model, Preprocess(32, 32))
    state = torch.get_rng_state()
    loaded = load_backbone(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in loaded.parameters())
    assert all(p.is_meta for p in skeleton(loaded.config).parameters())


def test_wrong_settings_are_sentences(tmp_path: Path):
    for config, words in (
        (TimmConfig(name="vit_tiny_patch16_224", image_size=50, patch=8), "not a multiple"),
        (TimmConfig(name="vit_tiny_patch16_224", drop_path=1.0), "drop_path"),
        (TimmConfig(name="vit_tiny_patch16_224", patch=0), "patch must"),
        (TimmConfig(name="resnet18", patch=8), "cannot make resnet18"),
        (TimmConfig(name="vit_tiny_patch16_224", options={"num_heads": 5}), "cannot make vit_tiny"),
    ):
        with pytest.raises(UserError, match=words) as e:
            make_backbone(config)
        assert "\n" not in str(e.value)
