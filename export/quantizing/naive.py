"""The plan that this package does not make: everything in INT8, as default static quantization has it, for comparison."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, NodeProto, helper
from torch import Tensor

from distill.errors import UserError
from export.graphs.nodes import INPUT, PRODUCTS, constants, element_types, load_graph, serialize, set_constants
from export.quantizing.matrices import matrix_of, node_weight, output_axis
from export.quantizing.plan import lift_constants
from export.quantizing.qdq import scale_array, tensor_of
from export.quantizing.quantize_config import INT8
from export.quantizing.rounding import round_nearest, weight_scales

# The operators that onnxruntime.quantization.quantize_static puts Q/DQ around by default, as far as ViTs have them.
QUANTIZED_OPS = (*PRODUCTS, "Add", "Mul", "Softmax", "LayerNormalization", "Gelu", "Sigmoid", "Erf", "Div", "Sub")


def quantize_everything(source: ModelProto | Path, images: Tensor) -> ModelProto:
    """INT8 Q/DQ on every activation that a matrix product, residual add, LayerNorm, GELU, softmax or LayerScale reads or makes.

    Min-max scales, per tensor; weights per output channel, as in our plan: what differs is which tensors are quantized.

    Args:
        source: an FP32 graph or its file. images: preprocessed training images [n, 3, H, W].

    Raises:
        UserError: no images, or a graph that is not FP32.
    """
    model = lift_constants(load_graph(source) if isinstance(source, Path) else source)
    if not len(images):
        raise UserError("Quantization needs calibration images and got none; give the data section a training set.")
    types, stored = element_types(model), constants(model)
    if not all(types[n.output[0]] == "FLOAT" for n in model.graph.node if n.op_type in PRODUCTS):
        raise UserError("The all-layers plan is made from an FP32 graph; export onnx-fp32.")
    chosen = [n for n in model.graph.node if n.op_type in QUANTIZED_OPS]
    tensors = [t for n in chosen for t in (*n.input, *n.output[:1]) if t and t not in stored and types.get(t) == "FLOAT"]
    peaks = _peaks(model, list(dict.fromkeys(tensors)), images)
    nodes: list[NodeProto] = []
    arrays: dict[str, np.ndarray] = {"zero": np.array(0, np.int8)}
    twins: dict[str, str] = {}

    def quantized(tensor: str) -> None:
        names = [f"{tensor}_scale", "zero"]
        arrays[names[0]] = scale_array((peaks[tensor] or 1.0) / INT8.high, np.dtype(np.float32))
        nodes.append(helper.make_node("QuantizeLinear", [tensor, *names], [f"{tensor}_q"], name=f"{tensor}_q"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{tensor}_q", *names], [f"{tensor}_dq"], name=f"{tensor}_dq"))
        twins[tensor] = f"{tensor}_dq"

    if INPUT in peaks:
        quantized(INPUT)
    for node in model.graph.node:
        new = NodeProto()
        new.CopyFrom(node)
        if node.op_type in PRODUCTS and node.input[1] in stored:
            weight = node_weight(node, stored).astype(np.float64)
            scale = weight_scales(weight, INT8, "minmax")
            codes = round_nearest(weight, scale, INT8)
            given = [f"{node.name}.weight_int8", f"{node.name}.weight_scale", f"zeros_{len(scale)}"]
            new_arrays = (matrix_of(codes, node, stored).astype(np.int8), scale_array(scale, np.dtype(np.float32)))
            arrays |= dict(zip(given, (*new_arrays, np.zeros(len(scale), np.int8)), strict=True))
            name = f"{node.name}.weight_dq"
            nodes.append(helper.make_node("DequantizeLinear", given, [name], name=name, axis=output_axis(node)))
            new.input[1] = name
        for k, tensor in enumerate(node.input):
            new.input[k] = twins.get(new.input[k], new.input[k]) if tensor else ""
        nodes.append(new)
        for tensor in node.output:
            if tensor in peaks:
                quantized(tensor)
    outputs = {o.name for o in model.graph.output}
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    set_constants(model, [*model.graph.initializer, *(tensor_of(a, name) for name, a in arrays.items())])
    assert outputs == {o.name for o in model.graph.output}
    onnx.checker.check_model(model, full_check=True)
    return model


def _peaks(model: ModelProto, tensors: list[str], images: Tensor) -> dict[str, float]:
    """The largest magnitude of each tensor over the images, one image at a time."""
    watched = ModelProto()
    watched.CopyFrom(model)
    inner = [t for t in tensors if t != INPUT]
    del watched.graph.output[:]
    watched.graph.output.extend(helper.make_empty_tensor_value_info(t) for t in inner)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(serialize(watched), options, providers=["CPUExecutionProvider"])
    peaks = dict.fromkeys(tensors, 0.0)
    for image in images.float().numpy():
        found = dict(zip(inner, session.run(inner, {INPUT: image[None]}), strict=True)) | {INPUT: image}
        for tensor in tensors:
            peaks[tensor] = max(peaks[tensor], float(np.abs(found[tensor]).max(initial=0.0)))
    if broken := [t for t, p in peaks.items() if not np.isfinite(p)]:
        raise UserError(f"{broken[0]} is not finite on the calibration images; train the model again.")
    return peaks
