"""Which slices of which parameters belong together when a unit is cut, as torch-pruning's dependency graph finds them.

    heads    rows of qkv (of q, k and v alike) and columns of proj
    hidden   rows of fc1 (of both halves of a SwiGLU) and columns of fc2
    dim      a channel of the residual stream: patch embedding, positions, CLS, mask token, registers, every norm, rows of proj and fc2
             with their LayerScale, columns of qkv and fc1, and columns of the first layers of the projection heads

A group's *readers* are the linear layers that lose columns with it: scaling a unit's columns there by 0 is the same as removing it, up to
the statistics of the norms. Scores are taken there (`importance.py`).

Shape legend: D width, H heads, d width of a head, I hidden width.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.encoder import Features
from distill.errors import UserError
from distill.models.backbone import Backbone
from distill.models.headed import HeadedBackbone
from distill.quiet import quiet


class UnitGroups:
    """A copy of a model, traced, and the cuts that can be made in it. Each of `cut_heads` (per block), `cut_hidden` (per block) and
    `cut_dim` may be called once: indices mean the model as it was given.

    Attributes:
        model: the copy, cut so far; its modules are not to be run any more after a cut (build a new `Backbone` of their tensors).

    Raises:
        UserError: the backbone is not one of ours.
    """

    def __init__(self, model: HeadedBackbone):
        import torch_pruning as tp  # a second of imports that only pruning needs

        if not isinstance(model.backbone, Backbone):
            raise UserError(
                f"Only backbones of ours (kind: vit) can be pruned, and this one is {model.backbone.config.name!r} of timm. "
                "Convert it first (`decant convert`), if it is a Vision Transformer of DINOv2's form."
            )
        self._tp: Any = tp
        # The graph is read from autograd's, so every parameter has to be in it.
        self.model = copy.deepcopy(model).cpu().float().eval().requires_grad_(True)
        self.config = model.backbone.config
        backbone: Any = self.model.backbone
        self.blocks: Any = backbone.blocks
        patch, channels = self.config.patch, [(backbone.cls_token, 2), (backbone.pos_embed, 2), (backbone.mask_token, 1)]
        if backbone.register_tokens is not None:
            channels.append((backbone.register_tokens, 2))
        scales = [m.gamma for b in self.blocks for m in (b.ls1, b.ls2) if hasattr(m, "gamma")]
        images = torch.zeros(1, 3, self.config.image_size, self.config.image_size)
        masks = torch.zeros(1, (self.config.image_size // patch) ** 2, dtype=torch.bool)
        masks[0, 0] = True  # so that the mask token is in use
        with torch.enable_grad(), quiet("torch_pruning"):
            self.graph = tp.DependencyGraph().build_dependency(
                self.model,
                (images, masks),
                forward_fn=lambda _, example: _everything(self.model, *example),
                unwrapped_parameters=[*channels, *((s, 0) for s in scales)],
                verbose=False,
            )

    def _group(self, part: str, block: int, units: Sequence[int]) -> Any:
        tp = self._tp
        if part == "dim":
            stem: Any = self.model.backbone.patch_embed
            return self.graph.get_pruning_group(stem.proj, tp.prune_conv_out_channels, list(units))
        b = self.blocks[block]
        if part == "heads":
            width, rows = b.attn.head_dim, b.attn.qkv.out_features // 3
            within = [h * width + i for h in units for i in range(width)]
            layer, rows_cut = b.attn.qkv, [third * rows + i for third in range(3) for i in within]
        else:
            layer = b.mlp.fc1
            hidden = b.mlp.fc2.in_features
            rows_cut = [half * hidden + u for half in range(layer.out_features // hidden) for u in units]
        return self.graph.get_pruning_group(layer, tp.prune_linear_out_channels, rows_cut)

    def readers(self, part: str, block: int = 0) -> list[str]:
        """Names, in the model, of the linear layers whose columns are the units of a part (of heads: d columns a head)."""
        tp = self._tp
        names = {id(m): n for n, m in self.model.named_modules()}
        members = self._group(part, block, [0])
        readers = [dep.target.module for dep, _ in members if dep.handler == tp.prune_linear_in_channels]
        return [names[id(m)] for m in dict.fromkeys(readers)]

    def cut(self, part: str, units: Sequence[int], block: int = 0) -> None:
        """Remove units (numbers of heads, hidden units, channels) with everything that belongs to them."""
        if units:
            # Not asked is torch-pruning's own check of a group: of an output [B, N, D] it takes N for the channels, and refuses N of D.
            # That the cut is right is proved where its tensors are loaded into a network of the new widths.
            with quiet("torch_pruning"):
                self._group(part, block, sorted(units)).prune()

    def tensors(self) -> dict[str, Tensor]:
        """The backbone's tensors as they are now, by name."""
        return {k: v.detach().clone() for k, v in self.model.backbone.state_dict().items()}


def _everything(model: HeadedBackbone, images: Tensor, masks: Tensor) -> list[Tensor]:
    """Outputs that depend on every parameter that a cut can touch: features, and what the heads make of them."""
    features: Features = model.backbone(images, masks)
    out = [features.cls, features.patches, *(head.mlp(features.cls) for head in model.heads().values())]
    if model.match is not None:
        matched = model.match(features)
        out += [t for t in (matched.cls, matched.patches) if t.shape[-1]]
    return out


def linear(model: nn.Module, name: str) -> nn.Linear:
    found = model.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found
