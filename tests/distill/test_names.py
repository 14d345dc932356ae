"""Our weights in other libraries' classes: strict loading, equal outputs, and back again without a change."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from distill.data.preprocess import Preprocess
from distill.errors import UserError
from distill.models import names
from distill.models.backbone import Backbone, BackboneConfig
from distill.models.checkpoints import load_backbone, save_model
from distill.models.exchange import export_weights
from distill.models.foreign import LoadConfig, load_teacher
from distill.models.heads import DINOHead, HeadConfig
from distill.models.kinds import make_backbone
from distill.models.timm_backbone import TimmBackbone, TimmConfig
from recipes.convert import convert

torch.set_num_threads(1)
SHAPES: dict[str, dict[str, Any]] = {
    "mlp": {},
    "swiglu": {"ffn": "swiglu"},
    "registers": {"registers": 4, "pos_offset": 0.0, "pos_antialias": True},
    "swiglu, 2 registers": {"ffn": "swiglu", "registers": 2, "pos_offset": 0.0, "pos_antialias": True},
    "no layer scale": {"layer_scale": 0.0},
}


def randomise(module: Any) -> Any:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.5) + (p.ndim == 1) * 0.5)
    return module.eval()


def saved(folder: Path, normalize: str = "imagenet", **shape: Any) -> Backbone:
    """A model folder with every tensor different; three heads' width, so that a wrong number of heads shows."""
    model = randomise(Backbone(BackboneConfig(**{"dim": 48, "depth": 2, "heads": 3, "patch": 14, "image_size": 56} | shape)))
    heads = {"dino": randomise(DINOHead(48, HeadConfig(prototypes=12, hidden=20, bottleneck=8)))}
    save_model(folder, model, Preprocess(56, 64, "bilinear", normalize), heads)
    return model


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def close(got: Tensor, want: Tensor) -> None:
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(1.0, float(want.abs().max())))


def unchanged(state: dict[str, Tensor], model: nn.Module, ignore: tuple[str, ...] = ()) -> None:
    ours = model.state_dict()
    assert set(state) - set(ignore) == set(ours) - set(ignore)
    for name in ours.keys() - set(ignore):
        assert torch.equal(state[name], ours[name]), name


@pytest.mark.parametrize("shape", ["mlp", "swiglu", "registers", "swiglu, 2 registers"])
def test_names_there_and_back(tmp_path, shape):
    model = saved(tmp_path, **SHAPES[shape])
    state, swiglu = model.state_dict(), "swiglu" in shape
    unchanged(names.from_official(names.to_official(state, swiglu)), model)
    unchanged(names.from_transformers(names.to_transformers(state, swiglu)), model)
    # timm knows no mask token, and with registers the class token and its position are one sum.
    lost = ("mask_token", "cls_token", "pos_embed") if "registers" in shape else ("mask_token",)
    back = names.from_timm(names.to_timm(state))
    unchanged(back, model, lost)
    torch.testing.assert_close(back["cls_token"] + back["pos_embed"][:, :1], state["cls_token"] + state["pos_embed"][:, :1])
    if "registers" not in shape:
        unchanged(names.from_mmpretrain(names.to_mmpretrain(state, swiglu)), model, ("mask_token",))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("out", ["w.pth", "w.safetensors"])
@torch.no_grad()
def test_official_files_are_what_the_reader_of_official_files_reads(tmp_path, shape, out):
    model = saved(tmp_path / "m", **SHAPES[shape])
    written = export_weights(tmp_path / "m", "official", tmp_path / out)
    assert written.files == [tmp_path / out]
    loaded = load_teacher(LoadConfig(kind="official", path=str(tmp_path / out), attention_heads=3))
    assert loaded.backbone.config.pos_offset == model.config.pos_offset
    for size in (56, 70):
        close(loaded.backbone(images(size)).cls, model(images(size)).cls)
    if shape != "no layer scale":
        unchanged(loaded.backbone.state_dict(), model)


def test_official_names_are_the_references(tmp_path, golden):
    """Key for key the reference's own state dicts."""
    import numpy as np

    for name, shape in (("05_vit_mlp_reg0", "mlp"), ("05_vit_swiglu_reg4", "swiglu, 2 registers")):
        with np.load(golden / f"{name}.npz", allow_pickle=False) as v:
            depth = v["in/cfg/depth"].item()
            want = {k.removeprefix("in/w/") for k in v.files if k.startswith("in/w/")}
        saved(tmp_path / name, **SHAPES[shape], depth=depth)
        export_weights(tmp_path / name, "official", tmp_path / f"{name}.pth")
        assert set(torch.load(tmp_path / f"{name}.pth", weights_only=True)) == want


