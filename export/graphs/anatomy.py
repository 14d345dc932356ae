"""What an ONNX graph, ours or anyone's, consists of: element types and shapes at batch 1, who makes and who reads a tensor, what is
constant and what comes out of quantization. `export/proof.py` counts on it, the rules in `export/linting/` judge by it. Nothing is
executed.
"""

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from distill.errors import UserError

# They move values and change none: quantization is looked for behind them.
LAYOUT = {"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Gather", "Cast", "Dropout"}
QUANTIZE = {"QuantizeLinear", "TRT_FP8QuantizeLinear", "TRT_INT4QuantizeLinear"}
DEQUANTIZE = {"DequantizeLinear", "TRT_FP8DequantizeLinear", "TRT_INT4DequantizeLinear"}
FAMILY = {
    "INT8": "INT8",
    "UINT8": "INT8",
    "INT4": "INT4",
    "UINT4": "INT4",
    "FLOAT8E4M3FN": "FP8",
    "FLOAT8E4M3FNUZ": "FP8",
    "FLOAT8E5M2": "FP8",
    "FLOAT8E5M2FNUZ": "FP8",
    "FLOAT4E2M1": "FP4",
}
FLOATS = {"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"}
# Integer arithmetic on shapes, folded so that exporters that spell out every Reshape still give shapes.
SHAPE_OPS = {
    *("Shape", "Size", "Gather", "Slice", "Concat", "Unsqueeze", "Squeeze", "Add", "Sub", "Mul", "Div", "Mod", "Cast", "Floor"),
    *("Ceil", "Round", "ConstantOfShape", "Equal", "Where", "Range", "Reshape", "Expand", "Pow", "Sqrt", "Max", "Min", "Neg"),
    *("ReduceProd", "ReduceSum", "Less", "Greater", "Not", "And", "Or", "Identity"),
}
# Operators that ONNX's shape inference does not know, and the cast that has the same shape.
STAND_IN = {
    "TRT_FP8QuantizeLinear": TensorProto.FLOAT8E4M3FN,
    "TRT_INT4QuantizeLinear": TensorProto.INT4,
    **dict.fromkeys(("TRT_FP8DequantizeLinear", "TRT_INT4DequantizeLinear"), TensorProto.FLOAT),
}
SAME_SHAPE = {"FastGelu", "BiasGelu", "QuickGelu", "Gelu", "SkipLayerNormalization", "SimplifiedLayerNormalization"}
SMALL = 1024  # elements: larger constants are weights
ROUNDS = 48


