"""How much every unit of a network matters, in one currency for heads, hidden units and channels, so that they can compete.

    taylor      |sum w dL/dw| over a unit's columns in the layers that read it, L the distillation loss: the first-order change of the loss
                when the unit is scaled to nothing (Molchanov et al., arXiv 1906.10771; Michel et al., arXiv 1905.10650, for heads). With
                activations known, the change when it is replaced by its mean, which is what `prune.py` does.
    activation  share of the residual stream's variance that is lost when the unit goes and its readers are fitted again to what is left
                (Optimal Brain Surgeon; for structures ZipLM, arXiv 2302.04089)
    magnitude   the same without any image: all units independent and of variance 1

A unit's columns are those of the layers that read it (`unit_groups.py`), with LayerScale folded in.

Shape legend: B images, T tokens, D width, H heads, d width of a head, I hidden width, O outputs of a layer.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
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
    """Moments over all tokens of the images seen. "Norms": norm1 and norm2 of every block in turn, then the final one.

    Attributes:
        attended: per block of proj's input, mean [H d] and covariance [H d, H d].
        hidden: per block of fc2's input, mean [I] and covariance [I, I].
        normed: per norm of its output, mean [D] and covariance [D, D].
        stream: per norm of its input, mean [D] and covariance [D, D].
    """

    attended: list[tuple[Tensor, Tensor]]
    hidden: list[tuple[Tensor, Tensor]]
    normed: list[tuple[Tensor, Tensor]]
    stream: list[tuple[Tensor, Tensor]]


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
    """Sum and sum of products of the rows that pass."""

    def __init__(self) -> None:
        self.n = 0
        self.sum: Any = 0
        self.products: Any = 0

    def __call__(self, x: Tensor) -> None:
        x_SD = x.detach().flatten(0, -2).float()
        self.n += len(x_SD)
        self.sum = self.sum + x_SD.sum(0, dtype=torch.float64)
        self.products = self.products + x_SD.T @ x_SD

    def read(self) -> tuple[Tensor, Tensor]:
        mean = self.sum / self.n
        return mean, (self.products.double() / self.n - mean[:, None] * mean).float()


@torch.no_grad()
def activations(backbone: Backbone, images: Iterable[Tensor]) -> Activations:
    """Moments of a backbone on batches of images [B, 3, H, W], preprocessed. The backbone is left as it was."""
    blocks: Any = backbone.blocks
    norms = [n for b in blocks for n in (b.norm1, b.norm2)] + [backbone.norm]
    attended, hidden = [_Moments() for _ in blocks], [_Moments() for _ in blocks]
    stream, normed = [_Moments() for _ in norms], [_Moments() for _ in norms]
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
    return Activations(*([m.read() for m in moments] for moments in (attended, hidden, normed, stream)))


@torch.no_grad()
def energy_scores(groups: UnitGroups, seen: Activations | None) -> Scores:
    """`activation`, or without activations `magnitude`.

    What a head or hidden unit writes counts relative to the variance of each channel of the stream, mean over channels. Of a channel of
    the stream counts the share of what each reading layer makes of it, times what that layer's half of the block writes in all, and its
    share of the final features.
    """
    model, config = groups.model, groups.config
    dim, depth, width = config.shape()[0], config.shape()[1], config.head_width()
    units: dict[str, list[Tensor]] = {"heads": [], "hidden": []}
    worth: dict[tuple[str, int], float] = {}
    for i, block in enumerate(groups.blocks):
        for j, (part, below) in enumerate((("heads", "qkv"), ("hidden", "fc1"))):
            (reader,) = groups.readers(part, i)
            w = linear(model, reader).weight.double() / dim**0.5
            scale: Any = getattr((block.ls1, block.ls2)[j], "gamma", None)
            w = w if scale is None else w * scale[:, None].double()
            cov = torch.eye(w.shape[1], dtype=w.dtype)
            if seen is not None:  # relative to the stream that the half has been added to, which the next norm reads
                w = w / torch.diagonal(seen.stream[2 * i + 1 + j][1]).double().clamp(min=1e-12).sqrt()[:, None]
                cov = (seen.attended, seen.hidden)[j][i][1].double()
            worth[below, i] = float((w @ cov * w).sum())
            layer = Reader(w, cov, 1.0)
            units[part].append(elimination([layer], width if part == "heads" else 1))
    if seen is None:  # no unit of measure: half a block is worth 1 on average
        for part, below in (("heads", "qkv"), ("hidden", "fc1")):
            mean = sum(worth[below, i] for i in range(depth)) / depth
            units[part] = [s / mean for s in units[part]]
            worth |= {(below, i): worth[below, i] / mean for i in range(depth)}
    norms = [n for b in groups.blocks for n in (b.norm1, b.norm2)] + [model.backbone.norm]
    covs = [torch.diag(n.weight.double().square()) for n in norms] if seen is None else [c.double() for _, c in seen.normed]
    layers = [Reader(torch.eye(dim, dtype=torch.float64), covs[-1], 1 / float(torch.trace(covs[-1]).clamp(min=1e-12)))]
    for name in groups.readers("dim"):
        if (place := norm_read_by(name, depth)) < 2 * depth:
            w, cov = linear(model, name).weight.double(), covs[place]
            share = worth[name.rsplit(".", 1)[1], place // 2] / float((w @ cov * w).sum().clamp(min=1e-12))
            layers.append(Reader(w, cov, share))
    return Scores("magnitude" if seen is None else "activation", units["heads"], units["hidden"], elimination(layers, 1))


@torch.no_grad()
def with_norms(scores: Scores, seen: Activations) -> Scores:
    """Scores whose channels also count for what they hold of the norms' statistics.

    A channel may say nothing to the layers and yet set the scale of all others: trained ViTs have a few with a tenth of the stream's
    variance each. Rescaled gains make up for such a channel on average, not token by token; the error grows as its share squared. (Without
    this the three largest of a trained ViT-S/14 were the first to go, and 32 channels fewer cost 0.29 of cosine instead of 0.03.)
    """
    squares = []
    for mean, cov in seen.stream:
        second = cov.double() + mean[:, None] * mean
        held = torch.diagonal(second) - 2 * second.mean(1) + second.mean()  # E[(x - mean over channels)^2]
        squares.append((held / held.sum().clamp(min=1e-12)).square())
    dim = scores.dim.double()
    return replace(scores, dim=dim + dim.sum() * torch.stack(squares).mean(0))


def norm_read_by(name: str, depth: int) -> int:
    """Number of the norm whose output the layer of this name (in a HeadedBackbone) takes in."""
    parts = name.split(".")
    return 2 * int(parts[2]) + (parts[-1] == "fc1") if parts[0] == "backbone" else 2 * depth


@dataclass
class Reader:
    """A layer that reads units: its weight [O, A], the covariance of its input [A, A], and how much its output's variance counts."""

    weight: Tensor
    cov: Tensor
    worth: float


