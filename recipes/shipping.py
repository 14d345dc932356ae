"""What the stages after training do: export, proofs, measurements, report, bundle.

Every function here returns `work(folder, progress)`; nothing is computed before that is called.
"""

import platform
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill.data.preprocess import Preprocess
from distill.encoder import Encoder, RawPixels, TorchEncoder
from distill.errors import GateFailed
from distill.files import sha256_file, write_json
from distill.models.checkpoints import load_backbone, load_preprocess, model_info
from distill.models.kinds import make_backbone, read_config
from distill.progress import Progress
from distill.rows import Row, not_measured, read_rows, write_rows
from export.targets import Target, at_resolution
from recipes.data import Data
from recipes.schema import Recipe
from recipes.work import Work, student_seed

PARITY_IMAGES = 64
STRIP_IMAGES = 8


def torch_encoder(model: Path, threads: int | None = None) -> Encoder:
    """A trained model in PyTorch; `threads` is what the stopwatch set already."""
    return TorchEncoder(load_backbone(model))


def export(r: Recipe, data: Data, run: Path, name: str, target: Target) -> Work:
    """One target of one model. A budget that is not met is a failed gate: the best artifact found lies there all the same."""
    subject = r.subjects()[name]

    def work(folder: Path, progress: Progress) -> None:
        from export.builders import build_target
        from export.targets import Images, prerequisites

        sources: dict[str, Path] = {t: run / "export" / name / t for t in prerequisites(target)}
        seen = r.input.preprocess()
        images = Images(
            lambda n, size: data.tensors("train", n, at_resolution(seen, size)),
            lambda n, size, avoid: data.tensors("train", n, at_resolution(seen, size), avoid),
            heldout_accuracy(r, data),
        )
        artifact = build_target(target, r.export, name, run / subject, sources, images, folder, progress)
        if not artifact.runnable_here:
            progress.say(f"export: {target} of {name} is compiled but cannot run here: {artifact.reason}.")
        built = Row(
            metric="build_s",
            value=artifact.build_seconds,
            n=1,
            subject=subject,
            target=target,
            conditions={"device": platform.machine(), "versions": artifact.versions},
        )
        write_rows(folder / "rows.jsonl", [built])
        if failure := artifact.details.get("budget_failure"):
            raise GateFailed(failure)

    return work


def heldout_accuracy(r: Recipe, data: Data) -> Callable[..., Any] | None:
    """What makes the measure of points lost inside the labelled gallery; None where the budget asks for none, or there are no labels."""
    budget = r.export.quantize.budget
    if budget is None or not budget.asks_accuracy():
        return None

    def loss(size: int, reference: Encoder, sha256: str, folder: Path, progress: Progress) -> Any:
        from export.quantizing.budget_measures import GalleryLoss

        preprocess = at_resolution(r.input.preprocess(), size)
        return GalleryLoss(budget, r.evaluate, data.gallery, preprocess, reference, progress, sha256, folder)

    return loss


def unmeasured(subject: str, target: str, reason: str) -> list[Row]:
    """The rows of a target that could not be built here."""
    metrics = ("knn_top1", "linear_top1", "cosine_min", "latency_p50_ms", "images_per_s", "size_mb")
    return [not_measured(m, subject, target, reason) for m in metrics]


def artifacts_of(r: Recipe, run: Path, name: str) -> list[Any]:
    """The artifacts of the recipe's targets that could be made here (folders of earlier recipes may lie beside them)."""
    from export.artifact import NAME, read_artifact

    folders = [run / "export" / name / target for target in r.targets_of(name)]
    return [read_artifact(f) for f in folders if (f / NAME).exists()]


def parity(r: Recipe, data: Data, run: Path) -> Work:
    """Each artifact against what it was made from, at every resolution; raises GateFailed after the rows are written."""

    def work(folder: Path, progress: Progress) -> None:
        from export.artifact import Unrunnable, read_artifact
        from export.bisection import explain
        from export.parity import artifact_parity, failed_gates
        from export.runtimes import open_artifact

        rows: list[Row] = []

        def where(row: Row) -> str:
            """The first guilty block of a file whose gate failed."""
            artifact = read_artifact(run / "export" / row.subject.split("/")[1] / row.target)
            size = row.conditions["resolution"]
            images = data.tensors("test", PARITY_IMAGES, Preprocess.from_json(artifact.file(size).preprocess))
            least = r.export.gates.least(row.conditions["precision"])
            return explain(load_backbone(run / row.subject), artifact, images, least, size)

        for student, subject in r.subjects().items():
            in_torch = torch_encoder(run / subject)
            for artifact in artifacts_of(r, run, student):
                for entry in artifact.files:
                    reference: Encoder = in_torch
                    if artifact.source != "torch-fp32":
                        try:
                            source = read_artifact(run / "export" / student / artifact.source)
                            reference = open_artifact(source, entry.resolution)
                        except Unrunnable:
                            reference = in_torch
                    label = artifact.source if reference is not in_torch else "torch-fp32"
                    images = data.tensors("test", PARITY_IMAGES, Preprocess.from_json(entry.preprocess))
                    rows += artifact_parity(reference, artifact, images, subject, label, entry.resolution)
        write_rows(folder / "rows.jsonl", rows)
        if failed := failed_gates(rows, r.export.gates, where):
            raise GateFailed("\n".join(failed))

    return work


