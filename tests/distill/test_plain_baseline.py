"""The benchmark's yardstick is fair: the plain step and ours compute the same losses, step after step, and the formula of their
operations is what a counter finds.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import plain
from plain import Workload, plain_step
from step import make_crops, ours, starting_weights, step_flops

TINY = Workload(
    arch="tiny",
    batch=3,
    patch=8,
    global_size=48,
    local_size=24,
    locals=3,
    prototypes=96,
    hidden=40,
    bottleneck=16,
    layer_scale=0.5,
    lr=1e-3,
)
WORKLOADS = {
    "pretrain": TINY,
    "pretrain, shared head": replace(TINY, shared_head=True),
    "distill": replace(TINY, teacher_arch="larger"),
    "distill, shared head": replace(TINY, teacher_arch="larger", shared_head=True),
}


@pytest.fixture(autouse=True)
def _small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plain.SHAPES, "tiny", (32, 2, 2))
    monkeypatch.setitem(plain.SHAPES, "larger", (48, 3, 3))


def weights_that_matter(work: Workload) -> list[dict[str, torch.Tensor]]:
    """Starting weights as in the benchmark, but large enough that losses feel every part of the model."""
    g = torch.Generator().manual_seed(1)
    models = starting_weights(work)
    for state in models:
        for name, w in state.items():
            if w.dim() > 1 and "last_layer" not in name:
                w.copy_(torch.randn(w.shape, generator=g) * max(w[0].numel(), 1) ** -0.5)
    return models


@pytest.mark.parametrize("work", WORKLOADS.values(), ids=WORKLOADS.keys())
def test_plain_and_ours_lose_the_same(work: Workload) -> None:
    crops, weights = make_crops(work), weights_that_matter(work)
    steps = plain_step(work, crops, weights, bf16=False), ours(work, crops, weights, "fp32")
    before = None
    for _ in range(4):  # after the first, losses depend on gradients, clipping, AdamW and (in pretraining) on the average too
        theirs, mine = (s() for s in steps)
        assert set(theirs) == {"dino_global", "dino_local", "ibot", "koleo"}
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)
        assert before is None or all(abs(theirs[k] - before[k]) > 1e-4 for k in theirs), (
            "the step moved nothing: this compares nothing"
        )
        before = theirs


@pytest.mark.parametrize("work", WORKLOADS.values(), ids=WORKLOADS.keys())
def test_formula_of_operations(work: Workload) -> None:
    crops, weights = make_crops(work), starting_weights(work)
    run = plain_step(work, crops, weights, bf16=False)
    run()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the fused kernel is unknown to the counter
        run()
    koleo = 2 * 2 * work.batch**2 * plain.SHAPES[work.arch][0]
    assert step_flops(work, int(crops[2].sum())) + koleo == counter.get_total_flops()
