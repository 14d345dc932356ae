"""Recipes with teachers from elsewhere and students of any kind, through the real command: loaded and fitted, matched, at high resolution,
from kept targets.
"""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from distill.models.backbone import Backbone, BackboneConfig
from distill.models.checkpoints import load_backbone, load_preprocess, model_info, save_tensors
from distill.models.foreign import LoadConfig
from distill.models.heads import DINOHead, HeadConfig
from distill.models.names import to_official
from distill.models.timm_backbone import TimmBackbone, TimmConfig
from distill.rows import Row, read_rows
from distill.step import Stepper
from recipes import cli
from recipes.loading import load_recipe
from recipes.schema import Recipe
from recipes.stages import plan

torch.set_num_threads(1)

HEAD = {"prototypes": 16, "hidden": 32, "bottleneck": 16, "init": "fan_in"}
CROPS = {"global_size": 32, "local_size": 16, "local_count": 1}
TRAIN = {"images": 48, "batch": 8, "crops": CROPS}
VIT = {"patch": 8, "image_size": 32, "dim": 32, "depth": 2, "heads": 2, "layer_scale": 1.0, "init": "fan_in"}
MATCH = {"dino": 0, "ibot": 0, "match": {"hidden": 0, "standardize_steps": 3}}


def recipe(teacher: dict[str, Any], distill: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "data": {
            "train": {"kind": "scenes", "count": 48, "size": 32},
            "test": {"kind": "scenes", "count": 32, "size": 32, "split": "test"},
        },
        "input": {"size": 32, "normalize": "per_image"},
        "teacher": {"dino_head": HEAD, "ibot_head": HEAD} | teacher,
        "students": {"a": {"backbone": VIT}},
        "distill": TRAIN | (distill or {}),
        "export": {"targets": ["onnx-fp32"], "quantize": {"images": 8}},
        "evaluate": {"ks": [5], "probe_steps": 20},
        "benchmark": {"batches": [1], "seconds": 0.02, "warmup_seconds": 0.02},
        "runtime": {"workers": 0, "threads": 1, "log_every": 1},
    } | more


def pretrained(**more: Any) -> dict[str, Any]:
    return {"backbone": VIT, "train": TRAIN | {"masks": {}, "mask_input": True} | more}


class Said(NamedTuple):
    code: int
    out: str
    err: str


class Folder(NamedTuple):
    """Where one recipe and its run lie."""

    home: Path

    @property
    def run(self) -> Path:
        return self.home / "run"

    def write(self, wanted: dict[str, Any]) -> Path:
        path = self.home / "tiny.yaml"
        path.write_text(yaml.safe_dump(wanted, sort_keys=False))
        return path

    def do(self, word: str, wanted: dict[str, Any], *options: str, code: int = 0) -> Said:
        said = decant(word, self.write(wanted), "--out", self.run, *options, code=code)
        if word == "run" and code == 0:  # what it keeps, with all defaults written out, is the same recipe
            kept = self.run / "recipe.yaml"
            assert load_recipe(str(kept), [], Recipe)[1] == kept.read_text()
        return said

    def train(self, wanted: dict[str, Any], code: int = 0) -> Said:
        return self.do("run", wanted, "--until", "distill", "--quiet", code=code)

    def log(self, name: str = "students/a") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / name / "train.jsonl").read_text().splitlines()]

    def weights(self, name: str = "students/a", file: str = "backbone") -> dict[str, torch.Tensor]:
        return load_file(self.run / name / f"{file}.safetensors")


