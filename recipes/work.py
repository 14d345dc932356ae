"""What the training stages of `recipes/stages.py` do. What follows them is in `recipes/shipping.py`.

Every function here returns `work(folder, progress)`; nothing is computed before that is called.
"""

import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.data.preprocess import Preprocess
from distill.encoder import TorchEncoder
from distill.errors import UserError
from distill.files import sha256_file
from distill.memory import refuse_if_too_large, training_bytes_of
from distill.models.checkpoints import load_backbone, load_heads, load_preprocess, model_info, save_model, save_tensors
from distill.models.foreign import load_teacher
from distill.models.headed import HeadedBackbone
from distill.models.heads import DINOHead, HeadConfig
from distill.models.kinds import AnyBackbone, AnyConfig, backbone_measures, make_backbone, read_config
from distill.models.match_head import MatchHead
from distill.objectives import ObjectivesConfig
from distill.progress import Progress
from distill.runtime import uses_bf16
from distill.sharding import load_sharded
from distill.targets_cache import TargetsCache
from distill.train import TrainConfig, train
from distill.training_state import AfterStep
from recipes.data import Data
from recipes.schema import Recipe

Work = Callable[[Path, Progress], None]
MATCH = "match.safetensors"


def fresh_model(
    backbone: AnyConfig, dino: HeadConfig, ibot: HeadConfig | None, seed: int, asked: ObjectivesConfig, teacher_dim: int = 0
) -> HeadedBackbone:
    """A model with the initial weights that belong to a seed, and the heads that the objectives need."""
    torch.manual_seed(seed)
    made = make_backbone(backbone)
    heads = DINOHead(made.dim, dino), None if ibot is None else DINOHead(made.dim, ibot)
    match = None
    if asked.match is not None:
        parts = {"cls": asked.match.cls > 0, "patches": asked.match.patches > 0}
        match = MatchHead(made.dim, teacher_dim, asked.match.hidden, **parts)
    shared = asked.ibot and ibot is None
    return HeadedBackbone(made, heads[0] if asked.dino or shared else None, heads[1] if asked.ibot else None, match)


def load_teacher_model(folder: Path, asked: ObjectivesConfig, sharded: bool = False, precision: str = "fp32") -> HeadedBackbone:
    """A trained model with the heads that the objectives need; `sharded` over the processes, it is nowhere whole.

    Raises:
        UserError: it has none.
    """
    if sharded:
        width = backbone_measures(read_config(model_info(folder)["backbone"]))[0]
        model = load_sharded(folder, bf16=uses_bf16(precision, width))
    else:
        backbone = load_backbone(folder)
        heads = load_heads(folder, backbone.dim) if asked.needs_heads() else {}
        model = HeadedBackbone(backbone, heads.get("dino"), heads.get("ibot"))
    for kind, head in (("dino", model.dino), ("ibot", model.patch_head)):
        if getattr(asked, kind) and head is None:
            raise UserError(
                f"{folder} holds a backbone without a head for {kind}. Fit heads first (teacher.fit_heads), or match features instead "
                "(distill.objectives: {dino: 0, ibot: 0, match: {}})."
            )
    return model


def student_seed(r: Recipe, name: str) -> int:
    """Distilled student and control start from the same weights, whichever other students there are."""
    return r.seed * 1000 + 1 + zlib.crc32(name.encode()) % 999


def fresh_student(r: Recipe, name: str, asked: ObjectivesConfig, teacher_dim: int = 0) -> HeadedBackbone:
    return fresh_model(r.students[name].backbone, *r.heads_of(name), student_seed(r, name), asked, teacher_dim)


