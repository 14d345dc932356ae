"""Other people's quantizers behind one interface, for comparison and through the same proofs.

onnx-int8-dynamic     onnxruntime.quantization.quantize_dynamic at its defaults: INT8 weights, activations quantized as they come
onnx-int8-modelopt    NVIDIA Model Optimizer's INT8_DEFAULT_CFG on the network in PyTorch; scales are its own, Q/DQ nodes go into our graph
openvino-int8-nncf    NNCF with its preset for transformers; the default preset breaks a trained ViT (patch cosine 0.29)

The same file from the same graph and images: checked by the tests for all three.
"""

import contextlib
import importlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from distill.errors import EnvironmentFailed, UserError
from distill.files import write_bytes
from export.graphs.nodes import INPUT, PRODUCTS, constants, linear_nodes, load_graph, serialize, set_constants
from export.graphs.onnx_module import OnnxModule, key_of

Quantizer = Callable[[Path, Tensor, Path], list[Path]]
LEVELS = 127


def dynamic(source: Path, images: Tensor, out: Path) -> list[Path]:
    """Needs no calibration: the images are not looked at. Its operations are ONNX Runtime's own (MatMulInteger); TensorRT has none."""
    from onnxruntime.quantization import quantize_dynamic

    path = out / source.name
    part = path.with_suffix(".part")
    try:
        with _quiet():
            quantize_dynamic(source, part)
        write_bytes(path, serialize(load_graph(part)))
    finally:
        part.unlink(missing_ok=True)
    return [path]


def modelopt(source: Path, images: Tensor, out: Path) -> list[Path]:
    """What Model Optimizer would ship: every Linear and Conv, per-channel weights and per-tensor inputs, both by their largest magnitude.

    Its own export keeps FP32 weights in front of QuantizeLinear (87 MB of a ViT-S where INT8 takes 22); here they are stored as INT8, which
    changes no number.

    Raises:
        EnvironmentFailed: nvidia-modelopt is not installed. UserError: no images.
    """
    graph, images = load_graph(source), _checked(images, "onnx-int8-modelopt")
    with _quiet():
        mtq = _imported("modelopt.torch.quantization", "modelopt")
        module = OnnxModule(graph).eval()

        def calibrate(network: Any) -> None:
            with torch.no_grad():
                for chunk in images.split(4):
                    network(chunk)

        done = mtq.quantize(module, mtq.INT8_DEFAULT_CFG, calibrate)
    scales = {}
    for node in linear_nodes(graph, PRODUCTS):
        layer = done.layers[key_of(node)]
        if layer.input_quantizer.is_enabled and layer.weight_quantizer.is_enabled:
            inside, weight = (
                q.amax.detach().float().reshape(-1).numpy() / LEVELS for q in (layer.input_quantizer, layer.weight_quantizer)
            )
            scales[node.name] = float(inside.max()), weight
    path = out / source.name
    write_bytes(path, serialize(with_scales(graph, scales)))
    return [path]


def nncf(source: Path, images: Tensor, out: Path) -> list[Path]:
    """An IR (.xml) and its weights (.bin).

    Raises:
        EnvironmentFailed: nncf or openvino is not installed. UserError: no images.
    """
    from export.runtimes import load_openvino

    ov, images = load_openvino(), _checked(images, "openvino-int8-nncf")
    xml, weights = (out / source.name).with_suffix(".xml"), (out / source.name).with_suffix(".bin")
    part = xml.with_suffix(".part.xml")
    with _quiet():
        package = _imported("nncf", "openvino")
        model = ov.Core().read_model(source)
        arrays = [np.ascontiguousarray(x.numpy()) for x in images.split(1)]
        data = package.Dataset(arrays, lambda x: {INPUT: x})
        quantized = package.quantize(model, data, model_type=package.ModelType.TRANSFORMER, subset_size=len(arrays))
        for i, op in enumerate(quantized.get_ordered_ops()):
            if re.fullmatch(r"[A-Za-z]+_\d+", op.get_friendly_name()):  # numbered by what the process has made before
                op.set_friendly_name(f"{op.get_type_name()}_{i}")
        ov.save_model(quantized, part, compress_to_fp16=False)
    part.with_suffix(".bin").replace(weights)
    part.replace(xml)
    return [xml, weights]


OTHERS: dict[str, Quantizer] = {"onnx-int8-dynamic": dynamic, "onnx-int8-modelopt": modelopt, "openvino-int8-nncf": nncf}


def with_scales(model: ModelProto, scales: dict[str, tuple[float, np.ndarray]]) -> ModelProto:
    """An FP32 graph with Q/DQ around layers: name -> (scale of the input, scales of the weight's output channels), zero point 0."""
    out = ModelProto()
    out.CopyFrom(model)
    stored, nodes = constants(out), list[NodeProto]()
    tensors: dict[str, TensorProto] = dict(stored)
    for node in out.graph.node:
        if node.name in scales:
            inside, weight = scales[node.name]
            source = stored[node.input[1]]
            values, axis = numpy_helper.to_array(source), 0 if node.op_type == "Conv" else 1
            shaped = weight.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
            ints = np.clip(np.round(values / shaped), -LEVELS - 1, LEVELS).astype(np.int8)
            name = f"{node.name}.input"
            arrays = {
                f"{node.name}.int8": ints,
                f"{node.name}.scale": weight.astype(np.float32),
                f"{node.name}.zero": np.zeros(len(weight), np.int8),
                f"{name}_scale": np.array(inside, np.float32),
                f"{name}_zero": np.array(0, np.int8),
            }
            tensors |= {n: numpy_helper.from_array(a, n) for n, a in arrays.items()}
            ours, channels, zeros, scale, zero = arrays
            nodes += [
                helper.make_node("QuantizeLinear", [node.input[0], scale, zero], [f"{name}_q"], name=f"{name}_q"),
                helper.make_node("DequantizeLinear", [f"{name}_q", scale, zero], [f"{name}_dq"], name=f"{name}_dq"),
                helper.make_node("DequantizeLinear", [ours, channels, zeros], [f"{ours}_dq"], name=f"{ours}_dq", axis=axis),
            ]
            node.input[0], node.input[1] = f"{name}_dq", f"{ours}_dq"
        nodes.append(node)
    del out.graph.node[:]
    out.graph.node.extend(nodes)
    set_constants(out, list(tensors.values()))
    onnx.checker.check_model(out, full_check=True)
    return out


def _checked(images: Tensor, target: str) -> Tensor:
    if not len(images):
        raise UserError(f"{target} needs calibration images and got none; give the data section a training set.")
    return images.float().contiguous()


def _imported(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as e:  # modelopt fails with whatever its own imports raise
        reason = (
            "is not installed" if isinstance(e, ModuleNotFoundError) else f"does not load ({' '.join(str(e).split())[:160]})"
        )
        raise EnvironmentFailed(f"{module.partition('.')[0]} {reason}; pip install 'decant-vision[{extra}]'.") from e


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """These packages print progress bars and advice that a user of a run cannot follow."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
