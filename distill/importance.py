"""How much every unit of a network matters, in one currency for heads, hidden units and channels, so that they can compete.

    taylor      |sum w dL/dw| over a unit's columns in the layers that read it, L the distillation loss: the first-order change of the loss
                when the unit is scaled to nothing (Molchanov et al., arXiv 1906.10771; Michel et al., arXiv 1905.10650, for heads). With
                activations known, the change when it is replaced by its mean, which is what `prune.py` does.
    activation  share of the residual stream's variance that the unit writes: variance of the unit times its columns' squares
    magnitude   the same without any image: every unit counted as of variance 1

A unit's columns are those of the layers that read it (`unit_groups.py`), with LayerScale folded in.

Shape legend: B images, T tokens, D width, H heads, d width of a head, I hidden width, O outputs of a layer.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.data.loader import Batch, LoaderSettings, batches
from distill.models.backbone import Backbone
from distill.models.headed import HeadedBackbone
from distill.objectives import global_terms, local_terms
from distill.runtime import RuntimeConfig, default_workers
from distill.step import Stepper
from distill.train import TrainConfig
from distill.training_state import Student
from distill.unit_groups import UnitGroups, linear

Kind = Literal["taylor", "activation", "magnitude"]


@dataclass(frozen=True)
class Activations:
    """Moments over all tokens of the images seen.

    Attributes:
        attended: per block the mean of proj's input [H d], and `attended_cov` its covariance inside each head [H, d, d].
        hidden, hidden_var: per block mean and variance of fc2's input [I].
        normed_var: per norm (norm1 and norm2 of every block in turn, then the final one) the variance of its output [D].
        stream: per norm E[x x^T] of its input [D, D]; stream_var: the input's variance [D].
    """

    attended: list[Tensor]
    attended_cov: list[Tensor]
    hidden: list[Tensor]
    hidden_var: list[Tensor]
    normed_var: list[Tensor]
    stream: list[Tensor]
    stream_var: list[Tensor]


@dataclass(frozen=True)
class Scores:
    """Importance of every unit: `heads` [H] and `hidden` [I] per block, `dim` [D]. A block's is the sum of its heads and hidden units."""

    kind: Kind
    heads: list[Tensor]
    hidden: list[Tensor]
    dim: Tensor

    def all(self) -> list[Tensor]:
        return [*self.heads, *self.hidden, self.dim]


class _Moments:
    """Sum and sum of products of the rows that pass, in float64. `width`: products inside blocks of so many columns only."""

    def __init__(self, width: int | None = None, diagonal: bool = False):
        self.width, self.diagonal, self.n = width, diagonal, 0
        self.sum: Any = 0
        self.square: Any = 0

    def __call__(self, x: Tensor) -> None:
        x_SD = x.detach().flatten(0, -2).float()
        self.n += len(x_SD)
        self.sum = self.sum + x_SD.sum(0, dtype=torch.float64)
        if self.diagonal:
            self.square = self.square + x_SD.square().sum(0, dtype=torch.float64)
        else:
            parts = x_SD.unflatten(1, (-1, self.width or x_SD.shape[1])).transpose(0, 1)  # [H, S, d]
            self.square = self.square + (parts.transpose(1, 2) @ parts).double()

    def mean(self) -> Tensor:
        return self.sum / self.n

    def second(self) -> Tensor:
        return self.square / self.n

    def variance(self) -> Tensor:
        second = self.second() if self.diagonal else torch.diagonal(self.second(), dim1=-2, dim2=-1).flatten()
        return (second - self.mean().square()).clamp(min=0)

    def covariance(self) -> Tensor:
        mean = self.mean().view(len(self.second()), -1)
        return self.second() - mean[:, :, None] * mean[:, None, :]


@torch.no_grad()
def activations(backbone: Backbone, images: Iterable[Tensor]) -> Activations:
    """Moments of a backbone on batches of images [B, 3, H, W], preprocessed. The backbone is left as it was."""
    blocks: Any = backbone.blocks
    norms = [n for b in blocks for n in (b.norm1, b.norm2)] + [backbone.norm]
    attended = [_Moments(b.attn.head_dim) for b in blocks]
    hidden = [_Moments(diagonal=True) for _ in blocks]
    stream = [_Moments() for _ in norms]
    normed = [_Moments(diagonal=True) for _ in norms]
    watched = [*zip([b.attn.proj for b in blocks], attended, strict=True)]
    watched += [*zip([b.mlp.fc2 for b in blocks], hidden, strict=True), *zip(norms, stream, strict=True)]
    hooks = [m.register_forward_pre_hook(lambda _, given, take=take: take(given[0])) for m, take in watched]
    hooks += [
        m.register_forward_hook(lambda _, given, out, take=take: take(out)) for m, take in zip(norms, normed, strict=True)
    ]
    was = backbone.training
    backbone.eval()  # blocks then run timm's own arithmetic, whose modules the hooks see
    try:
        for batch in images:
            backbone(batch)
    finally:
        backbone.train(was)
        for hook in hooks:
            hook.remove()
    return Activations(
        [m.mean() for m in attended],
        [m.covariance() for m in attended],
        [m.mean() for m in hidden],
        [m.variance() for m in hidden],
        [m.variance() for m in normed],
        [m.second()[0] for m in stream],
        [m.variance() for m in stream],
    )


