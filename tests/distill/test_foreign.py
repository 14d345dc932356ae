"""Teachers from elsewhere, proven on files that the libraries themselves write: the same outputs, and one sentence for everything wrong."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from distill.data.preprocess import Preprocess
from distill.errors import EnvironmentFailed, UserError
from distill.files import write_json
from distill.models import foreign
from distill.models.backbone import Backbone, BackboneConfig
from distill.models.checkpoints import load_backbone, load_heads, load_preprocess, save_model, save_tensors
from distill.models.foreign import LoadConfig, load_teacher
from distill.models.heads import DINOHead, HeadConfig
from distill.models.names import to_official
from distill.models.official import where

torch.set_num_threads(1)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every tensor different and none so small that it hides (LayerScale, tokens, norms, biases)."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(
                torch.randn(p.shape, generator=g) * (p[0].numel() ** -0.5 if p.ndim > 1 and p.numel() else 0.5)
                + (p.ndim == 1) * 0.5
            )
        for name, b in module.named_buffers():
            if "running" in name:
                b.copy_(torch.rand(b.shape, generator=g) + 0.5)
    return module.eval()


def close(got: Tensor, want: Tensor) -> None:
    assert want.std() > 0.05  # else the tolerance would prove nothing
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(1.0, float(want.abs().max())))


def says(error: pytest.ExceptionInfo, *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    for word in words:
        assert word in text, text


def images(size: int, width: int | None = None) -> Tensor:
    return torch.randn(2, 3, size, width or size, generator=torch.Generator().manual_seed(1))


def some_masks(n: int) -> Tensor:
    masks = torch.zeros(2, n, dtype=torch.bool)
    masks[0, ::2], masks[1, :3] = True, True
    return masks


def through_a_folder(loaded: foreign.Loaded, folder: Path) -> Any:
    """The teacher as it will be used: saved as a model folder, loaded again."""
    save_model(folder, loaded.backbone, loaded.preprocess, loaded.heads, loaded.lineage)
    assert load_preprocess(folder) == loaded.preprocess
    backbone = load_backbone(folder)
    assert not any(p.is_meta for p in (*backbone.parameters(), *backbone.buffers()))
    return backbone


# ---- official


def official_model(registers: int = 0, ffn: str = "mlp") -> Backbone:
    config = BackboneConfig(
        dim=128,
        depth=3,
        heads=2,
        patch=14,
        image_size=56,
        ffn=ffn,
        registers=registers,  # type: ignore[arg-type]
        pos_offset=0.0 if registers else 0.1,
        pos_antialias=registers > 0,
    )
    return randomise(Backbone(config))  # type: ignore[return-value]


def official_state(model: Backbone) -> dict[str, Tensor]:
    return to_official(model.state_dict(), model.config.ffn == "swiglu")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("registers", "ffn"), [(0, "mlp"), (4, "swiglu")])
@torch.no_grad()
def test_official_pretrained_weights(tmp_path, registers, ffn, suffix):
    model = official_model(registers, ffn)
    path = tmp_path / f"weights{suffix}"
    state = official_state(model)
    assert any("w12" in k for k in state) == (ffn == "swiglu")
    torch.save(state, path) if suffix == ".pth" else save_tensors(path, state)
    loaded = load_teacher(LoadConfig(kind="official", path=str(path)))
    assert loaded.heads == {}
    assert loaded.preprocess == Preprocess(56, 64, "bicubic", "imagenet")
    assert loaded.backbone.config == model.config.model_copy(update={"layer_scale": 1e-5})
    assert not loaded.backbone.training
    again = through_a_folder(loaded, tmp_path / "model")
    for size in (56, 84):
        x, masks = images(size, 56), some_masks(size // 14 * 4)
        for got in (loaded.backbone(x, masks), again(x, masks)):
            close(got.cls, model(x, masks).cls)
            close(got.patches, model(x, masks).patches)


def heads_state(name: str, head: DINOHead, parametrized: bool) -> dict[str, Tensor]:
    new = {"last_layer.weight_g": "last_layer.parametrizations.weight.original0"}
    new |= {"last_layer.weight_v": "last_layer.parametrizations.weight.original1"}
    return {f"{name}.{new.get(k, k) if parametrized else k}": v for k, v in head.state_dict().items()}


@pytest.mark.parametrize("parametrized", [False, True])
@pytest.mark.parametrize("separate", [False, True])
@torch.no_grad()
def test_full_teacher_checkpoints_with_heads(tmp_path, separate, parametrized):
    """As DINOv2's training writes them: {"teacher": {...}}, blocks in chunks."""
    model = official_model()
    dino = randomise(DINOHead(128, HeadConfig(prototypes=24, hidden=20, bottleneck=8)), 2)
    ibot = randomise(DINOHead(128, HeadConfig(prototypes=16, hidden=20, bottleneck=8, layers=1, bias=False)), 3)
    chunked = {
        f"backbone.blocks.{int(k.split('.')[1]) // 2}.{k.removeprefix('blocks.')}"
        if k.startswith("blocks.")
        else f"backbone.{k}": v
        for k, v in official_state(model).items()
    }
    assert "backbone.blocks.1.2.attn.qkv.weight" in chunked
    state = chunked | heads_state("dino_head", dino, parametrized)  # type: ignore[arg-type]
    state |= heads_state("ibot_head", ibot, parametrized) if separate else {}  # type: ignore[arg-type]
    path = tmp_path / "teacher_checkpoint.pth"
    torch.save({"teacher": state}, path)
    loaded = load_teacher(LoadConfig(kind="official", path=str(path)))
    assert list(loaded.heads) == (["dino", "ibot"] if separate else ["dino"])
    x = images(56)
    features = loaded.backbone(x)
    close(features.cls, model(x).cls)
    assert torch.equal(loaded.heads["dino"](features.cls), dino(features.cls))
    if separate:
        assert loaded.heads["ibot"].config.layers == 1
        assert torch.equal(loaded.heads["ibot"](features.patches), ibot(features.patches))
    through_a_folder(loaded, tmp_path / "model")
    saved = load_heads(tmp_path / "model", 128)
    assert torch.equal(saved["dino"](features.cls), dino(features.cls))
    # Backbone from one file, heads from another.
    torch.save(official_state(model), tmp_path / "plain.pth")
    both = load_teacher(LoadConfig(kind="official", path=str(tmp_path / "plain.pth"), heads=str(path)))
    assert torch.equal(both.heads["dino"](features.cls), dino(features.cls))
    with pytest.raises(UserError) as e:
        load_teacher(LoadConfig(kind="official", path=str(path), heads=str(tmp_path / "plain.pth")))
    says(e, "plain.pth", "no dino_head")


