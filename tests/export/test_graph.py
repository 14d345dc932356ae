"""torch -> ONNX: the same function, typed as named, deterministic, and nothing of the machine inside."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from tiny import backbone, pictures

from distill.errors import EnvironmentFailed, GateFailed, UserError
from distill.models.timm_backbone import TimmBackbone, TimmConfig
from export import graph
from export.graph import element_types, export_onnx, linear_nodes, load_graph, serialize, type_counts, verify_precision

FP32, FP16 = ("mlp-fp32", "swiglu-fp32"), ("mlp-fp16", "swiglu-fp16")


def run(path: Path, images: torch.Tensor) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(["cls", "patches"], {"images": images.numpy()})


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("name", FP32 + FP16)
def test_same_function_as_torch(graphs, name, batch):
    model, path, size = graphs[name]
    images = pictures(batch, size)
    with torch.no_grad():
        want = model(images)
    tolerance = 2e-5 if name in FP32 else 2e-2
    for got, wanted in zip(run(path, images), (want.cls, want.patches), strict=True):
        assert got.dtype == np.float32
        assert got.shape == tuple(wanted.shape)
        assert np.abs(got - wanted.numpy()).max() < tolerance
        assert wanted.abs().max() > 1  # else the tolerance would prove nothing


def test_positions_matter_and_are_the_resampled_ones(graphs, tmp_path):
    """56 px on a 32 px grid: with the native positions' neighbours instead the outputs would be others."""
    model, path, size = graphs["swiglu-fp32"]
    other = copy.deepcopy(model)
    other.config = other.config.model_copy(update={"pos_offset": 0.0})
    images = pictures(2, size)
    with torch.no_grad():
        assert (model(images).cls - other(images).cls).abs().max() > 1e-4
    stored = [numpy_helper.to_array(t) for t in load_graph(path).graph.initializer]
    position = model.position(7, 7).detach().numpy()
    assert any(a.shape == position.shape and np.array_equal(a, position) for a in stored)


@pytest.mark.parametrize("name", FP32 + FP16)
def test_only_the_batch_is_dynamic(graphs, name):
    _, path, size = graphs[name]
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in load_graph(path).graph.input}
    assert shapes == {"images": ["batch", 3, size, size]}
    with pytest.raises(Exception, match=r"(?i)invalid dimensions"):
        run(path, pictures(1, size + 8))


@pytest.mark.parametrize("name", FP32 + FP16)
def test_fused_ops_and_the_scale_on_q(graphs, name):
    model, path, _ = graphs[name]
    loaded = load_graph(path)
    nodes = loaded.graph.node
    kinds = [n.op_type for n in nodes]
    assert kinds.count("LayerNormalization") == 2 * model.n_blocks + 1
    assert kinds.count("Gelu") == (0 if "swiglu" in name else model.n_blocks)
    producer = {o: n for n in nodes for o in n.output}
    softmaxes = [n for n in nodes if n.op_type == "Softmax"]
    assert len(softmaxes) == model.n_blocks
    for softmax in softmaxes:
        scores = producer[softmax.input[0]]
        assert scores.op_type == "MatMul", "nothing may stand between QK^T and the softmax"
        assert producer[scores.input[0]].op_type == "Mul", "the scale belongs to Q"
        assert producer[scores.input[1]].op_type == "Transpose"


@pytest.mark.parametrize("name", FP16)
def test_half_inside_float_at_the_borders_and_in_layer_norm(graphs, name):
    loaded = load_graph(graphs[name][1])
    types = element_types(loaded)
    assert type_counts(loaded) == {"FLOAT16": 1 + 6 * 2}
    assert {types[n] for n in ("images", "cls", "patches")} == {"FLOAT"}
    norms = [n for n in loaded.graph.node if n.op_type == "LayerNormalization"]
    assert {types[v] for n in norms for v in (*n.input, *n.output)} == {"FLOAT"}
    inside = {types[n.output[0]] for n in loaded.graph.node if n.op_type in ("Add", "Mul", "Softmax", "Gelu", "Sigmoid")}
    assert inside == {"FLOAT16"}
    floats = {t.name for t in loaded.graph.initializer if types[t.name] == "FLOAT"}
    assert floats == {i for n in norms for i in n.input[1:]}, "a float weight outside LayerNorm doubles its size"


