"""What the stages of derived models do: prune and recover, or distil with the quantization switched on.

Every function here returns `work(folder, progress)`; nothing is computed before that is called.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from distill.files import read_json, write_json
from distill.importance import measure
from distill.models.backbone import BackboneConfig
from distill.models.checkpoints import load_backbone, load_heads, load_into, load_preprocess, model_info, save_model
from distill.models.fake_quant import FORMAT, strip, with_fake_quant
from distill.models.headed import HeadedBackbone
from distill.models.match_head import MatchHead, identity_match_head
from distill.progress import Progress
from distill.prune import Cost, PruneReport, macs, prune
from distill.rows import read_rows, write_rows
from distill.sparsity import Sparsity24, hold
from recipes.data import Data
from recipes.derived import PrunedConfig, RecoveryConfig
from recipes.schema import Recipe
from recipes.work import (
    MATCH,
    Work,
    finished,
    fresh_model,
    load_teacher_model,
    run_training,
    save_match,
    save_trained,
    student_seed,
    targets_cache,
)

PRUNING, QUANTIZATION = "pruning.json", "quantization.json"


def load_student(r: Recipe, folder: Path, teacher_dim: int) -> HeadedBackbone:
    """A trained student with the heads that it was trained with: the gradient through fresh ones would undo what it has learned."""
    asked = r.distill.objectives
    backbone = load_backbone(folder)
    heads = load_heads(folder, backbone.dim) if asked.needs_heads() else {}
    match = None
    if asked.match is not None:
        parts = {"cls": asked.match.cls > 0, "patches": asked.match.patches > 0}
        match = load_into(MatchHead(backbone.dim, teacher_dim, asked.match.hidden, **parts), folder / MATCH)
    return HeadedBackbone(backbone, heads.get("dino"), heads.get("ibot"), match)


def pruned(r: Recipe, data: Data, run: Path, name: str) -> Work:
    """Rounds of measuring, cutting and recovery; each finished round lies in `round-N/`, so that a kill costs at most one."""
    config = r.pruned[name]

    def work(folder: Path, progress: Progress) -> None:
        if (folder / "model.json").exists():
            return
        teacher = load_teacher_model(run / "teacher", r.distill.objectives)
        before = run / r.subjects()[config.of]
        start = load_backbone(before).config
        assert isinstance(start, BackboneConfig), "checked by the recipe"
        cost = cost_of(config, start, r.input.size, folder)
        rounds = config.targets(cost(start))
        for number, target in enumerate(rounds, 1):
            here = folder / f"round-{number}"
            _cut(r, data, run, name, number, before, here, teacher, start, target, cost, progress)
            before = here / "cut"
            if config.recovery is not None:
                before = _recover(r, data, run, name, here, teacher, progress)
        final = load_student(r, before, teacher.backbone.dim)
        with first_process() as first:
            if first:
                reports = [read_json(folder / f"round-{n}" / PRUNING) for n in range(1, len(rounds) + 1)]
                write_json(folder / PRUNING, _whole(config, reports))
                write_rows(folder / "rows.jsonl", read_rows(before / "rows.jsonl") if config.recovery is not None else [])
                lineage = model_info(before)["lineage"] | {"kind": "pruned", "of": r.subjects()[config.of], "seed": r.seed}
                save_match(folder, final)
                save_model(folder, final.backbone, r.input.preprocess(), final.heads(), lineage)

    return work


def _cut(
    r: Recipe,
    data: Data,
    run: Path,
    name: str,
    number: int,
    before: Path,
    here: Path,
    teacher: HeadedBackbone,
    start: BackboneConfig,
    target: float,
    cost: Cost,
    progress: Progress,
) -> None:
    """One round's measuring and cutting: `here/cut` and, last, `here/pruning.json`. Every process decides the same; the first one writes.

    Args:
        before: folder of the model as it is; start: the network that the first round began with.
    """
    config = r.pruned[name]
    with first_process():  # nobody writes before all have looked
        done = (here / PRUNING).exists()
    if done:
        return
    student = load_student(r, before, teacher.backbone.dim)
    training = (config.recovery or RecoveryConfig(images=r.distill.batch)).training(r.distill, 1 / config.steps)
    progress.say(f"pruned/{name}: round {number} of {config.steps}, importance by {config.importance}")
    scores, seen = measure(
        config.importance, config.images, student, teacher, training, data.train, r.input.normalize,
        r.seed + number, r.runtime, load_preprocess(run / "teacher").normalize,
    )  # fmt: skip
    smaller, report = prune(student, config, target, scores, cost, seen, start)
    progress.say(f"pruned/{name}: {_summary(report)}")
    if config.sparsity and number == config.steps:
        Sparsity24(smaller.backbone).apply_()
    with first_process() as first:
        if first:
            save_match(here / "cut", smaller)
            lineage = {"kind": "pruned", "of": config.of}
            save_model(here / "cut", smaller.backbone, r.input.preprocess(), smaller.heads(), lineage)
            write_json(here / PRUNING, report.to_json())


def _recover(r: Recipe, data: Data, run: Path, name: str, here: Path, teacher: HeadedBackbone, progress: Progress) -> Path:
    """Distil what a round cut; the folder of the recovered model."""
    config, folder = r.pruned[name], here / "recovered"
    if finished([folder], folder):
        return folder
    assert config.recovery is not None
    student = load_student(r, here / "cut", teacher.backbone.dim)
    sparse = config.sparsity is not None and here.name == f"round-{config.steps}"
    training = config.recovery.training(r.distill, 1 / config.steps)
    trained = run_training(
        r, data, training, {name: student}, folder, progress, f"pruned/{name}", {name: f"pruned/{name}"}, teacher,
        load_preprocess(run / "teacher").normalize,
        cache=targets_cache(r, data, run, training) if training.cache is not None else None,
        after_step=hold({name: Sparsity24(student.backbone)}) if sparse else None,
    )  # fmt: skip
    save_trained(r, {folder: trained[name]}, training, "recovered", folder)
    return folder


@contextmanager
def first_process() -> Iterator[bool]:
    """Whether this is the first of several processes; all go on together when it is through."""
    from accelerate import PartialState

    yield PartialState().is_main_process
    PartialState().wait_for_everyone()


def _summary(report: PruneReport) -> str:
    after = report.after
    heads = " ".join(str(b["heads"]) for b in after["blocks"])
    hidden = " ".join(str(b["hidden"]) for b in after["blocks"])
    return (
        f"{len(after['blocks'])} blocks, width {after['dim']}, heads {heads}, hidden {hidden}; "
        f"cost {report.cost_before:.4g} -> {report.cost_after:.4g}"
    )


def _whole(config: PrunedConfig, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """pruning.json: what was asked, what every round did, and the widths in the end."""
    first, last = reports[0]["before"], reports[-1]["after"]
    return {
        "from": config.of,
        "asked": {k: v for k, v in config.model_dump().items() if k in ("macs", "latency_ms", "parts", "importance", "steps")},
        "macs_before": first["macs"],
        "macs_after": last["macs"],
        "parameters_before": first["parameters"],
        "parameters_after": last["parameters"],
        "dim": last["dim"],
        "blocks": last["blocks"],
        "before": first,
        "steps": [
            {
                "macs": s["after"]["macs"],
                "lost": s["lost"],
                "blocks_cut": s["blocks_cut"],
                "cost": s["cost_after"],
                "target": s["target"],
            }
            for s in reports
        ],
    }


def cost_of(config: PrunedConfig, start: BackboneConfig, size: int, folder: Path) -> Cost:
    """What a network costs: multiply-adds, or the milliseconds that a table of block latencies says."""
    if config.latency_ms is None:
        return macs
    from export.stopwatch.block_latency import LatencyTable, grid_of

    grid = grid_of(start, config.least, config.round_to)
    table = LatencyTable(start, size, folder / "latencies.json", config.runtime, threads=config.threads, grid=grid)
    table.measure()
    return table.cost


def pruned_control(r: Recipe, data: Data, run: Path, name: str) -> Work:
    """The pruned network with fresh weights, distilled on as many images as the pruned one and its ancestor have seen."""

    def work(folder: Path, progress: Progress) -> None:
        if finished([folder], folder):
            return
        config, asked = r.pruned[name], r.distill.objectives
        assert config.recovery is not None
        teacher = load_teacher_model(run / "teacher", asked)
        shape = load_backbone(run / "pruned" / name).config
        student = fresh_model(shape, *r.heads_of(r.student_of(name)), student_seed(r, name), asked, teacher.backbone.dim)
        training = r.distill.model_copy(update={"images": r.seen_images(name), "cache": None})
        normalize = load_preprocess(run / "teacher").normalize
        subject = f"control/{name}"
        trained = run_training(
            r, data, training, {name: student}, folder, progress, subject, {name: subject}, teacher, normalize
        )
        save_trained(r, {folder: trained[name]}, training, "control", folder)

    return work


def qad(r: Recipe, data: Data, run: Path, name: str) -> Work:
    """Calibrate as the export would, switch the rounding on, distil, and keep the scales beside the weights."""
    config = r.qad[name]

    def work(folder: Path, progress: Progress) -> None:
        if finished([folder], folder):
            return
        training, before = config.training(r.distill), run / r.subjects()[config.of]
        if config.teacher == "itself":
            teacher = HeadedBackbone(load_backbone(before))
            teacher_normalize: str = r.input.normalize
            student = HeadedBackbone(load_backbone(before), match=identity_match_head(teacher.backbone.dim))
        else:
            teacher = load_teacher_model(run / "teacher", r.distill.objectives)
            teacher_normalize = load_preprocess(run / "teacher").normalize
            student = load_student(r, before, teacher.backbone.dim)
        torch.manual_seed(r.seed * 1000 + 700)
        scales = input_scales(r, data, student, config.weights)
        student.backbone = with_fake_quant(student.backbone, scales, config.weights, config.learn_scales)
        trained = run_training(
            r, data, training, {name: student}, folder, progress, f"qad/{name}", {name: f"qad/{name}"}, teacher, teacher_normalize,
            cache=targets_cache(r, data, run, training) if training.cache is not None else None,
        )[name]  # fmt: skip
        trained.backbone, quantization = strip(trained.backbone)
        trained.match = None  # of a model that taught itself it is the identity; nothing goes on from here
        assert quantization["format"] == FORMAT
        with first_process() as first:
            if first:
                write_json(folder / QUANTIZATION, quantization)  # before model.json, which says that the folder is whole
        save_trained(r, {folder: trained}, training, "qad", folder)

    return work


def input_scales(r: Recipe, data: Data, student: HeadedBackbone, weights: str) -> dict[str, float | None]:
    """The scale of each quantized layer's input, from the calibration that an export of this student would make."""
    from export.graph import export_onnx
    from export.quantizing.calibrate import calibrate

    settings = r.export.quantize.plain()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(student.backbone, path, r.input.size)
        images = data.tensors("train", settings.images, r.input.preprocess())
        found = calibrate(path, images, settings, weights)
    return {name: layer.input_scale if weights == "int8" else None for name, layer in found.layers.items()}
