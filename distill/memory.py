"""An estimate of a training's memory, so that more crops than memory are a sentence before the start and not a killed process.

Counted is what grows with the settings; what a framework adds is left out. Measured peaks lie between 0.7 and 1.5 times of it
(tests/distill/test_memory.py holds it to that).

Letters: B images of a process, M images of a micro-batch, T tokens a crop, D width, K prototypes, W processes.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch

from distill.errors import EnvironmentFailed
from distill.losses.prototypes import LOGITS_AT_ONCE
from distill.models.backbone import BackboneConfig
from distill.models.headed import HeadedBackbone
from distill.models.heads import HeadConfig, head_parameters
from distill.models.kinds import AnyConfig, backbone_measures, backbone_parameters, make_backbone
from distill.runtime import RuntimeConfig, uses_bf16
from distill.train import TrainConfig

FLOAT, HALF = 4, 2


@dataclass(frozen=True)
class Shape:
    """What a model's memory depends on.

    Attributes:
        ibot: its own head for patches; None where DINO's serves both or there is none.
        match: parameters of the projectors to the teacher's width.
        backbone_frozen: only heads learn.
    """

    backbone: AnyConfig
    dino: HeadConfig | None = None
    ibot: HeadConfig | None = None
    match: int = 0
    backbone_frozen: bool = False

    @property
    def patch_head(self) -> HeadConfig | None:
        return self.ibot or self.dino

    def heads(self) -> list[HeadConfig]:
        return [h for h in (self.dino, self.ibot) if h is not None]

    def head_parameters(self) -> int:
        dim = backbone_measures(self.backbone)[0]
        return sum(head_parameters(dim, h) for h in self.heads()) + self.match

    def prototypes(self) -> int:
        """Numbers in the prototypes' matrices."""
        return sum(h.prototypes * h.bottleneck for h in self.heads())


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the fullest moment of a step.

    Attributes:
        teacher: a frozen one; averages: of the students, which teach where there is no other.
        weights, gradients, adam: of the students; gradients with the copy that replicas exchange.
        casts: copies of weights in the number format of the products, prototypes of norm 1, and what is gathered of sharded models.
        activations: kept for the backward pass of the student that keeps most.
        targets: the teacher's logits and assignments, and slices of the student's logits.
        images: crops.
    """

    teacher: float
    averages: float
    weights: float
    gradients: float
    adam: float
    casts: float
    activations: float
    targets: float
    images: float

    def total(self) -> int:
        return round(sum(asdict(self).values()))


def shape_of(model: HeadedBackbone) -> Shape:
    match = 0 if model.match is None else sum(p.numel() for p in model.match.parameters())
    dino, ibot = (None if h is None else h.config for h in (model.dino, model.ibot))
    return Shape(model.backbone.config, dino, ibot, match, model.backbone_frozen)


def training_bytes_of(
    training: TrainConfig,
    teacher: HeadedBackbone | None,
    students: Iterable[HeadedBackbone],
    processes: int = 1,
    runtime: RuntimeConfig | None = None,
) -> int:
    """`estimate` of models that are there already."""
    frozen = None if teacher is None else shape_of(teacher)
    return estimate(training, frozen, [shape_of(s) for s in students], processes, runtime).total()


def estimate(
    training: TrainConfig,
    teacher: Shape | None,
    students: list[Shape],
    processes: int = 1,
    runtime: RuntimeConfig | None = None,
) -> Memory:
    """Memory of a training on each of `processes`.

    Args:
        teacher: the frozen one; None where the student's average teaches.
        runtime: `shard`, `micro_batch` and `recompute_blocks` are read.
    """
    runtime = runtime or RuntimeConfig()
    shard = runtime.shard and processes > 1
    bf16 = {
        id(s): uses_bf16(training.precision, backbone_measures(s.backbone)[0]) for s in [*students, *filter(None, [teacher])]
    }
    weights = averages = gradients = adam = casts = frozen = 0.0
    for s in students:
        whole = s.backbone_frozen or not shard  # a frozen backbone stays whole, and so do the heads on it
        share = 1 if whole else 1 / processes
        backbone, heads = backbone_parameters(s.backbone), s.head_parameters()
        learned = heads + (0 if s.backbone_frozen else backbone)
        weights += FLOAT * (backbone + heads) * share
        averages += FLOAT * learned * share
        gradients += FLOAT * learned * (share if not whole or processes == 1 else 2)  # replicas exchange a copy
        adam += 2 * FLOAT * learned * share
        models = 1 + (teacher is None and not s.backbone_frozen)  # the average runs too where it teaches
        casts += models * (_casts(s, bf16[id(s)]) if whole else _gathered(s))
    if teacher is not None:
        backbone, heads = backbone_parameters(teacher.backbone), teacher.head_parameters()
        frozen = (HALF if bf16[id(teacher)] else FLOAT) * backbone + FLOAT * teacher.prototypes()
        frozen += (HALF if bf16[id(teacher)] else FLOAT) * (heads - teacher.prototypes())
        casts += _gathered(teacher) / (2 if bf16[id(teacher)] else 1) if shard else _frozen_casts(teacher, bf16[id(teacher)])
        frozen /= processes if shard else 1
    images = training.batch / processes
    kept, targets = [], []
    for s in students:
        kept.append(activation_bytes(training, s, processes, runtime))
        half = bf16[id(s if teacher is None else teacher)]
        targets.append(target_bytes(training, s, processes, runtime, half, bf16[id(s)]))
    crops = training.crops
    pixels = 3 * images * (2 * crops.global_size**2 + crops.local_count * crops.local_size**2)
    # The step's crops, and in the same process the next step's: as bytes, and as numbers being changed.
    made = 1 if torch.cuda.is_available() else 2.25
    return Memory(frozen, averages, weights, gradients, adam, casts, max(kept), max(targets), FLOAT * pixels * made)


def _casts(s: Shape, bf16: bool) -> float:
    """Copies of weights that are kept between steps: all matrices in bf16, or those with LayerScale folded in; prototypes of norm 1."""
    if s.backbone_frozen:
        return (HALF if bf16 else FLOAT) * s.prototypes() * 2  # of the heads and of their average
    of_blocks = backbone_parameters(s.backbone) if isinstance(s.backbone, BackboneConfig) else 0
    folded = of_blocks
    if isinstance(s.backbone, BackboneConfig) and not bf16:
        config = s.backbone
        inner = sum(b.heads * config.head_width() + b.hidden for b in config.widths())
        folded = config.shape()[0] * inner if config.layer_scale else 0
    return (HALF if bf16 else FLOAT) * (folded + s.prototypes())


def _frozen_casts(s: Shape, bf16: bool) -> float:
    return (HALF if bf16 else FLOAT) * s.prototypes()


def _gathered(s: Shape) -> float:
    """Of a sharded model: a block that runs and the next one, and whatever is in no block."""
    depth = backbone_measures(s.backbone)[2]
    return FLOAT * (2 * backbone_parameters(s.backbone) / depth + s.head_parameters() + s.prototypes())


def tokens_of(config: BackboneConfig, size: int) -> int:
    return (size // config.patch) ** 2 + 1 + config.registers


def micro_images(training: TrainConfig, processes: int, runtime: RuntimeConfig) -> float:
    share = training.batch / processes
    return min(share, runtime.micro_batch or share)


def activation_bytes(training: TrainConfig, s: Shape, processes: int, runtime: RuntimeConfig) -> float:
    """What a student's forward pass keeps for its backward pass: of the global crops or of the local ones, which never live together."""
    crops, m = training.crops, micro_images(training, processes, runtime)
    bf16 = uses_bf16(training.precision, backbone_measures(s.backbone)[0])
    value = HALF if bf16 else FLOAT
    chosen = chosen_patches(training, s, m)
    passes = [(2.0 * m, crops.global_size, 2 * m * bool(training.objectives.dino), chosen)]
    if crops.local_count and training.objectives.dino:
        passes.append((crops.local_count * m, crops.local_size, crops.local_count * m, 0.0))
    found = []
    for n, size, cls_rows, patch_rows in passes:
        kept = 0.0 if s.backbone_frozen else n * image_activations(s.backbone, size, value, runtime.recompute_blocks)
        for head, rows in ((s.dino, cls_rows), (s.patch_head, patch_rows)):
            if head is not None:  # each hidden layer before and after GELU
                kept += rows * (2 * head.hidden * (head.layers - 1) * value + 3 * FLOAT * head.bottleneck)
        if s.match and not cls_rows:
            kept += n * 4 * value * backbone_measures(s.backbone)[0]
        found.append(kept)
    return max(found)


