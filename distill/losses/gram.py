"""Gram anchoring: keep the similarities among an image's patches as an anchor has them (DINOv3, arXiv 2508.10104, "Gram anchoring").

Long training erodes patch features while CLS features still gain. The loss leaves the features free to move as long as the Gram matrix
of their directions stays: it has no width, so student and anchor may differ in theirs, and no projector is needed in distillation.

Shape legend: C crops, N patches, D and E widths of student and anchor.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from distill.config import Config

CHUNK = 2**24  # numbers of the N x N matrices alive at once: 64 MiB


class GramConfig(Config):
    """Gram anchoring as an objective. Shares are of all steps of the run.

    In pretraining the anchor is a snapshot of the moving average, which costs a copy of the backbone and its forward pass; with a frozen
    teacher it is that teacher, `snapshot`, `refresh` and `refreshes` have no meaning, and `start: 0` is the natural choice (DINOv3 itself
    distils without it, having seen no erosion there).
    Defaults are DINOv3's: snapshot at 200k, loss from 1M on, then three refreshes 10k apart, of 1.2M steps. The anchor is early on
    purpose: one taken at 1M steps, when patches have eroded, harms.

    Attributes:
        weight: of the loss below.
        start: share from which on the loss is applied.
        snapshot: share at which the anchor is first taken.
        refresh: share between two refreshes of the anchor, counted from `start`; 0 for none.
        refreshes: how many of them at most.
    """

    weight: float = 2.0
    start: float = 0.83
    snapshot: float = 0.17
    refresh: float = 0.008
    refreshes: int = 3

    def problems(self) -> list[str]:
        found = []
        if self.weight <= 0:
            found.append(f"weight must be above 0, got {self.weight}: to go without, leave gram out")
        for name in ("start", "snapshot", "refresh"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"{name} is a share of the run between 0 and 1, got {getattr(self, name)}")
        if self.snapshot > self.start and self.snapshot != GramConfig.model_fields["snapshot"].default:
            found.append(f"snapshot {self.snapshot} must not be after start {self.start}: there would be no anchor yet")
        if self.refreshes < 0:
            found.append(f"refreshes must be at least 0, got {self.refreshes}")
        return found

    def first_step(self, total: int) -> int:
        """The step from which on the loss is applied, of `total` steps."""
        return round(self.start * total)

    def snapshots(self, total: int) -> list[int]:
        """Steps before whose forward pass the moving average is copied to the anchor; the first of them is not after `first_step`."""
        start, every = self.first_step(total), round(self.refresh * total)
        later = [start + i * every for i in range(1, self.refreshes + 1)] if every else []
        return [round(min(self.snapshot, self.start) * total), *(step for step in later if step < total)]


def gram_loss(student_CND: Float[Tensor, "c n d"], anchor_CNE: Float[Tensor, "c n e"]) -> Float[Tensor, ""]:
    """Mean over crops and over all N x N pairs of patches of (cos_student - cos_anchor)^2 (the paper's loss as the public code's mean,
    so that `weight` does not depend on N).

    As in the published training: all patches, masked ones too, Gram matrices per image, negative similarities kept (its options to cut
    them off, or to compare patches across images, were off there and are not offered). No gradient reaches the anchor, which must be on
    the student's grid: an anchor seen at twice the resolution and resampled down, as the paper's refinement has it, fits as well.

    Always float32. Gradients are made in the forward pass, some images at a time, so that no N x N matrix is kept for the backward pass.
    """
    if student_CND.numel() == 0:
        return student_CND.float().sum()
    with torch.autocast(student_CND.device.type, enabled=False):
        kind = torch.promote_types(student_CND.dtype, torch.float32)
        student = F.normalize(student_CND.to(kind), dim=-1, eps=1e-6)
        anchor = F.normalize(anchor_CNE.detach().to(kind), dim=-1, eps=1e-6)
        return _GramDifference.apply(student, anchor)


class _GramDifference(torch.autograd.Function):
    """sum_c |S_c S_c' - A_c A_c'|^2 / (C N^2); its gradient is 4 (S S' - A A') S / (C N^2), both matrices being symmetric."""

    @staticmethod
    def forward(ctx: Any, student_CND: Tensor, anchor_CNE: Tensor) -> Tensor:
        c, n, _ = student_CND.shape
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(student_CND) if wanted else None
        loss = student_CND.new_zeros(())
        images = max(1, CHUNK // n**2)
        for i in range(0, c, images):
            s, a = student_CND[i : i + images], anchor_CNE[i : i + images]
            difference = torch.baddbmm(torch.bmm(s, s.mT), a, a.mT, alpha=-1)
            loss += difference.square().sum()
            if gradient is not None:
                torch.bmm(difference, s, out=gradient[i : i + images])
        if gradient is not None:
            ctx.save_for_backward(gradient.mul_(4 / (c * n * n)))
        return loss / (c * n * n)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * above[0], None
