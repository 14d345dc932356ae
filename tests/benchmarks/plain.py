"""The yardstick of `step.py`: one DINOv2-style training step written plainly, as public code does it, and independent of `distill`.

Every crop size has its own forward pass through timm's ViT, all activations live until one backward, logits, log-probabilities and targets
are dense float32 tensors, AdamW loops over the parameters and so does the moving average. Weight names are those of `HeadedBackbone`, and
`tests/distill/test_plain_baseline.py` holds the losses of its steps to those of ours: it is slower, not different.

Shape legend: B images, D width, K prototypes, N patches, M chosen (masked) patches, T tokens, H W pixels.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

SHAPES = {"vit_small": (384, 12, 6), "vit_base": (768, 12, 12), "vit_large": (1024, 24, 16)}  # width, blocks, attention heads


@dataclass(frozen=True)
class Workload:
    """What one step computes; defaults are DINOv2's ViT-S/14.

    Attributes:
        arch, teacher_arch: names of SHAPES; teacher_arch is "" where the moving average is the teacher (pretraining).
        batch: images a step; each gives 2 global crops and `locals` local ones.
        shared_head: one head for CLS and patches.
        hidden, bottleneck, prototypes: of the heads.
        layer_scale: initial value of LayerScale.
    """

    arch: str = "vit_small"
    teacher_arch: str = ""
    batch: int = 4
    patch: int = 14
    global_size: int = 224
    local_size: int = 98
    locals: int = 8
    shared_head: bool = False
    prototypes: int = 65536
    hidden: int = 2048
    bottleneck: int = 256
    layer_scale: float = 1e-5
    teacher_temperature: float = 0.05
    lr: float = 1e-4
    weight_decay: float = 0.04
    momentum: float = 0.992


class PlainViT(nn.Module):
    """timm's ViT with a mask token and DINOv2's resampling of positions; images [B, 3, H, W] -> tokens [B, 1 + N, D], normalised."""

    def __init__(self, arch: str, work: Workload):
        super().__init__()
        dim, depth, heads = SHAPES[arch]
        vit = VisionTransformer(
            img_size=work.global_size,
            patch_size=work.patch,
            num_classes=0,
            global_pool="",
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            init_values=work.layer_scale,
            dynamic_img_size=True,
        )
        assert vit.cls_token is not None
        assert vit.pos_embed is not None
        self.patch_embed, self.blocks, self.norm = vit.patch_embed, vit.blocks, vit.norm
        self.cls_token, self.pos_embed = vit.cls_token, vit.pos_embed
        self.mask_token = nn.Parameter(torch.zeros(1, dim))

    def positions(self, h: int, w: int) -> Tensor:
        n = self.pos_embed.shape[1] - 1
        if h * w == n and h == w:
            return self.pos_embed
        m = round(n**0.5)
        patches = self.pos_embed[:, 1:].float().reshape(1, m, m, -1).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, scale_factor=((h + 0.1) / m, (w + 0.1) / m), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1].float(), patches.permute(0, 2, 3, 1).reshape(1, h * w, -1)], 1)

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        x = self.patch_embed(images)  # timm gives [B, h, w, D]
        _, h, w, _ = x.shape
        x = x.flatten(1, 2)
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype).unsqueeze(0), x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.positions(h, w)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class PlainHead(nn.Module):
    """MLP, L2-normalisation, weight-normed linear layer: tokens [M, D] -> logits [M, K]."""

    def __init__(self, dim: int, work: Workload):
        super().__init__()
        parts: list[nn.Module] = []
        for a, b in pairwise([dim, work.hidden, work.hidden, work.bottleneck]):
            parts += [nn.Linear(a, b), nn.GELU()]
        self.mlp = nn.Sequential(*parts[:-1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the deprecated form is the one in public code
            self.last_layer: nn.Module = nn.utils.weight_norm(nn.Linear(work.bottleneck, work.prototypes, bias=False))
        self.last_layer.get_parameter("weight_g").data.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, eps=1e-12))


class PlainModel(nn.Module):
    """Backbone, head, and a second head for patches (None: the first serves both)."""

    def __init__(self, backbone: PlainViT, dino: PlainHead, ibot: PlainHead | None):
        super().__init__()
        self.backbone, self.dino, self.ibot = backbone, dino, ibot

    def parts(self) -> list[nn.Module]:
        return [self.backbone, self.dino] + ([] if self.ibot is None else [self.ibot])

    def patch_head(self) -> PlainHead:
        return self.dino if self.ibot is None else self.ibot


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """As in public code: [S, K] -> [S, K], dense float32, without subtracting the maximum."""
    q = torch.exp(logits.float() / temperature).t()
    k, samples = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(dim=1, keepdim=True)
        q /= k
        q /= q.sum(dim=0, keepdim=True)
        q /= samples
    q *= samples
    return q.t()


def cross_entropy(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """[S, K] twice -> [S]."""
    return -(targets * F.log_softmax(logits.float() / temperature, dim=-1)).sum(-1)


def koleo(x: Tensor, eps: float = 1e-8) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.float(), eps=eps, dim=-1)
        dots = x @ x.t()
        dots.fill_diagonal_(-1)
        nearest = x[dots.argmax(1)]
        return -torch.log(nn.PairwiseDistance(2, eps=eps)(x, nearest) + eps).mean()


def losses(
    student: PlainModel,
    teacher: PlainModel,
    global_crops: Tensor,
    local_crops: Tensor,
    masks: Tensor,
    mask_input: bool,
    teacher_temperature: float,
    temperature: float = 0.1,
) -> dict[str, Tensor]:
    """The weighted terms of one step (1 DINO, 1 iBOT, 0.1 KoLeo), crops crop-major: [2B, 3, H, W], [L B, 3, h, w], masks [2B, N]."""
    b, n_local = global_crops.shape[0] // 2, local_crops.shape[0] // (global_crops.shape[0] // 2)
    weights = (1 / masks.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(masks)[masks]
    with torch.no_grad():
        tokens = teacher.backbone(global_crops)
        dino_targets = sinkhorn(teacher.dino(tokens[:, 0]), teacher_temperature).chunk(2)
        ibot_targets = sinkhorn(teacher.patch_head()(tokens[:, 1:][masks]), teacher_temperature)

    tokens_global = student.backbone(global_crops, masks if mask_input else None)
    tokens_local = student.backbone(local_crops)
    logits_global = student.dino(tokens_global[:, 0])
    logits_local = student.dino(tokens_local[:, 0])
    logits_patches = student.patch_head()(tokens_global[:, 1:][masks])

    pairs = 2 + 2 * n_local
    dino_global = dino_local = torch.zeros(())
    for i, logits in enumerate(logits_global.chunk(2)):
        dino_global = dino_global + cross_entropy(dino_targets[1 - i], logits, temperature).mean() / pairs
    for logits in logits_local.chunk(n_local):
        for target in dino_targets:
            dino_local = dino_local + cross_entropy(target, logits, temperature).mean() / pairs
    ibot = (cross_entropy(ibot_targets, logits_patches, temperature) * weights).sum() / (2 * b)
    first, second = tokens_global[:, 0].chunk(2)
    spread = 0.1 * (koleo(first) + koleo(second))
    return {"dino_global": dino_global, "dino_local": dino_local, "ibot": ibot, "koleo": spread}


def optimizer(student: PlainModel, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Decay on matrices and tokens, none on biases, norms and LayerScale; the loop over parameters is the default on a CPU."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, p in student.named_parameters():
        if p.requires_grad:
            groups[not (name.endswith("bias") or "norm" in name or "gamma" in name)].append(p)
    decays = {True: weight_decay, False: 0.0}
    return torch.optim.AdamW([{"params": ps, "weight_decay": decays[d]} for d, ps in groups.items()], lr=lr, foreach=False)


def update_average(average: nn.Module, module: nn.Module, momentum: float) -> None:
    with torch.no_grad():
        for ours, theirs in zip(average.parameters(), module.parameters(), strict=True):
            ours.mul_(momentum).add_((1 - momentum) * theirs)


def build(arch: str, work: Workload) -> PlainModel:
    dim = SHAPES[arch][0]
    return PlainModel(PlainViT(arch, work), PlainHead(dim, work), None if work.shared_head else PlainHead(dim, work))


def plain_step(
    work: Workload, crops: tuple[Tensor, Tensor, Tensor], weights: list[dict[str, Tensor]], bf16: bool
) -> Callable[[], dict[str, float]]:
    """A function that does one whole training step on the same crops (global [2B, 3, H, W], local [L B, 3, h, w], masks [2B, N]) and
    returns its terms. With a teacher the masks only choose patches, without one they also mask the input.

    Args:
        weights: of the student, then of the teacher if there is one.
    """
    student, average = build(work.arch, work), build(work.arch, work)
    student.load_state_dict(weights[0])
    average.load_state_dict(weights[0])
    student.train()
    guide = average.requires_grad_(False).eval()
    if work.teacher_arch:
        guide = build(work.teacher_arch, work).requires_grad_(False).eval()
        guide.load_state_dict(weights[1])
        student.backbone.mask_token.requires_grad_(False)
    optim = optimizer(student, work.lr, work.weight_decay)
    global_crops, local_crops, masks = crops

    def step() -> dict[str, float]:
        optim.zero_grad()
        with torch.autocast(global_crops.device.type, torch.bfloat16, enabled=bf16):
            terms = losses(student, guide, global_crops, local_crops, masks, not work.teacher_arch, work.teacher_temperature)
        sum(terms.values(), torch.zeros(())).backward()
        for part in student.parts():
            nn.utils.clip_grad_norm_(part.parameters(), 3.0)
        optim.step()
        update_average(average, student, work.momentum)
        return {name: value.item() for name, value in terms.items()}

    return step
