"""What calibration chose, layer by layer: the numbers that quantize a graph, readable and writable as JSON.

Shape legend: K input channels, N output channels.
"""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import ml_dtypes
import numpy as np
from onnx import ModelProto, numpy_helper

from distill.errors import UserError
from export.graphs.nodes import PRODUCTS, constants
from export.quantizing.plan import is_transposed
from export.quantizing.quantize_config import QUANTIZED, Grid

FORMAT, QAD_FORMAT = "decant-calibration-1", "decant-quantization-1"


@dataclass(frozen=True)
class LayerCalibration:
    """One layer.

    Attributes:
        input_scale: real = code * scale, per tensor; of a Product its left side, and `right_scale` its right side.
        offset: codes of an input that is nearly never negative are moved down by so many, to use the whole range: the graph
            quantizes x - offset * input_scale and the bias makes up for it.
        weight_scale: [N], or of w4 [K / block, N]; of the smoothed weight. None: from the weight's own range.
        smooth: [K]: the input is divided by it and the weight's rows are multiplied by it.
        shift: [N]: added to the bias.
        codes: [K, N]: the weight's codes, where they are not just the nearest ones. Not in the JSON but in the quantized graph.
    """

    input_scale: float | None = None
    right_scale: float | None = None
    offset: int = 0
    weight_scale: np.ndarray | None = None
    smooth: np.ndarray | None = None
    shift: np.ndarray | None = None
    codes: np.ndarray | None = None

    def to_json(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "codes"}
        given = {k: v for k, v in values.items() if v is not None and (k != "offset" or v)}
        return {k: _packed(v) if isinstance(v, np.ndarray) else v for k, v in given.items()}


@dataclass(frozen=True)
class Calibration:
    """Of one precision of one student at one resolution.

    Attributes:
        layers: by node name. images, images_sha256: how many calibrated, and the hash of that float32 tensor.
        chosen_codes: weights are not rounded to the nearest: their codes belong to the calibration (`with_codes`).
        trained: scales and weights were trained for each other: both are used exactly as they are.
    """

    precision: str
    layers: dict[str, LayerCalibration]
    images: int = 0
    images_sha256: str = ""
    chosen_codes: bool = False
    trained: bool = False

    def to_json(self) -> dict[str, Any]:
        """Vectors are packed: base64 of little-endian float32."""
        about = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layers"}
        return {"format": FORMAT, **about, "layers": {name: layer.to_json() for name, layer in self.layers.items()}}

    @classmethod
    def from_json(cls, value: Any) -> "Calibration":
        """The inverse of `to_json`, but for codes.

        Raises:
            UserError: it is something else.
        """
        if not isinstance(value, Mapping) or value.get("format") != FORMAT:
            raise UserError(f"This is not a calibration ({FORMAT}); export the quantized target again.")
        try:
            names = {f.name for f in fields(LayerCalibration)} - {"codes"}
            layers = {}
            for name, entry in value["layers"].items():
                if set(entry) - names:
                    raise KeyError(sorted(set(entry) - names)[0])
                given: dict[str, Any] = {k: _unpacked(v) if isinstance(v, Mapping) else v for k, v in entry.items()}
                layers[name] = LayerCalibration(**given)
            rest = {f.name: value[f.name] for f in fields(cls) if f.name != "layers"}
        except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as e:
            raise UserError(f"The calibration is damaged ({type(e).__name__}: {e}); export the quantized target again.") from e
        return cls(layers=layers, **rest)

    @classmethod
    def from_qad(cls, value: Any) -> "Calibration":
        """The scales that quantization-aware training settled on (a model folder's quantization.json), used exactly as they are.

        Raises:
            UserError: it is something else, or a scale is not a positive number.
        """
        if not isinstance(value, Mapping) or value.get("format") != QAD_FORMAT:
            raise UserError(f"quantization.json is not of format {QAD_FORMAT}; train the qad model again.")
        precision, layers = value.get("weights"), {}
        try:
            for name, entry in value["layers"].items():
                weight = np.asarray(entry["weight_scale"], np.float32)
                given = entry["input_scale"]
                if weight.ndim == 2:  # [N][blocks]; one block spans all inputs where there are none
                    weight = weight[:, 0] if precision == "int8" and weight.shape[1] == 1 else weight.T
                scale = None if given is None else float(np.asarray(given, np.float64).reshape(()))
                if not (weight > 0).all() or not np.isfinite(weight).all() or (scale is not None and not 0 < scale < np.inf):
                    raise UserError(
                        f"quantization.json: a scale of {name} is not a positive number; train the qad model again."
                    )
                if (scale is None) != (precision == "w4") or weight.ndim != (2 if precision == "w4" else 1):
                    raise ValueError(f"{name} has scales of another precision than {precision}")
                layers[name] = LayerCalibration(input_scale=scale, weight_scale=weight)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UserError(f"quantization.json is damaged ({type(e).__name__}: {e}); train the qad model again.") from e
        if precision not in ("int8", "w4") or not layers:
            raise UserError(f"quantization.json has weights {precision!r} in {len(layers)} layers; train the qad model again.")
        return cls(precision, layers, trained=True)

    def with_codes(self, quantized: ModelProto) -> "Calibration":
        """With the weights' codes of a graph that was quantized by this calibration: another type of graph then has the same.

        Raises:
            UserError: the graph quantizes none of these layers.
        """
        codes = quantized_codes(quantized)
        if not set(codes) & set(self.layers):
            raise UserError(
                "The graph that should hold the weights' codes quantizes none of the calibration's layers; export it again."
            )
        layers = {name: replace(layer, codes=codes.get(name, layer.codes)) for name, layer in self.layers.items()}
        return replace(self, layers=layers)


def quantized_codes(model: ModelProto) -> dict[str, np.ndarray]:
    """Codes [K, N] of every weight that a DequantizeLinear feeds to a Linear layer or convolution, by the layer's name."""
    stored = constants(model)
    dequantized = {
        n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored
    }
    found = {}
    for node in model.graph.node:
        if node.op_type in PRODUCTS and node.input[1] in dequantized:
            values = numpy_helper.to_array(stored[dequantized[node.input[1]]])
            values = values.astype(np.int8) if values.dtype == ml_dtypes.int4 else values
            if node.op_type == "Conv":
                values = values.reshape(len(values), -1).T
            found[node.name] = values.T if is_transposed(node) else values
    return found


def stored_codes(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """Codes in a byte each."""
    return codes.astype(ml_dtypes.float8_e4m3fn if grid.name == "fp8" else np.int8)


def check_precision(calibration: Calibration, precision: str) -> None:
    """Raises:
    UserError: no such precision, or the calibration is of another one.
    """
    if precision not in QUANTIZED:
        raise UserError(f"{precision} is not a quantized precision; choose from {', '.join(QUANTIZED)}.")
    if calibration.precision != precision:
        raise UserError(f"The calibration is of {calibration.precision}, not of {precision}; export onnx-{precision} again.")


def _packed(values: np.ndarray) -> dict[str, Any]:
    data = base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode()
    return {"shape": list(values.shape), "float32": data}


def _unpacked(value: Mapping[str, Any]) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(value["float32"], validate=True), "<f4")
    return data.reshape(value["shape"]).astype(np.float32)
