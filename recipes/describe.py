"""What `decant check` prints: the models with their sizes, the cost of each training, and which stages would run, and why. Does nothing."""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from distill.errors import DecantError
from distill.memory import training_bytes
from distill.models.backbone import BackboneConfig, flops_per_image, parameter_count
from distill.models.heads import HeadConfig, head_parameters
from distill.train import TrainConfig
from recipes.schema import Recipe


def describe(recipe: Recipe, run: Path) -> RenderableType:
    """The plan as tables. Data that are not there are named, and leave open which stages are done."""
    return Group(_models(recipe), Text(), _trainings(recipe), Text(), *_stages(recipe, run))


def _models(r: Recipe) -> Table:
    table = Table(title=f"Models of {r.name} at {r.input.size} px", title_justify="left")
    for name, justify in (
        ("model", "left"),
        ("shape", "left"),
        ("parameters", "right"),
        ("heads", "right"),
        ("GFLOPs/image", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    rows: list[tuple[str, BackboneConfig, HeadConfig, HeadConfig | None]] = [
        ("teacher", r.teacher.backbone, r.teacher.dino_head, r.teacher.ibot_head)
    ]
    rows += [(f"students/{n}", s.backbone, *r.heads_of(n)) for n, s in r.students.items()]
    for name, backbone, dino, ibot in rows:
        dim, depth, heads, ffn = backbone.shape()
        in_heads = head_parameters(dim, dino) + (0 if ibot is None else head_parameters(dim, ibot))
        table.add_row(
            name,
            f"{backbone.arch}/{backbone.patch}: {dim} wide, {depth} blocks, {heads} heads, {ffn}",
            f"{parameter_count(backbone, mask_token=False):,}",
            f"{in_heads / 1e6:.2f} M",
            f"{flops_per_image(backbone, r.input.size) / 1e9:.3g}",
        )
    return table


def _trainings(r: Recipe) -> Table:
    table = Table(title="Trainings", title_justify="left")
    for name in ("stage", "images", "steps", "batch", "crops", "PFLOPs", "memory, about"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    students = [s.backbone for s in r.students.values()]
    heads = [r.heads_of(n) for n in r.students]
    own = (r.teacher.dino_head, r.teacher.ibot_head)
    rows = [("pretrain", r.teacher.train, r.teacher.backbone, [r.teacher.backbone], [own])]
    rows.append(("distill", r.distill, r.teacher.backbone, students, heads))
    for name, student in r.students.items():
        if student.control:
            rows.append((f"control/{name}", r.control_training(), student.backbone, [student.backbone], [r.heads_of(name)]))
    for stage, training, teacher, trained, head_configs in rows:
        crops = training.crops
        table.add_row(
            stage,
            f"{training.images:,}",
            f"{training.steps():,}",
            str(training.batch),
            f"2 × {crops.global_size} + {crops.local_count} × {crops.local_size} px",
            f"{training.images * training_flops(training, teacher, trained) / 1e15:.3g}",
            f"{training_bytes(training, (teacher, own) if stage == 'distill' else None, trained, head_configs) / 2**30:.2g} GiB",
        )
    return table


def training_flops(training: TrainConfig, teacher: BackboneConfig, students: list[BackboneConfig]) -> float:
    """Floating-point operations an image: the teacher's forward on two global crops, each student's forward and backward (3 forwards)."""
    crops = training.crops
    total = 2.0 * flops_per_image(teacher, crops.global_size)
    for student in students:
        forward = 2 * flops_per_image(student, crops.global_size)
        if crops.local_count:
            forward += crops.local_count * flops_per_image(student, crops.local_size)
        total += 3 * forward
    return total


def _stages(r: Recipe, run: Path) -> Iterator[RenderableType]:
    from recipes.decide import decide
    from recipes.stages import plan

    if remote := [f"data.{role} ({name})" for role, name in _not_here(r)]:
        yield Text(f"Which stages would run is open: {' and '.join(remote)} would have to be fetched first.", style="yellow")
        return

    table = Table(title=f"Stages, into {run}", title_justify="left")
    for name in ("stage", "would", "because"):
        table.add_column(name)
    try:
        for decision in decide(run, plan(r, run)):
            table.add_row(decision.stage.name, decision.action, decision.why)
    except DecantError as e:
        yield Text(f"Which stages would run is open: {e}", style="yellow")
        return
    yield table


def _not_here(r: Recipe) -> Iterator[tuple[str, str]]:
    """(role, name) of the data sets that are names on a hub: a check opens nothing that may be downloaded."""
    from distill.data.hub import BUILDERS
    from distill.data.sources import DatasetsConfig, source_from

    for role, value in (("train", r.data.train), ("gallery", r.data.gallery), ("test", r.data.test)):
        config = None if value is None else source_from(value)
        if isinstance(config, DatasetsConfig) and config.name not in BUILDERS and not Path(config.name).expanduser().is_dir():
            yield role, config.name