def test_whole_training_states_give_the_teacher(tmp_path):
    teacher, student = official_model(), official_model()
    randomise(student, 5)
    state = {f"teacher.backbone.{k}": v for k, v in official_state(teacher).items()}
    state |= {f"student.backbone.{k}": v for k, v in official_state(student).items()}
    torch.save({"model": state, "iteration": 3}, tmp_path / "model.pth")
    loaded = load_teacher(LoadConfig(kind="official", path=str(tmp_path / "model.pth")))
    assert torch.equal(loaded.backbone.get_parameter("norm.weight"), teacher.norm.weight)


@torch.no_grad()
def test_official_settings_that_a_file_does_not_say(tmp_path):
    model = Backbone(BackboneConfig(dim=40, depth=1, heads=4, patch=7, image_size=28, pos_offset=0.0, pos_antialias=True))
    randomise(model)
    torch.save(official_state(model), tmp_path / "w.pth")
    with pytest.raises(UserError) as e:
        load_teacher(LoadConfig(kind="official", path=str(tmp_path / "w.pth")))
    says(e, "width 40", "attention_heads")
    settings = LoadConfig(kind="official", path=str(tmp_path / "w.pth"), attention_heads=4, pos_offset=0.0, pos_antialias=True)
    close(load_teacher(settings).backbone(images(35)).cls, model(images(35)).cls)


