"""The recipe's cross-checks: each fires where it should, with the path of the setting to change, and nowhere else."""

import copy
import json
from typing import Any

import pytest

from distill.data.preprocess import Preprocess
from distill.models.backbone import Backbone, parameter_count
from recipes.loading import load_recipe, shipped_names
from recipes.schema import InputConfig, Recipe

SHAPE = {"patch": 8, "image_size": 48, "dim": 32, "depth": 2, "heads": 2, "layer_scale": 1.0, "init": "fan_in"}
HEAD = {"prototypes": 16, "hidden": 32, "bottleneck": 16, "init": "fan_in"}
CROPS = {"global_size": 48, "local_size": 24, "local_count": 2}
BASE: dict[str, Any] = {
    "name": "test-1",
    "data": {"train": {"kind": "scenes", "count": 100}, "test": {"kind": "scenes", "count": 50, "split": "test"}},
    "input": {"size": 48, "normalize": "per_image"},
    "teacher": {
        "backbone": SHAPE,
        "dino_head": HEAD,
        "ibot_head": HEAD,
        "train": {"images": 640, "crops": CROPS, "masks": {}, "mask_input": True},
    },
    "students": {"small": {"backbone": SHAPE, "control": True}},
    "distill": {"images": 640, "crops": CROPS},
    "export": {"targets": ["onnx-fp32"], "resolutions": [48, 96]},
}


def recipe(**changes: Any) -> Recipe:
    """BASE with settings at dotted paths (`__` for the dot) replaced."""
    value = copy.deepcopy(BASE)
    for path, new in changes.items():
        *sections, name = path.split("__")
        here = value
        for section in sections:
            here = here.setdefault(section, {})
        here[name] = new
    return Recipe.model_validate_json(json.dumps(value))


def test_a_good_recipe_has_no_problems():
    assert recipe().problems() == []


SECOND = {"backbone": SHAPE | {"dim": 64}, "dino_head": HEAD | {"hidden": 64, "bottleneck": 8}}
GOOD: list[dict[str, Any]] = [
    {"students__second": SECOND},
    {"teacher__ibot_head": None},
    {"teacher__train__crops": CROPS | {"local_count": 0, "local_size": 13}},
    {"export": {}},
    {"distill__masks": {"probability": 1.0}},
    {"teacher__train__objectives": {"ibot": 0.0}, "teacher__train__mask_input": False, "distill__objectives": {"ibot": 0.0}},
    {"teacher__backbone": SHAPE | {"drop_path": 0.4}},
    {"teacher__backbone": SHAPE | {"image_size": 64}},
    {"students__small__backbone": SHAPE | {"arch": "vit_giant", "heads": 4}},
    {"input__size": 56, "input__resize": 64, "export__resolutions": [56]},
    {"data__test": None},
    {"name": "A9_x-y"},
    {
        "evaluate": {
            "tasks": {"fine-1": {"kind": "classification", "train": "a", "test": "b"}},
            "logistic": True,
            "few_shot": [1],
        }
    },
]


@pytest.mark.parametrize("changes", GOOD, ids=str)
def test_what_is_allowed(changes):
    assert recipe(**changes).problems() == []


