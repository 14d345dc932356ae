"""Two processes, replicated or sharded, against one at the same global batch: same losses, same weights, one checkpoint for all.

The processes are started once, by torch's launcher, and run this file: every case in turn.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distill.data.crops import CropsConfig
from distill.data.loader import MasksConfig
from distill.data.preprocess import Preprocess
from distill.data.scenes import ScenesConfig
from distill.errors import UserError
from distill.losses.gram import GramConfig
from distill.losses.matching import MatchConfig
from distill.models.backbone import Backbone, BackboneConfig
from distill.models.checkpoints import save_model
from distill.models.headed import HeadedBackbone
from distill.models.heads import DINOHead, HeadConfig
from distill.models.match_head import MatchHead
from distill.models.timm_backbone import TimmBackbone, TimmConfig
from distill.monitors import METRICS
from distill.objectives import ObjectivesConfig
from distill.optim import OptimConfig
from distill.progress import Progress
from distill.runtime import RuntimeConfig
from distill.sharding import is_sharded, load_sharded
from distill.train import TrainConfig, train

HEAD = HeadConfig(prototypes=18, hidden=32, bottleneck=15, init="fan_in")  # sizes that two processes cannot halve
CROPS = CropsConfig(global_size=32, local_size=16, local_count=2)
TIMM = {"embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 0.1}


def vit(
    seed: int = 0, dim: int = 32, heads: bool = True, tied: bool = False, match: MatchHead | None = None, **more
) -> HeadedBackbone:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "patch": 8,
        "image_size": 32,
        "dim": dim,
        "depth": 2,
        "heads": 2,
        "layer_scale": 0.5,
        "init": "fan_in",
        "registers": 1,
    }
    made = Backbone(BackboneConfig(**(shape | more)))
    dino = DINOHead(made.dim, HEAD) if heads else None
    return HeadedBackbone(made, dino, DINOHead(made.dim, HEAD) if heads and not tied else None, match)


def giant() -> HeadedBackbone:
    """ViT-g's shape (SwiGLU), narrow."""
    return vit(3, dim=48, arch="vit_giant", registers=0)


def matching(cls: bool = True, patches: bool = True) -> HeadedBackbone:
    torch.manual_seed(9)
    return vit(1, heads=False, match=MatchHead(32, 48, 24, cls, patches))


def timm_student(name: str, options: dict[str, Any]) -> HeadedBackbone:
    torch.manual_seed(4)
    backbone = TimmBackbone(TimmConfig(name=name, image_size=32, patch=8 if "patch" in name else None, options=options))
    return HeadedBackbone(backbone, DINOHead(backbone.dim, HEAD), DINOHead(backbone.dim, HEAD))


def frozen_backbone() -> HeadedBackbone:
    model = vit(5)
    model.backbone.requires_grad_(False)
    return model


class Case(NamedTuple):
    students: Callable[[], dict[str, HeadedBackbone]] = lambda: {"one": vit()}
    teacher: Callable[[], HeadedBackbone | None] = lambda: None
    objectives: Mapping[str, Any] = MappingProxyType({})
    changes: Mapping[str, Any] = MappingProxyType({})
    runtime: Mapping[str, Any] = MappingProxyType({})


LARGER = {"crops": CropsConfig(global_size=64, local_size=32, local_count=2)}
PLAIN: dict[str, Any] = {"masks": None, "mask_input": False}  # as in distillation
ALONE = {"dino": 0.0, "ibot": 0.0, "koleo": 0.0}


def distilled(student: Callable[[], HeadedBackbone], objectives: Mapping[str, Any] = ALONE, **changes: Any) -> Case:
    """A student of the narrow giant; by default without DINO, iBOT and KoLeo."""
    return Case(lambda: {"a": student()}, giant, objectives, PLAIN | changes)