@torch.no_grad()
def energy_scores(groups: UnitGroups, seen: Activations | None) -> Scores:
    """`activation`, or without activations `magnitude`.

    A head or hidden unit: sum over the stream's channels of the variance that it writes there relative to the channel's own, mean over
    channels. A channel of the stream: its share of what each reading layer takes in, times what that layer's half of the block writes in
    all, plus its share of the final features.
    """
    model, config = groups.model, groups.config
    dim, depth, width = config.shape()[0], config.shape()[1], config.head_width()
    halves: dict[str, list[Tensor]] = {"heads": [], "hidden": []}
    for i, block in enumerate(groups.blocks):
        for j, part in enumerate(("heads", "hidden")):
            (reader,) = groups.readers(part, i)
            w = linear(model, reader).weight.double()
            scale: Any = getattr((block.ls1, block.ls2)[j], "gamma", None)
            w = w if scale is None else w * scale[:, None].double()
            if seen is not None:  # the stream that the half has been added to, which the next norm reads
                w = w / seen.stream_var[2 * i + 1 + j].clamp(min=1e-12).sqrt()[:, None]
            if part == "hidden":
                spread = 1.0 if seen is None else seen.hidden_var[i]
                halves[part].append(w.square().sum(0) * spread / dim)
                continue
            w_HDd = w.view(dim, -1, width).transpose(0, 1)
            cov = torch.eye(width, dtype=w.dtype) if seen is None else seen.attended_cov[i]
            halves[part].append((w_HDd @ cov * w_HDd).sum((1, 2)) / dim)
    if seen is None:  # no unit of measure: half a block is worth 1 on average
        for part, found in halves.items():
            total = torch.cat(found).sum()
            halves[part] = [s * depth / total for s in found]
    worth = {("qkv", i): s.sum() for i, s in enumerate(halves["heads"])} | {
        ("fc1", i): s.sum() for i, s in enumerate(halves["hidden"])
    }
    norms = [n for b in groups.blocks for n in (b.norm1, b.norm2)] + [model.backbone.norm]
    var = [n.weight.double().square() for n in norms] if seen is None else seen.normed_var
    channels = var[-1] / var[-1].sum()
    for name in groups.readers("dim"):
        parts = name.split(".")  # backbone.blocks.3.attn.qkv, or a head outside
        if parts[0] != "backbone":
            continue
        i = int(parts[2])
        taken = linear(model, name).weight.double().square().sum(0) * var[2 * i + (parts[-1] == "fc1")]
        channels = channels + worth[parts[-1], i] * taken / taken.sum()
    return Scores("magnitude" if seen is None else "activation", halves["heads"], halves["hidden"], channels)


def taylor_scores(
    groups: UnitGroups,
    teacher: HeadedBackbone,
    parts: Iterable[Batch],
    training: TrainConfig,
    seen: Activations | None = None,
    accelerator: Any = None,
) -> Scores:
    """First-order change of the distillation loss, mean over batches of its size.

    Args:
        groups: of the student, not cut yet.
        teacher: frozen, with the heads that `training.objectives` asks for.
        parts: batches, all of one process's share.
        training: the recovery's settings; objectives, crops, masks and teacher_size are read.
    """
    if accelerator is None:
        from accelerate import Accelerator

        accelerator = Accelerator(mixed_precision="no")
    model = copy.deepcopy(groups.model).to(accelerator.device).eval().requires_grad_(True)
    config = training.model_copy(update={"cache": None})
    student = Student(model, model, None, model)  # type: ignore[arg-type]  # nothing here takes a step
    last = config.steps() - 1
    loop = Stepper(config, {"student": student}, teacher, config.steps(), accelerator, RuntimeConfig())
    gates = {("heads", i): groups.readers("heads", i) for i in range(len(groups.blocks))}
    gates |= {("hidden", i): groups.readers("hidden", i) for i in range(len(groups.blocks))}
    gates |= {("dim", 0): groups.readers("dim")}
    totals: dict[tuple[str, int], Tensor] = {}
    count = 0
    for batch in parts:
        _backward(loop, student, batch.to(accelerator.device), config, last)
        count += 1
        for (part, i), readers in gates.items():
            change = sum(_gate(linear(model, name), _mean(seen, part, i)) for name in readers)
            assert isinstance(change, Tensor)
            if part == "heads":
                change = change.view(-1, groups.config.head_width()).sum(1)
            totals[part, i] = totals.get((part, i), 0) + change.abs()
    assert count, "no batch to measure importance on"
    found = {
        k: (accelerator.reduce(v, "mean") if accelerator.num_processes > 1 else v).cpu() / count for k, v in totals.items()
    }
    n = range(len(groups.blocks))
    return Scores("taylor", [found["heads", i] for i in n], [found["hidden", i] for i in n], found["dim", 0])