def decant(*words: object, code: int = 0) -> Said:
    result = CliRunner().invoke(cli.app, [str(w) for w in words], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output + str(result.exception)
    assert "Traceback" not in result.output
    assert "defect of decant" not in result.output
    return Said(code, result.stdout, result.stderr)


def sentence(said: Said, *words: str) -> str:
    """The one line of a refusal; what was told of stages and their progress before it does not count."""
    line = said.err.strip().splitlines()[-1]
    for word in words:
        assert word in line, line
    return line


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def here(tmp_path) -> Folder:
    return Folder(tmp_path)


def official_file(path: Path, heads: bool = False, **more: Any) -> Path:
    """A DINOv2 file with tensors that are not degenerate; with heads, as a full teacher checkpoint has them."""
    torch.manual_seed(3)
    model = Backbone(BackboneConfig.model_validate(VIT | {"arch": "vit_small"} | more))
    state = to_official(model.state_dict(), False)
    if heads:
        state = {f"teacher.backbone.{k}": v for k, v in state.items()}
        for name in ("dino_head", "ibot_head"):
            head = DINOHead(model.dim, HeadConfig.model_validate(HEAD))
            state |= {f"teacher.{name}.{k}": v for k, v in head.state_dict().items()}
    torch.save(state, path)
    return path


def cnn_file(path: Path, name: str = "test_resnet") -> Path:
    torch.manual_seed(4)
    save_tensors(path, TimmBackbone(TimmConfig(name=name)).net.state_dict())
    return path


def rows_of(run: Path, subject: str, metric: str) -> list[Row]:
    return [r for r in read_rows(run / "rows.jsonl") if r.subject == subject and r.metric == metric]


# ---- teachers that are loaded


def test_an_official_backbone_gets_heads_and_is_distilled(here):
    path = official_file(here.home / "vit.pth")
    wanted = recipe(
        {"load": {"kind": "official", "path": str(path), "attention_heads": 2}, "fit_heads": TRAIN},
        {"objectives": {"koleo": 0.1}},
    )
    plan = here.do("check", wanted).out
    for word in ("known once it is loaded", "load", "fit_heads", "distill", "open"):
        assert word in plan
    here.train(wanted)
    loaded, fitted = here.weights("loaded"), here.weights("teacher")
    assert same(loaded, fitted)  # a frozen backbone
    assert set(model_info(here.run / "teacher")["heads"]) == {"dino", "ibot"}
    assert load_preprocess(here.run / "teacher").normalize == "imagenet"  # its own, not the recipe's
    fit, log = here.log("teacher"), here.log()
    assert {"dino_global", "dino_local", "ibot"} <= fit[0].keys()
    assert "koleo" not in fit[0]
    assert {"dino_global", "dino_local", "ibot", "koleo"} <= log[0].keys()
    torch.manual_seed(500)
    fresh = DINOHead(32, HeadConfig.model_validate(HEAD)).state_dict()
    heads = here.weights("teacher", "heads")
    assert any(not torch.equal(heads[f"dino.{k}"], v) for k, v in fresh.items())  # they were moved
    assert "known once it is loaded" not in here.do("check", wanted).out  # the file was read by now


@pytest.fixture(scope="module")
def matched(tmp_path_factory) -> tuple[Folder, dict[str, Any]]:
    """The whole way with a CNN as the teacher, at a size of its own."""
    here = Folder(tmp_path_factory.mktemp("cnn"))
    path = cnn_file(here.home / "cnn.safetensors")
    load = {"kind": "timm", "name": "test_resnet", "path": str(path)}
    wanted = recipe({"load": load}, {"objectives": MATCH, "teacher_size": 96})
    here.do("check", wanted)
    assert "index.html" in here.do("run", wanted, "--quiet").out
    return here, wanted


def test_a_cnn_is_matched_at_its_own_size_and_shipped_to_the_end(matched):
    here, _ = matched
    seen = load_preprocess(here.run / "teacher")
    assert (seen.size, seen.normalize, seen.interpolation) == (96, "inception", "bilinear")
    assert load_preprocess(here.run / "students/a").normalize == "per_image"
    log = here.log()
    assert {"match_cls", "match_patches"} <= log[0].keys(), log[0]
    assert not any(k.startswith(("dino", "ibot")) for k in log[0])
    assert log[-1]["match_patches"] < log[0]["match_patches"]
    for subject in ("raw", "random/teacher", "random/a", "teacher", "students/a"):
        (knn, *_) = rows_of(here.run, subject, "knn_top1")
        assert knn.status == "measured", knn
    assert rows_of(here.run, "teacher", "latency_p50_ms")[0].status == "measured"
    assert rows_of(here.run, "teacher", "latency_p50_ms")[0].conditions["resolution"] == 96
    page = (here.run / "report/index.html").read_text()
    assert page.count("data:image/png") >= 1
    decant("selftest", here.run / "bundles/a.tar.gz")


def test_the_report_shows_students_at_their_own_size(matched):
    here, wanted = matched
    table = here.do("run", wanted, "--quiet").out
    (line,) = [line for line in table.splitlines() if "Distilled student a" in line]
    assert "not measured" not in line
    assert "The accuracy of the distilled student a was not measured" not in (here.run / "report/index.html").read_text()


@pytest.mark.slow
def test_every_command_reads_what_a_run_with_a_cnn_wrote(here):
    path = cnn_file(here.home / "cnn.safetensors", "test_efficientnet")
    load = {"kind": "timm", "name": "test_efficientnet", "path": str(path)}
    wanted = recipe({"load": load, "fit_heads": TRAIN}, {"teacher_size": 64, "cache": {"ibot_k": 8}})
    here.do("run", wanted, "--quiet")
    for word in (
        "eval",
        "bench",
        "report",
        "bundle",
        "export",
    ):  # its recipe.yaml, with all defaults written out, is read again
        decant(word, here.run, "--quiet")
    for subject in ("random/teacher", "teacher", "students/a"):
        assert rows_of(here.run, subject, "knn_top1")[0].status == "measured"


def test_a_transformers_folder_is_matched_and_anchored(here):
    library = pytest.importorskip("transformers")
    torch.manual_seed(5)
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 56, "patch_size": 14}
    library.Dinov2Model(library.Dinov2Config(**shape)).save_pretrained(here.home / "hf")
    load = {"kind": "transformers", "path": str(here.home / "hf")}
    wanted = recipe({"load": load}, {"objectives": MATCH | {"gram": {"start": 0}}, "teacher_size": 56})
    here.train(wanted)  # both grids are 4 x 4
    log = here.log()
    assert all({"match_cls", "match_patches", "gram"} <= line.keys() for line in log)
    assert all(0 < line["gram"] < 4 * 2 for line in log)
    here.train(wanted | {"distill": wanted["distill"] | {"objectives": MATCH | {"gram": {"start": 0.5}}}})
    assert ["gram" in line for line in here.log()] == [False] * 3 + [True] * 3


