"""One training step: the teacher's targets, then for every student forward, backward, clip, update, average.

A step's losses are sums over the student's crops once the targets stand, so local crops, global crops and micro-batches are taken through
the network one after the other and their activations never live together.

Shape legend: B images of a process, C = 2 B global crops, N patches, M chosen patches.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distill.cast_cache import CastCache
from distill.data.loader import Batch
from distill.encoder import Features
from distill.errors import DecantError
from distill.losses.assignments import TopK, dense
from distill.losses.targets import Sparse
from distill.micro_batches import InOrder, in_order, joined, rows_of_crops, rows_of_patches
from distill.models.backbone import Backbone
from distill.models.headed import HeadedBackbone, frozen
from distill.monitors import Limits, collapse_statistics
from distill.objectives import Guide, Targets, global_terms, local_terms, make_centrings, patch_weights
from distill.optim import Schedules, clip_each, set_step, teacher_temperature, update_average
from distill.runtime import RuntimeConfig, uses_bf16
from distill.sharding import fully_sharded, hollow, is_sharded, linear_in_bf16, sharded_copy
from distill.targets_cache import Cached, TargetsCache
from distill.training_state import AfterStep, Student

if TYPE_CHECKING:
    from distill.train import TrainConfig

MAX_BAD_STEPS = 5  # in a row, then the run stops: skipping goes on for ever when the weights themselves are ruined


@dataclass(frozen=True)
class Told:
    """What a step says of a student: its loss `terms`; `more`: gradient norms, counters and, where asked, monitors with their `limits`."""

    terms: dict[str, float]
    more: dict[str, float]
    limits: Limits | None


class Stepper:
    """Whatever stays from step to step besides the students.

    Attributes:
        extras: modules with a state: centrings, standardiser, Gram anchor.
    """

    def __init__(
        self,
        config: "TrainConfig",
        group: dict[str, Student],
        teacher: HeadedBackbone | None,
        total: int,
        accelerator: Any,
        runtime: RuntimeConfig,
        micro: int = 1,
        cache: TargetsCache | None = None,
        after_step: AfterStep | None = None,
    ):
        self.config, self.group, self.accelerator, self.micro, self.cache = config, group, accelerator, micro, cache
        self.after_step = after_step
        for name, student in group.items():
            student.project(name, after_step)
        asked = config.objectives
        self.schedules = Schedules(config.optim, config.batch, total)
        self.temperature = teacher_temperature(asked.teacher_temperature, asked.temperature_warmup, total)
        first = next(iter(group.values()))
        self.moving = [] if teacher is not None else moving_modules(first)
        same_view = not config.mask_input and config.teacher_size in (None, config.crops.global_size)
        self.shares_backbone = teacher is None and first.module.backbone_frozen and same_view
        if self.shares_backbone:
            fast_convolutions(first.module)
        self.teacher = first.average if teacher is None else self._ready(teacher, runtime)
        # 0 is the teacher's own grid; a student with another one is compared with resampled patches.
        self.own_grid = self._grid(self.teacher, config.teacher_size)
        self.grids = {name: 0 if (g := self._grid(s.average, None)) == self.own_grid else g for name, s in group.items()}
        self.extras = make_centrings(asked, self.teacher, sorted(set(self.grids.values())))
        self.gram_from = total if asked.gram is None else asked.gram.first_step(total)
        self.snapshots: set[int] = set()
        if asked.gram is not None and teacher is None:
            self.snapshots = set(asked.gram.snapshots(total))
            self.extras["anchor"] = deepcopy(first.average.backbone) if first.shape is None else anchor_of(first)
        self.extras.to(accelerator.device)
        self.guide = Guide(self.teacher, asked, self.extras, config.teacher_size)

    def _ready(self, teacher: HeadedBackbone, runtime: RuntimeConfig) -> HeadedBackbone:
        """A frozen teacher on its device, in no more memory than needed."""
        if is_sharded(teacher):  # by `load_sharded`
            return teacher
        teacher = frozen(teacher).to(self.accelerator.device)
        fast_convolutions(teacher)
        if uses_bf16(self.config.precision, teacher.backbone.dim):
            linear_in_bf16(teacher)
        return fully_sharded(teacher) if self.accelerator.num_processes > 1 and runtime.shard else teacher

    def _grid(self, model: HeadedBackbone, size: int | None) -> int:
        """Patches a side that a model gives for global crops (of `size` pixels)."""
        pixels, backbone = size or self.config.crops.global_size, model.backbone
        if isinstance(backbone, Backbone):
            return pixels // backbone.patch
        with torch.no_grad(), self.autocast(model):  # padding decides, so only the network itself knows
            was = backbone.training
            backbone.eval()
            crop = torch.zeros(1, 3, pixels, pixels, device=self.accelerator.device)
            n = model(crop, None, lambda _, features: features.patches.shape[1])  # a sharded model runs as a whole only
            backbone.train(was)
        return round(n**0.5)

    # Not Accelerator's mixed precision: that is fixed for a whole process, and a run trains several models of different widths.
    def autocast(self, model: HeadedBackbone) -> Any:
        bf16 = uses_bf16(self.config.precision, model.backbone.dim)
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=bf16)

    def chosen(self, part: Batch, grid: int) -> Tensor:
        """The patches that iBOT asks [C, N]: the masked ones, or without masks all of the student's grid."""
        if self.config.masks is not None:
            return part.masks
        return part.masks.new_ones(len(part.masks), (grid or self.own_grid) ** 2)

    def step(self, step: int, batch: Batch, watch: bool = True) -> dict[str, Told]:
        """One step of every student; with `watch`, monitors too."""
        if step in self.snapshots:
            self.extras["anchor"].load_state_dict(self.teacher.backbone.state_dict())
        parts = batch.parts(self.micro)
        with self.autocast(self.teacher):
            targets_of = self.targets(step, batch, parts)
        for module in self.moving:  # its casts are of no use to anybody once it has moved
            if isinstance(cast := getattr(module, "cast", None), CastCache):
                cast.clear()
        told = {}
        for name, student in self.group.items():
            chosen, targets = [self.chosen(part, self.grids[name]) for part in parts], targets_of[self.grids[name]]
            context = self.autocast(student.module)
            after_step = partial(student.project, name, self.after_step)
            terms, norms, cls = student_step(
                student, parts, chosen, targets, self.config, self.schedules, step, self.accelerator, context,
                anchored=step >= self.gram_from, after_step=after_step,
            )  # fmt: skip
            limits = None
            if watch:
                dino = [t.dino for t in targets if t.dino is not None]
                assigned = torch.cat([d.flatten(0, 1) for d in dino]) if dino else None
                statistics, limits = collapse_statistics(assigned, cls)
                norms |= statistics
            told[name] = Told(terms, norms, limits)
        return told

    @torch.no_grad()
    def targets(self, step: int, batch: Batch, parts: Sequence[Batch]) -> dict[int, list[Targets]]:
        """By grid, for every micro-batch."""
        t, grids = self.temperature(step), sorted(set(self.grids.values()))
        chosen = {grid: [self.chosen(part, grid) for part in parts] for grid in grids}
        if self.cache is not None:
            (grid,) = grids
            return {grid: self._cached(self.cache, step, batch, parts, chosen[grid], grid)}
        features = self.guide.look(parts)
        self.guide.observe(features)
        anchors = None
        if "anchor" in self.extras and step >= self.gram_from:
            anchors = [self.extras["anchor"](part.global_crops).patches for part in parts]
        return {g: self.guide.targets(features, chosen[g], t, g, self.shares_backbone, anchors) for g in grids}

    def _cached(
        self, cache: TargetsCache, step: int, batch: Batch, parts: Sequence[Batch], chosen: list[Tensor], grid: int
    ) -> list[Targets]:
        """Targets from the cache; those that it does not hold are made, kept, and used as kept."""
        whole = self.chosen(batch, grid)
        t = self.temperature(step)
        kept = cache.get(step, batch.global_crops, whole)
        if kept is None:
            dino, ibot = self.guide.vectors(self.guide.look(parts), chosen, grid)
            # Vectors are kept as they are; assignments are made here, and nowhere else: a moving centre must move once a step.
            whole_dino, whole_ibot = cache.config.dino_k is not None, cache.config.ibot_k is not None
            weights = [patch_weights(c) for c in chosen]
            made = self.guide.centred(dino if whole_dino else [], ibot if whole_ibot else [], weights, t, grid)
            cls: Any = None
            patches: Any = None
            if self.config.objectives.dino:
                cls = joined([m.dino.flatten(0, 1) for m in made] if whole_dino else dino)  # type: ignore[union-attr]
            if self.config.objectives.ibot:
                patches = InOrder([m.ibot for m in made], whole) if whole_ibot else in_order(ibot, whole)  # type: ignore[misc]
            kept = cache.put(step, batch.global_crops, whole, cls, patches)
        return self._from_kept(kept, whole, chosen, t, grid)

    def _from_kept(self, kept: Cached, whole: Tensor, chosen: list[Tensor], t: float, grid: int) -> list[Targets]:
        asked, teacher, n = self.config.objectives, self.teacher, len(chosen)
        weights = [patch_weights(c) for c in chosen]
        cls_rows, patch_rows = rows_of_crops(len(whole), n, whole.device), rows_of_patches(whole, n)
        cls_vectors: list[Tensor] = []
        patch_vectors: list[Tensor] = []
        dino: list[Any] = [None] * n
        ibot: list[Any] = [None] * n
        if asked.dino and isinstance(kept.dino, TopK):
            assert teacher.dino is not None
            full = dense(kept.dino, teacher.dino.config.prototypes)
            dino = [full[rows].view(2, len(rows) // 2, -1) for rows in cls_rows]
        elif kept.dino is not None and asked.dino:
            cls_vectors = [kept.dino[rows] for rows in cls_rows]
        if asked.ibot and isinstance(kept.ibot, TopK):
            assert teacher.patch_head is not None
            k = teacher.patch_head.config.prototypes
            ibot = [Sparse(TopK(kept.ibot.values[r], kept.ibot.indices[r]), k) for r in patch_rows]
        elif kept.ibot is not None and asked.ibot:
            patch_vectors = [kept.ibot[rows] for rows in patch_rows]
        made = self.guide.centred(cls_vectors, patch_vectors, weights, t, grid)
        return [
            Targets(m.dino if d is None else d, m.ibot if i is None else i, m.weights)
            for m, d, i in zip(made, dino, ibot, strict=True)
        ]

    def stop_if_dead(self, step: int, told: dict[str, Told]) -> None:
        """Raises DecantError where a monitor says so, in every process alike."""
        for name, student in self.group.items():
            limits = told[name].limits
            if student.monitor is not None and limits is not None:
                student.monitor.observe(step, told[name].more, limits)


def anchor_of(student: Student) -> nn.Module:
    """A sharded copy of the average's backbone."""
    assert student.shape is not None
    return sharded_copy(student.average.backbone, hollow(student.shape.backbone))


def fast_convolutions(model: HeadedBackbone) -> None:
    """Weights of convolutions with channels last: a CNN's forward pass takes half the time on a CPU with them, and on a GPU in bf16."""
    if not isinstance(model.backbone, Backbone):
        model.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def moving_modules(student: Student) -> list[nn.Module]:
    """The modules of a moving average that move: not those of a backbone that is frozen and shared."""
    parts = student.average.parts().items()
    return [m for n, part in parts if n != "backbone" or not student.module.backbone_frozen for m in part.modules()]


def student_step(
    student: Student,
    parts: Sequence[Batch],
    chosen: Sequence[Tensor],
    targets: Sequence[Targets],
    config: "TrainConfig",
    schedules: Schedules,
    step: int,
    accelerator: Any,
    autocast: Any,
    anchored: bool = True,
    after_step: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], dict[str, float], Tensor]:
    """(terms, gradient norms before clipping, CLS of every image's first global crop [B, D]) of one student's step. A step whose loss or
    gradient is not finite changes nothing.

    Args:
        parts: the micro-batches; chosen, targets: of each.
        anchored: whether Gram anchoring has begun.
        after_step: what weights go through after an update, those of the average too.
    """
    set_step(student.optimizer, schedules, step)
    student.optimizer.zero_grad(set_to_none=True)
    terms: dict[str, Tensor] = {}
    seen: list[Tensor] = []
    for i, (part, asked, target) in enumerate(zip(parts, chosen, targets, strict=True)):
        images = len(part.global_crops) // 2
        local_crops = len(part.local_crops) // images

        def global_use(
            model: HeadedBackbone, features: Features, images: int = images, local_crops: int = local_crops,
            asked: Tensor = asked, target: Targets = target,
        ) -> dict[str, Tensor]:  # fmt: skip
            seen.append(features.cls[:images].detach())
            return global_terms(model, features, target, config.objectives, local_crops, asked, anchored)

        jobs: list[tuple[Any, ...]] = []
        if local_crops and config.objectives.dino:
            use = partial(local_terms, targets=target, config=config.objectives, local_crops=local_crops)
            jobs.append((part.local_crops, None, use, None))
        jobs.append((part.global_crops, asked if config.mask_input else None, global_use, target.seen))
        for j, job in enumerate(jobs):
            # The global crops come last: they use every parameter, so gradients can be exchanged while they are made.
            with student.gradient_sync(i == len(parts) - 1 and j == len(jobs) - 1):
                with autocast:
                    found = student.wrapped(*job)
                if found:
                    accelerator.backward(torch.stack(list(found.values())).sum() / len(parts))
            for name, value in found.items():
                terms[name] = terms.get(name, 0) + value.detach() / len(parts)
    norms = clip_each(student.module.parts().values(), config.optim.clip)
    values = torch.stack([*terms.values(), *norms]).float()
    finite = torch.isfinite(values).all()
    if accelerator.num_processes > 1:  # every rank must take the same decision, and log the mean
        finite = accelerator.reduce(finite.int(), "sum") == accelerator.num_processes
        values[: len(terms)] = accelerator.reduce(values[: len(terms)], "mean")
    if bool(finite):
        student.optimizer.step()
        update_average(student.average, student.module, schedules.ema(step))
        after_step()
        student.bad_in_a_row = 0
    else:
        for a, b in zip(student.average.buffers(), student.module.buffers(), strict=True):
            b.copy_(a)  # statistics of batch norms have taken the bad batch in; the average's are those of the step before
        student.bad_steps += 1
        student.bad_in_a_row += 1
        if student.bad_in_a_row >= MAX_BAD_STEPS:
            raise DecantError(
                f"The loss was not finite in {MAX_BAD_STEPS} steps in a row (at step {step}; terms: "
                f"{ {k: v.item() for k, v in terms.items()} }). Lower optim.lr, raise optim.warmup, or use precision: fp32."
            )
    norm_names = [f"grad_norm_{n}" for n in student.module.parts()]
    named = dict(zip([*terms, *norm_names], values.tolist(), strict=True))
    extra = {"bad_steps": float(student.bad_steps)} if student.bad_steps else {}
    return {k: named[k] for k in terms}, {k: named[k] for k in norm_names} | extra, torch.cat(seen)
