"""Teachers from elsewhere: official DINOv2 files, transformers folders, timm models, runs of ours. Each becomes a backbone of `kinds.py`.

Nothing is downloaded, except by timm where a recipe says `pretrained: true`.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from distill.config import Config
from distill.data.preprocess import Preprocess
from distill.errors import EnvironmentFailed, UserError
from distill.models.checkpoints import load_backbone, load_heads, load_preprocess, model_info
from distill.models.heads import DINOHead
from distill.models.kinds import AnyBackbone, skeleton
from distill.models.names import from_efficientnet_pytorch
from distill.models.official import published_preprocess, read_official
from distill.models.state_files import INDEX, fill, read_state
from distill.models.timm_backbone import Option, TimmBackbone, TimmConfig, make_net, preprocess_of
from distill.models.transformers_format import WEIGHTS, read_transformers

TIMM_FILES = "timm's weights are on the Hugging Face hub as timm/NAME (model.safetensors)"


class LoadConfig(Config):
    """Where a teacher's weights are. What a file says by itself (widths, depth, registers, patch) is not asked for.

    Attributes:
        kind: `official` (DINOv2's .pth, pretrained backbone or full teacher checkpoint), `transformers` (a folder with config.json:
            DINOv2, with registers, DINOv3), `timm` (any timm model) or `run` (a run or model folder of ours).
        path: the file or folder. With timm it may be left out for `pretrained`.
        name: timm's name of the model.
        pretrained: let timm fetch its own weights.
        image_size: resolution in pixels that a timm model is made for; None is its own.
        options: further arguments of timm's model.
        heads: a full teacher checkpoint in DINOv2's format, for heads that are not in `path`.
        attention_heads: of an official file; None: width / 64, as in all published ones.
        licence: of the weights, as their publisher names it (`Apache-2.0`); bundles say it. None: what timm says of weights that it
            fetches, else bundles say that it is not stated.
        pos_offset, pos_antialias: how an official file's positions are resampled; None: as published (0.1 and plain, with registers
            0 and antialiased).
    """

    kind: Literal["official", "transformers", "timm", "run"]
    path: str | None = None
    name: str | None = None
    pretrained: bool = False
    image_size: int | None = None
    options: dict[str, Option] = Field(default_factory=dict)
    heads: str | None = None
    attention_heads: int | None = None
    licence: str | None = None
    pos_offset: float | None = None
    pos_antialias: bool | None = None

    def problems(self) -> list[str]:
        """What contradicts itself in these settings, one sentence each."""
        found = []
        if self.kind == "timm":
            if self.name is None:
                found.append("name must say which timm model")
            else:
                found += self.timm().problems()
            if (self.path is None) != self.pretrained:
                found.append("a timm teacher needs either path (a file with its weights) or pretrained: true")
        elif self.path is None:
            found.append(f"path must say where the {self.kind} weights are")
        only = {
            "timm": {"name", "pretrained", "image_size", "options"},
            "official": {"heads", "attention_heads", "pos_offset", "pos_antialias"},
        }
        for kind, fields in only.items():
            defaults = {f: LoadConfig.model_fields[f].get_default(call_default_factory=True) for f in fields}
            given = sorted(f for f in fields if getattr(self, f) != defaults[f])
            if self.kind != kind and given:
                found.append(f"{', '.join(given)} cannot be set for kind {self.kind}: only {kind} reads it")
        if self.licence is not None and not self.licence.strip():
            found.append("licence must name one, or be left out")
        if self.attention_heads is not None and self.attention_heads < 1:
            found.append(f"attention_heads must be at least 1, got {self.attention_heads}")
        if self.pos_offset is not None and not 0 <= self.pos_offset < 1:
            found.append(f"pos_offset must be at least 0 and below 1, got {self.pos_offset}")
        return found

    def timm(self) -> TimmConfig:
        return TimmConfig(name=self.name or "", image_size=self.image_size, options=self.options)


@dataclass(frozen=True)
class Loaded:
    """A teacher: backbone (float32, evaluation mode), its heads by name (`dino`, `ibot`; often none), how its images are prepared, and
    where it came from (for model.json).
    """

    backbone: AnyBackbone
    heads: dict[str, DINOHead]
    preprocess: Preprocess
    lineage: dict[str, Any]


def load_teacher(config: LoadConfig) -> Loaded:
    """Read a teacher of any kind.

    Raises:
        UserError: nothing is there, or it is not what the config says.
        EnvironmentFailed: timm could not fetch its weights.
    """
    if problems := config.problems():
        raise UserError(f"{problems[0]}.")
    home = {n: str(Path(p).expanduser()) for n in ("path", "heads") if (p := getattr(config, n)) is not None}
    loaded = LOADERS[config.kind](config.model_copy(update=home))
    loaded.backbone.eval()
    for head in loaded.heads.values():
        head.eval()
    return loaded


def load_timm(config: LoadConfig) -> Loaded:
    """A timm model with the weights of a file, or with those that timm fetches."""
    made = config.timm()
    said: dict[str, Any] = {}
    if config.pretrained:
        backbone = TimmBackbone(made, fetch_timm(made))
        said = {"licence": named} if (named := backbone.net.pretrained_cfg.get("license")) else {}
    else:
        assert config.path is not None
        empty = skeleton(made)
        assert isinstance(empty, TimmBackbone)
        backbone = empty
        state = read_state(Path(config.path), TIMM_FILES)
        fill_timm(backbone, state, Path(config.path))
    preprocess = preprocess_of(backbone.net, config.image_size)
    return Loaded(backbone, {}, preprocess, lineage(config, model=made.name, **said))


def fetch_timm(config: TimmConfig) -> nn.Module:
    """timm's network with the weights that it downloads or has in its cache.

    Raises:
        EnvironmentFailed: they cannot be had here.
    """
    try:
        return make_net(config, pretrained=True)
    except UserError:
        raise
    except Exception as e:  # hub, network and file errors of several libraries
        first = " ".join(str(e).split())[:200]
        raise EnvironmentFailed(
            f"timm could not fetch the weights of {config.name} ({type(e).__name__}: {first}). {TIMM_FILES}: fetch the file elsewhere "
            "and name it as path."
        ) from e


def fill_timm(backbone: TimmBackbone, state: dict[str, Tensor], path: Path) -> None:
    """Weights under timm's own names, in an older layout that timm converts, or of EfficientNet-PyTorch, into a network made on the
    meta device.

    Raises:
        UserError: they do not fit.
    """
    net = backbone.net
    if "_conv_stem.weight" in state and hasattr(net, "conv_stem"):
        state = from_efficientnet_pytorch(state, [len(stage) for stage in net.blocks])
    named = net.pretrained_cfg.get("classifier") or ()
    after = {name.split(".")[0] for name in ((named,) if isinstance(named, str) else named)} | {"attn_pool"}
    known = set(backbone.state_dict())

    def features_only(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Under our names, without classifier and pooling; `without_classifier` has moved two kinds of norm."""
        named = {f"net.{k}": v for k, v in tensors.items()}
        for here, there in (("net.head.norm.", "head_norm."), ("net.fc_norm.", "net.norm.")):
            if f"{there}weight" in known and f"{there}weight" not in named:
                named = {k.replace(here, there): v for k, v in named.items()}
        return {k: v for k, v in named.items() if k in known or k.split(".")[1] not in after}

    own = features_only(state)
    if backbone.mask_token is not None:
        own.setdefault("mask_token", torch.zeros(1, backbone.dim))
    convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    shapes = {k: v.shape for k, v in backbone.state_dict().items()}
    if {k: v.shape for k, v in own.items()} != shapes and convert is not None:
        try:
            own = features_only(convert(dict(state), net)) | {k: v for k, v in own.items() if k == "mask_token"}
        except Exception as e:  # a converter meets a file of another family
            raise UserError(f"{path} does not hold weights of {backbone.config.name} ({type(e).__name__}: {e}).") from e
    fill(backbone, own, path, backbone.config.name)