def evaluate(r: Recipe, data: Data, run: Path) -> Work:
    def work(folder: Path, progress: Progress) -> None:
        from distill.evaluate.suite import evaluate as judge
        from export.artifact import Unrunnable

        subjects = [*_yardsticks(r, run), *_models(r, run), *_artifacts(r, run)]
        gallery, test = (None if data.test is None else data.gallery), data.test
        result = judge(
            r.evaluate, subjects, gallery, test, folder, progress, (Unrunnable,), data.tasks, _pairs(r, run), kept(run)
        )
        write_rows(folder / "rows.jsonl", result.rows)

    return work


def kept(run: Path) -> Path:
    """Where features of evaluations stay when settings of an evaluation change; no stage owns it, and it may be deleted."""
    return run / "cache"


def last_cut(folder: Path) -> Path:
    """The model of the last round of pruning as it was before its recovery."""
    return max(folder.glob("round-*/cut"), key=lambda p: int(p.parent.name.removeprefix("round-")))


def _yardsticks(r: Recipe, run: Path) -> list[Any]:
    from distill.evaluate.reader import Subject

    preprocess = r.input.preprocess()
    plain = r.input.model_copy(update={"normalize": "none"}).preprocess()
    found = [
        Subject("raw", "pixels", RawPixels, plain, None),
        Subject("raw", "pixels-joint", partial(RawPixels, True), plain, None),
    ]
    teacher = read_config(model_info(run / "teacher")["backbone"])
    for name, backbone, seed, seen in [
        ("teacher", teacher, r.seed * 1000, load_preprocess(run / "teacher")),
        *((n, s.backbone, student_seed(r, n), preprocess) for n, s in r.students.items()),
    ]:

        def open_random(backbone: Any = backbone, seed: int = seed) -> Encoder:
            torch.manual_seed(seed)
            return TorchEncoder(make_backbone(backbone))

        key = f"random-{backbone.model_dump_json()}-{seed}-{torch.__version__}"
        found.append(Subject(f"random/{name}", "torch-fp32", open_random, seen, key))
    return found


def _models(r: Recipe, run: Path) -> list[Any]:
    from distill.evaluate.reader import Subject

    folders = {"teacher": run / "teacher"} | {subject: run / subject for subject in r.subjects().values()}
    folders |= {f"cut/{n}": last_cut(run / "pruned" / n) for n, p in r.pruned.items() if p.recovery is not None}
    folders |= {f"control/{n}": run / "control" / n for n in r.controls()}
    return [
        Subject(
            subject,
            "torch-fp32",
            partial(torch_encoder, folder),
            load_preprocess(folder),
            sha256_file(folder / "backbone.safetensors"),
        )
        for subject, folder in folders.items()
    ]


def _artifacts(r: Recipe, run: Path) -> list[Any]:
    from distill.evaluate.reader import Subject
    from export.runtimes import open_artifact

    return [
        Subject(
            subject,
            artifact.target,
            partial(open_artifact, artifact, entry.resolution),
            Preprocess.from_json(entry.preprocess),
            artifact.content_sha256(entry),
        )
        for student, subject in r.subjects().items()
        for artifact in artifacts_of(r, run, student)
        for entry in artifact.files
    ]


def _pairs(r: Recipe, run: Path) -> list[tuple[str, str]]:
    """What the report compares: trained with untrained, teacher with pixels, distilled with control, artifact with PyTorch."""
    found = [("teacher/torch-fp32", "random/teacher/torch-fp32"), ("teacher/torch-fp32", "raw/pixels")]
    found.append(("teacher/torch-fp32", "raw/pixels-joint"))
    for name, subject in r.subjects().items():
        mine = f"{subject}/torch-fp32"
        found += [(mine, f"random/{name}/torch-fp32")] if name in r.students else []
        found.append((mine, "teacher/torch-fp32"))
        if name not in r.students:
            found.append((mine, f"{r.subjects()[(r.pruned.get(name) or r.qad[name]).of]}/torch-fp32"))
        if name in r.pruned and r.pruned[name].recovery is not None:
            found.append((mine, f"cut/{name}/torch-fp32"))
        found += [(mine, f"control/{name}/torch-fp32")] if name in r.controls() else []
        runnable = [a for a in artifacts_of(r, run, name) if a.runtime in ("onnxruntime", "openvino")]
        found += [(f"{subject}/{a.target}", other) for a in runnable for other in (mine, "teacher/torch-fp32")]
        if name in r.qad:  # what training with quantization gained over quantizing afterwards
            of = r.qad[name].of
            there = {a.target for a in artifacts_of(r, run, of)}
            found += [(f"{subject}/{a.target}", f"{r.subjects()[of]}/{a.target}") for a in runnable if a.target in there]
    return found


