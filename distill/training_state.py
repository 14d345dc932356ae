"""What a training holds and how it is kept: the student with its average and optimiser, and the checkpoint, one safetensors file."""

import json
from collections.abc import Callable, Iterator
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
from distill.models.timm_backbone import TimmBackbone, device_of, own_size
from distill.monitors import Monitor
from distill.objectives import ObjectivesConfig
from distill.optim import OptimConfig, make_optimizer
from distill.runtime import RuntimeConfig
from distill.sharding import fully_sharded, gathered, hollow, read_like, whole

# Makes weights what they must be after every update (masks of sparsity), in place and under no_grad but not through `.data`: a tensor's
# version tells CastCache that it changed. Gets a student's module, then its average, by the student's name, and must be idempotent.
AfterStep = Callable[[dict[str, nn.Module]], None]


@dataclass
class Student:
    """One student in training: the module, its moving average, its optimiser, and how often a step was skipped."""

    module: HeadedBackbone
    average: HeadedBackbone
    optimizer: torch.optim.Optimizer
    wrapped: nn.Module
    shape: HeadedBackbone | None = None  # of a sharded student: its ordinary form, without memory
    monitor: Monitor | None = None
    bad_steps: int = 0
    bad_in_a_row: int = 0
    last_terms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def gradient_sync(self, on: bool) -> Iterator[None]:
        """Whether the backward pass inside exchanges gradients with other processes: only a step's last one does. A sharded model always
        does: what it has not exchanged it would have to keep whole.
        """
        if not on and isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            with self.wrapped.no_sync():
                yield
        else:
            yield

    @torch.no_grad()
    def project(self, name: str, after_step: AfterStep | None) -> None:
        """Put the weights, and those of the average, through `after_step`.

        Raises:
            UserError: they are spread over processes, where none sees more than its rows.
        """
        if after_step is None:
            return
        if self.shape is not None:
            raise UserError(
                f"The weights of {name} are changed after every step (sparsity), which sharded ones cannot be: drop runtime.shard."
            )
        for model in (self.module, self.average):
            after_step({name: model})

    def whole_average(self) -> HeadedBackbone:
        """The moving average as an ordinary module: itself, or gathered on the CPU if it is sharded (every process must call this)."""
        return self.average if self.shape is None else gathered(self.average, self.shape)

    def state(self, keep: bool = True) -> dict[str, Tensor]:
        """Every tensor that a step changes, by name. Sharded ones are gathered one by one onto the CPU, so every process must call this;
        without `keep` it only gives its pieces.
        """
        tensors: dict[str, Tensor] = {}

        def add(name: str, value: Tensor) -> None:
            full = whole(value)
            if keep:
                tensors[name] = full if full is value else full.cpu()

        for part, own in self._tensors().items():
            for key, value in own.items():
                add(f"{part}.{key}", value)
        for name, p in self.module.named_parameters():
            for key, value in self.optimizer.state.get(p, {}).items():
                add(f"adam.{key}.{name}", value)
        return tensors

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """Of the module and its average, without what they share (a frozen backbone)."""
        module, average = self.module.state_dict(), self.average.state_dict()
        shared = {v.data_ptr() for v in module.values() if v.numel() and self.shape is None}
        return {"module": module, "average": {k: v for k, v in average.items() if v.data_ptr() not in shared}}

    def restore(self, file: Any, prefix: str) -> None:
        """Take all of it from an open safetensors file; a process reads no more of a sharded tensor than its rows."""
        names = {k.removeprefix(prefix) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118 (safe_open is no mapping)
        for part, own in self._tensors().items():
            extra = {n for n in names if n.startswith(f"{part}.")} - {f"{part}.{k}" for k in own}
            if extra:
                raise ValueError(f"{min(extra)} belongs to another model")
            with torch.no_grad():
                for key, value in own.items():
                    value.copy_(read_like(file, f"{prefix}{part}.{key}", value))
        parameters = dict(self.module.named_parameters())
        for name in sorted(n for n in names if n.startswith("adam.")):
            _, kind, of = name.split(".", 2)
            p = parameters[of]
            one = kind == "step"
            value = file.get_tensor(prefix + name).to(p.device) if one else read_like(file, prefix + name, p.detach())
            self.optimizer.state[p][kind] = value


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
    if isinstance(model.backbone, TimmBackbone) and not model.backbone.steps_known and not model.backbone_frozen:
        freeze_unused(model.backbone)
    model.to(accelerator.device).train()
    if isinstance(model.backbone, Backbone):
        model.backbone.train_with(recompute=runtime.recompute_blocks, compiled=runtime.compile)
    average = frozen_copy(model)
    several = accelerator.num_processes > 1
    # A frozen backbone stays whole: it needs no gradient, moments or average, and two models run it.
    shape = hollow(average) if several and runtime.shard and not model.backbone_frozen else None
    if shape is not None:
        fully_sharded(average)
    wrapped = fully_sharded(model) if shape is not None else accelerator.prepare_model(model)
    optimizer = make_optimizer(model.parts(), model.backbone.n_blocks, optim)
    return Student(model, average, optimizer, wrapped, shape)


def freeze_unused(backbone: TimmBackbone) -> None:
    """Freeze what features do not depend on: some of timm's networks keep layers that only their classifier used."""
    training, size = backbone.training, backbone.config.image_size or own_size(backbone.net)
    features = backbone.eval()(torch.zeros(1, 3, size, size, device=device_of(backbone.net)))
    learned = {n: p for n, p in backbone.named_parameters() if p.requires_grad}
    used = torch.autograd.grad(features.cls.sum() + features.patches.sum(), list(learned.values()), allow_unused=True)
    for p, gradient in zip(learned.values(), used, strict=True):
        p.requires_grad_(gradient is not None)
    backbone.train(training)


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
            for name, student in group.items():
                student.restore(f, f"student/{name}/")
                student.bad_steps, student.bad_in_a_row = about["bad"][name]
                if student.monitor is not None:
                    student.monitor.restore(about["monitors"][name])
            extras.load_state_dict({k: read_like(f, f"centring/{k}", v) for k, v in extras.state_dict().items()})
    except Exception as e:
        first = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(
            f"{checkpoint} is not a checkpoint of this training ({first}). Delete it to start this stage again from its beginning."
        ) from e
    return about["step"]


def save_state(path: Path, step: int, group: dict[str, Student], extras: nn.Module, world: int, main: bool = True) -> None:
    """Write every tensor under `student/<name>/...` and `centring/...`, with steps done and counters in the metadata.

    Every process must call this (sharded tensors are gathered); the main one writes, and the others wait for it.
    """
    tensors = {f"student/{n}/{k}": v for n, student in group.items() for k, v in student.state(main).items()}
    others = {f"centring/{k}": whole(v) for k, v in extras.state_dict().items()}
    bad = {n: [student.bad_steps, student.bad_in_a_row] for n, student in group.items()}
    monitors = {n: student.monitor.state() if student.monitor else {} for n, student in group.items()}
    about = json.dumps({"step": step, "processes": world, "bad": bad, "monitors": monitors})
    if main:
        save_tensors(path, tensors | others, {"state": about})
    if world > 1:  # a process that left now would have the launcher end the one that writes
        torch.distributed.barrier()
