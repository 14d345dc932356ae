"""The Vision Transformer of DINOv2, assembled from timm's parts, with masking, registers and exact position resampling.

Parameter names are the official ones (`cls_token`, `pos_embed`, `blocks.0.attn.qkv.weight`, ...) except that timm calls the SwiGLU
matrices `fc1`/`fc2` where DINOv2 says `w12`/`w3`; `names.py` maps them.

Shape legend: B batch, N patch tokens (h x w grid), R register tokens, T = 1 + R + N, D width, H W pixels.
"""

import copy
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from distill.cast_cache import CastCache
from distill.config import Config
from distill.encoder import Features

# dim, depth, heads, feed-forward (METHOD: DINOv2 paper table 16; the paper's "18 blocks" for ViT-B is a misprint, 12 is right).
ARCHS: dict[str, tuple[int, int, int, str]] = {
    "vit_small": (384, 12, 6, "mlp"),
    "vit_base": (768, 12, 12, "mlp"),
    "vit_large": (1024, 24, 16, "mlp"),
    "vit_giant": (1536, 40, 24, "swiglu"),
}


class BlockWidths(Config):
    """One block of a pruned network: its attention heads, and the width inside its feed-forward (of a SwiGLU: of either half)."""

    heads: int
    hidden: int


class BackboneConfig(Config):
    """A ViT by name, with every measure open to override.

    Attributes:
        kind: tells this network from the others that `kinds.py` lists.
        arch: the named shape that the other fields start from.
        patch: side of a patch in pixels.
        image_size: the resolution whose grid the position embedding is learned on; other sizes are resampled.
        dim, depth, heads, ffn: overrides of the named shape. SwiGLU's hidden width is 2/3 of the MLP's, rounded up to 8.
        head_dim: width of a head; null: dim / heads.
        blocks: widths of every block, for a pruned network; their number is the depth. Needs `head_dim`, since a network that lost heads
            or width no longer divides into heads.
        registers: number of register tokens (arXiv 2309.16588).
        drop_path: stochastic depth, one rate for all blocks; drops whole samples and saves their compute.
        layer_scale: initial LayerScale gamma. 1e-5 suits long schedules; short ones on small data need about 1.
        init: `dinov2` (truncated normal, deviation 0.02) or `fan_in` (deviation 1/sqrt(fan-in); small widths start far too small at 0.02).
        pos_offset, pos_antialias: how positions are resampled; 0.1 and off are DINOv2's (they shift the coordinates: see `position`).
    """

    kind: Literal["vit"] = "vit"
    arch: Literal["vit_small", "vit_base", "vit_large", "vit_giant"] = "vit_small"
    patch: int = 14
    image_size: int = 224
    dim: int | None = None
    depth: int | None = None
    heads: int | None = None
    ffn: Literal["mlp", "swiglu"] | None = None
    head_dim: int | None = None
    blocks: list[BlockWidths] | None = None
    registers: int = 0
    drop_path: float = 0.0
    layer_scale: float = 1e-5
    init: Literal["dinov2", "fan_in"] = "dinov2"
    pos_offset: float = 0.1
    pos_antialias: bool = False

    def shape(self) -> tuple[int, int, int, str]:
        """(dim, depth, heads, feed-forward kind) after overrides; of a pruned network the heads of the block that has most."""
        dim, depth, heads, ffn = ARCHS[self.arch]
        dim = dim if self.dim is None else self.dim
        depth = depth if self.depth is None else self.depth
        heads = heads if self.heads is None else self.heads
        if self.blocks:
            depth, heads = len(self.blocks), max(b.heads for b in self.blocks)
        return dim, depth, heads, self.ffn or ffn

    def widths(self) -> list[BlockWidths]:
        """Of every block, pruned or not."""
        if self.blocks is not None:
            return self.blocks
        _, depth, heads, _ = self.shape()
        return [BlockWidths(heads=heads, hidden=self.hidden())] * depth

    def head_width(self) -> int:
        dim, _, heads, _ = self.shape()
        return dim // heads if self.head_dim is None else self.head_dim

    def regular(self) -> bool:
        """Whether dim, depth, heads and ffn say everything, as other libraries' configurations of a ViT take it."""
        dim, depth, heads, _ = self.shape()
        alike = self.widths() == [BlockWidths(heads=heads, hidden=self.hidden())] * depth
        return alike and heads * self.head_width() == dim

    def hidden(self) -> int:
        """Width inside the feed-forward where `blocks` does not say it: 4 D, or for SwiGLU 2/3 of it rounded up to a multiple of 8."""
        dim, _, _, ffn = self.shape()
        return 4 * dim if ffn == "mlp" else (int(4 * dim * 2 / 3) + 7) // 8 * 8

    def problems(self) -> list[str]:
        """What contradicts itself in these settings, one sentence each."""
        dim, _, heads, _ = self.shape()
        found = []
        if min(self.patch, self.image_size, *self.shape()[:3]) < 1:
            found.append("patch, image_size, dim, depth and heads must be at least 1")
        elif self.image_size % self.patch:
            found.append(f"image_size {self.image_size} is not a multiple of patch {self.patch}")
        if heads >= 1 and dim % heads and self.head_dim is None and self.blocks is None:
            found.append(f"dim {dim} is not divisible by heads {heads}")
        if self.head_dim is not None and self.head_dim < 1:
            found.append(f"head_dim must be at least 1, got {self.head_dim}")
        found += self._block_problems()
        if not 0 <= self.pos_offset < 1:
            found.append(f"pos_offset must be at least 0 and below 1, got {self.pos_offset}")
        if self.registers < 0:
            found.append(f"registers must be at least 0, got {self.registers}")
        if not 0 <= self.drop_path < 1:
            found.append(f"drop_path must be at least 0 and below 1, got {self.drop_path}")
        return found

    def _block_problems(self) -> list[str]:
        if self.blocks is None:
            return []
        if not self.blocks:
            return ["blocks must name at least one block"]
        found = []
        if self.head_dim is None:
            found.append("blocks needs head_dim: heads of a pruned network keep the width that they had")
        if self.heads is not None:
            found.append("heads contradicts blocks, which says the heads of every block: leave it out")
        if self.depth not in (None, len(self.blocks)):
            found.append(f"depth {self.depth} contradicts blocks, which names {len(self.blocks)}")
        for i, b in enumerate(self.blocks):
            if min(b.heads, b.hidden) < 1:
                found.append(f"blocks[{i}] must have at least 1 head and 1 hidden unit, got {b.heads} and {b.hidden}")
        return found


