"""AdamW with DINOv2's parameter groups, per-module clipping, and the moving average of parameters."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from distill.config import Config
from distill.schedules import SCALES, Cosine, Linear, is_decayed, layer_multiplier
from distill.sharding import whole

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)


class OptimConfig(Config):
    """How the weights move. Shares are of all steps of the run, so a recipe scales with its length.

    Attributes:
        lr: learning rate at a batch of 1,024; scaled by sqrt(batch/1024).
        min_lr: where its cosine ends.
        warmup: share of the run with a linear rise from 0.
        weight_decay: from, to (cosine).
        ema: momentum of the moving average, from, to (cosine).
        clip: largest gradient norm of each sub-module (backbone, each head) by itself.
        layer_decay: learning-rate factor from a block to the one before it; 1 is none.
        patch_embed_lr: learning-rate factor of the patch embedding.
        freeze_last_layer: share of the run in which the prototypes' learning rate is 0 (Adam's moments go on, as in the reference).
        beta2: of AdamW (beta1 is 0.9).
        scale_lr: learning rate of learned scales of quantization, about the share by which a step changes one (their logarithm is
            learned); whatever `lr` and the batch are, with the same warmup, and its cosine ends at 0.
    """

    lr: float = 0.004
    min_lr: float = 1e-6
    warmup: float = 0.1
    weight_decay: tuple[float, float] = (0.04, 0.4)
    ema: tuple[float, float] = (0.992, 1.0)
    clip: float = 3.0
    layer_decay: float = 0.9
    patch_embed_lr: float = 0.2
    freeze_last_layer: float = 0.01
    beta2: float = 0.999
    scale_lr: float = 0.001

    def problems(self) -> list[str]:
        found = []
        numbers = (
            self.lr,
            self.min_lr,
            *self.weight_decay,
            *self.ema,
            self.clip,
            self.layer_decay,
            self.patch_embed_lr,
            self.beta2,
            self.scale_lr,
        )
        if not all(math.isfinite(v) for v in numbers):
            return ["every number must be finite"]
        for name in ("patch_embed_lr", "scale_lr"):
            if getattr(self, name) < 0:
                found.append(f"{name} must be at least 0, got {getattr(self, name)}")
        if not self.lr >= self.min_lr >= 0:
            found.append(f"lr {self.lr} must be at least min_lr {self.min_lr}, and both at least 0")
        for name in ("warmup", "freeze_last_layer"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"{name} is a share of the run between 0 and 1, got {getattr(self, name)}")
        if not all(0 <= m <= 1 for m in self.ema):
            found.append(f"ema holds two momenta between 0 and 1, got {list(self.ema)}")
        if min(self.weight_decay) < 0:
            found.append(f"weight_decay holds two numbers of at least 0, got {list(self.weight_decay)}")
        if self.clip <= 0:
            found.append(f"clip must be above 0, got {self.clip}")
        if not 0 < self.layer_decay <= 1:
            found.append(f"layer_decay must be above 0 and at most 1, got {self.layer_decay}")
        if not 0 < self.beta2 < 1:
            found.append(f"beta2 must be between 0 and 1, got {self.beta2}")
        return found


class Schedules:
    """Every scheduled value of a run as a function of the step."""

    def __init__(self, config: OptimConfig, batch: int, total: int):
        base = config.lr * (batch / 1024) ** 0.5
        warmup = round(config.warmup * total)
        self.lr, self.scale_lr = Cosine(base, config.min_lr, total, warmup), Cosine(config.scale_lr, 0.0, total, warmup)
        self.weight_decay = Cosine(*config.weight_decay, total)
        self.ema = Cosine(*config.ema, total)
        self.frozen_steps = round(config.freeze_last_layer * total)

    def last_layer_lr(self, step: int) -> float:
        return 0.0 if step < self.frozen_steps else self.lr(step)


def make_optimizer(modules: dict[str, nn.Module], blocks: int, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the named sub-modules; parameters of equal (learning-rate factor, decay, last layer, scale) share a group."""
    groups: dict[tuple[float, bool, bool, bool], list[Tensor]] = {}
    for module_name, module in modules.items():
        norms = {p for m in module.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
        for name, p in module.named_parameters():
            if not p.requires_grad:
                continue
            factor, scale = 1.0, name.endswith(SCALES)
            if module_name == "backbone" and not scale:
                factor = layer_multiplier(name, blocks, config.layer_decay, config.patch_embed_lr)
            decayed = is_decayed(name) and p not in norms  # not every norm is called one: `bn1`, `layers.1`
            groups.setdefault((factor, decayed, "last_layer" in name, scale), []).append(p)
    optimizer = torch.optim.AdamW(
        [{"params": ps, "factor": f, "decayed": d, "last_layer": last, "scale": s} for (f, d, last, s), ps in groups.items()],
        lr=0.0,  # set before every step
        betas=(0.9, config.beta2),
        fused=True,  # one pass over memory instead of a dozen
    )
    # The fused kernel writes without raising the tensors' versions, by which copies in other formats (CastCache) know that they are old.
    optimizer.register_step_post_hook(_raise_versions)
    return optimizer


def _raise_versions(optimizer: torch.optim.Optimizer, *_: object) -> None:
    torch.autograd.graph.increment_version([p for group in optimizer.param_groups for p in group["params"]])


def set_step(optimizer: torch.optim.Optimizer, schedules: Schedules, step: int) -> None:
    """Write this step's learning rates and weight decay into the groups."""
    lr, last, decay = schedules.lr(step), schedules.last_layer_lr(step), schedules.weight_decay(step)
    scale = schedules.scale_lr(step)
    for group in optimizer.param_groups:
        group["lr"] = (last if group["last_layer"] else scale if group["scale"] else lr) * group["factor"]
        group["weight_decay"] = decay if group["decayed"] else 0.0


def clip_each(modules: Iterable[nn.Module], limit: float) -> list[Tensor]:
    """Clip each module's gradient norm by itself; the norms before clipping."""
    norms = []
    for module in modules:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        norm = whole(nn.utils.get_total_norm(gradients, foreach=True))  # over all processes, where gradients are sharded
        nn.utils.clip_grads_with_norm_(module.parameters(), limit, norm, foreach=True)
        norms.append(norm.to(next(module.parameters()).device))  # without any gradient it is a zero on the CPU
    return norms


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, momentum: float) -> None:
    """average <- momentum * average + (1 - momentum) * module, for all parameters at once; shared ones stay. Buffers (statistics of batch
    norms, which are averages themselves) are copied.
    """
    pairs = [(a.detach(), p.detach()) for a, p in zip(average.parameters(), module.parameters(), strict=True) if a is not p]
    torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], 1 - momentum)
    for a, b in zip(average.buffers(), module.buffers(), strict=True):
        if a is not b:
            a.copy_(b)


def teacher_temperature(start_end: tuple[float, float], warmup: float, total: int) -> Linear:
    return Linear(*start_end, round(warmup * total))