def test_an_anchor_on_another_grid_is_resampled(here):
    load = {"kind": "timm", "name": "test_resnet", "path": str(cnn_file(here.home / "cnn.safetensors"))}
    here.train(recipe({"load": load}, {"objectives": MATCH | {"gram": {"start": 0}}, "teacher_size": 96}))
    assert "gram" in here.log()[-1]


def test_an_earlier_run_teaches_with_the_heads_it_has(here, tmp_path):
    (tmp_path / "earlier").mkdir()
    earlier = Folder(tmp_path / "earlier")
    earlier.train(recipe(pretrained()))
    wanted = recipe({"load": {"kind": "run", "path": str(earlier.run)}})
    here.train(wanted)
    assert not (here.run / "loaded").exists()
    for file in ("backbone", "heads"):
        assert same(here.weights("teacher", file), earlier.weights("teacher", file))
    assert same(here.weights(), earlier.weights())  # the very same distillation
    # What else happens in the earlier run is no change of the teacher.
    (earlier.run / "students/a/model.json").write_text("{}")
    assert "nothing changed: load, distill" in here.train(wanted).err
    path = earlier.run / "teacher/backbone.safetensors"
    save_tensors(path, {k: v * 1.01 if k == "cls_token" else v for k, v in load_file(path).items()})
    said = here.train(wanted).err
    assert "load: starts" in said
    assert "distill: starts" in said


