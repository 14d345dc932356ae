"""What bf16 is worth in training on this machine: images a second of a whole step, fp32 and bf16 interleaved, by width of the backbone.

    python tests/benchmarks/precision.py [--threads 2] [--rounds 5]

Prints Markdown: the median over the rounds, and the median of the ratios within a round. `TrainConfig.precision: auto` follows from it.
"""

import argparse
import os
import time
from copy import deepcopy
from statistics import median

import torch
from accelerate import Accelerator

from distill.data.crops import CropsConfig
from distill.data.loader import Batch, MasksConfig
from distill.models.backbone import Backbone, BackboneConfig
from distill.models.headed import HeadedBackbone
from distill.models.heads import DINOHead, HeadConfig
from distill.runtime import RuntimeConfig, native_bf16
from distill.step import Stepper
from distill.train import TrainConfig
from distill.training_state import prepare_student

SIZE, PATCH, BATCH = 224, 16, 4


def trainer(dim: int, depth: int, heads: int):
    """A function `step(bf16)` that does one pretraining step on fixed crops."""
    head = HeadConfig(prototypes=4096, hidden=1024, bottleneck=256, init="fan_in")
    backbone = Backbone(BackboneConfig(patch=PATCH, image_size=SIZE, dim=dim, depth=depth, heads=heads, init="fan_in"))
    model = HeadedBackbone(backbone, DINOHead(dim, head), DINOHead(dim, head))
    crops = CropsConfig(global_size=SIZE, local_size=96, local_count=4)
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    masks = torch.rand(2 * BATCH, (SIZE // PATCH) ** 2) < 0.15
    batch = Batch(torch.randn(2 * BATCH, 3, SIZE, SIZE), torch.randn(4 * BATCH, 3, 96, 96), masks)
    loops = {}
    for bf16 in (False, True):
        config = TrainConfig(
            images=1000 * BATCH,
            batch=BATCH,
            crops=crops,
            masks=MasksConfig(),
            mask_input=True,
            precision="bf16" if bf16 else "fp32",
        )
        student = prepare_student(deepcopy(model), config.optim, config.objectives, True, accelerator)
        loops[bf16] = Stepper(config, {"one": student}, None, config.steps(), accelerator, RuntimeConfig())

    def step(bf16: bool) -> None:
        loops[bf16].step(1, batch, watch=False)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, native bf16: {native_bf16()}\n")
    print("| width x blocks | fp32 images/s | bf16 images/s | bf16 / fp32 (median of the rounds' ratios) |\n|---|---|---|---|")
    for dim, depth, heads in ((96, 4, 3), (192, 6, 3), (384, 6, 6), (768, 4, 12)):
        step = trainer(dim, depth, heads)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for bf16 in (False, True):
            step(bf16)
        for _ in range(args.rounds):
            for bf16 in (False, True):
                start = time.perf_counter()
                step(bf16)
                seconds[bf16].append(time.perf_counter() - start)
        ratio = median(a / b for a, b in zip(seconds[False], seconds[True], strict=True))
        rates = [BATCH / median(seconds[b]) for b in (False, True)]
        print(f"| {dim} x {depth} | {rates[0]:.2f} | {rates[1]:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
