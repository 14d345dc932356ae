"""Quantization by explicit Q/DQ: INT8 and FP8 (weights and activations), 8- and 4-bit weights.

`plan.py` decides what is quantized, `calibrate.py` chooses scales and more by running the graph over training images, `qdq.py` puts
them into a graph. This module is the way in:

    calibration = calibrate(path, images, config, "int8")
    graph, plan = quantize(load_graph(path), calibration, config, "int8")

Everything but the planned layers stays in the graph's floating point: residual adds, LayerNorm, GELU, softmax, positions, biases. What is
large of it is stored in FP16 and computed in FP32 (`stored_half.py`).
TensorRT's parser refuses int32 biases and any zero point but 0 by name, so neither is made.
"""

import onnx
from onnx import ModelProto

from distill.errors import UserError
from export.graphs.nodes import element_types
from export.graphs.stored_half import store_half
from export.quantizing.calibrate import calibrate
from export.quantizing.calibration import Calibration, LayerCalibration, check_precision
from export.quantizing.histogram import Histogram
from export.quantizing.plan import PlanEntry, lift_constants, plan_graph
from export.quantizing.qdq import insert
from export.quantizing.quantize_config import QuantizeConfig
from export.sessions import quiet_options

__all__ = [
    "Calibration",
    "Histogram",
    "LayerCalibration",
    "PlanEntry",
    "QuantizeConfig",
    "calibrate",
    "plan_graph",
    "quantize",
    "quiet_options",
]
OPSETS = {"fp8": 21, "w4": 21}  # 21 has blocks and 4-bit integers; TensorRT wants it for FP8 too
HALF_OPSET, LEAST_OPSET = 19, 13  # scales in FP16; scales per channel
IR_OF_OPSET_21 = 10


def quantize(
    model: ModelProto, calibration: Calibration, config: QuantizeConfig, precision: str = "int8"
) -> tuple[ModelProto, list[PlanEntry]]:
    """Quantize a copy of an FP32, FP16 or BF16 graph. Scales take the type of what they scale.

    Args:
        calibration: of the same student (`calibrate`, `Calibration.from_json`, `Calibration.from_qad`); it may know more layers than
            `config.keep` leaves. For exactly the codes of another graph see `Calibration.with_codes`.
        precision: int8, fp8, w8 or w4; the calibration's.

    Returns:
        The graph, and the plan of every matrix product with its scales.

    Raises:
        UserError: the calibration does not fit the graph, or nothing is left to quantize.
    """
    check_precision(calibration, precision)
    out = at_opset(lift_constants(model), precision)
    plan = plan_graph(out, config, precision)
    chosen = [e for e in plan if e.quantized]
    if missing := [e.layer for e in chosen if e.layer not in calibration.layers]:
        raise UserError(
            f"The calibration holds no scale for {missing[0]}; export onnx-{precision} again with the same quantize settings."
        )
    if calibration.chosen_codes and (bare := [e.layer for e in chosen if _lacks_codes(e, calibration)]):
        raise UserError(f"The calibration's codes of {bare[0]} are in its quantized graph; read them with `with_codes`.")
    done = insert(out, calibration, config, plan)
    store_half(out)
    onnx.checker.check_model(out, full_check=True)
    return out, done


def _lacks_codes(entry: PlanEntry, calibration: Calibration) -> bool:
    return entry.kind != "Product" and calibration.layers[entry.layer].codes is None


def at_opset(model: ModelProto, precision: str) -> ModelProto:
    """The graph at an opset that has the precision's operators; our own need no rewriting, others' may."""
    have = next((o.version for o in model.opset_import if not o.domain), 1)
    types = set(element_types(model).values()) if precision not in OPSETS else set()
    need = OPSETS.get(precision, HALF_OPSET if types & {"FLOAT16", "BFLOAT16"} else LEAST_OPSET)
    if have >= need:
        return model
    if have < HALF_OPSET + 1:  # from 20 on, no operator that a ViT has changed its meaning
        return onnx.version_converter.convert_version(model, need)
    next(o for o in model.opset_import if not o.domain).version = need
    model.ir_version = max(model.ir_version, IR_OF_OPSET_21)
    return model
