"""torch -> ONNX: typed FP32, FP16 or BF16, positions baked for one resolution, only the batch dynamic, same weights same bytes.

Nodes have their modules' names (`blocks.0.attn.qkv`), the products of attention `blocks.0.attn.qk` and `blocks.0.attn.av`, and the
residual stream behind a block is the tensor `blocks.0`. Reading graphs is `nodes.py`, half precision `typed.py`.

Shape legend: B batch, T tokens, N patch tokens, D width.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn

from distill.errors import EnvironmentFailed, UserError
from distill.files import write_bytes
from distill.models.kinds import AnyBackbone
from distill.models.timm_backbone import TimmBackbone
from distill.quiet import quiet
from export.graphs.nodes import (
    INPUT,
    LINEAR_OPS,
    OUTPUTS,
    PRODUCTS,
    TYPE_OF,
    constants,
    element_types,
    kept_float,
    linear_nodes,
    load_graph,
    quantized_linears,
    serialize,
    set_constants,
    type_counts,
    verify_precision,
)
from export.graphs.typed import retype

__all__ = [
    "INPUT",
    "LINEAR_OPS",
    "OPSET",
    "OUTPUTS",
    "PRODUCTS",
    "TYPE_OF",
    "constants",
    "element_types",
    "export_onnx",
    "kept_float",
    "linear_nodes",
    "load_graph",
    "named_blocks",
    "quantized_linears",
    "serialize",
    "set_constants",
    "torch_graph",
    "type_counts",
    "verify_precision",
]

OPSET = 20  # 17 has LayerNormalization, 19 FP16 scales, 20 Gelu; more would shut out TensorRT 10.3 (BF16: `typed.OPSET_OF`)
EXPORTERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")  # who talk while torch exports
PROTOBUF_LIMIT = 2**31 - 1
PREFIX = "backbone."  # of weights in the trace


class _Exported(nn.Module):
    """images [B, 3, size, size] float32 -> (cls [B, D], patches [B, N, D]) float32, on a copy of the backbone.

    The residual stream after each block [B, T, D] follows, so that the trace names it; it is no output of the file.
    """

    def __init__(self, backbone: AnyBackbone, size: int):
        super().__init__()
        # Positions are resampled outside the trace: an exported bicubic resize has given others than torch's.
        self.backbone = backbone.at_size(size).cpu().float().eval().requires_grad_(False)
        for module in self.backbone.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # type: ignore[assignment]  # timm then scales Q before QK^T, the order fused kernels match
        self.stream: list[Tensor] = []
        for _, block in named_blocks(self.backbone):
            block.register_forward_hook(lambda _module, _inputs, x: self.stream.append(x))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        self.stream.clear()
        out = self.backbone(images)
        return out.cls, out.patches, *self.stream


def export_onnx(
    backbone: AnyBackbone,
    path: Path,
    size: int,
    precision: Literal["fp32", "fp16", "bf16"] = "fp32",
    keep_float: Collection[str] = (),
) -> None:
    """Write an ONNX file: `images` [batch, 3, size, size] -> `cls` [batch, D], `patches` [batch, N, D], all float32 outside.

    The caller's model is left as it is. The file depends on weights, size, precision and versions, nothing else.

    Args:
        keep_float: layers and blocks of an FP16 or BF16 graph that stay in FP32, by name or pattern: see `retype`.

    Raises:
        UserError: size is not a multiple of the patch, the graph would exceed 2 GB (protobuf's limit), the network is no ViT, or
            `keep_float` names nothing in it.
        EnvironmentFailed: this torch exports another graph than the one that is asked for.
        GateFailed: the element types in the graph are not `precision`.
    """
    total = sum(p.numel() for p in backbone.parameters()) * (4 if precision == "fp32" else 2)
    if total > PROTOBUF_LIMIT:
        hint = "export fp16 instead" if precision == "fp32" and total / 2 < PROTOBUF_LIMIT else "export a smaller student"
        raise UserError(f"The model holds {total / 1e9:.1f} GB as {precision}, over the 2 GB of an ONNX file; {hint}.")
    write_bytes(path, serialize(retype(torch_graph(backbone, size), precision, keep_float)))


def torch_graph(backbone: AnyBackbone, size: int) -> ModelProto:
    """The FP32 graph of a backbone at a resolution, in memory: what every other precision is made from.

    Raises:
        UserError: size is not a multiple of the patch, weights are not finite, or the network is no ViT.
        EnvironmentFailed: this torch exports another graph than the one that is asked for.
    """
    if isinstance(backbone, TimmBackbone) and not backbone.is_vit:
        raise UserError(f"{backbone.config.name} cannot be exported: only ours and timm's plain Vision Transformers can.")
    if size < backbone.patch or size % backbone.patch:
        raise UserError(f"Resolution {size} does not divide into patches of {backbone.patch} px; choose a multiple.")
    traced = _Exported(backbone, size).eval()
    broken = [n for n, p in traced.backbone.named_parameters() if not p.isfinite().all()]
    if broken:
        raise UserError(f"{broken[0]} holds values that are not finite; train the model again or lower the learning rate.")
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
    return model


def named_blocks(backbone: AnyBackbone) -> list[tuple[str, nn.Module]]:
    """The transformer blocks and their modules' names, `blocks.0` and on (`net.blocks.0` in timm's models): also the names of the
    residual stream behind them, [B, T, D], in every exported graph.
    """
    return [(name, module) for name, module in backbone.named_modules() if re.fullmatch(r"(net\.)?blocks\.\d+", name)]


def _trace(module: nn.Module, size: int, stream: list[str]) -> ModelProto:
    """torch.export, then torch's ONNX translation with its own constant folding. Batch 2: a batch of 1 would be specialised."""
    with quiet(*EXPORTERS), torch.inference_mode(False), torch.no_grad():
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
        renamed.setdefault(tensor.name, tensor.name.removeprefix(PREFIX))
        tensor.name = renamed[tensor.name]
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
