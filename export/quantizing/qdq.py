"""Put a calibration into a graph: smoothing folded away, weights stored as codes, Q/DQ before every quantized input.

    x -> QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear <- int8 weight [K, N]

Shape legend: K input channels, N output channels.
"""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from distill.errors import UserError
from export.graphs.nodes import PRODUCTS, constants, element_types, set_constants
from export.quantizing.calibration import Calibration, LayerCalibration
from export.quantizing.matrices import matrix_of, node_weight, output_axis
from export.quantizing.plan import PlanEntry
from export.quantizing.quantize_config import ACTIVATION_GRID, WEIGHT_GRID, QuantizeConfig
from export.quantizing.rounding import round_nearest, spread, weight_scales
from export.quantizing.smoothing import find_folds

SMALLEST_HALF_SCALE = 2.0**-20  # a half float of 4 bits; smaller ones would round the scale itself away
STORED = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn), "int4": np.dtype(ml_dtypes.int4)}


@dataclass
class _Change:
    """What happens to one Linear layer or convolution: `rows` [K] multiply its weight, `outputs` [N] divide what it gives,
    `shift` [N] is added to its bias before that."""

    rows: np.ndarray | None = None
    outputs: np.ndarray | None = None
    shift: np.ndarray | None = None


@dataclass
class _Edit:
    """A graph being rewritten: new constants, and new nodes before and after the old ones (by the old ones' first output)."""

    model: ModelProto
    new: dict[str, TensorProto] = field(default_factory=dict)
    before: dict[str, list[NodeProto]] = field(default_factory=lambda: defaultdict(list))
    after: dict[str, list[NodeProto]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self.stored, self.types = constants(self.model), element_types(self.model)
        self.nodes = {n.name: n for n in self.model.graph.node}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.model.graph.node:
            for name in node.input:
                self.readers[name].append(node)

    def constant(self, name: str, values: np.ndarray) -> str:
        self.new[name] = tensor_of(values, name)
        return name

    def finish(self, keys: list[str]) -> None:
        """`keys`: the nodes' first outputs before any of them was renamed."""
        nodes: list[NodeProto] = []
        for key, node in zip(keys, self.model.graph.node, strict=True):
            for each in (*self.before[key], node, *self.after[key]):
                copy = NodeProto()
                copy.CopyFrom(each)
                nodes.append(copy)
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)
        set_constants(self.model, [*self.model.graph.initializer, *self.new.values()])


def insert(model: ModelProto, calibration: Calibration, config: QuantizeConfig, plan: list[PlanEntry]) -> list[PlanEntry]:
    """Rewrite `model` in place as `plan` decides and return the plan with its scales.

    Raises:
        UserError: the calibration does not fit the graph.
    """
    edit = _Edit(model)
    keys = [n.output[0] for n in model.graph.node]
    chosen = {e.layer: calibration.layers[e.layer] for e in plan if e.quantized}
    changes = _fold(edit, chosen, config)
    scales: dict[str, tuple[float, float]] = {}
    inputs: dict[str, float] = {}
    quantizer = _Inputs(edit, calibration.precision)
    for key, node in zip(keys, model.graph.node, strict=True):
        if node.op_type not in PRODUCTS:
            continue
        layer, change = chosen.get(node.name), changes[node.name]
        if layer is None:
            _keep(edit, node, change)
        elif node.input[1] in edit.stored:
            weight, scale = _quantize_weight(edit, key, node, layer, change, calibration, config)
            scales[node.name] = float(scale.min()), float(scale.max())
            change.shift = layer.shift
            if layer.offset:
                moved = quantizer.constant(node, layer) * weight.sum(0)
                if change.outputs is not None:
                    moved = moved * change.outputs
                change.shift = moved if layer.shift is None else layer.shift + moved
        if layer is not None and layer.input_scale is not None:
            inputs[node.name] = quantizer.insert(key, node, 0, layer.input_scale, layer.offset)
        if layer is not None and layer.right_scale is not None:
            quantizer.insert(key, node, 1, layer.right_scale)
        if change.shift is not None or change.outputs is not None:
            _shift_bias(edit, key, node, change)
    edit.finish(keys)
    return [_with_scales(e, inputs.get(e.layer), scales.get(e.layer)) for e in plan]


def tensor_of(values: np.ndarray, name: str) -> TensorProto:
    values = np.asarray(values)
    return numpy_helper.from_array(np.ascontiguousarray(values) if values.ndim else values, name)


