"""The only training loop. It takes a teacher and students, whatever they are:

    pretrain   one student, its own moving average is the teacher
    distill    a frozen teacher, any number of students from one teacher pass; each one's moving average is the result
    control    as pretrain, with a student's architecture

Everything random is a function of (seed, step), and a checkpoint holds every tensor that a step changes, so a run that was killed and
started again ends in the same weights, bit for bit on a CPU with the same number of threads.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.config import Config
from distill.data.crops import CropsConfig
from distill.data.loader import Batch, LoaderSettings, MasksConfig, batches
from distill.errors import DecantError, UserError
from distill.models.headed import HeadedBackbone, frozen_copy
from distill.objectives import (
    ObjectivesConfig,
    Targets,
    make_centrings,
    student_losses,
    target_statistics,
    teacher_targets,
)
from distill.optim import OptimConfig, Schedules, clip_each, set_step, teacher_temperature, update_average
from distill.progress import Progress
from distill.runtime import (
    RuntimeConfig,
    TrainLog,
    cpu_threads,
    default_workers,
    out_of_memory_sentence,
    stop_requests,
    uses_bf16,
)
from distill.training_state import Student, prepare_student, resume, save_state

MAX_BAD_STEPS = 5  # in a row, then the run stops: skipping goes on for ever when the weights themselves are ruined


class TrainConfig(Config):
    """One training: pretraining, distillation or a control.

    Attributes:
        images: images seen in all (not the size of the set).
        batch: images a step, over all processes.
        masks: block masking; null chooses all patches for iBOT and masks none.
        mask_input: whether the student's input is masked where iBOT asks. Distillation leaves it off: DINOv2's paper, section 5.
        precision: `fp32`, `bf16`, or `auto` (bf16 on a GPU, or on a CPU with native bf16 for a model at least 192 wide).
        probe_every: images between two kNN probes in the training log; 0 for none.
    """

    images: int
    batch: int = 64
    crops: CropsConfig = CropsConfig()
    masks: MasksConfig | None = None
    mask_input: bool = False
    objectives: ObjectivesConfig = ObjectivesConfig()
    optim: OptimConfig = OptimConfig()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    probe_every: int = 0

    def steps(self) -> int:
        return -(-self.images // self.batch)

    def problems(self) -> list[str]:
        found = []
        if self.batch < 2:
            found.append(f"batch must be at least 2 (KoLeo and Sinkhorn compare images), got {self.batch}")
        elif self.images < self.batch:
            found.append(f"images {self.images} is less than one batch of {self.batch}")
        if self.mask_input and self.masks is None:
            found.append("mask_input is on but masks is null: say which patches to mask, or turn mask_input off")
        if self.probe_every < 0:
            found.append(f"probe_every must be at least 0, got {self.probe_every}")
        return found


Probe = Callable[[nn.Module], dict[str, float]]


def train(
    config: TrainConfig,
    students: dict[str, HeadedBackbone],
    teacher: HeadedBackbone | None,
    source: Any,
    normalize: str,
    folder: Path,
    seed: int,
    runtime: RuntimeConfig,
    progress: Progress,
    title: str = "train",
    probe: Probe | None = None,
) -> dict[str, HeadedBackbone]:
    """Train `students` and return each one's moving average (evaluation mode, on the CPU).

    Args:
        students: freshly initialised (they are trained in place).
        teacher: frozen, with heads of the same K and the same patch; None: the moving average of the only student.
        source: training images (distill/data/sources.py).
        normalize: as in Preprocess.
        folder: gets `checkpoint.safetensors`, and `train.jsonl`, or with a frozen teacher `<student>/train.jsonl` for each student.
        probe: called with the average backbone every `config.probe_every` images; what it returns is logged.

    Raises:
        DecantError: the loss was not finite several times in a row.
        EnvironmentFailed: out of memory.
        KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint was written first.
    """
    if teacher is None and len(students) != 1:
        raise ValueError("without a frozen teacher there is exactly one student: its average is the teacher")
    from accelerate import Accelerator  # here: a plan needs this file's settings, not a second of imports

    accelerator = Accelerator(mixed_precision="no")
    total, device = config.steps(), accelerator.device

    # Not Accelerator's mixed precision: that is fixed for a whole process, and a run trains several models of different widths.
    def autocast(model: HeadedBackbone) -> Any:
        return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(config.precision, model.backbone.dim))

    schedules = Schedules(config.optim, config.batch, total)
    temperature = teacher_temperature(config.objectives.teacher_temperature, config.objectives.temperature_warmup, total)
    group = {
        name: prepare_student(model, config.optim, config.objectives, config.mask_input, accelerator)
        for name, model in students.items()
    }
    guide = next(iter(group.values())).average if teacher is None else frozen_copy(teacher).to(device)
    centrings = make_centrings(config.objectives, guide).to(device)

    checkpoint = folder / "checkpoint.safetensors"
    world = accelerator.num_processes
    if config.batch % world or config.batch < 2 * world:
        raise UserError(f"batch {config.batch} must be a multiple of the {world} processes, with at least 2 images each.")
    start = resume(checkpoint, group, centrings, world)
    main = accelerator.is_main_process
    logs = {n: TrainLog(folder / ("." if teacher is None else n) / "train.jsonl", start) for n in group} if main else {}
    settings = LoaderSettings(
        config.crops,
        config.masks,
        guide.backbone.patch,
        normalize,
        config.batch,
        seed,
        (accelerator.process_index, accelerator.num_processes),
    )
    began = time.monotonic()
    with (
        cpu_threads(runtime.threads),
        stop_requests() as stop,
        progress.task(title, total, unit="step", start=start) as task,
        out_of_memory_sentence(config.batch, config.crops.local_count),
    ):
        for step, batch in enumerate(batches(source, settings, start, total, default_workers(runtime.workers)), start):
            torch.manual_seed((seed + 1) * 1_000_003 + step)  # stochastic depth
            batch = batch.to(device)
            chosen = batch.masks if config.masks is not None else torch.ones_like(batch.masks)
            with autocast(guide):
                targets = teacher_targets(guide, centrings, batch.global_crops, chosen, temperature(step))
            log_now = step % runtime.log_every == 0 or step == total - 1
            for name, student in group.items():
                terms, norms = student_step(
                    student, batch, chosen, targets, config, schedules, step, accelerator, autocast(student.module)
                )
                if log_now and main:
                    shared = {"step": step, "images": (step + 1) * config.batch, "lr": schedules.lr(step)}
                    shared |= {
                        "teacher_temperature": temperature(step),
                        "seconds": round(logs[name].seconds + time.monotonic() - began, 2),
                    }
                    student.last_terms = terms
                    logs[name].write(shared | {"loss": sum(terms.values()), **terms, **norms, **target_statistics(targets)})
            done = step + 1
            stopping = bool(stop)
            if world > 1:  # the signal may reach the ranks at different steps, and they must leave together
                stopping = bool(accelerator.reduce(torch.tensor(int(stopping), device=device), "sum"))
            if probe and config.probe_every and _crossed(step, config.batch, config.probe_every, done == total) and main:
                for name, student in group.items():
                    logs[name].write({"step": step, "images": done * config.batch, **probe(student.average.backbone)})
            shown = {"loss": sum(next(iter(group.values())).last_terms.values())}
            task.advance(1, **shown)
            if main and (done % runtime.checkpoint_every == 0 or done == total or stopping):
                save_state(checkpoint, done, group, centrings, world)
            if stopping:
                raise KeyboardInterrupt
    accelerator.wait_for_everyone()
    return {n: s.average.cpu().eval() for n, s in group.items()}


def student_step(
    student: Student,
    batch: Batch,
    chosen: Tensor,
    targets: Targets,
    config: TrainConfig,
    schedules: Schedules,
    step: int,
    accelerator: Any,
    autocast: Any,
) -> tuple[dict[str, float], dict[str, float]]:
    """Forward, backward, clip, update, average; (terms, gradient norms before clipping). A step whose loss or gradient is not finite
    changes nothing.
    """
    set_step(student.optimizer, schedules, step)
    student.optimizer.zero_grad(set_to_none=True)
    with autocast:
        out = student.wrapped(batch.global_crops, batch.local_crops, chosen if config.mask_input else None, chosen)
    terms = student_losses(out, targets, config.objectives)
    loss = torch.stack(list(terms.values())).sum()
    accelerator.backward(loss)
    norms = clip_each(student.module.parts().values(), config.optim.clip)
    finite = torch.isfinite(torch.stack([loss.detach(), *norms])).all()
    if accelerator.num_processes > 1:  # every rank must take the same decision
        finite = accelerator.reduce(finite.int(), "sum") == accelerator.num_processes
    if bool(finite):
        student.optimizer.step()
        update_average(student.average, student.module, schedules.ema(step))
        student.bad_in_a_row = 0
    else:
        student.bad_steps += 1
        student.bad_in_a_row += 1
        if student.bad_in_a_row >= MAX_BAD_STEPS:
            raise DecantError(
                f"The loss was not finite in {MAX_BAD_STEPS} steps in a row (at step {step}; terms: "
                f"{ {k: v.item() for k, v in terms.items()} }). Lower optim.lr, raise optim.warmup, or use precision: fp32."
            )
    values = torch.stack([*terms.values(), *norms]).detach().float().tolist()
    norm_names = [f"grad_norm_{n}" for n in student.module.parts()]
    named = dict(zip([*terms, *norm_names], values, strict=True))
    extra = {"bad_steps": float(student.bad_steps)} if student.bad_steps else {}
    return {k: named[k] for k in terms}, {k: named[k] for k in norm_names} | extra


def _crossed(step: int, batch: int, every: int, last: bool) -> bool:
    return last or (step + 1) * batch // every > step * batch // every
