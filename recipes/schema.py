"""The Recipe: each stage's own config class, composed, with the checks that need two of them at once."""

import re
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, Field

from distill.config import Config
from distill.data.preprocess import Preprocess
from distill.data.sources import SourceConfig
from distill.evaluate.suite import EvaluateConfig
from distill.models.backbone import BackboneConfig
from distill.models.heads import HeadConfig
from distill.runtime import RuntimeConfig
from distill.train import TrainConfig
from export.benchmark import BenchmarkConfig
from export.bundle import BundleConfig
from export.report import ReportConfig
from export.targets import ExportConfig, in_order

Problem = tuple[str, str]


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
    normalize: Literal["imagenet", "per_image", "none"] = "imagenet"

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
    """The model that is trained first and then frozen.

    Attributes:
        backbone: by default ViT-g's shape.
        dino_head, ibot_head: null for `ibot_head` shares DINO's.
        train: its pretraining.
    """

    backbone: BackboneConfig = BackboneConfig(arch="vit_giant")
    dino_head: HeadConfig = HeadConfig()
    ibot_head: HeadConfig | None = HeadConfig()
    train: TrainConfig


class StudentConfig(Config):
    """A model that the teacher is distilled into.

    Attributes:
        dino_head, ibot_head: null: as the teacher's. K must be the teacher's; bottleneck and hidden width may differ.
        control: also train the same model from scratch, on the same images seen and schedule: the yardstick of distillation.
    """

    backbone: BackboneConfig
    dino_head: HeadConfig | None = None
    ibot_head: HeadConfig | None = None
    control: bool = False


