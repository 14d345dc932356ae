"""Any timm model by name as a backbone: Vision Transformers with masking, CNNs and the rest as they are.

Parameter names are timm's own behind `net.`; `mask_token` is ours (timm has none).

Shape legend: B batch, N patch tokens (h x w grid), T tokens with those in front, D width, H W pixels.
"""

import copy
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.config import Config
from distill.data.preprocess import FILTERS, Preprocess, kind_of
from distill.encoder import Features
from distill.errors import UserError

Option = bool | int | float | str | list[int]


class TimmConfig(Config):
    """A timm model by name.

    Attributes:
        name: such as `vit_small_patch16_224`, with or without the tag of its weights.
        image_size: resolution in pixels that positions are learned on; None is the model's own. ViTs take other sizes too.
        patch: side of a patch in pixels, where the model lets one choose; None is the model's own.
        drop_path: stochastic depth, rising linearly from 0 at the first block to this rate at the last (timm's rule).
        options: further arguments of timm's model, such as `{depth: 6, reg_tokens: 4}`.
    """

    kind: Literal["timm"] = "timm"
    name: str
    image_size: int | None = None
    patch: int | None = None
    drop_path: float = 0.0
    options: dict[str, Option] = Field(default_factory=dict)

    def problems(self) -> list[str]:
        import timm

        found = []
        if not timm.is_model(self.name):
            near = get_close_matches(self.name, timm.list_models(), 3)
            found.append(f"timm has no model {self.name!r}" + (f"; near: {', '.join(near)}" if near else ""))
        for field in ("image_size", "patch"):
            if (value := getattr(self, field)) is not None and value < 1:
                found.append(f"{field} must be at least 1, got {value}")
        if self.image_size and self.patch and self.image_size > 0 and self.patch > 0 and self.image_size % self.patch:
            found.append(f"image_size {self.image_size} is not a multiple of patch {self.patch}")
        if not 0 <= self.drop_path < 1:
            found.append(f"drop_path must be at least 0 and below 1, got {self.drop_path}")
        for option in sorted({"img_size", "patch_size", "num_classes", "pretrained", "drop_path_rate"} & set(self.options)):
            found.append(f"options may not hold {option}: use image_size, patch and drop_path")
        return found


