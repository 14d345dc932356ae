"""Model folders and training checkpoints: exact round trips, and one sentence for everything that is damaged."""

import errno
import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from distill import training_state
from distill.data.preprocess import Preprocess
from distill.errors import EnvironmentFailed, UserError
from distill.files import unfinished, write_bytes
from distill.losses.targets import Centring
from distill.models import checkpoints
from distill.models.backbone import Backbone, BackboneConfig
from distill.models.checkpoints import load_backbone, load_heads, load_preprocess, model_info, save_model
from distill.models.headed import HeadedBackbone
from distill.models.heads import DINOHead, HeadConfig
from distill.models.names import from_official
from distill.objectives import ObjectivesConfig
from distill.optim import OptimConfig, update_average
from distill.training_state import Student, prepare_student, resume, save_state

torch.set_num_threads(1)  # small tensors: a second thread costs more than it does

CONFIG = BackboneConfig(
    arch="vit_giant",
    dim=32,
    depth=2,
    heads=2,
    patch=8,
    image_size=32,
    layer_scale=1.0,
    init="fan_in",
    registers=2,
    pos_offset=0.0,
)
HEADS = {
    "dino": HeadConfig(prototypes=12, hidden=16, bottleneck=8),
    "ibot": HeadConfig(prototypes=8, hidden=24, bottleneck=4, layers=2, bias=False),
}
PREPROCESS = Preprocess(32, 36, "bilinear", "per_image")


def save(folder: Path, seed: int = 0, heads: bool = True) -> tuple[Backbone, dict[str, DINOHead]]:
    torch.manual_seed(seed)
    backbone, made = Backbone(CONFIG), {n: DINOHead(32, c) for n, c in HEADS.items()}
    save_model(folder, backbone, PREPROCESS, made if heads else None, {"seed": seed})
    return backbone, made


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def edit(folder: Path, change) -> None:
    info = json.loads((folder / "model.json").read_text())
    change(info)
    (folder / "model.json").write_text(json.dumps(info))


def says(error: pytest.ExceptionInfo, *words: str) -> None:
    """One sentence or two, on one line, that names what is asked."""
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_round_trip(tmp_path):
    backbone, heads = save(tmp_path / "deep" / "model")
    loaded, loaded_heads = load_backbone(tmp_path / "deep" / "model"), load_heads(tmp_path / "deep" / "model", 32)
    assert loaded.config == CONFIG
    assert not loaded.training
    assert same(backbone, loaded)
    assert list(loaded_heads) == ["dino", "ibot"]
    for name, head in heads.items():
        assert loaded_heads[name].config == HEADS[name]
        assert same(head, loaded_heads[name])
        assert not loaded_heads[name].training
    assert load_preprocess(tmp_path / "deep" / "model") == PREPROCESS
    assert model_info(tmp_path / "deep" / "model")["lineage"] == {"seed": 0}
    assert sorted(p.name for p in (tmp_path / "deep" / "model").iterdir()) == [
        "backbone.safetensors",
        "heads.safetensors",
        "model.json",
    ]


def test_saving_twice_gives_the_same_bytes(tmp_path):
    save(tmp_path / "a")
    save(tmp_path / "b")
    for name in ("backbone.safetensors", "heads.safetensors", "model.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_model_without_heads(tmp_path):
    save(tmp_path, heads=False)
    assert load_heads(tmp_path, 32) == {}
    assert not (tmp_path / "heads.safetensors").exists()


def test_averages_and_frozen_modules_are_saved_as_they_are(tmp_path):
    backbone = Backbone(CONFIG).requires_grad_(False).to(torch.float64).float()
    save_model(tmp_path, backbone, PREPROCESS)
    assert same(backbone, load_backbone(tmp_path))


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_model_json(tmp_path, there):
    folder = tmp_path / "x"
    if there:
        folder.mkdir()
    for load in (load_backbone, load_preprocess, lambda f: load_heads(f, 32)):
        with pytest.raises(UserError) as e:
            load(folder)
        says(e, str(folder), "no model.json", "decant run")


def test_another_format(tmp_path):
    save(tmp_path)
    edit(tmp_path, lambda i: i.update(format="decant-model-9"))
    with pytest.raises(UserError, match="decant-model-9") as e:
        load_backbone(tmp_path)
    says(e, "decant-model-1")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_files(tmp_path, keep):
    save(tmp_path)
    for name, load in (("backbone.safetensors", load_backbone), ("heads.safetensors", lambda f: load_heads(f, 32))):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:keep])
        with pytest.raises(UserError) as e:
            load(tmp_path)
        says(e, name, "Run the stage that wrote it again")
    data = (tmp_path / "model.json").read_bytes()
    (tmp_path / "model.json").write_bytes(data[: keep if keep >= 0 else -5])
    with pytest.raises(UserError) as e:
        load_backbone(tmp_path)
    says(e, "model.json", "not JSON")


def test_missing_weights(tmp_path):
    save(tmp_path)
    for name, load in (("backbone.safetensors", load_backbone), ("heads.safetensors", lambda f: load_heads(f, 32))):
        (tmp_path / name).unlink()
        with pytest.raises(UserError) as e:
            load(tmp_path)
        says(e, name)


