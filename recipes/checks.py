"""What contradicts itself in a recipe: checks that need two of its sections at once, each a sentence with the setting to look at."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from distill.errors import UserError
from distill.evaluate.task import HeadTask, ProbeTask
from distill.models.kinds import AnyConfig, Demands, demands
from distill.objectives import ObjectivesConfig
from distill.train import TrainConfig
from export.targets import in_order

if TYPE_CHECKING:
    from recipes.schema import Recipe

Problem = tuple[str, str]
MAIN = "main"  # as distill/evaluate/suite.py calls the recipe's own sets; importing that would make every check slow


def problems(r: "Recipe") -> list[Problem]:
    """(dotted setting, sentence) each."""
    return [
        *_own_problems(r, ""),
        *_names(r),
        *_networks(r),
        *_shapes(r),
        *_heads(r),
        *_objectives(r),
        *_pieces(r),
        *_derived(r),
    ]


def _derived(r: "Recipe") -> Iterator[Problem]:
    """Pruned models and models trained for quantization: whom they come from, and what they ask of the rest."""
    groups: dict[str, dict[str, Any]] = {"students": r.students, "pruned": r.pruned, "qad": r.qad}
    for name in (n for n in r.subjects() if sum(n in g for g in groups.values()) > 1):
        group = next(g for g in ("qad", "pruned") if name in groups[g])
        yield f"{group}.{name}", "is the name of another model too: exports and bundles are named after it"
    for group in ("pruned", "qad"):
        for name, model in groups[group].items():
            chain = [name]
            while (of := chain[-1]) not in r.students and of in r.pruned | r.qad and len(chain) < 99:
                chain.append((r.pruned.get(of) or r.qad[of]).of)
            if model.of not in r.students and model.of not in r.pruned:
                known = ", ".join([*r.students, *(n for n in r.pruned if n != name)])
                yield f"{group}.{name}.of", f"{model.of!r} is neither a student nor a pruned model; there are: {known}"
            elif len(chain) >= 99:
                yield f"{group}.{name}.of", f"{model.of!r} comes from {name} itself"
            elif group == "pruned" and getattr(r.students[chain[-1]].backbone, "kind", "vit") != "vit":
                yield f"pruned.{name}.of", "only our own networks (kind: vit) can be pruned: their config can say any width"
    for name, trained in r.qad.items():
        if not r.targets_of(name):
            yield (
                f"qad.{name}.weights",
                f"no target of export.targets is {trained.weights}: add onnx-{trained.weights}, or nothing ships of it",
            )


def _pieces(r: "Recipe") -> Iterator[Problem]:
    """Batches that are cut: into micro-batches, and into KoLeo's groups."""
    micro = r.runtime.micro_batch
    for section, one in [*((f"teacher.{n}", t) for n, t in r.teacher.trainings().items()), ("distill", r.distill)]:
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


def _names(r: "Recipe") -> Iterator[Problem]:
    # Names become folders; this rules out paths, hidden files and what Windows cannot store.
    pattern = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
    for path, name in [("name", r.name), *((s.replace("/", ".", 1), n) for n, s in r.subjects().items())]:
        if not re.fullmatch(pattern, name):
            yield path, f"{name!r} names a folder: use letters, digits, - and _, beginning with a letter or digit"
    for name in r.evaluate.tasks:
        if not re.fullmatch(pattern, name):
            yield (
                f"evaluate.tasks.{name}",
                f"{name!r} names a task and its pages: use letters, digits, - and _, beginning with a letter or digit",
            )
        elif name == MAIN:
            yield f"evaluate.tasks.{name}", f"{MAIN!r} is what data.gallery and data.test are called: name the task otherwise"
    if not r.students:
        yield "students", "name at least one student"
    for name, student in r.students.items():
        if student.start is not None and not (Path(student.start).expanduser() / "model.json").is_file():
            yield (
                f"students.{name}.start",
                f"{student.start} holds no model (no model.json): name a folder that `decant run` wrote",
            )
    if not 0 <= r.seed < 2**31:
        yield "seed", f"must be at least 0 and below 2^31, got {r.seed}"
    exported = set(in_order(list(r.export.targets)))
    if missing := [t for t in r.bundle.targets or [] if t not in exported]:
        yield "bundle.targets", f"{missing[0]} is not among export.targets"
    yield from _bundled_heads(r)
    if r.evaluate.seed < 0:
        yield "evaluate.seed", f"must be at least 0, got {r.evaluate.seed}"
    if r.input.size not in r.resolutions():
        yield "export.resolutions", f"must contain input.size {r.input.size}: artifacts are compared with PyTorch there"


