"""DINOv3 in transformers' format -> timm's networks: the ViTs (rotary positions, registers, no key bias, gated MLP) and the ConvNeXts.

timm has these architectures, so there is no second implementation here, only names.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.models.kinds import AnyBackbone, skeleton
from distill.models.names import Layout
from distill.models.state_files import fill
from distill.models.timm_backbone import TimmConfig

VIT = Layout(
    blocks="layer.",
    inside={
        "attn.proj.": "attention.o_proj.",
        "attn.q_bias": "attention.q_proj.bias",
        "attn.v_bias": "attention.v_proj.bias",
        "gamma_1": "layer_scale1.lambda1",
        "gamma_2": "layer_scale2.lambda1",
    },
    swiglu={"mlp.fc1_g.": "mlp.gate_proj.", "mlp.fc1_x.": "mlp.up_proj.", "mlp.fc2.": "mlp.down_proj."},
    mlp={"mlp.fc1.": "mlp.up_proj.", "mlp.fc2.": "mlp.down_proj."},
    outside={
        "cls_token": "embeddings.cls_token",
        "reg_token": "embeddings.register_tokens",
        "mask_token": "embeddings.mask_token",
        "patch_embed.proj.": "embeddings.patch_embeddings.",
    },
)
CONVNEXT = {
    "downsample_layers.": "downsample.",
    "depthwise_conv.": "conv_dw.",
    "layer_norm.": "norm.",
    "pointwise_conv1.": "mlp.fc1.",
    "pointwise_conv2.": "mlp.fc2.",
}


def read_vit(s: Any, state: dict[str, Tensor], path: Path) -> AnyBackbone:
    """`DINOv3ViTModel` -> timm's Eva with rotary positions.

    Args:
        s: the settings (transformers_format.Settings).
        state: tensors in transformers' names.
        path: their file, for sentences.

    Raises:
        UserError: a setting that timm's network does not have, or tensors that do not fit.
    """
    gated = bool(s.values.get("use_gated_mlp", False))
    fixed = (("key_bias", False), ("layer_norm_eps", 1e-5), ("hidden_act", "silu" if gated else "gelu"), ("num_channels", 3))
    for name, wanted in fixed:
        s.require(name, wanted)
    dim, depth = s.whole("hidden_size", 384), s.whole("num_hidden_layers", 12)
    bias = bool(s.values.get("query_bias", True) or s.values.get("value_bias", True))
    backbone = skeleton(
        TimmConfig(
            name="vit_small_patch16_dinov3",
            image_size=s.square("image_size", 224),
            patch=s.square("patch_size", 16),
            options={
                "embed_dim": dim,
                "depth": depth,
                "num_heads": s.whole("num_attention_heads", 6),
                "mlp_ratio": (s.whole("intermediate_size", 1536) + 0.5) / dim,  # timm floors dim * ratio
                "swiglu_mlp": gated,
                "swiglu_align_to": 8 if gated else 0,
                "num_reg_tokens": s.whole("num_register_tokens", 0, 0),
                "rope_temperature": s.positive("rope_theta", 100.0),
                "qkv_bias": bias,
            },
        )
    )
    wanted_names = backbone.state_dict()
    state = {k.removeprefix("model."): v for k, v in state.items()}
    merged: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith("attention.q_proj.weight"):
            parts = [state.get(name.replace("q_proj", p)) for p in ("q_proj", "k_proj", "v_proj")]
            merged[name.replace("attention.q_proj", "attn.qkv")] = torch.cat([p for p in parts if p is not None])
        elif not name.endswith(("attention.k_proj.weight", "attention.v_proj.weight")) and value.numel():
            merged[name] = value
    ours = {k if k == "mask_token" else f"net.{k}": v for k, v in VIT.rename(merged, gated, back=True).items()}
    if "mask_token" in ours:
        ours["mask_token"] = ours["mask_token"].reshape(1, -1)
    optional = {"query_bias": "attn.q_bias", "value_bias": "attn.v_bias", "proj_bias": "attn.proj.bias"}
    absent = [end for setting, end in optional.items() if s.values.get(setting) is False]
    absent += ["mlp.fc1.bias", "mlp.fc1_g.bias", "mlp.fc1_x.bias", "mlp.fc2.bias"] if s.values.get("mlp_bias") is False else []
    for name, value in wanted_names.items():
        if name not in ours and name.endswith(tuple(absent or ["\0"])):
            ours[name] = torch.zeros(value.shape)  # timm has no such switch
    fill(backbone, ours, path, f"the dinov3_vit model that {s.path.name} describes")
    return backbone


def read_convnext(s: Any, state: dict[str, Tensor], path: Path) -> AnyBackbone:
    """`DINOv3ConvNextModel` -> timm's ConvNeXt; the final norm is applied to the mean (CLS) and to every patch, as there."""
    for name, wanted in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-6), ("num_channels", 3)):
        s.require(name, wanted)
    options: Any = {
        "dims": s.values.get("hidden_sizes") or [96, 192, 384, 768],
        "depths": s.values.get("depths") or [3, 3, 9, 3],
    }
    backbone = skeleton(TimmConfig(name="convnext_tiny", options=options))
    ours = {}
    for name, value in state.items():
        name = name.removeprefix("model.")
        if name.startswith("layer_norm."):
            ours[name.replace("layer_norm.", "head_norm.")] = value
            continue
        for theirs, timms in CONVNEXT.items():
            name = name.replace(theirs, timms)
        name = name.replace("stages.0.downsample.", "stem.").replace(".layers.", ".blocks.")
        ours[f"net.{name}"] = value
    fill(backbone, ours, path, f"the dinov3_convnext model that {s.path.name} describes")
    return backbone
