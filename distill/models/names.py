"""What other libraries call the parameters of our ViT, both ways: DINOv2's own files, timm, transformers, MMPreTrain. At the end, one
way, EfficientNet-PyTorch's names.

Each layout is a table of prefixes; what is more than renaming (merged or split matrices, positions of registers) is in the functions.
Every function maps a state dict to a new one and copies no more than it must.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Prefixes of names, ours -> theirs.

    Attributes:
        blocks: what they call `blocks.`.
        inside: within a block; `swiglu` besides, where the feed-forward is SwiGLU, `mlp` where it is not.
        outside: everywhere else.
    """

    blocks: str = "blocks."
    inside: dict[str, str] = field(default_factory=dict)
    swiglu: dict[str, str] = field(default_factory=dict)
    mlp: dict[str, str] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)

    def rename(self, state: State, swiglu: bool, back: bool = False) -> State:
        """Every name in their form, or (`back`) in ours; what no prefix fits stays as it is."""
        inside = self.inside | (self.swiglu if swiglu else self.mlp)
        blocks, theirs = "blocks.", self.blocks
        outside = self.outside
        if back:
            inside, outside = ({v: k for k, v in table.items()} for table in (inside, outside))
            blocks, theirs = theirs, blocks
        renamed = {}
        for name, value in state.items():
            if name.startswith(blocks):
                number, rest = name[len(blocks) :].split(".", 1)
                renamed[f"{theirs}{number}.{_replaced(rest, inside)}"] = value
            else:
                renamed[_replaced(name, outside)] = value
        return renamed


def _replaced(name: str, prefixes: dict[str, str]) -> str:
    for prefix, other in prefixes.items():
        if name.startswith(prefix):
            return other + name[len(prefix) :]
    return name


OFFICIAL = Layout(swiglu={"mlp.fc1.": "mlp.w12.", "mlp.fc2.": "mlp.w3."})

# The names of the published files, which every version of the library reads (5.x renames them while loading).
TRANSFORMERS = Layout(
    blocks="encoder.layer.",
    inside={"attn.proj.": "attention.output.dense.", "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"},
    swiglu={"mlp.fc1.": "mlp.weights_in.", "mlp.fc2.": "mlp.weights_out."},
    outside={
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "register_tokens": "embeddings.register_tokens",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
        "norm.": "layernorm.",
    },
)
QKV = tuple(f"attention.attention.{part}." for part in ("query", "key", "value"))
# Module names of transformers 5, which a state_dict() taken there has.
TRANSFORMERS_5 = {
    "attention.q_proj.": QKV[0],
    "attention.k_proj.": QKV[1],
    "attention.v_proj.": QKV[2],
    "attention.o_proj.": "attention.output.dense.",
    "mlp.down_proj.": "mlp.weights_out.",
}
HALVES = ("mlp.gate_proj.", "mlp.up_proj.")

# After MMPreTrain's converters and modules (VisionTransformer, SwiGLUFFN, LayerScale); it knows neither masks nor registers.
MMPRETRAIN = Layout(
    blocks="backbone.layers.",
    inside={"norm1.": "ln1.", "norm2.": "ln2.", "ls1.gamma": "attn.gamma1.weight", "ls2.gamma": "ffn.gamma2.weight"},
    swiglu={"mlp.fc1.": "ffn.w12.", "mlp.fc2.": "ffn.w3."},
    mlp={"mlp.fc1.": "ffn.layers.0.0.", "mlp.fc2.": "ffn.layers.1."},
    outside={
        "cls_token": "backbone.cls_token",
        "pos_embed": "backbone.pos_embed",
        "patch_embed.proj.": "backbone.patch_embed.projection.",
        "norm.": "backbone.ln1.",
    },
)


def to_official(state: State, swiglu: bool) -> State:
    """Ours -> DINOv2's own (`blocks.0.attn.qkv.weight`, SwiGLU as w12 and w3)."""
    return OFFICIAL.rename(state, swiglu)


def from_official(state: State) -> State:
    """DINOv2's own -> ours. `blocks.<chunk>.<index>` of sharded training is flattened."""
    flat = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "blocks" and len(parts) > 3 and parts[1].isdigit() and parts[2].isdigit():
            del parts[1]
        flat[".".join(parts)] = value
    return OFFICIAL.rename(flat, is_swiglu(flat), back=True)


def is_swiglu(state: State) -> bool:
    """Whether an official state has SwiGLU feed-forwards."""
    return any(".mlp.w12." in name for name in state)