def image_activations(config: AnyConfig, size: int, value: int, recompute: bool) -> float:
    """Bytes kept for one crop; `value` bytes a number in the blocks. Residuals are float32."""
    if not isinstance(config, BackboneConfig):
        return _by_layers(config, size)
    dim, depth, _, ffn = config.shape()
    t, kept, widest = tokens_of(config, size), 0.0, max(b.hidden for b in config.widths()) * (1 if ffn == "mlp" else 3)
    fused = 4 if value == HALF or t <= 128 else 5  # q, k, v and the result; the fused kernel's result is also reordered
    # Both halves keep their input (float32) and what `fused.py` lists; backward then needs as much again of one half.
    for widths in config.widths():
        inner = fused * widths.heads * config.head_width() + widths.hidden * (1 if ffn == "mlp" else 3)
        block = (1 - config.drop_path) * (2 * FLOAT * dim + value * inner)
        kept = max(kept, block) if recompute else kept + block
    passing = value * widest + 2 * FLOAT * dim
    outside = 4 * FLOAT * dim  # patches, their positions, the final norm and its result
    return t * (kept + (depth * FLOAT * dim if recompute else 0) + passing + outside)


def _by_layers(config: AnyConfig, size: int) -> float:
    """The outputs of all layers, counted on the meta device."""
    from torch import nn

    with torch.device("meta"):
        network = make_backbone(config).eval()
        count = 0

        def add(module: nn.Module, given: tuple, out: object) -> None:
            nonlocal count
            own = next(module.parameters(recurse=False), None) is not None or not list(module.children())
            new = own and isinstance(out, torch.Tensor) and out is not given[0]
            count += out.numel() if new else 0  # type: ignore[attr-defined]

        for module in network.modules():
            module.register_forward_hook(add)
        with torch.no_grad():
            network(torch.zeros(1, 3, size, size))
    return FLOAT * count


