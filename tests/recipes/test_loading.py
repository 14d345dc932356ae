"""A recipe's mistakes: all at once, each with its line and what was probably meant."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field

from distill.config import Config
from distill.errors import UserError
from recipes.loading import find_recipe, load_recipe
from recipes.yaml_lines import Lines, dump, scalar


class Backbone(Config):
    arch: Literal["vit_small", "vit_base"] = "vit_small"
    heads: int | None = None
    dim: int = 32
    drop_path: float = 0.0
    crops: tuple[int, ...] = (48, 32)


class Scenes(Config):
    kind: Literal["scenes"] = "scenes"
    seed: int = 0


class Folder(Config):
    kind: Literal["folder"]
    path: Path
    labels: bool = False


Source = Annotated[Scenes | Folder, Field(discriminator="kind")]


class Data(Config):
    train: Source
    test: str | Source | None = None
    batch: int = Field(64, ge=1)


class Teacher(Config):
    backbone: Backbone = Backbone()
    steps: int
    lr: float | Literal["auto"] = 1e-3


class Recipe(Config):
    name: str = "x"
    data: Data
    teacher: Teacher
    students: dict[str, Backbone] = Field(default_factory=dict)
    targets: list[Literal["onnx-fp32", "onnx-int8"]] = Field(default_factory=list)

    def problems(self) -> list[tuple[str, str]]:
        sections = {"teacher.backbone": self.teacher.backbone} | {f"students.{n}": s for n, s in self.students.items()}
        return [
            (f"{path}.heads", f"dim {b.dim} is not divisible by heads {b.heads}")
            for path, b in sections.items()
            if b.heads and b.dim % b.heads
        ]


GOOD = """\
# a comment
data:
  train: {kind: scenes}
teacher:
  steps: 100
  lr: 1e-3
  backbone:
    heads: 4
    crops: [96, 48]
students:
  small:
    dim: 64
