"""What the input pipeline costs an image, part by part, on one core: CPU milliseconds, which other programs on the machine disturb little.

    python tests/benchmarks/loader.py --photos FOLDER [--small FILE.parquet] [--images 32] [--rounds 7]

Prints Markdown: medians over the rounds. `--photos` is a folder of JPEGs (the published table: ImageNet validation images with the shorter
side at 375 px, about 500 x 375, quality 90), cut into 2 x 224 + 8 x 98; `--small` are parquet files of 32 px images (CIFAR-10), cut into
2 x 32 + 2 x 16. The last rows run a whole loader with one worker and count the CPU time of both processes.
"""

import argparse
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from distill.data.crops import CropsConfig, batch_draws, make_views, useful_side
from distill.data.loader import LoaderSettings, MasksConfig, batches, cut_batch, finish_batch, made_batches
from distill.data.masks import batch_masks
from distill.data.sources import source_from

SMALL = CropsConfig(global_size=32, local_size=16, local_count=2)


def cpu_seconds() -> float:
    """Of this process and the children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def on_gpu(s: LoaderSettings) -> LoaderSettings:
    """For `made_batches`, where the device does nothing yet."""
    return replace(s, device=torch.device("meta"))


def parts_of(source: Any, s: LoaderSettings) -> dict[str, Callable[[], Any]]:
    """The parts of a batch by name, each a function that does it once."""
    side, count, grid = useful_side(s.crops), 2 + s.crops.local_count, (s.crops.global_size // s.patch,) * 2
    images: list[Image.Image] = [source.image(i, shorter_side=side) for i in range(s.batch)]
    draws, cut = batch_draws(s.seed, 0, range(s.batch), count), cut_batch(images, s, 0)
    return {
        "decode": lambda: [source.image(i, shorter_side=side) for i in range(s.batch)],
        "cut and resize": lambda: [make_views(image, s.crops, draws[i]) for i, image in enumerate(images)],
        "masks": lambda: batch_masks(np.random.default_rng(0), 2 * s.batch, grid, 0.5, (0.1, 0.5)),
        "decode, cut, masks: a batch of bytes": lambda: next(iter(made_batches(source, on_gpu(s), 0, 1, 0))),
        "colours and normalisation": lambda: finish_batch(cut, s),
        "a whole batch": lambda: next(batches(source, s, 0, 1, 0)),
    }


def through_a_worker(source: Any, s: LoaderSettings, steps: int) -> float:
    """CPU seconds a batch, in worker and consumer together."""
    start = cpu_seconds()
    for _ in made_batches(source, s, 0, steps, 1):
        pass
    return (cpu_seconds() - start) / steps


def measure(title: str, source: Any, s: LoaderSettings, rounds: int) -> None:
    print(f"\n{title}:\n\n| part | CPU ms/image | images/s/core |\n|---|---|---|")
    parts = parts_of(source, s)
    seconds: dict[str, list[float]] = {}
    for part in parts.values():
        part()
    for _ in range(rounds):
        for name, part in parts.items():
            start = time.process_time()
            part()
            seconds.setdefault(name, []).append(time.process_time() - start)
    for name, settings in (("one worker, training on a CPU", s), ("one worker, training on a GPU: bytes sent", on_gpu(s))):
        seconds[name] = [through_a_worker(source, settings, 6) for _ in range(max(2, rounds // 2))]
    for name, values in seconds.items():
        each = median(values) / s.batch
        print(f"| {name} | {1000 * each:.3f} | {1 / each:,.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--small")
    parser.add_argument("--images", type=int, default=32, help="a batch of photographs; eight times as many small images")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}), 1 thread")
    settings = LoaderSettings(CropsConfig(), MasksConfig(), 14, "imagenet", args.images, 0)
    measure("Photographs, 2 x 224 + 8 x 98", source_from(args.photos).build(), settings, args.rounds)
    if args.small:
        small = LoaderSettings(SMALL, MasksConfig(), 4, "per_image", 8 * args.images, 0)
        measure("32 px, 2 x 32 + 2 x 16", source_from(args.small).build(), small, args.rounds)


if __name__ == "__main__":
    main()