class Backbone(nn.Module):
    """images [B, 3, H, W] -> Features(cls [B, D], patches [B, N, D]), both after the final LayerNorm.

    H and W may be any multiples of the patch.
    """

    def __init__(self, config: BackboneConfig):
        # Here, because timm takes a second and more to import, and a plan needs only the sizes.
        from timm.layers.mlp import SwiGLUPacked
        from timm.models.vision_transformer import Mlp, VisionTransformer

        from distill.models.blocks import Block, set_widths

        super().__init__()
        dim, depth, heads, ffn = config.shape()
        mlp: Any = SwiGLUPacked if ffn == "swiglu" else Mlp
        hidden = config.hidden() * (2 if ffn == "swiglu" else 1)
        vit = VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch,
            num_classes=0,
            global_pool="",
            embed_dim=dim,
            depth=depth,
            num_heads=heads if dim % heads == 0 else 1,  # timm refuses what `set_widths` is going to put right
            mlp_ratio=(hidden + 0.5) / dim,  # timm floors dim * ratio: the half keeps rounding out of it
            init_values=config.layer_scale,
            dynamic_img_size=True,
            act_layer=nn.SiLU if ffn == "swiglu" else nn.GELU,  # timm hands it to the packed SwiGLU as the gate
            mlp_layer=mlp,
            block_fn=Block,
            weight_init="skip",
        )
        if not config.regular():
            for whole, widths in zip(vit.blocks, config.widths(), strict=True):
                set_widths(whole, dim, widths.heads, config.head_width(), widths.hidden, ffn)
        self.config = config
        self.dim, self.patch, self.n_blocks = dim, config.patch, depth
        self.patch_embed, self.blocks, self.norm = vit.patch_embed, vit.blocks, vit.norm
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (config.image_size // config.patch) ** 2, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, config.registers, dim)) if config.registers else None
        self.cast = CastCache()
        block: Any
        for block in self.blocks:
            block.drop_rate, block.recompute, block.plain, block.cast = config.drop_path, False, False, self.cast
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                if self.config.init == "fan_in":
                    nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                elif isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None and (self.config.init == "fan_in" or isinstance(module, nn.Linear)):
                    nn.init.zeros_(module.bias)

    def train_with(self, recompute: bool, compiled: bool) -> None:
        """How blocks train: keep only their inputs and run them again in the backward pass, and through torch.compile or not."""
        block: Any
        for block in self.blocks:
            block.recompute, block.plain = recompute, compiled
            if compiled:
                block.compile()

    def position(self, h: int, w: int) -> Float[Tensor, "1 n d"]:
        """Position embedding [1, 1 + h*w, D] for a grid of h x w patches.

        With `pos_offset` o the factor (h + o)/M is handed to the resampler and used for the source coordinates, as DINOv2 does;
        with 0 the output size decides (h/M exactly). Computed in float32.
        """
        native = self.pos_embed.shape[1] - 1
        m = round(native**0.5)
        if h * w == native and h == w:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].float().reshape(1, m, m, self.dim).permute(0, 3, 1, 2)
        antialias = self.config.pos_antialias
        if (o := self.config.pos_offset) > 0:
            factors = ((h + o) / m, (w + o) / m)
            grid = F.interpolate(grid, scale_factor=factors, mode="bicubic", antialias=antialias)
        else:
            grid = F.interpolate(grid, size=(h, w), mode="bicubic", antialias=antialias)
        assert grid.shape[-2:] == (h, w)
        patches = grid.permute(0, 2, 3, 1).reshape(1, h * w, self.dim).to(self.pos_embed.dtype)
        return torch.cat([self.pos_embed[:, :1], patches], 1)

    def tokens(self, images: Float[Tensor, "b 3 H W"], masks: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b t d"]:
        """Embed: patches (masked ones replaced by the mask token), CLS in front, + position, registers after CLS. [B, T, D]."""
        b, _, height, width = images.shape
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"Images of {height} x {width} px do not divide into patches of {self.patch} px; resize to a multiple."
            )
        x_BND = self.patch_embed(images).flatten(1, 2)  # timm gives B h w D
        if masks is not None:
            x_BND = torch.where(masks[..., None], self.mask_token.to(x_BND.dtype), x_BND)
        x_BTD = torch.cat([self.cls_token.expand(b, -1, -1), x_BND], 1)
        x_BTD = x_BTD + self.position(height // self.patch, width // self.patch)
        if self.register_tokens is not None:
            x_BTD = torch.cat([x_BTD[:, :1], self.register_tokens.expand(b, -1, -1), x_BTD[:, 1:]], 1)
        return x_BTD

    def forward(self, images: Float[Tensor, "b 3 H W"], masks: Bool[Tensor, "b n"] | None = None) -> Features:
        x_BTD = self.tokens(images, masks)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.split(self.norm(x_BTD))

    def at_size(self, size: int) -> "Backbone":
        """A copy whose own resolution is `size` pixels: its positions are resampled once and for all."""
        other = copy.deepcopy(self)
        grid = size // self.patch
        other.pos_embed = nn.Parameter(self.position(grid, grid).detach().clone(), self.pos_embed.requires_grad)
        other.config = self.config.model_copy(update={"image_size": size})
        return other

    def split(self, x_BTD: Float[Tensor, "b t d"]) -> Features:
        """[B, T, D] -> CLS and patches; registers are dropped."""
        return Features(x_BTD[:, 0], x_BTD[:, 1 + self.config.registers :])

    def intermediate(self, images: Float[Tensor, "b 3 H W"], layers: list[int], norm: bool = True) -> list[Features]:
        """Features after the named blocks (0 is the first), each through the final norm unless told otherwise."""
        x_BTD, found = self.tokens(images), []
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD)
            if i in layers:
                found.append(self.split(self.norm(x_BTD) if norm else x_BTD))
        return found


