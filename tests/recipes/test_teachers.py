"""Recipes with teachers from elsewhere and students of any kind, through the real command: loaded and fitted, matched, at high resolution,
from kept targets.
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from distill.models.backbone import Backbone, BackboneConfig
from distill.models.checkpoints import load_backbone, load_preprocess, model_info, save_tensors
from distill.models.heads import DINOHead, HeadConfig
from distill.models.headed import HeadedBackbone
from distill.models.kinds import make_backbone
from distill.models.names import to_official
from distill.models.timm_backbone import TimmBackbone, TimmConfig
from distill.rows import Row, read_rows
from recipes import cli

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
        return decant(word, self.write(wanted), "--out", self.run, *options, code=code)

    def train(self, wanted: dict[str, Any], code: int = 0) -> Said:
        return self.do("run", wanted, "--until", "distill", "--quiet", code=code)

    def log(self, name: str = "students/a") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / name / "train.jsonl").read_text().splitlines()]

    def weights(self, name: str = "students/a", file: str = "backbone") -> dict[str, torch.Tensor]:
        return load_file(self.run / name / f"{file}.safetensors")


def decant(*words: object, code: int = 0) -> Said:
    result = CliRunner().invoke(cli.app, [str(w) for w in words])
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


def test_a_cnn_is_matched_at_its_own_size_and_shipped_to_the_end(here):
    path = cnn_file(here.home / "cnn.safetensors")
    load = {"kind": "timm", "name": "test_resnet", "path": str(path)}
    wanted = recipe({"load": load}, {"objectives": MATCH, "teacher_size": 96})
    here.do("check", wanted)
    done = here.do("run", wanted, "--quiet")
    assert "index.html" in done.out
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
    for word in (
        "eval",
        "bench",
        "report",
        "bundle",
        "export",
    ):  # its recipe.yaml, with all defaults written out, is read again
        decant(word, here.run, "--quiet")
    assert "skip" in here.do("check", wanted).out

