"""What a training holds and how it is kept: the student with its average and optimiser, and the checkpoint, one safetensors file."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from distill.errors import UserError
from distill.models.checkpoints import save_tensors
from distill.models.headed import HeadedBackbone, frozen_copy
from distill.objectives import ObjectivesConfig
from distill.optim import OptimConfig, make_optimizer


@dataclass
class Student:
    """One student in training: the module, its moving average, its optimiser, and how often a step was skipped."""

    module: HeadedBackbone
    average: HeadedBackbone
    optimizer: torch.optim.Optimizer
    wrapped: nn.Module
    bad_steps: int = 0
    bad_in_a_row: int = 0
    last_terms: dict[str, float] = field(default_factory=dict)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a step changes, by name."""
        tensors = {f"module.{k}": v for k, v in self.module.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for name, p in self.module.named_parameters():
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"adam.{key}.{name}"] = value
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.module.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("module.")})
        self.average.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("average.")})
        parameters = dict(self.module.named_parameters())
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, kind, name = key.split(".", 2)
                p = parameters[name]
                self.optimizer.state[p][kind] = value if kind == "step" else value.to(p.device)


def prepare_student(
    model: HeadedBackbone, optim: OptimConfig, objectives: ObjectivesConfig, mask_input: bool, accelerator: Any
) -> Student:
    """Move a student to its device, copy its average, build its optimiser, wrap it for several processes."""
    if not mask_input:
        model.backbone.mask_token.requires_grad_(
            False
        )  # never used: a parameter without gradient stalls DistributedDataParallel
    if not objectives.ibot and model.ibot is not None:
        model.ibot.requires_grad_(False)
    if not objectives.dino and model.ibot is not None:
        model.dino.requires_grad_(False)
    model.to(accelerator.device).train()
    average = frozen_copy(model)
    optimizer = make_optimizer(model.parts(), model.backbone.n_blocks, optim)
    return Student(model, average, optimizer, accelerator.prepare_model(model))


def resume(checkpoint: Path, group: dict[str, Student], centrings: nn.Module, world: int) -> int:
    """Load the checkpoint if there is one; the step to go on with.

    Raises:
        UserError: it cannot be read, or was written by another number of processes (KoLeo and masks are made per process).
    """
    if not checkpoint.exists():
        return 0
    try:
        with safe_open(checkpoint, framework="pt") as f:
            about = json.loads(f.metadata()["state"])
            tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (safe_open is no mapping)
        for name, student in group.items():
            student.restore(under(tensors, f"student/{name}/"))
            student.bad_steps, student.bad_in_a_row = about["bad"][name]
        centrings.load_state_dict(under(tensors, "centring/"))
    except Exception as e:
        first = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(
            f"{checkpoint} is not a checkpoint of this training ({first}). Delete it to start this stage again from its beginning."
        ) from e
    if about["processes"] != world:
        raise UserError(
            f"{checkpoint} was written by {about['processes']} processes and this run has {world}: it would end in other weights. "
            "Use as many as before, or delete the file to start this stage again."
        )
    return about["step"]


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def save_state(path: Path, step: int, group: dict[str, Student], centrings: nn.Module, world: int) -> None:
    """Write every tensor under `student/<name>/...` and `centring/...`, with steps done and counters in the metadata."""
    tensors = {f"student/{n}/{k}": v for n, student in group.items() for k, v in student.state().items()}
    tensors |= {f"centring/{k}": v for k, v in centrings.state_dict().items()}
    bad = {n: [student.bad_steps, student.bad_in_a_row] for n, student in group.items()}
    about = json.dumps({"step": step, "processes": world, "bad": bad})
    save_tensors(path, tensors, {"state": about})
