"""A table of block latencies on the runtime that will serve the model, which pruning for measured latency reads as its cost.

Measured are whole small networks as they will be shipped: 4 blocks of one width, 1 block once for each embedding width (what is left when
blocks are taken off: patches, positions, final norm). Every network is timed in turns with a reference network, and its latency is the
median ratio times the reference's: other load on the machine slows both and cancels.

Between measured points latency is interpolated linearly: over the embedding width, and at each over heads and over hidden widths, whose
effects are added. Outside of them the table knows nothing and says so. What a table predicts is a guide for choosing, never a result:
`against_measured` times the network that was chosen.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import torch

from distill.errors import UserError
from distill.files import read_json, write_json
from distill.models.backbone import Backbone, BackboneConfig, BlockWidths
from export.graph import INPUT, serialize, torch_graph
from export.graphs.typed import retype
from export.runtimes import load_openvino
from export.sessions import quiet_options

FORMAT = "decant-latency-1"
DEEP = 4  # blocks of a measured network
ROUNDS = 7  # turns with the reference

Build = Callable[[Backbone, int], bytes]
Run = Callable[[np.ndarray], Any]
Clock = Callable[[], float]
LatencyRuntime = Literal["onnxruntime", "openvino"]


@dataclass(frozen=True)
class Point:
    """A small network: `depth` blocks of these widths."""

    dim: int
    heads: int
    hidden: int
    depth: int

    def key(self) -> str:
        return f"{self.dim}x{self.heads}x{self.hidden}x{self.depth}"


@dataclass(frozen=True)
class Grid:
    """The widths that are measured, each ascending. The last of each is the unpruned network's."""

    dims: list[int]
    heads: list[int]
    hidden: list[int]

    def points(self) -> list[Point]:
        found = []
        for dim in self.dims:
            found += [Point(dim, h, self.hidden[-1], DEEP) for h in self.heads]
            found += [Point(dim, self.heads[-1], i, DEEP) for i in self.hidden[:-1]]
            found.append(Point(dim, self.heads[-1], self.hidden[-1], 1))
        return found