def test_weights_of_another_shape_or_name(tmp_path):
    save(tmp_path)
    for change in ({"dim": 64}, {"depth": 3}, {"depth": 1}, {"registers": 0}, {"ffn": "mlp"}):
        edit(tmp_path, lambda i, c=change: i["backbone"].update(c))
        with pytest.raises(UserError) as e:
            load_backbone(tmp_path)
        says(e, "backbone.safetensors", "Run the stage")
        edit(tmp_path, lambda i: i.update(backbone=CONFIG.model_dump()))
    with pytest.raises(UserError):
        load_heads(tmp_path, 48)
    assert load_backbone(tmp_path)


def test_weights_of_another_shape_are_named(tmp_path):
    save(tmp_path)
    edit(tmp_path, lambda i: i["backbone"].update(depth=3))
    with pytest.raises(UserError, match=r"blocks\.2\."):
        load_backbone(tmp_path)


TAMPERED = {
    "a list": lambda folder: (folder / "model.json").write_text("[1]"),
    "no UTF-8": lambda folder: (folder / "model.json").write_bytes(b"\xff\xfe\x00"),
    "no backbone": lambda folder: edit(folder, lambda i: i.pop("backbone")),
    "no heads": lambda folder: edit(folder, lambda i: i.pop("heads")),
    "no preprocess": lambda folder: edit(folder, lambda i: i.pop("preprocess")),
    "unknown key": lambda folder: edit(folder, lambda i: i["backbone"].update(hedas=2)),
    "wrong type": lambda folder: edit(folder, lambda i: i["heads"]["dino"].update(hidden="wide")),
    "no network": lambda folder: edit(folder, lambda i: i["backbone"].update(heads=5)),
    "unknown preprocessing": lambda folder: edit(folder, lambda i: i["preprocess"].update(crop=3)),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_a_tampered_model_json_is_a_sentence(tmp_path, kind):
    save(tmp_path)
    TAMPERED[kind](tmp_path)
    with pytest.raises(UserError) as e:  # noqa: PT012  whichever of the three reads the damaged part
        load_backbone(tmp_path)
        load_heads(tmp_path, 32)
        load_preprocess(tmp_path)
    says(e, "model.json")


class Killed(BaseException):
    pass


def dies(*args, **kwargs):
    raise Killed


@pytest.mark.parametrize("at", ["distill.models.checkpoints.write_json", "distill.models.checkpoints.save_tensors", "os.fsync"])
def test_an_interrupted_save_is_no_model(tmp_path, monkeypatch, at):
    monkeypatch.setattr(at, dies)
    with pytest.raises(Killed):
        save(tmp_path)
    assert not (tmp_path / "model.json").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    with pytest.raises(UserError, match="holds no model"):
        load_backbone(tmp_path)


def test_an_interrupted_save_over_a_model_is_no_mixture(tmp_path, monkeypatch):
    old, _ = save(tmp_path, seed=0)
    monkeypatch.setattr(checkpoints, "write_json", dies)
    with pytest.raises(Killed):
        save(tmp_path, seed=1)
    try:
        found = load_backbone(tmp_path)
    except UserError:
        return
    assert same(found, old)


def test_a_save_that_fails_in_the_middle_leaves_no_model_and_whole_weights(tmp_path, monkeypatch):
    save(tmp_path, seed=0)
    before = (tmp_path / "backbone.safetensors").read_bytes()
    monkeypatch.setattr("os.fsync", dies)
    with pytest.raises(Killed):
        save(tmp_path, seed=1)
    assert (tmp_path / "backbone.safetensors").read_bytes() == before
    with pytest.raises(UserError, match=r"no model\.json"):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    "said",
    ["No space left on device (os error 28)", "Disk quota exceeded (os error 122)"],
)
def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch, said):
    def full_disk(*args: Any, **kwargs: Any) -> None:
        """What safetensors raises there: no OSError."""
        raise SafetensorError(f"Error while serializing: I/O error: {said}")

    def full(self: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for module in (checkpoints, training_state):
        monkeypatch.setattr(module, "save_file", full_disk, raising=False)
    monkeypatch.setattr(Path, "write_bytes", full)  # should the tensors ever be written so
    with pytest.raises(EnvironmentFailed, match="disk is full"):
        checkpoints.save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(3)})
    with pytest.raises(EnvironmentFailed, match="disk is full"):
        save_state(tmp_path / "c.safetensors", 1, {"a": student(0)}, centrings(), 1)


SAVING = """
import sys, torch
from pathlib import Path
from distill.models.checkpoints import save_tensors
while True:
    save_tensors(Path(sys.argv[1]) / "x.safetensors", {"a": torch.zeros(4_000_000)})
"""


def test_what_a_kill_leaves_is_known_to_the_sweep(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SAVING, str(tmp_path)])
    deadline = time.monotonic() + 60
    try:
        while not (left := set(os.listdir(tmp_path)) - {"x.safetensors"}):  # a kill now would leave these
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.0005)
    finally:
        process.kill()
        process.wait()
    assert all(unfinished(name) for name in left)


