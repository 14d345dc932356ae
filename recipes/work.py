"""What each stage of `recipes/stages.py` does: it composes the pieces of `distill` and `export` and writes into its own folder.

Every function here returns `work(folder, progress)`; nothing is computed before that is called.
"""

import platform
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.data.sources import Source, checked, source_from
from distill.encoder import Encoder, RawPixels, TorchEncoder
from distill.errors import GateFailed, UserError
from distill.files import sha256_file
from distill.memory import refuse_if_too_large, training_bytes
from distill.models.backbone import Backbone
from distill.models.checkpoints import load_backbone, load_heads, load_preprocess, save_model
from distill.models.headed import HeadedBackbone
from distill.models.heads import DINOHead, HeadConfig
from distill.progress import Progress
from distill.rows import Row, not_measured, read_rows, write_rows
from distill.train import TrainConfig, train
from recipes.schema import DataConfig, Recipe

Work = Callable[[Path, Progress], None]
PARITY_IMAGES = 64


class Data:
    """The recipe's image sources, opened once when first needed.

    `train` and `gallery` are the same object when the recipe does not tell them apart; `test` may be absent.
    """

    def __init__(self, config: DataConfig):
        self.config = config

    @cached_property
    def train(self) -> Source:
        return source_from(self.config.train).build()

    @cached_property
    def gallery(self) -> Source:
        return self.train if self.config.gallery is None else source_from(self.config.gallery).build()

    @cached_property
    def test(self) -> Source | None:
        return None if self.config.test is None else source_from(self.config.test).build()

    def fingerprint(self, role: str) -> str:
        source = getattr(self, role)
        return "none" if source is None else source.fingerprint()

    def fingerprints(self, *roles: str) -> dict[str, str]:
        return {role: self.fingerprint(role) for role in roles}

    def pictures(self, role: str, n: int) -> list[Any]:
        """The first n readable images of a source as RGB Pillow images (of `train` where there is no test set)."""
        source = getattr(self, role)
        if source is None:
            source = self.train
        if hasattr(source, "iterate"):
            stream = source.iterate(0)
            return [next(stream) for _ in range(n)]
        # Each other image stands far from the next, so that a set sorted by class gives a mixture.
        good = checked(source) if len(source) <= 20_000 else source
        return [good.image(i * len(good) // min(n, len(good))) for i in range(min(n, len(good)))]


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
    """Distilled student and control start from the same weights."""
    return r.seed * 1000 + 1 + sorted(r.students).index(name)


def fresh_student(r: Recipe, name: str) -> HeadedBackbone:
    return fresh_model(r.students[name].backbone, *r.heads_of(name), student_seed(r, name))


def finished(folders: list[Path]) -> bool:
    """Whether training was done and only the stage's mark is missing: model.json is written last."""
    return all((f / "model.json").exists() for f in folders)


def save_trained(r: Recipe, models: dict[Path, HeadedBackbone], training: TrainConfig, kind: str, stage: Path) -> None:
    """Write the trained models and drop the stage's checkpoint; of several processes, the first one does."""
    from accelerate import PartialState

    lineage = {"kind": kind, "recipe": r.name, "seed": r.seed, "images_seen": training.images, "steps": training.steps()}
    if PartialState().is_main_process:
        for folder, model in models.items():
            save_model(folder, model.backbone, r.input.preprocess(), model.heads(), lineage)
        (stage / "checkpoint.safetensors").unlink(missing_ok=True)
    PartialState().wait_for_everyone()


def pretrain(r: Recipe, data: Data) -> Work:
    def work(folder: Path, progress: Progress) -> None:
        if finished([folder]):
            return
        model = fresh_model(r.teacher.backbone, r.teacher.dino_head, r.teacher.ibot_head, r.seed * 1000)
        name = "teacher"
        trained = run_training(r, data, r.teacher.train, {name: model}, None, folder, progress, "pretrain")[name]
        save_trained(r, {folder: trained}, r.teacher.train, "pretrain", folder)

    return work


def distill(r: Recipe, data: Data, run: Path) -> Work:
    def work(folder: Path, progress: Progress) -> None:
        if finished([folder / name for name in r.students]):
            return
        teacher = load_headed(run / "teacher")
        students = {name: fresh_student(r, name) for name in r.students}
        trained = run_training(r, data, r.distill, students, teacher, folder, progress, "distill")
        save_trained(r, {folder / name: model for name, model in trained.items()}, r.distill, "distill", folder)

    return work


def control(r: Recipe, data: Data, name: str) -> Work:
    def work(folder: Path, progress: Progress) -> None:
        if finished([folder]):
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
    teacher_config = (teacher or next(iter(students.values()))).backbone.config
    heads = [(s.dino.config, None if s.ibot is None else s.ibot.config) for s in students.values()]
    configs = [s.backbone.config for s in students.values()]
    refuse_if_too_large(training_bytes(training, teacher_config, configs, heads), title)
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
    summary = getattr(data.train, "skipped_summary", None)
    if summary and (said := summary()):
        progress.say(f"{title}: {said}", warning=True)
    return trained


def knn_probe(r: Recipe, data: Data) -> Callable[[nn.Module], dict[str, float]]:
    """kNN accuracy of a backbone in training, for the log."""
    from distill.evaluate.quick import QuickKnn

    made: list[QuickKnn] = []

    def probe(backbone: nn.Module) -> dict[str, float]:
        if data.test is None:
            return {}
        if not made:
            made.append(QuickKnn(checked(data.gallery), checked(data.test), r.input.preprocess(), r.evaluate))
        return made[0](TorchEncoder(backbone))

    return probe


def export(r: Recipe, data: Data, run: Path, student: str, target: str) -> Work:
    def work(folder: Path, progress: Progress) -> None:
        from export.targets import build_target, prerequisites

        sources = {t: run / "export" / student / t for t in prerequisites(target)}
        artifact = build_target(
            target,  # type: ignore[arg-type]
            r.export,
            student,
            run / "students" / student,
            sources,
            lambda size: tensors(r, data.pictures("train", r.export.quantize.images), size),
            folder,
            progress,
        )
        built = Row(
            metric="build_s",
            value=artifact.build_seconds,
            n=1,
            subject=f"students/{student}",
            target=target,
            conditions={"device": platform.machine(), "versions": artifact.versions},
        )
        write_rows(folder / "rows.jsonl", [built])

    return work


def unmeasured(student: str, target: str, reason: str) -> list[Row]:
    """The rows of a target that could not be built here."""
    metrics = ("knn_top1", "linear_top1", "cosine_min", "latency_p50_ms", "images_per_s", "size_mb")
    return [not_measured(m, f"students/{student}", target, reason) for m in metrics]


def tensors(r: Recipe, pictures: list[Any], size: int) -> Tensor:
    """Preprocessed images [n, 3, size, size]."""
    preprocess = r.input.preprocess(size)
    return torch.stack([torch.from_numpy(preprocess(p)) for p in pictures])


def artifacts_of(run: Path, student: str) -> list[Any]:
    """The artifacts that were exported, in the order of their folders' names."""
    from export.artifact import NAME, read_artifact

    return [read_artifact(p.parent) for p in sorted((run / "export" / student).glob(f"*/{NAME}"))]


def parity(r: Recipe, data: Data, run: Path) -> Work:
    """Each artifact against what it was made from, at every resolution; raises GateFailed after the rows are written."""

    def work(folder: Path, progress: Progress) -> None:
        from export.artifact import Unrunnable, read_artifact
        from export.parity import artifact_parity, failed_gates
        from export.runtimes import open_artifact

        pictures = data.pictures("test" if data.test is not None else "train", PARITY_IMAGES)
        rows: list[Row] = []
        for student in r.students:
            torch_encoder = TorchEncoder(load_backbone(run / "students" / student))
            for artifact in artifacts_of(run, student):
                for entry in artifact.files:
                    reference: Encoder = torch_encoder
                    if artifact.source != "torch-fp32":
                        try:
                            source = read_artifact(run / "export" / student / artifact.source)
                            reference = open_artifact(source, entry.resolution)
                        except Unrunnable:
                            reference = torch_encoder
                    label = artifact.source if reference is not torch_encoder else "torch-fp32"
                    images = tensors(r, pictures, entry.resolution)
                    rows += artifact_parity(reference, artifact, images, f"students/{student}", label, entry.resolution)
        write_rows(folder / "rows.jsonl", rows)
        if failed := failed_gates(rows, r.export.gates):
            raise GateFailed("\n".join(failed))

    return work


def evaluate(r: Recipe, data: Data, run: Path) -> Work:
    def work(folder: Path, progress: Progress) -> None:
        from distill.evaluate.pairs import paired_rows
        from distill.evaluate.suite import Subject
        from distill.evaluate.suite import evaluate as judge
        from export.artifact import Unrunnable

        subjects = [*_yardsticks(r), *_models(r, run), *_artifacts(r, run)]
        if data.test is None:
            reason = "The recipe names no test set (data.test)."
            rows = [not_measured(m, s.subject, s.target, reason) for s in subjects for m in ("knn_top1", "linear_top1")]
            write_rows(folder / "rows.jsonl", rows)
            return
        assert all(isinstance(s, Subject) for s in subjects)
        result = judge(r.evaluate, subjects, data.gallery, data.test, folder, progress, (Unrunnable,))
        write_rows(folder / "rows.jsonl", result.rows + paired_rows(result.predictions, _pairs(r, run)))

    return work


def _yardsticks(r: Recipe) -> list[Any]:
    from distill.evaluate.suite import Subject

    preprocess = r.input.preprocess()
    plain = r.input.model_copy(update={"normalize": "none"}).preprocess()
    found = [Subject("raw", "pixels", lambda: RawPixels(), plain, None)]
    for name, backbone, seed in [
        ("teacher", r.teacher.backbone, r.seed * 1000),
        *((n, s.backbone, student_seed(r, n)) for n, s in r.students.items()),
    ]:

        def open_random(backbone: Any = backbone, seed: int = seed) -> Encoder:
            torch.manual_seed(seed)
            return TorchEncoder(Backbone(backbone))

        key = f"random-{backbone.model_dump_json()}-{seed}-{torch.__version__}"
        found.append(Subject(f"random/{name}", "torch-fp32", open_random, preprocess, key))
    return found


def _models(r: Recipe, run: Path) -> list[Any]:
    from distill.evaluate.suite import Subject

    folders = {"teacher": run / "teacher"} | {f"students/{n}": run / "students" / n for n in r.students}
    folders |= {f"control/{n}": run / "control" / n for n, s in r.students.items() if s.control}
    return [
        Subject(
            subject,
            "torch-fp32",
            lambda f=folder: TorchEncoder(load_backbone(f)),
            load_preprocess(folder),
            sha256_file(folder / "backbone.safetensors"),
        )
        for subject, folder in folders.items()
    ]


def _artifacts(r: Recipe, run: Path) -> list[Any]:
    from distill.data.preprocess import Preprocess
    from distill.evaluate.suite import Subject
    from export.runtimes import open_artifact

    return [
        Subject(
            f"students/{student}",
            artifact.target,
            lambda a=artifact, size=entry.resolution: open_artifact(a, size),
            Preprocess.from_json(entry.preprocess),
            entry.sha256,
        )
        for student in r.students
        for artifact in artifacts_of(run, student)
        for entry in artifact.files
    ]


def _pairs(r: Recipe, run: Path) -> list[tuple[str, str]]:
    """What the report compares: trained with untrained, teacher with pixels, distilled with control, artifact with PyTorch."""
    found = [("teacher/torch-fp32", "random/teacher/torch-fp32"), ("teacher/torch-fp32", "raw/pixels")]
    for name, student in r.students.items():
        mine = f"students/{name}/torch-fp32"
        found += [(mine, f"random/{name}/torch-fp32"), (mine, "teacher/torch-fp32")]
        found += [(mine, f"control/{name}/torch-fp32")] if student.control else []
        runnable = [a for a in artifacts_of(run, name) if a.runtime == "onnxruntime"]
        found += [(f"students/{name}/{a.target}", mine) for a in runnable]
    return found


def benchmark(r: Recipe, run: Path) -> Work:
    def work(folder: Path, progress: Progress) -> None:
        from export.benchmark import Case
        from export.benchmark import benchmark as measure
        from export.runtimes import open_artifact

        cases = []
        for subject, model in {
            "teacher": run / "teacher",
            **{f"students/{n}": run / "students" / n for n in r.students},
        }.items():
            cases.append(
                Case(
                    subject,
                    "torch-fp32",
                    r.input.size,
                    lambda threads, m=model: TorchEncoder(load_backbone(m)),
                    (model / "backbone.safetensors").stat().st_size,
                    preprocess=load_preprocess(model),
                )
            )
        for student in r.students:
            for artifact in artifacts_of(run, student):
                cases += [
                    Case(
                        f"students/{student}",
                        artifact.target,
                        entry.resolution,
                        lambda threads, a=artifact, size=entry.resolution: open_artifact(a, size, threads),
                        entry.bytes,
                        artifact.max_batch,
                    )
                    for entry in artifact.files
                ]
        write_rows(folder / "rows.jsonl", measure(r.benchmark, cases, progress))

    return work


def report(r: Recipe, data: Data, run: Path) -> Work:
    def work(folder: Path, progress: Progress) -> None:
        from export.pictures import pca_strip
        from export.report import write_report

        rows = read_rows(run / "rows.jsonl")
        models = {"teacher": run / "teacher"} | {f"students/{n}": run / "students" / n for n in r.students}
        encoders = {name: TorchEncoder(load_backbone(path)) for name, path in models.items()}
        pictures = data.pictures("test" if data.test is not None else "train", 8)
        strip = pca_strip(pictures, encoders, r.input.preprocess())
        write_report(run, folder, rows, r.report, strip=strip)

    return work


def bundles(r: Recipe, data: Data, run: Path) -> Work:
    def work(folder: Path, progress: Progress) -> None:
        from export.bundle import build_bundle

        lineage = {
            "teacher_sha256": sha256_file(run / "teacher" / "backbone.safetensors"),
            "train": {"name": data.train.name, "fingerprint": data.train.fingerprint()},
            "recipe": (run / "recipe.yaml").read_text(encoding="utf-8"),
        }
        for student in r.students:
            model = run / "students" / student
            build_bundle(
                r.bundle,
                student,
                {"name": r.name, "seed": r.seed},
                artifacts_of(run, student),
                model,
                data.pictures("test" if data.test is not None else "train", r.bundle.golden_images),
                run / "report",
                lineage | {"student_sha256": sha256_file(model / "backbone.safetensors")},
                folder / f"{student}.tar.gz",
                progress,
            )

    return work