def started_student(r: Recipe, name: str, asked: ObjectivesConfig, teacher_dim: int) -> HeadedBackbone:
    """A student with fresh weights, or with those of the model that it goes on from.

    Raises:
        UserError: that folder holds no model, or one of another backbone.
    """
    student = fresh_student(r, name, asked, teacher_dim)
    if (start := r.students[name].start) is None:
        return student
    theirs = load_backbone(Path(start).expanduser()).state_dict()
    ours = student.backbone.state_dict()
    differs = [n for n in ours.keys() | theirs.keys() if n not in ours or n not in theirs or ours[n].shape != theirs[n].shape]
    if differs:
        raise UserError(
            f"students.{name}.start {start} holds another backbone than students.{name}.backbone ({sorted(differs)[0]} differs); "
            f"write what its model.json says of `backbone` into the recipe."
        )
    student.backbone.load_state_dict(theirs)
    return student


def finished(models: list[Path], stage: Path) -> bool:
    """Whether training was done and only the stage's mark is missing: model.json is written last, then the checkpoint goes."""
    if not all((m / "model.json").exists() for m in models):
        return False
    (stage / "checkpoint.safetensors").unlink(missing_ok=True)
    return True


def save_trained(
    r: Recipe,
    models: dict[Path, HeadedBackbone],
    training: TrainConfig,
    kind: str,
    stage: Path,
    preprocess: Preprocess | None = None,
) -> None:
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
            save_match(folder, model)
            save_model(folder, model.backbone, preprocess or r.input.preprocess(), model.heads(), lineage)
        (stage / "checkpoint.safetensors").unlink(missing_ok=True)
    PartialState().wait_for_everyone()


def save_match(folder: Path, model: HeadedBackbone) -> None:
    """A trained projector, for trainings that go on with this model (recovery after pruning)."""
    if model.match is not None:
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / MATCH, model.match.state_dict())


def pretrain(r: Recipe, data: Data) -> Work:
    def work(folder: Path, progress: Progress) -> None:
        if finished([folder], folder):
            return
        training, shape = r.teacher.train, r.teacher.shape()
        assert training is not None
        assert shape is not None
        model = fresh_model(shape, r.teacher.dino_head, r.teacher.ibot_head, r.seed * 1000, training.objectives)
        trained = run_training(r, data, training, {"teacher": model}, folder, progress, "pretrain", {"teacher": "teacher"})
        save_trained(r, {folder: trained["teacher"]}, training, "pretrain", folder)

    return work


def high_res(r: Recipe, data: Data, run: Path, before: Path) -> Work:
    """Go on with the averaged model of the pretraining at higher resolution; student and average both start from it."""

    def work(folder: Path, progress: Progress) -> None:
        if finished([folder], folder):
            return
        training = r.teacher.high_res
        assert training is not None
        model = load_teacher_model(run / before, training.objectives)
        trained = run_training(r, data, training, {"teacher": model}, folder, progress, "high_res", {"teacher": "teacher"})
        save_trained(r, {folder: trained["teacher"]}, training, "high_res", folder)

    return work


def load(r: Recipe) -> Work:
    """A teacher from elsewhere, converted into a model folder."""

    def work(folder: Path, progress: Progress) -> None:
        assert r.teacher.load is not None
        loaded = load_teacher(r.teacher.load)
        size = r.distill.teacher_size or r.input.size
        refuse_sizes(loaded.backbone, {"distill.teacher_size": size})
        resize = round(r.input.preprocess().resize * size / r.input.size)
        preprocess = replace(loaded.preprocess, size=size, resize=max(size, resize))
        save_model(folder, loaded.backbone, preprocess, loaded.heads, loaded.lineage)
        progress.say(f"load: {loaded.lineage.get('model') or r.teacher.load.kind} with {_listed(loaded.heads) or 'no'} heads")

    return work