def chosen_patches(training: TrainConfig, s: Shape, images: float) -> float:
    """Patches of so many images' global crops that iBOT asks."""
    if not training.objectives.ibot:
        return 0.0
    patches = 2 * images * (training.crops.global_size // backbone_measures(s.backbone)[1]) ** 2
    return patches if training.masks is None else patches * training.masks.probability * sum(training.masks.ratio) / 2


def target_bytes(
    training: TrainConfig, s: Shape, processes: int, runtime: RuntimeConfig, teacher_bf16: bool, student_bf16: bool
) -> float:
    """The teacher's logits of the process's whole share, CLS assignments as numbers, and slices of the student's logits with the gradient
    of its prototypes.
    """
    share, m = training.batch / processes, micro_images(training, processes, runtime)
    logit, total, slices = HALF if teacher_bf16 else FLOAT, 0.0, [0.0]
    rows_of = (
        (s.dino, training.objectives.dino, 2 * share),
        (s.patch_head, training.objectives.ibot, chosen_patches(training, s, share)),
    )
    for i, (head, on, rows) in enumerate(rows_of):
        if head is None or not on:
            continue
        total += rows * head.prototypes * (logit if i else 2 * FLOAT)  # CLS: in full, once more turned round
        seen = rows * m / share if i else m * max(2, training.crops.local_count)
        one = (HALF if student_bf16 else FLOAT) * min(LOGITS_AT_ONCE, seen * head.prototypes)
        slices.append(one + FLOAT * head.prototypes * head.bottleneck * 2)
    return total + max(slices)


def refuse_if_too_large(needed: int, title: str) -> None:
    """Raise where the estimate is well above the memory that is free.

    Raises:
        EnvironmentFailed: with what to lower.
    """
    import psutil

    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    if needed > 1.5 * free:
        raise EnvironmentFailed(
            f"{title} needs about {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free. "
            "Lower batch, crops.local_count, crop sizes or the number of prototypes, or set runtime.micro_batch or "
            "runtime.recompute_blocks."
        )
