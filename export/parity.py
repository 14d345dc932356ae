"""Parity: how far an artifact's outputs are from those of what it was made from, per output, and the gates for it."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.config import Config
from distill.encoder import Encoder
from distill.rows import Row, not_measured
from export.artifact import Artifact, Unrunnable
from export.runtimes import open_artifact

METRICS = ("cosine_min", "cosine_p1", "cosine_mean", "max_abs", "mean_abs", "nan_count")
OUTPUTS = ("cls", "patches")


class Gates(Config):
    """The least cosine, over every vector of every output, that an artifact of a precision may have to its source.

    The defaults fit weights that were trained; they leave room for the worst single patch. On a ViT-S/14 of DINOv2's lineage the worst
    of 20,000 patches had 0.9979 in BF16 (OpenVINO) and 0.9999 in FP16: its few huge activations round to 8 bits. w8 rounds only weights.
    """

    fp32: float = 0.9999
    fp16: float = 0.999
    bf16: float = 0.995
    int8: float = 0.98
    fp8: float = 0.98
    w8: float = 0.999
    w4: float = 0.95

    def least(self, precision: str) -> float:
        """The gate of a precision."""
        return {
            "fp32": self.fp32,
            "fp16": self.fp16,
            "bf16": self.bf16,
            "int8": self.int8,
            "fp8": self.fp8,
            "w8": self.w8,
            "w4": self.w4,
        }[precision]

    def problems(self) -> list[str]:
        return [f"{name} must be above -1 and at most 1, got {v}" for name, v in self if not -1 < v <= 1]


def parity_rows(
    reference: Encoder, artifact: Encoder, images: Tensor, subject: str, source_label: str, batch: int = 16
) -> list[Row]:
    """Run both on images [n, 3, H, W] and compare: a row per metric and output (`cls` [B, D], `patches` [B, N, D]).

    `cosine_min`, `cosine_p1` (1st percentile) and `cosine_mean` are over vectors: images of `cls`, tokens of `patches`; `n` counts them.
    A value that is not finite on either side has no cosine: `nan_count` counts such values, and the rest is "not measured".
    """
    assert len(images), "parity needs images"
    cosines: dict[str, list[Tensor]] = {o: [] for o in OUTPUTS}
    differences: dict[str, list[tuple[float, float, int, int]]] = {o: [] for o in OUTPUTS}
    for chunk in images.split(batch):
        wanted, got = reference(chunk), artifact(chunk)
        for output in OUTPUTS:
            a, b = (getattr(f, output).double() for f in (wanted, got))
            assert a.shape == b.shape, (
                f"{output}: {source_label} gives {list(a.shape)}, {artifact.target} gives {list(b.shape)}"
            )
            cosines[output].append(F.cosine_similarity(a, b, dim=-1, eps=1e-12).flatten())
            gap = (a - b).abs()
            differences[output].append((float(gap.max()), float(gap.sum()), gap.numel(), int((~gap.isfinite()).sum())))
    rows = []
    for output in OUTPUTS:
        values = torch.cat(cosines[output]).numpy()
        peaks, sums, counts, broken = (np.array(column) for column in zip(*differences[output], strict=True))
        measured = {
            "cosine_min": float(values.min()),
            "cosine_p1": float(np.percentile(values, 1)),
            "cosine_mean": float(values.mean()),
            "max_abs": float(peaks.max()),
            "mean_abs": float(sums.sum() / counts.sum()),
            "nan_count": float(broken.sum()),
        }
        conditions = {**artifact.conditions, "output": output, "source": source_label, "batch": batch, "images": len(images)}
        for metric in METRICS:
            value = measured[metric]
            if math.isfinite(value):
                rows.append(
                    Row(
                        metric=metric,
                        value=value,
                        n=len(values),
                        subject=subject,
                        target=artifact.target,
                        conditions=conditions,
                    )
                )
            else:
                reason = f"{int(measured['nan_count'])} of {counts.sum()} values of {output} are not finite"
                rows.append(not_measured(metric, subject, artifact.target, reason, **conditions))
    return rows


def artifact_parity(
    reference: Encoder,
    artifact: Artifact,
    images: Tensor,
    subject: str,
    source_label: str,
    resolution: int | None = None,
    threads: int | None = None,
) -> list[Row]:
    """`parity_rows` of an artifact on disk; where this machine cannot execute it, "not measured" rows with the reason."""
    try:
        encoder = open_artifact(artifact, resolution, threads)
    except Unrunnable as e:
        return unmeasured_parity(artifact.target, subject, source_label, str(e), **unrunnable_conditions(artifact, resolution))
    return parity_rows(reference, encoder, images, subject, source_label, min(16, artifact.max_batch))


def unmeasured_parity(target: str, subject: str, source_label: str, reason: str, **conditions: object) -> list[Row]:
    """The rows of a parity check that could not be made."""
    return [
        not_measured(metric, subject, target, reason, output=output, source=source_label, **conditions)
        for output in OUTPUTS
        for metric in METRICS
    ]


def unrunnable_conditions(artifact: Artifact, resolution: int | None = None) -> dict[str, object]:
    """What is known of an artifact that cannot be executed here."""
    entry = artifact.file(resolution)
    return {
        "runtime": artifact.runtime,
        "precision": artifact.precision,
        "resolution": entry.resolution,
        "artifact_sha256": entry.sha256,
    }


def failed_gates(rows: list[Row], gates: Gates, explain: Callable[[Row], str | None] | None = None) -> list[str]:
    """One sentence for each gate that does not hold: a cosine below its precision's, or outputs that are not finite.

    Args:
        explain: what is to blame, in words (`bisection.explain`); asked once for each file that fails, and put behind its first sentence.
    """
    failed, explained = [], set()
    for row in rows:
        c = row.conditions
        who = f"{row.target} of {row.subject} at {c.get('resolution', '?')} px"
        problem = _problem(row, gates)
        if problem is None:
            continue
        if explain is not None and who not in explained:
            explained.add(who)
            problem += f"; {why}" if (why := explain(row)) else ""
        failed.append(f"{who}: {problem}.")
    return failed


def _problem(row: Row, gates: Gates) -> str | None:
    c = row.conditions
    if row.metric == "nan_count" and row.value:
        return f"{int(row.value)} values of {c['output']} are not finite"
    if row.metric != "cosine_min" or row.value is None:
        return None
    least = gates.least(c["precision"])
    if row.value >= least:
        return None
    return (
        f"the worst of {row.n} {c['output']} vectors has cosine {row.value:.5f} to {c['source']}, "
        f"below the gate of {least} for {c['precision']}"
    )