def test_full_teacher_checkpoints(tmp_path):
    model = saved(tmp_path / "m")
    export_weights(tmp_path / "m", "official", tmp_path / "t.pth", heads=True)
    loaded = load_teacher(LoadConfig(kind="official", path=str(tmp_path / "t.pth"), attention_heads=3))
    unchanged(loaded.backbone.state_dict(), model)
    assert loaded.heads["dino"].config == HeadConfig(prototypes=12, hidden=20, bottleneck=8)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_timms_dinov2_models(tmp_path, shape):
    """A file loads strictly into timm's model, a folder through `local-dir:`."""
    model = saved(tmp_path / "m", **SHAPES[shape])
    written = export_weights(tmp_path / "m", "timm", tmp_path / "w.safetensors")
    assert "vit_giant" in written.load if "swiglu" in shape else "vit_small" in written.load
    assert ("_reg4_" in written.load) == ("registers" in shape)
    from safetensors.torch import load_file

    made = eval(written.load.removesuffix(".load_state_dict(...)"), {"timm": timm})
    made.load_state_dict(load_file(tmp_path / "w.safetensors"), strict=True)
    folder = export_weights(tmp_path / "m", "timm", tmp_path / "folder")
    local = eval(folder.load, {"timm": timm})
    want, prefix = model(images(56)), 1 + model.config.registers
    for net in (made.eval(), local.eval()):
        tokens = net.forward_features(images(56))
        close(tokens[:, 0], want.cls)
        close(tokens[:, prefix:], want.patches)
        assert net.num_classes == 0
    assert tuple(local.pretrained_cfg["mean"]) == (0.485, 0.456, 0.406)
    notes = [n for n in written.notes if "resamples positions" in n]
    assert bool(notes) == ("registers" not in shape)
    dynamic = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True, dynamic_img_size=True).eval()
    at_84 = model(images(84)).cls
    assert torch.allclose(dynamic.forward_features(images(84))[:, 0], at_84, atol=1e-4) != bool(notes)


def test_the_published_shapes_need_no_arguments(tmp_path):
    """S/14 at 518 px is timm's `vit_small_patch14_dinov2` as it stands."""
    from distill.models.exchange import timm_arguments
    from distill.models.kinds import skeleton

    for arch, name in (("vit_small", "small"), ("vit_base", "base"), ("vit_large", "large"), ("vit_giant", "giant")):
        for registers, suffix in ((0, ""), (4, "_reg4")):
            backbone = skeleton(BackboneConfig(arch=arch, image_size=518, registers=registers))  # type: ignore[arg-type]
            assert timm_arguments(backbone) == (f"vit_{name}_patch14{suffix}_dinov2", {})
            with torch.device("meta"):
                net = timm.create_model(f"vit_{name}_patch14{suffix}_dinov2", num_classes=0)
            shapes = {k: v.shape for k, v in net.state_dict().items()}
            assert {k: v.shape for k, v in names.to_timm(backbone.state_dict()).items()} == shapes


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_transformers_classes(tmp_path, shape):
    library = pytest.importorskip("transformers")
    model = saved(tmp_path / "m", "clip", **SHAPES[shape] | ({"pos_offset": 0.0} if "registers" not in shape else {}))
    written = export_weights(tmp_path / "m", "transformers", tmp_path / "hf")
    assert written.notes == []
    theirs, report = eval(written.load.replace(")", ", output_loading_info=True)"), {"transformers": library})
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(theirs).__name__ == ("Dinov2WithRegistersModel" if model.config.registers else "Dinov2Model")
    theirs.eval()
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[:, ::3] = True
    for size, masked in ((56, None), (56, masks), (84, None)):
        want, got = model(images(size), masked), theirs(pixel_values=images(size), bool_masked_pos=masked).last_hidden_state
        close(got[:, 0], want.cls)
        close(got[:, 1 + model.config.registers :], want.patches)
    # And the images are prepared as ours are.
    processor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert processor["image_mean"][0] == 0.48145466
    loaded = load_teacher(LoadConfig(kind="transformers", path=str(tmp_path / "hf")))
    assert loaded.preprocess == Preprocess(56, 64, "bilinear", "clip")
    close(loaded.backbone(images(84)).cls, model(images(84)).cls)


