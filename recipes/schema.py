"""The Recipe: each stage's own config class, composed, with the checks that need two of them at once."""

import re
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, Field

from distill.config import Config
from distill.data.loader import MasksConfig
from distill.data.preprocess import Preprocess
from distill.data.sources import SourceConfig
from distill.errors import UserError
from distill.evaluate.suite import EvaluateConfig
from distill.models.backbone import BackboneConfig
from distill.models.foreign import LoadConfig
from distill.models.heads import HeadConfig
from distill.models.kinds import AnyConfig, BackboneChoice, Demands, demands
from distill.objectives import ObjectivesConfig
from distill.runtime import RuntimeConfig
from distill.train import TrainConfig
from export.benchmark import BenchmarkConfig
from export.bundle import BundleConfig
from export.report import ReportConfig
from export.targets import ExportConfig, in_order

Problem = tuple[str, str]
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
    """

    backbone: BackboneChoice
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
        return [
            *_own_problems(self, ""),
            *self._names(),
            *self._networks(),
            *self._shapes(),
            *self._heads(),
            *self._objectives(),
            *self._pieces(),
        ]

    def _pieces(self) -> Iterator[Problem]:
        """Batches that are cut: into micro-batches, and into KoLeo's groups."""
        micro = self.runtime.micro_batch
        for section, one in [*((f"teacher.{n}", t) for n, t in self.teacher.trainings().items()), ("distill", self.distill)]:
            group = one.objectives.koleo_group
            if not one.objectives.koleo or section == "teacher.fit_heads":
                continue
            if micro is not None and micro < one.batch and group is None:
                yield (
                    "runtime.micro_batch",
                    f"cuts batches, and KoLeo looks for neighbours in all of one: let {section}.objectives.koleo_group divide {micro}",
                )
            elif group is not None and (min(micro or one.batch, one.batch) % group or one.batch % group):
                yield (
                    f"{section}.objectives.koleo_group",
                    f"{group} must divide the {min(micro or one.batch, one.batch)} images taken at once",
                )

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

    def _networks(self) -> Iterator[Problem]:
        """What a network from elsewhere cannot do."""
        for path, backbone in (
            ("teacher.backbone", self.teacher.shape()),
            *((f"students.{n}.backbone", s.backbone) for n, s in self.students.items()),
        ):
            if backbone is None or backbone.problems():
                continue
            try:
                can = demands(backbone)
            except UserError as e:
                yield path, str(e).rstrip(".")
                continue
            name = getattr(backbone, "name", "")
            if not can.exports and path.startswith("students."):
                yield f"{path}.name", f"{name} cannot be exported: a student is ours or one of timm's plain Vision Transformers"
            if not can.masks and path == "teacher.backbone":
                for section, one in self.teacher.trainings().items():
                    if one.mask_input:
                        yield (
                            f"teacher.{section}.mask_input",
                            f"must be false, with objectives.ibot: 0: {name} cannot mask its input, only Vision Transformers can",
                        )

    def _shapes(self) -> Iterator[Problem]:
        patches = {n: p for n, s in self.students.items() if (p := known_patch(s.backbone))}
        yield from self._sizes(patches)
        theirs = known_patch(self.teacher.shape())
        others = [n for n, p in patches.items() if theirs and p != theirs]
        if others and self.distill.masks is not None:
            yield (
                f"students.{others[0]}.backbone.patch",
                f"is {patches[others[0]]}, the teacher's is {theirs}: masks are drawn on one grid, so distill.masks must be null",
            )
        if len(set(patches.values())) > 1 and (self.distill.masks is not None or self.distill.cache is not None):
            yield (
                "distill.masks" if self.distill.masks is not None else "distill.cache",
                f"must be null: the students' patches differ ({sorted(set(patches.values()))}), and it holds one grid",
            )

    def _sizes(self, patches: dict[str, int]) -> Iterator[Problem]:
        """Every size in pixels is a multiple of the patch that it meets."""
        mine = known_patch(self.teacher.shape())
        met: list[tuple[str, int, int | None]] = []
        for patch in set(patches.values()):
            met += [
                ("input.size", self.input.size, patch),
                *(("export.resolutions", r, patch) for r in self.export.resolutions or []),
            ]
            met += _crop_sizes("distill", self.distill, patch)
        for name in ("train", "high_res"):
            if name in self.teacher.trainings():
                met += _crop_sizes(f"teacher.{name}", self.teacher.trainings()[name], mine)
        seen = self.distill.crops.global_size
        if self.distill.teacher_size is not None:
            met.append(("distill.teacher_size", self.distill.teacher_size, mine))
        elif not any(p > 0 and seen % p for p in patches.values()):  # else that is said already
            met.append(("distill.teacher_size", seen, mine))
        for path, size, side in met:
            if side and (size % side or size < side):
                yield (
                    path,
                    f"{size} px is not a multiple of the patch of {side} px; the nearest is {max(side, round(size / side) * side)}",
                )

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
        asked, training = self.distill.objectives, self.teacher.train
        if self.distill.mask_input:
            yield "distill.mask_input", "must be false: distillation shows the student whole crops (DINOv2, section 5)"
        for name, student in self.students.items():
            if student.backbone.drop_path:
                yield (
                    f"students.{name}.backbone.drop_path",
                    "must be 0: distillation removes stochastic depth (DINOv2, section 5)",
                )
        for name, one in self.teacher.trainings().items():
            if one.objectives.match is not None:
                yield (
                    f"teacher.{name}.objectives.match",
                    "must be null: there is no other model whose features could be matched",
                )
            if one.cache is not None:
                yield (
                    f"teacher.{name}.cache",
                    "must be null: targets of a teacher that is still learning are never the same twice",
                )
        if self.teacher.load is not None:
            yield from self._loaded(asked)
        controlled = [name for name, student in self.students.items() if student.control]
        if training is None:
            return
        for name, one in self.teacher.trainings().items():
            if one.objectives.ibot and not one.mask_input and name != "fit_heads":
                yield (
                    f"teacher.{name}.mask_input",
                    "must be true while objectives.ibot is above 0: without masks the student only copies its own average",
                )
        if self.teacher.high_res is not None:
            yield from self._high_res(training, self.teacher.high_res)
        for kind, head in (
            ("ibot", self.teacher.ibot_head),
            ("dino", self.teacher.dino_head if self.teacher.ibot_head else None),
        ):
            trains, teaches = (getattr(o, kind) for o in (training.objectives, asked))
            if head is not None and teaches and not trains:
                yield (
                    f"distill.objectives.{kind}",
                    f"must be 0 while teacher.train.objectives.{kind} is: that head was never trained",
                )
        patch = known_patch(self.teacher.shape())
        if training.objectives.ibot and training.masks is not None and patch:
            patches = (training.crops.global_size // patch) ** 2
            if int(2 * training.batch * training.masks.probability) < 1 or int(patches * training.masks.ratio[1]) < 1:
                yield "teacher.train.masks", f"mask nothing of {patches} patches, but objectives.ibot is above 0"
        if controlled and self.control_training().objectives.ibot and not self.control_training().mask_input:
            yield (
                f"students.{controlled[0]}.control",
                "needs teacher.train.masks and mask_input while distill.objectives.ibot is above 0: the control is masked like the teacher",
            )

    def _high_res(self, before: TrainConfig, after: TrainConfig) -> Iterator[Problem]:
        """What goes on must have been there, at less resolution."""
        if after.crops.global_size <= before.crops.global_size:
            yield (
                "teacher.high_res.crops.global_size",
                f"{after.crops.global_size} px is no more than the {before.crops.global_size} px of teacher.train",
            )
        for kind in ("dino", "ibot") if self.teacher.ibot_head is not None else ():  # a shared head is trained by either
            if getattr(after.objectives, kind) and not getattr(before.objectives, kind):
                yield (
                    f"teacher.high_res.objectives.{kind}",
                    f"must be 0 while teacher.train.objectives.{kind} is: that head is not trained",
                )

    def _loaded(self, asked: ObjectivesConfig) -> Iterator[Problem]:
        """What a teacher from elsewhere asks for."""
        load, fit = self.teacher.load, self.teacher.fit_heads
        assert load is not None
        if load.kind in ("timm", "transformers") and load.heads is None and fit is None and asked.needs_heads():
            yield (
                "teacher.load",
                f"{load.kind} models come without heads, which objectives dino and ibot need: either set distill.objectives to "
                "{dino: 0, ibot: 0, match: {}} (feature matching), or give teacher.fit_heads a training",
            )
        if fit is not None:
            for kind in ("dino", "ibot"):
                shared = kind == "ibot" and self.teacher.ibot_head is None
                if getattr(asked, kind) and not getattr(fit.objectives, kind) and not shared:
                    yield (
                        f"distill.objectives.{kind}",
                        f"must be 0 while teacher.fit_heads.objectives.{kind} is: that head is not fitted",
                    )


def known_patch(backbone: AnyConfig | None) -> int | None:
    """Of which sizes in pixels must be multiples; None where there is no such rule, or only the network itself knows."""
    return None if (asks := known_demands(backbone)) is None else asks.patch


def known_demands(backbone: AnyConfig | None) -> Demands | None:
    """What a backbone asks for; None where a file says what it is, or nothing can (which `_networks` reports)."""
    try:
        return None if backbone is None else demands(backbone)
    except UserError:
        return None


def _crop_sizes(section: str, training: TrainConfig, patch: int | None) -> list[tuple[str, int, int | None]]:
    found = [(f"{section}.crops.global_size", training.crops.global_size, patch)]
    return found + ([(f"{section}.crops.local_size", training.crops.local_size, patch)] if training.crops.local_count else [])


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
