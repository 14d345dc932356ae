"""The image-level objective: CLS prototype distributions of the student's crops against the teacher's global crops.

Shape legend: G global crops, L local crops, B images, K prototypes. Crops are crop-major: all first crops, then all second ones.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def dino_loss(
    student_global_GBK: Float[Tensor, "g b k"],
    student_local_LBK: Float[Tensor, "l b k"],
    targets_GBK: Float[Tensor, "g b k"],
    temperature: float = 0.1,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Cross-entropy over all (teacher global, student crop) pairs except equal global crops; (global part, local part).

    Each part is the sum of its pairs' batch means, divided by the number of all pairs, G(G-1) + G L (2 + 2L with two global crops):
    their sum is the loss (DINO, arXiv 2104.14294, eq. 3).
    """
    g, b, _ = targets_GBK.shape
    pairs = g * (g - 1) + g * student_local_LBK.shape[0]
    log_global = F.log_softmax(student_global_GBK.float() / temperature, -1)
    log_local = F.log_softmax(student_local_LBK.float() / temperature, -1)
    # A sum over the other teacher crops equals the sum over all minus the same one: one product instead of G(G-1).
    total_BK = targets_GBK.sum(0)
    others_GBK = total_BK - targets_GBK if g > 2 else targets_GBK.flip(0)
    loss_global = -torch.einsum("gbk,gbk->", others_GBK, log_global) / (b * pairs)
    loss_local = -torch.einsum("bk,lbk->", total_BK, log_local) / (b * pairs)
    return loss_global, loss_local