def parameter_count(config: BackboneConfig, mask_token: bool = True) -> int:
    """Trainable parameters, by formula (a test holds it to the model); without the mask token the count is that of the published
    inference models.
    """
    dim, depth, _, ffn = config.shape()
    total = 0
    for widths in config.widths():
        inner, hidden = widths.heads * config.head_width(), widths.hidden
        total += 4 * dim * inner + 3 * inner + dim
        total += dim * hidden * (3 if ffn == "swiglu" else 2) + hidden * (2 if ffn == "swiglu" else 1) + dim
    total += depth * (4 * dim + 2 * dim * bool(config.layer_scale))
    tokens = 1 + 1 + (config.image_size // config.patch) ** 2 + config.registers + bool(mask_token)  # CLS, its position, ...
    return 3 * config.patch**2 * dim + dim + tokens * dim + total + 2 * dim


def flops_per_image(config: BackboneConfig, size: int) -> int:
    """Floating-point operations (2 per multiply-add) of matrix products in one forward pass at size x size pixels."""
    dim, _, _, ffn = config.shape()
    n = (size // config.patch) ** 2
    t = n + 1 + config.registers
    inner = sum(b.heads for b in config.widths()) * config.head_width()
    hidden = sum(b.hidden for b in config.widths())
    blocks = t * (4 * dim * inner + (3 if ffn == "swiglu" else 2) * dim * hidden) + 2 * t * t * inner
    return 2 * (n * 3 * config.patch**2 * dim + blocks)
