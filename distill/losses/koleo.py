"""The KoLeo regulariser: spread the CLS tokens of a batch over the sphere (Sablayrolles et al., arXiv 1806.03198).

Shape legend: B images, D width.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from distill.losses.ranks import gather_rows, world


def koleo_loss(x_BD: Float[Tensor, "b d"], group: int | None = None, eps: float = 1e-8) -> Float[Tensor, ""]:
    """-mean log(|x_i - nn(x_i)| + eps) on L2-normalised rows, nn being the most similar other row; 0 where there is no other.

    Neighbours are looked for among the images of all processes, so that the number of processes changes nothing (the reference looks
    within each one); with `group`, among every `group` images in a row.

    Always float32: in half precision eps underflows and the log becomes infinite. As in the reference eps is added to every coordinate
    of the difference too, so exact duplicates give a large finite value with a finite gradient.
    """
    if group is not None and group < len(x_BD):
        parts = x_BD.split(group)
        return torch.stack([_nearest_term(part, part, 0, eps) * len(part) for part in parts]).sum() / len(x_BD)
    if group is not None or world() == 1:
        return _nearest_term(x_BD, x_BD, 0, eps)
    return _nearest_term(x_BD, gather_rows(x_BD), torch.distributed.get_rank() * len(x_BD), eps)


def _nearest_term(x_BD: Tensor, among_AD: Tensor, first: int, eps: float) -> Tensor:
    """The mean over rows x, which are rows first, first + 1, ... of `among`."""
    if len(among_AD) < 2:
        return x_BD.float().sum() * 0
    with torch.autocast(x_BD.device.type, enabled=False):
        kind = torch.promote_types(x_BD.dtype, torch.float32)
        x_BD, among_AD = (F.normalize(x.to(kind), dim=-1, eps=1e-8) for x in (x_BD, among_AD))
        with torch.no_grad():
            similarity_BA = x_BD @ among_AD.T
            own = torch.arange(len(x_BD), device=x_BD.device)
            similarity_BA[own, own + first] = -torch.inf
            nearest = similarity_BA.argmax(1)
        distance = (x_BD - among_AD[nearest] + eps).norm(dim=-1)
        return -torch.log(distance + eps).mean()