def grid_of(config: BackboneConfig, least: float = 0.25, round_to: int = 16, steps: int = 4) -> Grid:
    """`steps` widths of each kind, from `least` of the network's own to all of it; of what `PruneConfig` of the same name can reach."""

    def even(full: int, multiple: int) -> list[int]:
        low = min(max(multiple, int(least * full) // multiple * multiple), full)
        return sorted({*(int(v) // multiple * multiple for v in np.linspace(low, full, steps)[1:-1]), low, full})

    wide = config.widths()
    return Grid(
        even(config.shape()[0], round_to), even(max(b.heads for b in wide), 1), even(max(b.hidden for b in wide), round_to)
    )


class LatencyTable:
    """Milliseconds at batch 1 of networks like `config`, by their widths. Measured points are kept in a JSON file, one by one, so that a
    measurement that was interrupted goes on where it was, and a finished one costs nothing.

    Args:
        config: the unpruned network; everything but its widths is the same for all.
        build: (backbone, pixels) -> the model file as it is shipped; without it the float graph of `precision`. An INT8 table needs
            one that quantizes (random calibration images do: latency does not depend on scales).
        precision: label, and for OpenVINO what floating-point operations compute in (fp32, bf16).

    Raises:
        UserError: the file is no table, or one of other conditions.
        EnvironmentFailed: the runtime is not installed.
    """

    def __init__(
        self,
        config: BackboneConfig,
        size: int,
        path: Path,
        runtime: LatencyRuntime = "onnxruntime",
        precision: str = "fp32",
        threads: int = 1,
        build: Build | None = None,
        grid: Grid | None = None,
        clock: Clock = time.perf_counter,
    ):
        if build is None and precision not in ("fp32", "fp16", "bf16"):
            raise UserError(f"A latency table of {precision} needs a way to build such a graph; use fp32, fp16 or bf16.")
        self.config, self.size, self.path, self.clock = config, size, path, clock
        self.runtime, self.precision, self.threads = runtime, precision, threads
        self.build: Build = build or self._float_graph
        self.grid = grid or grid_of(config)
        self.reference_point = Point(self.grid.dims[-1], self.grid.heads[-1], self.grid.hidden[-1], DEEP)
        self.points = self._kept()
        self._reference: Run | None = None

    def conditions(self) -> dict[str, Any]:
        """What a latency depends on besides the widths."""
        same = ("patch", "registers", "ffn", "layer_scale")
        network = {k: v for k, v in self.config.model_dump().items() if k in same}
        network["ffn"] = self.config.shape()[3]
        network["layer_scale"] = bool(network["layer_scale"])
        version = onnxruntime.__version__ if self.runtime == "onnxruntime" else load_openvino().get_version()
        return network | {
            "head_dim": self.config.head_width(),
            "resolution": self.size,
            "runtime": f"{self.runtime} {version}",
            "precision": self.precision,
            "threads": self.threads,
            "cpu": _cpu(),
        }

    def _kept(self) -> dict[str, float]:
        if not self.path.is_file():
            return {}
        try:
            kept = read_json(self.path)
        except ValueError as e:
            raise UserError(f"{self.path} is no latency table ({e}). Delete it, and it is measured again.") from e
        if not isinstance(kept, dict) or kept.get("format") != FORMAT:
            raise UserError(f"{self.path} is no latency table. Delete it, and it is measured again.")
        wanted = self.conditions()
        differing = sorted(k for k in wanted if kept["conditions"].get(k) != wanted[k])
        if differing:
            k = differing[0]
            raise UserError(
                f"{self.path} was measured with {k} {kept['conditions'].get(k)!r} and is asked for {wanted[k]!r}. "
                "Delete it, and it is measured again."
            )
        return dict(kept["ms"])

    def measure(self, on_point: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Measure whatever point of the grid is missing. `on_point(done, total)` is called after each."""
        wanted = [self.reference_point, *(p for p in self.grid.points() if p != self.reference_point)]
        for done, point in enumerate(wanted, 1):
            if point.key() not in self.points:
                self.points[point.key()] = self._time(point)
                write_json(self.path, {"format": FORMAT, "conditions": self.conditions(), "ms": self.points})
            on_point(done, len(wanted))

    def _time(self, point: Point) -> float:
        image = self._image()
        if point == self.reference_point:
            return float(np.median([_once(self._reference_run(), image, self.clock) for _ in range(2 * ROUNDS)])) * 1e3
        backbone = Backbone(self._network([BlockWidths(heads=point.heads, hidden=point.hidden)] * point.depth, point.dim))
        return self._against_reference(self._opened(backbone.eval()), image)

    def _against_reference(self, run: Run, image: np.ndarray) -> float:
        reference = self._reference_run()
        ratios = []
        for _ in range(ROUNDS):
            run(image)  # caches hold this network again
            one = _once(run, image, self.clock)
            reference(image)
            ratios.append(one / _once(reference, image, self.clock))
        return float(np.median(ratios)) * self.points[self.reference_point.key()]

    def _reference_run(self) -> Run:
        if self._reference is None:
            p = self.reference_point
            network = Backbone(self._network([BlockWidths(heads=p.heads, hidden=p.hidden)] * p.depth, p.dim))
            self._reference = self._opened(network.eval())
        return self._reference

    def _network(self, blocks: list[BlockWidths], dim: int) -> BackboneConfig:
        changes = {"dim": dim, "head_dim": self.config.head_width(), "blocks": blocks, "heads": None, "depth": None}
        # Values do not matter to latency as long as they are ordinary: fresh weights of this kind keep activations near 1.
        scale = 1.0 if self.config.layer_scale else 0.0
        return self.config.model_copy(update=changes | {"init": "fan_in", "layer_scale": scale})

    def _image(self) -> np.ndarray:
        return np.random.default_rng(0).standard_normal((1, 3, self.size, self.size), np.float32)

    def _opened(self, backbone: Backbone) -> Run:
        with torch.random.fork_rng():
            return opened(self.build(backbone, self.size), self.runtime, self.precision, self.threads)

    def _float_graph(self, backbone: Backbone, size: int) -> bytes:
        model = torch_graph(backbone, size)
        # OpenVINO takes the FP32 graph and computes in what it is told to.
        return serialize(retype(model, self.precision) if self.runtime == "onnxruntime" else model)  # type: ignore[arg-type]

    def cost(self, config: BackboneConfig) -> float:
        """Predicted milliseconds at batch 1: interpolated between measured points, linearly.

        Raises:
            UserError: a width lies outside of what was measured, or `measure` has not finished.
        """
        dim = config.shape()[0]
        (a, b), share = _between(self.grid.dims, dim, "dim")
        low, high = (self._at(d, config.widths()) for d in (a, b))
        return low + share * (high - low)

    def saving(self, before: BackboneConfig, after: BackboneConfig) -> float:
        """Predicted milliseconds that a cut saves."""
        return self.cost(before) - self.cost(after)

    def _at(self, dim: int, blocks: Iterable[BlockWidths]) -> float:
        """Milliseconds of a network of a measured embedding width."""
        heads, hidden = self.grid.heads, self.grid.hidden
        full = self._point(dim, heads[-1], hidden[-1], DEEP)
        block = (full - self._point(dim, heads[-1], hidden[-1], 1)) / (DEEP - 1)
        total = full - DEEP * block  # patches, positions, final norm
        for b in blocks:
            (h0, h1), h = _between(heads, b.heads, "heads")
            (i0, i1), i = _between(hidden, b.hidden, "hidden")
            by_heads = _mix(self._point(dim, h0, hidden[-1], DEEP), self._point(dim, h1, hidden[-1], DEEP), h)
            by_hidden = _mix(self._point(dim, heads[-1], i0, DEEP), self._point(dim, heads[-1], i1, DEEP), i)
            total += block - (full - by_heads) / DEEP - (full - by_hidden) / DEEP
        return total

    def _point(self, dim: int, heads: int, hidden: int, depth: int) -> float:
        found = self.points.get(Point(dim, heads, hidden, depth).key())
        if found is None:
            raise UserError(f"{self.path} was not measured to its end; call `measure` first.")
        return found

    def against_measured(self, backbone: Backbone) -> dict[str, Any]:
        """What the table says of a network, and what it takes: {"predicted_ms", "measured_ms", "error" (share of the measured)}."""
        predicted = self.cost(backbone.config)
        measured = self._against_reference(self._opened(backbone), self._image())
        return {
            "predicted_ms": round(predicted, 3),
            "measured_ms": round(measured, 3),
            "error": round((predicted - measured) / measured, 4),
            "conditions": self.conditions(),
        }


def _mix(a: float, b: float, share: float) -> float:
    return a + share * (b - a)


def _between(measured: list[int], value: int, name: str) -> tuple[tuple[int, int], float]:
    """The measured neighbours of a width, and how far it lies from the first to the second."""
    if not measured[0] <= value <= measured[-1]:
        raise UserError(
            f"{name} {value} lies outside of the latency table, which was measured from {measured[0]} to {measured[-1]}; "
            "measure a table of this network with a smaller prune.least."
        )
    if value == measured[0]:
        return (value, value), 0.0
    j = int(np.searchsorted(measured, value))
    a, b = measured[j - 1], measured[j]
    return (a, b), (value - a) / (b - a)


def _once(run: Run, image: np.ndarray, clock: Clock) -> float:
    start = clock()
    run(image)
    return clock() - start


def opened(model: bytes, runtime: LatencyRuntime, precision: str, threads: int) -> Run:
    """A model file on a CPU runtime, as a function of images [1, 3, H, W]."""
    if runtime == "onnxruntime":
        session = onnxruntime.InferenceSession(model, quiet_options(threads), providers=["CPUExecutionProvider"])
        return lambda image: session.run(None, {INPUT: image})
    ov = load_openvino()
    network = ov.Core().read_model(model)
    network.reshape({INPUT: [1, *list(network.input(INPUT).partial_shape)[1:]]})
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    hint = {"fp32": "f32", "bf16": "bf16"}.get(precision)
    request = (
        ov.Core()
        .compile_model(network, "CPU", hints | ({"INFERENCE_PRECISION_HINT": hint} if hint else {}))
        .create_infer_request()
    )
    return lambda image: request.infer({INPUT: image}, share_inputs=True)


def _cpu() -> str:
    """The processor's model name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        import platform

        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
