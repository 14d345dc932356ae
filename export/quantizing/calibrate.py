"""Calibration: the graph runs over training images, and each layer in turn gets its scale, smoothing, rounding and bias shift.

Layer after layer (`export/graphs/segments.py`), with the inputs that it really gets: those that the quantized layers before it make.
What was chosen is a `Calibration`: quantize the same student's graph in another floating-point type with it, and both agree.

Shape legend: K input channels, N output channels, n rows (tokens of all images).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto
from torch import Tensor

from distill.errors import UserError
from export.graphs.nodes import element_types, load_graph
from export.graphs.segments import LIVE_BYTES, PIECE_BYTES, Pieces, Walk
from export.quantizing.calibration import Calibration, LayerCalibration, stored_codes
from export.quantizing.histogram import Histogram
from export.quantizing.matrices import has_rows, input_rows, matrix_of, node_weight
from export.quantizing.plan import PlanEntry, lift_constants, plan_graph
from export.quantizing.quantize_config import ACTIVATION_GRID, INT8, WEIGHT_GRID, Grid, QuantizeConfig
from export.quantizing.rounding import round_compensated, round_nearest, spread, weight_scales
from export.quantizing.smoothing import ALPHAS, find_folds, smoothing_factors

SEARCH_ROWS = 2048
Given = Callable[[np.ndarray], np.ndarray]
FIRST_TOKEN = (
    0.1  # share of the first token in what is averaged over tokens: the class token is one of hundreds, and half of the output
)
ONE_SIDED = 0.25  # of the largest value: inputs that go no further below zero get an offset
UNSIGNED = Grid("int8", 0, 254)


def calibrate(source: ModelProto | Path, images: Tensor, config: QuantizeConfig, precision: str = "int8") -> Calibration:
    """Choose everything that a quantized graph needs beside the float one.

    Args:
        source: an FP32 graph or its file.
        images: preprocessed training images [n, 3, H, W]; the first `config.images` are used, fewer if their activations would
            take more than LIVE_BYTES.
        precision: int8, fp8, w8 or w4.

    Raises:
        UserError: no images, an activation that is not finite, a graph that is not FP32, or see `plan_graph`.
    """
    model = lift_constants(load_graph(source) if isinstance(source, Path) else source)
    if not len(images):
        raise UserError("Quantization needs calibration images and got none; give the data section a training set.")
    types = element_types(model)
    plan = [e for e in plan_graph(model, config, precision) if e.quantized]
    nodes = {n.name: n for n in model.graph.node}
    if wrong := [e.layer for e in plan if types[nodes[e.layer].output[0]] != "FLOAT"]:
        raise UserError(
            f"Calibration runs on an FP32 graph, but {wrong[0]} is {types[nodes[wrong[0]].output[0]]}; export fp32."
        )
    array = images[: config.images].float().contiguous().numpy()
    walker = _Calibrator(model, plan, array, config, precision)
    layers = walker.run()
    used = array[: walker.images]
    digest = hashlib.sha256(np.ascontiguousarray(used).tobytes()).hexdigest()
    return Calibration(precision, layers, len(used), digest, chosen_codes=config.rounding == "compensated")


class _Calibrator:
    """The walk through the graph and what has been chosen so far."""

    def __init__(self, model: ModelProto, plan: list[PlanEntry], images: np.ndarray, config: QuantizeConfig, precision: str):
        self.model, self.plan, self.config, self.precision = model, plan, config, precision
        self.stored = {t.name: t for t in model.graph.initializer}
        self.pieces = Pieces(model, [e.layer for e in plan])
        self.weight_grid: Grid = WEIGHT_GRID[precision]
        self.input_grid: Grid | None = ACTIVATION_GRID.get(precision)
        self.folds = find_folds(model, config.attention is True) if config.smooth is not None and self.input_grid else {}
        # Corrections compare what a layer gives with what it should give: that takes a second, floating-point walk.
        self.compensates = config.rounding == "compensated"
        self.corrects = config.bias_correction or self.compensates
        size, limit = self._memory(images[:1]) if self.input_grid or self.corrects else (1, len(images))
        self.images = max(1, min(len(images), limit))
        chunk = max(1, min(16, PIECE_BYTES // max(1, size)))
        self.float_walk = Walk(images[: self.images], chunk)
        self.walk = Walk(images[: self.images], chunk) if self.corrects else self.float_walk
        self.done: dict[str, LayerCalibration] = {}
        self.smoothed: dict[str, np.ndarray | None] = {}  # tensor -> s; layers that read the same share it
        self.scales: dict[str, tuple[float, int]] = {}  # tensor -> (scale, offset)

    def run(self) -> dict[str, LayerCalibration]:
        if self.input_grid is None and not self.corrects:  # weights alone, each rounded to the nearest: no image tells anything
            for entry in self.plan:
                self._layer({n.name: n for n in self.model.graph.node}[entry.layer], entry)
            return self.done
        fed: _Fed | None = None
        for i, entry in enumerate(self.plan):
            self._advance(i, fed)
            node = self.pieces.layer(i)
            made = self._product(node) if entry.kind == "Product" else self._layer(node, entry)
            fed = made if self.corrects else None
        return self.done

    def _memory(self, image: np.ndarray) -> tuple[int, int]:
        """(largest bytes of one image's values at a cut, how many images fit into LIVE_BYTES), by running one."""
        walk, peak = Walk(image, 1), 1
        for i in range(len(self.plan)):
            piece = self.pieces.session(i, [])
            walk.chunks[0].update(piece.run(walk.chunks[0], self._no_shift(i)))
            peak = max(peak, walk.nbytes())
            walk.keep(self.pieces.survivors(i))
        return peak, LIVE_BYTES // (peak * (2 if self.corrects else 1))

    def _no_shift(self, i: int) -> dict[str, np.ndarray]:
        return {"fed.shift": np.zeros((), np.float32)} if i else {}

    def _advance(self, i: int, fed: "_Fed | None") -> None:
        """Run piece i on every chunk of both walks."""
        plain = self.pieces.session(i, [])
        if self.corrects:
            special = self.pieces.session(i, sorted(fed.inputs)) if fed is not None else plain
            for c, live in enumerate(self.walk.chunks):
                live.update(special.run(live, fed.chunk(c, live) if fed is not None else self._no_shift(i)))
        for live in self.float_walk.chunks:
            live.update(plain.run(live, self._no_shift(i)))
        names = self.pieces.survivors(i)
        self.walk.keep(names)
        if self.corrects:
            self.float_walk.keep(names)

    def _product(self, node: NodeProto) -> "_Fed":
        """Scales of an attention product's two inputs. A softmax's largest value is 1."""
        assert self.input_grid is not None
        scales = [self._input_scale(name, None, False)[0] for name in node.input]
        self.done[node.name] = LayerCalibration(input_scale=scales[0], right_scale=scales[1])
        grid = self.input_grid
        inputs: dict[int, tuple[str, Given]] = {
            k: (name, partial(grid.fake, scale=scales[k])) for k, name in enumerate(node.input)
        }
        return _Fed(inputs, {}, np.zeros((), np.float32))

    def _input_scale(self, tensor: str, smooth: np.ndarray | None, may_move: bool) -> tuple[float, int]:
        """(scale, offset) of a tensor."""
        assert self.input_grid is not None
        if tensor not in self.scales:
            low, high = self._range(tensor)
            moves = may_move and smooth is None and self.input_grid is INT8 and 0 <= -low < high * ONE_SIDED
            base, grid = (low, UNSIGNED) if moves else (0.0, self.input_grid)
            histogram = Histogram()
            for values in self.walk.values(tensor):
                histogram.add(values - base if smooth is None else values / smooth)
            scale = histogram.clip_point(self.config, grid) / grid.high
            self.scales[tensor] = scale, (round(low / scale) + 127 if moves else 0)
        return self.scales[tensor]

    def _range(self, tensor: str) -> tuple[float, float]:
        return min(float(v.min()) for v in self.walk.values(tensor)), max(float(v.max()) for v in self.walk.values(tensor))

    def _layer(self, node: NodeProto, entry: PlanEntry) -> "_Fed":
        tensor, weight = node.input[0], node_weight(node, self.stored)
        assert weight is not None
        if tensor in self.folds and tensor not in self.smoothed:
            self.smoothed[tensor] = self._choose_smoothing(tensor)
        smooth = self.smoothed.get(tensor)
        matrix = weight.astype(np.float64) * (1.0 if smooth is None else smooth[:, None])
        scale, offset = (
            (None, 0)
            if self.input_grid is None
            else self._input_scale(tensor, smooth, self.config.offset and entry.kind == "Linear")
        )

        def given(x: np.ndarray) -> np.ndarray:
            """What the quantized layer's matrix product gets, of rows or of the whole tensor."""
            if smooth is not None:
                x = x / smooth
            if scale is None or self.input_grid is None:
                return x
            if not offset:
                return self.input_grid.fake(x, scale)
            return (self.input_grid.round(x / scale - offset) + offset) * scale

        block = self.config.block if self.precision == "w4" else None
        moments = self._moments(node, given, smooth) if self.corrects and has_rows(node, self.stored) else None
        scales = weight_scales(matrix, self.weight_grid, self.config.weights, block).astype(np.float32)
        if moments is not None and self.compensates:
            codes = round_compensated(matrix, scales, self.weight_grid, moments.second)
        else:
            codes = round_nearest(matrix, scales, self.weight_grid)
        shift = None
        if moments is not None and self.config.bias_correction:
            shift = (moments.float_mean @ matrix - moments.mean @ (codes * spread(scales, len(codes)))).astype(np.float32)
        self.done[node.name] = LayerCalibration(
            input_scale=scale,
            offset=offset,
            weight_scale=scales,
            smooth=smooth,
            shift=shift,
            codes=stored_codes(codes, self.weight_grid) if self.compensates else None,
        )
        rounded = (codes * spread(scales, len(codes))).astype(np.float32)
        add = np.zeros((), np.float32) if shift is None else shift
        if node.op_type == "Conv":
            add = add.reshape(-1, 1, 1) if shift is not None else add
        return _Fed({0: (tensor, given)}, {1: matrix_of(rounded, node, self.stored)}, add)

    def _moments(self, node: NodeProto, given: Given, smooth: np.ndarray | None) -> "_Moments":
        """Of the layer's quantized inputs in the walk, and the mean of the float ones."""
        size = len(node_weight(node, self.stored))
        second, sums, float_sums, count = np.zeros((size, size)), np.zeros(size), np.zeros(size), 0.0
        for mine, exact in zip(self.walk.values(node.input[0]), self.float_walk.values(node.input[0]), strict=True):
            x, wanted = input_rows(given(mine), node, self.stored), input_rows(exact, node, self.stored)
            weights = row_weights(mine, len(x))
            if self.compensates:
                second += x.T @ (x * weights[:, None])
            sums += weights @ x
            float_sums += weights @ wanted
            count += float(weights.sum())
        mean, float_mean = sums / count, float_sums / count / (1.0 if smooth is None else smooth)
        second = second / count
        if self.config.bias_correction:  # the bias takes the means, the codes the rest
            second -= np.outer(mean, mean)
        return _Moments(second, mean, float_mean)

    def _choose_smoothing(self, tensor: str) -> np.ndarray | None:
        """The factors for all layers that read a tensor: with the asked alpha, or with that of the least output error."""
        assert self.input_grid is not None
        readers = [n for n in self.model.graph.node if tensor in n.input[:1] and n.name in self.pieces.cuts]
        weight = np.concatenate([node_weight(n, self.stored) for n in readers], 1).astype(np.float32)  # type: ignore[arg-type]
        peaks = np.max([np.abs(v).max(tuple(range(v.ndim - 1))) for v in self.walk.values(tensor)], 0)
        weight_peaks = np.abs(weight).max(1)
        if not isinstance(self.config.smooth, str):
            assert self.config.smooth is not None
            return smoothing_factors(peaks, weight_peaks, self.config.smooth).astype(np.float32)
        rows = np.concatenate([_sample(v, SEARCH_ROWS // len(self.walk.chunks)) for v in self.walk.values(tensor)])
        wanted, best, least = rows @ weight, np.ones(len(peaks)), np.inf
        for alpha in (None, *ALPHAS):
            factors = np.ones(len(peaks)) if alpha is None else smoothing_factors(peaks, weight_peaks, alpha)
            error = self._output_error(rows / factors.astype(np.float32), weight * factors.astype(np.float32)[:, None], wanted)
            if error < least:
                best, least = factors, error
        return best.astype(np.float32)

    def _output_error(self, rows: np.ndarray, weight: np.ndarray, wanted: np.ndarray) -> float:
        assert self.input_grid is not None
        histogram = Histogram()
        histogram.add(rows)
        scale = histogram.clip_point(self.config, self.input_grid) / self.input_grid.high
        scales = weight_scales(weight, self.weight_grid, "minmax")
        got = self.input_grid.fake(rows, scale) @ self.weight_grid.fake(weight, scales[None].astype(np.float32))
        return float(((got - wanted) ** 2).sum())


@dataclass
class _Moments:
    """Second moments [K, K] of a layer's quantized inputs (about their mean, where the bias is corrected), their mean [K], and that
    of the float inputs."""

    second: np.ndarray
    mean: np.ndarray
    float_mean: np.ndarray


def row_weights(values: np.ndarray, rows: int) -> np.ndarray:
    """How much each of n rows of a layer's input counts: of [B, T, K] the first token as much as FIRST_TOKEN of all tokens."""
    weights = np.ones(rows, np.float32)
    if values.ndim == 3:
        weights[:: values.shape[1]] = max(1.0, FIRST_TOKEN * values.shape[1])
    return weights


def _sample(values: np.ndarray, rows: int) -> np.ndarray:
    """About so many rows [n, K] at even distances, and every image's first token."""
    flat = values.reshape(-1, values.shape[-1])
    spread_out = flat[:: max(1, len(flat) // max(1, rows))]
    return spread_out if values.ndim != 3 else np.concatenate([values[:, 0], spread_out])


class _Fed:
    """What a piece's layer is given in the quantized walk: inputs made from live values, constants, the bias shift."""

    def __init__(self, inputs: dict[int, tuple[str, Given]], constants: dict[int, np.ndarray], shift: np.ndarray):
        self.sources, self.constants, self.shift = inputs, constants, shift

    @property
    def inputs(self) -> list[int]:
        return [*self.sources, *self.constants]

    def chunk(self, c: int, live: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        made = {f"fed.{k}": np.asarray(f(live[name]), np.float32) for k, (name, f) in self.sources.items()}
        return made | {f"fed.{k}": v for k, v in self.constants.items()} | {"fed.shift": self.shift}