def test_missing_official_files_say_where_they_are(tmp_path):
    for name, url in (
        ("dinov2_vitb14_pretrain.pth", "dinov2_vitb14/dinov2_vitb14_pretrain.pth"),
        ("dinov2_vits14_reg4_pretrain.pth", "dinov2_vits14/dinov2_vits14_reg4_pretrain.pth"),
        ("mine.pth", "dinov2_vitb14/dinov2_vitb14_pretrain.pth"),
    ):
        with pytest.raises(UserError) as e:
            load_teacher(LoadConfig(kind="official", path=str(tmp_path / name)))
        says(e, str(tmp_path / name), "is not there", f"https://dl.fbaipublicfiles.com/dinov2/{url}")
    with pytest.raises(UserError, match="is a folder"):
        load_teacher(LoadConfig(kind="official", path=str(tmp_path)))


class Unsafe:
    pass


WRONG_FILES: dict[str, Any] = {
    "text": (b"<html>404</html>", "damaged or no weights"),
    "empty": (b"", "cannot be read"),
    "code": ({"x": Unsafe()}, "would run code"),
    "list": ([1, 2], "holds list"),
    "no tensors": ({"epoch": 3}, "no tensors"),
    "another network": ({"conv1.weight": torch.zeros(3)}, "lacks cls_token and has conv1.weight"),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_wrong_official_files(tmp_path, kind):
    content, words = WRONG_FILES[kind]
    path = tmp_path / "w.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError) as e:
        load_teacher(LoadConfig(kind="official", path=str(path)))
    says(e, str(path), words)


def test_damaged_and_mismatched_official_weights(tmp_path):
    state = official_state(official_model())
    torch.save(state, tmp_path / "w.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:-900])
    save_tensors(tmp_path / "w.safetensors", state)
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-900])
    for name in ("half.pth", "half.safetensors"):
        with pytest.raises(UserError) as e:
            load_teacher(LoadConfig(kind="official", path=str(tmp_path / name)))
        says(e, name)
    changes = {
        "blocks.1.norm2.bias": lambda s: s.pop("blocks.1.norm2.bias"),
        "too much: head.weight": lambda s: s.update({"head.weight": torch.zeros(2)}),
        "blocks.2.mlp.fc1.weight (5, 128), not (512, 128)": lambda s: s.update(
            {"blocks.2.mlp.fc1.weight": torch.zeros(5, 128)}
        ),
        "no square": lambda s: s.update(pos_embed=torch.zeros(1, 12, 128)),
    }
    for words, change in changes.items():
        broken = dict(state)
        change(broken)
        torch.save(broken, tmp_path / "b.pth")
        with pytest.raises(UserError) as e:
            load_teacher(LoadConfig(kind="official", path=str(tmp_path / "b.pth")))
        says(e, "b.pth", words)


@torch.no_grad()
def test_official_golden_files(golden, tmp_path):
    """The reference's own weights and outputs, through a file."""
    import numpy as np

    for name in ("05_vit_mlp_reg0", "05_vit_swiglu_reg4"):
        with np.load(golden / f"{name}.npz", allow_pickle=False) as v:
            state = {k.removeprefix("in/w/"): torch.from_numpy(np.array(v[k])) for k in v.files if k.startswith("in/w/")}
            torch.save(state, tmp_path / "w.pth")
            heads = v["in/cfg/num_heads"].item()
            loaded = load_teacher(LoadConfig(kind="official", path=str(tmp_path / "w.pth"), attention_heads=heads))
            variant = "off0_aa" if "reg4" in name else "off0.1_noaa"
            variant = next(
                k.split("/")[1] for k in v.files if k.startswith("out/") and k.split("/")[1] in (variant, "off0.0_aa")
            )
            for size in {k.split("/")[2] for k in v.files if k.startswith(f"out/{variant}/")}:
                got = loaded.backbone(torch.from_numpy(np.array(v[f"in/x_{size}"])))
                want = torch.from_numpy(np.array(v[f"out/{variant}/{size}/x_norm_clstoken"]))
                torch.testing.assert_close(got.cls, want, rtol=0, atol=3e-5)


