"""torch -> ONNX: typed FP32 or FP16, positions baked for one resolution, only the batch dynamic, same weights same bytes.

TensorRT's strongly typed builder takes the graph literally, so precision lives here: an FP16 graph computes linear layers,
attention and residuals in FLOAT16 and every LayerNormalization in FLOAT between casts (a sum of squares overflows half floats).

Shape legend: B batch, N patch tokens, D width.
"""

import copy
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from distill.errors import EnvironmentFailed, GateFailed, UserError
from distill.files import write_bytes
from distill.models.kinds import AnyBackbone
from distill.models.timm_backbone import TimmBackbone

OPSET = 20  # 17 has LayerNormalization, 19 FP16 scales, 20 Gelu; more would shut out TensorRT 10.3
INPUT, OUTPUTS = "images", ("cls", "patches")
LINEAR_OPS = ("MatMul", "Gemm")
PRODUCTS = (*LINEAR_OPS, "Conv")
TYPE_OF = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}
PROTOBUF_LIMIT = 2**31 - 1


class _NormInFloat(nn.Module):
    """A LayerNorm that computes in float32 inside a half network: cast, normalise, cast back."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return F.layer_norm(x.float(), norm.normalized_shape, norm.weight, norm.bias, norm.eps).half()


class _Exported(nn.Module):
    """images [B, 3, size, size] float32 -> (cls [B, D], patches [B, N, D]) float32, on a copy of the backbone.

    The residual stream after each block [B, T, D] follows, so that the trace names it; it is no output of the file.
    """

    def __init__(self, backbone: AnyBackbone, size: int, precision: Literal["fp32", "fp16"]):
        super().__init__()
        # Positions are resampled outside the trace: an exported bicubic resize has given others than torch's.
        self.backbone = backbone.at_size(size).cpu().float().eval().requires_grad_(False)
        self.half_inside = precision == "fp16"
        for module in self.backbone.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # type: ignore[assignment]  # timm then scales Q before QK^T, the order fused kernels match
        if self.half_inside:
            norms = [(p, n, m) for p in self.backbone.modules() for n, m in p.named_children() if isinstance(m, nn.LayerNorm)]
            floats = [_NormInFloat(copy.deepcopy(m)) for _, _, m in norms]
            self.half()
            for (parent, name, _), norm in zip(norms, floats, strict=True):
                setattr(parent, name, norm)

        self.stream: list[Tensor] = []
        for _, block in named_blocks(self.backbone):
            block.register_forward_hook(lambda _module, _inputs, x: self.stream.append(x))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        self.stream.clear()
        out = self.backbone(images.half() if self.half_inside else images)
        return out.cls.float(), out.patches.float(), *self.stream


def export_onnx(backbone: AnyBackbone, path: Path, size: int, precision: Literal["fp32", "fp16"] = "fp32") -> None:
    """Write an ONNX file: `images` [batch, 3, size, size] -> `cls` [batch, D], `patches` [batch, N, D], all float32 outside.

    The caller's model is left as it is. The file depends on weights, size, precision and versions, nothing else.

    Raises:
        UserError: size is not a multiple of the patch, the graph would exceed 2 GB (protobuf's limit), or the network is no ViT.
        EnvironmentFailed: this torch exports another graph than the one that is asked for.
        GateFailed: the element types in the graph are not `precision`.
    """
    if isinstance(backbone, TimmBackbone) and not backbone.is_vit:
        raise UserError(f"{backbone.config.name} cannot be exported: only ours and timm's plain Vision Transformers can.")
    if size < backbone.patch or size % backbone.patch:
        raise UserError(f"Resolution {size} does not divide into patches of {backbone.patch} px; choose a multiple.")
    total = sum(p.numel() for p in backbone.parameters()) * (2 if precision == "fp16" else 4)
    if total > PROTOBUF_LIMIT:
        hint = "export fp16 instead" if precision == "fp32" and total / 2 < PROTOBUF_LIMIT else "export a smaller student"
        raise UserError(f"The model holds {total / 1e9:.1f} GB as {precision}, over the 2 GB of an ONNX file; {hint}.")
    traced = _Exported(backbone, size, precision).eval()
    broken = [n for n, p in traced.backbone.named_parameters() if not p.isfinite().all()]
    if broken:
        raise UserError(
            f"{broken[0]} holds values that are not finite in {precision}; train the model again or lower the learning rate."
        )
    model = _trace(traced, size, [name for name, _ in named_blocks(traced.backbone)])
    _name_linears(model, traced.backbone)
    _name_attention(model, traced.backbone)
    _strip(model)
    norms = sum(isinstance(m, nn.LayerNorm) for m in traced.modules())
    fused = sum(n.op_type == "LayerNormalization" for n in model.graph.node)
    if norms != fused:
        raise EnvironmentFailed(
            f"torch {torch.__version__} exported {fused} of {norms} LayerNorms as one op; install torch 2.14, known to work."
        )
    verify_precision(model, precision)
    onnx.checker.check_model(model, full_check=True)
    write_bytes(path, serialize(model))


def load_graph(path: Path) -> ModelProto:
    """Read an ONNX file.

    Raises:
        UserError: it is not one.
    """
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as e:  # protobuf's DecodeError has no stable home
        raise UserError(f"{path} is not an ONNX file ({type(e).__name__}); run the export stage again.") from e


def serialize(model: ModelProto) -> bytes:
    return model.SerializeToString(deterministic=True)


def constants(model: ModelProto) -> dict[str, TensorProto]:
    return {t.name: t for t in model.graph.initializer}


def linear_nodes(model: ModelProto, ops: tuple[str, ...] = LINEAR_OPS) -> Iterator[NodeProto]:
    """MatMul and Gemm nodes whose second input is a constant, dequantized or not: the Linear layers, in order of execution.

    With "Conv" in `ops` the patch embedding too.
    """
    known = set(constants(model)) | {n.output[0] for n in model.graph.node if n.op_type == "Constant"}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in known:
            known.add(node.output[0])
        elif node.op_type in ops and node.input[1] in known:
            yield node


def element_types(model: ModelProto) -> dict[str, str]:
    """Element type of every value in the graph by name, e.g. {"images": "FLOAT"}, found by strict shape inference."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    types = {v.name: v.type.tensor_type.elem_type for v in values} | {t.name: t.data_type for t in inferred.initializer}
    return {name: TensorProto.DataType.Name(t) for name, t in types.items()}


def type_counts(model: ModelProto) -> dict[str, int]:
    """How many matrix products run in which type: INT8 where both inputs are dequantized int8, else the element type."""
    types, quantized = element_types(model), quantized_linears(model)
    counts = Counter("INT8" if n.name in quantized else types[n.output[0]] for n in model.graph.node if n.op_type in PRODUCTS)
    return dict(sorted(counts.items()))


def quantized_linears(model: ModelProto) -> set[str]:
    """Names of the MatMul, Gemm and Conv nodes whose input and weight both come out of a DequantizeLinear of 8-bit integers."""
    types = element_types(model)
    ints = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear" and types[n.input[0]] in ("INT8", "UINT8")}
    return {n.name for n in model.graph.node if n.op_type in PRODUCTS and ints.issuperset(n.input[:2])}


def verify_precision(model: ModelProto, precision: Literal["fp32", "fp16", "int8"], name: str = "the graph") -> None:
    """Check that the graph computes in the precision that its file name is going to claim.

    fp32, fp16: every matrix product (linear layers, attention, patch embedding) has that element type.
    int8: some have int8 on both sides.

    Raises:
        GateFailed: it does not.
    """
    if precision == "int8":
        quantized = quantized_linears(model)
        if not quantized:
            raise GateFailed(f"{name} is called int8 but none of its linear layers has int8 inputs and weights.")
        return
    want, types = TensorProto.DataType.Name(TYPE_OF[precision]), element_types(model)
    products = [n for n in model.graph.node if n.op_type in PRODUCTS]
    wrong = [n for n in products if types[n.output[0]] != want]
    if wrong or not products:
        first = f"{wrong[0].name or wrong[0].op_type} is {types[wrong[0].output[0]]}" if wrong else "there are none"
        raise GateFailed(
            f"{name} is called {precision} but {len(wrong)} of {len(products)} matrix products are not {want} ({first})."
        )


def named_blocks(backbone: AnyBackbone) -> list[tuple[str, nn.Module]]:
    """The transformer blocks and their modules' names, `blocks.0` and on (`net.blocks.0` in timm's models): also the names of the
    residual stream behind them, [B, T, D], in every exported graph.
    """
    return [(name, module) for name, module in backbone.named_modules() if re.fullmatch(r"(net\.)?blocks\.\d+", name)]


def _trace(module: nn.Module, size: int, stream: list[str]) -> ModelProto:
    """torch.export, then torch's ONNX translation with its own constant folding. Batch 2: a batch of 1 would be specialised."""
    with _quiet(), torch.inference_mode(False), torch.no_grad():
        program = torch.onnx.export(
            module,
            (torch.zeros(2, 3, size, size),),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[*OUTPUTS, *stream],
            dynamic_shapes={INPUT: {0: torch.export.Dim("batch", min=1)}},
            optimize=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    assert [o.name for o in model.graph.output] == [*OUTPUTS, *stream]
    del model.graph.output[len(OUTPUTS) :]
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter talks on the logs and in warnings about things that a user cannot change."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def _name_linears(model: ModelProto, backbone: nn.Module) -> None:
    """Give every MatMul and Conv its module's name (`blocks.0.attn.qkv`): matched in order, proved by the weights' values."""
    modules = [(name, m) for name, m in backbone.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    nodes, stored = list(linear_nodes(model, PRODUCTS)), constants(model)
    if len(nodes) != len(modules):
        raise EnvironmentFailed(
            f"torch {torch.__version__} exported {len(nodes)} matrix products for {len(modules)} linear layers; "
            "install torch 2.14, known to work."
        )
    renamed: dict[str, str] = {}
    for node, (name, module) in zip(nodes, modules, strict=True):
        weight = numpy_helper.to_array(stored[node.input[1]])
        trained = module.weight.detach().numpy()
        assert np.array_equal(weight, trained if node.op_type == "Conv" else trained.T), f"{node.name} is not {name}"
        node.name = name
        renamed.setdefault(node.input[1], f"{name}.weight")  # equal weights are stored once
    for tensor in model.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in model.graph.node:
        node.input[:] = [renamed.get(i, i) for i in node.input]


def _name_attention(model: ModelProto, backbone: nn.Module) -> None:
    """Call the products of each attention `blocks.0.attn.qk` and `blocks.0.attn.av`: they stand before and behind its softmax."""
    names = [name for name, module in backbone.named_modules() if hasattr(module, "fused_attn")]
    softmaxes = [n for n in model.graph.node if n.op_type == "Softmax"]
    if len(names) != len(softmaxes):
        raise EnvironmentFailed(
            f"torch {torch.__version__} exported {len(softmaxes)} softmaxes for {len(names)} attentions; "
            "install torch 2.14, known to work."
        )
    made = {o: n for n in model.graph.node for o in n.output}
    readers = {i: n for n in model.graph.node for i in n.input}
    for name, softmax in zip(names, softmaxes, strict=True):
        scores, mixed = made[softmax.input[0]], readers[softmax.output[0]]
        assert scores.op_type == mixed.op_type == "MatMul", f"{name}: {scores.op_type} and {mixed.op_type} around the softmax"
        scores.name, mixed.name = f"{name}.qk", f"{name}.av"


def _strip(model: ModelProto) -> None:
    """Remove what is not the function: stack traces, module trees, doc strings, inferred shapes; sort what has no order."""
    graph = model.graph
    model.producer_name, model.producer_version, model.doc_string, model.domain = "decant", "", "", ""
    graph.name, graph.doc_string = "decant", ""
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]
    for node in graph.node:
        attributes = sorted(node.attribute, key=lambda a: a.name)
        del node.attribute[:]
        node.attribute.extend(attributes)
    set_constants(model, list(graph.initializer))


def set_constants(model: ModelProto, tensors: list[TensorProto]) -> None:
    """Replace the initialisers by those of `tensors` that a node reads, sorted by name (their order means nothing)."""
    used = {i for n in model.graph.node for i in n.input}
    kept = sorted((t for t in tensors if t.name in used), key=lambda t: t.name)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
