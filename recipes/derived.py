"""Models that are derived from a student instead of being distilled from nothing: pruned ones, and ones trained for quantization.

Both are students of the same teacher in the same loop; they start from trained weights, and their training is the distillation's with
fewer images and a lower learning rate.
"""

from typing import Literal

from distill.config import Config
from distill.optim import OptimConfig
from distill.prune import PruneConfig
from distill.train import TrainConfig


class RecoveryConfig(Config):
    """A training that goes on from trained weights; everything else is as in `distill`.

    Attributes:
        images: images seen in all.
        lr: as in `optim.lr`; null: a quarter of the distillation's.
        ema: momentum of the moving average, from, to; null: the distillation's.
    """

    images: int
    lr: float | None = None
    ema: tuple[float, float] | None = None

    def problems(self) -> list[str]:
        found = [] if self.images >= 1 else [f"images must be at least 1, got {self.images}"]
        return found + ([f"lr must be above 0, got {self.lr}"] if self.lr is not None and self.lr <= 0 else [])

    def training(self, distill: TrainConfig, share: float = 1.0) -> TrainConfig:
        """The distillation's settings with these; `share` of the images, for one of several rounds."""
        lr = distill.optim.lr / 4 if self.lr is None else self.lr
        changes = {
            "lr": lr,
            "min_lr": min(distill.optim.min_lr, lr),
            "freeze_last_layer": 0.0,
            "ema": self.ema or distill.optim.ema,
        }
        images = max(distill.batch, round(self.images * share))
        optim: OptimConfig = distill.optim.model_copy(update=changes)
        return distill.model_copy(update={"images": images, "optim": optim})


class PrunedConfig(PruneConfig):
    """A smaller model cut out of a trained one, and distilled again (distill/prune.py says what is cut and how).

    Attributes:
        of: the student, or pruned model, that it is cut from.
        recovery: the distillation that follows the cuts, shared out over `steps`; null: none.
        runtime, threads: where `latency_ms` is measured (export/block_latency.py).
        control: also distil the same small network from fresh weights, on as many images as its ancestor and it have seen.
    """

    of: str
    recovery: RecoveryConfig | None = None
    runtime: Literal["onnxruntime", "openvino"] = "onnxruntime"
    threads: int = 1
    control: bool = False

    def problems(self) -> list[str]:
        found = super().problems()
        if self.threads < 1:
            found.append(f"threads must be at least 1, got {self.threads}")
        if self.recovery is None and self.steps > 1:
            found.append("steps of cutting alternate with recovery: give recovery, or leave steps at 1")
        if self.recovery is None and self.control:
            found.append("control is compared with a model that was distilled again: give recovery")
        return found


class QadConfig(Config):
    """A model distilled with its quantization switched on (quantization-aware distillation).

    Attributes:
        of: the student, or pruned model, that it starts from.
        weights: `int8` (with int8 activations) or `w4` (4-bit weights alone); which layers, `export.quantize` says.
        learn_scales: train the scales too (LSQ), or keep those of the calibration.
        train: how long and how fast.
    """

    of: str
    weights: Literal["int8", "w4"] = "int8"
    learn_scales: bool = True
    train: RecoveryConfig