# ---- transformers


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("transformers")


def small_models(library) -> dict[str, Any]:
    two = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 56, "patch_size": 14}
    three = {**two, "image_size": 64, "patch_size": 16, "intermediate_size": 96, "num_register_tokens": 3}
    return {
        "dinov2": library.Dinov2Model(library.Dinov2Config(**two)),
        "dinov2-swiglu": library.Dinov2Model(library.Dinov2Config(**two, use_swiglu_ffn=True)),
        "dinov2-registers": library.Dinov2WithRegistersModel(
            library.Dinov2WithRegistersConfig(**two, num_register_tokens=2, use_swiglu_ffn=True)
        ),
        "dinov3": library.DINOv3ViTModel(library.DINOv3ViTConfig(**three)),
        "dinov3-gated": library.DINOv3ViTModel(library.DINOv3ViTConfig(**three, use_gated_mlp=True, hidden_act="silu")),
        "dinov3-plain": library.DINOv3ViTModel(
            library.DINOv3ViTConfig(
                **three | {"num_register_tokens": 0}, query_bias=False, value_bias=False, mlp_bias=False, rope_theta=50.0
            )
        ),
        "dinov3-convnext": library.DINOv3ConvNextModel(
            library.DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1])
        ),
    }


MODELS = ("dinov2", "dinov2-swiglu", "dinov2-registers", "dinov3", "dinov3-gated", "dinov3-plain", "dinov3-convnext")


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_transformers_folders(library, tmp_path, name):
    model = randomise(small_models(library)[name])
    model.save_pretrained(tmp_path / "hf")
    loaded = load_teacher(LoadConfig(kind="transformers", path=str(tmp_path / "hf")))
    again = through_a_folder(loaded, tmp_path / "model")
    native, prefix = model.config.image_size, 1 + (getattr(model.config, "num_register_tokens", 0) or 0)
    for h, w in ((native, native), (native // 2, native), (native * 3 // 2, native * 3 // 2)):
        x = images(h - h % loaded.backbone.patch, w)
        want = model(pixel_values=x).last_hidden_state
        for got in (loaded.backbone(x), again(x)):
            close(got.cls, want[:, 0])
            close(got.patches, want[:, prefix:])
    if "convnext" in name:
        return
    masks = some_masks((native // loaded.backbone.patch) ** 2)
    got, want = again(images(native), masks), model(pixel_values=images(native), bool_masked_pos=masks).last_hidden_state
    close(got.cls, want[:, 0])
    assert (got.cls - again(images(native)).cls).abs().max() > 1e-3


@torch.no_grad()
def test_module_names_of_transformers_5_and_classifiers(library, tmp_path):
    """A state_dict() taken in version 5 has other names than the files; a classifier holds the model behind a prefix."""
    model = randomise(small_models(library)["dinov2-swiglu"])
    model.save_pretrained(tmp_path)
    want = model(pixel_values=images(56)).pooler_output
    state = {f"dinov2.{k}": v for k, v in model.state_dict().items()} | {"classifier.weight": torch.zeros(2, 3)}
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    close(load_teacher(LoadConfig(kind="transformers", path=str(tmp_path))).backbone(images(56)).cls, want)


@torch.no_grad()
def test_shards_and_preprocessing(library, tmp_path):
    model = randomise(small_models(library)["dinov2"])
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    write_json(
        tmp_path / "preprocessor_config.json",
        {
            "size": {"shortest_edge": 60},
            "crop_size": {"height": 56, "width": 56},
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "resample": 2,
        },
    )
    loaded = load_teacher(LoadConfig(kind="transformers", path=str(tmp_path)))
    close(loaded.backbone(images(56)).cls, model(pixel_values=images(56)).pooler_output)
    assert loaded.preprocess == Preprocess(56, 60, "bilinear", "inception")
    write_json(tmp_path / "preprocessor_config.json", {"image_mean": [0.1, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]})
    with pytest.raises(UserError) as e:
        load_teacher(LoadConfig(kind="transformers", path=str(tmp_path)))
    says(e, "preprocessor_config.json", "image_mean")
    (tmp_path / "preprocessor_config.json").unlink()
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(UserError) as e:
        load_teacher(LoadConfig(kind="transformers", path=str(tmp_path)))
    says(e, shard.name, "is not there", "facebook/dinov2-base")


def test_wrong_transformers_folders(library, tmp_path):
    def fails(*words: str) -> None:
        with pytest.raises(UserError) as e:
            load_teacher(LoadConfig(kind="transformers", path=str(tmp_path)))
        says(e, str(tmp_path), *words)

    fails("no config.json", "facebook/dinov2-base", "facebook/dinov3-vits16-pretrain-lvd1689m")
    small_models(library)["dinov2"].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, words in (
        ({"model_type": "bert"}, "bert"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"layer_norm_eps": 1e-12}, "layer_norm_eps"),
        ({"hidden_size": 64, "num_attention_heads": 4}, "other shapes: cls_token"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"num_hidden_layers": 3}, "lacks blocks.2.norm1.weight"),
        ({"num_hidden_layers": 1}, "too much: blocks.1."),
        ({"image_size": [56, 28]}, "only squares"),
        ({"num_attention_heads": 5}, "dim 48 is not divisible by heads 5"),
    ):
        write_json(tmp_path / "config.json", config | change)
        fails(words)
    (tmp_path / "config.json").write_text("{")
    fails("not JSON")
    write_json(tmp_path / "config.json", config)
    (tmp_path / "model.safetensors").unlink()
    fails("no model.safetensors", "facebook/dinov2-base")


# ---- timm


TIMM: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("vit_tiny_patch16_224", {"depth": 2, "init_values": 1.0}, 224),
    "vit without a class token": ("vit_base_patch16_gap_224", {"depth": 1, "embed_dim": 48, "num_heads": 3}, 224),
    "deit, two tokens in front": ("deit_tiny_distilled_patch16_224", {"depth": 2}, 224),
    "siglip, attention pooling": ("vit_base_patch16_siglip_224", {"depth": 1, "embed_dim": 48, "num_heads": 3}, 224),
    "clip, norm in front": ("vit_base_patch32_clip_224", {"depth": 1, "embed_dim": 48, "num_heads": 3}, 224),
    "beit, norm after pooling": ("beit_base_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3}, 224),
    "eva, norm after pooling": ("eva_large_patch14_196", {"depth": 1, "embed_dim": 48, "num_heads": 3}, 196),
    "dinov3": ("vit_small_patch16_dinov3", {"depth": 2, "embed_dim": 48, "num_heads": 3}, 256),
    "efficientnet": ("tf_efficientnet_lite0", {}, 224),
    "resnet": ("resnet10t", {}, 176),
    "convnext": ("convnext_atto", {"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, 224),
    "swin, channels last": ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": [1, 1, 1, 1]}, 224),
}


@pytest.mark.parametrize("case", TIMM)
@torch.no_grad()
def test_timm_files(tmp_path, case):
    name, options, size = TIMM[case]
    model: Any = randomise(timm.create_model(name, **options))
    save_tensors(tmp_path / "w.safetensors", model.state_dict())
    loaded = load_teacher(LoadConfig(kind="timm", name=name, path=str(tmp_path / "w.safetensors"), options=options))
    again = through_a_folder(loaded, tmp_path / "model")
    x = images(size)
    maps = model.forward_features(x)
    if "norm after" in case:
        maps = model.fc_norm(maps)
    if maps.ndim == 4:
        maps = maps if "last" in case else maps.movedim(1, -1)
        patches, cls = maps.flatten(1, 2), maps.mean((1, 2))
        if "convnext" in case:
            norm = model.head.norm
            patches, cls = (
                nn.functional.layer_norm(t, norm.normalized_shape, norm.weight, norm.bias, norm.eps) for t in (patches, cls)
            )
            close(cls, model.forward_head(model.forward_features(x), pre_logits=True))
    else:
        patches = maps[:, model.num_prefix_tokens :]
        cls = maps[:, 0] if model.num_prefix_tokens else patches.mean(1)
    for got in (loaded.backbone(x), again(x)):
        close(got.cls, cls)
        close(got.patches, patches)
    assert again.dim == cls.shape[1]
    assert math.ceil(size / again.patch) ** 2 == patches.shape[1]


def test_timm_preprocessing_is_the_models_own(tmp_path):
    for name, want in (
        ("tf_efficientnet_lite0", Preprocess(224, 256, "bicubic", "inception")),
        ("resnet10t", Preprocess(176, 201, "bicubic", "imagenet")),
        ("vit_base_patch32_clip_224", Preprocess(224, 248, "bicubic", "clip")),
        ("mobilevit_xxs", Preprocess(256, 284, "bicubic", "none")),
    ):
        with torch.device("meta"):
            net: Any = timm.create_model(name)
        assert foreign.preprocess_of(net) == want
    net.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    with pytest.raises(UserError, match=r"mean \(0.1, 0.2, 0.3\)"):
        foreign.preprocess_of(net)


@torch.no_grad()
def test_official_weights_in_timm_and_another_resolution(tmp_path):
    """timm's own conversion is used where names or grids differ: DINOv2's file, resampled to 84 px."""
    options: dict[str, Any] = {"embed_dim": 128, "depth": 3, "num_heads": 2}
    torch.save(official_state(official_model()), tmp_path / "w.pth")
    settings = LoadConfig(
        kind="timm", name="vit_small_patch14_dinov2", path=str(tmp_path / "w.pth"), options=options, image_size=56
    )
    loaded = load_teacher(settings)
    assert loaded.preprocess.size == 56
    close(loaded.backbone(images(56)).patches, official_model()(images(56)).patches)
    larger = load_teacher(settings.model_copy(update={"image_size": 84}))
    close(larger.backbone(images(84)).cls, loaded.backbone(images(84)).cls)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_b0"])
@torch.no_grad()
def test_efficientnet_pytorchs_names(tmp_path, name):
    """Their file: blocks numbered through, batch norms counted from 0, squeeze-and-excitation without a module of its own."""
    model: Any = randomise(timm.create_model(name))
    numbers = {
        f"blocks.{s}.{i}": n
        for n, (s, i) in enumerate((s, i) for s, stage in enumerate(model.blocks) for i in range(len(stage)))
    }
    outside = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    inside = {
        "conv_pw": "_expand_conv",
        "bn1": "_bn0",
        "conv_dw": "_depthwise_conv",
        "bn2": "_bn1",
        "conv_pwl": "_project_conv",
        "bn3": "_bn2",
    }
    first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    squeeze = {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
    state = {}
    for key, value in model.state_dict().items():
        body, end = key.rsplit(".", 1)
        block, inner = ".".join(body.split(".")[:3]), ".".join(body.split(".")[3:])
        if block in numbers:
            table = (first if block.startswith("blocks.0") else inside) | squeeze
            state[f"_blocks.{numbers[block]}.{table[inner]}.{end}"] = value
        else:
            state[f"{outside[body]}.{end}"] = value
    torch.save(state, tmp_path / "w.pth")
    loaded = load_teacher(LoadConfig(kind="timm", name=name, path=str(tmp_path / "w.pth")))
    close(loaded.backbone(images(64)).cls, model.forward_head(model.forward_features(images(64)), pre_logits=True))


def test_timm_errors(tmp_path, monkeypatch):
    def fails(error: type[Exception], *words: str, **settings: Any) -> None:
        with pytest.raises(error) as e:
            load_teacher(LoadConfig(kind="timm", **settings))
        says(e, *words)

    path = str(tmp_path / "w.pth")
    fails(UserError, "is not there", "hub as timm/", name="resnet10t", path=path)
    torch.save(timm.create_model("resnet10t").state_dict(), path)
    fails(UserError, "no model 'resnet10x'", "resnet10t", name="resnet10x", path=path)
    fails(UserError, "cannot make resnet10t", "depht", name="resnet10t", path=path, options={"depht": 3})
    fails(UserError, "weights of mobilenetv3_small_050", "lacks net.", "and", name="mobilenetv3_small_050", path=path)
    fails(UserError, "vit_tiny_patch16_224", name="vit_tiny_patch16_224", path=path)

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    fails(EnvironmentFailed, "could not fetch the weights of resnet10t", "no route to host", name="resnet10t", pretrained=True)


# ---- runs and settings


def test_runs_and_model_folders(tmp_path):
    model = randomise(Backbone(BackboneConfig(dim=32, depth=1, heads=2, patch=8, image_size=32)))
    head = DINOHead(32, HeadConfig(prototypes=8, hidden=16, bottleneck=4))
    save_model(tmp_path / "run" / "teacher", model, Preprocess(32, 36, normalize="clip"), {"dino": head}, {"seed": 3})  # type: ignore[arg-type]
    for path in ("run", "run/teacher"):
        loaded = load_teacher(LoadConfig(kind="run", path=str(tmp_path / path)))
        assert torch.equal(loaded.backbone(images(32)).cls, model(images(32)).cls)
        assert list(loaded.heads) == ["dino"]
        assert loaded.preprocess.normalize == "clip"
        assert loaded.lineage["of"] == {"seed": 3}
    with pytest.raises(UserError, match="holds no model"):
        load_teacher(LoadConfig(kind="run", path=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "official"}, "path must say"),
        ({"kind": "timm", "path": "w.pth"}, "name must say"),
        ({"kind": "timm", "name": "resnet18"}, "needs either path"),
        ({"kind": "timm", "name": "resnet18", "path": "w", "pretrained": True}, "needs either path"),
        ({"kind": "run", "path": "r", "name": "resnet18"}, "name cannot be set for kind run: only timm reads it"),
        ({"kind": "transformers", "path": "r", "heads": "h"}, "heads cannot be set for kind transformers: only official"),
        (
            {"kind": "transformers", "path": "r", "pos_offset": 0.0},
            "pos_offset cannot be set for kind transformers: only official",
        ),
        ({"kind": "official", "path": "r", "pos_offset": 1.5}, "pos_offset"),
        ({"kind": "official", "path": "r", "attention_heads": 0}, "attention_heads"),
        ({"kind": "timm", "name": "resnet18", "path": "w", "options": {"img_size": 3}}, "options may not hold img_size"),
    ],
)
def test_settings_that_contradict_each_other(settings, words):
    config = LoadConfig(**settings)
    assert any(words in p for p in config.problems()), config.problems()
    with pytest.raises(UserError):
        load_teacher(config)


def test_settings_that_fit():
    assert LoadConfig(kind="official", path="w.pth", heads="h.pth", attention_heads=4).problems() == []
    assert LoadConfig(kind="timm", name="resnet18", pretrained=True).problems() == []
    assert "vitg14_reg4" in where(Path("dinov2_vitg14_reg4_pretrain.pth"))