MM_BLOCK = ["ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias", "attn.gamma1.weight", "ffn.gamma2.weight"]
MM_BLOCK += ["attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"]
MM_FFN = {"mlp": ["ffn.layers.0.0", "ffn.layers.1"], "swiglu": ["ffn.w12", "ffn.w3"]}


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_mmpretrains_names(tmp_path, ffn):
    """The parameters of its VisionTransformer with LayerScale, as its modules and converters name them."""
    saved(tmp_path / "m", ffn=ffn)
    export_weights(tmp_path / "m", "mmpretrain", tmp_path / "w.pth")
    state = torch.load(tmp_path / "w.pth", weights_only=True)["state_dict"]
    outside = [
        "cls_token",
        "pos_embed",
        "patch_embed.projection.weight",
        "patch_embed.projection.bias",
        "ln1.weight",
        "ln1.bias",
    ]
    want = {f"backbone.{k}" for k in outside}
    for i in range(2):
        want |= {f"backbone.layers.{i}.{k}" for k in MM_BLOCK}
        want |= {f"backbone.layers.{i}.{k}.{end}" for k in MM_FFN[ffn] for end in ("weight", "bias")}
    assert set(state) == want
    saved(tmp_path / "r", registers=2)
    with pytest.raises(UserError, match="no registers"):
        export_weights(tmp_path / "r", "mmpretrain", tmp_path / "r.pth")


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("vit_tiny_patch16_224", {"depth": 1}, 224),
        ("eva_large_patch14_196", {"depth": 1, "embed_dim": 48, "num_heads": 3}, 196),
        ("vit_base_patch16_siglip_224", {"depth": 1, "embed_dim": 48, "num_heads": 3}, 224),
        ("convnext_atto", {"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, 224),
    ],
)
@torch.no_grad()
def test_timm_models_go_back_to_timm(tmp_path, name, options, size):
    model = randomise(make_backbone(TimmConfig(name=name, options=options)))
    assert isinstance(model, TimmBackbone)
    save_model(tmp_path / "m", model, Preprocess(size, size, normalize="inception"))
    written = export_weights(tmp_path / "m", "timm", tmp_path / "folder")
    net = eval(written.load, {"timm": timm}).eval()
    maps, want = net.forward_features(images(size)), load_backbone(tmp_path / "m")(images(size))
    if maps.ndim == 4:
        close(net.forward_head(maps, pre_logits=True), want.cls)
    else:
        close(maps[:, net.num_prefix_tokens :], want.patches)
    with pytest.raises(UserError, match=f"timm's {name}, which can go to timm only"):
        export_weights(tmp_path / "m", "official", tmp_path / "w.pth")


def test_what_cannot_be_written(tmp_path):
    saved(tmp_path / "m")
    for to, out, heads, words in (
        ("jax", "w.pth", False, "known are official, timm, transformers, mmpretrain"),
        ("official", "folder", False, "must end with .pth or .safetensors"),
        ("transformers", "w.safetensors", False, "name a folder"),
        ("timm", "w.pth", True, "no place"),
        ("official", "w.safetensors", True, "must end with .pth"),
    ):
        with pytest.raises(UserError, match=words):
            export_weights(tmp_path / "m", to, tmp_path / out, heads)
    with pytest.raises(UserError, match="holds no model"):
        export_weights(tmp_path / "none", "timm", tmp_path / "w.pth")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    assert "per_image" in export_weights(_per_image(tmp_path), "timm", tmp_path / "w.pth").notes[0]


def _per_image(tmp_path: Path) -> Path:
    saved(tmp_path / "p", "per_image")
    return tmp_path / "p"


def test_the_command(tmp_path):
    from typer.testing import CliRunner

    from recipes.cli import app

    saved(tmp_path / "run" / "students" / "small")
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "run"), "--to", "timm", "--out", str(tmp_path / "w.pth")])
    assert done.exit_code == 0, done.output
    assert "Load:  timm.create_model('vit_small_patch14_dinov2'" in done.output
    assert "Note:  The features are ours at 56 px" in done.output
    assert torch.load(tmp_path / "w.pth", weights_only=True)["cls_token"].shape == (1, 1, 48)
    bad = CliRunner().invoke(app, ["convert", str(tmp_path), "--to", "timm", "--out", str(tmp_path / "v.pth")])
    assert bad.exit_code == 2
    saved(tmp_path / "run" / "students" / "tiny")
    with pytest.raises(UserError, match="several students"):
        convert(tmp_path / "run", "timm", tmp_path / "v.pth", False)
