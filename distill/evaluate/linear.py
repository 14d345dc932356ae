"""A linear classifier on frozen features: a grid of learning rates and feature sets in one pass, chosen without test images.

Shape legend: G gallery images, B batch, D width, L learning rates (heads), C classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.encoder import Features
from distill.evaluate.knn import hold_out

SMALL_PRODUCT = 2**26  # multiply-adds of a step's matrix product
FEATURE_SETS = {"cls": False, "cls+mean_patch": True}


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
    """

    lrs: tuple[float, ...]
    steps: int = 500
    batch: int = 128
    standardize: bool = True
    seed: int = 0


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


def train_heads(features: list[Tensor], labels: Tensor, classes: int, settings: ProbeSettings) -> list[Heads]:
    """One set of L heads for each feature set [G, D_i], all fed the same batches.

    The gradient of softmax cross-entropy is written out (probabilities minus one-hot): all heads of a set are one matrix
    product each way. A head whose learning rate is too high diverges to inf or NaN on its own; the others do not notice.
    """
    scalings = [_scaling(x, settings.standardize) for x in features]
    inputs = [(x.float() - shift) * scale for x, (shift, scale) in zip(features, scalings, strict=True)]
    n, n_lrs = len(labels), len(settings.lrs)
    batch = min(settings.batch, n)
    peak = torch.tensor([scaled_lr(lr, batch) for lr in settings.lrs]).repeat_interleave(classes)
    peaks = [peak / x.shape[1] if settings.standardize else peak for x in inputs]
    # The bias is one more input, of squared size 1: its rate is not divided by D, but bounded where it would diverge by itself.
    bias_peak = peak.clamp(max=1.0) if settings.standardize else peak
    weights = [x.new_zeros(x.shape[1], n_lrs * classes) for x in inputs]
    biases = [x.new_zeros(n_lrs * classes) for x in inputs]
    moments = [[torch.zeros_like(p) for p in group] for group in (weights, biases)]
    truth = F.one_hot(labels, classes).float()
    schedule = torch.cos(torch.arange(settings.steps) / settings.steps * torch.pi) / 2 + 0.5
    with _threads(batch * max(x.shape[1] for x in inputs) * n_lrs * classes):
        for index, factor in zip(_batches(n, batch, settings), schedule, strict=False):
            target = truth[index][:, None]
            for i, x in enumerate(inputs):
                x_BD = x[index]
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
    """Predicted labels int64 [M], and what was chosen on the held-out part of the gallery with its accuracy there, percent."""

    predicted: Tensor
    lr: float
    features: str
    held_out_top1: float


def probe(gallery: Features, labels: Tensor, test: Features, settings: ProbeSettings) -> Probe | str:
    """Choose learning rate and feature set on a held-out fifth of the gallery, refit on all of it, predict the test images.

    Features: cls [., D], patches [., N, D'] (a mean patch is N = 1). Labels may be any integers. Returns the sentence why where
    there is no result.
    """
    names, dense = labels.unique(return_inverse=True)
    kept, held = hold_out(dense, settings.seed)
    if not len(held):
        return f"A gallery of {len(labels)} images is too small to hold a part out for choosing the probe's learning rate."
    sets = {name: probe_features([gallery], avgpool) for name, avgpool in FEATURE_SETS.items()}
    trained = train_heads([x[kept] for x in sets.values()], dense[kept], len(names), settings)
    tried = []
    for heads, (name, x) in zip(trained, sets.items(), strict=True):
        logits = heads.logits(x[held])
        tried += [(*_score(logits[:, i], dense[held]), name, lr) for i, lr in enumerate(settings.lrs)]
    top1, _, name, lr = max(tried, key=lambda t: (t[0], -t[1]))
    if top1 >= 0:
        final = train_heads([sets[name]], dense, len(names), replace(settings, lrs=(lr,)))[0]
        logits = final.logits(probe_features([test], FEATURE_SETS[name]))[:, 0]
        if logits.isfinite().all():
            return Probe(names[logits.argmax(1)], lr, name, top1)
    return "The linear probe diverged at every learning rate of the grid: name smaller ones."


def _score(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """(accuracy in percent, cross-entropy); a head that diverged gets (-1, inf) and is never chosen."""
    if not logits.isfinite().all():
        return -1.0, float("inf")
    return 100 * (logits.argmax(1) == labels).float().mean().item(), F.cross_entropy(logits, labels).item()
