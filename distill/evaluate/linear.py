"""A linear classifier on frozen features: a grid of learning rates and feature sets in one pass, chosen without test images.

A feature set is CLS of the last layer or layers, with or without the last mean patch (DINOv2, section 7.1: last 1 or 4). Sets share their
parts, and their columns are put together a batch at a time, so the grid costs no copies of the features.

Shape legend: G gallery images, B batch, D width, L learning rates (heads), C classes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.encoder import Features
from distill.evaluate.knn import hold_out

SMALL_PRODUCT = 2**26  # multiply-adds of a step's matrix product
CHUNK_ELEMENTS = 2**25  # logits held at once: 128 MiB


def probe_features(layers: list[Features], avgpool: bool) -> Tensor:
    """DINOv2's probe input: CLS of the given layers, earliest first, then the mean patch of the LAST layer if `avgpool`.

    Features of n layers (each after the final LayerNorm), cls [B, D] -> [B, n D] or [B, (n + 1) D].
    """
    parts = [layer.cls for layer in layers]
    return torch.cat([*parts, layers[-1].patches.mean(1)] if avgpool else parts, 1)


def scaled_lr(base: float, batch: int, world: int = 1) -> float:
    """The linear scaling rule as DINOv2's probe applies it."""
    return base * batch * world / 256