def test_weights_may_be_read_by_whoever_may_read_the_rest(tmp_path):
    write_bytes(tmp_path / "plain", b"")
    save(tmp_path)
    want = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {p.name: want for p in tmp_path.iterdir()}


class OneProcess:
    num_processes = 1
    device = torch.device("cpu")

    def prepare_model(self, module: torch.nn.Module) -> torch.nn.Module:
        return module


def student(seed: int, steps: int = 0, heads: int = 2) -> Student:
    """A student that took steps, so that its average and Adam's moments differ from their beginnings."""
    torch.manual_seed(seed)
    config = BackboneConfig(dim=16, depth=1, heads=heads, patch=8, image_size=16, layer_scale=1.0, init="fan_in")
    model: Any = HeadedBackbone(Backbone(config), DINOHead(16, HEADS["dino"]), None)
    made = prepare_student(model, OptimConfig(), ObjectivesConfig(), True, OneProcess())
    for _ in range(steps):
        model.dino(model.backbone(torch.randn(2, 3, 16, 16)).cls).square().sum().backward()
        for group in made.optimizer.param_groups:
            group["lr"] = 0.01
        made.optimizer.step()
        update_average(made.average, model, 0.9)
        made.optimizer.zero_grad()
    return made


def centrings() -> Any:
    return torch.nn.ModuleDict({"dino": Centring(12), "ibot": Centring(12)})


def test_training_state_round_trip(tmp_path):
    path = tmp_path / "c.safetensors"
    group, centres = {"a": student(0, 3), "b-2": student(1, 2)}, centrings()
    group["a"].bad_steps, group["a"].bad_in_a_row = 4, 2
    centres["dino"]([torch.randn(5, 12)], 0.1)
    save_state(path, 42, group, centres, 1)
    fresh, empty = {"a": student(5), "b-2": student(6)}, centrings()
    assert resume(path, fresh, empty, 1) == 42
    for name, one in group.items():
        assert same(one.module, fresh[name].module)
        assert same(one.average, fresh[name].average)
        assert not same(one.module, one.average)
        ours, theirs = one.state(), fresh[name].state()
        assert ours.keys() == theirs.keys()
        assert any(k.startswith("adam.exp_avg_sq.") for k in ours)
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert (fresh["a"].bad_steps, fresh["a"].bad_in_a_row, fresh["b-2"].bad_steps) == (4, 2, 0)
    assert torch.equal(empty["dino"].centre, centres["dino"].centre)


def test_no_checkpoint_is_a_beginning(tmp_path):
    assert resume(tmp_path / "none.safetensors", {"a": student(0)}, centrings(), 1) == 0


@pytest.mark.parametrize("keep", [0, 5, 2000, -1])
def test_a_truncated_checkpoint(tmp_path, keep):
    path = tmp_path / "c.safetensors"
    save_state(path, 3, {"a": student(0, 1)}, centrings(), 1)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=re.escape(str(path))) as e:
        resume(path, {"a": student(0)}, centrings(), 1)
    says(e, "Delete it to start this stage again")


def test_checkpoints_of_other_trainings(tmp_path):
    path = tmp_path / "c.safetensors"
    save_state(path, 3, {"a": student(0, 1)}, centrings(), 1)
    wider = HeadedBackbone(Backbone(CONFIG), DINOHead(32, HEADS["dino"]), None)
    other = prepare_student(wider, OptimConfig(), ObjectivesConfig(), True, OneProcess())
    for group in ({"other": student(0)}, {"a": other}, {"a": student(0), "b": student(1)}):
        with pytest.raises(UserError, match="is not a checkpoint of this training") as e:
            resume(path, group, centrings(), 1)
        says(e, str(path))
    assert resume(path, {"a": student(0)}, centrings(), 2) == 3  # steps do not depend on the number of processes
    checkpoints.save_tensors(path, {"student/a/w": torch.zeros(2)})
    with pytest.raises(UserError, match="is not a checkpoint of this training"):
        resume(path, {"a": student(0)}, centrings(), 1)


def test_a_checkpoint_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    save_state(path, 3, {"a": student(0)}, centrings(), 1)
    monkeypatch.setattr("os.fsync", dies)
    with pytest.raises(Killed):
        save_state(path, 6, {"a": student(1)}, centrings(), 1)
    assert resume(path, {"a": student(2)}, centrings(), 1) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_official_names():
    state = {
        "cls_token": torch.zeros(1),
        "blocks.3.mlp.w12.weight": torch.zeros(2),
        "blocks.0.7.attn.qkv.bias": torch.zeros(3),
        "blocks.2.11.mlp.w3.bias": torch.zeros(4),
        "blocks.0.norm1.weight": torch.zeros(5),
    }
    assert {k: v.numel() for k, v in from_official(state).items()} == {
        "cls_token": 1,
        "blocks.3.mlp.fc1.weight": 2,
        "blocks.7.attn.qkv.bias": 3,
        "blocks.11.mlp.fc2.bias": 4,
        "blocks.0.norm1.weight": 5,
    }
