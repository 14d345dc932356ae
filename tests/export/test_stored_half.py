"""Large constants in FP16: the same features within FP16's rounding, fewer bytes, and nothing that FP16 cannot hold."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.engine import build_engine
from export.engine_config import EngineConfig
from export.graphs.nodes import linear_nodes
from export.graphs.stored_half import LEAST_BYTES, store_half
from export.sessions import usual_session

WIDE = 160
assert 4 * WIDE * WIDE > LEAST_BYTES


def model_with(weight: np.ndarray, extra: np.ndarray | None = None):
    """x [n, WIDE] -> MatMul with `weight` -> Add of a small bias."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["y"], name="layer"),
            helper.make_node("Add", ["y", "b"], ["z"], name="add"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDE])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", WIDE])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.ones(WIDE, np.float32), "b")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def weights() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(WIDE, WIDE)).astype(np.float32)


def test_half_the_bytes_and_the_same_result():
    model = model_with(weights())
    whole = model.ByteSize()
    x = np.random.default_rng(1).normal(size=(3, WIDE)).astype(np.float32)
    before = usual_session(model.SerializeToString()).run(None, {"x": x})[0]
    assert store_half(model) == 2 * WIDE * WIDE
    assert model.ByteSize() < whole - 2 * WIDE * WIDE + 200
    after = usual_session(model.SerializeToString()).run(None, {"x": x})[0]
    assert not np.array_equal(before, after), "FP16 rounds, or nothing was stored in it"
    np.testing.assert_allclose(after, before, atol=2e-3 * np.abs(before).max())
    types = {t.name: t.data_type for t in model.graph.initializer}
    assert types == {"w.half": TensorProto.FLOAT16, "b": TensorProto.FLOAT}, "a small constant stays"


def test_a_layer_whose_weight_is_stored_so_is_still_a_linear_layer():
    model = model_with(weights())
    store_half(model)
    assert [n.name for n in linear_nodes(model)] == ["layer"]


@pytest.mark.parametrize("value", [1e6, np.nan, np.inf])
def test_what_half_cannot_hold_stays(value):
    weight = weights()
    weight[3, 4] = value
    model = model_with(weight)
    before = model.SerializeToString(deterministic=True)
    assert store_half(model) == 0
    assert model.SerializeToString(deterministic=True) == before


def test_values_below_what_half_can_tell_apart_stay():
    model = model_with(weights() * np.float32(1e-7))
    assert store_half(model) == 0, "FP16 would round most of them to zero"


def test_once_is_enough():
    model = model_with(weights())
    store_half(model)
    assert store_half(model) == 0


def test_tensorrt_rtx_takes_a_convolution_stored_so(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    weight = np.random.default_rng(0).normal(size=(64, 3, 14, 14)).astype(np.float32)
    shape = ["n", 3, 28, 28]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["images", "w"], ["cls"], name="patch_embed.proj", strides=[14, 14])],
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("cls", TensorProto.FLOAT, ["n", 64, 2, 2])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    assert store_half(model) == weight.nbytes // 2
    (tmp_path / "g.onnx").write_bytes(model.SerializeToString())
    built = build_engine(tmp_path / "g.onnx", tmp_path / "g.engine", "tensorrt_rtx", "fp32", (1, 1, 2), ["8.6"], EngineConfig())
    assert built.matmul_types == {"FLOAT": 1}
