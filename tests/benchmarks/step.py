"""What one training step costs: the plain step of `plain.py`, ours in every form, in the same run.

    python tests/benchmarks/step.py [--mode pretrain|distill] [--batch 4] [--threads 1] [--rounds 5] [--only NAME ...] [--json FILE]

Every variant lives in a process of its own, so that its memory is its own; the processes take turns, one step each in every round, so that
all of them meet the same machine. Where others load the machine too, CPU seconds are the honest clock, and the median of the ratios within
a round says more than either time. The matrix-product peak is measured between the steps, per CPU second, hence per core.

Memory is what the kernel's high-water mark says of the measured steps, above the process after its imports. `held` are the tensors alive
between steps (weights, average, gradients, Adam, crops); the rest are activations, logits and scratch. Time in the kernel is mostly
page faults: memory that was given back and is asked for again.
"""

import argparse
import atexit
import gc
import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).parent))

from plain import SHAPES, Workload, build, plain_step

from distill.data.loader import MasksConfig
from distill.data.masks import batch_masks
from distill.models.backbone import BackboneConfig, flops_per_image
from distill.runtime import native_bf16

Step = Callable[[], dict[str, float]]
Crops = tuple[Tensor, Tensor, Tensor]


class Unavailable(Exception):
    """This variant cannot be had; says why."""


# --- ours -----------------------------------------------------------------------------------------------------------------------------


