"""Our models in the formats of other libraries: DINOv2's own files, timm, transformers, MMPreTrain.

The outputs are ours at the native resolution. At others each library resamples positions in its own way; where that differs from how
the model was trained, `export_weights` says so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.data.preprocess import CONSTANTS, Preprocess
from distill.errors import UserError
from distill.files import replacing, write_json
from distill.models.backbone import BackboneConfig
from distill.models.checkpoints import load_backbone, load_heads, load_preprocess, save_tensors
from distill.models.heads import DINOHead
from distill.models.kinds import AnyBackbone
from distill.models.names import to_mmpretrain, to_official, to_timm, to_transformers
from distill.models.timm_backbone import TimmBackbone, own_size

FILES = (".pth", ".safetensors")
RESAMPLE = {"lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers
# How each resamples positions, (offset, antialias), without and with registers.
RESAMPLING: dict[tuple[str, bool], tuple[float, bool]] = {
    ("timm", False): (0.0, True),
    ("timm", True): (0.0, True),
    ("transformers", False): (0.0, False),
    ("transformers", True): (0.0, True),
    ("mmpretrain", False): (0.0, False),
}


Output = tuple[list[Path], str]  # files, and the line that loads them


@dataclass(frozen=True)
class Written:
    """What `export_weights` wrote: the files, a line of Python that loads them, and what a user should know."""

    files: list[Path]
    load: str
    notes: list[str]


@dataclass(frozen=True)
class Model:
    """A model folder, read. `state` is the backbone's; `heads` only those that are to be written."""

    backbone: AnyBackbone
    state: dict[str, Tensor]
    heads: dict[str, DINOHead]
    preprocess: Preprocess


def export_weights(folder: Path, to: str, out: Path, heads: bool = False) -> Written:
    """Write the model of `folder` in another library's format.

    Args:
        to: `official` (a file that DINOv2's ViT loads), `timm` (a file, or a folder for `timm.create_model("local-dir:...")`),
            `transformers` (a folder for `from_pretrained`), `mmpretrain` (a file for its VisionTransformer).
        out: where. A name that ends with .pth or .safetensors is a file, any other a folder.
        heads: with `official`, a full teacher checkpoint: backbone, dino_head, ibot_head.

    Raises:
        UserError: no model there, or one that this format cannot hold.
    """
    if to not in WRITERS:
        raise UserError(f"No format is called {to!r}; known are {', '.join(WRITERS)}.")
    backbone = load_backbone(folder)
    wanted = load_heads(folder, backbone.dim) if heads else {}
    if heads and (to != "official" or not wanted):
        why = f"{folder} has none" if to == "official" else f"{to} has no place for them"
        raise UserError(f"The heads cannot be written: {why}.")
    if isinstance(backbone, TimmBackbone) and to != "timm":
        raise UserError(f"{folder} holds timm's {backbone.config.name}, which can go to timm only.")
    if isinstance(backbone.config, BackboneConfig) and not backbone.config.regular():
        raise UserError(f"{folder} was pruned to blocks of different widths, which no other library's Vision Transformer has.")
    is_file = out.suffix in FILES
    if is_file and to == "transformers":
        raise UserError(f"{out} names a file, and transformers reads folders: name a folder.")
    if not is_file and to in ("official", "mmpretrain"):
        raise UserError(f"{out} must end with {' or '.join(FILES)} for {to}.")
    if heads and out.suffix != ".pth":
        raise UserError(f"{out} must end with .pth: DINOv2's teacher checkpoints are of that kind.")
    model = Model(backbone, full_state(backbone), wanted, load_preprocess(folder))
    files, load = WRITERS[to](model, out)
    return Written(files, load, [*normalisation_notes(model.preprocess), *resampling_notes(backbone, to)])


def full_state(backbone: AnyBackbone) -> dict[str, Tensor]:
    """The backbone's tensors; a ViT of ours without LayerScale gets one that changes nothing, since the other libraries' have it."""
    state = dict(backbone.state_dict())
    config = backbone.config
    if isinstance(config, BackboneConfig) and not config.layer_scale:
        dim, depth, _, _ = config.shape()
        state |= {f"blocks.{i}.{ls}.gamma": torch.ones(dim) for i in range(depth) for ls in ("ls1", "ls2")}
    return state