class Recipe(Config):
    """A whole run, from images to bundle. See the shipped recipes for commented examples."""

    name: str
    seed: int = 0
    data: DataConfig
    input: InputConfig = InputConfig()
    teacher: TeacherConfig
    students: dict[str, StudentConfig]
    distill: TrainConfig
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

    def resolutions(self) -> list[int]:
        return list(self.export.resolutions or [self.input.size])

    def control_training(self) -> TrainConfig:
        """How a control is trained: as distillation, but masked like the teacher's pretraining (it has no other patch target)."""
        mine = self.teacher.train
        return self.distill.model_copy(update={"masks": mine.masks, "mask_input": mine.mask_input})

    def problems(self) -> list[Problem]:
        return [*_own_problems(self, ""), *self._names(), *self._shapes(), *self._heads(), *self._objectives()]

    def _names(self) -> Iterator[Problem]:
        # Names become folders; this rules out paths, hidden files and what Windows cannot store.
        pattern = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
        for path, name in [("name", self.name), *((f"students.{s}", s) for s in self.students)]:
            if not re.fullmatch(pattern, name):
                yield path, f"{name!r} names a folder: use letters, digits, - and _, beginning with a letter or digit"
        if not self.students:
            yield "students", "name at least one student"
        if not 0 <= self.seed < 2**31:
            yield "seed", f"must be at least 0 and below 2^31, got {self.seed}"
        exported = set(in_order(list(self.export.targets)))
        if missing := [t for t in self.bundle.targets or [] if t not in exported]:
            yield "bundle.targets", f"{missing[0]} is not among export.targets"
        if self.evaluate.seed < 0:
            yield "evaluate.seed", f"must be at least 0, got {self.evaluate.seed}"
        if self.input.size not in self.resolutions():
            yield "export.resolutions", f"must contain input.size {self.input.size}: artifacts are compared with PyTorch there"

    def _shapes(self) -> Iterator[Problem]:
        patch = self.teacher.backbone.patch
        for name, student in self.students.items():
            if student.backbone.patch != patch:
                yield (
                    f"students.{name}.backbone.patch",
                    f"is {student.backbone.patch}, the teacher's is {patch}: iBOT compares patch by patch",
                )
        if patch < 1:
            return
        sizes = [("input.size", self.input.size), *(("export.resolutions", r) for r in self.export.resolutions or [])]
        for section, training in (("teacher.train", self.teacher.train), ("distill", self.distill)):
            sizes.append((f"{section}.crops.global_size", training.crops.global_size))
            sizes += [(f"{section}.crops.local_size", training.crops.local_size)] if training.crops.local_count else []
        for path, size in sizes:
            if size % patch or size < patch:
                nearest = max(patch, round(size / patch) * patch)
                yield path, f"{size} px is not a multiple of the patch of {patch} px; the nearest is {nearest}"

    def _heads(self) -> Iterator[Problem]:
        for name, student in self.students.items():
            for kind in ("dino_head", "ibot_head"):
                mine, theirs = getattr(student, kind), getattr(self.teacher, kind)
                if mine is None:
                    continue
                if theirs is None:
                    yield (
                        f"students.{name}.{kind}",
                        "the teacher shares one head (ibot_head: null), so a student has none of its own",
                    )
                elif mine.prototypes != theirs.prototypes:
                    yield (
                        f"students.{name}.{kind}.prototypes",
                        f"is {mine.prototypes}, the teacher's is {theirs.prototypes}: they are compared one by one",
                    )

    def _objectives(self) -> Iterator[Problem]:
        if self.distill.mask_input:
            yield "distill.mask_input", "must be false: distillation shows the student whole crops (DINOv2, section 5)"
        for name, student in self.students.items():
            if student.backbone.drop_path:
                yield (
                    f"students.{name}.backbone.drop_path",
                    "must be 0: distillation removes stochastic depth (DINOv2, section 5)",
                )
        if self.teacher.train.objectives.ibot and not self.teacher.train.mask_input:
            yield (
                "teacher.train.mask_input",
                "must be true while objectives.ibot is above 0: without masks the student only copies its own average",
            )
        for kind, head in (
            ("ibot", self.teacher.ibot_head),
            ("dino", self.teacher.dino_head if self.teacher.ibot_head else None),
        ):
            trains, teaches = (getattr(o, kind) for o in (self.teacher.train.objectives, self.distill.objectives))
            if head is not None and teaches and not trains:
                yield (
                    f"distill.objectives.{kind}",
                    f"must be 0 while teacher.train.objectives.{kind} is: that head was never trained",
                )
        masks = self.teacher.train.masks
        if self.teacher.train.objectives.ibot and masks is not None:
            patches = (self.teacher.train.crops.global_size // max(self.teacher.backbone.patch, 1)) ** 2
            if int(2 * self.teacher.train.batch * masks.probability) < 1 or int(patches * masks.ratio[1]) < 1:
                yield "teacher.train.masks", f"mask nothing of {patches} patches, but objectives.ibot is above 0"
        controlled = [name for name, student in self.students.items() if student.control]
        if controlled and self.distill.objectives.ibot and not self.control_training().mask_input:
            yield (
                f"students.{controlled[0]}.control",
                "needs teacher.train.masks and mask_input while distill.objectives.ibot is above 0: the control is masked like the teacher",
            )


def _own_problems(value: Any, path: str) -> Iterator[Problem]:
    """What each nested config says about itself, with its dotted path."""
    if isinstance(value, BaseModel):
        if path and hasattr(value, "problems"):
            yield from ((_blamed(value, path, sentence), sentence) for sentence in value.problems())
        children = [(name, getattr(value, name)) for name in type(value).model_fields]
    elif isinstance(value, dict):
        children = list(value.items())
    else:
        return
    for name, child in children:
        yield from _own_problems(child, f"{path}.{name}" if path else str(name))


def _blamed(value: BaseModel, path: str, sentence: str) -> str:
    """The dotted path of the setting that a sentence begins with, so that its line can be shown; else the section's."""
    first = sentence.split(maxsplit=1)[0].rstrip(",:")
    return f"{path}.{first}" if first in type(value).model_fields else path