def scale_array(scale: Any, dtype: np.dtype) -> np.ndarray:
    """Scales in the type of what they scale, none of them rounded away."""
    floor = SMALLEST_HALF_SCALE if dtype == np.float16 else float(np.finfo(np.float32).tiny)
    return np.maximum(np.asarray(scale), floor).astype(dtype)


def _with_scales(entry: PlanEntry, scale: float | None, weights: tuple[float, float] | None) -> PlanEntry:
    low, high = weights or (None, None)
    return replace(entry, input_scale=scale, weight_scale_min=low, weight_scale_max=high)


def _fold(edit: _Edit, chosen: dict[str, LayerCalibration], config: QuantizeConfig) -> dict[str, _Change]:
    """Fold the smoothing of every quantized layer into what makes its input; what that does to Linear layers is returned."""
    changes: dict[str, _Change] = defaultdict(_Change)
    tensors = {edit.nodes[name].input[0]: (name, c.smooth) for name, c in chosen.items() if c.smooth is not None}
    if not tensors:
        return changes
    folds = find_folds(edit.model, config.attention is True)
    for tensor, (name, factors) in tensors.items():
        assert factors is not None
        fold = folds.get(tensor)
        if fold is None:
            raise UserError(f"{name} was smoothed in calibration, but in this graph nothing before it can take the factors.")
        for reader in edit.readers[tensor]:
            changes[reader.name].rows = factors
        if fold.kind == "linear":
            assert fold.columns is not None
            outputs = np.ones(node_weight(edit.nodes[fold.node], edit.stored).shape[1])
            outputs[fold.columns] = factors
            changes[fold.node].outputs = outputs
            continue
        norm = next(n for n in edit.model.graph.node if n.output[0] == fold.node)
        for k in range(1, len(norm.input)):
            if norm.input[k]:  # each LayerNorm gets its own: equal ones are stored once
                old = numpy_helper.to_array(edit.stored[norm.input[k]])
                new = (old.astype(np.float64) / factors).astype(old.dtype)
                norm.input[k] = edit.constant(f"{norm.name}.{'weight' if k == 1 else 'bias'}_smoothed", new)
    return changes


def _keep(edit: _Edit, node: NodeProto, change: _Change) -> None:
    """A layer in floating point takes part in the smoothing of its neighbours."""
    if change.rows is None and change.outputs is None:
        return
    values = node_weight(node, edit.stored)
    new = values.astype(np.float64)
    if change.rows is not None:
        new = new * change.rows[:, None]
    if change.outputs is not None:
        new = new / change.outputs
    node.input[1] = edit.constant(f"{node.name}.weight_smoothed", matrix_of(new.astype(values.dtype), node, edit.stored))