def test_layer_norm_weights_are_not_rounded_to_half(tmp_path):
    model = backbone()
    with torch.no_grad():
        model.get_parameter("norm.weight").fill_(1.0001)  # rounds to 1 in half
    export_onnx(model, tmp_path / "m.onnx", 32, "fp16")
    arrays = [numpy_helper.to_array(t) for t in load_graph(tmp_path / "m.onnx").graph.initializer]
    assert any(a.dtype == np.float32 and np.all(a == np.float32(1.0001)) for a in arrays if a.ndim == 1)


@pytest.mark.parametrize(("claimed", "name"), [("fp16", "mlp-fp32"), ("fp32", "mlp-fp16"), ("int8", "mlp-fp16")])
def test_a_graph_under_a_wrong_name_is_caught(graphs, claimed, name):
    with pytest.raises(GateFailed, match=f"small.onnx is called {claimed} but"):
        verify_precision(load_graph(graphs[name][1]), claimed, "small.onnx")


def test_one_float_product_among_half_ones_is_caught(graphs):
    loaded = load_graph(graphs["mlp-fp16"][1])
    node = next(n for n in linear_nodes(loaded) if n.name == "blocks.1.mlp.fc2")
    weight = next(t for t in loaded.graph.initializer if t.name == node.input[1])
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float32), weight.name))
    up = onnx.helper.make_node("Cast", [node.input[0]], ["up"], to=onnx.TensorProto.FLOAT)
    down = onnx.helper.make_node("Cast", ["wide"], [node.output[0]], to=onnx.TensorProto.FLOAT16)
    node.input[0], node.output[0] = "up", "wide"
    at = list(loaded.graph.node).index(node)
    loaded.graph.node.insert(at, up)
    loaded.graph.node.insert(at + 2, down)
    with pytest.raises(GateFailed, match=r"1 of 13 matrix products are not FLOAT16 \(blocks.1.mlp.fc2 is FLOAT\)"):
        verify_precision(loaded, "fp16")


def test_linear_layers_carry_their_modules_names(graphs):
    model, path, _ = graphs["swiglu-fp32"]
    want = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert [n.name for n in linear_nodes(load_graph(path))] == want


@pytest.mark.parametrize("name", [*FP32, "timm"])
def test_the_residual_stream_is_named_after_its_block(graphs, name, tmp_path):
    """Each `blocks.i` holds what the torch block returns, not the sum in its middle or the block before."""
    if name == "timm":
        options = {"embed_dim": 32, "depth": 3, "num_heads": 2, "init_values": 1.0}
        model = TimmBackbone(TimmConfig(name="vit_tiny_patch16_224", image_size=32, patch=8, options=options)).eval()
        path, size, prefix = tmp_path / "timm.onnx", 32, "net."
        export_onnx(model, path, size)
    else:
        (model, path, size), prefix = graphs[name], ""
    names = [f"{prefix}blocks.{i}" for i in range(model.n_blocks)]
    seen: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _i, x: seen.append(x)) for _, block in graph.named_blocks(model)]
    images = pictures(2, size)
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    loaded = load_graph(path)
    assert [o.name for o in loaded.graph.output] == ["cls", "patches"]
    loaded.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names)
    session = onnxruntime.InferenceSession(serialize(loaded), providers=["CPUExecutionProvider"])
    got = session.run(names, {"images": images.numpy()})
    assert len(got) == len(seen) == model.n_blocks
    for a, b in zip(got, seen, strict=True):
        assert np.abs(a - b.numpy()).max() < 2e-5 * float(b.abs().max())
    assert float((seen[0] - seen[1]).abs().max()) > 1e-2  # else any two would do


