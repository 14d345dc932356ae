"""Block masks for iBOT (BEiT's generator, as DINOv2 uses it).

Shape legend: N patches of a grid, C crops.
"""

import math
from collections.abc import Sequence

import numpy as np


def block_mask(
    g: np.random.Generator,
    grid: tuple[int, int],
    target: int,
    min_block: int = 4,
    max_share: float = 0.5,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> np.ndarray:
    """Mask close to, and never more than, `target` patches of a grid (rows, columns) with rectangles; bool [rows, columns].

    Each rectangle's area is drawn between `min_block` and what remains (at most `max_share` of the grid), with
    log-uniform aspect. A rectangle is taken when it adds
    1..remaining new patches; ten failures in a row end the mask, so a draw may fall a few short.
    """
    rows, columns = grid
    mask = np.zeros(grid, bool)
    count, most = 0, int(max_share * rows * columns)
    while count < target:
        remaining = min(target - count, most)
        added = 0
        for _ in range(10):
            area = min_block + (remaining - min_block) * g.random()  # towards the end `remaining` is the smaller one
            ratio = math.exp(g.uniform(math.log(aspect[0]), math.log(aspect[1])))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if w >= columns or h >= rows or h < 1 or w < 1:
                continue
            top, left = int(g.integers(0, rows - h + 1)), int(g.integers(0, columns - w + 1))
            block = mask[top : top + h, left : left + w]
            new = h * w - int(block.sum())
            if 0 < new <= remaining:
                block[:] = True
                added = new
                break
        if added == 0:
            break
        count += added
    return mask


def batch_masks(
    g: np.random.Generator,
    crops: int,
    grid: tuple[int, int],
    probability: float,
    ratios: tuple[float, float],
    min_block: int = 4,
    chosen: Sequence[int] | None = None,
) -> np.ndarray:
    """Masks of a batch of `crops` global crops; bool [C, N], or [len(chosen), N] for some of them.

    Exactly floor(probability * C) crops are masked, at random places; their ratios are drawn from as many equal bins of `ratios`,
    so every batch covers the whole range (DINOv2's collate). Which crop has which bin is one draw for the whole batch, and each crop
    then has a random stream of its own: a process that makes only its `chosen` crops makes what one process would have made of them.
    """
    n = grid[0] * grid[1]
    masked = int(crops * probability)
    edges = np.linspace(*ratios, masked + 1)
    bins, key = g.permutation(crops), int(g.integers(2**63))
    chosen = range(crops) if chosen is None else chosen
    masks = np.zeros((len(chosen), n), bool)
    for mask, crop in zip(masks, chosen, strict=True):
        if (i := bins[crop]) < masked:
            own = np.random.default_rng((key, crop))
            mask[:] = block_mask(own, grid, int(n * own.uniform(edges[i], edges[i + 1])), min_block).reshape(-1)
    return masks