def test_a_student_goes_on_from_a_trained_model(here, tmp_path):
    """With a learning rate of nearly nothing it stays what it started from; without a start it is another network."""
    (tmp_path / "earlier").mkdir()
    earlier = Folder(tmp_path / "earlier")
    earlier.train(recipe(pretrained()))
    still = {"optim": {"lr": 1e-9, "min_lr": 0.0, "warmup": 0.0, "weight_decay": [0.0, 0.0]}}
    start = earlier.run / "teacher"
    students = {"a": {"backbone": VIT, "start": str(start)}, "b": {"backbone": VIT}}
    wanted = recipe({"load": {"kind": "run", "path": str(earlier.run)}}, still, students=students)
    here.train(wanted)
    theirs = load_file(start / "backbone.safetensors")
    for name, alike in (("a", True), ("b", False)):
        ours = load_file(here.run / f"students/{name}/backbone.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[n], theirs[n], atol=1e-4) for n in ours) == alike
    assert "nothing changed: load, distill" in here.train(wanted).err
    moved = start.with_name("moved")
    shutil.copytree(start, moved)
    wanted["students"]["a"]["start"] = str(moved)
    assert "nothing changed: load, distill" in here.train(wanted).err, "the content counts, not the place"
    save_tensors(moved / "backbone.safetensors", {k: v * 1.01 for k, v in theirs.items()})
    assert "distill: starts" in here.train(wanted).err


def test_a_start_that_does_not_fit(here, tmp_path):
    (tmp_path / "earlier").mkdir()
    earlier = Folder(tmp_path / "earlier")
    earlier.train(recipe(pretrained()))
    load = {"load": {"kind": "run", "path": str(earlier.run)}}

    def started(start: Path, **changes: Any) -> dict[str, Any]:
        return recipe(load, students={"a": {"backbone": VIT | changes, "start": str(start)}})

    sentence(here.do("check", started(tmp_path / "none"), code=2), "students.a.start", "holds no model (no model.json)")
    said = here.train(started(earlier.run / "teacher", dim=16), code=2)
    sentence(said, "holds another backbone than students.a.backbone", "model.json")
    here.train(recipe(load))
    sentence(here.train(started(here.run / "students/a"), code=2), "students.a.start", "this very run's folder", "--out")


def test_a_stated_licence_moves_the_bundle_and_nothing_else(tmp_path):
    load = {"kind": "timm", "name": "test_resnet", "path": str(cnn_file(tmp_path / "cnn.safetensors"))}

    def configs(**more: str) -> dict[str, Any]:
        made = Recipe(**recipe({"load": load | more}, {"objectives": MATCH}))
        return {stage.name: stage.config for stage in plan(made, tmp_path / "run")}

    plain, stated = configs(), configs(licence="CC-BY-NC-4.0")
    assert [name for name in plain if plain[name] != stated[name]] == ["report", "bundle"]  # the report shows the recipe's hash
    assert LoadConfig(**load, licence=" ").problems() == ["licence must name one, or be left out"]


def test_a_run_does_not_load_its_own_teacher(here):
    here.train(recipe(pretrained()))
    before = here.weights("teacher")
    for path in (here.run, here.run / "students/a"):
        wanted = recipe({"load": {"kind": "run", "path": str(path)}})
        sentence(here.train(wanted, code=2), "this very run's folder", "--out")
        assert "this very run's folder" in " ".join(here.do("check", wanted).out.split())
    assert same(here.weights("teacher"), before)


def test_heads_that_came_along_are_left_aside_only_aloud(here):
    path = official_file(here.home / "full.pth", heads=True)
    load = {"load": {"kind": "official", "path": str(path), "attention_heads": 2}}
    here.train(recipe(load))
    assert set(model_info(here.run / "teacher")["heads"]) == {"dino", "ibot"}
    other = HEAD | {"prototypes": 24}
    said = here.train(recipe(load | {"dino_head": other, "ibot_head": other}), code=2)
    sentence(said, "16 prototypes", "students.a 24", "teacher.dino_head.prototypes")
    sentence(here.train(recipe(load | {"ibot_head": None}), code=2), "ibot head of its own")
    said = here.train(recipe(load | {"dino_head": other, "ibot_head": other, "fit_heads": TRAIN}))
    assert "the dino and ibot heads that came with the teacher are left aside" in said.err
    assert model_info(here.run / "teacher")["heads"]["dino"]["prototypes"] == 24


# ---- students of any kind


@pytest.mark.slow
def test_students_of_timm_and_of_two_patches_are_shipped(here):
    timm = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    students = {
        "a": {"backbone": {"kind": "timm", "name": "vit_tiny_patch16_224", "image_size": 32, "patch": 8, "options": timm}},
        "b": {"backbone": VIT | {"patch": 4}, "control": True},
    }
    export = {"targets": ["onnx-fp32", "onnx-int8"], "resolutions": [32, 48], "quantize": {"images": 8}}
    wanted = recipe(pretrained(), students=students, export=export)
    plan = here.do("check", wanted).out
    assert "vit_tiny_patch16_224: 32 wide, patch 8" in plan
    here.do("run", wanted, "--quiet")
    for name, patches in (("a", 16), ("b", 64)):
        assert {"dino_global", "ibot"} <= here.log(f"students/{name}")[-1].keys()
        with torch.no_grad():
            assert load_backbone(here.run / "students" / name)(torch.zeros(1, 3, 32, 32)).patches.shape == (1, patches, 32)
        cosine = rows_of(here.run, f"students/{name}", "cosine_min")
        assert {r.conditions["resolution"] for r in cosine} == {32, 48}
        assert min(r.value for r in cosine if r.target == "onnx-fp32" and r.value is not None) > 0.9999
        decant("selftest", here.run / f"bundles/{name}.tar.gz")
    assert "random/a" in {r.subject for r in read_rows(here.run / "rows.jsonl")}
    decant("report", here.run, "--quiet")


# ---- high resolution


def test_the_pretraining_goes_on_at_high_resolution_with_schedules_of_its_own(here, monkeypatch):
    sizes: list[tuple[int, bool]] = []
    forward = Backbone.forward

    def watched(self: Backbone, images: torch.Tensor, masks: torch.Tensor | None = None) -> Any:
        sizes.append((images.shape[-1], masks is not None))
        return forward(self, images, masks)

    low = pretrained()
    high = TRAIN | {"images": 32, "crops": CROPS | {"global_size": 64, "local_size": 24}, "masks": {}, "mask_input": True}
    high |= {"optim": {"lr": 1e-4, "warmup": 0.5}}
    here.train(recipe(low))
    before = here.weights("teacher")
    wanted = recipe(low | {"high_res": high})
    plan = here.do("check", wanted).out
    assert "2 × 64 + 1 × 24 px" in plan
    monkeypatch.setattr(Backbone, "forward", watched)
    said = here.do("run", wanted, "--until", "high_res", "--quiet")
    assert "pretrain: an earlier version with these settings is kept and comes back" in said.err  # from `teacher/`
    assert same(here.weights("pretrained"), before)
    assert same(here.weights("pretrained", "heads"), load_file(here.run / "pretrained/heads.safetensors"))
    assert {s for s, _ in sizes[-12:]} == {64, 24}
    assert (64, True) in sizes
    log = here.log("teacher")
    assert [line["step"] for line in log] == [0, 1, 2, 3]
    assert log[0]["lr"] < log[1]["lr"]  # a warm-up of its own
    assert max(line["lr"] for line in log) <= 1e-4
    assert log[0]["teacher_temperature"] == pytest.approx(0.04)
    after = here.weights("teacher")
    assert not same(after, before)
    # From a fresh start, nothing would be near. Learning rates here are small.
    far = sum(float((after[k] - before[k]).norm()) for k in after) / sum(float(before[k].norm()) for k in before)
    assert 0 < far < 0.02, far
    assert model_info(here.run / "teacher")["lineage"]["kind"] == "high_res"
    here.train(wanted)
    decant("check", here.run / "recipe.yaml", "--out", here.run)
    assert "pretrain: an earlier version" in here.train(recipe(low)).err
    assert same(here.weights("teacher"), before)
    said = here.train(wanted)
    assert "pretrain: an earlier version" in said.err
    assert "high_res: an earlier version" in said.err
    assert same(here.weights("teacher"), after)


# ---- targets that are kept


def no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any) -> None:
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr("distill.objectives.Guide.look", raises)


