"""The KoLeo regulariser: spread the CLS tokens of a batch over the sphere (Sablayrolles et al., arXiv 1806.03198).

Shape legend: B images, D width.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def koleo_loss(x_BD: Float[Tensor, "b d"], eps: float = 1e-8) -> Float[Tensor, ""]:
    """-mean log(|x_i - nn(x_i)| + eps) on L2-normalised rows, nn being the most similar other row; 0 for a single row.

    Always float32: in half precision eps underflows and the log becomes infinite. As in the reference eps is added to every coordinate
    of the difference too, so exact duplicates give a large finite value with a finite gradient.
    """
    if x_BD.shape[0] < 2:
        return x_BD.float().sum() * 0
    with torch.autocast(x_BD.device.type, enabled=False):
        x_BD = F.normalize(x_BD.float(), dim=-1, eps=1e-8)
        with torch.no_grad():
            similarity = x_BD @ x_BD.T
            similarity.fill_diagonal_(-torch.inf)
            nearest = similarity.argmax(1)
        distance = (x_BD - x_BD[nearest] + eps).norm(dim=-1)
        return -torch.log(distance + eps).mean()
