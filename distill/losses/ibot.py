"""The patch-level objective: the student's masked patches against the teacher's view of them.

Shape legend: C global crops, N patches a crop, M chosen (masked) patches over all crops.
"""

from jaxtyping import Bool, Float
from torch import Tensor


def patch_weights(masks_CN: Bool[Tensor, "c n"]) -> Float[Tensor, "m"]:
    """1 / (C x number of chosen patches of that patch's crop), for every chosen patch in row-major order.

    The loss is the sum of the patches' cross-entropies with these weights: each crop's patches count as one, and C counts all global crops,
    those without masks too (iBOT, arXiv 2111.07832, eq. 2, DINOv2's weighting).
    """
    counts = masks_CN.sum(1, keepdim=True).clamp_min(1)
    return (1 / (counts.float() * len(masks_CN))).expand_as(masks_CN)[masks_CN]
