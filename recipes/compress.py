"""What the stages of derived models do: prune and recover, or distil with the quantization switched on.

Every function here returns `work(folder, progress)`; nothing is computed before that is called.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.files import read_json, write_json
from distill.importance import measure
from distill.models.backbone import Backbone, BackboneConfig
from distill.models.checkpoints import load_backbone, load_heads, load_into, load_preprocess, model_info, save_model
from distill.models.fake_quant import FORMAT, strip, with_fake_quant
from distill.models.headed import HeadedBackbone
from distill.models.match_head import MatchHead, identity_match_head
from distill.progress import Progress
from distill.prune import Cost, PruneReport, macs, prune
from distill.sparsity import Sparsity24
from recipes.data import Data
from recipes.derived import PrunedConfig, RecoveryConfig
from recipes.schema import Recipe
from recipes.work import (
    MATCH,
    Work,
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
        normalize = load_preprocess(run / "teacher").normalize
        before = run / r.subjects()[config.of]
        start = load_backbone(before).config
        assert isinstance(start, BackboneConfig), "checked by the recipe"
        cost = cost_of(config, start, r.input.size, folder)
        rounds = config.targets(cost(start))
        reports: list[dict[str, Any]] = []
        for number, target in enumerate(rounds, 1):
            here = folder / f"round-{number}"
            if not (here / PRUNING).exists():
                student = load_student(r, before, teacher.backbone.dim)
                training = (config.recovery or RecoveryConfig(images=r.distill.batch)).training(r.distill, 1 / len(rounds))
                progress.say(f"pruned/{name}: round {number} of {len(rounds)}, importance by {config.importance}")
                scores, seen = measure(
                    config.importance, config.images, student, teacher, training, data.train, r.input.normalize,
                    r.seed + number, r.runtime, normalize,
                )  # fmt: skip
                smaller, report = prune(student, config, target, scores, cost, seen, start)
                said = _summary(report)
                progress.say(f"pruned/{name}: {said}")
                if config.sparsity:
                    Sparsity24(smaller.backbone).apply_()  # type: ignore[arg-type]
                save_model(
                    here / "cut", smaller.backbone, r.input.preprocess(), smaller.heads(), {"kind": "pruned", "of": config.of}
                )
                write_json(here / PRUNING, report.to_json())
            reports.append(read_json(here / PRUNING))
            before = here / "cut"
            if config.recovery is not None:
                before = _recover(r, data, run, name, config, here, teacher, normalize, 1 / len(rounds), progress)
        final = load_student(r, before, teacher.backbone.dim)
        write_json(folder / PRUNING, _whole(config, reports, final.backbone))
        lineage = model_info(before)["lineage"] | {"kind": "pruned", "of": r.subjects()[config.of], "seed": r.seed}
        save_match(folder, final)
        save_model(folder, final.backbone, r.input.preprocess(), final.heads(), lineage)

    return work


def _recover(
    r: Recipe,
    data: Data,
    run: Path,
    name: str,
    config: PrunedConfig,
    here: Path,
    teacher: HeadedBackbone,
    normalize: str,
    share: float,
    progress: Progress,
) -> Path:
    """Distil what a round cut; the folder of the recovered model."""
    folder = here / "recovered"
    if (folder / "model.json").exists():
        return folder
    assert config.recovery is not None
    student = load_student(r, here / "cut", teacher.backbone.dim)
    masks: list[Sparsity24] = [Sparsity24(student.backbone)] if config.sparsity else []  # type: ignore[arg-type]

    def keep_sparse(models: dict[str, nn.Module]) -> None:
        for model in models.values():
            masks[0].apply_(model.backbone)  # type: ignore[arg-type]

    training = config.recovery.training(r.distill, share)
    trained = run_training(
        r, data, training, {name: student}, folder, progress, f"pruned/{name}", {name: f"pruned/{name}"}, teacher, normalize,
        cache=targets_cache(r, data, run, training) if training.cache is not None else None,
        after_step=keep_sparse if masks else None,
    )  # fmt: skip
    save_trained(r, {folder: trained[name]}, training, "recovered", folder)
    return folder


def _summary(report: PruneReport) -> str:
    after = report.after
    heads = " ".join(str(b["heads"]) for b in after["blocks"])
    hidden = " ".join(str(b["hidden"]) for b in after["blocks"])
    return (
        f"{len(after['blocks'])} blocks, width {after['dim']}, heads {heads}, hidden {hidden}; "
        f"cost {report.cost_before:.4g} -> {report.cost_after:.4g}"
    )


def _whole(config: PrunedConfig, reports: list[dict[str, Any]], backbone: Any) -> dict[str, Any]:
    """pruning.json: what was asked, what every round did, and the widths in the end."""
    first, last = reports[0]["before"], reports[-1]["after"]
    assert isinstance(backbone, Backbone)
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
    from export.block_latency import LatencyTable, grid_of

    grid = grid_of(start, config.least, config.round_to)
    table = LatencyTable(start, size, folder / "latencies.json", config.runtime, threads=config.threads, grid=grid)
    table.measure()
    return table.cost


def pruned_control(r: Recipe, data: Data, run: Path, name: str) -> Work:
    """The pruned network with fresh weights, distilled on as many images as the pruned one and its ancestor have seen."""

    def work(folder: Path, progress: Progress) -> None:
        if (folder / "model.json").exists():
            (folder / "checkpoint.safetensors").unlink(missing_ok=True)
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
        if (folder / "model.json").exists() and (folder / QUANTIZATION).exists():
            (folder / "checkpoint.safetensors").unlink(missing_ok=True)
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
        assert quantization["format"] == FORMAT
        write_json(folder / QUANTIZATION, quantization)  # before model.json, which says that the folder is whole
        save_trained(r, {folder: trained}, training, "qad", folder)

    return work


def input_scales(r: Recipe, data: Data, student: HeadedBackbone, weights: str) -> dict[str, float | None]:
    """The scale of each quantized layer's input, from the calibration that an export of this student would make."""
    from export.calibrate import calibrate
    from export.graph import export_onnx
    from export.quantize import QuantizeConfig

    # Smoothing and corrections move numbers between layers, which training does better; only the scales are taken.
    settings: QuantizeConfig = r.export.quantize.model_copy(
        update={
            "smooth": None,
            "offset": False,
            "bias_correction": False,
            "rounding": "nearest",
            "attention": False,
            "budget": None,
        }
    )
    precision = "int8" if weights == "int8" else "w4"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(student.backbone, path, r.input.size)
        images = data.tensors("train", settings.images, r.input.preprocess())
        found = calibrate(path, images, settings, precision)
    return {name: layer.input_scale if weights == "int8" else None for name, layer in found.layers.items()}
