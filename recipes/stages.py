"""The plan of a run: the main path from images to bundle, readable top to bottom. What a stage does is in `work.py`
and `shipping.py`."""

from functools import partial
from pathlib import Path

from distill.errors import UserError
from distill.files import sha256_file, sha256_json
from distill.models.foreign import LoadConfig, files_of
from export.reporting import device_report
from export.targets import SPECS, Target, prerequisites
from recipes import shipping, work
from recipes.data import Data
from recipes.marks import Stage
from recipes.schema import Recipe


def plan(recipe: Recipe, run: Path) -> list[Stage]:
    """The stages of a recipe, each after those whose folders it reads. Nothing is done yet, but data are opened and fingerprinted."""
    data = Data(recipe.data, recipe.evaluate.tasks)
    r = recipe
    settings = {"seed": r.seed, "normalize": r.input.normalize}
    train = {"train": data.fingerprint("train")}
    stages = _teacher(r, data, run, settings, train)
    teacher = stages[-1].name
    stages.append(
        Stage(
            name="distill",
            folder=Path("students"),
            config=settings | {"students": _students(r), "distill": r.distill.model_dump(), "input": r.input.model_dump()},
            inputs=(teacher,),
            data=train | _starts(r, run),
            work=work.distill(r, data, run),
            together=True,
        )
    )
    stages += _controls(r, data, settings, train)
    stages += _derived(r, data, run, settings, train, teacher)
    exports = [stage for name in r.subjects() for stage in _exports(r, data, run, name)]
    models = tuple(s.name for s in stages)
    judged = (*models, *(s.name for s in exports))
    stages += exports
    stages += [
        Stage(
            name="parity",
            folder=Path("parity"),
            config={"gates": r.export.gates.model_dump(), "resolutions": r.resolutions()},
            inputs=(*_shipped(r), *(s.name for s in exports)),
            data=data.fingerprints("test", "train"),
            work=shipping.parity(r, data, run),
        ),
        Stage(
            name="evaluate",
            folder=Path("evaluate"),
            config={"evaluate": r.evaluate.model_dump(), "seed": r.seed, "input": r.input.model_dump()},
            inputs=judged,
            data=(data.fingerprints("gallery", "test") if r.data.test is not None else {}) | data.task_fingerprints(),
            work=shipping.evaluate(r, data, run),
            schema=2,
        ),
        Stage(
            name="benchmark",
            folder=Path("benchmark"),
            config={"benchmark": r.benchmark.model_dump()},
            inputs=judged,
            work=shipping.benchmark(r, run),
        ),
    ]
    stages.append(
        Stage(
            name="report",
            folder=Path("report"),
            config={"report": r.report.model_dump(), "recipe": sha256_json(r.model_dump(mode="json", exclude={"runtime"}))},
            inputs=tuple(s.name for s in stages),
            data=data.fingerprints("test") | device_report.fingerprints(run),
            work=shipping.report(r, data, run, [s.name for s in stages]),
        )
    )
    stages.append(
        Stage(
            name="bundle",
            folder=Path("bundles"),
            config={
                "bundle": r.bundle.model_dump(exclude={"sign_key"}),
                "licence": None if r.teacher.load is None else r.teacher.load.licence,
            },
            inputs=(teacher, *_shipped(r), "evaluate", "report", *(s.name for s in exports)),
            data=data.fingerprints("test", "train") | _signer(r),
            work=shipping.bundles(r, data, run),
            schema=2,
            needs_gates=True,
        )
    )
    return stages


def _signer(r: Recipe) -> dict[str, str]:
    """Which key signs, wherever its file lies."""
    key = r.bundle.key()
    return {} if key is None else {"sign_key": key.public.key_id}


def _teacher(r: Recipe, data: Data, run: Path, settings: dict, train: dict) -> list[Stage]:
    """How the teacher comes to be: trained here, and again at high resolution if asked, or loaded, and given heads if it has none. The last
    of these stages writes `teacher/`.
    """
    t, last = r.teacher, Path("teacher")
    own = settings | {"input": r.input.model_dump()}
    whole = t.model_dump(exclude={"high_res", "fit_heads"})
    if t.load is not None:
        if t.load.path is not None and Path(t.load.path).expanduser().resolve().is_relative_to(run.resolve()):
            raise UserError(
                f"teacher.load.path {t.load.path} lies in this very run's folder, whose teacher it would replace. Name another folder for "
                "this run with --out (or another name)."
            )
        first = last if t.fit_heads is None else Path("loaded")
        sizes = {"size": r.distill.teacher_size or r.input.size, "input": r.input.model_dump()}
        config = sizes | {"load": t.load.model_dump(exclude={"licence"})}  # a word about the weights, which moves none
        stages = [Stage(name="load", folder=first, config=config, data=_files(t.load), work=work.load(r))]
    else:
        first = last if t.high_res is None else Path("pretrained")
        doing = work.pretrain(r, data)
        stages = [Stage(name="pretrain", folder=first, config=own | {"teacher": whole}, data=train, work=doing, together=True)]
    if t.high_res is not None:
        config, doing = own | {"train": t.high_res.model_dump()}, work.high_res(r, data, run, first)
        stages.append(Stage("high_res", last, config, inputs=("pretrain",), data=train, work=doing, together=True))
    if t.fit_heads is not None:
        heads = {"dino_head": t.dino_head.model_dump(), "ibot_head": t.ibot_head and t.ibot_head.model_dump()}
        config, doing = settings | heads | {"train": r.fit_training().model_dump()}, work.fit_heads(r, data, run, first)
        stages.append(Stage("fit_heads", last, config, inputs=("load",), data=train, work=doing, together=True))
    return stages