EVA = ("eva02_tiny_patch14_224", {"embed_dim": 32, "depth": 2, "num_heads": 2})
CONVNEXT = ("convnext_atto", {"depths": [1] * 4, "dims": [8, 8, 16, 16], "ls_init_value": 0.5})
CASES: dict[str, Case] = {
    "pretrain, sinkhorn": Case(),
    "pretrain, centre": Case(objectives={"centring": "centre"}),
    "pretrain, one head for both": Case(lambda: {"one": vit(tied=True)}),
    "pretrain, micro-batches": Case(objectives={"koleo_group": 2}, runtime={"micro_batch": 2}),
    "pretrain, blocks again": Case(runtime={"recompute_blocks": True}),
    "pretrain, no local crops": Case(changes={"crops": CROPS.model_copy(update={"local_count": 0})}),
    "pretrain, few masks": Case(changes={"masks": MasksConfig(probability=0.07)}),  # one crop of 16: a process has none
    "no dino": Case(objectives={"dino": 0.0}),
    "no dino, one head": Case(lambda: {"one": vit(tied=True)}, objectives={"dino": 0.0}),
    "no ibot": Case(objectives={"ibot": 0.0}),
    "no ibot, no koleo": Case(objectives={"ibot": 0.0, "koleo": 0.0}),
    "gram": Case(objectives={"gram": GramConfig(snapshot=0.3, start=0.5, refresh=0.2)}),
    "fit heads": Case(lambda: {"one": frozen_backbone()}, changes=PLAIN),
    "distill, two students": Case(lambda: {"a": vit(1), "b": vit(2, dim=16)}, giant, changes=PLAIN),
    "distill, other patch": distilled(lambda: vit(1, patch=16), {}),
    "distill, timm vit": distilled(lambda: timm_student("vit_tiny_patch16_224", TIMM), {}),
    "distill, timm eva": distilled(lambda: timm_student(*EVA), {}),
    "distill, timm cnn": distilled(lambda: timm_student(*CONVNEXT), {}, **LARGER),
    "match": distilled(matching, {"dino": 0.0, "ibot": 0.0, "match": MatchConfig(hidden=24)}),
    "match, cls only": distilled(lambda: matching(patches=False), ALONE | {"match": MatchConfig(hidden=24, patches=0)}),
    "match, patches only": distilled(lambda: matching(cls=False), ALONE | {"match": MatchConfig(hidden=24, cls=0)}),
}
OTHERS = {
    # Batch norms see a process's share alone, so the number of processes matters; and the network has layers without use.
    "batch norm": distilled(lambda: timm_student("mobilenetv3_small_050", {}), {}, **LARGER),
    "bf16": distilled(lambda: vit(1), {}, precision="bf16"),
}
SHARDED = (
    "pretrain, sinkhorn",
    "pretrain, one head for both",
    "pretrain, micro-batches",
    "pretrain, blocks again",
    "gram",
    "fit heads",
    "distill, two students",
    "distill, timm vit",
    "distill, timm cnn",
    "match",
)
STEPS = 4
pytestmark = pytest.mark.slow


def run(name: str, folder: Path, steps: int = STEPS, source: Any = None, stop: int | None = None, **runtime: Any) -> dict:
    """Train a case; with `stop` end after so many of the steps, as a signal would."""
    case = (CASES | OTHERS)[name]
    objectives = {"teacher_temperature": (0.1, 0.1)} | dict(case.objectives)
    config = TrainConfig(
        **(
            {
                "images": 8 * steps,
                "batch": 8,
                "crops": CROPS,
                "masks": MasksConfig(),
                "mask_input": True,
                "optim": OptimConfig(lr=0.01, warmup=0.0, clip=1.0, ema=(0.9, 1.0), freeze_last_layer=0.0),
                "precision": "fp32",
                "objectives": ObjectivesConfig(**objectives),
            }
            | dict(case.changes)
        )
    )
    settings = {"workers": 0, "threads": 1, "checkpoint_every": 100, "log_every": 1} | dict(case.runtime) | runtime
    source = ScenesConfig(count=40, size=32).build() if source is None else source
    progress = Stopping(stop) if stop else Progress("quiet")
    try:
        return train(
            config, case.students(), case.teacher(), source, "per_image", folder, 5, RuntimeConfig(**settings), progress
        )
    except KeyboardInterrupt:
        return {}


