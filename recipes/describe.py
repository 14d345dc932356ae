"""What `decant check` prints: the models with their sizes, the cost of each training, and which stages would run, and why. Does nothing."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from distill.errors import DecantError
from distill.memory import Memory, Shape, chosen_patches, estimate
from distill.models.backbone import BackboneConfig
from distill.models.checkpoints import model_info
from distill.models.foreign import files_of
from distill.models.heads import HeadConfig
from distill.models.kinds import AnyConfig, backbone_flops, backbone_measures, backbone_parameters, read_config
from distill.models.match_head import match_head_parameters
from distill.objectives import ObjectivesConfig
from distill.targets_cache import estimate_bytes
from distill.train import TrainConfig
from recipes.schema import Recipe

# Hours are a formula, so what they assume is said beside them.
PEAK, SHARE = 989e12, 0.4
ASSUMED = "hours: at 40 % of 989 TFLOP/s, the dense bf16 peak of an H100; a formula, not a measurement"
CUT = "\nmodels that are pruned, or made from one, are counted as before the cut: how it falls is known only then"


class Training(NamedTuple):
    """One training of a recipe; `teacher` None where the student's average teaches, `unknown` where a file must be read first."""

    stage: str
    config: TrainConfig
    teacher: Shape | None
    students: list[Shape]
    unknown: bool = False


def describe(recipe: Recipe, run: Path, processes: int = 1) -> RenderableType:
    """The plan as tables. Data that are not there are named, and leave open which stages are done.

    Args:
        processes: devices that train together; with several, memory is said with parameters copied to each and sharded over all.
    """
    teacher = teacher_shape(recipe, run)
    found = trainings(recipe, teacher)
    assumed = ASSUMED + (CUT if recipe.pruned else "")
    costs = (_trainings(found, recipe), Text(assumed, style="dim"), Text(), *_memory(found, recipe, processes), *_caches(found))
    return Group(_models(recipe, teacher), Text(), *costs, Text(), *_tasks(recipe), *_stages(recipe, run))


def teacher_shape(r: Recipe, run: Path) -> Shape | None:
    """The teacher as it is at distillation; None while a file that says so was not loaded yet."""
    backbone = r.teacher.shape()
    heads = (r.teacher.dino_head, r.teacher.ibot_head)
    if backbone is not None:
        return Shape(backbone, *heads)
    for folder in (run / "teacher", run / "loaded"):
        if (folder / "model.json").is_file():
            info = model_info(folder)
            kept = {n: HeadConfig(**c) for n, c in info["heads"].items()}
            own = heads if r.teacher.fit_heads is not None else (kept.get("dino"), kept.get("ibot"))
            return Shape(read_config(info["backbone"]), *own)
    return None


def trainings(r: Recipe, teacher: Shape | None) -> list[Training]:
    """Every training of a recipe in order, with the shapes of what takes part."""
    found = []
    for name, config in r.teacher.trainings().items():
        stage = {"train": "pretrain"}.get(name, name)
        fits = name == "fit_heads"
        config = r.fit_training() if fits else config
        shape = None if teacher is None else _for(config.objectives, teacher.backbone, (teacher.dino, teacher.ibot), 0, fits)
        found.append(Training(stage, config, None, [] if shape is None else [shape], shape is None))
    asked, width = r.distill.objectives, 0 if teacher is None else backbone_measures(teacher.backbone)[0]
    students = [_for(asked, s.backbone, r.heads_of(n), width) for n, s in r.students.items()]
    guide = (
        None
        if teacher is None
        else _for(asked.model_copy(update={"match": None}), teacher.backbone, (teacher.dino, teacher.ibot))
    )
    found.append(Training("distill", r.distill, guide, students, guide is None))
    for name, student in r.students.items():
        if student.control:
            config = r.control_training()
            found.append(
                Training(f"control/{name}", config, None, [_for(config.objectives, student.backbone, r.heads_of(name))])
            )
    recoveries = {n: p.recovery for n, p in r.pruned.items()} | {n: q.train for n, q in r.qad.items()}
    for name, recovery in recoveries.items():
        if recovery is None:
            continue
        # Widths are known once it is cut: the network that it comes from is the most that it can be.
        shape = students[list(r.students).index(r.student_of(name))]
        found.append(Training(r.subjects()[name], recovery.training(r.distill), guide, [shape], guide is None))
        if name in r.controls():
            config = r.distill.model_copy(update={"images": r.seen_images(name), "cache": None})
            found.append(Training(f"control/{name}", config, guide, [shape], guide is None))
    return found


def _for(
    asked: ObjectivesConfig,
    backbone: AnyConfig,
    heads: tuple[HeadConfig | None, HeadConfig | None],
    width: int = 0,
    frozen: bool = False,
) -> Shape:
    """A model with the heads that the objectives need, as `work.fresh_model` makes it."""
    dino, ibot = heads
    shared = asked.ibot and ibot is None
    match = 0
    if asked.match is not None and width:
        parts = (asked.match.cls > 0) + (asked.match.patches > 0)
        match = match_head_parameters(backbone_measures(backbone)[0], width, asked.match.hidden, parts)
    return Shape(backbone, dino if asked.dino or shared else None, ibot if asked.ibot else None, match, frozen)