def fit_heads(r: Recipe, data: Data, run: Path, before: Path) -> Work:
    def work(folder: Path, progress: Progress) -> None:
        if finished([folder], folder):
            return
        training = r.fit_training()
        torch.manual_seed(r.seed * 1000 + 500)
        backbone = load_backbone(run / before).requires_grad_(False)
        if left := model_info(run / before)["heads"]:
            progress.say(f"fit_heads: the {_listed(left)} heads that came with the teacher are left aside", warning=True)
        crops = training.crops
        sizes = {"global_size": crops.global_size} | ({"local_size": crops.local_size} if crops.local_count else {})
        refuse_sizes(backbone, {f"teacher.fit_heads.crops.{n}": size for n, size in sizes.items()})
        ibot = r.teacher.ibot_head
        asked = training.objectives
        dino = DINOHead(backbone.dim, r.teacher.dino_head) if asked.dino or ibot is None else None
        model = HeadedBackbone(backbone, dino, DINOHead(backbone.dim, ibot) if asked.ibot and ibot is not None else None)
        preprocess = load_preprocess(run / before)
        trained = run_training(
            r,
            data,
            training,
            {"teacher": model},
            folder,
            progress,
            "fit_heads",
            {"teacher": "teacher"},
            normalize=preprocess.normalize,
        )
        save_trained(r, {folder: trained["teacher"]}, training, "fit_heads", folder, preprocess)

    return work


def distill(r: Recipe, data: Data, run: Path) -> Work:
    def work(folder: Path, progress: Progress) -> None:
        if finished([folder / name for name in r.students], folder):
            return
        from accelerate import PartialState

        asked = r.distill.objectives
        sharded = r.runtime.shard and PartialState().num_processes > 1
        teacher = load_teacher_model(run / "teacher", asked, sharded, r.distill.precision)
        if r.teacher.load is not None:
            if not sharded:
                refuse_sizes(teacher.backbone, {"distill.teacher_size": r.distill.teacher_size or r.distill.crops.global_size})
            refuse_other_heads(r, teacher)
        students = {name: started_student(r, name, asked, teacher.backbone.dim) for name in r.students}
        subjects = {name: f"students/{name}" for name in students}
        trained = run_training(
            r, data, r.distill, students, folder, progress, "distill", subjects, teacher, load_preprocess(run / "teacher").normalize,
            cache=targets_cache(r, data, run) if r.distill.cache is not None else None,
        )  # fmt: skip
        save_trained(r, {folder / name: model for name, model in trained.items()}, r.distill, "distill", folder)

    return work


def refuse_sizes(backbone: AnyBackbone, sizes: dict[str, int]) -> None:
    """A file says only when it is read which images its network takes.

    Args:
        sizes: in pixels, by setting.

    Raises:
        UserError: it does not take one of them.
    """
    for setting, size in sizes.items():
        try:
            if backbone.blocks and size % backbone.patch:
                raise ValueError(f"{size} is no multiple of its patch of {backbone.patch} px")
            if not backbone.blocks:
                with torch.no_grad():
                    backbone.eval()(torch.zeros(1, 3, size, size))
        except (AssertionError, RuntimeError, ValueError) as e:  # as networks refuse sizes
            nearest = max(backbone.patch, round(size / backbone.patch) * backbone.patch)
            why = " ".join(str(e).split())[:160]
            raise UserError(
                f"The loaded teacher does not take images of {size} px ({why}): set {setting}, to {nearest} for one."
            ) from e


def refuse_other_heads(r: Recipe, teacher: HeadedBackbone) -> None:
    """Heads that came with a loaded teacher decide what the students' must be.

    Raises:
        UserError: a student's are others.
    """
    asked = r.distill.objectives
    if asked.ibot and teacher.ibot is not None and r.teacher.ibot_head is None:
        raise UserError(
            "The loaded teacher has an ibot head of its own: set teacher.ibot_head to "
            f"{{prototypes: {teacher.ibot.config.prototypes}}}, so that students get one too."
        )
    for name in r.students:
        dino, ibot = r.heads_of(name)
        for kind, mine, theirs in (("dino", dino, teacher.dino), ("ibot", ibot or dino, teacher.patch_head)):
            if getattr(asked, kind) and theirs is not None and mine.prototypes != theirs.config.prototypes:
                setting = f"{kind if kind == 'dino' or ibot is not None else 'dino'}_head.prototypes"
                raise UserError(
                    f"The loaded teacher's {kind} head has {theirs.config.prototypes} prototypes, that of students.{name} "
                    f"{mine.prototypes}: set teacher.{setting} (or the student's own) to {theirs.config.prototypes}."
                )


