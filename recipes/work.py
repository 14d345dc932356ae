"""What the training stages of `recipes/stages.py` do. What follows them is in `recipes/shipping.py`.

Every function here returns `work(folder, progress)`; nothing is computed before that is called.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.encoder import TorchEncoder
from distill.errors import UserError
from distill.memory import refuse_if_too_large, training_bytes
from distill.models.backbone import Backbone
from distill.models.checkpoints import load_backbone, load_heads, save_model
from distill.models.headed import HeadedBackbone
from distill.models.heads import DINOHead, HeadConfig
from distill.progress import Progress
from distill.train import TrainConfig, train
from recipes.data import Data
from recipes.schema import Recipe

Work = Callable[[Path, Progress], None]


def fresh_model(backbone: Any, dino: HeadConfig, ibot: HeadConfig | None, seed: int) -> HeadedBackbone:
    """A model with the initial weights that belong to a seed."""
    torch.manual_seed(seed)
    made = Backbone(backbone)
    return HeadedBackbone(made, DINOHead(made.dim, dino), None if ibot is None else DINOHead(made.dim, ibot))


def load_headed(folder: Path) -> HeadedBackbone:
    backbone = load_backbone(folder)
    heads = load_heads(folder, backbone.dim)
    if "dino" not in heads:
        raise UserError(
            f"{folder} holds a backbone without heads: it cannot teach by DINO and iBOT. Train it with `decant run`."
        )
    return HeadedBackbone(backbone, heads["dino"], heads.get("ibot"))


def student_seed(r: Recipe, name: str) -> int:
    """Distilled student and control start from the same weights, whichever other students there are."""
    return r.seed * 1000 + 1 + zlib.crc32(name.encode()) % 999


def fresh_student(r: Recipe, name: str) -> HeadedBackbone:
    return fresh_model(r.students[name].backbone, *r.heads_of(name), student_seed(r, name))


def finished(models: list[Path], stage: Path) -> bool:
    """Whether training was done and only the stage's mark is missing: model.json is written last, then the checkpoint goes."""
    if not all((m / "model.json").exists() for m in models):
        return False
    (stage / "checkpoint.safetensors").unlink(missing_ok=True)
    return True


def save_trained(r: Recipe, models: dict[Path, HeadedBackbone], training: TrainConfig, kind: str, stage: Path) -> None:
    """Write the trained models and drop the stage's checkpoint; of several processes, the first one does."""
    from accelerate import PartialState

    lineage = {
        "kind": kind,
        "recipe": r.name,
        "seed": r.seed,
        "images_seen": training.steps() * training.batch,
        "steps": training.steps(),
    }
    if PartialState().is_main_process:
        for folder, model in models.items():
            save_model(folder, model.backbone, r.input.preprocess(), model.heads(), lineage)
        (stage / "checkpoint.safetensors").unlink(missing_ok=True)
    PartialState().wait_for_everyone()


def pretrain(r: Recipe, data: Data) -> Work:
    def work(folder: Path, progress: Progress) -> None:
        if finished([folder], folder):
            return
        model = fresh_model(r.teacher.backbone, r.teacher.dino_head, r.teacher.ibot_head, r.seed * 1000)
        name = "teacher"
        trained = run_training(r, data, r.teacher.train, {name: model}, None, folder, progress, "pretrain")[name]
        save_trained(r, {folder: trained}, r.teacher.train, "pretrain", folder)

    return work


def distill(r: Recipe, data: Data, run: Path) -> Work:
    def work(folder: Path, progress: Progress) -> None:
        if finished([folder / name for name in r.students], folder):
            return
        teacher = load_headed(run / "teacher")
        students = {name: fresh_student(r, name) for name in r.students}
        trained = run_training(r, data, r.distill, students, teacher, folder, progress, "distill")
        save_trained(r, {folder / name: model for name, model in trained.items()}, r.distill, "distill", folder)

    return work


def control(r: Recipe, data: Data, name: str) -> Work:
    def work(folder: Path, progress: Progress) -> None:
        if finished([folder], folder):
            return
        training = r.control_training()
        trained = run_training(r, data, training, {name: fresh_student(r, name)}, None, folder, progress, f"control/{name}")
        save_trained(r, {folder: trained[name]}, training, "control", folder)

    return work


def run_training(
    r: Recipe,
    data: Data,
    training: TrainConfig,
    students: dict[str, HeadedBackbone],
    teacher: HeadedBackbone | None,
    folder: Path,
    progress: Progress,
    title: str,
) -> dict[str, HeadedBackbone]:
    from accelerate import PartialState

    from distill.data.sources import ImageSource, skipped_summary

    if isinstance(data.train, ImageSource):
        data.train.probe()  # hopeless data is a sentence now; in a loader's worker it would be a traceback
    heads = [_head_configs(s) for s in students.values()]
    frozen = None if teacher is None else (teacher.backbone.config, _head_configs(teacher))
    configs = [s.backbone.config for s in students.values()]
    refuse_if_too_large(training_bytes(training, frozen, configs, heads, PartialState().num_processes), title)
    trained = train(
        training,
        students,
        teacher,
        data.train,
        r.input.normalize,
        folder,
        r.seed,
        r.runtime,
        progress,
        title,
        knn_probe(r, data) if training.probe_every else None,
    )
    if said := skipped_summary(data.train):
        progress.say(f"{title}: {said}", warning=True)
    return trained


def _head_configs(model: HeadedBackbone) -> tuple[HeadConfig, HeadConfig | None]:
    return model.dino.config, None if model.ibot is None else model.ibot.config


def knn_probe(r: Recipe, data: Data) -> Callable[[nn.Module], dict[str, float]]:
    """kNN accuracy of a backbone in training, for the log."""
    from distill.data.sources import checked
    from distill.evaluate.quick import QuickKnn

    made: list[QuickKnn] = []

    def probe(backbone: nn.Module) -> dict[str, float]:
        if data.test is None:
            return {}
        if not made:
            made.append(QuickKnn(checked(data.gallery), checked(data.test), r.input.preprocess(), r.evaluate))
        return made[0](TorchEncoder(backbone, str(next(backbone.parameters()).device)))

    return probe