class Anatomy:
    """A graph, taken apart.

    Attributes:
        model: with local functions inlined. folder: where external data lie; None for a model in memory.
        nodes: of the main graph, in its order (bodies of If and Loop are not looked into).
        made: tensor -> the node that makes it. readers: tensor -> the nodes that read it.
        stored: tensor -> its value, of initializers and Constant nodes.
        types: tensor -> element type (`FLOAT16`), "" when unknown. shapes: tensor -> sizes at batch 1, of the tensors with known ones.
        opsets: domain -> version; the ONNX domain is "".
    """

    def __init__(self, model: ModelProto, folder: Path | None = None):
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        self.model, self.folder, self.graph = model, folder, model.graph
        self.nodes: list[NodeProto] = list(model.graph.node)
        self.opsets = {o.domain if o.domain != "ai.onnx" else "": o.version for o in model.opset_import}
        self.outputs = {o.name for o in self.graph.output}
        self.made: dict[str, NodeProto] = {o: n for n in self.nodes for o in n.output if o}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.readers[name].append(node)
        self.stored: dict[str, TensorProto] = {t.name: t for t in self.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and (tensor := _constant(node)) is not None:
                self.stored[node.output[0]] = tensor
        known = {*self.stored, *self.made, *(i.name for i in self.graph.input), *_sparse(self.graph)}
        self.undefined = {i for n in self.nodes for i in n.input if i and i not in known}
        self.types: dict[str, str] = defaultdict(str)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.folded: dict[str, np.ndarray] = {}
        self._infer()

    def value(self, name: str) -> np.ndarray | None:
        """The value of a constant, its floats as they are stored; None when `name` is none or its external data are missing."""
        if name in self.folded:
            return self.folded[name]
        tensor = self.stored.get(name)
        if tensor is None:
            return None
        if not uses_external_data(tensor):
            return numpy_helper.to_array(tensor)
        if not self.has_data(tensor):
            return None
        loaded = TensorProto()
        loaded.CopyFrom(tensor)
        load_external_data_for_tensor(loaded, str(self.folder))
        return numpy_helper.to_array(loaded)

    def has_data(self, tensor: TensorProto) -> bool:
        """Whether a tensor's values are in the file or in a file beside it that is long enough."""
        if not uses_external_data(tensor):
            return True
        place = {e.key: e.value for e in tensor.external_data}
        if self.folder is None or not (path := self.folder / place.get("location", "")).is_file():
            return False
        end = int(place.get("offset", 0)) + int(place.get("length", 0))
        return self.folder.resolve() in path.resolve().parents and path.stat().st_size >= end

    def scalar(self, name: str) -> bool:
        """Whether a tensor holds one number that does not depend on the images."""
        if name in self.stored:
            return int(np.prod(self.stored[name].dims)) == 1
        return name in self.constant and int(np.prod(self.shapes.get(name, (0,)))) == 1

    @cached_property
    def constant(self) -> set[str]:
        """Tensors whose values do not depend on any input's values (they may depend on its shape)."""
        found = {"", *self.stored, *_sparse(self.graph)}
        for node in self.nodes:
            if node.op_type in ("Shape", "Size") or (found.issuperset(node.input) and not _random(node) and not _bodies(node)):
                found.update(node.output)
        return found - {""}

    def above(self, name: str, ops: set[str] = LAYOUT) -> str:
        """The first tensor upwards that is not made by one of `ops` (their first input is followed)."""
        while (node := self.made.get(name)) is not None and node.op_type in ops and node.input:
            name = node.input[0]
        return name

    def quantizer(self, name: str) -> "Quantized | None":
        """Where a tensor's values were quantized, looking through layout and casts; None when they were not."""
        node = self.made.get(self.above(name))
        if node is None or node.op_type not in DEQUANTIZE:
            return None
        source = self.made.get(self.above(node.input[0]))
        quantize = source if source is not None and source.op_type in QUANTIZE else None
        element = self.types[node.input[0]] or _implied(node)
        constant = (quantize.input[0] if quantize is not None else node.input[0]) in self.constant
        return Quantized(node, quantize, element, constant)

    def attribute(self, node: NodeProto, name: str, default: Any = None) -> Any:
        return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)

    def _infer(self) -> None:
        """Types and shapes, by turns of ONNX's shape inference and folding of what it made of shapes."""
        skeleton = _skeleton(self.graph)
        for name, tensor in self.stored.items():
            self.types[name] = _name(tensor.data_type)
            self.shapes[name] = tuple(tensor.dims)
        for _ in range(ROUNDS):
            model = helper.make_model(skeleton, opset_imports=list(self.model.opset_import), ir_version=10)
            try:
                inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
            except Exception:  # an ill-formed graph: the rules say why; types are then known as far as they are declared
                inferred = self.graph
            for info in (*inferred.input, *inferred.value_info, *inferred.output):
                self._note(info)
            if not self._fold(skeleton):
                return

    def _note(self, info: ValueInfoProto) -> None:
        kind = info.type.tensor_type
        if kind.elem_type:
            self.types[info.name] = _name(kind.elem_type)
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            self.shapes[info.name] = tuple(d.dim_value for d in kind.shape.dim)

    def _fold(self, skeleton: GraphProto) -> bool:
        """Compute the shape arithmetic whose inputs are known by now and store its results; False when there is none left."""
        known = {t.name: numpy_helper.to_array(t) for t in skeleton.initializer}
        left: list[NodeProto] = []
        found: dict[str, np.ndarray] = {}
        for node in skeleton.node:
            values = self._shape_of(node, known)
            if values is None:
                left.append(node)
            else:
                found.update(zip(node.output, values, strict=False))
                known.update(found)
        if not found:
            return False
        self.folded.update(found)
        for name, value in found.items():
            self.types[name], self.shapes[name] = _name(helper.np_dtype_to_tensor_dtype(value.dtype)), value.shape
        del skeleton.node[:]
        skeleton.node.extend(left)
        skeleton.initializer.extend(numpy_helper.from_array(v, k) for k, v in found.items())
        return True

    def _shape_of(self, node: NodeProto, known: dict[str, np.ndarray]) -> list[np.ndarray] | None:
        if node.op_type not in SHAPE_OPS or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type in ("Shape", "Size"):
            shape = self.shapes.get(node.input[0])
            if shape is None:
                return None
            if node.op_type == "Size":
                return [np.array(int(np.prod(shape)), np.int64)]
            start, end = self.attribute(node, "start", 0), self.attribute(node, "end", len(shape))
            return [np.array(shape[start:end], np.int64)]
        inputs = [i for i in node.input if i]
        if any(i not in known or known[i].size > SMALL for i in inputs):
            return None
        return _computed(node, {i: known[i] for i in inputs}, list(self.model.opset_import))


class Quantized:
    """A tensor that was quantized: by the Q node (`quantize`, None when it is stored so) and read back by the DQ node.

    Attributes:
        element: type in between, e.g. INT8. constant: a weight, otherwise an activation.
    """

    def __init__(self, dequantize: NodeProto, quantize: NodeProto | None, element: str, constant: bool):
        self.dequantize, self.quantize, self.element, self.constant = dequantize, quantize, element, constant

    @property
    def family(self) -> str:
        """INT8, INT4, FP8 or FP4, whatever the signs."""
        return FAMILY.get(self.element, self.element)


