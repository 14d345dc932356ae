"""How often the stopwatch calls equals different: one small ONNX file against itself, judged 50 times by the real `benchmark`.

    python tests/benchmarks/aa.py [--load] [--comparisons 50] [--seconds 1.0] [--rounds 20] [--threads 1] [--rate 1.0]

Every comparison opens the file as two cases (and the twin of the noise floor). At most 5 % of the verdicts may be FASTER or SLOWER.
`--load` keeps as many processes busy meanwhile as there are processors. `--rate 1.05` gives the second case 5 % more work to see
whether a true difference is found. Prints the count with a Wilson interval, and the verdicts' median width.
"""

import argparse
import math
import multiprocessing
import os
import time
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from distill.progress import Progress
from export.benchmark import BenchmarkConfig, Case, benchmark
from export.sessions import quiet_options

LAYERS = 6


def small_model() -> bytes:
    """x [batch, 3, 32, 32] through a few matrix products: about a millisecond at batch 8."""
    random = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> Any:
        return numpy_helper.from_array((random.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32), name)

    weights = [weight("first", 3 * 32 * 32, 512), *(weight(f"w{i}", 512, 512) for i in range(LAYERS))]
    nodes = [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("MatMul", ["flat", "first"], ["y0"])]
    for i in range(LAYERS):
        nodes.append(helper.make_node("MatMul", [f"y{i}", f"w{i}"], [f"m{i}"]))
        nodes.append(helper.make_node("Tanh", [f"m{i}"], [f"y{i + 1}"]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 32, 32])
    y = helper.make_tensor_value_info(f"y{LAYERS}", TensorProto.FLOAT, ["batch", 512])
    graph = helper.make_graph(nodes, "aa", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


class Session:
    """The model in ONNX Runtime; `rate` above 1 makes each call that much longer, by spinning."""

    def __init__(self, model: bytes, rate: float, threads: int):
        self.session = onnxruntime.InferenceSession(model, quiet_options(threads), providers=["CPUExecutionProvider"])
        self.conditions = {"runtime": f"onnxruntime {onnxruntime.__version__}", "device": "cpu", "threads": threads}
        self.rate = rate

    def __call__(self, images: Any) -> object:
        start = time.perf_counter()
        found = self.session.run(None, {"x": images.numpy()})
        until = start + (time.perf_counter() - start) * self.rate
        while time.perf_counter() < until:
            pass
        return found


def burn() -> None:
    """Keep a processor busy for ever, as a neighbour's matrix products would."""
    x = np.random.default_rng().standard_normal((400, 400))
    while True:
        x = np.tanh(x @ x / 20)


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (E. B. Wilson 1927)."""
    centre, half = (k + z * z / 2) / (n + z * z), z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return max(0.0, centre - half), min(1.0, centre + half)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--openings", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--load", action="store_true")
    args = parser.parse_args()
    burners = [multiprocessing.Process(target=burn, daemon=True) for _ in range(os.cpu_count() or 1 if args.load else 0)]
    for b in burners:
        b.start()
    model, found, busy, unwidened = small_model(), [], [], 0
    config = BenchmarkConfig(
        batches=[8], seconds=args.seconds, rounds=args.rounds, openings=args.openings, warmup_seconds=0.2, threads=args.threads
    )
    cases = [
        Case("model", name, 32, partial(Session, model, rate)) for name, rate in (("onnx-fp32", 1.0), ("onnx-again", args.rate))
    ]
    with Progress("plain").task("a/a", args.comparisons, "comparisons") as task:
        for _ in range(args.comparisons):
            rows = benchmark(config, cases, Progress("quiet"))
            row = next(r for r in rows if r.metric == "latency_ratio")
            floor = 1 + row.conditions["noise_floor_percent"] / 100
            if row.low is not None and row.high is not None:
                unwidened += row.low * floor > 1 or row.high / floor < 1
            found.append(row)
            busy.append(row.conditions["other_cores_busy"])
            task.advance(verdicts=sum(r.conditions["verdict"] != "INCONCLUSIVE" for r in found))
    for b in burners:
        b.terminate()
    counts = Counter(r.conditions["verdict"] for r in found)
    called, n = n_called(counts), len(found)
    low, high = wilson(called, n)
    widths = [r.high / r.low - 1 for r in found if r.low and r.high]
    print(f"{dict(counts)}; others kept {np.median(busy):.2f} of {os.cpu_count()} processors busy (median)")
    print(f"FASTER or SLOWER: {called} of {n}, {100 * called / n:.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
    print(f"without the noise floor: {unwidened} of {n}; ratio {np.median([r.value or 0 for r in found]):.3f} (median)")
    print(f"width of the judged interval: {100 * np.median(widths):.1f} % (median)" if widths else "no intervals")


def n_called(counts: "Counter[str]") -> int:
    return counts["FASTER"] + counts["SLOWER"]


if __name__ == "__main__":
    main()
