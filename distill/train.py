"""The only training loop. It takes a teacher and students, whatever they are:

    pretrain   one student, its own moving average is the teacher
    distill    a frozen teacher, any number of students from one teacher pass; each one's moving average is the result
    recover    as distill, with a student that starts from trained weights: pruned, or fake-quantized (distill/models/fake_quant.py)
    fit heads  as pretrain, with a frozen backbone: only the heads learn, for a teacher that came without
    control    as pretrain, with a student's architecture

Everything random is a function of (seed, step), and a checkpoint holds every tensor that a step changes, so a run that was killed and
started again ends in the same weights, bit for bit on a CPU with the same number of threads. Losses do not depend on the number of
processes or micro-batches, beyond rounding; with stochastic depth, which drops samples of each micro-batch, they do.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from distill.config import Config
from distill.data.crops import CropsConfig
from distill.data.loader import LoaderSettings, MasksConfig, batches
from distill.errors import UserError
from distill.models.headed import HeadedBackbone
from distill.monitors import Monitor, MonitorConfig, monitor_rows
from distill.objectives import ObjectivesConfig
from distill.optim import OptimConfig
from distill.progress import Progress
from distill.rows import write_rows
from distill.runtime import (
    RuntimeConfig,
    TrainLog,
    cpu_threads,
    default_workers,
    out_of_memory_sentence,
    stop_requests,
)
from distill.step import Stepper, Told
from distill.targets_cache import CacheConfig, TargetsCache
from distill.training_state import AfterStep, prepare_student, resume, save_state


class TrainConfig(Config):
    """One training: pretraining, distillation or a control.

    Attributes:
        images: images seen in all (not the size of the set).
        batch: images a step, over all processes.
        masks: block masking; null chooses all patches for iBOT and masks none.
        mask_input: whether the student's input is masked where iBOT asks. Distillation leaves it off: DINOv2's paper, section 5.
        monitors: when a training counts as dead and is stopped.
        cache: keep the frozen teacher's targets on disk (distill/targets_cache.py); null: the teacher runs in every step.
        teacher_size: pixels that the global crops are resized to for the teacher; null: as the student sees them.
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
    monitors: MonitorConfig = MonitorConfig()
    cache: CacheConfig | None = None
    teacher_size: int | None = None
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
        if self.teacher_size is not None and self.teacher_size < 1:
            found.append(f"teacher_size must be at least 1 pixel, got {self.teacher_size}")
        if self.cache is not None and self.objectives.needs_features():
            found.append("cache keeps prototype targets, which match and gram do not use: drop it, or drop them")
        fixed = self.cache is not None and (self.cache.dino_k or self.cache.ibot_k)  # targets are kept as they were made
        if fixed and self.objectives.centring == "centre":
            found.append("cache.dino_k and ibot_k need objectives.centring: sinkhorn: a moving centre would stand still")
        if (
            fixed
            and self.cache is not None
            and self.cache.replay is not None
            and len(set(self.objectives.teacher_temperature)) > 1
        ):
            found.append(
                "cache.dino_k and ibot_k with replay need one teacher_temperature: targets come back as they were made"
            )
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
    teacher_normalize: str | None = None,
    cache: TargetsCache | None = None,
    subjects: dict[str, str] | None = None,
    after_step: AfterStep | None = None,
) -> dict[str, HeadedBackbone]:
    """Train `students` and return each one's moving average (evaluation mode, on the CPU).

    Args:
        students: freshly initialised or trained (pruned ones, fake-quantized ones: their heads then come with them, since the gradient
            through fresh heads would undo what the backbone has learned); they are trained in place.
        teacher: with heads of the same K where prototypes are compared (frozen in place); None: the only student's moving average.
        source: training images (distill/data/sources.py).
        normalize: as in Preprocess; `teacher_normalize`: the teacher's, where it is another.
        folder: gets `checkpoint.safetensors`, and `train.jsonl`, or with a frozen teacher `<student>/train.jsonl` for each student.
        probe: called with the average backbone every `config.probe_every` images; what it returns is logged.
        cache: made for this training; targets that it holds are not computed.
        after_step: what weights and averages go through after every step (distill/training_state.py), and once before the first.
        subjects: by student, whom the monitors' last values are about; they go to `rows.jsonl` in `folder`.

    Raises:
        DecantError: the loss was not finite several times in a row, or a monitor found the training dead.
        EnvironmentFailed: out of memory, or a full disk.
        KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint was written first.
    """
    if teacher is None and len(students) != 1:
        raise ValueError("without a frozen teacher there is exactly one student: its average is the teacher")
    from accelerate import Accelerator  # here: a plan needs this file's settings, not a second of imports

    accelerator = Accelerator(mixed_precision="no")
    total, device, world = config.steps(), accelerator.device, accelerator.num_processes
    micro = micro_batches(config, runtime, world)
    group = {
        name: prepare_student(model, config.optim, config.objectives, config.mask_input, accelerator, runtime)
        for name, model in students.items()
    }
    for name, student in group.items():
        student.monitor = Monitor(config.monitors, total, title if name in title or teacher is None else f"{title}/{name}")
    loop = Stepper(config, group, teacher, total, accelerator, runtime, micro, cache, after_step)
    checkpoint = folder / "checkpoint.safetensors"
    start = resume(checkpoint, group, loop.extras, world)
    main = accelerator.is_main_process
    logs = {n: TrainLog(folder / ("." if teacher is None else n) / "train.jsonl", start) for n in group} if main else {}
    first = next(iter(group.values())).module.backbone
    settings = LoaderSettings(
        config.crops,
        config.masks,
        first.patch,
        normalize,
        config.batch,
        seed,
        (accelerator.process_index, world),
        teacher_normalize=teacher_normalize,
        device=device,
        replay=None if config.cache is None or config.cache.replay is None else -(-config.cache.replay // config.batch),
    )
    began, cpu_began = time.monotonic(), time.process_time()
    told: dict[str, Told] = {}
    with (
        cpu_threads(runtime.threads),
        stop_requests() as stop,
        progress.task(title, total, unit="step", start=start) as task,
        out_of_memory_sentence(config.batch, config.crops.local_count),
    ):
        for step, batch in enumerate(batches(source, settings, start, total, default_workers(runtime.workers)), start):
            torch.manual_seed((seed + 1) * 1_000_003 + step)  # stochastic depth
            log_now = step % runtime.log_every == 0 or step == total - 1
            told = loop.step(step, batch.to(device), log_now)
            if log_now and main:
                for name, student in group.items():
                    shared = {"step": step, "images": (step + 1) * config.batch, "lr": loop.schedules.lr(step)}
                    shared |= {
                        "teacher_temperature": loop.temperature(step),
                        "seconds": round(logs[name].seconds + time.monotonic() - began, 2),
                        "cpu_seconds": round(logs[name].cpu_seconds + time.process_time() - cpu_began, 2),
                    }
                    student.last_terms = told[name].terms
                    logs[name].write(shared | {"loss": sum(told[name].terms.values()), **told[name].terms, **told[name].more})
            done = step + 1
            stopping = bool(stop)
            if world > 1:  # the signal may reach the ranks at different steps, and they must leave together
                stopping = bool(accelerator.reduce(torch.tensor(int(stopping), device=device), "sum"))
            if probe and config.probe_every and _crossed(step, config.batch, config.probe_every, done == total):
                paused, cpu_paused = time.monotonic(), time.process_time()
                for name, student in group.items():
                    average = student.whole_average()  # every process has a part in it
                    if main:
                        logs[name].write({"step": step, "images": done * config.batch, **probe(average.backbone)})
                # Looking at a training is no part of what it takes.
                began, cpu_began = began + time.monotonic() - paused, cpu_began + time.process_time() - cpu_paused
            shown = {"loss": sum(next(iter(group.values())).last_terms.values())}
            task.advance(1, **shown)
            loop.stop_if_dead(step, told)
            if done == total and main and subjects:  # before the checkpoint, after which no step is left that could say it
                _write_monitors(folder, told, subjects, step=step, images=done * config.batch)
            if done % runtime.checkpoint_every == 0 or done == total or stopping:
                if cache is not None:
                    cache.flush()
                save_state(checkpoint, done, group, loop.extras, world, main)
            if stopping:
                raise KeyboardInterrupt
    accelerator.wait_for_everyone()
    return {n: s.whole_average().cpu().eval() for n, s in group.items()}


def _write_monitors(folder: Path, told: dict[str, Told], subjects: dict[str, str], **conditions: int) -> None:
    """`rows.jsonl` with the monitors' values of a logged step."""
    rows = [
        r for n, t in told.items() if t.limits is not None for r in monitor_rows(t.more, t.limits, subjects[n], **conditions)
    ]
    write_rows(folder / "rows.jsonl", rows)


def micro_batches(config: TrainConfig, runtime: RuntimeConfig, world: int) -> int:
    """Into how many micro-batches a process cuts its share of the batch.

    Raises:
        UserError: the batch does not divide, or KoLeo would look for neighbours beyond a micro-batch.
    """
    batch, group = config.batch, config.objectives.koleo_group
    if batch % world or batch < 2 * world:
        raise UserError(f"batch {batch} must be a multiple of the {world} processes, with at least 2 images each.")
    share = batch // world
    micro = min(runtime.micro_batch or share, share)
    if share % micro:
        raise UserError(f"runtime.micro_batch {micro} must divide each process's share of the batch, {share} images.")
    if not config.objectives.koleo:
        return share // micro
    if group is None and micro < share:
        raise UserError(
            f"runtime.micro_batch {micro} cuts the batch, and KoLeo looks for neighbours in all of it: set objectives.koleo_group to a "
            f"divisor of {micro}, or leave runtime.micro_batch out."
        )
    if group is not None and micro % group:
        raise UserError(f"objectives.koleo_group {group} must divide the {micro} images that a process takes at once.")
    return share // micro


def _crossed(step: int, batch: int, every: int, last: bool) -> bool:
    return last or (step + 1) * batch // every > step * batch // every