def shows(log: list[dict[str, Any]], other: list[dict[str, Any]], relative: float) -> None:
    assert len(log) == len(other)
    for a, b in zip(log, other, strict=True):
        for term in ("dino_global", "dino_local", "ibot", "koleo", "loss"):
            assert a[term] == pytest.approx(b[term], rel=relative), (a["step"], term)


def test_another_student_trains_from_kept_targets_as_if_the_teacher_were_there(here, monkeypatch):
    wide = {"a": {"backbone": VIT | {"dim": 48}}}
    kept = recipe(pretrained(), {"cache": {}})
    assert "0 steps read, 6 made" in here.train(kept).err
    first = here.log()
    here.train(recipe(pretrained(), students=wide))
    live = here.log()
    with monkeypatch.context() as patch:
        no_teacher(patch)
        said = here.train(recipe(pretrained(), {"cache": {}}, students=wide))
        assert "6 steps read, 0 made" in said.err
        # A rerun of the first student, made from scratch: what was used when the targets were made is what is read.
        here.train(kept | {"seed": 0, "distill": kept["distill"] | {"optim": {"lr": 1e-3}}})
    cached = here.log()
    assert first[0]["loss"] == cached[0]["loss"]
    here.train(recipe(pretrained(), {"cache": {}}, students=wide))
    # Vectors are kept in float16 (2^-11 a coordinate); prototypes, centring and temperature are done in float32.
    shows(here.log(), live, 1e-3)