def ours(
    work: Workload,
    crops: Crops,
    weights: list[dict[str, Tensor]],
    precision: Literal["fp32", "bf16"],
    compile: bool = False,
    checkpoint: bool = False,
    cached: bool = False,
) -> Step:
    """A function that does one step of `distill/train.py` on the same crops and weights as `plain_step`, with the same optimiser settings.

    Args:
        precision: `fp32` or `bf16`.
        compile, checkpoint: torch.compile, activation checkpointing.
        cached: the teacher's targets come from a cache (distillation).
    """
    from accelerate import Accelerator

    from distill.data.crops import CropsConfig
    from distill.data.loader import Batch
    from distill.models.backbone import Backbone
    from distill.models.headed import HeadedBackbone
    from distill.models.heads import DINOHead, HeadConfig
    from distill.objectives import ObjectivesConfig
    from distill.optim import OptimConfig
    from distill.runtime import RuntimeConfig
    from distill.step import Stepper
    from distill.targets_cache import CacheConfig, TargetsCache
    from distill.train import TrainConfig
    from distill.training_state import prepare_student

    if cached and not work.teacher_arch:
        raise Unavailable("a moving average as teacher has nothing to keep")

    def model(arch: str, state: dict[str, Tensor]) -> HeadedBackbone:
        head = HeadConfig(prototypes=work.prototypes, hidden=work.hidden, bottleneck=work.bottleneck)
        dim = SHAPES[arch][0]
        made = HeadedBackbone(
            Backbone(backbone_config(work, arch)), DINOHead(dim, head), None if work.shared_head else DINOHead(dim, head)
        )
        made.load_state_dict(state)
        return made

    # The plain step has one learning rate for everything and no schedules.
    optim = OptimConfig(
        lr=work.lr * (1024 / work.batch) ** 0.5,
        min_lr=work.lr,
        warmup=0.0,
        weight_decay=(work.weight_decay,) * 2,
        ema=(work.momentum,) * 2,
        layer_decay=1.0,
        patch_embed_lr=1.0,
        freeze_last_layer=0.0,
    )
    steps, mask_input = 10**6, not work.teacher_arch
    config = TrainConfig(
        images=steps * work.batch,
        batch=work.batch,
        crops=CropsConfig(global_size=work.global_size, local_size=work.local_size, local_count=work.locals),
        masks=MasksConfig() if mask_input else None,
        mask_input=mask_input,
        objectives=ObjectivesConfig(teacher_temperature=(work.teacher_temperature,) * 2),
        optim=optim,
        precision=precision,
    )
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    runtime = RuntimeConfig(recompute_blocks=checkpoint, compile=compile)
    student = prepare_student(model(work.arch, weights[0]), optim, config.objectives, mask_input, accelerator, runtime)
    teacher = model(work.teacher_arch, weights[1]) if work.teacher_arch else None
    cache = None
    if cached:
        folder = Path(tempfile.mkdtemp(prefix="targets"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        cache = TargetsCache(folder, {"of": "benchmark"}, CacheConfig(replay=work.batch), work.batch)
    stepper = Stepper(config, {"one": student}, teacher, steps, accelerator, runtime, cache=cache)
    batch = Batch(*crops)

    def step() -> dict[str, float]:
        return stepper.step(0, batch, watch=False)["one"].terms

    return step


VARIANTS: dict[str, dict[str, Any]] = {
    "plain fp32": {"precision": "fp32"},
    "plain bf16": {"precision": "bf16"},
    "ours fp32": {"precision": "fp32"},
    "ours bf16": {"precision": "bf16"},
    "ours bf16, compile": {"precision": "bf16", "compile": True},
    "ours bf16, checkpoint": {"precision": "bf16", "checkpoint": True},
    "ours bf16, cached targets": {"precision": "bf16", "cached": True},
}


def variant(name: str, work: Workload) -> Step:
    """Build a variant on the crops and weights that all of them share."""
    crops, weights = make_crops(work), starting_weights(work)
    options = VARIANTS[name]
    if name.startswith("plain"):
        return plain_step(work, crops, weights, options["precision"] == "bf16")
    return ours(work, crops, weights, **options)


# --- the work ---------------------------------------------------------------------------------------------------------------------------


def make_crops(work: Workload, seed: int = 0) -> Crops:
    """Noise in place of images; masks as in training, or every patch where a frozen teacher is distilled."""
    g = torch.Generator().manual_seed(seed)
    side = work.global_size // work.patch
    masks = torch.ones(2 * work.batch, side * side, dtype=torch.bool)
    if not work.teacher_arch:
        masks = torch.from_numpy(batch_masks(np.random.default_rng(seed), 2 * work.batch, (side, side), 0.5, (0.1, 0.5)))
    sizes = ((2 * work.batch, work.global_size), (work.locals * work.batch, work.local_size))
    global_crops, local_crops = (torch.randn(n, 3, size, size, generator=g) for n, size in sizes)
    return global_crops, local_crops, masks


def starting_weights(work: Workload, seed: int = 0) -> list[dict[str, Tensor]]:
    """Of the student and of the teacher if there is one, under the names that both sides share."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return [build(arch, work).state_dict() for arch in (work.arch, work.teacher_arch) if arch]


def backbone_config(work: Workload, arch: str) -> BackboneConfig:
    dim, depth, heads = SHAPES[arch]
    return BackboneConfig(
        patch=work.patch, image_size=work.global_size, dim=dim, depth=depth, heads=heads, layer_scale=work.layer_scale
    )


def head_flops(dim: int, work: Workload) -> int:
    """Floating-point operations (2 per multiply-add) of matrix products for one token through a head: MLP, then prototypes."""
    widths = [dim, work.hidden, work.hidden, work.bottleneck, work.prototypes]
    return 2 * sum(a * b for a, b in pairwise(widths))


def step_flops(work: Workload, chosen: int, live_teacher: bool = True) -> int:
    """Floating-point operations of matrix products of one step, each counted once however often it is really computed.

    The student's forward three times over (backward is two of it), less the gradient of the images, which nobody needs; the teacher's
    forward once, on the global crops. CLS tokens of every crop and `chosen` patches go through heads.
    """
    b = work.batch

    def patch_embed(arch: str, size: int) -> int:
        return 2 * (size // work.patch) ** 2 * 3 * work.patch**2 * SHAPES[arch][0]

    student = 0
    for crops, size in ((2 * b, work.global_size), (work.locals * b, work.local_size)):
        forward = flops_per_image(backbone_config(work, work.arch), size)
        student += crops * (3 * forward - patch_embed(work.arch, size))
    student += 3 * ((2 + work.locals) * b + chosen) * head_flops(SHAPES[work.arch][0], work)
    arch = work.teacher_arch or work.arch
    tokens, prototypes = 2 * b + chosen, 2 * work.bottleneck * work.prototypes
    if not live_teacher:  # what is kept are the vectors before the prototypes
        return student + tokens * prototypes
    teacher = 2 * b * flops_per_image(backbone_config(work, arch), work.global_size)
    return student + teacher + tokens * head_flops(SHAPES[arch][0], work)


# --- measuring --------------------------------------------------------------------------------------------------------------------------


def matmul_peak(dtype: torch.dtype, seconds: float = 0.4) -> float:
    """The best of several large products, in GFLOP per CPU second."""
    best = 0.0
    for n in (1024, 2048, 3072):
        a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
        torch.nn.functional.linear(a, b)
        until = time.process_time() + seconds
        while (start := time.process_time()) < until:
            torch.nn.functional.linear(a, b)
            best = max(best, 2 * n**3 / (time.process_time() - start) / 1e9)
    return best


def resident_mib(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (at most) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def forget_peak() -> None:
    """VmHWM begins again at what is resident now. (`ru_maxrss` cannot: it also remembers building the models.)"""
    Path("/proc/self/clear_refs").write_text("5")


def held_mib() -> float:
    """Tensors alive now, each storage once."""
    storages: dict[int, int] = {}
    gc.collect()
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter):
            for t in (thing, thing.grad if thing.is_leaf else None):
                if t is not None:
                    storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(storages.values()) / 2**20


def worker(pipe: Connection, name: str, work: Workload, threads: int) -> None:
    """A process with one variant: builds it, then for every message does one step and answers with its cost."""
    torch.set_num_threads(threads)
    if name == "peak":
        pipe.send({})
        while pipe.recv():
            pipe.send({"fp32": matmul_peak(torch.float32), "bf16": matmul_peak(torch.bfloat16)})
        return
    import accelerate  # noqa: F401  (so that the imports of both sides are in the idle process)

    import distill.train  # noqa: F401

    idle = resident_mib("VmRSS")
    try:
        step = variant(name, work)
        first = step()
        if VARIANTS[name].get("compile"):
            step()  # shapes that were taken for constants at first
    except Unavailable as e:
        pipe.send({"unavailable": str(e)})
        return
    forget_peak()
    pipe.send({"idle": idle, "loss": sum(first.values())})
    while pipe.recv():
        cpu, wall, before = time.process_time(), time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        step()
        cpu, wall, after = time.process_time() - cpu, time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_SELF)
        peak = resident_mib("VmHWM")
        memory = {"peak": peak, "whole_life": after.ru_maxrss / 1024, "held": held_mib()}
        kernel = {"system": after.ru_stime - before.ru_stime, "page_faults": after.ru_minflt - before.ru_minflt}
        pipe.send({"cpu": cpu, "wall": wall, **kernel, **memory})


@contextmanager
def process(name: str, work: Workload, threads: int) -> Any:
    """(its pipe, its first answer), ended afterwards."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=worker, args=(there, name, work, threads), daemon=True)
    child.start()
    there.close()
    try:
        yield here
    finally:
        with suppress(OSError):  # it may be gone, or answered "unavailable"
            here.send(False)
        child.join(10)
        child.terminate()
        child.join()


def measure(work: Workload, names: list[str], threads: int, rounds: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """One record a variant, and the peak in GFLOP per CPU second by precision."""
    chosen = int(make_crops(work)[2].sum())
    records: list[dict[str, Any]] = []
    peaks: list[dict[str, float]] = []
    samples: dict[str, list[dict[str, float]]] = {}
    pipes: dict[str, Connection] = {}
    with ExitStack() as stack:
        peak = stack.enter_context(process("peak", work, threads))
        peak.recv()
        for name in names:  # one after the other: building and compiling do not disturb each other
            pipe = stack.enter_context(process(name, work, threads))
            about = pipe.recv()
            if "unavailable" in about:
                print(f"{name}: {about['unavailable']}", file=sys.stderr)
                continue
            print(f"{name}: ready", file=sys.stderr, flush=True)
            pipes[name], samples[name] = pipe, []
            flops = step_flops(work, chosen, live_teacher=not VARIANTS[name].get("cached"))
            records.append({"variant": name, **about, "gflop": flops / 1e9})
        for _ in range(rounds):
            for name, pipe in {"peak": peak, **pipes}.items():
                pipe.send(True)
                (peaks if name == "peak" else samples[name]).append(pipe.recv())
    best = {precision: max(p[precision] for p in peaks) for precision in ("fp32", "bf16")}
    for r in records:
        mine, base = samples[r["variant"]], samples[records[0]["variant"]]
        precision = VARIANTS[r["variant"]]["precision"]
        r["cpu_s_per_image"] = median(s["cpu"] for s in mine) / work.batch
        r["wall_s_per_image"] = median(s["wall"] for s in mine) / work.batch
        r["system_s_per_image"] = median(s["system"] for s in mine) / work.batch
        r["cpu_ratio"] = median(b["cpu"] / s["cpu"] for b, s in zip(base, mine, strict=True))
        r["wall_ratio"] = median(b["wall"] / s["wall"] for b, s in zip(base, mine, strict=True))
        r["gflop_per_cpu_s"] = r["gflop"] / work.batch / r["cpu_s_per_image"]
        r["share_of_peak"] = r["gflop_per_cpu_s"] / best[precision]
        r["peak_mib"], r["held_mib"] = max(s["peak"] for s in mine), mine[-1]["held"]
        r["above_idle_mib"] = r["peak_mib"] - r["idle"]
        r["activations_mib"] = r["above_idle_mib"] - r["held_mib"]
        r["whole_life_mib"] = mine[-1]["whole_life"]
        r["samples"] = mine
    return records, best


def table(records: list[dict[str, Any]]) -> str:
    first = records[0]["variant"]
    lines = [
        f"| variant | CPU s/image | in the kernel | wall s/image | × {first} | GFLOP/image | GFLOP/CPU s | share of peak | "
        "memory, MiB | above idle | held | activations, logits, scratch | loss |",
        "|---|" + "---|" * 12,
    ]
    for r in records:
        seconds = [f"{r[name]:.2f}" for name in ("cpu_s_per_image", "system_s_per_image", "wall_s_per_image", "cpu_ratio")]
        work = [
            f"{r['gflop_per_cpu_s'] * r['cpu_s_per_image']:.1f}",
            f"{r['gflop_per_cpu_s']:.1f}",
            f"{r['share_of_peak']:.0%}",
        ]
        memory = [f"{r[name]:.0f}" for name in ("peak_mib", "above_idle_mib", "held_mib", "activations_mib")]
        lines.append("| " + " | ".join([r["variant"], *seconds, *work, *memory, f"{r['loss']:.4f}"]) + " |")
    return "\n".join(lines)


class OperationClock(TorchDispatchMode):
    """CPU seconds of every ATen operation, by name and shapes, forward and backward. (torch.profiler reads the wall clock, which on a
    loaded machine tells of the others' work.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[tuple[str, str], list[float]] = {}  # seconds, calls, operations of matrix products

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.process_time()
        out = func(*args, **(kwargs or {}))
        seconds = time.process_time() - start
        shapes = " ".join("x".join(map(str, a.shape)) or "scalar" for a in args if isinstance(a, Tensor))
        entry = self.seconds.setdefault((func.overloadpacket.__name__, shapes), [0.0, 0, 0])
        count = flop_registry.get(func.overloadpacket)
        for i, value in enumerate((seconds, 1, count(*args, **(kwargs or {}), out_val=out) if count else 0)):
            entry[i] += value
        return out


def profile(name: str, work: Workload, threads: int, rows: int) -> str:
    """The operations of one step by their CPU time, first by name, then by name and shapes."""
    torch.set_num_threads(threads)
    step = variant(name, work)
    step()
    start = time.process_time()
    step()
    alone = time.process_time() - start
    with OperationClock() as clock:
        step()
    by_name: dict[str, list[float]] = {}
    for (op, _), entry in clock.seconds.items():
        by_name[op] = [a + b for a, b in zip(by_name.get(op, [0.0, 0, 0]), entry, strict=True)]
    total = sum(e[0] for e in by_name.values())

    def lines(entries: dict[str, list[float]]) -> list[str]:
        largest = sorted(entries.items(), key=lambda item: -item[1][0])[:rows]
        return [
            f"| {op} | {s * 1000:.0f} | {s / total:.1%} | {int(n)} | {f'{flops / s / 1e9:.0f}' if flops else ''} |"
            for op, (s, n, flops) in largest
        ]

    head = ["", "| operation | CPU ms | share | calls | GFLOP/CPU s |", "|---|---|---|---|---|"]
    about = f"{name}, batch {work.batch}: {alone:.2f} CPU s a step, of which operations account for about {total:.2f}"
    by_shape = {f"{op} {shapes}": entry for (op, shapes), entry in clock.seconds.items()}
    return "\n".join([about, *head, *lines(by_name), *head, *lines(by_shape)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("pretrain", "distill"), default="pretrain")
    parser.add_argument("--arch", choices=SHAPES, default="vit_small")
    parser.add_argument("--teacher", choices=SHAPES, default="vit_large", help="with --mode distill")
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--shared-head", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help=f"of {', '.join(VARIANTS)}; the first is what the ratios compare with"
    )
    parser.add_argument("--profile", metavar="NAME", help="print the operations of one step of this variant instead")
    parser.add_argument("--json", type=Path, help="append one JSON object a variant")
    args = parser.parse_args()
    teacher = args.teacher if args.mode == "distill" else ""
    work = Workload(args.arch, teacher, args.batch, shared_head=args.shared_head, prototypes=args.prototypes)
    if args.profile:
        print(profile(args.profile, work, args.threads, 25))
        return
    names = args.only or [n for n in VARIANTS if teacher or not VARIANTS[n].get("cached")]
    records, peak = measure(work, names, args.threads, args.rounds)
    print(
        f"torch {torch.__version__}, {args.threads} threads, native bf16: {native_bf16()}; matrix-product peak "
        f"{peak['fp32']:.0f} (fp32) and {peak['bf16']:.0f} (bf16) GFLOP per CPU second\n{args.mode} {args.arch}/14"
        f"{f' from {teacher}' if teacher else ''}, 2 × {work.global_size} + {work.locals} × {work.local_size} px, K = {work.prototypes:,}, "
        f"batch {work.batch}, {'one shared head' if work.shared_head else 'two heads'}, {args.rounds} rounds\n"
    )
    print(table(records))
    if args.json:
        with open(args.json, "a", encoding="utf-8") as f:
            for r in records:
                f.write(
                    json.dumps({**asdict(work), "mode": args.mode, "threads": args.threads, "matmul_peak": peak, **r}) + "\n"
                )


if __name__ == "__main__":
    main()