@pytest.mark.parametrize("name", FP32 + FP16)
def test_the_products_of_attention_are_named(graphs, name):
    model, path, _ = graphs[name]
    nodes = load_graph(path).graph.node
    softmaxes = [n for n in nodes if n.op_type == "Softmax"]
    made = {o: n for n in nodes for o in n.output}
    assert [made[s.input[0]].name for s in softmaxes] == [f"blocks.{i}.attn.qk" for i in range(model.n_blocks)]
    behind = [next(n for n in nodes if s.output[0] in n.input) for s in softmaxes]
    assert [n.name for n in behind] == [f"blocks.{i}.attn.av" for i in range(model.n_blocks)]


def test_same_weights_same_bytes_in_another_process_and_folder(graphs, tmp_path):
    _, path, size = graphs["swiglu-fp16"]
    script = (
        "import sys; from pathlib import Path; from tiny import backbone; from export.graph import export_onnx\n"
        f"export_onnx(backbone(ffn='swiglu', registers=3), Path(sys.argv[1]), {size}, 'fp16')"
    )
    here = Path(__file__).resolve()
    env = {
        **os.environ,
        "PYTHONHASHSEED": "123",
        "PYTHONPATH": f"{here.parents[2]}{os.pathsep}{here.parent}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-c", script, "again.onnx"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", FP32 + FP16)
def test_nothing_of_the_machine_inside(graphs, name):
    path = graphs[name][1]
    data, loaded = path.read_bytes(), load_graph(path)
    for trace in (str(Path.cwd()), str(Path.home()), str(path.parent), "site-packages", ".py", "timm", "torch", "distill"):
        assert trace.encode() not in data, trace
    items = [loaded, loaded.graph, *loaded.graph.node, *loaded.graph.initializer, *loaded.graph.input, *loaded.graph.output]
    assert not any(i.doc_string or len(i.metadata_props) for i in items)
    assert loaded.opset_import[0].version >= 19
    assert serialize(loaded) == data


def test_the_callers_model_is_left_alone(tmp_path):
    model = backbone().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fused = [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")]
    export_onnx(model, tmp_path / "m.onnx", 32, "fp16")
    assert model.training
    assert [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")] == fused
    assert all(p.requires_grad for p in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[k], v) and after[k].dtype == torch.float32 for k, v in before.items())


@pytest.mark.parametrize("size", [0, 4, 30])
def test_a_size_that_is_no_multiple_of_the_patch(tmp_path, size):
    with pytest.raises(UserError, match=f"Resolution {size} does not divide into patches of 8 px"):
        export_onnx(backbone(), tmp_path / "m.onnx", size)


@pytest.mark.parametrize(("value", "precision"), [(float("nan"), ""), (1e6, " in fp16"), (3.4e38, " in bf16")])
def test_weights_that_the_precision_cannot_hold(tmp_path, value, precision):
    model = backbone()
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.fc1.weight")[0, 0] = value
    with pytest.raises(UserError, match=rf"blocks.1.mlp.fc1.weight holds values that are not finite{precision}; train"):
        export_onnx(model, tmp_path / "m.onnx", 32, precision.removeprefix(" in ") or "fp32")
    assert list(tmp_path.iterdir()) == []


def test_larger_than_an_onnx_file_can_be(tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "PROTOBUF_LIMIT", sum(p.numel() for p in backbone().parameters()) * 4 - 1)
    with pytest.raises(UserError, match="over the 2 GB of an ONNX file; export fp16 instead"):
        export_onnx(backbone(), tmp_path / "m.onnx", 32)


def test_an_exporter_that_decomposes_layer_norm_is_refused(tmp_path, monkeypatch, graphs):
    broken = load_graph(graphs["mlp-fp32"][1])
    next(n for n in broken.graph.node if n.op_type == "LayerNormalization").op_type = "Identity"
    monkeypatch.setattr(graph, "_trace", lambda module, size, stream: broken)
    with pytest.raises(EnvironmentFailed, match="exported 4 of 5 LayerNorms as one op"):
        export_onnx(graphs["mlp-fp32"][0], tmp_path / "m.onnx", 32)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_onnx(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="is not an ONNX file"):
        load_graph(tmp_path / "m.onnx")
