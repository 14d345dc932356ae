"""FP16 and BF16 graphs: typed, with named layers in FP32; what overflows or rounds too much is found, and only that is kept."""

import copy

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import ModelProto
from tiny import backbone, pictures

from distill.errors import GateFailed, UserError
from distill.models.backbone import Backbone
from export.graph import export_onnx, torch_graph
from export.graphs.nodes import constants, element_types, kept_float, load_graph, serialize, type_counts, verify_precision
from export.graphs.rounded import rounded
from export.graphs.typed import layer_nodes, matching_layers, retype
from export.half import fit_half, fit_half_graph
from export.probes import OnnxProbe

SIZE, GATE = 32, 0.999
PRODUCTS = 1 + 6 * 4


@pytest.fixture(scope="module")
def model() -> Backbone:
    return backbone(depth=4)


@pytest.fixture(scope="module")
def source(model) -> ModelProto:
    return torch_graph(model, SIZE)


def changed(model: Backbone, scores: float = 1.0, **factors: float) -> ModelProto:
    """The graph of the model with parameters multiplied: `blocks_2_mlp_fc2_weight=1e5` is blocks.2.mlp.fc2.weight."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("blocks.1.attn.qkv.weight")[:64] *= scores  # of queries and keys
        for name, factor in factors.items():
            other.get_parameter(name.replace("patch_embed", "patch-embed").replace("_", ".").replace("-", "_")).mul_(factor)
    return torch_graph(other, SIZE)


class TestTypes:
    @pytest.mark.parametrize(("precision", "kind", "opset"), [("fp16", "FLOAT16", 20), ("bf16", "BFLOAT16", 22)])
    def test_typed_in_the_graph(self, source, precision, kind, opset):
        graph = retype(source, precision)
        types = element_types(graph)
        assert type_counts(graph) == {kind: PRODUCTS}
        assert graph.opset_import[0].version == opset
        assert {types[n] for n in ("images", "cls", "patches")} == {"FLOAT"}
        norms = [n for n in graph.graph.node if n.op_type == "LayerNormalization"]
        assert {types[v] for n in norms for v in (*n.input, *n.output)} == {"FLOAT"}
        assert {types[f"blocks.{i}"] for i in range(4)} == {kind}
        assert kept_float(graph) == []
        with pytest.raises(GateFailed, match="is called fp32 but 25 of 25"):
            verify_precision(graph, "fp32")

    @pytest.mark.parametrize("precision", ["fp16", "bf16"])
    @pytest.mark.parametrize(
        ("keep", "floats", "casts"),
        [
            (["blocks.2.mlp.fc2"], 1, 2),
            (["blocks.1.attn.qk"], 1, 3),
            (["blocks.2.mlp"], 2, 0),
            (["blocks.3"], 6, -4),
            (["blocks.[23]"], 12, -8),
            (["stream"], 0, 0),
            (["patch_embed.proj"], 1, 0),
            (["blocks.*.mlp.fc?"], 8, 0),
        ],
    )
    def test_named_layers_stay_in_float_between_casts(self, source, model, precision, keep, floats, casts):
        plain, graph = retype(source, precision), retype(source, precision, keep)
        counts = type_counts(graph)
        assert counts.get("FLOAT", 0) == floats
        assert sum(counts.values()) == PRODUCTS
        assert cast_count(graph) - cast_count(plain) == casts
        assert kept_float(graph) == matching_layers(layer_nodes(source), keep)
        images = pictures(2, SIZE)
        with torch.no_grad():
            want = model(images).patches.numpy()
        got = OnnxProbe(graph, as_gpu=True).run(images, ["patches"])["patches"]
        assert np.abs(got - want).max() < {"fp16": 0.02, "bf16": 0.15}[precision]

    def test_a_layer_kept_in_float_has_its_layer_scale_and_weights_in_float(self, source):
        graph = retype(source, "fp16", ["blocks.2.mlp.fc2"])
        types, stored = element_types(graph), constants(graph)
        (node,) = [n for n in graph.graph.node if n.name == "blocks.2.mlp.fc2"]
        assert types[node.input[1]] == "FLOAT"
        reader = node
        for _ in range(2):  # bias, LayerScale
            (reader,) = [n for n in graph.graph.node if reader.output[0] in n.input]
            assert types[reader.output[0]] == "FLOAT"
        assert reader.op_type == "Mul"
        (cast,) = [n for n in graph.graph.node if reader.output[0] in n.input]
        assert (cast.op_type, types[cast.output[0]]) == ("Cast", "FLOAT16")
        halves = [n for n, t in stored.items() if n.endswith("mlp.fc2.weight") and types[n] == "FLOAT16"]
        assert len(halves) == 3

    def test_a_name_that_nothing_has(self, source):
        with pytest.raises(UserError, match=r"keep_float names 'blocks.9', which no layer or block is called; there are"):
            retype(source, "fp16", ["blocks.1", "blocks.9"])

    def test_only_what_the_graph_lists_is_excused(self, source):
        graph = retype(source, "fp16", ["blocks.2.mlp.fc2"])
        verify_precision(graph, "fp16")
        del graph.metadata_props[:]
        with pytest.raises(GateFailed, match=r"1 of 25 matrix products are not FLOAT16 \(blocks.2.mlp.fc2 is FLOAT\)"):
            verify_precision(graph, "fp16")
        with pytest.raises(GateFailed, match=r"is called fp16 but 0 of 25 matrix products are not FLOAT16 \(there are none\)"):
            retype(source, "fp16", ["blocks.*", "patch_embed.proj"])

    def test_export_with_layers_in_float(self, model, source, tmp_path):
        export_onnx(model, tmp_path / "m.onnx", SIZE, "bf16", ["blocks.1"])
        assert (tmp_path / "m.onnx").read_bytes() == serialize(retype(source, "bf16", ["blocks.1"]))

    @pytest.mark.parametrize("keep", [[], ["blocks.2.mlp.fc2", "blocks.0.attn.qk", "stream"]])
    @pytest.mark.parametrize("precision", ["fp16", "bf16"])
    def test_compiles_into_an_engine(self, source, tmp_path, precision, keep):
        pytest.importorskip("tensorrt_rtx")
        from export.engine import build_engine

        (tmp_path / "m.onnx").write_bytes(serialize(retype(source, precision, keep)))
        info = build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", "tensorrt_rtx", precision, (1, 4, 16), ["8.6"])
        assert info.matmul_types == type_counts(load_graph(tmp_path / "m.onnx"))

    def test_bf16_runs_in_openvino(self, source, model):
        ov = pytest.importorskip("openvino")
        images = pictures(2, SIZE)
        core = ov.Core()
        found = core.compile_model(core.read_model(serialize(retype(source, "bf16"))), "CPU")([images.numpy()])
        with torch.no_grad():
            want = model(images).patches.numpy()
        assert np.abs(found["patches"] - want).max() < 0.15
        assert np.abs(want).max() > 1


class TestRounding:
    def test_rounds_where_the_typed_graph_rounds(self, source):
        """Every tensor that is half in the typed graph holds a half number, and no other does by chance."""
        images = pictures(2, SIZE)
        graph = rounded(retype(source, "bf16"))
        assert set(type_counts(graph)) == {"FLOAT"}
        probe = OnnxProbe(graph)
        for tensor in ("blocks.0", "blocks.3"):
            values = torch.from_numpy(probe.run(images, [tensor])[tensor])
            assert torch.equal(values, values.bfloat16().float())
        values = torch.from_numpy(probe.run(images, ["patches"])["patches"])
        assert not torch.equal(values, values.bfloat16().float())

    def test_an_overflow_that_onnxruntime_hides(self, model):
        """The reason for `rounded`: on a CPU ONNX Runtime computes half graphs in FP32, and what is infinite on a GPU is finite."""
        graph = retype(changed(model, blocks_2_mlp_fc2_weight=1e5, blocks_2_ls2_gamma=1e-5), "fp16")
        images = pictures(2, SIZE)
        assert not np.isfinite(OnnxProbe(graph, as_gpu=True).run(images, ["cls"])["cls"]).all()
        session = onnxruntime.InferenceSession(serialize(graph), providers=["CPUExecutionProvider"])
        hidden = np.isfinite(session.run(["cls"], {"images": images.numpy()})[0]).all()
        assert hidden, "ONNX Runtime has got half kernels: the parity of onnx-fp16 then sees overflow too"


class TestFit:
    def test_nothing_is_kept_without_need(self, source):
        _, report = fit_half_graph(source, "fp16", pictures(6, SIZE), GATE)
        assert report["kept_float"] == []
        assert len(report["cosines"]) == 4
        assert min(report["cosines"]) > GATE
        assert report["images"] == 6

    @pytest.mark.parametrize(
        ("factors", "kept"),
        [
            ({"blocks_2_mlp_fc2_weight": 1e5, "blocks_2_ls2_gamma": 1e-5}, ["blocks.2.mlp.fc2"]),
            ({"blocks_1_attn_proj_weight": 1e7, "blocks_1_ls1_gamma": 1e-7}, ["blocks.1.attn.proj"]),  # the weights themselves
            (
                {"blocks_1_mlp_fc1_weight": 6e4, "blocks_1_mlp_fc2_weight": 1 / 6e4},
                ["blocks.1.mlp"],
            ),  # GELU brings nothing back
            ({"scores": 300.0}, ["blocks.1.attn.qk"]),
            ({"blocks_1_ls2_gamma": 1e5}, ["stream"]),  # a residual stream beyond half floats
        ],
    )
    def test_only_the_guilty_layers_are_kept(self, model, factors, kept):
        graph, report = fit_half_graph(changed(model, **factors), "fp16", pictures(4, SIZE), GATE)
        assert [k for k in report["kept_float"] if k in kept] == kept
        assert len(report["kept_float"]) <= len(kept) + ("stream" in kept)  # the layer whose output overflows on its way there
        assert set(report["why"]) == set(report["kept_float"])
        assert min(report["outputs"].values()) >= GATE
        assert None not in report["cosines"]
        assert kept_float(graph) == report["kept_float"]
        verify_precision(graph, "fp16")

    def test_cosines_before_show_where_it_broke(self, model):
        graph = changed(model, blocks_2_mlp_fc2_weight=1e5, blocks_2_ls2_gamma=1e-5)
        _, report = fit_half_graph(graph, "fp16", pictures(4, SIZE), GATE)
        assert [c is None for c in report["cosines_before"]] == [False, False, True, True]

    def test_an_image_outside_the_probe_that_overflows(self, model, monkeypatch):
        """The layer overflows on bright images only, and the only bright one is not among those that the search starts with."""
        from export import half

        monkeypatch.setattr(half, "PROBE", 2)
        images = pictures(7, SIZE) * 0.05
        images[3] = pictures(1, SIZE, seed=5)[0] * 40
        graph = changed(model, patch_embed_proj_weight=1500.0)
        _, report = fit_half_graph(graph, "fp16", images[[0, 1, 6]], GATE)
        assert report["kept_float"] == []
        _, report = fit_half_graph(graph, "fp16", images, GATE)
        assert report["kept_float"]
        assert None not in report["outputs"].values()

    def test_rounding_is_bisected(self, model):
        """Huge channels behind one block make bf16 lose what stands beside them; the search keeps little, and it is enough."""
        graph = changed(model, blocks_1_attn_qkv_weight=12.0)
        images = pictures(4, SIZE)
        plain = retype(graph, "bf16")
        before = min(fit_half_graph(graph, "bf16", images, 0.5)[1]["outputs"].values())
        gate = 1 - (1 - before) / 3
        fitted, report = fit_half_graph(graph, "bf16", images, gate)
        assert report["kept_float"]
        assert min(report["outputs"].values()) >= gate
        assert type_counts(fitted)["BFLOAT16"] > PRODUCTS // 2
        assert report["passes"] < 60
        assert type_counts(plain) == {"BFLOAT16": PRODUCTS}

    def test_a_gate_that_only_fp32_can_meet(self, source):
        with pytest.raises(GateFailed, match=r"bf16 (misses the gate of 1.1|reaches the gate of 1.1 only)"):
            fit_half_graph(source, "bf16", pictures(2, SIZE), 1.1)

    def test_no_images(self, source):
        with pytest.raises(UserError, match="fp16 is checked on calibration images and got none"):
            fit_half_graph(source, "fp16", pictures(2, SIZE)[:0], GATE)

    def test_the_file_and_its_report(self, model, tmp_path):
        import json

        report = fit_half(model, tmp_path / "m.onnx", SIZE, "bf16", pictures(3, SIZE), 0.99)
        verify_precision(load_graph(tmp_path / "m.onnx"), "bf16")
        assert json.loads(json.dumps(report)) == report
        again = fit_half(model, tmp_path / "n.onnx", SIZE, "bf16", pictures(3, SIZE), 0.99)
        assert again == report
        assert (tmp_path / "n.onnx").read_bytes() == (tmp_path / "m.onnx").read_bytes()


def cast_count(graph: ModelProto) -> int:
    return sum(n.op_type == "Cast" for n in graph.graph.node)
