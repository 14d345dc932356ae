"""The image-level objective: CLS prototype distributions of the student's crops against the teacher's global crops.

Cross-entropy over all (teacher global, student crop) pairs except equal global crops: the sum of the pairs' batch means, divided by the
number of all pairs, G (G - 1) + G L, which is 2 + 2 L with two global crops (DINO, arXiv 2104.14294, eq. 3). The parts of global and of
local crops are functions of their own, since a step runs them one after the other; their sum is the loss.

Shape legend: G global crops, L local crops, B images, K prototypes. Crops are crop-major: all first crops, then all second ones.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from distill.losses.targets import Assignment, Dense

CrossEntropy = Callable[[Tensor, Assignment, Tensor], Tensor]  # (student's rows, their targets, a weight each) -> weighted sum


def dino_global(
    student_SX: Float[Tensor, "s x"], targets_GBK: Float[Tensor, "g b k"], local_crops: int, cross_entropy: CrossEntropy
) -> Float[Tensor, ""]:
    """The part of the student's global crops [G B, ...]: each against the other global crops of its image."""
    g, b, k = targets_GBK.shape
    # A sum over pairs is linear in the target: the mean of the other crops' targets stands for all of them.
    others_GBK = targets_GBK.flip(0) if g == 2 else (targets_GBK.sum(0) - targets_GBK) / (g - 1)
    weights = _weights(student_SX, (g - 1) / (b * _pairs(g, local_crops)))
    return cross_entropy(student_SX, Dense(others_GBK.reshape(g * b, k)), weights)


def dino_local(
    student_SX: Float[Tensor, "s x"], targets_GBK: Float[Tensor, "g b k"], local_crops: int, cross_entropy: CrossEntropy
) -> Float[Tensor, ""]:
    """The part of the student's local crops [L B, ...]: each against all global crops of its image."""
    g, b, _ = targets_GBK.shape
    weights = _weights(student_SX, g / (b * _pairs(g, local_crops)))
    return cross_entropy(student_SX, Dense(targets_GBK.mean(0), repeat=local_crops), weights)


def _pairs(g: int, local_crops: int) -> int:
    return g * (g - 1) + g * local_crops


def _weights(rows: Tensor, value: float) -> Tensor:
    return torch.full((len(rows),), value, device=rows.device)