class TimmBackbone(nn.Module):
    """images [B, 3, H, W] -> Features(cls [B, D], patches [B, N, D]).

    A ViT gives its class token and patch tokens after the final norm; tokens in front of the patches are dropped. A model without a
    class token gives the mean of its patches, a CNN its last map as patches and their mean (through the norm that ConvNeXt keeps in
    its head, where there is one). `patch` is the stride in pixels.

    Args:
        config: the model.
        net: the network, where it is there already (with timm's weights); by default it is made with fresh weights.

    Raises:
        UserError: timm has no such model, or it does not take these settings or give one map of features.
    """

    def __init__(self, config: TimmConfig, net: nn.Module | None = None):
        from timm.models.eva import Eva
        from timm.models.vision_transformer import VisionTransformer

        super().__init__()
        self.config = config
        self.net: Any = without_classifier(make_net(config) if net is None else net)
        # Those whose steps are known: anything that has changed them runs as a whole.
        own = type(self.net).forward_features
        self.is_vit = own is VisionTransformer.forward_features
        self.is_eva = own is Eva.forward_features and not getattr(self.net, "rope_mixed", False)
        self.prefix = getattr(self.net, "num_prefix_tokens", 0)
        self.has_cls = self.prefix > 0 and getattr(self.net, "cls_token", None) is not None
        self.recompute = False
        self.head_norm: Any = nn.Identity()
        if isinstance(norm := getattr(getattr(self.net, "head", None), "norm", None), nn.LayerNorm):
            self.net.head.norm, self.head_norm = nn.Identity(), norm
        blocks = getattr(self.net, "blocks", None)
        self.n_blocks = len(blocks) if isinstance(blocks, nn.Sequential | nn.ModuleList) else 1
        if self.steps_known:
            embed = self.net.patch_embed
            self.dim, self.patch = int(self.net.embed_dim), int(embed.feat_ratio(as_scalar=True))
            self.mask_token: nn.Parameter | None = nn.Parameter(torch.zeros(1, self.dim, device=device_of(self.net)))
        else:
            self.dim, self.patch = self._measure()
            self.mask_token = None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks of a Vision Transformer, for what treats them one by one; empty for other networks."""
        return self.net.blocks if self.steps_known else ()

    def train_with(self, recompute: bool, compiled: bool) -> None:
        """How it trains: keep only the blocks' inputs and run them again in the backward pass; blocks through torch.compile or not. A
        network that is no Vision Transformer does the first as timm does it, where it can, and is not compiled.
        """
        if self.steps_known:
            self.recompute = recompute
            for block in self.blocks if compiled else ():
                block.compile()
        elif recompute:
            self.net.set_grad_checkpointing(True)

    @property
    def steps_known(self) -> bool:
        """Whether this is a Vision Transformer whose input can be masked."""
        return self.is_vit or self.is_eva

    def _measure(self) -> tuple[int, int]:
        """(width, stride) of what the network gives for one image of its own size."""
        size = self.config.image_size or own_size(self.net)
        was, self.net = self.net.training, self.net.eval()
        with torch.no_grad():
            out = self._whole(torch.zeros(1, 3, size, size, device=device_of(self.net)))
        self.net.train(was)
        info, grid = getattr(self.net, "feature_info", None), round(out.patches.shape[1] ** 0.5)
        stride = info[-1].get("reduction") if isinstance(info, list) and info else None
        return out.patches.shape[2], int(stride or -(-size // grid))

    def forward(self, images: Float[Tensor, "b 3 H W"], masks: Bool[Tensor, "b n"] | None = None) -> Features:
        """`masks` marks the patches that the mask token replaces, before positions are added.

        Raises:
            UserError: masks for a network that cannot be masked.
        """
        if not self.steps_known:
            if masks is not None:
                raise UserError(
                    f"{self.config.name} cannot mask its input: only timm's Vision Transformers can. Turn masking off."
                )
            return self._whole(images)
        net = self.net
        x = net.patch_embed(images)  # [B, h, w, D] or [B, N, D]
        if masks is not None and self.mask_token is not None:
            x = torch.where(masks.reshape(*x.shape[:-1], 1), self.mask_token.to(x.dtype), x)
        if self.is_vit:
            x, more = net.patch_drop(net._pos_embed(x)), {}
        else:
            x, rope = net._pos_embed(x)
            more = {"rope": rope}
        x = net.norm_pre(x)
        for block in net.blocks:
            if self.recompute and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, **more)
            else:
                x = block(x, **more)
        return self._split(net.norm(x))

    def _whole(self, images: Tensor) -> Features:
        x = self.net.forward_features(images)
        if not isinstance(x, Tensor) or x.ndim not in (3, 4):
            raise UserError(f"{self.config.name} gives no single map of features; name a ViT or a CNN of timm.")
        if x.ndim == 3:
            return self._split(x)
        x_BDhw = x.movedim(-1, 1) if getattr(self.net, "output_fmt", "NCHW") == "NHWC" else x
        mean = x_BDhw.mean((2, 3), keepdim=True)
        return Features(self._normed(mean).flatten(1), self._normed(x_BDhw).flatten(2).transpose(1, 2))

    def _normed(self, x_BDhw: Tensor) -> Tensor:
        if isinstance(self.head_norm, nn.Identity):
            return x_BDhw
        norm = self.head_norm  # over channels, whichever axis its class expects them on
        return nn.functional.layer_norm(x_BDhw.movedim(1, -1), norm.normalized_shape, norm.weight, norm.bias, norm.eps).movedim(
            -1, 1
        )

    def _split(self, x_BTD: Tensor) -> Features:
        patches = x_BTD[:, self.prefix :]
        return Features(x_BTD[:, 0] if self.has_cls else patches.mean(1), patches)

    def at_size(self, size: int) -> "TimmBackbone":
        """A copy whose own resolution is `size`: positions are resampled once and for all."""
        other = copy.deepcopy(self)
        if self.steps_known:
            other.net.set_input_size(img_size=(size, size))
        return other


def make_net(config: TimmConfig, **more: Any) -> nn.Module:
    """timm's network without its classifier; `more` goes to timm's create_model.

    Raises:
        UserError: timm has no such model, or it does not take these settings.
    """
    import timm

    if problems := config.problems():
        raise UserError(f"{problems[0]}.")
    wanted: dict[str, Any] = {"num_classes": 0, **config.options, **more}
    wanted |= {"patch_size": config.patch} if config.patch else {}
    wanted |= {"drop_path_rate": config.drop_path} if config.drop_path else {}
    size: dict[str, Any] = {"img_size": config.image_size} if config.image_size else {}
    error: Exception | None = None
    # Models differ in what they take, and say so by a TypeError before anything is built.
    for extra in ({**size, "dynamic_img_size": True}, size, {}):
        try:
            return timm.create_model(config.name, **wanted, **extra)
        except TypeError as e:
            error = e
            if "unexpected keyword" not in str(e):
                break
        except (AssertionError, ValueError, RuntimeError, KeyError) as e:
            error = e
            break
    first = " ".join(str(error).split())[:200]
    raise UserError(f"timm cannot make {config.name} with these settings ({type(error).__name__}: {first}).") from error


def without_classifier(net: Any) -> Any:
    """Drop what comes after the features; a norm that timm applies after pooling is applied to every token instead."""
    if isinstance(getattr(net, "attn_pool", None), nn.Module):
        net.attn_pool = None
    after, norm = getattr(net, "fc_norm", None), getattr(net, "norm", None)
    if isinstance(after, nn.Module) and not isinstance(after, nn.Identity) and isinstance(norm, nn.Identity):
        net.norm, net.fc_norm = after, nn.Identity()
    return net


def own_size(net: Any) -> int:
    """The side in pixels that timm's weights expect."""
    return int(net.pretrained_cfg.get("input_size", (3, 224, 224))[-1])


def device_of(net: nn.Module) -> torch.device:
    return next(net.parameters()).device


def preprocess_of(net: Any, size: int | None = None) -> Preprocess:
    """How timm prepares images for these weights, at `size` pixels (default: their own).

    Raises:
        UserError: a mean and deviation that no kind has.
    """
    cfg = net.pretrained_cfg
    size = size or own_size(net)
    mean, std = cfg.get("mean", (0.0,) * 3), cfg.get("std", (1.0,) * 3)
    kind = kind_of(mean, std)
    if kind is None:
        raise UserError(
            f"{cfg.get('architecture', 'This model')} normalises by mean {tuple(mean)} and deviation {tuple(std)}, which is none of "
            "the kinds in distill/data/preprocess.py; add it to CONSTANTS there."
        )
    interpolation = cfg.get("interpolation", "bicubic")
    return Preprocess(
        size, int(size / cfg.get("crop_pct", 1.0)), interpolation if interpolation in FILTERS else "bicubic", kind
    )
