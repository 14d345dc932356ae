"""A linear head on frozen patch tokens, trained on what the pixels under each token are: how often each class, or each bin of depth.

DINOv2 (section 7.4) upsamples the logits of a linear layer and takes the cross-entropy of every pixel. With nearest upsampling
all pixels of a patch share their logits, and their mean cross-entropy is that of the patch's histogram: a soft target. Training on
histograms is therefore the same objective, without a pixel in the loop; the logits are still upsampled bilinearly when a head is judged.

Shape legend: n images, N tokens an image, L layers, B tokens of a minibatch, F inputs of the head, R learning rates, K outputs, S smooth
components of outputs, H W pixels.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from distill.evaluate.linear import SMALL_PRODUCT, scaled_lr
from distill.evaluate.task import Stored, Unfit
from distill.runtime import cpu_threads

SLICE = 2**24  # numbers of a slice that is made float32: 64 MiB
MOMENTUM = 0.9
NOT_FINITE = "The features hold NaN or infinity (patches are kept as float16, in which a number above 65,504 becomes infinity)."


class Tokens:
    """Head inputs [n N, F] of a set, made float32 a few at a time: a token of each layer, earliest first, then the layers' CLS if asked.

    Attributes:
        n, per_image, width: n, N, F.
    """

    def __init__(self, stored: Stored, cls: bool):
        assert stored.patches is not None
        self.patches, self.cls = stored.patches, stored.cls if cls else None
        layers, self.n, self.per_image, each = stored.patches.shape
        self.width = layers * (each + (stored.cls.shape[2] if cls else 0))

    def at(self, index: np.ndarray) -> Tensor:
        """int64 [B], image * N + token -> [B, F]."""
        image, token = np.divmod(index, self.per_image)
        parts = [layer[image, token] for layer in self.patches] + (
            [] if self.cls is None else [layer[image] for layer in self.cls]
        )
        return torch.cat([torch.from_numpy(p).float() for p in parts], 1)

    def of(self, images: np.ndarray) -> np.ndarray:
        """Indices for `at` of all tokens of some images."""
        return (images[:, None] * self.per_image + np.arange(self.per_image)).ravel()

    def slices(self, images: np.ndarray, besides: int = 0) -> Iterator[Tensor]:
        """All tokens of some images, [b N, F] at a time; `besides`: numbers that the caller makes of each token."""
        step = max(1, SLICE // (self.per_image * (self.width + besides)))
        for start in range(0, len(images), step):
            yield self.at(self.of(images[start : start + step]))

    def scaling(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        """Shift and scale [F] that give every input mean 0 and deviation 1 over some images: the batch norm before DINOv2's linear layer.

        Raises:
            Unfit: NaN or infinity among the features.
        """
        total, square, count = torch.zeros(self.width, dtype=torch.float64), torch.zeros(self.width, dtype=torch.float64), 0
        origin = self.at(images[:1] * self.per_image)[0]  # sums of squares about 0 would lose the deviations beside large means
        for x in self.slices(images):
            x -= origin
            total += x.sum(0, dtype=torch.float64)
            square += x.square().sum(0, dtype=torch.float64)
            count += len(x)
        if not square.isfinite().all():
            raise Unfit(NOT_FINITE)
        mean = total / count
        std = (square / count - mean.square()).clamp(min=0).sqrt()
        mean = mean + origin
        # An input that never varies says nothing; dividing by its rounding noise would make it the loudest of all.
        return mean.float(), torch.where(std > 1e-6 * mean.abs(), 1 / std, 0.0).float()


def histograms(ids: Iterable[np.ndarray], grid: int) -> sparse.csr_matrix:
    """Maps [H, W] of ids (negative: does not count) -> [n grid², K] float32: the share of a patch's pixels that are of each id.

    A row sums to the share of its pixels that count. A pixel belongs to the patch that its centre lies in.
    """
    rows, columns, values, n = [], [], [], 0
    for map_HW in ids:
        y, x = ((np.arange(side) * 2 + 1) * grid // (2 * side) for side in map_HW.shape)
        patch = y[:, None] * grid + x
        kinds = int(map_HW.max(initial=0)) + 1
        counted = map_HW >= 0
        counts = np.bincount(patch[counted] * kinds + map_HW[counted], minlength=grid * grid * kinds).reshape(-1, kinds)
        row, column = counts.nonzero()
        rows.append(row + n * grid * grid)
        columns.append(column)
        values.append(counts[row, column] / np.bincount(patch.ravel(), minlength=grid * grid)[row])
        n += 1
    parts = [np.concatenate(p) for p in (values, rows, columns)]
    kinds = int(parts[2].max(initial=0)) + 1
    return sparse.csr_matrix((parts[0].astype(np.float32), (parts[1], parts[2])), (n * grid * grid, kinds))


@dataclass(frozen=True)
class FitSettings:
    """How heads are trained: SGD with momentum 0.9, cosine to 0, no weight decay, from 0, on standardised inputs.

    Attributes:
        lrs: base learning rates, one head each; scaled as in linear.ProbeSettings: by batch / 256, and divided by F.
        steps: updates.
        batch: tokens an update, drawn anew whenever all were used.
        seed: of the held-out images and of the order of the tokens.
    """

    lrs: tuple[float, ...]
    steps: int
    batch: int
    seed: int


@dataclass(frozen=True)
class Fitted:
    """A head: weight [F, K], bias [K], shift and scale [F] of its inputs; the learning rate and what it scored on the held-out images."""

    weight: Tensor
    bias: Tensor
    shift: Tensor
    scale: Tensor
    lr: float
    held_out: float


def fit(
    tokens: Tokens,
    targets: sparse.csr_matrix,
    settings: FitSettings,
    answer: Callable[[Tensor], Tensor],
    score: Callable[[Tensor, sparse.csr_matrix], float],
    components: Tensor | None = None,
) -> Fitted:
    """Choose the learning rate on a held-out fifth of the images, then train on all of them.

    Args:
        targets: [n N, K], see `histograms`.
        answer: logits [..., K] -> what is said of each token [...].
        score: (answers [n_held N], their targets) -> a number, larger is better. It sees the pixels of the held-out images through their
            histograms: each pixel is answered as its patch is.
        components: as in `train`.

    Raises:
        Unfit: features that are not finite, a single image, no pixel to learn from, or no learning rate that converged.
    """
    if tokens.n < 2:
        raise Unfit("One training image is too few: part of them is held out to choose the learning rate.")
    order = np.random.default_rng(settings.seed).permutation(tokens.n)
    kept, held = np.sort(order[max(1, tokens.n // 5) :]), np.sort(order[: max(1, tokens.n // 5)])
    shift, scale = tokens.scaling(np.arange(tokens.n))
    weight, bias = train(tokens, targets, kept, shift, scale, settings, components)
    rates, outputs = bias.shape
    answers: list[list[Tensor]] = [[] for _ in range(rates)]
    finite = weight.isfinite().all(0).all(1)
    for x in tokens.slices(held, besides=rates * outputs):
        x.sub_(shift).mul_(scale)
        for r in range(rates):
            answers[r].append(answer(torch.addmm(bias[r], x, weight[:, r])))
    truth = targets[tokens.of(held)]
    scores = [score(torch.cat(a), truth) if ok else -np.inf for a, ok in zip(answers, finite.tolist(), strict=True)]
    best = max(range(rates), key=lambda r: (np.nan_to_num(scores[r], nan=-np.inf), -settings.lrs[r]))
    if not np.isfinite(scores[best]):
        raise Unfit(
            "The head diverged at every learning rate of the grid, or no held-out pixel counts: name smaller rates or more images."
        )
    one = replace(settings, lrs=(settings.lrs[best],))
    weight, bias = train(tokens, targets, np.arange(tokens.n), shift, scale, one, components)
    if not weight.isfinite().all():
        raise Unfit("The head diverged on all training images: name smaller learning rates.")
    return Fitted(weight[:, 0].contiguous(), bias[0].contiguous(), shift, scale, settings.lrs[best], float(scores[best]))


def train(
    tokens: Tokens,
    targets: sparse.csr_matrix,
    images: np.ndarray,
    shift: Tensor,
    scale: Tensor,
    settings: FitSettings,
    components: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """R heads on the tokens of some images, all fed the same batches: weight [F, R, K], bias [R, K].

    The gradient of softmax cross-entropy against shares is written out, as in linear.train_heads: one matrix product each way for all
    heads. A token counts by the share of its pixels that count.

    Args:
        components: [S, K] orthonormal rows that logits are combinations of. Cosines make what is said of neighbouring bins similar and the
            products K / S times smaller. None: every output by itself.
    """
    index = tokens.of(images)
    index = index[np.asarray(targets.sum(1)).ravel()[index] > 0]
    if not len(index):
        raise Unfit("No pixel of the training images counts: all are ignored.")
    rates, outputs = len(settings.lrs), targets.shape[1]
    free = outputs if components is None else len(components)
    batch = min(settings.batch, len(index))
    peak = torch.tensor([scaled_lr(lr, batch) for lr in settings.lrs]).repeat_interleave(free)
    # The bias is one more input, of squared size 1: its rate is not divided by F, but bounded where it would diverge by itself.
    peaks = peak / tokens.width, peak.clamp(max=1.0)
    weight, bias = torch.zeros(tokens.width, rates * free), torch.zeros(rates * free)
    moments = torch.zeros_like(weight), torch.zeros_like(bias)
    schedule = np.cos(np.arange(settings.steps) / settings.steps * np.pi) / 2 + 0.5
    # One thread for small products: sharing them costs more than they do (see linear.py).
    with cpu_threads(1 if batch * tokens.width * rates * free < SMALL_PRODUCT else None):
        for some, factor in zip(_batches(index, batch, settings.seed), schedule, strict=False):
            x_BF = tokens.at(some).sub_(shift).mul_(scale)
            truth_B1K = torch.from_numpy(targets[some].toarray())[:, None]
            logits = torch.addmm(bias, x_BF, weight).unflatten(1, (rates, free))
            logits = logits if components is None else logits @ components
            error = (logits.softmax(-1) * truth_B1K.sum(-1, keepdim=True) - truth_B1K) / batch
            error = (error if components is None else error @ components.T).flatten(1)
            moments[0].mul_(MOMENTUM).addmm_(x_BF.T, error)
            moments[1].mul_(MOMENTUM).add_(error.sum(0))
            weight.sub_(moments[0] * (peaks[0] * factor))
            bias.sub_(moments[1] * (peaks[1] * factor))
    shaped = weight.unflatten(1, (rates, free)), bias.view(rates, free)
    return shaped if components is None else (shaped[0] @ components, shaped[1] @ components)


def cosines(count: int, outputs: int) -> Tensor:
    """[count, outputs]: the slowest orthonormal cosines over the outputs (DCT-II), the constant first."""
    k, at = torch.arange(min(count, outputs))[:, None], torch.arange(outputs)[None] + 0.5
    rows = torch.cos(torch.pi * k * at / outputs)
    return rows / rows.norm(dim=1, keepdim=True)


def _batches(index: np.ndarray, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Tokens of one update after the other, without end; ascending, so that a memory-mapped file is read in one direction."""
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(index)
        for start in range(0, len(order) - batch + 1, batch):
            yield np.sort(order[start : start + batch])