def test_kept_targets_of_other_settings_are_refused_by_the_settings_name(here):
    cached: dict[str, Any] = {"cache": {}}
    here.train(recipe(pretrained(), cached))
    weights = here.weights()
    changes: list[tuple[dict[str, Any], str]] = [
        ({"distill": {"crops": CROPS | {"flip": 0.1}}}, "crops.flip (0.5 there, 0.1 here)"),
        ({"seed": 3}, "seed (0 there, 3 here)"),
        ({"distill": {"batch": 4}}, "batch (8 there, 4 here)"),
        ({"distill": {"cache": {"dino_k": 8}}}, "dino_k (None there, 8 here)"),
        ({"teacher": {"train": TRAIN | {"images": 40, "masks": {}, "mask_input": True}}}, "teacher.backbone.safetensors"),
        ({"data": {"train": {"kind": "scenes", "count": 40, "size": 32}}}, "source"),
        ({"students": {"a": {"backbone": VIT | {"patch": 4}}}}, "patch (8 there, 4 here)"),
    ]
    for change, name in changes:
        wanted = recipe(pretrained(), cached)
        for section, value in change.items():
            wanted[section] = wanted[section] | value if section in ("distill", "teacher") else value
        sentence(here.train(wanted, code=2), name, "Delete the folder")
    here.train(recipe(pretrained(), cached))
    assert same(here.weights(), weights)


@pytest.mark.parametrize("kept", [{}, {"dino_k": 16, "ibot_k": 16}, {"dino_k": 3, "ibot_k": 3}, {"dino_k": 3}])
def test_a_second_epoch_pays_no_teacher(here, kept):
    objectives = {"teacher_temperature": [0.05, 0.05]}
    wanted = recipe(pretrained(), {"cache": kept | {"replay": 16}, "objectives": objectives})
    said = here.train(wanted).err
    assert "4 steps read, 2 made" in said
    log = here.log()
    assert all(line["loss"] > 0 for line in log)
    assert log[-1]["loss"] < log[0]["loss"]
    live = Folder(here.home / "live")
    live.home.mkdir()
    live.train(recipe(pretrained(), {"objectives": objectives}))
    first, second = live.log(), here.log()
    exact = kept.get("dino_k") in (None, 16)
    shows(second[:2], first[:2], 1e-3 if exact else 0.5)
    if not exact:  # cut off and renormalised: near, and not the same
        assert abs(second[0]["dino_global"] / first[0]["dino_global"] - 1) > 1e-3


# ---- interruptions


