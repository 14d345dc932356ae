"""The Row: one measured number with its conditions. Tables, plots and pages are derived from rows, never parsed back."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from distill.config import Config
from distill.files import write_text


class Row(Config):
    """One number.

    Attributes:
        metric: `knn_top1`, `linear_top1`, `cosine_min`, `latency_p50_ms`, `images_per_s`, `size_mb`, ... The unit is in the name;
            accuracies are percentages 0..100.
        value: the number; None exactly when `status` is "not measured".
        low, high: 95 % interval, where one exists.
        n: the number of samples behind `value` (test images, timed calls).
        subject: `raw`, `random`, `teacher`, `students/<name>`, `control/<name>`.
        target: `torch-fp32`, `onnx-fp32`, `onnx-int8`, `rtx-fp16`, ...
        conditions: everything that is needed to read the number: data set and hash, resolution, batch, k, runtime, threads,
            device, sha256 of the artifact. Values are JSON scalars.
        status, reason: "not measured" always says why.
    """

    metric: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    subject: str
    target: str
    conditions: dict[str, Any] = Field(default_factory=dict)
    status: Literal["measured", "not measured"] = "measured"
    reason: str | None = None

    @model_validator(mode="after")
    def _value_or_reason(self) -> "Row":
        if self.status == "measured" and (self.value is None or not math.isfinite(self.value)):
            raise ValueError(
                f"{self.metric} of {self.subject} on {self.target}: a measured row needs a finite value, got {self.value}"
            )
        if not all(v is None or math.isfinite(v) for v in (self.low, self.high)):
            raise ValueError(f"{self.metric} of {self.subject} on {self.target}: an interval from {self.low} to {self.high}")
        if self.status == "not measured" and (self.value is not None or not self.reason):
            raise ValueError(
                f"{self.metric} of {self.subject} on {self.target}: a row that is not measured needs a reason and no value"
            )
        return self


def not_measured(metric: str, subject: str, target: str, reason: str, **conditions: Any) -> Row:
    return Row(metric=metric, subject=subject, target=target, status="not measured", reason=reason, conditions=conditions)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace `path` by these rows, one JSON object a line."""
    write_text(path, "".join(json.dumps(r.model_dump(exclude_none=True), sort_keys=True, allow_nan=False) + "\n" for r in rows))


def read_rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    return [Row.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
