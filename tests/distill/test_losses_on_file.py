"""A tiny pretraining and a tiny distillation whose losses are on file, step by step: a refactor that changes a number is seen.

    python tests/distill/test_losses_on_file.py      writes the files anew, for a change that is meant to change losses

Images are drawn by arithmetic and not by a library, so that they are the same everywhere; crops, colours, masks, schedules, losses,
optimiser and averages are the loop's own.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data.crops import CropsConfig
from distill.data.loader import MasksConfig
from distill.losses.matching import MatchConfig
from distill.models.backbone import Backbone, BackboneConfig
from distill.models.headed import HeadedBackbone
from distill.models.heads import DINOHead, HeadConfig
from distill.models.match_head import MatchHead
from distill.objectives import ObjectivesConfig
from distill.optim import OptimConfig
from distill.progress import Progress
from distill.runtime import RuntimeConfig
from distill.train import TrainConfig, train

FILES = Path(__file__).parent / "losses"
STEPS, BATCH = 12, 8
TERMS = ("dino_global", "dino_local", "ibot", "koleo", "match_cls", "match_patches")


class Waves:
    """Forty images of three crossed waves each."""

    name = "waves"

    def __len__(self) -> int:
        return 40

    def image(self, i: int) -> Image.Image:
        y, x = np.mgrid[:40, :40] / 40
        turns = [(1 + i % 3, i % 5), (2, 1 + i % 7), (i % 4, 3)]
        waves = [np.sin(2 * np.pi * (a * x + b * y) + i) for a, b in turns]
        return Image.fromarray(np.stack([127 + 120 * w for w in waves], -1).astype(np.uint8))


def weights(model: Any, seed: int) -> Any:
    """Parameters from numpy's generator, whose numbers no release changes."""
    g = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = p[0].numel() ** -0.5 if p.dim() > 1 and "token" not in name else 0.02
            drawn = torch.from_numpy(g.normal(0, scale, p.shape)).float()
            p.copy_(1 + drawn if name.endswith(("gamma", "weight_g", "norm1.weight", "norm2.weight", "norm.weight")) else drawn)
    return model


def model(seed: int, dim: int, patch: int = 8, ffn: Any = "mlp", shared: bool = False, match: int | None = None) -> Any:
    config = BackboneConfig(patch=patch, image_size=32, dim=dim, depth=2, heads=2, ffn=ffn, registers=1, layer_scale=1.0)
    head = HeadConfig(prototypes=24, hidden=32, bottleneck=16)
    made = HeadedBackbone(
        Backbone(config),
        DINOHead(dim, head),
        None if shared else DINOHead(dim, head),
        None if match is None else MatchHead(dim, match, 24),
    )
    return weights(made, seed)


def run(name: str, folder: Path) -> str:
    """A line a step and student: step, then every term."""
    base: dict[str, Any] = {
        "images": STEPS * BATCH,
        "batch": BATCH,
        "crops": CropsConfig(global_size=32, local_size=16, local_count=2),
        "optim": OptimConfig(lr=0.01, ema=(0.9, 1.0)),
        "precision": "fp32",
    }
    if name == "pretrain":
        config = TrainConfig(**base, masks=MasksConfig(), mask_input=True)
        students, teacher = {"one": model(1, 32)}, None
    else:
        objectives = ObjectivesConfig(centring="centre", koleo_group=4, match=MatchConfig(standardize_steps=4))
        config = TrainConfig(**base, objectives=objectives)
        students = {"swiglu": model(2, 32, ffn="swiglu", match=48), "small": model(3, 16, match=48)}
        teacher = model(4, 48)
    runtime = RuntimeConfig(workers=0, threads=1, log_every=1)
    train(config, students, teacher, Waves(), "imagenet", folder, 5, runtime, Progress("quiet"))
    lines = []
    for student in students:
        log = folder / ("." if teacher is None else student) / "train.jsonl"
        for row in map(json.loads, log.read_text().splitlines()):
            terms = " ".join(f"{term} {row[term]:.6f}" for term in TERMS if term in row)
            lines.append(f"{student} step {row['step']} loss {row['loss']:.6f} {terms}")
    return "\n".join(lines) + "\n"


def read(text: str) -> dict[str, float]:
    """Value by student, step and name."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        student, _, step, *pairs = line.split()
        found |= {f"{student} {step} {n}": float(v) for n, v in zip(pairs[::2], pairs[1::2], strict=True)}
    return found


@pytest.mark.parametrize("name", ["pretrain", "distill"])
def test_losses_are_those_on_file(name, tmp_path):
    want, got = read((FILES / f"{name}.txt").read_text()), read(run(name, tmp_path))
    assert len([k for k in want if k.endswith(" loss")]) == STEPS * (1 if name == "pretrain" else 2)
    assert got == pytest.approx(want, rel=1e-4, abs=2e-6)


@pytest.mark.parametrize("name", ["pretrain", "distill"])
def test_the_losses_on_file_are_of_a_training(name):
    """Every term moves by far more than the comparison forgives."""
    values = read((FILES / f"{name}.txt").read_text())
    for key in (k for k in values if " 0 " in k and "koleo" not in k):
        student, _, term = key.split()
        course = [values[f"{student} {step} {term}"] for step in range(STEPS)]
        assert max(course) - min(course) > 0.005 * max(course), key


if __name__ == "__main__":
    import tempfile

    FILES.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    for which in ("pretrain", "distill"):
        with tempfile.TemporaryDirectory() as place:
            (FILES / f"{which}.txt").write_text(run(which, Path(place)))
