"""What a training holds and how it is kept: the student with its average and optimiser, and the checkpoint, one safetensors file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from distill.errors import UserError
from distill.models.backbone import Backbone
from distill.models.checkpoints import save_tensors
from distill.models.headed import HeadedBackbone, frozen_copy
from distill.monitors import Monitor
from distill.objectives import ObjectivesConfig
from distill.optim import OptimConfig, make_optimizer
from distill.runtime import RuntimeConfig
from distill.sharding import shard, whole


@dataclass
class Student:
    """One student in training: the module, its moving average, its optimiser, and how often a step was skipped."""

    module: HeadedBackbone
    average: HeadedBackbone
    optimizer: torch.optim.Optimizer
    wrapped: nn.Module
    monitor: Monitor | None = None
    bad_steps: int = 0
    bad_in_a_row: int = 0
    last_terms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def gradient_sync(self, on: bool) -> Iterator[None]:
        """Whether the backward pass inside exchanges gradients with other processes: only a step's last one does."""
        if hasattr(self.wrapped, "set_requires_gradient_sync"):  # sharded
            self.wrapped.set_requires_gradient_sync(on)
            yield
        elif not on and hasattr(self.wrapped, "no_sync"):  # DistributedDataParallel
            with self.wrapped.no_sync():
                yield
        else:
            yield

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a step changes, by name; sharded ones are gathered, so every process must call this."""
        tensors = {f"module.{k}": whole(v) for k, v in self.module.state_dict().items()}
        tensors |= {f"average.{k}": whole(v) for k, v in self.average.state_dict().items()}
        for name, p in self.module.named_parameters():
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"adam.{key}.{name}"] = whole(value)
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for part, module in (("module.", self.module), ("average.", self.average)):
            values = {k.removeprefix(part): v for k, v in tensors.items() if k.startswith(part)}
            own = module.state_dict()
            module.load_state_dict({k: shard(v, own[k]) if k in own else v for k, v in values.items()})
        parameters = dict(self.module.named_parameters())
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, kind, name = key.split(".", 2)
                p = parameters[name]
                self.optimizer.state[p][kind] = value.to(p.device) if kind == "step" else shard(value, p)


def prepare_student(
    model: HeadedBackbone,
    optim: OptimConfig,
    objectives: ObjectivesConfig,
    mask_input: bool,
    accelerator: Any,
    runtime: RuntimeConfig | None = None,
) -> Student:
    """Move a student to its device, copy its average, build its optimiser, wrap it for several processes."""
    runtime = runtime or RuntimeConfig()
    # A parameter that is never used has no gradient, and stalls DistributedDataParallel.
    if not mask_input and getattr(model.backbone, "mask_token", None) is not None:
        model.backbone.mask_token.requires_grad_(False)  # type: ignore[union-attr]
    if not objectives.ibot and model.ibot is not None:
        model.ibot.requires_grad_(False)
    if model.dino is not None and not objectives.dino and (model.ibot is not None or not objectives.ibot):
        model.dino.requires_grad_(False)
    model.to(accelerator.device).train()
    if isinstance(model.backbone, Backbone):
        model.backbone.train_with(recompute=runtime.recompute_blocks, compiled=runtime.compile)
    average = frozen_copy(model)
    wrapped = wrap(model, average, accelerator, runtime)
    optimizer = make_optimizer(model.parts(), model.backbone.n_blocks, optim)
    return Student(model, average, optimizer, wrapped)


def wrap(model: HeadedBackbone, average: HeadedBackbone, accelerator: Any, runtime: RuntimeConfig) -> nn.Module:
    """The student for several processes: replicated (gradients are averaged), or with its parameters and its average sharded."""
    if accelerator.num_processes > 1 and runtime.shard:
        from distill.sharding import fully_sharded

        fully_sharded(average)
        return fully_sharded(model)
    return accelerator.prepare_model(model)


def resume(checkpoint: Path, group: dict[str, Student], extras: nn.Module, world: int) -> int:
    """Load the checkpoint if there is one; the step to go on with. The number of processes may be another: steps do not depend on it.

    Args:
        extras: what else has a state: centrings, standardiser, Gram anchor.

    Raises:
        UserError: it cannot be read.
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
            if student.monitor is not None:
                student.monitor.restore(about["monitors"][name])
        extras.load_state_dict(under(tensors, "centring/"))
    except Exception as e:
        first = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(
            f"{checkpoint} is not a checkpoint of this training ({first}). Delete it to start this stage again from its beginning."
        ) from e
    return about["step"]


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def save_state(path: Path, step: int, group: dict[str, Student], extras: nn.Module, world: int, main: bool = True) -> None:
    """Write every tensor under `student/<name>/...` and `centring/...`, with steps done and counters in the metadata.

    Every process must call this (sharded tensors are gathered); the main one writes.
    """
    tensors = {f"student/{n}/{k}": v for n, student in group.items() for k, v in student.state().items()}
    tensors |= {f"centring/{k}": v for k, v in extras.state_dict().items()}
    bad = {n: [student.bad_steps, student.bad_in_a_row] for n, student in group.items()}
    monitors = {n: student.monitor.state() if student.monitor else {} for n, student in group.items()}
    about = json.dumps({"step": step, "processes": world, "bad": bad, "monitors": monitors})
    if main:
        save_tensors(path, tensors, {"state": about})