def resampling_notes(backbone: AnyBackbone, to: str) -> list[str]:
    """A sentence where the other library would give other features away from the native resolution."""
    config = backbone.config
    if not isinstance(config, BackboneConfig) or to == "official":  # there the settings are part of the line that loads it
        return []
    offset, antialias = RESAMPLING[to, bool(config.registers)]
    if (offset, antialias) == (config.pos_offset, config.pos_antialias):
        return []
    return [
        f"The features are ours at {config.image_size} px. At other sizes {to} resamples positions with offset {offset} and "
        f"antialias {antialias}; here it is offset {config.pos_offset} and antialias {config.pos_antialias}."
    ]


def normalisation_notes(preprocess: Preprocess) -> list[str]:
    """A sentence where the images need something that no mean and deviation can say."""
    if preprocess.normalize in (*CONSTANTS, "none"):
        return []
    return [
        f"This model's images are normalised by {preprocess.normalize!r}, which these formats cannot say: do it before the model."
    ]


def is_swiglu(config: BackboneConfig) -> bool:
    return config.shape()[3] == "swiglu"


def vit(model: Model) -> BackboneConfig:
    config = model.backbone.config
    assert isinstance(config, BackboneConfig)
    return config


def write_official(model: Model, out: Path) -> Output:
    """The file of DINOv2's hub, or with heads its training's teacher checkpoint."""
    config = vit(model)
    state = to_official(model.state, is_swiglu(config))
    if model.heads:
        full = {f"backbone.{k}": v for k, v in state.items()}
        for name, head in model.heads.items():
            full |= {f"{name}_head.{k}": v for k, v in head.state_dict().items()}
        _save(out, {"teacher": full})
    else:
        _save(out, state)
    settings = (
        f"img_size={config.image_size}, patch_size={config.patch}, init_values=1.0, num_register_tokens={config.registers}"
    )
    settings += f", ffn_layer={'swiglufused' if is_swiglu(config) else 'mlp'!r}, block_chunks=0"
    settings += f", interpolate_offset={config.pos_offset}, interpolate_antialias={config.pos_antialias}"
    dim, depth, n, _ = config.shape()
    load = f"dinov2.models.vision_transformer.DinoVisionTransformer(embed_dim={dim}, depth={depth}, num_heads={n}, {settings})"
    return [out], load


def timm_arguments(backbone: AnyBackbone) -> tuple[str, dict[str, Any]]:
    """timm's name of the architecture, and what its create_model must be told besides."""
    config = backbone.config
    if not isinstance(config, BackboneConfig):
        given = {"img_size": config.image_size, "patch_size": config.patch, **config.options}
        return config.name.split(".")[0], {k: v for k, v in given.items() if v is not None}
    dim, depth, heads, _ = config.shape()
    size = "giant" if is_swiglu(config) else {384: "small", 768: "base", 1024: "large"}.get(dim, "small")
    name = f"vit_{size}_patch14{'_reg4' if config.registers else ''}_dinov2"
    wanted: dict[str, Any] = {
        "img_size": config.image_size,
        "patch_size": config.patch,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
    }
    if is_swiglu(config):
        wanted["mlp_ratio"] = (2 * config.hidden() + 0.5) / dim  # both halves of the packed SwiGLU; timm floors dim * ratio
    if config.registers not in (0, 4):
        wanted["reg_tokens"] = config.registers
    named = {  # timm's own widths
        "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "giant": (1536, 40, 24),
    }[size]  # fmt: skip
    defaults = dict(zip(("embed_dim", "depth", "num_heads"), named, strict=True)) | {"patch_size": 14, "img_size": 518}
    if named == (dim, depth, heads):
        wanted.pop("mlp_ratio", None)
    return name, {k: v for k, v in wanted.items() if v != defaults.get(k)}