def _quantize_weight(
    edit: _Edit,
    key: str,
    node: NodeProto,
    layer: LayerCalibration,
    change: _Change,
    calibration: Calibration,
    config: QuantizeConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and the DequantizeLinear that feeds the layer; returns the dequantized weight [K, N] and its scales."""
    tensor, values = edit.stored[node.input[1]], node_weight(node, edit.stored)
    grid, block = WEIGHT_GRID[calibration.precision], config.block if calibration.precision == "w4" else None
    matrix = values.astype(np.float64) * (1.0 if change.rows is None else change.rows[:, None])
    scale = weight_scales(matrix, grid, config.weights, block) if layer.weight_scale is None else layer.weight_scale
    wanted = (len(matrix) // block, matrix.shape[1]) if block else matrix.shape[1:]
    if scale.shape != wanted or (layer.codes is not None and layer.codes.shape != matrix.shape):
        raise UserError(
            f"The calibration of {node.name} has weight scales {list(scale.shape)}, the graph needs {list(wanted)}; "
            "it is of another model, or of another quantize.block."
        )
    codes = round_nearest(matrix, scale.astype(np.float64), grid) if layer.codes is None else layer.codes.astype(np.float64)
    scale = scale_array(scale / (1.0 if change.outputs is None else change.outputs), values.dtype)
    name = tensor.name if len(edit.readers[tensor.name]) == 1 else f"{node.name}.weight"
    given = [
        edit.constant(f"{name}_{grid.name}", matrix_of(codes, node, edit.stored).astype(STORED[grid.name])),
        edit.constant(f"{name}_scale", scale),
    ]
    attributes: dict[str, Any] = {"axis": output_axis(node)}
    if block is not None:
        attributes = {"axis": 0, "block_size": block}
    else:
        # Each weight its own zero point: ONNX Runtime without VNNI cannot take exact products otherwise (export/sessions.py), and without a
        # zero point it does not fuse.
        given.append(edit.constant(f"{name}_zero", np.zeros(len(scale), STORED[grid.name])))
    edit.before[key].append(helper.make_node("DequantizeLinear", given, [f"{name}_dq"], name=f"{name}_dq", **attributes))
    node.input[1] = f"{name}_dq"
    wide = scale.astype(np.float64)
    return codes * spread(wide, len(codes)), wide


def _shift_bias(edit: _Edit, key: str, node: NodeProto, change: _Change) -> None:
    """Bias := (bias + shift) / outputs, wherever it is stored; an Add where the layer has none."""
    held = edit.types[key]
    dtype = helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(held))
    place, name = _bias_place(edit, node, key), f"{node.name}.bias_adjusted"
    old = np.zeros(()) if place is None else numpy_helper.to_array(edit.stored[place[0].input[place[1]]]).astype(np.float64)
    values = old + (0.0 if change.shift is None else change.shift)
    values = values / (1.0 if change.outputs is None else change.outputs)
    if place is not None:
        owner, k = place
        owner.input[k] = edit.constant(name, values.astype(dtype))
    elif np.any(values):
        values = values.reshape(-1, 1, 1) if node.op_type == "Conv" else values
        bare = f"{key}_without_bias"
        node.output[0] = bare
        edit.after[key].append(
            helper.make_node("Add", [bare, edit.constant(name, values.astype(dtype))], [key], name=f"{node.name}.bias")
        )


def _bias_place(edit: _Edit, node: NodeProto, key: str) -> tuple[NodeProto, int] | None:
    """(node, input) that holds a layer's bias: its own third input, or the constant of the Add that alone reads it."""
    if len(node.input) > 2 and node.input[2] in edit.stored:
        return node, 2
    after = edit.readers[key]
    if node.op_type == "MatMul" and len(after) == 1 and after[0].op_type == "Add":
        for k, name in enumerate(after[0].input):
            if name in edit.stored and len(edit.stored[name].dims) <= 1:
                return after[0], k
    return None


class _Inputs:
    """Q/DQ before inputs; layers that read the same tensor with the same scale share them."""

    def __init__(self, edit: _Edit, precision: str):
        self.edit, self.grid = edit, ACTIVATION_GRID.get(precision)
        self.twins: dict[tuple[str, float, int], tuple[str, float]] = {}

    def type_of(self, node: NodeProto) -> np.dtype:
        return helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(self.edit.types[node.output[0]]))

    def constant(self, node: NodeProto, layer: LayerCalibration) -> float:
        """What is taken off a layer's input before it is quantized, in the graph's type."""
        assert layer.input_scale is not None
        return float(np.asarray(layer.offset * layer.input_scale).astype(self.type_of(node)).astype(np.float64))

    def insert(self, key: str, node: NodeProto, k: int, value: float, offset: int = 0) -> float:
        """Quantize input k; returns the scale as it is stored."""
        assert self.grid is not None
        source, dtype, new = node.input[k], self.type_of(node), []
        if (source, value, offset) not in self.twins:
            name = f"{node.name}.{'right' if k else 'input'}"
            scale = scale_array(value, dtype)
            read = source
            if offset:
                taken = self.edit.constant(f"{name}_offset", np.asarray(offset * value).astype(dtype))
                new.append(helper.make_node("Sub", [source, taken], [f"{name}_moved"], name=f"{name}_moved"))
                read = f"{name}_moved"
            zero = "zero" if self.grid.name == "int8" else f"zero_{self.grid.name}"
            pair = [
                self.edit.constant(f"{name}_scale", scale),
                self.edit.constant(zero, np.array(0, STORED[self.grid.name])),
            ]
            new.append(helper.make_node("QuantizeLinear", [read, *pair], [f"{name}_q"], name=f"{name}_q"))
            new.append(helper.make_node("DequantizeLinear", [f"{name}_q", *pair], [f"{name}_dq"], name=f"{name}_dq"))
            self.edit.before[key] += new
            self.twins[source, value, offset] = f"{name}_dq", float(scale.astype(np.float64))
        node.input[k], stored = self.twins[source, value, offset]
        return stored
