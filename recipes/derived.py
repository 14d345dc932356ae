"""Models that are derived from a student instead of being distilled from nothing: pruned ones, and ones trained for quantization.

Both are students of the same teacher in the same loop; they start from trained weights, and their training is the distillation's with
fewer images and a lower learning rate.
"""

from typing import Literal

from distill.config import Config
from distill.losses.matching import MatchConfig
from distill.objectives import ObjectivesConfig
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
        runtime, threads: where `latency_ms` is measured (export/stopwatch/block_latency.py).
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
        teacher: `itself`: the same model in floating point, whose very features are matched, so that nothing but the quantization is
            learned; or `teacher`: the recipe's, live or from its cached targets, with the student's own heads, in which learning goes on.
        learn_scales: train the scales too (LSQ), or keep those of the calibration.
        train: how long and how fast. A trained network wants a low rate: 1e-5 for a ViT-S and larger.
    """

    of: str
    weights: Literal["int8", "w4"] = "int8"
    teacher: Literal["itself", "teacher"] = "itself"
    learn_scales: bool = True
    train: RecoveryConfig

    def training(self, distill: TrainConfig) -> TrainConfig:
        """The distillation's settings with this one's, and of a model that teaches itself with feature matching alone."""
        found = self.train.training(distill)
        if self.teacher == "teacher":
            return found
        match = MatchConfig(hidden=0, standardize=False)
        objectives = ObjectivesConfig(dino=0.0, ibot=0.0, koleo=0.0, match=match)
        crops = found.crops.model_copy(update={"local_count": 0})
        changes = {"weight_decay": (0.0, 0.0), "ema": self.train.ema or (0.9, 0.99)}
        optim = found.optim.model_copy(update=changes)
        update = {"objectives": objectives, "crops": crops, "optim": optim, "masks": None, "cache": None, "teacher_size": None}
        return found.model_copy(update=update)
