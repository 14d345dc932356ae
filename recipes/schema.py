"""The Recipe: each stage's own config class, composed, with the checks that need two of them at once."""

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from distill.config import Config
from distill.data.loader import MasksConfig
from distill.data.preprocess import Preprocess
from distill.data.sources import SourceConfig
from distill.evaluate.config import EvaluateConfig
from distill.models.backbone import BackboneConfig
from distill.models.foreign import LoadConfig
from distill.models.heads import HeadConfig
from distill.models.kinds import AnyConfig, BackboneChoice
from distill.runtime import RuntimeConfig
from distill.train import TrainConfig
from export.benchmark import BenchmarkConfig
from export.bundle import BundleConfig
from export.report import ReportConfig
from export.targets import SPECS, ExportConfig, Target, in_order
from recipes.checks import Problem, problems
from recipes.derived import PrunedConfig, QadConfig

Normalize = Literal["imagenet", "inception", "clip", "satellite", "per_image", "none"]


class DataConfig(Config):
    """Where images come from. A plain string is a shorthand: a parquet file, a folder, or the name of a `datasets` set.

    Attributes:
        train: unlabelled images; also the source of calibration images.
        gallery: labelled images that kNN and linear probe learn from; null: `train`, if it has labels.
        test: labelled images that are judged, apart from both; null: accuracies are "not measured".
    """

    train: str | SourceConfig
    gallery: str | SourceConfig | None = None
    test: str | SourceConfig | None = None


class InputConfig(Config):
    """How an image becomes the network's input at evaluation and on the device; crops for training share only `normalize`.

    Attributes:
        size: side in pixels, a multiple of the patch.
        resize: the shorter side before the centre crop; null: 256/224 of the size, and the size itself below 128 px.
        interpolation, normalize: see distill/data/preprocess.py.
    """

    size: int = 224
    resize: int | None = None
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    normalize: Normalize = "imagenet"

    def preprocess(self) -> Preprocess:
        resize = self.resize or (self.size if self.size < 128 else round(self.size * 256 / 224))
        return Preprocess(self.size, resize, self.interpolation, self.normalize)

    def problems(self) -> list[str]:
        found = []
        if self.size < 1:
            found.append(f"size must be at least 1, got {self.size}")
        if self.resize is not None and self.resize < self.size:
            found.append(f"resize {self.resize} is smaller than size {self.size}: the centre crop would not fit")
        return found


class TeacherConfig(Config):
    """The model that is frozen and distilled: trained here (`train`), or brought along (`load`).

    Attributes:
        backbone: of a teacher that is trained here; null: ViT-g's shape.
        dino_head, ibot_head: null for `ibot_head` shares DINO's.
        train: its pretraining.
        high_res: a short training at the end of it at higher resolution (DINOv2: 518 px), with schedules of its own.
        load: weights from elsewhere (distill/models/foreign.py).
        fit_heads: for a loaded backbone without heads (all public ones): heads are trained on its frozen features, as in pretraining with
            a backbone that does not move. Patches are not masked; each is assigned to the prototypes that the average of the heads gives
            it, which is the clustering of CAPI (arXiv 2502.08769). Without it, use `distill.objectives.match`.
    """

    backbone: BackboneChoice | None = None
    dino_head: HeadConfig = HeadConfig()
    ibot_head: HeadConfig | None = HeadConfig()
    train: TrainConfig | None = None
    high_res: TrainConfig | None = None
    load: LoadConfig | None = None
    fit_heads: TrainConfig | None = None

    def problems(self) -> list[str]:
        found = []
        if (self.train is None) == (self.load is None):
            found.append("train or load: a teacher is either trained here or loaded; give one of them")
        if self.high_res is not None and self.train is None:
            found.append("high_res goes on with a teacher that was trained here: it needs train")
        if self.load is not None and self.backbone is not None:
            found.append("backbone is what the loaded file says: leave it out")
        if self.fit_heads is not None:
            if self.load is None:
                found.append("fit_heads is for a loaded backbone: a teacher that is trained here learns its heads with it")
            if self.fit_heads.masks is not None or self.fit_heads.mask_input:
                found.append(
                    "fit_heads must have masks: null and mask_input: false: a frozen backbone has never seen a mask token"
                )
            if self.fit_heads.objectives.needs_features() or not self.fit_heads.objectives.needs_heads():
                found.append("fit_heads trains heads: its objectives are dino and ibot")
        return found

    def shape(self) -> AnyConfig | None:
        """The backbone that is trained here; None where a file says what it is."""
        return None if self.train is None else self.backbone or BackboneConfig(arch="vit_giant")

    def trainings(self) -> dict[str, TrainConfig]:
        """Its own trainings by setting, in their order."""
        found = {"train": self.train, "high_res": self.high_res, "fit_heads": self.fit_heads}
        return {name: training for name, training in found.items() if training is not None}