def _backward(loop: Stepper, student: Student, batch: Batch, config: TrainConfig, step: int) -> None:
    """Gradients of one batch's loss, in float32, in evaluation mode (no stochastic depth)."""
    model, objectives = student.module, config.objectives
    model.zero_grad(set_to_none=True)
    with loop.autocast(loop.teacher):
        targets = loop.targets(step, batch, [batch])[loop.grids["student"]][0]
    chosen = loop.chosen(batch, loop.grids["student"])
    local_crops = len(batch.local_crops) // (len(batch.global_crops) // 2)
    if local_crops and objectives.dino:
        use = partial(local_terms, targets=targets, config=objectives, local_crops=local_crops)
        torch.stack(list(model(batch.local_crops, None, use).values())).sum().backward()
    last = partial(global_terms, targets=targets, config=objectives, local_crops=local_crops, chosen=chosen)
    terms = model(batch.global_crops, chosen if config.mask_input else None, last)
    torch.stack(list(terms.values())).sum().backward()


@torch.no_grad()
def _gate(layer: nn.Linear, mean: Tensor | None) -> Tensor:
    """dL of every input column of a layer when it is scaled to nothing, or put at its mean: sum over outputs of W (g - mean g_b)."""
    if layer.weight.grad is None:  # a head that this objective does not use
        return layer.weight.new_zeros(layer.in_features, dtype=torch.float64)
    w, g = layer.weight.double(), layer.weight.grad.double()
    change = (w * g).sum(0)
    if mean is not None and layer.bias is not None and layer.bias.grad is not None:
        change = change - mean.to(w.device) * (w * layer.bias.grad.double()[:, None]).sum(0)
    return change


def _mean(seen: Activations | None, part: str, block: int) -> Tensor | None:
    if seen is None or part == "dim":
        return None
    return seen.attended[block] if part == "heads" else seen.hidden[block]


def measure(
    kind: Kind,
    images: int,
    student: HeadedBackbone,
    teacher: HeadedBackbone | None,
    training: TrainConfig,
    source: Any,
    normalize: str,
    seed: int,
    runtime: RuntimeConfig,
    teacher_normalize: str | None = None,
) -> tuple[Scores, Activations]:
    """Scores of a student and its activations, on `images` training images as the recovery's loader gives them.

    Args:
        teacher: for `taylor`.
        training, source, normalize, seed, runtime, teacher_normalize: as the recovery's `train` takes them.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="no")
    share = accelerator.process_index, accelerator.num_processes
    groups = UnitGroups(student)
    assert isinstance(student.backbone, Backbone)
    steps = -(-images // training.batch)

    def loader() -> Iterable[Batch]:
        settings = LoaderSettings(
            training.crops, training.masks, groups.config.patch, normalize, training.batch, seed, share,
            teacher_normalize=teacher_normalize, device=accelerator.device,
        )  # fmt: skip
        return batches(source, settings, 0, steps, default_workers(runtime.workers))

    copied = copy.deepcopy(student.backbone).to(accelerator.device)
    seen = activations(copied, (batch.global_crops.to(accelerator.device) for batch in loader()))
    seen = _over_processes(seen, accelerator)
    if kind == "magnitude":
        return energy_scores(groups, None), seen
    if kind == "activation":
        return energy_scores(groups, seen), seen
    assert teacher is not None, "taylor needs the teacher"
    return taylor_scores(groups, teacher, loader(), training, seen, accelerator), seen


def _over_processes(seen: Activations, accelerator: Any) -> Activations:
    """The mean over processes (each has as many images), on the CPU: every process must choose the same cuts."""

    def mean(values: list[Tensor]) -> list[Tensor]:
        if accelerator.num_processes > 1:
            values = [accelerator.reduce(v, "mean") for v in values]
        return [v.cpu() for v in values]

    return Activations(**{name: mean(values) for name, values in vars(seen).items()})