def _models(r: Recipe, teacher: Shape | None) -> Table:
    table = Table(title=f"Models of {r.name} at {r.input.size} px", title_justify="left")
    for name in ("model", "shape", "parameters", "heads", "GFLOPs/image"):
        table.add_column(name, justify="left" if name in ("model", "shape") else "right")
    if teacher is None:
        table.add_row("teacher", "known once it is loaded", "", "", "")
    rows = [] if teacher is None else [("teacher", teacher)]
    headed = r.distill.objectives.needs_heads() or any(s.control for s in r.students.values())
    rows += [(f"students/{n}", Shape(s.backbone, *(r.heads_of(n) if headed else ()))) for n, s in r.students.items()]
    for name, shape in rows:
        table.add_row(
            name,
            named(shape.backbone),
            f"{backbone_parameters(shape.backbone, mask_token=False):,}",
            f"{shape.head_parameters() / 1e6:.2f} M" if shape.head_parameters() else "none",
            f"{backbone_flops(shape.backbone, r.input.size) / 1e9:.3g}",
        )
    return table


def named(config: AnyConfig) -> str:
    if not isinstance(config, BackboneConfig):
        dim, patch, _ = backbone_measures(config)
        return f"{config.name}: {dim} wide, patch {patch}"
    dim, depth, heads, ffn = config.shape()
    return f"{config.arch}/{config.patch}: {dim} wide, {depth} blocks, {heads} heads, {ffn}"


def _trainings(found: list[Training], r: Recipe) -> Table:
    table = Table(title="Trainings", title_justify="left")
    for name in ("stage", "images", "steps", "batch", "crops", "PFLOPs", "H100 h"):
        words = name == "crops"  # may break; a number or a name in two lines is misread
        table.add_column(name, justify="left" if name == "stage" else "right", overflow="fold", no_wrap=not words)
    for t in found:
        crops = t.config.crops
        flops = 0.0 if t.unknown else run_flops(t, r.runtime.recompute_blocks)
        table.add_row(
            t.stage,
            f"{t.config.images:,}",
            f"{t.config.steps():,}",
            str(t.config.batch),
            f"2 × {crops.global_size} + {crops.local_count} × {crops.local_size} px",
            "open" if t.unknown else rounded(flops / 1e15),
            "open" if t.unknown else rounded(gpu_hours(flops), 2),
        )
    return table


def rounded(x: float, digits: int = 3) -> str:
    """With so many significant digits, never as a power of ten."""
    x = float(f"{x:.{digits}g}")
    return f"{x:,.0f}" if x >= 10 ** (digits - 1) else f"{x:.{digits}g}"


def gpu_hours(flops: float) -> float:
    return flops / (SHARE * PEAK) / 3600


def run_flops(t: Training, recompute: bool = False) -> float:
    """Floating-point operations of a whole training. Targets that come from a cache cost their teacher once."""
    images = t.config.steps() * t.config.batch
    cache = t.config.cache
    taught = images if cache is None or cache.replay is None else min(images, cache.replay)
    return taught * teacher_flops(t) + images * sum(
        student_flops(t.config, s, recompute, t.teacher is None) for s in t.students
    )


def teacher_flops(t: Training) -> float:
    """Of one image: the forward pass over its two global crops, the heads on their CLS and on the patches that iBOT asks."""
    model = t.students[0] if t.teacher is None else t.teacher
    size = t.config.teacher_size or t.config.crops.global_size
    patches = chosen_patches(t.config, t.students[0], 1)
    return 2.0 * backbone_flops(model.backbone, size) + head_flops(t.config, model, 2, patches)


def student_flops(training: TrainConfig, s: Shape, recompute: bool = False, alone: bool = True) -> float:
    """Of one image: forward and backward, three forwards (with recomputed blocks four); stochastic depth leaves its share of blocks out.

    Args:
        alone: without a frozen teacher; a frozen backbone then has its global crops' features from there.
    """
    crops, asked = training.crops, training.objectives
    local = crops.local_count * backbone_flops(s.backbone, crops.local_size) if crops.local_count and asked.dino else 0
    whole = 2 * backbone_flops(s.backbone, crops.global_size)
    heads = 3 * head_flops(training, s, 2 + (crops.local_count if asked.dino else 0), chosen_patches(training, s, 1))
    if s.backbone_frozen:
        return local + (0 if alone else whole) + heads
    dropped = s.backbone.drop_path if isinstance(s.backbone, BackboneConfig) else 0.0
    return (4 if recompute else 3) * (1 - dropped) * (local + whole) + heads