"""


@pytest.fixture
def recipe(tmp_path: Path):
    def load(text: str, *overrides: str) -> tuple[Recipe, str]:
        path = tmp_path / "my.yaml"
        path.write_text(text)
        return load_recipe(str(path), overrides, Recipe)

    return load


@pytest.fixture
def wrong(recipe, tmp_path: Path):
    def problems(text: str, *overrides: str) -> list[str]:
        with pytest.raises(UserError) as e:
            recipe(text, *overrides)
        assert e.value.exit_code == 2
        return str(e.value).replace(f"{tmp_path}/", "").splitlines()

    return problems


def test_a_good_recipe_loads_and_its_resolved_text_loads_the_same(recipe):
    loaded, text = recipe(GOOD, "students.small.drop_path=1e-5", "name=1e-3x")
    assert loaded.teacher.lr == 0.001
    assert loaded.teacher.backbone.crops == (96, 48)
    assert loaded.students["small"].drop_path == 1e-5
    assert "batch: 64" in text  # defaults are written out
    assert recipe(text) == (loaded, text)


def test_all_problems_at_once_with_lines_and_hints(wrong):
    text = GOOD.replace("heads: 4", "hedas: 4").replace("steps: 100", "steps: many").replace("dim: 64", "dim: 64\n    heads: 5")
    text += "targets: [onnx-fp32, onnx-in8]\nbatch: 3\n"
    assert wrong(text) == [
        'my.yaml:5: teacher.steps: must be a whole number, got "many"',
        "my.yaml:8: teacher.backbone.hedas: unknown key; did you mean heads?",
        "my.yaml:13: students.small.heads: dim 64 is not divisible by heads 5",
        "my.yaml:14: targets.1: must be one of 'onnx-fp32', 'onnx-int8', got \"onnx-in8\"; did you mean onnx-int8?",
        "my.yaml:15: batch: unknown key; did you mean data.batch?",
    ]


def test_a_contradiction_that_a_mistake_may_have_caused_waits(wrong):
    text = GOOD.replace("dim: 64", "dmi: 64\n    heads: 6")
    assert wrong(text) == ["my.yaml:12: students.small.dmi: unknown key; did you mean dim?"]


def test_missing_keys_stand_at_their_section(wrong):
    assert wrong(GOOD.replace("  steps: 100\n", "")) == ["my.yaml:4: teacher.steps: is missing; it has no default"]
    assert wrong("name: a\n") == [
        "my.yaml:1: data: is missing; it has no default",
        "my.yaml:1: teacher: is missing; it has no default",
    ]
    assert len(wrong("")) == 2


def test_only_the_chosen_kind_of_a_union_complains(wrong):
    text = GOOD.replace("{kind: scenes}", "{kind: folder, seed: 3, labels: yes}")
    assert wrong(text) == [
        "my.yaml:3: data.train.path: is missing; it has no default",
        "my.yaml:3: data.train.seed: unknown key; data.train has kind, labels, path",
        'my.yaml:3: data.train.labels: must be true or false, got "yes"; write true',
    ]
    assert wrong(GOOD.replace("kind: scenes", "kind: fodler")) == [
        "my.yaml:3: data.train: kind must be one of scenes, folder, got 'fodler'; did you mean folder?"
    ]
    assert wrong(GOOD.replace("kind: scenes", "seed: 1")) == [
        "my.yaml:3: data.train: its kind is missing; kind is one of folder, scenes"
    ]
    assert wrong(GOOD.replace("{kind: scenes}", "images")) == [
        'my.yaml:3: data.train: must be a section of its own settings, got "images"'
    ]


def test_a_section_in_place_of_a_text_is_judged_as_a_section(wrong):
    text = GOOD.replace("data:\n", "data:\n  test: {kind: folder, path: a, lables: true}\n")
    assert wrong(text) == ["my.yaml:3: data.test.lables: unknown key; did you mean labels?"]
    assert wrong(text.replace("folder, path: a, lables: true", "scenez")) == [
        "my.yaml:3: data.test: kind must be one of scenes, folder, got 'scenez'; did you mean scenes?"
    ]
    assert wrong(GOOD.replace("data:\n", "data:\n  test: 3\n")) == [
        "my.yaml:3: data.test: must be text or a section of its own settings, got 3"
    ]


def test_wrong_types_are_never_guessed(wrong):
    text = GOOD.replace("steps: 100", "steps: '100'").replace("lr: 1e-3", "lr: fast").replace("[96, 48]", "96")
    assert wrong(text.replace("data:\n", "data:\n  batch: 0\n")) == [
        "my.yaml:3: data.batch: must be greater than or equal to 1, got 0",
        'my.yaml:6: teacher.steps: must be a whole number, got "100"',
        "my.yaml:7: teacher.lr: must be a number or 'auto', got \"fast\"",
        "my.yaml:10: teacher.backbone.crops: must be a list, as in [1, 2], got 96",
    ]
    assert wrong(GOOD.replace("steps: 100", "steps: 1.5")) == ["my.yaml:5: teacher.steps: must be a whole number, got 1.5"]
    assert wrong(GOOD.replace("steps: 100", "steps:")) == ["my.yaml:5: teacher.steps: must be a whole number, got nothing"]
    assert wrong("data: 3\nteacher: [1]\n") == [
        "my.yaml:1: data: must be a section of its own settings, got 3",
        "my.yaml:2: teacher: must be a section of its own settings, got [1]",
    ]


def test_yaml_that_is_broken_or_says_a_thing_twice(wrong):
    assert wrong("data:\n  train: {kind: scenes\nteacher: 1\n")[0].startswith("my.yaml:3: not valid YAML: ")
    assert wrong("a: 1\n\tb: 2\n")[0].startswith("my.yaml:2: not valid YAML: ")
    assert wrong("- 1\n- 2\n") == ["my.yaml:1: a recipe must be sections of `name: value` lines"]
    assert wrong(GOOD + "name: a\nname: b\n") == ["my.yaml:14: name: stands twice, first on line 13"]
    assert wrong(GOOD + "--- \nname: b\n")[0].startswith("my.yaml:13: not valid YAML: ")
    assert "the tag !run means nothing here" in wrong(GOOD.replace("steps: 100", "steps: !run 100"))[0]
    assert "alias" in wrong("data: &a\n  train: *a\nteacher: {steps: 1}\n")[0]
    assert "cannot be keys" in wrong(GOOD + "<<: {name: b}\n")[0]


def test_binary_and_unreadable_files(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(str(path), [], Recipe)
    path.write_bytes(b"name: \x07\n")
    with pytest.raises(UserError, match=r"x\.yaml:1: not valid YAML"):
        load_recipe(str(path), [], Recipe)


def test_overrides_are_yaml_make_sections_and_the_last_wins(recipe):
    loaded, _ = recipe(
        GOOD,
        "teacher.backbone={dim: 48, heads: 3}",
        "teacher.backbone.heads=6",
        "teacher.lr=auto",
        "students.big.dim=128",
        "students.small.crops=[8, 16]",
        "data.train={kind: folder, path: a/b=c}",
        "data.train.labels=true",
    )
    assert loaded.teacher.backbone == Backbone(dim=48, heads=6)
    assert loaded.teacher.lr == "auto"
    assert loaded.students == {"small": Backbone(dim=64, crops=(8, 16)), "big": Backbone(dim=128)}
    assert loaded.data.train == Folder(kind="folder", path=Path("a/b=c"), labels=True)
    assert recipe(GOOD, "teacher.backbone.crops.1=24")[0].teacher.backbone.crops == (96, 24)


def test_overrides_report_their_own_mistakes(wrong):
    assert wrong(
        GOOD,
        "teacher.backbone.hedas=4",
        "steps",
        "teacher.steps.x=1",
        "teacher..steps=1",
        "data.batch=[1",
        "students.big.heads=5",
        "teacher.backbone.crops.7=1",
        "teacher.lr=[1]",
    ) == [
        "--set teacher.backbone.hedas: unknown key; did you mean heads?",
        "--set steps: 'steps' must look like section.key=value",
        "--set teacher.steps.x: teacher.steps is 100, not a section",
        "--set teacher..steps: a part of the name is empty",
        "--set data.batch: not valid YAML: expected `,` or `]`, but got `<stream end>`",
        "--set students.big.heads: dim 32 is not divisible by heads 5",
        "--set teacher.backbone.crops.7: teacher.backbone.crops is a list of 2: '7' is not one of its numbers, from 0",
        "--set teacher.lr: must be a number or 'auto', got [1]",
    ]


def test_a_value_overridden_away_is_not_complained_about(recipe):
    assert recipe(GOOD.replace("steps: 100", "steps: many"), "teacher.steps=5")[0].teacher.steps == 5


def test_recipes_are_found_by_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "quickstart.yaml").write_text(GOOD)
    (tmp_path / "cifar10.yaml").write_text(GOOD)
    monkeypatch.setattr("recipes.loading.SHIPPED", tmp_path)
    assert find_recipe("quickstart") == tmp_path / "quickstart.yaml"
    assert load_recipe("quickstart", [], Recipe)[0].teacher.steps == 100
    with pytest.raises(UserError, match=r"no recipe 'quikstart'.*Did you mean quickstart\? Shipped are cifar10, quickstart"):
        find_recipe("quikstart")
    with pytest.raises(UserError, match="is a folder"):
        find_recipe(str(tmp_path))
    (tmp_path / "quickstart.yaml").write_text("nmae: 1\n" + GOOD)
    with pytest.raises(UserError, match=r"^quickstart\.yaml:1: nmae: unknown key; did you mean name\?$"):
        load_recipe("quickstart", [], Recipe)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1E5", 1e5), ("1.", 1.0), (".5", 0.5), ("-2.5e+3", -2500.0), ("010", 10), ("1_000", 1000), ("+7", 7),
        ("on", "on"), ("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("1:30", "1:30"),
        ("2024-01-02", "2024-01-02"), ("0x10", "0x10"), ("1e999", "1e999"), ("1__0", "1__0"), (".inf", ".inf"), ("e5", "e5"),
    ],
)  # fmt: skip
def test_plain_scalars(text: str, value: object):
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


def test_what_is_dumped_reads_back_the_same():
    value = {
        "a": ["1e-3", "on", "010", "1:30", "x: y", "", "null", "é", "a\nb"],
        "b": {"c": [1, 2.5, 1e-12, True, None]},
        "d": {},
        "e": [],
    }
    assert Lines(dump(value)).value == value
    assert Lines(dump(value)).problems == []
    assert yaml.safe_load(dump({"a": 1e-12})) == {"a": 1e-12}  # others read it too
