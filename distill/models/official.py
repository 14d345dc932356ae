"""DINOv2's own files: pretrained backbones, and full teacher checkpoints with their heads. Every measure is read off the tensors."""

import re
from pathlib import Path

import torch
from torch import Tensor

from distill.data.preprocess import Preprocess
from distill.errors import UserError
from distill.models.backbone import ARCHS, Backbone, BackboneConfig
from distill.models.heads import DINOHead, HeadConfig
from distill.models.kinds import skeleton
from distill.models.names import from_official, is_swiglu
from distill.models.state_files import fill, read_state

SITE = "https://dl.fbaipublicfiles.com/dinov2"
PUBLISHED = re.compile(r"dinov2_(vit[sblg]14)(_reg4)?_pretrain")
HEADS = {"dino_head.": "dino", "ibot_head.": "ibot"}
NEEDED = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight")


def where(path: Path) -> str:
    """Where DINOv2's files are to be had, as a sentence without its full stop."""
    match = PUBLISHED.search(path.name)
    if match:
        return f"DINOv2's authors publish it as {SITE}/dinov2_{match[1]}/{match[0]}.pth"
    return (
        f"DINOv2's weights are published as {SITE}/dinov2_vitb14/dinov2_vitb14_pretrain.pth, also vits14, vitl14, vitg14 and, with "
        "registers, dinov2_vitb14_reg4_pretrain.pth"
    )


def read_official(
    path: Path,
    heads: Path | None = None,
    attention_heads: int | None = None,
    pos_offset: float | None = None,
    pos_antialias: bool | None = None,
) -> tuple[Backbone, dict[str, DINOHead]]:
    """A backbone, and the heads that the file, or the file `heads`, holds (`dino`; `ibot` where it is not shared).

    Args:
        attention_heads: None: width / 64, as in all published models.
        pos_offset, pos_antialias: None: as published, 0.1 and plain; with registers 0 and antialiased.

    Raises:
        UserError: a file is missing, damaged, or holds something else.
    """
    parts = split(read_state(path, where(path)))
    config = infer_backbone(parts["backbone"], path, attention_heads, pos_offset, pos_antialias)
    backbone = skeleton(config)
    assert isinstance(backbone, Backbone)
    fill(backbone, from_official(parts["backbone"]), path, "DINOv2's ViT with these measures")
    source = path if heads is None else heads
    if heads is not None:
        parts = split(read_state(heads, where(heads)))
        if "dino" not in parts:
            raise UserError(f"{heads} holds no dino_head: it is no full teacher checkpoint of DINOv2.")
    return backbone, {n: _head(parts[n], backbone.dim, source, n) for n in HEADS.values() if n in parts}


def split(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The parts of a checkpoint: `backbone`, and `dino`, `ibot` where there are heads. Of a whole training state, the teacher's."""
    if any(k.startswith("teacher.") for k in state):
        state = {k.removeprefix("teacher."): v for k, v in state.items() if k.startswith("teacher.")}
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}}
    for name, value in state.items():
        for prefix, part in HEADS.items():
            if name.startswith(prefix):
                parts.setdefault(part, {})[name.removeprefix(prefix)] = value
                break
        else:
            parts["backbone"][name.removeprefix("backbone.")] = value
    return parts


def infer_backbone(
    official: dict[str, Tensor], path: Path, attention_heads: int | None, pos_offset: float | None, pos_antialias: bool | None
) -> BackboneConfig:
    """The config that these tensors belong to.

    Raises:
        UserError: they are no DINOv2 backbone.
    """
    state = from_official(official)
    if missing := [k for k in NEEDED if k not in state]:
        raise UserError(f"{path} is no DINOv2 backbone: it lacks {missing[0]} and has {', '.join(list(official)[:3])}, ...")
    dim, patch = state["patch_embed.proj.weight"].shape[0], state["patch_embed.proj.weight"].shape[-1]
    depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    patches = state["pos_embed"].shape[1] - 1
    grid = round(patches**0.5)
    if grid * grid != patches:
        raise UserError(f"{path} has positions for {patches} patches, which is no square.")
    if attention_heads is None and dim % 64:
        raise UserError(f"{path} has width {dim}, no multiple of 64: set attention_heads, which the file does not say.")
    shape = (dim, depth, attention_heads or dim // 64, "swiglu" if is_swiglu(official) else "mlp")
    return describe(
        shape,
        path,
        patch=patch,
        image_size=grid * patch,
        registers=registers,
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in state else 0.0,
        pos_offset=(0.0 if registers else 0.1) if pos_offset is None else pos_offset,
        pos_antialias=bool(registers) if pos_antialias is None else pos_antialias,
    )


def describe(shape: tuple[int, int, int, str], path: Path, **more: object) -> BackboneConfig:
    """A config by name where a named one has this shape (dim, depth, heads, feed-forward), else with its measures.

    Raises:
        UserError: the measures contradict each other.
    """
    for arch, known in ARCHS.items():
        if known == shape:
            return BackboneConfig.model_validate({"arch": arch, **more})
    dim, depth, heads, ffn = shape
    config = BackboneConfig.model_validate({"dim": dim, "depth": depth, "heads": heads, "ffn": ffn, **more})
    if problems := config.problems():
        raise UserError(f"{path} describes no ViT: {problems[0]}.")
    return config


def _head(state: dict[str, Tensor], dim: int, path: Path, name: str) -> DINOHead:
    """A projection head from tensors in official names; weight norm in its old or its parametrized form."""
    for old, new in (("original0", "weight_g"), ("original1", "weight_v")):
        state = {k.replace(f"last_layer.parametrizations.weight.{old}", f"last_layer.{new}"): v for k, v in state.items()}
    weights = sorted((k for k in state if k.startswith("mlp.") and k.endswith("weight")), key=lambda k: (len(k), k))
    if not weights or "last_layer.weight_v" not in state:
        raise UserError(f"{path} holds no whole {name}_head: it has {', '.join(list(state)[:3])}, ...")
    prototypes, bottleneck = state["last_layer.weight_v"].shape
    width = state[weights[0]].shape[1]
    if width != dim:
        raise UserError(f"{path} has a {name}_head for features of width {width}, and the backbone's are {dim} wide.")
    config = HeadConfig(
        prototypes=prototypes,
        hidden=state[weights[0]].shape[0] if len(weights) > 1 else HeadConfig().hidden,
        bottleneck=bottleneck,
        layers=len(weights),
        bias=weights[0].replace("weight", "bias") in state,
    )
    with torch.device("meta"):
        head = DINOHead(dim, config)
    fill(head, state, path, f"a {name}_head with these measures")
    return head


def published_preprocess(config: BackboneConfig) -> Preprocess:
    """DINOv2's evaluation: shorter side to 256, centre 224, ImageNet's normalisation; scaled down for smaller models."""
    side = min(224, config.image_size) // config.patch * config.patch
    return Preprocess(side, round(side * 256 / 224), "bicubic", "imagenet")