BAD: list[tuple[dict[str, Any], dict[str, str]]] = [
    # names become folders
    ({"name": "../up"}, {"name": "names a folder"}),
    ({"name": ""}, {"name": "names a folder"}),
    ({"name": ".hidden"}, {"name": "names a folder"}),
    ({"name": "x" * 65}, {"name": "names a folder"}),
    ({"students": {}}, {"students": "at least one"}),
    ({"students": {"a/b": {"backbone": SHAPE}}}, {"students.a/b": "names a folder"}),
    # patches and sizes
    (
        {"students__small__backbone": SHAPE | {"patch": 4}, "distill__masks": {}},
        {"students.small.backbone.patch": "the teacher's is 8"},
    ),
    ({"input__size": 50, "export": {}}, {"input.size": "50 px is not a multiple of the patch of 8 px; the nearest is 48"}),
    ({"export__resolutions": [96]}, {"export.resolutions": "must contain input.size 48"}),
    ({"export__resolutions": [48, 100]}, {"export.resolutions": "the nearest is 96"}),
    ({"teacher__train__crops": CROPS | {"global_size": 47}}, {"teacher.train.crops.global_size": "the nearest is 48"}),
    ({"teacher__train__crops": CROPS | {"local_size": 4}}, {"teacher.train.crops.local_size": "the nearest is 8"}),
    ({"distill__crops": CROPS | {"global_size": 30}}, {"distill.crops.global_size": "the nearest is 32"}),
    ({"distill__crops": CROPS | {"local_size": 25}}, {"distill.crops.local_size": "the nearest is 24"}),
    # heads
    (
        {"students__small__dino_head": HEAD | {"prototypes": 32}},
        {"students.small.dino_head.prototypes": "is 32, the teacher's is 16"},
    ),
    (
        {"students__small__ibot_head": HEAD | {"prototypes": 32}},
        {"students.small.ibot_head.prototypes": "is 32, the teacher's is 16"},
    ),
    ({"teacher__ibot_head": None, "students__small__ibot_head": HEAD}, {"students.small.ibot_head": "shares one head"}),
    # objectives
    ({"distill__mask_input": True, "distill__masks": {}}, {"distill.mask_input": "must be false"}),
    ({"students__small__backbone": SHAPE | {"drop_path": 0.1}}, {"students.small.backbone.drop_path": "must be 0"}),
    (
        {"teacher__train__mask_input": False, "students": {"small": {"backbone": SHAPE}}},
        {"teacher.train.mask_input": "must be true while objectives.ibot"},
    ),
    (
        {"teacher__train__mask_input": False, "teacher__train__objectives": {"ibot": 0.0}},
        {
            "distill.objectives.ibot": "must be 0 while teacher.train.objectives.ibot is",
            "students.small.control": "needs teacher.train.masks and mask_input",
        },
    ),
    (
        {"evaluate": {"tasks": {n: {"kind": "classification", "train": "a", "test": "b"} for n in ("a/b", "main")}}},
        {"evaluate.tasks.a/b": "names a task", "evaluate.tasks.main": "name the task otherwise"},
    ),
    (
        {"evaluate": {"tasks": {"fine": {"kind": "classification", "train": "a", "test": "b", "ks": []}}}},
        {"evaluate.tasks.fine.ks": "one or more"},
    ),
    ({"seed": -1}, {"seed": "at least 0"}),
    ({"seed": 2**31}, {"seed": "below 2^31"}),
    ({"evaluate": {"seed": -1}}, {"evaluate.seed": "at least 0"}),
    ({"bundle": {"targets": ["onnx-int8"]}}, {"bundle.targets": "not among export.targets"}),
    ({"bundle": {"heads": ["typo"]}}, {"bundle.heads": "typo is no evaluation of this recipe that trains a head"}),
    # what each section says of itself, at the setting that the sentence begins with
    ({"teacher__backbone": SHAPE | {"heads": 5}}, {"teacher.backbone.dim": "not divisible by heads 5"}),
    ({"students__small__backbone": SHAPE | {"image_size": 50}}, {"students.small.backbone.image_size": "not a multiple"}),
    ({"teacher__train__images": 10}, {"teacher.train.images": "less than one batch"}),
    ({"distill__batch": 1}, {"distill.batch": "at least 2"}),
    ({"distill__optim": {"warmup": 2.0}}, {"distill.optim.warmup": "share of the run"}),
    ({"teacher__train__masks": {"probability": 3.0}}, {"teacher.train.masks.probability": "between 0 and 1"}),
    ({"teacher__train__objectives": {"student_temperature": 0.0}}, {"teacher.train.objectives": "temperatures"}),
    ({"distill__crops": CROPS | {"blur": [2.0, 0.0, 0.0]}}, {"distill.crops.blur": "probabilities"}),
    ({"data__test": {"kind": "scenes", "count": 0}}, {"data.test.count": "at least 1"}),
    ({"data__train": {"kind": "scenes", "size": 8}}, {"data.train.size": "at least 16"}),
    ({"input__resize": 40}, {"input.resize": "smaller than size"}),
    ({"export__targets": []}, {"export.targets": "at least one"}),
    ({"runtime": {"threads": 0}}, {"runtime.threads": "at least 1"}),
    ({"evaluate": {"ks": []}}, {"evaluate.ks": "one or more"}),
    ({"benchmark": {"batches": [0]}}, {"benchmark.batches": "at least 1"}),
    ({"bundle": {"golden_images": 0}}, {"bundle.golden_images": "1..64"}),
    ({"bundle": {"sign_key": "/none.pem"}}, {"bundle.sign_key": "There is no key file /none.pem"}),
]


