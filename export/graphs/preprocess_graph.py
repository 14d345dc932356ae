"""Preprocessing inside the graph: pictures of any size as uint8 [B, H, W, 3] go in, and what the network sees is computed by the runtime.

The resize is two products with Pillow's own weights (Resample.c), which the graph computes from the size of the picture: each output row
is a weighted sum of the input rows within the filter's support, rounded to grey levels between the passes as Pillow does. ONNX's Resize
with antialias=1 says the same in one node and ONNX Runtime 1.32 follows Pillow to one grey level, but OpenVINO 2026.4 ignores the
attribute without a word (up to 29 grey levels from Pillow on a picture of 900 x 1,200), so it is not used here.

Pillow sums integers; sums half-way between two grey levels may round otherwise in float32, rarely in both passes (README: figures).

Shape legend: B batch, H and W of the picture, S side of the network's input.
"""

import math
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, compose, helper, numpy_helper

from distill.data.preprocess import CONSTANTS, Preprocess
from export.graphs.nodes import INPUT

PIXELS = "pixels"
SUFFIX = "-with-preprocess.onnx"
RGB = 3


class _Nodes:
    """Writes nodes: `nodes("Mul", a, b)` gives the name of the product. Numbers and arrays become initialisers."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.values: dict[str, np.ndarray] = {}

    def __call__(self, op: str, *inputs: Any, **attributes: Any) -> str:
        names = [i if isinstance(i, str) else self.constant(i) for i in inputs]
        name = f"preprocess.{len(self.nodes)}.{op}"
        self.nodes.append(helper.make_node(op, names, [name], name=name, **attributes))
        return name

    def constant(self, value: Any) -> str:
        """A float becomes a float32 scalar; integers stay int64, as axes and indices are."""
        array = np.asarray(value)
        array = array.astype(np.float32) if array.dtype.kind == "f" else array
        for name, known in self.values.items():
            if known.dtype == array.dtype and np.array_equal(known, array):
                return name
        name = f"preprocess.constant.{len(self.values)}"
        self.values[name] = array
        return name


def with_preprocess(model: ModelProto, preprocess: Preprocess) -> ModelProto:
    """A features graph whose input is uint8 [batch, height, width, 3] (`pixels`), red first; outputs are as before.

    All pictures of a batch have one size. Compute it in FP32: at lower precision (OpenVINO's default on some processors) the sums of
    the resize lose grey levels.

    Args:
        model: its input `images` is [batch, 3, S, S]. preprocess: its size is S.
    """
    (given,) = model.graph.input
    assert given.name == INPUT
    opset = next(o for o in model.opset_import if o.domain == "")
    before = preprocess_graph(preprocess, given.type.tensor_type.elem_type, opset.version)
    before.ir_version = model.ir_version
    merged = compose.merge_models(before, model, io_map=[(before.graph.output[0].name, INPUT)])
    merged.producer_name, merged.producer_version = model.producer_name, model.producer_version
    merged.graph.name = model.graph.name
    return merged


def preprocess_graph(preprocess: Preprocess, dtype: int = TensorProto.FLOAT, opset: int = 20) -> ModelProto:
    """pixels uint8 [batch, height, width, 3] -> preprocessed [batch, 3, S, S] of `dtype`, as `Preprocess.__call__` does it."""
    g, size = _Nodes(), preprocess.size
    shape = g("Shape", PIXELS)
    h, w = (g("Cast", g("Gather", shape, axis), to=TensorProto.FLOAT) for axis in (1, 2))
    new_h, new_w = _sides(g, preprocess, h, w)
    weights_h, weights_w = _weights(g, preprocess, h, new_h), _weights(g, preprocess, w, new_w)
    planes = g("Cast", g("Transpose", PIXELS, perm=[0, 3, 1, 2]), to=TensorProto.FLOAT)
    # As Pillow: first along the rows, rounded to grey levels, then along the columns.
    narrow = _grey_levels(g, g("MatMul", planes, g("Transpose", weights_w, perm=[1, 0])))
    pixels = g("Div", _grey_levels(g, g("MatMul", weights_h, narrow)), 255.0)
    g.nodes.append(helper.make_node("Cast", [_normalised(g, preprocess, pixels)], ["preprocessed"], to=dtype))
    graph = helper.make_graph(
        g.nodes,
        "preprocess",
        [helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, ["batch", "height", "width", RGB])],
        [helper.make_tensor_value_info("preprocessed", dtype, ["batch", RGB, size, size])],
        [numpy_helper.from_array(value, name) for name, value in sorted(g.values.items())],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def _sides(g: _Nodes, preprocess: Preprocess, h: str, w: str) -> tuple[Any, Any]:
    """The picture's height and width after the resize."""
    size = float(preprocess.size)
    if preprocess.fit == "squash":
        return size, size
    shorter = g("Min", h, w)
    new_h, new_w = (g("Round", g("Div", g("Mul", side, float(preprocess.resize)), shorter)) for side in (h, w))
    return g("Max", new_h, size), g("Max", new_w, size)


def _weights(g: _Nodes, preprocess: Preprocess, old: str, new: Any) -> str:
    """[S, old]: how each row of the centre crop is made of the picture's rows (or columns)."""
    places = np.arange(preprocess.size, dtype=np.float32)[:, None] + 0.5
    start = g("Floor", g("Mul", g("Sub", new, float(preprocess.size)), 0.5))
    scale = g("Div", old, new)
    centre = g("Mul", g("Add", places, start), scale)
    rows = g("Add", g("Range", 0.0, old, 1.0), 0.5)
    stretch = g("Max", scale, 1.0)  # antialiasing: the filter widens when the picture shrinks
    weights = _filter(g, preprocess.interpolation, g("Abs", g("Div", g("Sub", rows, centre), stretch)))
    return g("Div", weights, g("ReduceSum", weights, np.array([1]), keepdims=1))


def _filter(g: _Nodes, name: str, t: str) -> str:
    """Pillow's filters at t = |distance| in units of the filter's stretch; 0 outside their support."""
    if name == "bilinear":
        return g("Max", g("Sub", 1.0, t), 0.0)
    if name == "lanczos":
        angle = g("Max", g("Mul", t, math.pi), 1e-6)
        third = g("Div", angle, 3.0)
        wave = g("Mul", g("Div", g("Sin", angle), angle), g("Div", g("Sin", third), third))
        return g("Where", g("Less", t, 3.0), wave, 0.0)
    a = -0.5
    near = g("Add", g("Mul", g("Mul", g("Sub", g("Mul", a + 2, t), a + 3), t), t), 1.0)
    far = g("Mul", g("Sub", g("Mul", g("Add", g("Mul", g("Sub", t, 5.0), t), 8.0), t), 4.0), a)
    return g("Where", g("Less", t, 1.0), near, g("Where", g("Less", t, 2.0), far, 0.0))


def _grey_levels(g: _Nodes, values: str) -> str:
    return g("Max", g("Min", g("Floor", g("Add", values, 0.5)), 255.0), 0.0)


def _normalised(g: _Nodes, preprocess: Preprocess, pixels: str) -> str:
    """As distill.data.preprocess.normalize."""
    if preprocess.normalize == "per_image":
        area, count = np.array([2, 3]), float(preprocess.size**2)
        centred = g("Sub", pixels, g("Div", g("ReduceSum", pixels, area, keepdims=1), count))
        variance = g("Div", g("ReduceSum", g("Mul", centred, centred), area, keepdims=1), count)
        return g("Div", centred, g("Add", g("Sqrt", variance), 1e-3))
    if preprocess.normalize == "none":
        return pixels
    mean, std = (np.array(v, np.float32)[:, None, None] for v in CONSTANTS[preprocess.normalize])
    return g("Div", g("Sub", pixels, mean), std)
