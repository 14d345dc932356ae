"""Other people's quantizers behind one interface, at the settings that their authors recommend: for comparison, through the same proofs.

onnx-int8-dynamic     onnxruntime.quantization.quantize_dynamic: INT8 weights, activations quantized as they come
onnx-int8-modelopt    NVIDIA Model Optimizer's INT8 default on the network in PyTorch, exported with Q/DQ nodes
openvino-int8-nncf    NNCF's preset for transformers (its default preset breaks a trained ViT: tests/benchmarks/README.md)
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from torch import Tensor

from distill.errors import EnvironmentFailed
from distill.files import replacing, write_bytes
from export.graph import INPUT, load_graph, serialize, set_constants

Quantizer = Callable[[Path, Tensor, Path], list[Path]]


def dynamic(source: Path, images: Tensor, out: Path) -> list[Path]:
    """Needs no calibration: the images are not looked at."""
    from onnxruntime.quantization import quantize_dynamic

    path = out / source.name
    with _quiet(), replacing(path) as part:
        quantize_dynamic(source, part)
    return [path]


def nncf(source: Path, images: Tensor, out: Path) -> list[Path]:
    """An IR (.xml) and its weights (.bin).

    Raises:
        EnvironmentFailed: nncf or openvino is not installed.
    """
    from export.runtimes import load_openvino

    ov = load_openvino()
    with _quiet():
        package = _imported("nncf", "openvino")
        model = ov.Core().read_model(str(source))
        arrays = [x.numpy() for x in images.float().split(1)]
        data = package.Dataset(arrays, lambda x: {INPUT: x})
        quantized = package.quantize(model, data, model_type=package.ModelType.TRANSFORMER, subset_size=len(arrays))
        xml, weights = (out / source.name).with_suffix(".xml"), (out / source.name).with_suffix(".bin")
        beside = out / "unfinished"
        beside.mkdir(exist_ok=True)
        ov.save_model(quantized, str(beside / xml.name), compress_to_fp16=False)
    (beside / weights.name).replace(weights)
    (beside / xml.name).replace(xml)
    beside.rmdir()
    return [xml, weights]


def modelopt(source: Path, images: Tensor, out: Path) -> list[Path]:
    """Model Optimizer quantizes PyTorch modules; the graph's linear layers are rebuilt as such, so that it sees what is shipped.

    Its default for INT8: per-channel weights, per-tensor activations, both by the largest magnitude, every Linear and Conv. Its files
    keep FP32 weights in front of QuantizeLinear; they are folded to INT8 here, which changes no number.

    Raises:
        EnvironmentFailed: nvidia-modelopt is not installed.
    """
    with _quiet():
        mtq = _imported("modelopt.torch.quantization", "modelopt")
        import torch

        graph = load_graph(source)
        layers = _Layers(graph)
        inputs = layers.inputs(images)
        scales: dict[str, float] = {}
        weights: dict[str, np.ndarray] = {}
        for name, (weight, rows) in inputs.items():
            linear = torch.nn.Linear(weight.shape[0], weight.shape[1], bias=False)
            linear.weight.data = torch.from_numpy(np.ascontiguousarray(weight.T))
            held = torch.nn.Sequential(linear)
            done = mtq.quantize(held, mtq.INT8_DEFAULT_CFG, lambda m, rows=rows: [m(r) for r in rows])
            scales[name] = float(done[0].input_quantizer.amax.max()) / 127
            weights[name] = done[0].weight_quantizer.amax.reshape(-1).numpy() / 127
    from export.calibration import Calibration, LayerCalibration
    from export.quantize import QuantizeConfig, quantize

    chosen = {n: LayerCalibration(input_scale=scales[n], weight_scale=weights[n]) for n in scales}
    plain = QuantizeConfig(smooth=None, offset=False, bias_correction=False, rounding="nearest", attention=False)
    quantized, _ = quantize(graph, Calibration("int8", chosen, len(images), ""), plain, "int8")
    path = out / source.name
    write_bytes(path, serialize(quantized))
    return [path]


class _Layers:
    """The linear layers of a graph and what comes into them."""

    def __init__(self, graph: onnx.ModelProto):
        from export.graph import constants, linear_nodes

        self.graph, stored = graph, constants(graph)
        self.weights = {n.name: numpy_helper.to_array(stored[n.input[1]]) for n in linear_nodes(graph)}
        self.tensors = {n.name: n.input[0] for n in linear_nodes(graph)}

    def inputs(self, images: Tensor) -> dict[str, tuple[np.ndarray, list[Tensor]]]:
        import onnxruntime
        import torch
        from onnx import helper

        wanted = sorted(set(self.tensors.values()))
        tapped = onnx.ModelProto()
        tapped.CopyFrom(self.graph)
        del tapped.graph.output[:]
        tapped.graph.output.extend(helper.make_empty_tensor_value_info(t) for t in wanted)
        set_constants(tapped, list(tapped.graph.initializer))
        session = onnxruntime.InferenceSession(serialize(tapped), providers=["CPUExecutionProvider"])
        # Only the largest magnitude of each input counts: one row that holds it stands for the image.
        rows: dict[str, list[Tensor]] = {t: [] for t in wanted}
        for image in images.float().split(1):
            for tensor, value in zip(wanted, session.run(wanted, {INPUT: image.numpy()}), strict=True):
                flat = value.reshape(-1, value.shape[-1])
                rows[tensor].append(torch.from_numpy(flat[np.abs(flat).max(1).argmax()][None].copy()))
        return {name: (w, rows[self.tensors[name]]) for name, w in self.weights.items()}


def _imported(module: str, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except Exception as e:  # modelopt fails with whatever its own imports raise
        first = " ".join(str(e).split())[:160]
        raise EnvironmentFailed(f"{module} does not load ({first}); pip install 'decant-vision[{extra}]'.") from e


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """These packages print progress bars and advice that a user of a run cannot follow."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


OTHERS: dict[str, Quantizer] = {
    "onnx-int8-dynamic": dynamic,
    "onnx-int8-modelopt": modelopt,
    "openvino-int8-nncf": nncf,
}