def to_timm(state: State) -> State:
    """Ours -> timm's `vit_*_patch14_dinov2` and `…_reg4_dinov2`.

    timm has no mask token, and with registers it holds the class token with its position already added.
    """
    out = {k: v for k, v in state.items() if k not in ("mask_token", "register_tokens")}
    if "register_tokens" in state:
        out["reg_token"] = state["register_tokens"]
        out["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        out["pos_embed"] = state["pos_embed"][:, 1:]
    return out


def from_timm(state: State) -> State:
    """timm's -> ours: the mask token is zero, and with registers so is the class token's position (it is in the token)."""
    out = {k: v for k, v in state.items() if k != "reg_token"}
    out["mask_token"] = torch.zeros_like(state["cls_token"][0])
    if "reg_token" in state:
        out["register_tokens"] = state["reg_token"]
        out["pos_embed"] = torch.cat([torch.zeros_like(state["cls_token"]), state["pos_embed"]], 1)
    return out


def to_transformers(state: State, swiglu: bool) -> State:
    """Ours -> `Dinov2Model` and `Dinov2WithRegistersModel`, names of the published files."""
    out = {}
    for name, value in TRANSFORMERS.rename(state, swiglu).items():
        if ".attn.qkv." in name:
            for part, third in zip(QKV, value.chunk(3), strict=True):
                out[name.replace("attn.qkv.", part)] = third.clone()  # safetensors writes no views
        else:
            out[name] = value
    return out


def from_transformers(state: State) -> State:
    """`Dinov2Model`'s names, of files or of version 5's modules, alone or inside a classifier -> ours."""
    old = {}
    for name, value in state.items():
        name = name.removeprefix("dinov2_with_registers.").removeprefix("dinov2.")
        if name.startswith("classifier."):
            continue
        head, _, rest = name.partition("encoder.layer.")
        number, _, inside = rest.partition(".")
        old[f"encoder.layer.{number}.{_replaced(inside, TRANSFORMERS_5)}" if not head and rest else name] = value
    merged: State = {}
    for name, value in old.items():
        for parts, whole in ((QKV, "attn.qkv."), (HALVES, "mlp.weights_in.")):
            if first := [p for p in parts if p in name]:
                target = name.replace(first[0], whole)
                pieces = [old.get(name.replace(first[0], p)) for p in parts]
                if target not in merged and all(p is not None for p in pieces):
                    merged[target] = torch.cat([p for p in pieces if p is not None])
                break
        else:
            merged[name] = value
    return TRANSFORMERS.rename(merged, any(".mlp.weights_in." in n for n in merged), back=True)


def to_mmpretrain(state: State, swiglu: bool) -> State:
    """Ours -> MMPreTrain's VisionTransformer inside a classifier. It has no mask token."""
    return MMPRETRAIN.rename({k: v for k, v in state.items() if k != "mask_token"}, swiglu)


def from_mmpretrain(state: State) -> State:
    """MMPreTrain's -> ours: the mask token is zero."""
    out = MMPRETRAIN.rename(state, any(".ffn.w12." in n for n in state), back=True)
    return out | {"mask_token": torch.zeros_like(out["cls_token"][0])}


EFFICIENTNET = {
    "_conv_stem.": "conv_stem.",
    "_bn0.": "bn1.",
    "_conv_head.": "conv_head.",
    "_bn1.": "bn2.",
    "_fc.": "classifier.",
}
SQUEEZE = {"_se_reduce.": "se.conv_reduce.", "_se_expand.": "se.conv_expand."}
EXPANDING = {
    "_expand_conv.": "conv_pw.",
    "_bn0.": "bn1.",
    "_depthwise_conv.": "conv_dw.",
    "_bn1.": "bn2.",
    "_project_conv.": "conv_pwl.",
    "_bn2.": "bn3.",
} | SQUEEZE
SEPARABLE = {"_depthwise_conv.": "conv_dw.", "_bn1.": "bn1.", "_project_conv.": "conv_pw.", "_bn2.": "bn2."} | SQUEEZE


def from_efficientnet_pytorch(state: State, stages: list[int]) -> State:
    """EfficientNet-PyTorch's names -> timm's.

    Args:
        stages: blocks of each stage of timm's network; theirs are numbered through.
    """
    places = [f"blocks.{stage}.{i}." for stage, n in enumerate(stages) for i in range(n)]
    out = {}
    for name, value in state.items():
        if not name.startswith("_blocks."):
            out[_replaced(name, EFFICIENTNET)] = value
            continue
        _, number, rest = name.split(".", 2)
        table = EXPANDING if f"_blocks.{number}._expand_conv.weight" in state else SEPARABLE
        place = places[int(number)] if int(number) < len(places) else f"blocks.{number}."
        out[place + _replaced(rest, table)] = value
    return out
