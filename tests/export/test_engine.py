"""Engines are really compiled here, without a GPU; what the compiler refuses is named."""

import hashlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper
from tiny import pictures

from distill.errors import EnvironmentFailed, GateFailed, UserError
from export import engine
from export.engine import build_engine, load_runtime
from export.graph import constants, load_graph, serialize
from export.quantize import QuantizeConfig, activation_scales, quantize

BATCHES = (1, 4, 16)
EVERY = ["8.6", "8.9", "12.0"]


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx has no wheels for this platform")


@pytest.fixture(scope="module")
def int8(graphs, tmp_path_factory) -> dict[str, Path]:
    """Q/DQ graphs with an FP16 remainder, as the rtx-int8 target compiles them, and one with an FP32 remainder."""
    folder, made = tmp_path_factory.mktemp("int8"), {}
    for name in ("mlp", "swiglu"):
        _, source, size = graphs[f"{name}-fp32"]
        scales = activation_scales(source, pictures(4, size), QuantizeConfig())
        for precision in ("fp16", "fp32"):
            made[f"{name}-{precision}"] = folder / f"{name}-{precision}.onnx"
            graph, _ = quantize(load_graph(graphs[f"{name}-{precision}"][1]), scales, QuantizeConfig())
            made[f"{name}-{precision}"].write_bytes(serialize(graph))
    return made


@pytest.mark.parametrize("name", ["mlp", "swiglu"])
def test_fp16_compiles_for_three_generations(rtx, graphs, tmp_path, name):
    source, out = graphs[f"{name}-fp16"][1], tmp_path / "m.engine"
    info = build_engine(source, out, "tensorrt_rtx", "fp16", BATCHES, EVERY)
    data = out.read_bytes()
    assert (info.bytes, info.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert info.capabilities == EVERY
    assert info.matmul_types == {"FLOAT16": 13}
    assert info.bytes > 0.9 * source.stat().st_size, "the weights are inside"
    assert info.layers > 50
    assert 0 < info.seconds < 120
    assert info.notes == []


@pytest.mark.parametrize("name", ["mlp-fp16", "swiglu-fp16", "mlp-fp32"])
def test_int8_compiles(rtx, int8, tmp_path, name):
    info = build_engine(int8[name], tmp_path / "m.engine", "tensorrt_rtx", "int8", BATCHES, EVERY)
    assert info.matmul_types == {"FLOAT16" if "16" in name else "FLOAT": 5, "INT8": 8}
    assert (tmp_path / "m.engine").stat().st_size == info.bytes > 100_000


def test_a_uint8_zero_point_is_refused_by_name(rtx, int8, tmp_path):
    model = load_graph(int8["mlp-fp16"])
    zero = constants(model)["zero"]
    zero.CopyFrom(numpy_helper.from_array(np.array(128, np.uint8), "zero"))
    (tmp_path / "u8.onnx").write_bytes(serialize(model))
    with pytest.raises(
        GateFailed, match=r"(?s)cannot parse u8.onnx: blocks.0.attn.qkv.input_q \(QuantizeLinear\).*zero point"
    ) as e:
        build_engine(tmp_path / "u8.onnx", tmp_path / "m.engine", "tensorrt_rtx", "int8", BATCHES, ["8.6"])
    assert "\n" not in str(e.value)
    assert not (tmp_path / "m.engine").exists()


def test_fp32_under_an_fp16_name_is_caught_before_compiling(rtx, graphs, tmp_path):
    with pytest.raises(GateFailed, match=r"mlp-fp32.onnx is called fp16 but 13 of 13 matrix products are not FLOAT16"):
        build_engine(graphs["mlp-fp32"][1], tmp_path / "m.engine", "tensorrt_rtx", "fp16", BATCHES, ["8.6"])
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_it_does_not_compile_for(rtx, graphs, tmp_path):
    with pytest.raises(UserError, match=r"does not compile for 9\.0, only for 7\.5, 8\.0, 8\.6"):
        build_engine(graphs["mlp-fp16"][1], tmp_path / "m.engine", "tensorrt_rtx", "fp16", BATCHES, ["8.6", "9.0"])


def test_the_capabilities_that_recipes_may_name_exist(rtx):
    assert {f"SM{c.replace('.', '')}" for c in engine.RTX_CAPABILITIES} <= set(rtx.ComputeCapability.__members__)


def test_missing_packages_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(EnvironmentFailed, match="tensorrt_rtx is not installed; pip install tensorrt_rtx"):
        load_runtime("tensorrt_rtx")
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))  # bindings without libraries
    with pytest.raises(
        EnvironmentFailed, match=r"tensorrt is installed but does not load .* pip install 'decant-vision\[tensorrt\]'"
    ):
        load_runtime("tensorrt")


def test_tensorrt_needs_the_gpu_it_builds_for(monkeypatch, graphs, tmp_path):
    module = types.ModuleType("tensorrt")
    module.Logger, module.__version__ = object, "10.3.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(engine, "gpu_capability", lambda: None)
    with pytest.raises(EnvironmentFailed, match="only on a machine with the CUDA GPU"):
        build_engine(graphs["mlp-fp16"][1], tmp_path / "m.engine", "tensorrt", "fp16", BATCHES, [])


@pytest.mark.parametrize(("flags", "bits"), [(["STRONGLY_TYPED"], 1), (["EXPLICIT_BATCH", "STRONGLY_TYPED"], 3), ([], 0)])
def test_networks_are_strongly_typed_wherever_that_is_a_choice(flags, bits):
    """10.x must be asked, with an explicit batch in the oldest; later ones know nothing else and dropped the flags."""
    asked = []

    class Builder:
        def create_network(self, value: int) -> str:
            asked.append(value)
            return "network"

    class Parser:
        def __init__(self, network: str, log: object): ...

        def parse(self, data: bytes) -> bool:
            return True

    names = types.SimpleNamespace(**{name: i for i, name in enumerate(flags)})
    trt = types.SimpleNamespace(NetworkDefinitionCreationFlag=names, OnnxParser=Parser)
    network, _ = engine._parse(trt, Builder(), None, b"", "tensorrt 10.3", "m.onnx")
    assert network == "network"
    assert asked == [bits]
