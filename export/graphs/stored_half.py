"""Large constants of a quantized graph stored in FP16: what no plan quantizes (patch convolution, positions, layers kept in floating point)
still fills the file in FP32. Every runtime casts them back once, as it loads.
"""

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export.graphs.nodes import constants, set_constants

LEAST_BYTES = 1 << 16  # a smaller constant saves less than what its Cast and another name cost a reader
WORST = 2.0**-10  # relative to a constant's largest value; FP16 rounds normal numbers to 2 ** -11 of themselves


def store_half(model: ModelProto) -> int:
    """Store FP32 constants of 64 KiB and more as FP16 with a Cast to FP32 behind each, in place.

    A constant with a value beyond FP16, or NaN, stays as it is. Names: `NAME.half` is stored, `NAME` is what its readers go on reading.

    Returns:
        The bytes saved.
    """
    kept, casts, saved = [], [], 0
    for name, tensor in constants(model).items():
        half = _half(tensor)
        if half is None:
            kept.append(tensor)
            continue
        kept.append(numpy_helper.from_array(half, f"{name}.half"))
        casts.append(helper.make_node("Cast", [f"{name}.half"], [name], name=f"{name}.cast", to=TensorProto.FLOAT))
        saved += half.nbytes
    for cast in reversed(casts):
        model.graph.node.insert(0, cast)
    if casts:
        set_constants(model, kept)
    return saved


def _half(tensor: TensorProto) -> np.ndarray | None:
    if tensor.data_type != TensorProto.FLOAT or 4 * int(np.prod(tensor.dims, dtype=np.int64)) < LEAST_BYTES:
        return None
    values = numpy_helper.to_array(tensor)
    with np.errstate(over="ignore", invalid="ignore"):
        half = values.astype(np.float16)
        worst = np.abs(half.astype(np.float32) - values).max()
    # False for NaN and infinity too, which lint must find in the file as they are.
    return half if worst <= WORST * np.abs(values).max() else None
