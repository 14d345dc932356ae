"""Where the rows of micro-batches lie in the whole batch.

A batch is crop-major: all images' first crops, then all second ones; a micro-batch holds some of the images with all of their crops. What
is kept or compared for the whole batch (cached targets) is in the batch's order, what a step works on in its micro-batch's.

Shape legend: C = 2 B global crops, N patches, M chosen patches, K prototypes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.losses.targets import Assignment


def rows_of_crops(crops: int, parts: int, device: torch.device) -> list[Tensor]:
    """Which of the C crops, crop-major, belong to each micro-batch."""
    images = torch.arange(crops, device=device).view(2, -1)
    return [images[:, a:b].flatten() for a, b in edges(crops // 2, parts)]


def rows_of_patches(chosen_CN: Tensor, parts: int) -> list[Tensor]:
    """Which of the chosen patches, numbered in row-major order, belong to each micro-batch, in its own order."""
    numbers_CN = torch.zeros_like(chosen_CN, dtype=torch.int64)
    numbers_CN[chosen_CN] = torch.arange(int(chosen_CN.sum()), device=chosen_CN.device)
    return [numbers_CN[rows][chosen_CN[rows]] for rows in rows_of_crops(len(chosen_CN), parts, chosen_CN.device)]


def edges(images: int, parts: int) -> list[tuple[int, int]]:
    """Where `Batch.parts` cuts."""
    return [(i * images // parts, (i + 1) * images // parts) for i in range(parts)]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """CLS rows [2 b, X] of micro-batches -> of the whole batch, crop-major."""
    return torch.cat([p.view(2, len(p) // 2, -1) for p in parts], 1).flatten(0, 1)


def in_order(parts: Sequence[Tensor], chosen_CN: Tensor) -> Tensor:
    """Rows of chosen patches of micro-batches -> in row-major order of the whole batch."""
    rows = torch.cat(rows_of_patches(chosen_CN, len(parts)))
    found = torch.cat(list(parts))
    return torch.empty_like(found).index_copy_(0, rows, found)


class InOrder:
    """Assignments of chosen patches of micro-batches, in row-major order of the whole batch, made when they are asked for."""

    def __init__(self, parts: Sequence[Assignment], chosen_CN: Tensor):
        self.parts = parts
        rows = rows_of_patches(chosen_CN, len(parts))
        self.place = torch.empty(sum(len(r) for r in rows), 2, dtype=torch.int64)  # (micro-batch, row in it) of every patch
        for i, r in enumerate(rows):
            self.place[r.cpu()] = torch.stack([torch.full((len(r),), i), torch.arange(len(r))], 1)

    def __len__(self) -> int:
        return len(self.place)

    def rows(self, start: int, stop: int) -> Tensor:
        """[stop - start, K] float32; neighbours in one micro-batch are made together."""
        place = self.place[start:stop]
        jumps = (place[1:] - place[:-1] != torch.tensor([0, 1])).any(1).nonzero().flatten() + 1
        runs = [*jumps.tolist(), len(place)] if len(place) else [0]
        found, first = [], 0
        for last in runs:
            part, row = (place[first] if len(place) else torch.zeros(2, dtype=torch.int64)).tolist()
            found.append(self.parts[part].rows(row, row + last - first))
            first = last
        return torch.cat(found)