def targets_cache(r: Recipe, data: Data, run: Path, training: TrainConfig | None = None) -> TargetsCache:
    """The cache of this recipe's teacher targets, in a folder beside those of the stages: it outlives changes of the students.

    Args:
        training: the distillation's by default; a recovery sees the same crops, so it reads what distillation kept.
    """
    from accelerate import PartialState

    training, state = training or r.distill, PartialState()
    assert training.cache is not None
    asked, teacher = training.objectives, run / "teacher"
    about = model_info(teacher)
    identity: dict[str, Any] = {
        "teacher": {f: sha256_file(teacher / f) for f in ("backbone.safetensors", "heads.safetensors")},
        # What the weights do not say: heads of attention, how positions are resampled.
        "networks": {"backbone": about["backbone"], "heads": about["heads"]},
        "source": data.fingerprint("train"),
        "crops": training.crops.model_dump(),
        "masks": training.masks and training.masks.model_dump(),
        "patch": backbone_measures(next(iter(r.students.values())).backbone)[1],
        "seed": r.seed,
        "normalize": {"student": r.input.normalize, "teacher": load_preprocess(teacher).normalize},
        "teacher_size": training.teacher_size,
        "precision": training.precision,
        "objectives": {"dino": bool(asked.dino), "ibot": bool(asked.ibot)},
    }
    if training.cache.dino_k or training.cache.ibot_k:  # assignments are kept as they were made
        identity |= {
            "temperature": [*asked.teacher_temperature, asked.temperature_warmup],
            "steps": training.steps(),
            "centring": asked.centring,
        }
    return TargetsCache(run / "targets", identity, training.cache, training.batch, (state.process_index, state.num_processes))


def control(r: Recipe, data: Data, name: str) -> Work:
    def work(folder: Path, progress: Progress) -> None:
        if finished([folder], folder):
            return
        training, subject = r.control_training(), f"control/{name}"
        models = {name: fresh_student(r, name, training.objectives)}
        trained = run_training(r, data, training, models, folder, progress, subject, {name: subject})
        save_trained(r, {folder: trained[name]}, training, "control", folder)

    return work


def run_training(
    r: Recipe,
    data: Data,
    training: TrainConfig,
    students: dict[str, HeadedBackbone],
    folder: Path,
    progress: Progress,
    title: str,
    subjects: dict[str, str],
    teacher: HeadedBackbone | None = None,
    teacher_normalize: str | None = None,
    normalize: str | None = None,
    cache: TargetsCache | None = None,
    after_step: AfterStep | None = None,
) -> dict[str, HeadedBackbone]:
    """`train` with what a recipe says, after a look at data and memory.

    Args:
        normalize: of the students' crops, where it is not the recipe's.
        after_step: as `train` takes it.
    """
    from accelerate import PartialState

    from distill.data.sources import ImageSource, skipped_summary

    if isinstance(data.train, ImageSource):
        data.train.probe()  # hopeless data is a sentence now; in a loader's worker it would be a traceback
    processes = PartialState().num_processes
    refuse_if_too_large(training_bytes_of(training, teacher, students.values(), processes, r.runtime), title)
    trained = train(
        training,
        students,
        teacher,
        data.train,
        normalize or r.input.normalize,
        folder,
        r.seed,
        r.runtime,
        progress,
        title,
        probe=knn_probe(r, data) if training.probe_every and not next(iter(students.values())).backbone_frozen else None,
        teacher_normalize=teacher_normalize,
        cache=cache,
        subjects=subjects,
        after_step=after_step,
    )
    if said := skipped_summary(data.train):
        progress.say(f"{title}: {said}", warning=True)
    if cache is not None:
        about = cache.statistics()
        progress.say(
            f"{title}: teacher targets in {cache.folder}: {about['bytes'] / 1e6:.1f} MB, {about['hits']:.0f} steps read, "
            f"{about['misses']:.0f} made"
        )
    return trained


def _listed(names: Iterable[str]) -> str:
    return " and ".join(sorted(names))


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
