"""Rows and training curves for experiment trackers: TensorBoard, and MLflow or trackio where they are installed.

Trackers are for looking across runs; `rows.jsonl` stays the truth. One that is absent or cannot be reached costs a warning, never the run.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from distill.rows import Row

Tracker = Literal["tensorboard", "mlflow", "trackio"]
NEEDS = {"tensorboard": "tensorboard", "mlflow": "mlflow", "trackio": "trackio"}
# Conditions that tell rows of one metric apart; each becomes a part of the name.
APART = ("task", "resolution", "batch", "threads", "k", "shots", "alpha", "output", "class_name", "versus")
Curves = Mapping[str, Sequence[Mapping[str, Any]]]


def send(tracker: Tracker, rows: Sequence[Row], curves: Curves, run: str, folder: Path) -> str | None:
    """Write all measured rows, and the numbers of training over images seen.

    Args:
        run: what the tracker calls the run. folder: where a tracker that keeps files keeps them.

    Returns:
        Why it was not done: a sentence for a warning; None when it was.
    """
    try:
        SENDERS[tracker](rows, curves, run, folder)
    except ImportError as e:
        return (
            f"{tracker} is not installed ({e}): pip install {NEEDS[tracker]}. Its rows were not sent; the report has them all."
        )
    except Exception as e:  # whatever a tracker's client or server raises: it is not worth a run
        said = str(e).strip().splitlines()
        return f"{tracker} took no rows ({type(e).__name__}{': ' + said[0] if said else ''}). The report has them all."
    return None


def scalars(rows: Sequence[Row]) -> dict[str, float]:
    """Name -> value of measured rows; intervals as `.../low` and `.../high`.

    Names read `students/small/onnx-int8/knn_top1/resolution 48`: trackers group by what stands before a slash.
    """
    found: dict[str, float] = {}
    for row in rows:
        if row.value is None:
            continue
        said = "/".join(f"{n} {row.conditions[n]}" for n in APART if n in row.conditions)
        name = "/".join(p for p in (row.subject, row.target, row.metric, said) if p)
        found[name] = row.value
        for end in ("low", "high"):
            if (value := getattr(row, end)) is not None:
                found[f"{name}/{end}"] = value
    return found


def steps(curves: Curves) -> Iterator[tuple[str, int, float]]:
    """(name, images seen, value) of every number in the training logs."""
    for subject, records in curves.items():
        for record in records:
            for key, value in record.items():
                usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
                if key not in ("images", "step") and usable:
                    yield f"{subject}/training/{key}", int(record["images"]), float(value)


def _tensorboard(rows: Sequence[Row], curves: Curves, run: str, folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # events of an earlier report would be drawn beside these
    with SummaryWriter(str(folder / "tensorboard"), max_queue=1000) as writer:
        for name, value in scalars(rows).items():
            writer.add_scalar(_allowed(name), value, 0)
        for name, at, value in steps(curves):
            writer.add_scalar(_allowed(name), value, at)


def _mlflow(rows: Sequence[Row], curves: Curves, run: str, folder: Path) -> None:
    import mlflow

    # A server that the user names, else files beside the report.
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        folder.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').absolute()}")
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "decant"))
    with mlflow.start_run(run_name=run):
        mlflow.log_metrics({_allowed(name): value for name, value in scalars(rows).items()})
        for name, at, value in steps(curves):
            mlflow.log_metric(_allowed(name), value, step=at)


def _trackio(rows: Sequence[Row], curves: Curves, run: str, folder: Path) -> None:
    import trackio

    trackio.init(project="decant", name=run, resume="never", embed=False)
    try:
        by_step: dict[int, dict[str, float]] = {}
        for name, at, value in steps(curves):
            by_step.setdefault(at, {})[name] = value
        for at in sorted(by_step):
            trackio.log(by_step[at], step=at)
        trackio.log(scalars(rows), step=max(by_step, default=0) + 1)
    finally:
        trackio.finish()


SENDERS: dict[str, Callable[[Sequence[Row], Curves, str, Path], None]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "trackio": _trackio,
}


def _allowed(name: str) -> str:
    """Only characters that every tracker takes."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)