def broken_off(kind: str, home: Path) -> dict[str, Any]:
    """A recipe by what is special about its trainings."""
    cnn = {"load": {"kind": "timm", "name": "test_resnet", "path": str(cnn_file(home / "cnn.safetensors"))}}
    vit = {"load": {"kind": "official", "path": str(official_file(home / "vit.pth")), "attention_heads": 2}}
    high = TRAIN | {"crops": CROPS | {"global_size": 64, "local_size": 24}, "masks": {}, "mask_input": True}
    return {
        "fit": lambda: recipe(cnn | {"fit_heads": TRAIN}, {"teacher_size": 96}),
        "match": lambda: recipe(vit, {"objectives": MATCH | {"gram": {"start": 0}}}),
        "high": lambda: recipe(pretrained(objectives={"gram": {"start": 0.5}}) | {"high_res": high}),
        "centre": lambda: recipe(vit | {"fit_heads": TRAIN | {"objectives": {"centring": "centre"}}}, {"cache": {}}),
    }[kind]()


@pytest.mark.parametrize("kind", ["fit", "match", "high", "centre"])
def test_a_training_that_broke_off_ends_in_the_same_weights(here, monkeypatch, kind):
    runtime = {"workers": 0, "threads": 1, "log_every": 1, "checkpoint_every": 2}
    wanted = broken_off(kind, here.home) | {"runtime": runtime}
    whole = Folder(here.home / "whole")
    whole.home.mkdir()
    whole.train(wanted)
    step = Stepper.step
    due = {5, 11, 16}  # calls of `step`, over all trainings: in each of them once, a step after a checkpoint
    calls = iter(range(1, 100))

    def breaks(self: Stepper, *arguments: Any) -> Any:
        if (n := next(calls)) in due:
            due.discard(n)
            raise KeyboardInterrupt  # not by a signal: no checkpoint is written on the way out, as if killed
        return step(self, *arguments)

    monkeypatch.setattr(Stepper, "step", breaks)
    stages = []
    while True:
        result = CliRunner().invoke(
            cli.app, ["run", str(here.write(wanted)), "--out", str(here.run), "--until", "distill", "--quiet"]
        )
        if result.exit_code == 0:
            break
        assert result.exit_code == 130, result.output
        stages.append(sorted(str(p.parent.relative_to(here.run)) for p in here.run.rglob("checkpoint.safetensors")))
        assert len(stages) < 5
    assert "distill: continues" in result.stderr or len(stages) > 1
    assert len({str(s) for s in stages}) == (1 if kind == "match" else 3 if kind == "high" else 2), stages
    for folder in ("teacher", "students/a"):
        for file in ("backbone", *(("heads",) if kind != "match" else ())):
            assert same(here.weights(folder, file), whole.weights(folder, file)), (folder, file)
    ours, theirs = ([(line["step"], line["loss"]) for line in f.log()] for f in (here, whole))
    assert ours == theirs


# ---- mistakes


def test_a_missing_file_is_named_by_check_and_by_run(here):
    wanted = recipe(
        {"load": {"kind": "official", "path": str(here.home / "no.pth"), "attention_heads": 2}}, {"objectives": MATCH}
    )
    assert "there is no official model at" in " ".join(here.do("check", wanted).out.split())
    sentence(here.train(wanted, code=2), "no.pth is not there", "https://")


