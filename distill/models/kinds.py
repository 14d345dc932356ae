"""Which backbones there are, and what each one measures: parameters, operations, width, patch.

A backbone is any module with `config`, `dim`, `patch` (pixels that a patch token covers; a CNN's stride), `n_blocks`, `at_size(size)`
and `forward(images [B, 3, H, W], masks [B, N] bool | None) -> Features`.
"""

from functools import lru_cache
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Discriminator, Tag
from torch.utils.flop_counter import FlopCounterMode

from distill.models.backbone import Backbone, BackboneConfig, flops_per_image, parameter_count
from distill.models.timm_backbone import TimmBackbone, TimmConfig

AnyBackbone = Backbone | TimmBackbone
AnyConfig = BackboneConfig | TimmConfig
KINDS: dict[str, tuple[type[Any], type[Any]]] = {"vit": (Backbone, BackboneConfig), "timm": (TimmBackbone, TimmConfig)}


def _kind(value: Any) -> str:
    """The kind of a mapping or config; without one it is ours."""
    return value.get("kind", "vit") if isinstance(value, dict) else getattr(value, "kind", "vit")


# A field of this type reads either config from a recipe, by its `kind`.
BackboneChoice = Annotated[
    Annotated[BackboneConfig, Tag("vit")] | Annotated[TimmConfig, Tag("timm")],
    Discriminator(_kind),
]


def read_config(values: dict[str, Any]) -> AnyConfig:
    """The config that a model.json describes; folders of before `kind` hold ours.

    Raises:
        KeyError: an unknown kind.
        pydantic.ValidationError: wrong settings.
    """
    return KINDS[_kind(values)][1](**values)


def make_backbone(config: AnyConfig) -> AnyBackbone:
    """The network with fresh weights, drawn from torch's generator."""
    return KINDS[config.kind][0](config)


def skeleton(config: AnyConfig) -> AnyBackbone:
    """The network on the meta device, without memory for its parameters; whatever no file holds (tables of positions) is real."""
    with torch.device("meta"):
        backbone = make_backbone(config)
    tables = [(m, n) for m in backbone.modules() for n in m._non_persistent_buffers_set if m._buffers[n] is not None]
    for module, name in tables:
        module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")  # type: ignore[arg-type]
    for fill in {id(m): getattr(m, "init_non_persistent_buffers", None) for m, _ in tables}.values():
        if fill is None:
            return make_backbone(config)  # a network that cannot fill its own tables
        fill()
    return backbone


def backbone_parameters(config: AnyConfig, mask_token: bool = True) -> int:
    """Parameters of a backbone; without the mask token the count is that of the published inference models."""
    if isinstance(config, BackboneConfig):
        return parameter_count(config, mask_token)
    measured = _measured(config.model_dump_json())
    return measured.parameters - (0 if mask_token else measured.mask_token)


def backbone_flops(config: AnyConfig, size: int) -> int:
    """Floating-point operations (2 per multiply-add) of matrix products and convolutions in one forward pass of one image."""
    if isinstance(config, BackboneConfig):
        return flops_per_image(config, size)
    with torch.device("meta"):
        empty = make_backbone(config.model_copy(update={"image_size": size}) if config.image_size else config).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            empty(torch.zeros(1, 3, size, size))
    return counter.get_total_flops()


def backbone_measures(config: AnyConfig) -> tuple[int, int, int]:
    """(dim, patch, blocks) of a backbone, without making it where a formula says so."""
    if isinstance(config, BackboneConfig):
        dim, depth, _, _ = config.shape()
        return dim, config.patch, depth
    measured = _measured(config.model_dump_json())
    return measured.dim, measured.patch, measured.blocks


class Demands(NamedTuple):
    """What a backbone asks of those who use it.

    Attributes:
        patch: of which sizes in pixels must be multiples; None for a network that pads, or whose rule only it knows.
        masks: whether its input can be masked; exports: whether it can become an ONNX file.
    """

    patch: int | None
    masks: bool
    exports: bool


def demands(config: AnyConfig) -> Demands:
    """What a config says, without weights in memory.

    Raises:
        UserError: timm cannot make it with these settings.
    """
    if isinstance(config, BackboneConfig):
        return Demands(config.patch, True, True)
    measured = _measured(config.model_dump_json())
    return Demands(measured.patch if measured.steps_known else None, measured.steps_known, measured.is_vit)


class Measured(NamedTuple):
    """What only the network of a timm config knows; `mask_token`: how many of its parameters are that token's."""

    dim: int
    patch: int
    blocks: int
    parameters: int
    mask_token: int
    steps_known: bool
    is_vit: bool


@lru_cache
def _measured(config: str) -> Measured:
    """Of a TimmConfig as JSON; once, since making a network takes a good part of a second even without its memory."""
    b = skeleton(TimmConfig.model_validate_json(config))
    assert isinstance(b, TimmBackbone)
    parameters = sum(p.numel() for p in b.parameters())
    token = 0 if b.mask_token is None else b.mask_token.numel()
    return Measured(b.dim, b.patch, b.n_blocks, parameters, token, b.steps_known, b.is_vit)