def load_official(config: LoadConfig) -> Loaded:
    """DINOv2's own file, with its heads where it, or the file `heads`, has them."""
    backbone, heads = read_official(
        Path(config.path or ""),
        None if config.heads is None else Path(config.heads),
        config.attention_heads,
        config.pos_offset,
        config.pos_antialias,
    )
    return Loaded(backbone, heads, published_preprocess(backbone.config), lineage(config))


def load_transformers(config: LoadConfig) -> Loaded:
    """A folder of the transformers library; such models have no heads."""
    backbone, preprocess = read_transformers(Path(config.path or ""))
    return Loaded(backbone, {}, preprocess, lineage(config))


def files_of(kind: str, path: Path) -> list[Path]:
    """The files that a teacher is read from, sorted; empty where there are none."""
    if kind == "run":
        found = [run_model(path) / name for name in ("model.json", "backbone.safetensors", "heads.safetensors")]
    elif kind == "transformers":
        found = [path / name for name in ("config.json", "preprocessor_config.json", *WEIGHTS)] + sorted(
            path.glob("*.safetensors")
        )
    else:
        found = [path, *(sorted(path.parent.glob("*.safetensors")) if path.name.endswith(INDEX) else [])]
    return sorted({f for f in found if f.is_file()})


def run_model(path: Path) -> Path:
    """A model folder, or the teacher's in a run folder."""
    return path / "teacher" if not (path / "model.json").is_file() and (path / "teacher" / "model.json").is_file() else path


def load_run(config: LoadConfig) -> Loaded:
    """A model folder, or the teacher of a run folder."""
    assert config.path is not None
    folder = run_model(Path(config.path))
    backbone = load_backbone(folder)
    heads = load_heads(folder, backbone.dim)
    return Loaded(backbone, heads, load_preprocess(folder), lineage(config, of=model_info(folder).get("lineage", {})))


def lineage(config: LoadConfig, **more: Any) -> dict[str, Any]:
    return {"kind": "loaded", "format": config.kind, "source": config.path or f"timm {config.name}", **more}


LOADERS: dict[str, Callable[[LoadConfig], Loaded]] = {
    "official": load_official,
    "transformers": load_transformers,
    "timm": load_timm,
    "run": load_run,
}