@dataclass(frozen=True)
class ProbeSettings:
    """How heads are trained: SGD with momentum 0.9, cosine to 0, no weight decay, zero initialisation.

    Attributes:
        lrs: base learning rates, one head each; scaled by batch / 256, and with `standardize` divided by D, the mean squared
            norm of a standardised input, so that one grid serves every width.
        steps: updates; the data are reshuffled whenever they are used up.
        batch: images an update.
        standardize: give every feature mean 0 and deviation 1 over the training images first: same optimum, reached sooner.
        seed: of the order of the images.
        layers: numbers of last layers whose CLS make a feature set; those that the features lack are left out.
    """

    lrs: tuple[float, ...]
    steps: int = 500
    batch: int = 128
    standardize: bool = True
    seed: int = 0
    layers: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Heads:
    """Trained heads: weight [D, L, C], bias [L, C], and the standardisation they expect, shift and scale [D]."""

    weight: Tensor
    bias: Tensor
    shift: Tensor
    scale: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, L, C]."""
        return ((x - self.shift) * self.scale @ self.weight.flatten(1)).unflatten(1, self.bias.shape) + self.bias


@dataclass(frozen=True)
class Columns:
    """A feature set [G, D] as parts [G, d] side by side, not copied together.

    Attributes:
        index: int64, which rows of the parts it has; None for all.
    """

    parts: Sequence[Tensor]
    index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.parts[0] if self.index is None else self.index)

    def width(self) -> int:
        return sum(p.shape[1] for p in self.parts)

    def rows(self, index: Tensor) -> Tensor:
        """[B, D] float32."""
        index = index if self.index is None else self.index[index]
        return torch.cat([p[index].float() for p in self.parts], 1)

    def some(self, index: Tensor) -> "Columns":
        return Columns(self.parts, index if self.index is None else self.index[index])

    def scaling(self, standardize: bool) -> tuple[Tensor, Tensor]:
        """Shift and scale [D], one part at a time."""
        own = (p if self.index is None else p[self.index] for p in self.parts)
        shifts, scales = zip(*(_scaling(p, standardize) for p in own), strict=True)
        return torch.cat(shifts), torch.cat(scales)


def feature_sets(layers: Sequence[Features], wanted: Sequence[int]) -> dict[str, Columns]:
    """The sets by name: `cls`, `cls+mean_patch`, `last4_cls`, `last4_cls+mean_patch`, as far as there are so many layers."""
    mean_patch = layers[-1].patches.mean(1)
    found: dict[str, Columns] = {}
    for n in wanted:
        if n <= len(layers):
            cls, name = [layer.cls for layer in layers[-n:]], "cls" if n == 1 else f"last{n}_cls"
            found |= {name: Columns(cls), f"{name}+mean_patch": Columns([*cls, mean_patch])}
    return found


def train_heads(features: Sequence[Tensor | Columns], labels: Tensor, classes: int, settings: ProbeSettings) -> list[Heads]:
    """One set of L heads for each feature set [G, D_i], all fed the same batches.

    The gradient of softmax cross-entropy is written out (probabilities minus one-hot): all heads of a set are one matrix
    product each way. A head whose learning rate is too high diverges to inf or NaN on its own; the others do not notice.
    """
    sets = [x if isinstance(x, Columns) else Columns([x]) for x in features]
    scalings = [x.scaling(settings.standardize) for x in sets]
    n, n_lrs = len(labels), len(settings.lrs)
    batch = min(settings.batch, n)
    peak = torch.tensor([scaled_lr(lr, batch) for lr in settings.lrs]).repeat_interleave(classes)
    peaks = [peak / x.width() if settings.standardize else peak for x in sets]
    # The bias is one more input, of squared size 1: its rate is not divided by D, but bounded where it would diverge by itself.
    bias_peak = peak.clamp(max=1.0) if settings.standardize else peak
    weights = [torch.zeros(x.width(), n_lrs * classes) for x in sets]
    biases = [torch.zeros(n_lrs * classes) for _ in sets]
    moments = [[torch.zeros_like(p) for p in group] for group in (weights, biases)]
    schedule = torch.cos(torch.arange(settings.steps) / settings.steps * torch.pi) / 2 + 0.5
    with _threads(batch * max(x.width() for x in sets) * n_lrs * classes):
        for index, factor in zip(_batches(n, batch, settings), schedule, strict=False):
            target = F.one_hot(labels[index], classes).float()[:, None]
            for i, (x, (shift, scale)) in enumerate(zip(sets, scalings, strict=True)):
                x_BD = (x.rows(index) - shift) * scale
                logits = torch.addmm(biases[i], x_BD, weights[i]).unflatten(1, (n_lrs, classes))
                error = ((logits.softmax(-1) - target) / len(index)).flatten(1)
                moments[0][i].mul_(0.9).addmm_(x_BD.T, error)
                moments[1][i].mul_(0.9).add_(error.sum(0))
                weights[i].sub_(moments[0][i] * (peaks[i] * factor))
                biases[i].sub_(moments[1][i] * (bias_peak * factor))
    shape = (n_lrs, classes)
    return [Heads(w.unflatten(1, shape), b.view(shape), *s) for w, b, s in zip(weights, biases, scalings, strict=True)]


@contextmanager
def _threads(elements: int) -> Iterator[None]:
    """One thread for small products: sharing them costs more than they do (measured: thirty times more on a busy machine)."""
    before = torch.get_num_threads()
    if elements < SMALL_PRODUCT:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _scaling(x: Tensor, standardize: bool) -> tuple[Tensor, Tensor]:
    if not standardize:
        return x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    std, mean = torch.std_mean(x.float(), 0, correction=0)
    # A feature that never varies says nothing; dividing by its rounding noise would make it the loudest of all.
    return mean, torch.where(std > 1e-6 * mean.abs(), 1 / std, 0.0)


def _batches(n: int, batch: int, settings: ProbeSettings) -> Iterator[Tensor]:
    """`steps` index tensors; a permutation at a time, its incomplete end left out."""
    generator = torch.Generator().manual_seed(settings.seed)
    given = 0
    while given < settings.steps:
        for index in torch.randperm(n, generator=generator)[: n // batch * batch].split(batch):
            given += 1
            yield index


@dataclass(frozen=True)
class Probe:
    """Predicted labels int64 [M], what was chosen on the held-out part of the gallery with its accuracy there in percent, and the heads
    (L = 1) behind the predictions with the label of each of their C outputs, int64 [C].
    """

    predicted: Tensor
    lr: float
    features: str
    held_out_top1: float
    heads: Heads
    classes: Tensor


def probe(
    gallery: Features | Sequence[Features], labels: Tensor, test: Features | Sequence[Features], settings: ProbeSettings
) -> Probe | str:
    """Choose learning rate and feature set on a held-out fifth of the gallery, refit on all of it, predict the test images.

    Features of one layer, or of several, earliest first: cls [., D], patches [., N, D'] (a mean patch is N = 1). Labels may be any
    integers. Returns the sentence why where there is no result.
    """
    names, dense = labels.unique(return_inverse=True)
    kept, held = hold_out(dense, settings.seed)
    if not len(held):
        return f"A gallery of {len(labels)} images is too small to hold a part out for choosing the probe's learning rate."
    sets, asked = (feature_sets([x] if isinstance(x, Features) else x, settings.layers) for x in (gallery, test))
    if not sets:
        return f"The probe is asked for the last {min(settings.layers)} layers, more than these features have: name fewer."
    trained = train_heads([x.some(kept) for x in sets.values()], dense[kept], len(names), settings)
    tried = []
    for heads, (name, x) in zip(trained, sets.items(), strict=True):
        judged = _judge(heads, x.some(held), dense[held])
        tried += [(*scores, name, lr) for scores, lr in zip(judged, settings.lrs, strict=True)]
    top1, _, name, lr = max(tried, key=lambda t: (t[0], -t[1]))
    if top1 >= 0:
        final = train_heads([sets[name]], dense, len(names), replace(settings, lrs=(lr,)))[0]
        said = [logits[:, 0].argmax(1) if logits.isfinite().all() else None for logits in _logits(final, asked[name])]
        finite = [x for x in said if x is not None]
        if len(finite) == len(said):
            return Probe(names[torch.cat(finite)], lr, name, top1, final, names)
    return "The linear probe diverged at every learning rate of the grid: name smaller ones."


def _logits(heads: Heads, x: Columns) -> Iterator[Tensor]:
    """[., L, C] for all rows of a set, so many at a time that they fit in memory."""
    for index in torch.arange(len(x)).split(max(1, CHUNK_ELEMENTS // heads.bias.numel())):
        yield heads.logits(x.rows(index))


def _judge(heads: Heads, x: Columns, labels: Tensor) -> list[tuple[float, float]]:
    """(accuracy in percent, cross-entropy) of each head; one that diverged gets (-1, inf) and is never chosen."""
    n_lrs, done = len(heads.bias), 0
    right, loss, finite = torch.zeros(n_lrs), torch.zeros(n_lrs, dtype=torch.float64), torch.ones(n_lrs, dtype=torch.bool)
    for logits in _logits(heads, x):
        truth = labels[done : done + len(logits)]
        done += len(logits)
        for i in range(n_lrs):
            finite[i] &= logits[:, i].isfinite().all()
            right[i] += (logits[:, i].argmax(1) == truth).sum()
            loss[i] += F.cross_entropy(logits[:, i], truth).item() * len(truth)
    return [
        (100 * (n_right / done).item(), total.item() / done) if ok else (-1.0, float("inf"))
        for n_right, total, ok in zip(right, loss, finite, strict=True)
    ]
