"""Files of weights written elsewhere: .pth (read without running what they contain) and safetensors, whole or in shards."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.errors import UserError

WRAPPERS = ("state_dict", "model", "module", "teacher")  # keys that hold the tensors in files that hold more
INDEX = ".index.json"


def read_state(path: Path, hint: str) -> dict[str, Tensor]:
    """The tensors of a file by name: `module.` prefixes and known wrappers are taken off.

    Args:
        path: a .safetensors file, an index of shards (`….safetensors.index.json`) or anything that torch.save wrote.
        hint: where such files are to be had, for the sentence about a missing one.

    Raises:
        UserError: the file is missing, damaged, or holds no tensors by name.
    """
    if not path.is_file():
        what = "is a folder, not a file of weights" if path.is_dir() else "is not there"
        raise UserError(f"{path} {what}. {hint}.")
    value: Any
    if path.name.endswith(INDEX):
        value = _read_shards(path, hint)
    elif path.suffix == ".safetensors":
        value = _read_safetensors(path)
    else:
        value = _read_pickled(path)
    while isinstance(value, dict) and (inner := [k for k in WRAPPERS if isinstance(value.get(k), dict)]):
        value = value[inner[0]]
    if not isinstance(value, dict) or not value or not all(isinstance(k, str) for k in value):
        raise UserError(f"{path} holds {type(value).__name__}, not weights by name.")
    state = {k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in value.items() if isinstance(v, Tensor)}
    if not state:
        raise UserError(f"{path} holds no tensors (its keys: {', '.join(list(value)[:4])}).")
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path} is not a whole safetensors file ({_first(e)}). Fetch it again.") from e


def _read_shards(path: Path, hint: str) -> dict[str, Tensor]:
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is not an index of weight files ({_first(e)}). Fetch it again.") from e
    state: dict[str, Tensor] = {}
    for name in names:
        if not (path.parent / name).is_file():
            raise UserError(f"{path.parent / name} is not there, though {path.name} names it. {hint}.")
        state |= _read_safetensors(path.parent / name)
    return state


def _read_pickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError) as e:
        # Truncated zip, foreign bytes, or classes that weights_only refuses: torch tells them apart only in prose.
        why = "it is damaged or no weights file"
        if zipfile.is_zipfile(path) and "weights_only" in str(e).lower():
            why = "it holds more than tensors, and loading that would run code from the file"
        raise UserError(f"{path} cannot be read: {why} ({_first(e)}).") from e


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def fill(module: nn.Module, state: dict[str, Tensor], path: Path, what: str) -> None:
    """Give a module on the meta device these tensors, as float32; every name and shape must fit.

    Raises:
        UserError: they do not; the first keys are named.
    """
    wanted = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    missing, extra = [k for k in wanted if k not in state], [k for k in state if k not in wanted]
    shapes = [f"{k} {tuple(state[k].shape)}, not {s}" for k, s in wanted.items() if k in state and tuple(state[k].shape) != s]
    found = [
        f"{word} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for word, names in (("lacks", missing), ("does not expect", extra), ("has other shapes:", shapes))
        if names
    ]
    if found:
        raise UserError(
            f"{path} does not hold the weights of {what}: it {'; '.join(found).replace('does not expect', 'has too much:')}."
        )
    module.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()}, strict=True, assign=True)
