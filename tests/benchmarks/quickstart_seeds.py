"""The quickstart recipe over several seeds of data and weights: what its table is worth. Prints Markdown; writes JSON beside the runs.

    python tests/benchmarks/quickstart_seeds.py --seeds 1 2 3 --out runs/quickstart-seeds

Every seed draws other scenes, other test scenes and other initial weights. The interval over seeds is Student's t on the seeds' means; the
interval of a paired difference within a seed comes from the run itself (5,000 test images, the same for both).
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
from scipy import stats

from distill.rows import Row, read_rows

SUBJECTS = {
    "raw pixels, per channel": ("raw", "pixels"),
    "raw pixels, jointly": ("raw", "pixels-joint"),
    "random teacher": ("random/teacher", "torch-fp32"),
    "random student": ("random/small", "torch-fp32"),
    "teacher": ("teacher", "torch-fp32"),
    "distilled student": ("students/small", "torch-fp32"),
    "control": ("control/small", "torch-fp32"),
    "student, ONNX FP32": ("students/small", "onnx-fp32"),
    "student, ONNX FP16": ("students/small", "onnx-fp16"),
    "student, ONNX INT8": ("students/small", "onnx-int8"),
}
DIFFERENCES = {
    "teacher - random": ("teacher", "torch-fp32", "random/teacher/torch-fp32"),
    "teacher - raw pixels": ("teacher", "torch-fp32", "raw/pixels"),
    "distilled - control": ("students/small", "torch-fp32", "control/small/torch-fp32"),
    "INT8 - FP32": ("students/small", "onnx-int8", "students/small/torch-fp32"),
}


def run(seed: int, out: Path, extra: list[str]) -> list[Row]:
    """One run up to its evaluation; continues if it was interrupted."""
    folder = out / f"seed{seed}"
    settings = [f"seed={seed}", f"data.train.seed={seed}", f"data.test.seed={seed}", *extra]
    command = [sys.executable, "-m", "recipes.cli", "run", "quickstart", "--out", str(folder), "--until", "evaluate", "--quiet"]
    subprocess.run([*command, *(word for s in settings for word in ("--set", s))], check=True)
    return read_rows(folder / "rows.jsonl")


def find(rows: list[Row], metric: str, subject: str, target: str, versus: str | None = None) -> Row:
    found = [
        r
        for r in rows
        if (r.metric, r.subject, r.target) == (metric, subject, target) and (versus is None or r.conditions["versus"] == versus)
    ]
    assert len(found) == 1, (metric, subject, target, versus, len(found))
    return found[0]


def over_seeds(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval of the mean (Student's t)."""
    n = len(values)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5) if n > 1 else float("nan")
    return float(np.mean(values)), half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart-seeds"))
    parser.add_argument("--set", dest="extra", action="append", default=[], metavar="a.b=v")
    args = parser.parse_args()
    by_seed = {seed: run(seed, args.out, args.extra) for seed in args.seeds}
    results: dict[str, dict] = {"machine": {"python": platform.python_version(), "cpu": platform.processor()}, "values": {}}
    print(f"Accuracy in percent, mean over seeds {args.seeds} ± half of the 95 % interval of the mean; each seed in brackets\n")
    print("| features | kNN | linear |\n|---|---|---|")
    for label, (subject, target) in SUBJECTS.items():
        cells = []
        for metric in ("knn_top1", "linear_top1"):
            values = [float(find(rows, metric, subject, target).value or 0) for rows in by_seed.values()]
            mean, half = over_seeds(values)
            results["values"][f"{label}/{metric}"] = values
            cells.append(f"{mean:.1f} ± {half:.1f} ({', '.join(f'{v:.1f}' for v in values)})")
        print(f"| {label} | {' | '.join(cells)} |")
    print(
        "\n| paired difference, kNN points | mean over seeds | each seed with its 95 % interval (n = test images) |\n|---|---|---|"
    )
    for label, (subject, target, versus) in DIFFERENCES.items():
        found = [find(rows, "knn_top1_difference", subject, target, versus) for rows in by_seed.values()]
        mean, half = over_seeds([float(r.value or 0) for r in found])
        results["values"][label] = [[r.value, r.low, r.high, r.n] for r in found]
        each = ", ".join(f"{r.value:+.1f} [{r.low:+.1f}, {r.high:+.1f}]" for r in found)
        print(f"| {label} | {mean:+.1f} ± {half:.1f} | {each}, n = {found[0].n:,} |")
    (args.out / "results.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
