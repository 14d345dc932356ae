"""Folders of the transformers library (config.json and weights), read without it: DINOv2 with and without registers, DINOv3.

Positions at other resolutions are resampled as the library's classes do: DINOv2 by output size without, with registers with antialiasing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from distill.data.preprocess import Preprocess, kind_of
from distill.errors import UserError
from distill.files import read_json
from distill.models.dinov3 import read_convnext, read_vit
from distill.models.kinds import AnyBackbone, skeleton
from distill.models.names import from_transformers
from distill.models.official import describe
from distill.models.state_files import fill, read_state

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
HUB = (
    "The Hugging Face hub has them as facebook/dinov2-base, facebook/dinov2-with-registers-base and "
    "facebook/dinov3-vits16-pretrain-lvd1689m (this one after its licence is accepted): fetch config.json, model.safetensors and "
    "preprocessor_config.json into one folder"
)
FILTERS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def read_transformers(folder: Path) -> tuple[AnyBackbone, Preprocess]:
    """Backbone and preprocessing of a folder.

    Raises:
        UserError: files are missing or damaged, or the model is none of those that are known here.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no model in transformers' format (no config.json). {HUB}.")
    config = Settings(_json(folder / "config.json"), folder / "config.json")
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder} has config.json but no {' or '.join(WEIGHTS)}. {HUB}.")
    kind = config.values.get("model_type")
    if kind not in READERS:
        raise UserError(f"{folder} holds a {kind} model; known are {', '.join(READERS)}.")
    backbone = READERS[kind](config, read_state(found[0], HUB), found[0])
    return backbone, read_preprocess(folder, config.square("image_size", 224))


class Settings:
    """A config.json: what it says, or the library's default; what we cannot do is refused, not ignored."""

    def __init__(self, values: dict[str, Any], path: Path):
        self.values, self.path = values, path

    def whole(self, name: str, default: int, least: int = 1) -> int:
        value = self.values.get(name, default)
        if type(value) is not int or value < least:
            raise UserError(f"{self.path}: {name} is {value!r}, not a whole number of at least {least}.")
        return value

    def positive(self, name: str, default: float) -> float:
        value = self.values.get(name, default)
        if type(value) not in (int, float) or not value > 0:
            raise UserError(f"{self.path}: {name} is {value!r}, not a number above 0.")
        return float(value)

    def square(self, name: str, default: int) -> int:
        """A side in pixels, given as one number or as two equal ones."""
        value = self.values.get(name, default)
        sides = value if isinstance(value, list) else [value, value]
        if len(sides) != 2 or sides[0] != sides[1] or type(sides[0]) is not int or sides[0] < 1:
            raise UserError(f"{self.path}: {name} is {value!r}; only squares are known here.")
        return int(sides[0])

    def require(self, name: str, wanted: Any) -> None:
        """Refuse any other value of a setting that is fixed here."""
        if (value := self.values.get(name, wanted)) != wanted:
            raise UserError(f"{self.path}: {name} is {value!r}, and only {wanted!r} is known here.")


def _read_dinov2(registers: int, patch: int) -> Callable[[Settings, dict[str, Tensor], Path], AnyBackbone]:
    """A reader of DINOv2; the arguments are the library's defaults of its class (0 registers: it has none)."""

    def read(s: Settings, state: dict[str, Tensor], path: Path) -> AnyBackbone:
        for name, wanted in (
            ("hidden_act", "gelu"),
            ("layer_norm_eps", 1e-6),
            ("mlp_ratio", 4),
            ("num_channels", 3),
            ("qkv_bias", True),
        ):
            s.require(name, wanted)
        shape = (
            s.whole("hidden_size", 768),
            s.whole("num_hidden_layers", 12),
            s.whole("num_attention_heads", 12),
            "swiglu" if s.values.get("use_swiglu_ffn") else "mlp",
        )
        backbone = skeleton(
            describe(
                shape,
                s.path,
                patch=s.square("patch_size", patch),
                image_size=s.square("image_size", 224),
                registers=s.whole("num_register_tokens", registers, 0) if registers else 0,
                pos_offset=0.0,
                pos_antialias=bool(registers),
            )
        )
        ours = from_transformers(state)
        if "mask_token" not in ours and s.values.get("use_mask_token") is False:
            ours["mask_token"] = ours["cls_token"].new_zeros(1, shape[0])
        fill(backbone, ours, path, f"the {s.values['model_type']} model that {s.path.name} describes")
        return backbone

    return read


READERS: dict[str, Callable[[Any, dict[str, Tensor], Path], AnyBackbone]] = {
    "dinov2": _read_dinov2(0, 14),
    "dinov2_with_registers": _read_dinov2(4, 16),
    "dinov3_vit": read_vit,
    "dinov3_convnext": read_convnext,
}


def read_preprocess(folder: Path, image_size: int) -> Preprocess:
    """What preprocessor_config.json says; without one, ImageNet's normalisation at `image_size` pixels.

    Raises:
        UserError: it normalises in a way that is not known here.
    """
    path = folder / "preprocessor_config.json"
    values = _json(path) if path.is_file() else {}
    crop = values.get("crop_size") if values.get("do_center_crop", True) else None
    size, side = _side(values.get("size")), _side(crop)
    side = side or size or min(224, image_size)
    mean, std = values.get("image_mean", (0.485, 0.456, 0.406)), values.get("image_std", (0.229, 0.224, 0.225))
    kind = kind_of(mean, std) if values.get("do_normalize", True) else "none"
    if kind is None:
        raise UserError(f"{path}: image_mean {mean} and image_std {std} are none of the kinds in distill/data/preprocess.py.")
    return Preprocess(side, max(side, size or side), FILTERS.get(values.get("resample", 3), "bicubic"), kind)


def _side(value: Any) -> int | None:
    """The pixels in {"shortest_edge": 256}, {"height": 224, "width": 224} or 224."""
    if isinstance(value, dict):
        value = value.get("shortest_edge", value.get("height"))
    return value if isinstance(value, int) and value > 0 else None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except ValueError as e:
        raise UserError(f"{path} is not JSON ({e}). Fetch it again.") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, not settings by name. Fetch it again.")
    return value
