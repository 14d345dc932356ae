"""What engines really run. Plans of TensorRT-RTX are compiled here and read; the inspector's JSON is made up in the layouts that
TensorRT 10 and 11 document, since asking an inspector takes a GPU.
"""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from broken import before_softmax, unfused_attention
from fake_tensorrt import engine_of, layer
from onnx import ModelProto
from requantized import requantized

from distill.errors import GateFailed, UserError
from export.engine import build_engine
from export.engine_proof import prove_engine, prove_plan
from export.graph import load_graph
from export.graphs.anatomy import Anatomy
from export.graphs.attention_blocks import attention_blocks
from export.proof import prove, refuse

BATCHES = (1, 4, 16)


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx has no wheels for this platform")


@pytest.fixture(scope="module")
def fp16(graphs) -> ModelProto:
    return load_graph(graphs["mlp-fp16"][1])


@pytest.fixture(scope="module")
def int8(fp16) -> ModelProto:
    return requantized(fp16, "int8")


@pytest.mark.parametrize("version", [10, 11])
def test_both_layouts_of_the_inspector(int8, version):
    graph, blocks = prove(int8), attention_blocks(Anatomy(int8))
    proof = prove_engine(json.dumps(engine_of(int8, version, "INT8")), graph, blocks)
    assert proof.source == "engine inspector"
    assert proof.flops_share(("linear",)) == {"INT8": 1.0}
    assert proof.flops_share() == graph.flops_share()
    assert proof.attention == {"blocks": 2, "fusable": 2, "fused": 2}
    assert (proof.reformats, proof.casts, proof.layers) == (1, 0, 12)
    assert proof.notes == ()


@pytest.mark.parametrize("version", [10, 11])
def test_an_int8_engine_that_is_not(int8, version):
    graph = prove(int8)
    proof = prove_engine(engine_of(int8, version, "FLOAT16"), graph)
    assert proof.flops_share() == {"FLOAT16": 1.0}
    assert "8 products run in another type than the graph asks for: blocks.0.attn.qkv in FLOAT16, not INT8" in proof.notes[0]
    with pytest.raises(GateFailed, match=r"only 0% of its FLOPs are INT8: blocks.0.attn.qkv is FLOAT16"):
        refuse(proof, "int8", "the engine")
    part = prove_engine(engine_of(int8, version, "INT8", except_for="attn.qkv"), graph)
    assert part.flops_share(("linear",)) == {"INT8": 0.75, "FLOAT16": 0.25}
    refuse(part, "int8")


def test_attention_in_pieces_is_not_fused(int8):
    blocks = attention_blocks(Anatomy(int8))
    assert prove_engine(engine_of(int8, 11, "INT8", fused=False), prove(int8), blocks).attention["fused"] == 0
    assert prove_engine(engine_of(int8, 11, "INT8", fused=False), prove(int8)).attention["fused"] is None


def test_one_layer_that_holds_everything_proves_nothing(int8):
    names = [p.name for p in prove(int8).products]
    whole = {"Layers": [layer("{ForeignNode[node_cast...node_cast_9]}", "Myelin", "FLOAT", 10, names)]}
    proof = prove_engine(whole, prove(int8))
    assert proof.flops_share() == prove(int8).flops_share()
    assert "the engine does not say in which type 13 of 13 products run" in proof.notes[0]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("not json", "is not JSON"),
        ("[1]", "not an object with Layers"),
        ('{"Layers": ["conv1", "gemm"]}', "profiling: detailed"),
        ("{}", "profiling: detailed"),
    ],
)
def test_answers_without_details(int8, answer, said):
    with pytest.raises(UserError, match=said):
        prove_engine(answer, prove(int8))


# --- plans that are compiled here ---


def compiled(model: ModelProto, folder: Path, precision, capabilities):
    path = folder / "m.onnx"
    onnx.save(model, path)
    return build_engine(path, folder / "m.engine", "tensorrt_rtx", precision, BATCHES, capabilities).proof


def test_an_fp16_plan_runs_fp16_and_fused_attention(rtx, fp16, tmp_path):
    proof = compiled(fp16, tmp_path, "fp16", ["8.6", "12.0"])
    assert proof.source == "compiled plan"
    assert proof.flops_share() == {"FLOAT16": 1.0}
    assert proof.attention == {"blocks": 2, "fusable": 2, "fused": 2}
    assert proof.layers > 20


def test_an_int8_plan_runs_int8_where_it_says_so(rtx, int8, tmp_path):
    """TensorRT-RTX 1.7 splits the fused QKV layer and runs it in FLOAT16 though the graph asks for INT8: the proof sees it."""
    proof = compiled(int8, tmp_path, "int8", ["8.6"])
    assert proof.source == "compiled plan"
    types = {p.name: p.type for p in proof.products}
    assert {types[f"blocks.{i}.{n}"] for i in (0, 1) for n in ("attn.proj", "mlp.fc1", "mlp.fc2")} == {"INT8"}
    changed = [p.name for p in proof.products if p.type != {g.name: g.type for g in prove(int8).products}[p.name]]
    assert set(changed) <= {"blocks.0.attn.qkv", "blocks.1.attn.qkv"}
    assert bool(changed) == any("run in another type than the graph asks for" in n for n in proof.notes)
    assert proof.attention["fused"] == 2


@pytest.mark.parametrize("op", ["spelt out", "Tanh", "Add"])
def test_lint_and_the_compiler_agree_on_attention(rtx, fp16, tmp_path, op):
    """What lint calls unfused-attention the compiler does not fuse, and a mask it does."""
    if op == "spelt out":
        model = unfused_attention(fp16, fp16)
    else:
        model = before_softmax(fp16, op, *([np.eye(17, dtype=np.float16)] if op == "Add" else []))
    proof = compiled(model, tmp_path, "fp16", ["8.6"])
    assert proof.attention["fused"] == proof.attention["fusable"] == {"spelt out": 0, "Tanh": 1, "Add": 2}[op]
    assert any("run as separate kernels" in n for n in proof.notes) == (op != "Add")


def test_a_plan_that_cannot_be_read_leaves_the_graphs_proof(int8):
    graph = prove(int8)
    for plan in (b"", b"\x00\x01\xff" * 1000, b"tensor={ name=\n fully_connected={ layers= }\n"):
        proof = prove_plan(plan, graph)
        assert proof.source == "graph"
        assert proof.products == graph.products
        assert "not measured" in proof.notes[-1]
