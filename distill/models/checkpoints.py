"""Models on disk: safetensors beside a `model.json` that rebuilds the exact model. Nothing is pickled.

model.json             format, backbone config (its `kind` is a key of `kinds.KINDS`), head configs, preprocessing, lineage
backbone.safetensors   every parameter and persistent buffer of the backbone under its own name
heads.safetensors      `dino.*` and `ibot.*`, when the model was trained here
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.data.preprocess import Preprocess
from distill.errors import UserError
from distill.files import read_json, replacing, write_json
from distill.models.heads import DINOHead, HeadConfig
from distill.models.kinds import AnyBackbone, read_config, skeleton

FORMAT = "decant-model-1"
M = TypeVar("M", bound=nn.Module)


def save_model(
    folder: Path,
    backbone: AnyBackbone,
    preprocess: Preprocess,
    heads: dict[str, DINOHead] | None = None,
    lineage: dict[str, Any] | None = None,
) -> None:
    """Write a model folder. `model.json` goes last: a folder without it is an interrupted write."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").unlink(missing_ok=True)  # it must not describe a mixture of old and new weights
    save_tensors(folder / "backbone.safetensors", backbone.state_dict())
    if heads:
        save_tensors(folder / "heads.safetensors", {f"{n}.{k}": v for n, h in heads.items() for k, v in h.state_dict().items()})
    write_json(
        folder / "model.json",
        {
            "format": FORMAT,
            "backbone": backbone.config.model_dump(),
            "heads": {n: h.config.model_dump() for n, h in (heads or {}).items()},
            "preprocess": preprocess.to_json(),
            "lineage": lineage or {},
        },
    )


def load_backbone(folder: Path) -> AnyBackbone:
    """The backbone of a model folder, float32, in evaluation mode.

    Raises:
        UserError: the folder holds no model, or one of another format or shape.
    """
    with described_by(folder):
        backbone = skeleton(read_config(model_info(folder)["backbone"]))
    return load_into(backbone, folder / "backbone.safetensors").eval()


def load_heads(folder: Path, dim: int) -> dict[str, DINOHead]:
    """The projection heads by name (`dino`, `ibot`); empty when the model has none."""
    with described_by(folder), torch.device("meta"):
        heads = {n: DINOHead(dim, HeadConfig(**c)) for n, c in model_info(folder)["heads"].items()}
    if not heads:
        return {}
    load_into(nn.ModuleDict(heads), folder / "heads.safetensors").eval()
    return heads


def load_preprocess(folder: Path) -> Preprocess:
    with described_by(folder):
        preprocess = Preprocess.from_json(model_info(folder)["preprocess"])
        preprocess.normalized(np.zeros((3, 1, 1), np.float32))  # an unknown kind is an error now, not at the first image
    return preprocess


@contextmanager
def described_by(folder: Path) -> Iterator[None]:
    """What a model.json says is taken at its word; where that fails, the file is at fault."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # whatever a wrong description breaks: missing and unknown keys, wrong types, impossible shapes
        first = " ".join(str(e).split())[:300]
        raise UserError(
            f"{folder / 'model.json'} does not describe a model ({type(e).__name__}: {first}). Run the stage that wrote it again."
        ) from e


def model_info(folder: Path) -> dict[str, Any]:
    path = folder / "model.json"
    if not path.is_file():
        raise UserError(
            f"{folder} holds no model (no model.json). Name a folder that `decant run` wrote, such as RUN/students/small."
        )
    try:
        info = read_json(path)
    except ValueError as e:  # not JSON, or not UTF-8
        raise UserError(f"{path} is not JSON ({e}). Restore the file, or run the stage that wrote it again.") from e
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        found = info.get("format") if isinstance(info, dict) else type(info).__name__
        raise UserError(f"{path} has format {found!r}, this version reads {FORMAT!r}. Run the stage that wrote it again.")
    return info


def load_into(module: M, path: Path) -> M:
    """Give a module (on the meta device: one without memory) the tensors of a file, as float32."""
    try:
        state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
        module.load_state_dict(state, strict=True, assign=True)
    except (OSError, SafetensorError, RuntimeError) as e:
        first = " ".join(str(e).split())[:300]
        raise UserError(
            f"{path} does not hold the weights that its model.json describes: {first}. Run the stage that wrote it again."
        ) from e
    return module


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, whole or not at all, without a second copy of them in memory."""
    with replacing(path) as part:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part, metadata=metadata)
