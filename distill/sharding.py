"""Models whose parameters are spread over the processes (FSDP2), for teachers that no single device holds.

Every parameter is cut along its first dimension, one piece a process; a block is gathered when it runs and given up again. Parameters are
gathered in the format they are kept in and cast by the block itself, so that sharding changes no number beyond the order of sums.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from distill.errors import UserError
from distill.models.checkpoints import described_by, model_info
from distill.models.headed import HeadedBackbone
from distill.models.heads import DINOHead, HeadConfig
from distill.models.kinds import read_config, skeleton

M = TypeVar("M", bound=nn.Module)


def fully_sharded(model: Any) -> Any:
    """Shard a model in place, block by block, so that one block at a time is whole: parameters, gradients and Adam's moments take 1/W of
    the memory each (Zhao et al., arXiv 2304.11277; torch's `fully_shard`). Its parameters may be on the meta device (`load_sharded`).
    """
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if hasattr(module, "cast"):  # no version tells when a shard's storage is filled
            module.cast.enabled = False
    backbone = getattr(model, "backbone", model)
    for block in getattr(getattr(backbone, "net", backbone), "blocks", ()):
        fully_shard(block)
    # A frozen model is averaged or copied between two passes, so it must not stay whole after one.
    trained = any(p.requires_grad for p in model.parameters())
    return fully_shard(model) if trained else fully_shard(model, reshard_after_forward=True)


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "set_requires_gradient_sync")


def whole(x: Tensor) -> Tensor:
    """A sharded tensor, gathered; any other one as it is. Every process must call this."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def rows_of(n: int, rank: int, world: int) -> tuple[int, int]:
    """Which of n rows a process holds."""
    each = -(-n // world)
    return min(rank * each, n), min((rank + 1) * each, n)


def read_like(file: Any, key: str, like: Tensor) -> Tensor:
    """A tensor of an open safetensors file in the format and on the device of `like` (the CPU for one without memory); where `like` is
    sharded this process's rows are read and nothing else.

    Raises:
        ValueError: its shape is another.
    """
    found = file.get_slice(key)
    if list(found.get_shape()) != list(like.shape):
        raise ValueError(f"{key} is {list(found.get_shape())}, not {list(like.shape)}")
    if not hasattr(like, "placements"):
        return file.get_tensor(key).to(_device(like), like.dtype)
    from torch.distributed.tensor import DTensor

    sharded: Any = like
    mesh = sharded.device_mesh
    first, last = rows_of(like.shape[0], mesh.get_local_rank(), mesh.size())
    empty = torch.empty(0, *like.shape[1:], dtype=like.dtype)
    mine = (found[first:last] if last > first else empty).to(mesh.device_type, like.dtype)
    return DTensor.from_local(mine, mesh, sharded.placements, run_check=False, shape=like.shape, stride=like.stride())


def _device(like: Tensor) -> torch.device:
    return torch.device("cpu") if like.is_meta else like.device


def hollow(model: M) -> M:
    """A copy without memory for its parameters: the shape that `gathered` fills."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    return deepcopy(model, memo)


@torch.no_grad()
def gathered(model: nn.Module, shape: M) -> M:
    """An ordinary module on the CPU, whole in every process, with the numbers of a sharded one; `shape` is its hollow copy."""
    filled = deepcopy(shape)
    state = {k: whole(v).cpu() for k, v in model.state_dict().items()}
    filled.load_state_dict(state, strict=True, assign=True)
    return filled


@torch.no_grad()
def sharded_copy(model: nn.Module, shape: M) -> M:
    """A sharded copy of a sharded module, made piece by piece; `shape` is the hollow one (it becomes the copy)."""
    copy = fully_sharded(shape)
    copy.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, strict=True, assign=True)
    return copy


def load_sharded(folder: Path, bf16: bool = False) -> HeadedBackbone:
    """The frozen model of a model folder with its heads, sharded over all processes; each reads its own rows, and no process ever holds
    more of a matrix than that.

    Args:
        bf16: keep the matrices of Linear layers in bf16 (their products run in it anyway).

    Raises:
        UserError: the folder holds no model, or one of another format or shape.
    """
    info = model_info(folder)
    with described_by(folder):
        backbone = skeleton(read_config(info["backbone"]))
        with torch.device("meta"):
            heads = {n: DINOHead(backbone.dim, HeadConfig(**c)) for n, c in info["heads"].items()}
    model = HeadedBackbone(backbone, heads.get("dino"), heads.get("ibot")).requires_grad_(False).eval()
    if bf16:
        linear_in_bf16(model)
    fully_sharded(model)
    state: dict[str, Tensor] = {}
    for path, within in ((folder / "backbone.safetensors", "backbone."), (folder / "heads.safetensors", "")):
        try:
            own = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.") == bool(within)}
            if own:
                with safe_open(path, framework="pt") as file:
                    state |= {k: read_like(file, k.removeprefix(within), v) for k, v in own.items()}
        except Exception as e:  # whatever safetensors says of a missing, cut or foreign file
            first = " ".join(str(e).split())[:300]
            raise UserError(
                f"{path} does not hold the weights that its model.json describes: {first}. Run the stage that wrote it again."
            ) from e
    model.load_state_dict(state, strict=True, assign=True)
    return model


def linear_in_bf16(model: nn.Module) -> None:
    """Keep the matrices of Linear layers in bf16: where their products run in it anyway, a float32 copy would serve nothing."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.bfloat16()