def timm_state(backbone: TimmBackbone, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors under timm's names, and the arguments with which timm's network has exactly these.

    Raises:
        UserError: no arguments do.
    """
    import timm

    name, arguments = timm_arguments(backbone)
    state = {k.removeprefix("net.").replace("head_norm.", "head.norm."): v for k, v in state.items() if k != "mask_token"}
    # Without pooling timm makes no attention pool, and keeps the final norm before the pooling, as here.
    for whole in (arguments, arguments | {"global_pool": ""}):
        try:
            with torch.device("meta"):
                net = timm.create_model(name, num_classes=0, **whole)
        except (TypeError, AssertionError, ValueError):
            continue
        if net.state_dict().keys() == state.keys():
            return state, whole
    raise UserError(f"timm's {name} has parts that this model has lost; its weights cannot go back to timm.")


def write_timm(model: Model, out: Path) -> Output:
    """A state dict for timm's model, or with config.json the folder that `local-dir:` reads."""
    name, arguments = timm_arguments(model.backbone)
    fixed = True
    if isinstance(model.backbone, TimmBackbone):
        fixed = bool(model.backbone.net.pretrained_cfg.get("fixed_input_size"))  # timm then makes the model for input_size
        state, arguments = timm_state(model.backbone, model.state)
        size = model.backbone.config.image_size or own_size(model.backbone.net)
    else:
        state, size = to_timm(model.state), vit(model).image_size
    if out.suffix in FILES:
        _save(out, state)
        more = "".join(f", {k}={v!r}" for k, v in arguments.items())
        return [out], f"timm.create_model({name!r}, num_classes=0{more}).load_state_dict(...)"
    save_tensors(out / "model.safetensors", state, {"format": "pt"})
    p = model.preprocess
    mean, std = CONSTANTS.get(p.normalize, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": model.backbone.dim,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": fixed,
            "crop_pct": p.size / p.resize,
            "interpolation": p.interpolation,
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
        },
    }
    write_json(out / "config.json", config)
    load = f"timm.create_model('local-dir:{out}', pretrained=True)"
    return [out / "config.json", out / "model.safetensors"], load


def write_transformers(model: Model, out: Path) -> Output:
    """config.json, model.safetensors and preprocessor_config.json for `Dinov2Model` or `Dinov2WithRegistersModel`."""
    config, p = vit(model), model.preprocess
    dim, depth, heads, _ = config.shape()
    kind, name = ("dinov2_with_registers", "Dinov2WithRegistersModel") if config.registers else ("dinov2", "Dinov2Model")
    settings: dict[str, Any] = {
        "architectures": [name],
        "model_type": kind,
        "hidden_size": dim,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": config.image_size,
        "patch_size": config.patch,
        "num_channels": 3,
        "qkv_bias": True,
        "layerscale_value": 1.0,
        "use_swiglu_ffn": is_swiglu(config),
        "dtype": "float32",
    }
    settings |= {"num_register_tokens": config.registers} if config.registers else {}
    save_tensors(out / "model.safetensors", to_transformers(model.state, is_swiglu(config)), {"format": "pt"})
    mean, std = CONSTANTS.get(p.normalize, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": p.resize},
        "resample": RESAMPLE[p.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": p.size, "width": p.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": p.normalize in CONSTANTS,
        "image_mean": list(mean),
        "image_std": list(std),
        "do_convert_rgb": True,
    }
    write_json(out / "preprocessor_config.json", processor)
    write_json(out / "config.json", settings)
    files = [out / n for n in ("config.json", "model.safetensors", "preprocessor_config.json")]
    return files, f"transformers.{name}.from_pretrained('{out}')"


def write_mmpretrain(model: Model, out: Path) -> Output:
    """A checkpoint of MMPreTrain's ImageClassifier without a head."""
    config = vit(model)
    if config.registers:
        raise UserError("MMPreTrain's VisionTransformer has no registers, and this model has. Name another format.")
    dim, depth, heads, _ = config.shape()
    state = to_mmpretrain(model.state, is_swiglu(config))
    _save(out, state if out.suffix == ".safetensors" else {"state_dict": state})
    arch = {"embed_dims": dim, "num_layers": depth, "num_heads": heads, "feedforward_channels": 4 * dim}
    swiglu = ", layer_cfgs=dict(ffn_type='swiglu_fused')" if is_swiglu(config) else ""
    load = f"VisionTransformer(arch={arch}, img_size={config.image_size}, patch_size={config.patch}, layer_scale_init_value=1.0{swiglu})"
    return [out], load


WRITERS: dict[str, Callable[[Model, Path], Output]] = {
    "official": write_official,
    "timm": write_timm,
    "transformers": write_transformers,
    "mmpretrain": write_mmpretrain,
}


def _save(path: Path, value: dict[str, Any]) -> None:
    """Tensors in a file, whole or not at all: safetensors, or torch's format that `weights_only` reads."""
    if path.suffix == ".safetensors":
        save_tensors(path, value, {"format": "pt"})
        return
    with replacing(path) as part:
        torch.save(_own_memory(value), part)


def _own_memory(value: Any) -> Any:
    """Tensors alone, each with its own memory (a view would drag its whole base into the file)."""
    return {k: _own_memory(v) for k, v in value.items()} if isinstance(value, dict) else value.detach().cpu().clone()