class Touch:
    """What a pickle may do to those who open it."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


BROKEN = {
    "folder": (lambda p: p.mkdir(), "is a folder, not a file"),
    "empty": (lambda p: p.write_bytes(b""), "damaged"),
    "cut": (lambda p: p.write_bytes(official_file(p).read_bytes()[:20_000]), "damaged"),
    "text": (lambda p: p.write_text("<html>not found</html>"), "damaged or no weights file"),
    "code": (lambda p: torch.save({"w": Touch(p.parent / "touched")}, p), "run code from the file"),
    "cnn": (lambda p: torch.save(TimmBackbone(TimmConfig(name="test_resnet")).state_dict(), p), "is no DINOv2 backbone"),
    "list": (lambda p: torch.save([torch.zeros(2)], p), "not weights by name"),
    "other patch": (lambda p: official_file(p, patch=14, image_size=56), "set distill.teacher_size, to 28"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_one_sentence(here, what):
    make, says = BROKEN[what]
    make(here.home / "w.pth")
    load = {"kind": "official", "path": str(here.home / "w.pth"), "attention_heads": 2}
    sentence(here.train(recipe({"load": load}, {"objectives": MATCH}), code=2), says)
    assert not (here.home / "touched").exists()


def test_a_file_of_another_network_of_timm(here):
    load = {"kind": "timm", "name": "test_efficientnet", "path": str(cnn_file(here.home / "cnn.safetensors"))}
    said = here.train(recipe({"load": load}, {"objectives": MATCH}), code=2)
    sentence(said, "does not hold the weights of test_efficientnet")


def test_a_teacher_without_heads_recommends_what_to_do(here):
    path = str(cnn_file(here.home / "cnn.safetensors"))
    said = here.train(recipe({"load": {"kind": "timm", "name": "test_resnet", "path": path}}), code=2)
    sentence(said, "teacher.load", "match: {}", "teacher.fit_heads")
    path = str(official_file(here.home / "vit.pth"))  # a file says it only when it is read
    said = here.train(recipe({"load": {"kind": "official", "path": path, "attention_heads": 2}}), code=2)
    sentence(said, "without a head for dino", "match: {}", "teacher.fit_heads")


LOAD = {"load": {"kind": "timm", "name": "test_resnet", "path": "x.safetensors"}}


@pytest.mark.parametrize(
    ("teacher", "distill", "more", "says"),
    [
        (LOAD | {"fit_heads": TRAIN | {"masks": {}, "mask_input": True}}, {}, {}, "fit_heads must have masks: null"),
        (LOAD, {"objectives": MATCH, "cache": {}}, {}, "drop it, or drop them"),
        (LOAD | {"high_res": TRAIN}, {"objectives": MATCH}, {}, "it needs train"),
        (LOAD | {"train": TRAIN}, {"objectives": MATCH}, {}, "either trained here or loaded"),
        ({}, {}, {}, "either trained here or loaded"),
        (LOAD | {"backbone": VIT}, {"objectives": MATCH}, {}, "backbone is what the loaded file says"),
        ({"load": LOAD["load"] | {"name": "test_resnot"}}, {"objectives": MATCH}, {}, "near: test_resnet"),
        (LOAD, {"objectives": MATCH}, {"students": {"a": {"backbone": VIT | {"patch": 7, "image_size": 28}}}}, "nearest is 35"),
        (
            LOAD,
            {"objectives": MATCH},
            {"students": {"a": {"backbone": {"kind": "timm", "name": "test_vlt"}}}},
            "near: test_vit",
        ),
        (LOAD, {"objectives": MATCH}, {"students": {"a": {"backbone": {"kind": "timm", "name": "test_resnet"}}}}, "exported"),
        ({"load": {"kind": "run"}}, {}, {}, "path must say where"),
        ({"load": {"kind": "offical", "path": "x"}}, {}, {}, "did you mean official?"),
    ],
)
def test_a_mistake_in_a_recipe_is_said_before_anything_is_done(here, teacher, distill, more, says):
    for word in ("check", "run"):
        said = here.do(word, recipe(teacher, distill, **more), code=2)
        assert says in said.err
        assert all("tiny.yaml:" in line for line in said.err.strip().splitlines())
        assert not here.run.exists()


def test_a_dead_training_stops_and_starts_anew_with_other_settings(here):
    monitors = {"after": 0.0, "patience": 2}
    dead = {"objectives": {"teacher_temperature": [1.0, 1.0]}, "monitors": monitors}
    wanted = recipe(pretrained(**dead), runtime={"workers": 0, "threads": 1, "log_every": 1, "checkpoint_every": 1})
    for _ in range(2):  # the same command says the same
        sentence(here.train(wanted, code=1), "has collapsed at step", "teacher_entropy", "lower teacher_temperature")
    assert not (here.run / "teacher/model.json").exists()
    wanted["teacher"]["train"]["objectives"] = {}
    here.train(wanted)
    assert [line["step"] for line in here.log("teacher")] == list(range(6))
