"""What a compiled engine really runs: read from the engine inspector's JSON (TensorRT 10 and 11) or out of a TensorRT-RTX plan.

The inspector needs a deserialized engine, hence a GPU. A plan of TensorRT-RTX, though, carries the compiler's own listing of kernels
in plain text: each matrix product with its operands' types and the ONNX nodes behind it. That listing is not documented: where it
cannot be read, the graph's proof stands and says so. It has shown INT8 layers that the compiler dequantizes and runs in FLOAT16.

TensorRT 10 gives a tensor one `Format/Datatype`, 11 a `Format` and a `DataType`; `Bindings` became `I/O Tensors`.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from distill.errors import UserError
from export.graphs.attention_blocks import AttentionBlock
from export.proof import Proof, with_products

ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
# Spellings of element types, narrowest first.
SPELLINGS = (
    ("FP4", ("fp4", "e2m1")),
    ("INT4", ("int4",)),
    ("INT8", ("int8",)),
    ("FP8", ("fp8", "e4m3", "e5m2")),
    ("BFLOAT16", ("bf16", "bfloat16", "bfloat")),
    ("FLOAT16", ("fp16", "half", "float16")),
    ("FLOAT", ("fp32", "float", "tf32")),
)
REFORMATS = ("Reformat", "NoOpReformat")
# Layers whose operands are those of a matrix product; a fused `ForeignNode` may hold the whole network and says nothing of its inside.
PRODUCT_LAYERS = re.compile(r"gemm|matrixmultiply|matmul|conv|fullyconnected|fc\b", re.I)
ATTENTION_LAYERS = re.compile(r"mha|attention|flash", re.I)
PLAN_PRODUCTS = ("fully_connected", "corrltn", "convolution", "gemm", "matmul", "batch_gemm", "fused_gemm")
LONGEST_LINE = 1 << 20


@dataclass(frozen=True)
class Kernel:
    """A layer of an engine: its kind and name, the types of its operands, the ONNX nodes that it computes."""

    kind: str
    name: str
    types: tuple[str, ...]
    nodes: tuple[str, ...]
    product: bool


def prove_engine(layers_json: str | dict[str, Any], graph: Proof, blocks: Iterable[AttentionBlock] = ()) -> Proof:
    """The proof of a graph, corrected by what the engine inspector says of the engine made from it.

    Not executed here: it needs a GPU. Written against the documented layouts of TensorRT 10.x and 11.x.

    Args:
        layers_json: `inspector.get_engine_information(LayerInformationFormat.JSON)` of an engine built with detailed profiling.
        graph: `prove` of the graph that was compiled. blocks: `attention_blocks` of it, to say which attentions are fused.

    Raises:
        UserError: it is not such a JSON, or one without layers' details.
    """
    value = _loaded(layers_json)
    layers = [layer for layer in value.get("Layers", []) if isinstance(layer, dict)]
    if not layers:
        raise UserError("The engine inspector lists no layers' details; build the engine with profiling: detailed.")
    kernels = [_inspected(layer) for layer in layers]
    reformats = sum(_is_reformat(layer) for layer in layers)
    casts = sum(str(layer.get("LayerType", "")).lower() == "cast" for layer in layers)
    return replace(
        _corrected(graph, kernels, list(blocks)),
        source="engine inspector",
        reformats=reformats,
        casts=casts,
        layers=len(layers),
    )


def prove_plan(plan: bytes, graph: Proof, blocks: Iterable[AttentionBlock] = ()) -> Proof:
    """The proof of a graph, corrected by the kernel listing inside the TensorRT-RTX plan made from it; needs no GPU.

    Where the plan holds no listing that can be read, the graph's proof with a note.
    """
    kernels = list(_listed(plan))
    products = {n for k in kernels if k.product for n in k.nodes}
    if not products & {p.name for p in graph.products}:
        note = "the plan's kernels cannot be read without its GPU: not measured, the graph's types stand"
        return replace(graph, notes=(*graph.notes, note))
    return replace(_corrected(graph, kernels, list(blocks)), source="compiled plan", layers=len(kernels))


def inspector_json(trt: Any, plan: bytes, log: Any) -> str:
    """Deserialize an engine and list its layers. Deserializing runs native code: only on plans whose hash was verified. Not executed
    in the tests, which have no GPU.

    Raises:
        UserError: the runtime does not take the engine on this machine.
    """
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise UserError(f"The engine cannot be loaded on this machine: {log.first() or 'the runtime gave no reason'}.")
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def _corrected(graph: Proof, kernels: list[Kernel], blocks: list[AttentionBlock]) -> Proof:
    names = {p.name for p in graph.products}
    types: dict[str, str] = {}
    for kernel in kernels:
        found = names.intersection(kernel.nodes)
        if not kernel.product or not kernel.types or not found:
            continue
        for name in found:
            types.setdefault(name, kernel.types[0])
    fused = sum(any({b.qk, b.av} <= set(k.nodes) or _is_fused(b, k) for k in kernels) for b in blocks)
    weights = {p.name: p.type for p in graph.products if p.type.endswith("-weight")}
    types = {name: weights.get(name, found) for name, found in types.items()}  # weight-only: its operands are floats by design
    notes = list(graph.notes)
    changed = [p for p in graph.products if p.name in types and types[p.name] != p.type]
    if changed:
        first = changed[0]
        notes.append(
            f"{len(changed)} products run in another type than the graph asks for: {first.name} in {types[first.name]}, "
            f"not {first.type}"
        )
    if silent := names - set(types):
        notes.append(
            f"the engine does not say in which type {len(silent)} of {len(names)} products run: the graph's types stand"
        )
    if fused < len(blocks):
        floats = any(types.get(b.qk) == "FLOAT" for b in blocks)
        why = ": no fused kernel computes in FLOAT" if floats else ""
        notes.append(f"{len(blocks) - fused} of {len(blocks)} attentions run as separate kernels{why}")
    attention = {**graph.attention, "fused": fused if blocks else None}
    return replace(graph, products=with_products(graph, types), attention=attention, notes=tuple(notes))


def _is_fused(block: AttentionBlock, kernel: Kernel) -> bool:
    return bool(ATTENTION_LAYERS.search(f"{kernel.kind} {kernel.name}")) and block.softmax in kernel.nodes


def _loaded(value: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as e:
            raise UserError(f"The engine inspector's answer is not JSON ({e}); ask it for LayerInformationFormat.JSON.") from e
    if not isinstance(value, dict):
        raise UserError(
            "The engine inspector's answer is not an object with Layers; ask for the information of the whole engine."
        )
    return value


def _inspected(layer: dict[str, Any]) -> Kernel:
    name, kind = str(layer.get("Name", "")), str(layer.get("LayerType", ""))
    nodes = ONNX_LAYER.findall(str(layer.get("Metadata", ""))) or [n.strip() for n in name.split(" + ")]
    inputs = [t for t in layer.get("Inputs", []) if isinstance(t, dict)]
    operands = tuple(t for t in [_element(_tensor_type(t)) for t in inputs[:1]] if t)  # the others are biases and residuals
    where = f"{kind} {name} {layer.get('TacticName', '')} {layer.get('ParameterType', '')}"
    product = "ForeignNode" not in name and bool(PRODUCT_LAYERS.search(where) or ATTENTION_LAYERS.search(where))
    return Kernel(kind, f"{name} {layer.get('TacticName', '')}", operands, tuple(nodes), product)


def _tensor_type(tensor: dict[str, Any]) -> str:
    for key in ("DataType", "Datatype", "Format/Datatype", "Format/DataType", "Format"):
        if isinstance(found := tensor.get(key), str) and _element(found):
            return found
    return ""


def _is_reformat(layer: dict[str, Any]) -> bool:
    return str(layer.get("LayerType")) in REFORMATS or str(layer.get("Name", "")).startswith("Reformatting CopyNode")


def _element(text: str) -> str:
    lowered = text.lower()
    return next((name for name, spellings in SPELLINGS if any(s in lowered for s in spellings)), "")


def _widest(types: Iterable[str]) -> tuple[str, ...]:
    """Of two operands the wider decides: a product of int8 and half is one of halves, its int8 side is read and widened."""
    order = [name for name, _ in SPELLINGS]
    return tuple(sorted(types, key=order.index, reverse=True)[:1])


def _listed(plan: bytes) -> Iterator[Kernel]:
    """Kernels in the listing: lines like `fully_connected={ name=.. input={"a" "b"} .. layers="[ONNX Layer: x]" }` behind lines like
    `tensor={ .. name="a" .. type=int8 }`, one for each tensor.
    """
    types: dict[str, str] = {}
    entries: list[tuple[str, str]] = []
    for raw in plan.split(b"\n"):
        if len(raw) > LONGEST_LINE or b"={" not in raw[:64]:
            continue
        found = re.match(r"\s*(\w+)=\{ ?(.*)", raw.decode("latin1"), re.S)
        if found is None:
            continue
        kind, body = found.groups()
        if kind in ("tensor", "sub_tensor"):
            if (tensor := re.search(r'name="([^"]+)"', body)) and (element := re.search(r" type=(\w+)", body)):
                types[tensor[1]] = _element(element[1])
        elif 'layers="' in body:
            entries.append((kind, body))
    for kind, body in entries:
        layers = re.search(r'layers="([^"]*)"', body)
        nodes = ONNX_LAYER.findall(layers[1]) if layers else []
        inputs = re.search(r"\b(?:input_args|input)=\{ ?([^}]*)\}", body)
        operands = [types.get(i, "") for i in re.findall(r'"([^"]+)"', inputs[1])] if inputs else []
        name = (re.search(r'name="?([^ "]+)', body) or ["", ""])[1]
        fused_attention = kind == "function" and bool(ATTENTION_LAYERS.search(name))
        pair = _widest(t for t in operands[:2] if t)
        yield Kernel(kind, name, pair, tuple(nodes), kind in PLAN_PRODUCTS or fused_attention)