def _files(load: LoadConfig) -> dict[str, str]:
    """What a loaded teacher's files are: their hashes, where they are there."""
    found = {p: files_of(load.kind, Path(p).expanduser()) for p in (load.path, load.heads) if p is not None}
    return {p: sha256_json({f.name: sha256_file(f) for f in files}) if files else "missing" for p, files in found.items()}


def _controls(r: Recipe, data: Data, settings: dict, train: dict) -> list[Stage]:
    """Students trained without the teacher, where they ask to be compared with that."""
    own = settings | {"train": r.control_training().model_dump(), "input": r.input.model_dump()}
    return [
        Stage(
            name=f"control/{name}",
            folder=Path("control") / name,
            config=own | {"student": _students(r)[name]},
            data=train,
            work=work.control(r, data, name),
            together=True,
        )
        for name, student in r.students.items()
        if student.control
    ]


def _exports(r: Recipe, data: Data, run: Path, student: str) -> list[Stage]:
    """One stage a target, prerequisites first; a target that this machine cannot build is optional: its rows say why."""
    settings = r.export.model_dump(exclude={"targets", "gates"})
    return [
        Stage(
            name=f"export/{student}/{target}",
            folder=Path("export") / student / target,
            config={"target": target, "export": settings, "resolutions": r.resolutions(), "input": r.input.model_dump()},
            inputs=(_stage_of(r, student), *(f"export/{student}/{t}" for t in prerequisites(target))),
            data=_export_data(r, data, target),
            work=shipping.export(r, data, run, student, target),
            schema=SPECS[target].schema,
            optional=not SPECS[target].always,
            rows_if_skipped=partial(shipping.unmeasured, r.subjects()[student], target),
        )
        for target in r.targets_of(student)
    ]


def _export_data(r: Recipe, data: Data, target: Target) -> dict[str, str]:
    """Calibration reads training images; a search for a budget in points of accuracy reads the labelled gallery too."""
    budget = r.export.quantize.budget
    labelled = SPECS[target].searches and budget is not None and budget.asks_accuracy()
    return data.fingerprints("train", "gallery") if labelled else data.fingerprints("train")


def _derived(r: Recipe, data: Data, run: Path, settings: dict, train: dict, teacher: str) -> list[Stage]:
    """Pruned models, their controls, and models trained for quantization, each after the one that it comes from."""
    if not (r.pruned or r.qad):
        return []
    from recipes import compress  # half a second of imports that most recipes do without

    own = settings | {"distill": r.distill.model_dump(), "input": r.input.model_dump()}
    stages = []
    for name in in_line(r):
        model = r.pruned[name] if name in r.pruned else r.qad[name]
        subject, before = r.subjects()[name], _stage_of(r, model.of)
        config = own | {"model": model.model_dump(exclude={"control"})}
        if name in r.qad:
            config |= {"quantize": r.export.quantize.model_dump(exclude={"budget"})}
        work_of = compress.pruned if name in r.pruned else compress.qad
        stages.append(
            Stage(subject, Path(subject), config, work_of(r, data, run, name), (teacher, before), data=train, together=True)
        )
        if name in r.pruned and r.pruned[name].control:
            folder, doing = Path("control") / name, compress.pruned_control(r, data, run, name)
            seen = own | {"images": r.seen_images(name)}
            stages.append(Stage(str(folder), folder, seen, doing, (teacher, subject), data=train, together=True))
    return stages


def in_line(r: Recipe) -> list[str]:
    """Names of derived models, each after the one that it comes from."""
    found: list[str] = []
    waiting = [*r.pruned, *r.qad]
    while waiting:
        ready = [n for n in waiting if (r.pruned.get(n) or r.qad[n]).of not in waiting]
        found += ready
        waiting = [n for n in waiting if n not in ready]
    return found


def _stage_of(r: Recipe, name: str) -> str:
    """The stage that trains a model: all students are one stage's work."""
    return "distill" if name in r.students else r.subjects()[name]


def _shipped(r: Recipe) -> list[str]:
    """The stages that train what ships."""
    return list(dict.fromkeys(_stage_of(r, name) for name in r.subjects()))


def _students(r: Recipe) -> dict:
    """Each student with its heads resolved, without the wish for a control, which does not change it, and without where it starts from,
    whose content counts and not its place."""
    found = {}
    for name, student in r.students.items():
        dino, ibot = r.heads_of(name)
        heads = {"dino_head": dino.model_dump(), "ibot_head": ibot and ibot.model_dump()}
        found[name] = student.model_dump(exclude={"control", "start"}) | heads
    return found


def _starts(r: Recipe, run: Path) -> dict[str, str]:
    """What the models that students go on from are: hashes of their files."""
    found = {}
    for name, student in r.students.items():
        if student.start is None:
            continue
        folder = Path(student.start).expanduser()
        if folder.resolve().is_relative_to(run.resolve()):
            raise UserError(
                f"students.{name}.start {student.start} lies in this very run's folder, which trains anew. Name another folder for this "
                "run with --out (or another name)."
            )
        files = [folder / "model.json", folder / "backbone.safetensors"]
        found[f"students.{name}.start"] = sha256_json([sha256_file(f) if f.is_file() else "missing" for f in files])
    return found