def benchmark(r: Recipe, run: Path) -> Work:
    def work(folder: Path, progress: Progress) -> None:
        from export.benchmark import Case
        from export.benchmark import benchmark as measure
        from export.fingerprint import fingerprint
        from export.runtimes import open_artifact

        cases = []
        for subject, model in {"teacher": run / "teacher", **{s: run / s for s in r.subjects().values()}}.items():
            cases.append(
                Case(
                    subject,
                    "torch-fp32",
                    load_preprocess(model).size,
                    partial(torch_encoder, model),
                    (model / "backbone.safetensors").stat().st_size,
                    preprocess=load_preprocess(model),
                )
            )
        for student, subject in r.subjects().items():
            for artifact in artifacts_of(r, run, student):
                cases += [
                    Case(
                        subject,
                        artifact.target,
                        entry.resolution,
                        partial(open_artifact, artifact, entry.resolution),
                        entry.bytes,
                        artifact.max_batch,
                    )
                    for entry in artifact.files
                ]
        rows = measure(r.benchmark, cases, progress)
        write_json(folder / "fingerprint.json", fingerprint())
        write_rows(folder / "rows.jsonl", rows)

    return work


def report(r: Recipe, data: Data, run: Path, stages: list[str]) -> Work:
    def work(folder: Path, progress: Progress) -> None:
        from export.artifact import Unrunnable
        from export.report import training_curves, write_report
        from export.reporting.labels import label_of
        from export.reporting.pictures import BATCH, pca_strip
        from export.reporting.trackers import send
        from recipes.pictures import beside, panels

        rows = read_rows(run / "rows.jsonl")
        models = {"teacher": run / "teacher"} | {s: run / s for s in r.subjects().values()}
        encoders = {label_of(name, "torch-fp32"): torch_encoder(path) for name, path in models.items()}
        seen = {label_of(name, "torch-fp32"): load_preprocess(path) for name, path in models.items()}
        at_once = dict.fromkeys(encoders, BATCH)
        subjects = [*_models(r, run), *_artifacts(r, run)]
        for quantized in beside(subjects)[2:]:
            label = label_of(quantized.subject, quantized.target)
            with suppress(Unrunnable):
                encoders[label], seen[label], at_once[label] = quantized.open(), quantized.preprocess, 1
        strip = pca_strip(data.pictures("test", STRIP_IMAGES), encoders, seen, batch=at_once)
        controls = [f"control/{n}" for n in r.controls()]
        shown = panels(r, data, run / "evaluate", kept(run), subjects, progress)
        write_report(run, folder, rows, r.report, strip=strip, pictures=shown, models=[*models, *controls], stages=stages)
        curves = training_curves(run)
        for tracker in r.report.trackers:
            if problem := send(tracker, rows, curves, run.resolve().name, folder / "trackers"):
                progress.say(f"report: {problem}", warning=True)

    return work


def bundles(r: Recipe, data: Data, run: Path) -> Work:
    def work(folder: Path, progress: Progress) -> None:
        from distill.evaluate.kept_heads import kept_heads
        from export.bundle import BundleInputs, build_bundle
        from export.bundling.origin import teacher_origin
        from export.fingerprint import code

        rows = read_rows(run / "rows.jsonl")
        load, fitted = r.teacher.load, r.teacher.fit_heads is not None
        origin = model_info(run / ("loaded" if load is not None and fitted else "teacher"))["lineage"]
        lineage = {
            "teacher_origin": teacher_origin(origin, None if load is None else load.licence),
            "teacher_sha256": sha256_file(run / "teacher" / "backbone.safetensors"),
            "train": {"name": data.train.name, "fingerprint": data.train.fingerprint()},
            "recipe": (run / "recipe.yaml").read_text(encoding="utf-8"),
            **code(),
        }
        for student, subject in r.subjects().items():
            model = run / subject
            inputs = BundleInputs(
                student=student,
                run={"name": r.name, "seed": r.seed},
                artifacts=artifacts_of(r, run, student),
                model_folder=model,
                golden_images=data.pictures("test", r.bundle.golden_images),
                report_folder=run / "report",
                lineage=lineage | {"student_sha256": sha256_file(model / "backbone.safetensors")},
                rows=[row for row in rows if row.subject == subject],
                heads=kept_heads(run / "evaluate", subject),
                export=r.export,
            )
            build_bundle(r.bundle, inputs, folder / f"{student}.tar.gz", progress)

    return work