@pytest.mark.parametrize(("changes", "wanted"), BAD, ids=[f"{n}-{next(iter(w))}" for n, (_, w) in enumerate(BAD)])
def test_each_check_fires_alone_and_names_the_setting(changes, wanted):
    found = recipe(**changes).problems()
    assert [path for path, _ in found] == list(wanted)
    for path, sentence in found:
        assert wanted[path] in sentence
        assert "\n" not in sentence


def test_all_problems_at_once():
    changes = {k: v for c, _ in BAD for k, v in c.items() if k in ("name", "distill__batch", "runtime")}
    changes["input__size"] = 50
    found = recipe(**changes, teacher__backbone=SHAPE | {"patch": 0}).problems()
    assert {path for path, _ in found} >= {"name", "distill.batch", "runtime.threads"}
    found = recipe(**changes).problems()
    assert {path for path, _ in found} == {"name", "input.size", "export.resolutions", "distill.batch", "runtime.threads"}


@pytest.mark.parametrize("patch", [0, -8])
def test_an_impossible_patch_is_a_problem_and_no_crash(patch):
    found = recipe(teacher__backbone=SHAPE | {"patch": patch}).problems()
    assert tuple(p for p, _ in found) == ("teacher.backbone.patch",)


@pytest.mark.parametrize("term", ["ibot", "dino"])
def test_an_untrained_head_cannot_teach(term):
    """The teacher's head for a term that pretraining left out is as it was initialised."""
    weights = {"objectives": {term: 0.0}, "mask_input": term == "dino"}
    found = recipe(teacher__train=BASE["teacher"]["train"] | weights).problems()
    assert any(path.startswith("distill.objectives") for path, _ in found)


@pytest.mark.parametrize("masks", [{"probability": 0.0}, {"ratio": [0.0, 0.0]}, {"ratio": [0.0, 0.02]}], ids=str)
def test_ibot_needs_something_to_mask(masks):
    assert recipe(teacher__train__masks=masks).problems()


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_recipes_have_no_problems(name):
    made, text = load_recipe(name, [], Recipe)
    assert made.problems() == []
    assert made.name == name
    assert "teacher:" in text


def test_the_papers_recipe_names_the_published_sizes():
    made, _ = load_recipe("vitg14", [], Recipe)
    millions = {n: parameter_count(s.backbone, mask_token=False) / 1e6 for n, s in made.students.items()}
    millions["teacher"] = parameter_count(made.teacher.backbone, mask_token=False) / 1e6
    published = {"small": 22.06, "base": 86.58, "large": 304.37, "teacher": 1136.48}
    assert millions == {n: pytest.approx(m, abs=0.01) for n, m in published.items()}
    assert made.teacher.train.steps() == made.distill.steps() == 625_000


def test_heads_of_a_student():
    made = recipe(students__second=SECOND, students__small__ibot_head=HEAD | {"hidden": 64})
    assert made.heads_of("small")[0] == made.teacher.dino_head
    assert made.heads_of("small")[1] == made.students["small"].ibot_head
    assert made.heads_of("second") == (made.students["second"].dino_head, made.teacher.ibot_head)
    assert recipe(teacher__ibot_head=None).heads_of("small")[1] is None