class StudentConfig(Config):
    """A model that the teacher is distilled into.

    Attributes:
        backbone: ours, or with `kind: timm` any Vision Transformer of timm by name. Its patch may differ from the teacher's, whose patch
            features are then resampled to the student's grid.
        dino_head, ibot_head: null: as the teacher's. K must be the teacher's; bottleneck and hidden width may differ.
        control: also train the same model from scratch, on the same images seen and schedule: the yardstick of distillation.
        start: folder of a trained model of this very backbone (model.json and weights, such as RUN/students/small) that distillation
            goes on from; null: from fresh weights. Of the folder's heads nothing is taken.
    """

    backbone: BackboneChoice
    dino_head: HeadConfig | None = None
    ibot_head: HeadConfig | None = None
    control: bool = False
    start: str | None = None


class Recipe(Config):
    """A whole run, from images to bundle. See the shipped recipes for commented examples.

    Attributes:
        pruned: smaller models cut out of students; qad: models distilled with their quantization on. Both by name, which no student
            may have; they are exported, measured and bundled like students.
    """

    name: str
    seed: int = 0
    data: DataConfig
    input: InputConfig = InputConfig()
    teacher: TeacherConfig
    students: dict[str, StudentConfig]
    distill: TrainConfig
    pruned: dict[str, PrunedConfig] = Field(default_factory=dict)
    qad: dict[str, QadConfig] = Field(default_factory=dict)
    export: ExportConfig = ExportConfig()
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    benchmark: BenchmarkConfig = BenchmarkConfig()
    report: ReportConfig = ReportConfig()
    bundle: BundleConfig = BundleConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    def heads_of(self, student: str) -> tuple[HeadConfig, HeadConfig | None]:
        """The student's head configs, the teacher's where it names none."""
        s = self.students[student]
        ibot = None if self.teacher.ibot_head is None else s.ibot_head or self.teacher.ibot_head
        return s.dino_head or self.teacher.dino_head, ibot

    def subjects(self) -> dict[str, str]:
        """Every model that ships, by name: `students/NAME`, `pruned/NAME`, `qad/NAME`, which is its folder in the run too."""
        groups: dict[str, Iterable[str]] = {"students": self.students, "pruned": self.pruned, "qad": self.qad}
        return {name: f"{group}/{name}" for group, models in groups.items() for name in models}

    def student_of(self, name: str) -> str:
        """The student that a derived model comes from in the end; a student's own name for itself."""
        while name not in self.students:
            name = (self.pruned.get(name) or self.qad[name]).of
        return name

    def controls(self) -> list[str]:
        """Names of the models that have a control."""
        return [n for n, s in self.students.items() if s.control] + [n for n, p in self.pruned.items() if p.control]

    def targets_of(self, name: str) -> list[Target]:
        """What is exported of a model, after its prerequisites; of one trained for a quantization only that, and what it is made from."""
        asked = list(self.export.targets)
        if name in self.qad:
            asked = [t for t in asked if SPECS[t].precision == self.qad[name].weights and SPECS[t].ours]
        return in_order(asked)

    def seen_images(self, name: str) -> int:
        """Images that a pruned model and those that it was cut from have seen in distillation."""
        seen = self.distill.images
        while name in self.pruned:
            recovery = self.pruned[name].recovery
            seen += 0 if recovery is None else recovery.images
            name = self.pruned[name].of
        return seen

    def resolutions(self) -> list[int]:
        return list(self.export.resolutions or [self.input.size])

    def control_training(self) -> TrainConfig:
        """How a control is trained: as distillation, but masked like a pretraining (it has no other patch target), and on what a training
        without a teacher has to go by.
        """
        mine = self.teacher.train or TrainConfig(images=2, batch=2, masks=MasksConfig(), mask_input=True)
        asked = self.distill.objectives.model_copy(update={"match": None, "gram": None})
        if not asked.needs_heads():
            asked = asked.model_copy(update={"dino": 1.0, "ibot": 1.0, "koleo": 0.1})
        changes = {"masks": mine.masks, "mask_input": mine.mask_input, "objectives": asked, "cache": None, "teacher_size": None}
        return self.distill.model_copy(update=changes)

    def fit_training(self) -> TrainConfig:
        """How heads are fitted. KoLeo and the monitors of features are off: they judge what a frozen backbone cannot change."""
        assert self.teacher.fit_heads is not None
        training = self.teacher.fit_heads
        objectives = training.objectives.model_copy(update={"koleo": 0.0})
        monitors = training.monitors.model_copy(update={"effective_rank": 0.0, "nearest_distance": 0.0})
        return training.model_copy(update={"objectives": objectives, "monitors": monitors})

    def problems(self) -> list[Problem]:
        return problems(self)