def _bundled_heads(r: "Recipe") -> Iterator[Problem]:
    """Heads that a bundle should hold, and that no evaluation of this recipe trains."""
    wanted = r.bundle.heads if isinstance(r.bundle.heads, list) else []
    able = [MAIN] if r.data.test is not None else []
    able += [name for name, task in r.evaluate.tasks.items() if isinstance(task, HeadTask | ProbeTask)]
    if unknown := [name for name in wanted if name not in able]:
        there = f"; there are {', '.join(able)}" if able else ", and none does"
        yield "bundle.heads", f"{unknown[0]} is no evaluation of this recipe that trains a head{there}"


def _networks(r: "Recipe") -> Iterator[Problem]:
    """What a network from elsewhere cannot do."""
    for path, backbone in (
        ("teacher.backbone", r.teacher.shape()),
        *((f"students.{n}.backbone", s.backbone) for n, s in r.students.items()),
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
            for section, one in r.teacher.trainings().items():
                if one.mask_input:
                    yield (
                        f"teacher.{section}.mask_input",
                        f"must be false, with objectives.ibot: 0: {name} cannot mask its input, only Vision Transformers can",
                    )


def _shapes(r: "Recipe") -> Iterator[Problem]:
    patches = {n: p for n, s in r.students.items() if (p := known_patch(s.backbone))}
    yield from _sizes(r, patches)
    theirs = known_patch(r.teacher.shape())
    others = [n for n, p in patches.items() if theirs and p != theirs]
    if others and r.distill.masks is not None:
        yield (
            f"students.{others[0]}.backbone.patch",
            f"is {patches[others[0]]}, the teacher's is {theirs}: masks are drawn on one grid, so distill.masks must be null",
        )
    if len(set(patches.values())) > 1 and (r.distill.masks is not None or r.distill.cache is not None):
        yield (
            "distill.masks" if r.distill.masks is not None else "distill.cache",
            f"must be null: the students' patches differ ({sorted(set(patches.values()))}), and it holds one grid",
        )


def _sizes(r: "Recipe", patches: dict[str, int]) -> Iterator[Problem]:
    """Every size in pixels is a multiple of the patch that it meets."""
    mine = known_patch(r.teacher.shape())
    met: list[tuple[str, int, int | None]] = []
    for patch in set(patches.values()):
        met += [
            ("input.size", r.input.size, patch),
            *(("export.resolutions", r, patch) for r in r.export.resolutions or []),
        ]
        met += _crop_sizes("distill", r.distill, patch)
    for name in ("train", "high_res"):
        if name in r.teacher.trainings():
            met += _crop_sizes(f"teacher.{name}", r.teacher.trainings()[name], mine)
    seen = r.distill.crops.global_size
    if r.distill.teacher_size is not None:
        met.append(("distill.teacher_size", r.distill.teacher_size, mine))
    elif not any(p > 0 and seen % p for p in patches.values()):  # else that is said already
        met.append(("distill.teacher_size", seen, mine))
    for path, size, side in met:
        if side and (size % side or size < side):
            yield (
                path,
                f"{size} px is not a multiple of the patch of {side} px; the nearest is {max(side, round(size / side) * side)}",
            )


def _heads(r: "Recipe") -> Iterator[Problem]:
    for name, student in r.students.items():
        for kind in ("dino_head", "ibot_head"):
            mine, theirs = getattr(student, kind), getattr(r.teacher, kind)
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


def _objectives(r: "Recipe") -> Iterator[Problem]:
    asked, training = r.distill.objectives, r.teacher.train
    if r.distill.mask_input:
        yield "distill.mask_input", "must be false: distillation shows the student whole crops (DINOv2, section 5)"
    for name, student in r.students.items():
        if student.backbone.drop_path:
            yield (
                f"students.{name}.backbone.drop_path",
                "must be 0: distillation removes stochastic depth (DINOv2, section 5)",
            )
    for name, one in r.teacher.trainings().items():
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
    if r.teacher.load is not None:
        yield from _loaded(r, asked)
    controlled = [name for name, student in r.students.items() if student.control]
    if training is None:
        return
    for name, one in r.teacher.trainings().items():
        if one.objectives.ibot and not one.mask_input and name != "fit_heads":
            yield (
                f"teacher.{name}.mask_input",
                "must be true while objectives.ibot is above 0: without masks the student only copies its own average",
            )
    if r.teacher.high_res is not None:
        yield from _high_res(r, training, r.teacher.high_res)
    for kind, head in (
        ("ibot", r.teacher.ibot_head),
        ("dino", r.teacher.dino_head if r.teacher.ibot_head else None),
    ):
        trains, teaches = (getattr(o, kind) for o in (training.objectives, asked))
        if head is not None and teaches and not trains:
            yield (
                f"distill.objectives.{kind}",
                f"must be 0 while teacher.train.objectives.{kind} is: that head was never trained",
            )
    patch = known_patch(r.teacher.shape())
    if training.objectives.ibot and training.masks is not None and patch:
        patches = (training.crops.global_size // patch) ** 2
        if int(2 * training.batch * training.masks.probability) < 1 or int(patches * training.masks.ratio[1]) < 1:
            yield "teacher.train.masks", f"mask nothing of {patches} patches, but objectives.ibot is above 0"
    if controlled and r.control_training().objectives.ibot and not r.control_training().mask_input:
        yield (
            f"students.{controlled[0]}.control",
            "needs teacher.train.masks and mask_input while distill.objectives.ibot is above 0: the control is masked like the teacher",
        )


def _high_res(r: "Recipe", before: TrainConfig, after: TrainConfig) -> Iterator[Problem]:
    """What goes on must have been there, at less resolution."""
    if after.crops.global_size <= before.crops.global_size:
        yield (
            "teacher.high_res.crops.global_size",
            f"{after.crops.global_size} px is no more than the {before.crops.global_size} px of teacher.train",
        )
    for kind in ("dino", "ibot") if r.teacher.ibot_head is not None else ():  # a shared head is trained by either
        if getattr(after.objectives, kind) and not getattr(before.objectives, kind):
            yield (
                f"teacher.high_res.objectives.{kind}",
                f"must be 0 while teacher.train.objectives.{kind} is: that head is not trained",
            )


def _loaded(r: "Recipe", asked: ObjectivesConfig) -> Iterator[Problem]:
    """What a teacher from elsewhere asks for."""
    load, fit = r.teacher.load, r.teacher.fit_heads
    assert load is not None
    if load.kind in ("timm", "transformers") and load.heads is None and fit is None and asked.needs_heads():
        yield (
            "teacher.load",
            f"{load.kind} models come without heads, which objectives dino and ibot need: either set distill.objectives to "
            "{dino: 0, ibot: 0, match: {}} (feature matching), or give teacher.fit_heads a training",
        )
    if fit is not None:
        for kind in ("dino", "ibot"):
            shared = kind == "ibot" and r.teacher.ibot_head is None
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