def test_a_control_is_trained_as_its_student_but_masked():
    made = recipe(distill__objectives={"ibot": 0.3})
    control = made.control_training()
    assert control.masks == made.teacher.train.masks
    assert control.mask_input
    kept = {"masks", "mask_input"}
    assert control.model_dump(exclude=kept) == made.distill.model_dump(exclude=kept)


def test_resolutions():
    assert recipe().resolutions() == [48, 96]
    assert recipe(export={}).resolutions() == [48]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"size": 224}, 256),
        ({"size": 518}, 592),
        ({"size": 224, "resize": 224}, 224),
        ({"size": 48}, 48),
        ({"size": 128}, 146),
        ({"size": 100, "resize": 120}, 120),
    ],
)
def test_preprocessing(given, wanted):
    made = InputConfig(**given, interpolation="lanczos", normalize="none").preprocess()
    assert made == Preprocess(given["size"], wanted, "lanczos", "none")


def test_a_shape_that_passes_builds():
    made = recipe()
    for config in (made.teacher.backbone, made.students["small"].backbone):
        assert sum(p.numel() for p in Backbone(config).parameters()) == parameter_count(config)


HIGH = {"images": 64, "crops": CROPS | {"global_size": 96, "local_size": 48}, "masks": {}, "mask_input": True}


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({}, None),
        ({"crops": CROPS}, "teacher.high_res.crops.global_size"),
        ({"mask_input": False}, "teacher.high_res.mask_input"),
        ({"crops": CROPS | {"global_size": 97}}, "teacher.high_res.crops.global_size"),
        ({"objectives": {"match": {}}}, "teacher.high_res.objectives.match"),
        ({"cache": {}}, "teacher.high_res.cache"),
    ],
)
def test_a_phase_at_high_resolution_goes_on_at_more(changes, path):
    found = [p for p, _ in recipe(teacher__high_res=HIGH | changes).problems()]
    assert (path in found) if path else found == []


def test_a_phase_at_high_resolution_has_the_heads_that_were_trained():
    changes = {
        "teacher__train__objectives": {"ibot": 0.0},
        "teacher__train__mask_input": False,
        "distill__objectives": {"ibot": 0.0},
    }
    assert "teacher.high_res.objectives.ibot" in [p for p, _ in recipe(**changes, teacher__high_res=HIGH).problems()]
    found = recipe(**changes, teacher__high_res=HIGH | {"objectives": {"ibot": 0.0}}).problems()
    assert found == []


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        (
            {"students__small__backbone": {"kind": "timm", "name": "test_vit"}},
            None,
        ),  # patch 16: 48 and 96 px are multiples, 24 is not
        ({"students__small__backbone": {"kind": "timm", "name": "test_resnet"}}, "students.small.backbone.name"),
        (
            {"students__small__backbone": {"kind": "timm", "name": "test_vit", "options": {"depht": 2}}},
            "students.small.backbone",
        ),
        ({"students__small__backbone": {"kind": "timm", "name": "test_vjt"}}, "students.small.backbone"),
        ({"teacher__backbone": {"kind": "timm", "name": "test_resnet"}}, "teacher.train.mask_input"),
    ],
)
def test_networks_of_timm_are_asked_before_anything_runs(changes, path):
    crops = CROPS | {"local_size": 32}
    found = [p for p, _ in recipe(**changes, distill__crops=crops, teacher__train__crops=crops).problems()]
    assert (path in found) if path else found == []
    if path is None:
        assert "distill.crops.local_size" in [p for p, _ in recipe(**changes).problems()]


def test_a_cache_holds_one_grid_also_where_timm_says_the_patch():
    students = {"a": {"backbone": SHAPE}, "b": {"backbone": {"kind": "timm", "name": "test_vit"}}}
    crops = CROPS | {"local_size": 32}
    assert recipe(students=students, distill__crops=crops).problems() == []
    found = recipe(students=students, distill__crops=crops, distill__cache={}).problems()
    assert [p for p, _ in found] == ["distill.cache"]