class Stopping(Progress):
    """Sends this process SIGTERM after some steps: all processes write a checkpoint together and leave."""

    def __init__(self, after: int):
        super().__init__("quiet")
        self.after = after

    def task(self, *args: Any, **more: Any) -> Any:
        return _StoppingTask(super().task(*args, **more), self.after)


class _StoppingTask:
    def __init__(self, task: Any, after: int):
        self.task, self.after = task, after

    def __enter__(self) -> Any:
        self.inner = self.task.__enter__()
        self._last()
        return self

    def __exit__(self, *args: Any) -> Any:
        return self.task.__exit__(*args)

    def advance(self, n: int = 1, **shown: Any) -> None:
        self.after -= n
        self._last()
        self.inner.advance(n, **shown)

    def _last(self) -> None:
        if self.after == 1:  # the step that begins now sees it at its end
            os.kill(os.getpid(), 15)


def launch(folder: Path, job: str, *more: str) -> None:
    """Two CPU processes that run `job` of this file."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        __file__,
        job,
        str(folder),
    ]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=600, check=False, env=env)
    assert done.returncode == 0, done.stderr[-6000:]


def slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "_")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Folder of all cases, run by two processes."""
    folder = tmp_path_factory.mktemp("two")
    launch(folder, "cases")
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Callable[[str], Path]:
    """Folder of a case, run by one process."""
    folder = tmp_path_factory.mktemp("one")

    def ran(name: str) -> Path:
        if not (folder / slug(name)).exists():
            run(name, folder / slug(name))
        return folder / slug(name)

    return ran


def compare(ours: Path, theirs: Path, tolerance: float = 1e-5) -> None:
    """Logged terms of every step (six decimals), and everything in the checkpoint: weights, averages, Adam's moments, centres."""
    logs = sorted(p.relative_to(theirs) for p in theirs.rglob("train.jsonl"))
    assert logs
    for log in logs:
        a, b = ([json.loads(line) for line in (f / log).read_text().splitlines()] for f in (ours, theirs))
        assert len(a) == len(b) > 0
        for x, y in zip(a, b, strict=True):
            for key in y.keys() - {"seconds", "cpu_seconds"}:
                assert x[key] == pytest.approx(y[key], rel=tolerance * (10 if key in METRICS else 1), abs=2e-6), (
                    log,
                    y["step"],
                    key,
                )
    same_tensors(load_file(ours / "checkpoint.safetensors"), load_file(theirs / "checkpoint.safetensors"), tolerance)


