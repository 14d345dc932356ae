"""The patch-level objective: the student's masked patches against the teacher's view of them.

Shape legend: C global crops, N patches a crop, M chosen (masked) patches over all crops, K prototypes.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def patch_weights(masks_CN: Bool[Tensor, "c n"]) -> Float[Tensor, "m"]:
    """1 / (number of chosen patches of that patch's crop), for every chosen patch in row-major order."""
    counts = masks_CN.sum(1, keepdim=True).clamp_min(1)
    return (1 / counts.float()).expand_as(masks_CN)[masks_CN]


def ibot_loss(
    student_MK: Float[Tensor, "m k"],
    targets_MK: Float[Tensor, "m k"],
    weights_M: Float[Tensor, "m"],
    crops: int,
    temperature: float = 0.1,
) -> Float[Tensor, ""]:
    """(1/C) sum_m w_m CE_m; C counts all global crops, those without masks too (iBOT, arXiv 2111.07832, eq. 2, DINOv2's weighting)."""
    log_MK = F.log_softmax(student_MK.float() / temperature, -1)
    ce_M = -torch.einsum("mk,mk->m", targets_MK, log_MK)
    return (ce_M * weights_M).sum() / crops