def head_flops(training: TrainConfig, s: Shape, cls_rows: float, patch_rows: float) -> float:
    """A forward pass of the heads and projectors: layers and the product with the prototypes, 2 operations a weight and row."""
    dim = backbone_measures(s.backbone)[0]
    total = 0.0
    for head, on, rows in ((s.dino, training.objectives.dino, cls_rows), (s.patch_head, training.objectives.ibot, patch_rows)):
        if head is not None and on:
            widths = [dim] + [head.hidden] * (head.layers - 1) + [head.bottleneck, head.prototypes]
            total += 2 * rows * sum(a * b for a, b in pairwise(widths))
    if s.match and (match := training.objectives.match) is not None:  # projectors see the global crops alone
        patches = 2 * (training.crops.global_size // backbone_measures(s.backbone)[1]) ** 2
        parts = (match.cls > 0) + (match.patches > 0)
        total += 2 * s.match / parts * (2 * (match.cls > 0) + patches * (match.patches > 0))
    return total


def _memory(found: list[Training], r: Recipe, processes: int) -> Iterator[RenderableType]:
    """Bytes on each device by what they are for: tables as wide as a terminal."""
    of = "one device" if processes == 1 else f"each of {processes} devices"
    ways = [("", r.runtime)]
    if processes > 1:
        ways = [(way, r.runtime.model_copy(update={"shard": way == "sharded"})) for way in ("copied", "sharded")]
    columns = [
        (f"{t.stage}\n{way}".strip(), estimate(t.config, t.teacher, t.students, processes, runtime))
        for t in found
        if not t.unknown
        for way, runtime in ways
    ]
    for start in range(0, len(columns), MEMORY_COLUMNS):
        some = columns[start : start + MEMORY_COLUMNS]
        table = Table(title=None if start else f"Memory on {of}, about (GiB)", title_justify="left")
        table.add_column("what")
        for name, _ in some:
            table.add_column(name, justify="right")
        for name, part in PARTS.items():
            table.add_row(name, *(_gib(part(m)) for _, m in some), end_section=name == "images")
        yield table
    if unknown := [t.stage for t in found if t.unknown]:
        yield Text(f"Memory on {of} is open until what they start from is made or loaded: {', '.join(unknown)}")


def _caches(found: list[Training]) -> Iterator[RenderableType]:
    """What cached targets will take on disk."""
    for t in found:
        if t.config.cache is None or t.teacher is None or t.teacher.dino is None or t.teacher.patch_head is None:
            continue
        images, patches = t.config.steps() * t.config.batch, chosen_patches(t.config, t.students[0], 1)
        size = estimate_bytes(t.config.cache, images, patches, t.teacher.dino, t.teacher.patch_head)
        yield Text(f"Cached targets of {t.stage}: about {_gib(size)} GiB of disk, under targets/ of the run")


def _gib(size: float) -> str:
    return rounded(size / 2**30, 2) if size >= 2**20 else "0"


MEMORY_COLUMNS = 4  # beside their names, on 80 characters
PARTS: dict[str, Callable[[Memory], float]] = {
    "weights": lambda m: m.weights,
    "averages": lambda m: m.averages,
    "gradients": lambda m: m.gradients,
    "Adam": lambda m: m.adam,
    "frozen teacher": lambda m: m.teacher,
    "copies of weights": lambda m: m.casts,
    "activations": lambda m: m.activations,
    "targets and logits": lambda m: m.targets,
    "images": lambda m: m.images,
    "in all": lambda m: m.total(),
}


def _tasks(r: Recipe) -> Iterator[RenderableType]:
    """The further evaluations, where there are any."""
    if not r.evaluate.tasks:
        return
    table = Table(title="Tasks of frozen features", title_justify="left")
    for column in ("task", "kind", "data"):
        table.add_column(column)
    for name, task in r.evaluate.tasks.items():
        data = (f"{role}: {_where(value)}" for role, value in task.sources().items())
        table.add_row(name, task.kind, ", ".join(data))
    yield table
    yield Text()


def _where(value: Any) -> str:
    """A source as a recipe names it, in short."""
    if isinstance(value, str):
        return value
    settings = value.model_dump(exclude_defaults=True)
    return str(settings.get("path") or settings.get("name") or getattr(value, "kind", ""))


def _stages(r: Recipe, run: Path) -> Iterator[RenderableType]:
    from recipes.decide import decide
    from recipes.stages import plan

    if remote := [f"{path} ({name})" for path, name in _not_here(r)]:
        yield Text(f"Which stages would run is open: {' and '.join(remote)} would have to be fetched first.", style="yellow")
        return
    load = r.teacher.load
    for path in () if load is None else (p for p in (load.path, load.heads) if p is not None):
        if not files_of(load.kind, Path(path).expanduser()):  # type: ignore[union-attr]
            yield Text(f"The teacher cannot be loaded: there is no {load.kind} model at {path}.", style="yellow")  # type: ignore[union-attr]
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
    """(setting, name) of the data sets that are names on a hub: a check opens nothing that may be downloaded."""
    from distill.data.hub import BUILDERS
    from distill.data.sources import DatasetsConfig, source_from

    named = [(f"data.{role}", value) for role in ("train", "gallery", "test") if (value := getattr(r.data, role)) is not None]
    for name, task in r.evaluate.tasks.items():
        named += [(f"evaluate.tasks.{name}.{role}", value) for role, value in task.sources().items()]
    for path, value in named:
        config = source_from(value)
        if isinstance(config, DatasetsConfig) and config.name not in BUILDERS and not Path(config.name).expanduser().is_dir():
            yield path, config.name