def read_model(path: Path) -> ModelProto:
    """Read any ONNX file; external data stay outside.

    Raises:
        UserError: there is no such file, or it is no ONNX file or a truncated one.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the ONNX file in it.")
    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError as e:
        raise UserError(f"There is no file {path}; check the path.") from e
    except PermissionError as e:
        raise UserError(f"{path} may not be read by this user; check its permissions.") from e
    except Exception as e:  # protobuf's DecodeError has no stable home
        raise UserError(f"{path} is not an ONNX file or is truncated ({type(e).__name__}); export or download it again.") from e
    if not model.ir_version or not model.graph.node:
        raise UserError(f"{path} is not an ONNX file: it holds no graph; export or download it again.")
    return model


def label(node: NodeProto) -> str:
    """What a node is called in messages: its name, or the tensor that it makes."""
    return node.name or next((o for o in node.output if o), node.op_type)


def upstream(anatomy: Anatomy, name: str, ops: set[str] | None = None) -> Iterator[NodeProto]:
    """Every node that a tensor depends on, nearest first; with `ops` only through those."""
    queue, seen = [name], set()
    while queue:
        node = anatomy.made.get(queue.pop(0))
        if node is None or id(node) in seen or (ops is not None and node.op_type not in ops):
            continue
        seen.add(id(node))
        yield node
        queue.extend(node.input)


def _skeleton(graph: GraphProto) -> GraphProto:
    """The graph at batch 1, its weights turned into inputs: small enough to infer shapes of again and again."""
    out, stored = GraphProto(), {t.name for t in graph.initializer}
    out.name = "skeleton"
    for info in graph.input:
        if info.name in stored:
            continue
        out.input.add().CopyFrom(info)
        dims = out.input[-1].type.tensor_type.shape.dim
        if len(dims) > 1 and not dims[0].HasField("dim_value"):
            dims[0].dim_value = 1
    for tensor in graph.initializer:
        if int(np.prod(tensor.dims)) > SMALL or uses_external_data(tensor):
            out.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        else:
            out.initializer.append(tensor)
    for node in graph.node:
        value = _constant(node) if node.op_type == "Constant" else None
        if value is None:
            out.node.append(_stand_in(node))
        elif int(np.prod(value.dims)) > SMALL or uses_external_data(value):
            out.input.append(helper.make_tensor_value_info(node.output[0], value.data_type, list(value.dims)))
        else:
            out.initializer.add().CopyFrom(value)
            out.initializer[-1].name = node.output[0]
    out.output.extend(helper.make_empty_tensor_value_info(o.name) for o in graph.output)
    return out


def _stand_in(node: NodeProto) -> NodeProto:
    """A node of another domain as one of ONNX's with the same shape of output, where there is one."""
    if node.op_type in STAND_IN:
        return helper.make_node("Cast", [node.input[0]], [node.output[0]], to=STAND_IN[node.op_type])
    if node.domain == "com.microsoft" and node.op_type in SAME_SHAPE:
        return helper.make_node("Identity", [node.input[0]], [node.output[0]])
    return node


def _constant(node: NodeProto) -> TensorProto | None:
    for attribute in node.attribute:
        if attribute.name == "value":
            return attribute.t
        if attribute.name in ("value_float", "value_int", "value_floats", "value_ints"):
            value = helper.get_attribute_value(attribute)
            return numpy_helper.from_array(np.array(value, np.float32 if "float" in attribute.name else np.int64))
    return None


def _computed(node: NodeProto, feeds: dict[str, np.ndarray], opsets: list[Any]) -> list[np.ndarray] | None:
    from onnx.reference import ReferenceEvaluator

    inputs = [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in feeds.items()]
    outputs = [helper.make_empty_tensor_value_info(o) for o in node.output if o]
    model = helper.make_model(helper.make_graph([node], "one", inputs, outputs), opset_imports=opsets, ir_version=10)
    try:
        with np.errstate(all="ignore"):
            found = [np.asarray(v) for v in ReferenceEvaluator(model).run(None, feeds)]
    except Exception:  # what the reference does not know stays unknown
        return None
    return found if all(v.size <= SMALL for v in found) else None


def _sparse(graph: GraphProto) -> set[str]:
    return {t.values.name for t in graph.sparse_initializer}


def _bodies(node: NodeProto) -> bool:
    return any(a.HasField("g") or a.graphs for a in node.attribute)


def _random(node: NodeProto) -> bool:
    return node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial")


def _implied(node: NodeProto) -> str:
    return {"TRT_FP8DequantizeLinear": "FLOAT8E4M3FN", "TRT_INT4DequantizeLinear": "INT4"}.get(node.op_type, "")


def _name(data_type: int) -> str:
    return TensorProto.DataType.Name(data_type) if data_type in TensorProto.DataType.values() else ""