def same_tensors(a: dict, b: dict, tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for key in a:
        x, y = (comparable(key, t) for t in (a[key], b[key]))
        # Biases begin at 0 and a few steps move them by thousandths: there the last digits are Adam's noise, not a difference.
        least = 1e-2 if key.endswith("bias") and "adam" not in key else 1e-6
        assert (x - y).norm().item() <= tolerance * max(y.norm().item(), least) * (10 if "adam" in key else 1), (
            key,
            (x - y).norm() / y.norm(),
        )


def comparable(key: str, x: torch.Tensor) -> torch.Tensor:
    """Without keys' biases: their gradient is zero but for rounding, and Adam blows that up to full steps."""
    if key.endswith("qkv.bias") and x.ndim:
        q, _, v = x.chunk(3)
        return torch.cat([q, v]).double()
    return x.double()


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_equal_one(two, alone, name):
    compare(two / slug(name), alone(name))


@pytest.mark.parametrize("name", SHARDED)
def test_two_sharded_processes_equal_one(two, alone, name):
    compare(two / "sharded" / slug(name), alone(name))


def test_networks_with_batch_norms_and_unused_layers_train(two):
    (log,) = (two / "batch_norm").rglob("train.jsonl")
    assert len(log.read_text().splitlines()) == STEPS
    kept = load_file(two / "batch_norm" / "checkpoint.safetensors")
    means = [k for k in kept if k.startswith("student/a/average.") and k.endswith("running_mean")]
    assert means
    assert all(torch.equal(kept[k], kept[k.replace("average.", "module.")]) for k in means), (
        "the average has the statistics too"
    )


def test_sharding_changes_nothing_in_bf16(two):
    """Parameters are gathered in float32 and cast by the block, as without sharding; the teacher's matrices travel as the bf16 they are."""
    compare(two / "bf16" / "sharded", two / "bf16" / "replicated", 1e-4)


def test_every_process_gets_whole_ordinary_models_back(two):
    for name in SHARDED:
        kept = load_file(two / "sharded" / slug(name) / "checkpoint.safetensors")
        for path in (two / "returned").glob(f"{slug(name)}.0.*"):
            student = path.suffixes[-2].removeprefix(".")
            first, second = load_file(path), load_file(str(path).replace(f"{slug(name)}.0.", f"{slug(name)}.1."))
            assert first.keys() == second.keys()
            assert all(torch.equal(first[k], second[k]) for k in first)
            if name != "fit heads":  # whose average shares the backbone
                assert {f"student/{student}/average.{k}" for k in first} == {k for k in kept if f"/{student}/average." in k}
            assert all(torch.equal(v, kept.get(f"student/{student}/average.{k}", v)) for k, v in first.items())


def large() -> HeadedBackbone:
    """13 M parameters, in matrices that two processes share unevenly."""
    torch.manual_seed(6)
    backbone = Backbone(
        BackboneConfig(arch="vit_giant", patch=8, image_size=32, dim=354, depth=6, heads=6, layer_scale=0.5, init="fan_in")
    )
    heads = HeadConfig(prototypes=4095, hidden=256, bottleneck=63, init="fan_in")
    return HeadedBackbone(backbone, DINOHead(354, heads), DINOHead(354, heads)).eval()  # fmt: skip


def test_a_sharded_model_is_read_piece_by_piece(tmp_path):
    model = large()
    save_model(tmp_path / "model", model.backbone, Preprocess(32, 32), model.heads())
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(images, None, everything)
    save_file(want | {"images": images}, tmp_path / "want.safetensors")
    launch(tmp_path, "load")


def everything(model: HeadedBackbone, features: Any) -> dict[str, torch.Tensor]:
    return {
        "cls": features.cls.contiguous(),
        "patches": features.patches.contiguous(),
        "dino": model.dino(features.cls),
        "ibot": model.ibot(features.cls),
    }


class Watched:
    """safe_open, noting how many rows are read of what."""

    def __init__(self, path: Path, framework: str):
        self.file = safe_open(path, framework=framework)

    def __enter__(self) -> Any:
        self.file.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self.file.__exit__(*args)

    def get_tensor(self, key: str) -> torch.Tensor:
        raise AssertionError(f"{key} was read whole")

    def get_slice(self, key: str) -> Any:
        return WatchedSlice(self.file.get_slice(key))


class WatchedSlice:
    def __init__(self, found: Any):
        self.found, self.get_shape = found, found.get_shape

    def __getitem__(self, rows: slice) -> torch.Tensor:
        n = self.get_shape()[0]
        assert rows.stop - rows.start <= -(-n // 2)
        return self.found[rows]


def job_load(folder: Path) -> None:
    from distill import sharding

    vars(sharding)["safe_open"] = Watched
    want = load_file(folder / "want.safetensors")
    memory = lambda: next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith("RssAnon"))  # noqa: E731, SIM115
    size = sum(p.numel() * 4 for p in large().parameters())
    gc.collect()
    before = memory()
    model = load_sharded(folder / "model")
    assert memory() - before < 0.75 * size
    assert is_sharded(model)
    assert not model.training
    with torch.no_grad():
        found = model(want["images"], None, everything)
    for key, value in found.items():
        torch.testing.assert_close(value, want[key])
    assert sum(local.numel() for p in model.parameters() if isinstance(local := p.to_local(), torch.Tensor)) < 0.52 * size / 4
    low = load_sharded(folder / "model", bf16=True)
    assert {p.dtype for n, p in low.named_parameters() if "qkv.weight" in n or "mlp.0.weight" in n} == {torch.bfloat16}
    assert {p.dtype for n, p in low.named_parameters() if "norm" in n or "last_layer" in n} == {torch.float32}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = low(want["images"], None, everything)
    assert torch.nn.functional.cosine_similarity(rough["cls"].float(), want["cls"]).min() > 0.999
    (folder / "model" / "heads.safetensors").unlink(missing_ok=True)
    torch.distributed.barrier()
    with pytest.raises(UserError, match="does not hold the weights"):
        load_sharded(folder / "model")


# 1 -> 2 -> 1 processes: each goes on from the checkpoint that the one before wrote when it was stopped.
RESUMED = {"pretrain, centre": {}, "distill, two students": {}, "pretrain, sinkhorn": {"shard": True}, "gram": {"shard": True}}
RESUMED_STEPS = 7


def stream_of(folder: Path) -> Any:
    """30 images in three parquet files, read as they come."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    from distill.data.sources import DatasetsConfig

    folder.mkdir(exist_ok=True)
    scenes = ScenesConfig(count=30, size=32).build()
    for i in range(3):
        path, cells = folder / f"{i}.parquet", []
        for j in range(10):
            scenes.image(10 * i + j).save(file := io.BytesIO(), "PNG")
            cells.append({"bytes": file.getvalue(), "path": None})
        if not path.exists():
            pq.write_table(pa.table({"image": cells}), path)
    return DatasetsConfig(name="parquet", data_files=str(folder / "*.parquet"), streaming=True, buffer=7).build()


def source_for(name: str, folder: Path) -> Any:
    return stream_of(folder / "parquet") if name in ("pretrain, centre", "gram") else None


def test_another_number_of_processes_goes_on_where_one_stopped(tmp_path):
    steps = {"steps": RESUMED_STEPS}
    for name in RESUMED:
        source = source_for(name, tmp_path)
        run(name, tmp_path / "whole" / slug(name), source=source, **steps)
        assert not run(name, tmp_path / "cut" / slug(name), source=source_for(name, tmp_path), stop=2, **steps)
        assert done_steps(tmp_path / "cut" / slug(name)) == 2
    launch(tmp_path, "resume")
    for name in RESUMED:
        cut = tmp_path / "cut" / slug(name)
        assert done_steps(cut) == 5
        run(name, cut, source=source_for(name, tmp_path), **steps)
        compare(cut, tmp_path / "whole" / slug(name))


def done_steps(folder: Path) -> int:
    with safe_open(folder / "checkpoint.safetensors", "pt") as f:
        return json.loads(f.metadata()["state"])["step"]


def job_resume(folder: Path) -> None:
    for name, runtime in RESUMED.items():
        cut, source = folder / "cut" / slug(name), source_for(name, folder)
        assert not run(name, cut, RESUMED_STEPS, source, stop=2, **runtime)  # steps 2 and 3
        assert not run(name, cut, RESUMED_STEPS, source, stop=1)  # step 4, replicated
        assert done_steps(cut) == 5


def job_cases(folder: Path) -> None:
    for name in CASES:
        run(name, folder / slug(name))
    for name in SHARDED:
        for student, average in run(name, folder / "sharded" / slug(name), shard=True).items():
            assert type(average) is HeadedBackbone
            assert not average.training
            (folder / "returned").mkdir(exist_ok=True)
            path = folder / "returned" / f"{slug(name)}.{torch.distributed.get_rank()}.{student}.safetensors"
            save_file(deepcopy(average).state_dict(), path)

    run("batch norm", folder / "batch_norm")
    for precision in ("replicated", "sharded"):
        run("bf16", folder / "bf16" / precision, shard=precision == "sharded")


if __name__ == "__main__":
    torch.set_num_threads(1)
    from accelerate import PartialState

    PartialState(cpu=True)
    globals()[f"job_{sys.argv[1]}"](Path(sys.argv[2]), *sys.argv[3:])
    torch.distributed.destroy_process_group()