@torch.no_grad()
def elimination(readers: list[Reader], width: int, at_once: int = 8) -> Tensor:
    """Variance of the readers' outputs that is lost, unit by unit, in the order in which the units go: the least first, every reader
    fitted again by least squares to the units that are left after each turn. [units], in the order of the units.

    Args:
        width: columns of a unit; at_once: how many units of one column go in a turn.
    """
    inverses = [torch.linalg.inv(damped(r.cov.double())) for r in readers]
    weights = [r.weight.double().clone() for r in readers]
    n = weights[0].shape[1] // width
    left = torch.arange(n)
    found, last = torch.zeros(n, dtype=torch.float64), 0.0
    while len(left):
        lost = torch.zeros(len(left), dtype=torch.float64)
        for r, w, inv in zip(readers, weights, inverses, strict=True):
            blocks = (
                inv.view(len(left), width, len(left), width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            )  # [units, width, width]
            w_UOd = w.view(len(w), len(left), width).transpose(0, 1)
            lost += r.worth * (w_UOd @ torch.linalg.inv(blocks) * w_UOd).sum((1, 2))
        order = lost.argsort()
        go = order[: at_once if width == 1 else 1]
        last = max(last, float(lost[go].mean()))  # what goes later never counts less
        found[left[go]] = torch.maximum(lost[go], torch.tensor(last, dtype=torch.float64))
        last = float(found[left[go]].max())
        stay = order[len(go) :].sort().values
        gone_columns, columns = _columns(go, width), _columns(stay, width)
        for i, (w, inv) in enumerate(zip(weights, inverses, strict=True)):
            carry = torch.linalg.solve(inv[gone_columns][:, gone_columns], inv[gone_columns][:, columns])
            weights[i] = w[:, columns] - w[:, gone_columns] @ carry
            inverses[i] = inv[columns][:, columns] - inv[columns][:, gone_columns] @ carry
        left = left[stay]
    return found


def _columns(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width)).flatten()


def damped(cov: Tensor) -> Tensor:
    """A covariance that can be inverted: a thousandth of the mean variance more on its diagonal."""
    mean = float(torch.diagonal(cov).mean().clamp(min=1e-12))
    return cov + 1e-3 * mean * torch.eye(len(cov), dtype=cov.dtype)


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
    return (seen.attended if part == "heads" else seen.hidden)[block][0]


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

    def mean(value: Tensor) -> Tensor:
        return (accelerator.reduce(value, "mean") if accelerator.num_processes > 1 else value).cpu()

    return Activations(**{name: [(mean(m), mean(c)) for m, c in moments] for name, moments in vars(seen).items()})
