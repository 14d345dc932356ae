"""Engines are really compiled here, without a GPU; what the compiler refuses is named."""

import hashlib
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import pytest
from broken import set_constant
from fake_tensorrt import engine_of, fake
from requantized import requantized
from tiny import MEDIUM, backbone

from distill.errors import EnvironmentFailed, GateFailed, UserError
from export import engine
from export.engine import build_engine, load_runtime
from export.engine_config import BatchProfile, EngineConfig
from export.graph import export_onnx, load_graph, serialize

BATCHES = (1, 4, 16)
EVERY = ["8.6", "8.9", "12.0"]


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx has no wheels for this platform")


@pytest.fixture(scope="module")
def int8(graphs, tmp_path_factory) -> dict[str, Path]:
    """Q/DQ graphs with an FP16 remainder, as the rtx-int8 target compiles them, and one with an FP32 remainder."""
    folder, made = tmp_path_factory.mktemp("int8"), {}
    for name in ("mlp-fp16", "swiglu-fp16", "mlp-fp32"):
        made[name] = folder / f"{name}.onnx"
        onnx.save(requantized(load_graph(graphs[name][1]), "int8"), made[name])
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
    set_constant(model, "blocks.0.attn.qkv.in_zero", np.array(128, np.uint8))
    (tmp_path / "u8.onnx").write_bytes(serialize(model))
    with pytest.raises(
        GateFailed, match=r"(?s)cannot parse u8.onnx: blocks.0.attn.qkv.in_q \(QuantizeLinear\).*zero point"
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


# --- every precision, and every setting that compiles without a GPU ---


def built(model: onnx.ModelProto, folder: Path, precision, capabilities, config: EngineConfig | None = None):
    onnx.save(model, folder / "m.onnx")
    return build_engine(folder / "m.onnx", folder / "m.engine", "tensorrt_rtx", precision, BATCHES, capabilities, config)


@pytest.mark.parametrize(("to", "type_"), [("fp8", "FP8"), ("w8", "INT8-weight"), ("w4", "INT4-weight")])
def test_other_precisions_compile(rtx, graphs, tmp_path, to, type_):
    info = built(requantized(load_graph(graphs["mlp-fp16"][1]), to), tmp_path, to, ["8.9", "12.0"])
    assert info.proof.flops_share(("linear",))[type_] >= 0.7
    assert info.proof.source == "compiled plan"


def test_fp32_and_bf16_compile(rtx, graphs, tmp_path):
    info = build_engine(graphs["mlp-fp32"][1], tmp_path / "32.engine", "tensorrt_rtx", "fp32", BATCHES, EVERY)
    assert info.proof.flops_share() == {"FLOAT": 1.0}
    export_onnx(backbone(**MEDIUM), tmp_path / "bf16.onnx", 32, "bf16")
    info = build_engine(tmp_path / "bf16.onnx", tmp_path / "bf16.engine", "tensorrt_rtx", "bf16", BATCHES, EVERY)
    assert info.proof.flops_share() == {"BFLOAT16": 1.0}
    assert info.proof.attention["fused"] == 2


def test_fp8_needs_the_hardware(rtx, graphs, tmp_path):
    model = requantized(load_graph(graphs["mlp-fp16"][1]), "fp8")
    with pytest.raises(GateFailed, match=r"cannot compile m.onnx: .*sm86.* fp8"):
        built(model, tmp_path, "fp8", ["8.6"])
    assert not (tmp_path / "m.engine").exists()


# setting -> what the compiler's own config then says
COMPILES = {
    "version compatible": (EngineConfig(version_compatible=True, exclude_lean_runtime=True), "VERSION_COMPATIBLE", True),
    "sparse": (EngineConfig(sparse_weights=True), "SPARSE_WEIGHTS", True),
    "streaming": (EngineConfig(weight_streaming=True), "WEIGHT_STREAMING", True),
    "no tf32": (EngineConfig(tf32=False), "TF32", False),
    "names": (EngineConfig(profiling="names"), "TF32", True),
    "workspace": (EngineConfig(workspace_mb=256), "TF32", True),
}


@pytest.mark.parametrize("name", COMPILES)
def test_settings_that_compile_without_a_gpu(rtx, graphs, tmp_path, monkeypatch, name):
    config, flag, value = COMPILES[name]
    seen, real = [], engine.apply_config

    def spy(trt, settings, *rest):
        seen.append(settings)
        return real(trt, settings, *rest)

    monkeypatch.setattr(engine, "apply_config", spy)
    info = build_engine(graphs["mlp-fp16"][1], tmp_path / "m.engine", "tensorrt_rtx", "fp16", BATCHES, ["8.6", "8.9"], config)
    assert info.notes == []
    assert info.proof.flops_share() == {"FLOAT16": 1.0}
    assert seen[0].get_flag(getattr(rtx.BuilderFlag, flag)) is value
    if name == "names":
        assert seen[0].profiling_verbosity == rtx.ProfilingVerbosity.LAYER_NAMES_ONLY
    if name == "workspace":
        assert seen[0].get_memory_pool_limit(rtx.MemoryPoolType.WORKSPACE) == 256 << 20


def test_another_profile_costs_space(rtx, graphs, tmp_path):
    one = build_engine(graphs["mlp-fp16"][1], tmp_path / "1.engine", "tensorrt_rtx", "fp16", BATCHES, ["8.6"])
    config = EngineConfig(profiles=[BatchProfile(min_batch=1, opt_batch=1, max_batch=1)])
    two = build_engine(graphs["mlp-fp16"][1], tmp_path / "2.engine", "tensorrt_rtx", "fp16", BATCHES, ["8.6"], config)
    assert two.bytes > 1.2 * one.bytes


def test_workspace_that_is_too_small_is_refused(rtx, graphs, tmp_path, monkeypatch):
    from export import engine_config

    monkeypatch.setattr(engine_config, "MB", 1024)
    config = EngineConfig(workspace_mb=1)
    with pytest.raises(GateFailed, match=r"(?i)cannot compile .*workspace"):
        build_engine(graphs["mlp-fp16"][1], tmp_path / "m.engine", "tensorrt_rtx", "fp16", BATCHES, ["8.6"], config)


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        (EngineConfig(refit=True), "leave out refit"),
        (EngineConfig(strip_plan=True), "leave out strip_plan"),
        (EngineConfig(version_compatible=True), "lean runtime may be missing"),
    ],
)
def test_what_needs_more_than_this_machine_says_so(rtx, graphs, tmp_path, config, hint):
    """On a machine with a GPU, or with the lean runtime, these compile: then there is nothing to say."""
    try:
        build_engine(graphs["mlp-fp16"][1], tmp_path / "m.engine", "tensorrt_rtx", "fp16", BATCHES, ["8.6"], config)
    except GateFailed as e:
        assert hint in str(e)  # noqa: PT017  it may also compile
        assert not (tmp_path / "m.engine").exists()
    else:
        assert (tmp_path / "m.engine").exists()


def test_what_cross_compiling_leaves_out_is_said(rtx, graphs, tmp_path):
    config = EngineConfig(timing_cache=str(tmp_path / "cache"), hardware_compatibility="ampere_plus")
    info = build_engine(graphs["mlp-fp16"][1], tmp_path / "m.engine", "tensorrt_rtx", "fp16", BATCHES, ["8.6"], config)
    assert len(info.notes) == 2
    assert "takes no hardware compatibility" in info.notes[0]
    assert "timing_cache is left out" in info.notes[1]
    assert not (tmp_path / "cache").exists()


# --- TensorRT 10.3 and 11, whose names are faked ---

ALL = EngineConfig(
    profiles=[BatchProfile(min_batch=1, opt_batch=1, max_batch=1)],
    workspace_mb=512,
    version_compatible=True,
    exclude_lean_runtime=True,
    refit=True,
    strip_plan=True,
    hardware_compatibility="same_compute_capability",
    sparse_weights=True,
    weight_streaming=True,
    tf32=False,
)
ASKED = {"VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME", "REFIT", "STRIP_PLAN", "SPARSE_WEIGHTS", "WEIGHT_STREAMING"}


@pytest.fixture
def on_gpu(monkeypatch):
    """TensorRT of a version on a machine with an Ampere GPU."""

    def install(version, **kwargs):
        module = fake(version, **kwargs)
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        monkeypatch.setattr(engine, "gpu_capability", lambda: "8.6")
        return module

    return install


def tensorrt(path: Path, out: Path, precision, config=None):
    return build_engine(path, out, "tensorrt", precision, BATCHES, [], config)


@pytest.mark.parametrize(("version", "bits", "level"), [("10.3.0", 3, None), ("11.4.0", 1, "SAME_COMPUTE_CAPABILITY")])
def test_every_setting_reaches_tensorrt(on_gpu, int8, tmp_path, version, bits, level):
    model = load_graph(int8["mlp-fp16"])
    trt = on_gpu(version, inspect=lambda: engine_of(model, int(version.split(".")[0]), "INT8"))
    info = tensorrt(int8["mlp-fp16"], tmp_path / "m.engine", "int8", ALL)
    assert trt.network_bits == bits, "strongly typed, whatever the version"
    assert trt.config.flags == ASKED
    assert trt.config.pools == {"WORKSPACE": 512 << 20}
    assert trt.config.profiling_verbosity == "DETAILED"
    assert trt.config.hardware_compatibility_level == level
    assert trt.config.profiles == [tuple((b, 3, 32, 32) for b in BATCHES), tuple((1, 3, 32, 32) for _ in range(3))]
    lacks = [n for n in info.notes if "SAME_COMPUTE_CAPABILITY" in n]
    assert len(lacks) == len(info.notes) == (0 if level else 1), "what a version lacks is one sentence"
    assert info.capabilities == ["8.6"]
    assert (tmp_path / "m.engine").read_bytes() == b"plan"
    assert info.proof.source == "engine inspector"
    assert info.proof.flops_share(("linear",)) == {"INT8": 1.0}


def test_defaults_touch_nothing(on_gpu, int8, tmp_path):
    trt = on_gpu("11.4.0")
    info = tensorrt(int8["mlp-fp16"], tmp_path / "m.engine", "int8")
    assert trt.config.flags == {"TF32"}
    assert trt.config.pools == {}
    assert trt.config.hardware_compatibility_level is None
    assert info.proof.source == "graph"
    assert "the engine's layers were not listed" in info.proof.notes[-1]


def test_an_int8_engine_that_runs_fp16_is_refused(on_gpu, int8, tmp_path):
    model = load_graph(int8["mlp-fp16"])
    on_gpu("11.4.0", inspect=lambda: engine_of(model, 11, "FLOAT16"))
    with pytest.raises(
        GateFailed, match=r"the tensorrt engine of mlp-fp16.onnx is called int8 but only 0% of its FLOPs are INT8"
    ):
        tensorrt(int8["mlp-fp16"], tmp_path / "m.engine", "int8")
    assert list(tmp_path.iterdir()) == []


def test_a_stripped_plan_without_refit_is_refitted_with_the_same_weights(on_gpu, int8, tmp_path):
    trt = on_gpu("11.4.0")
    tensorrt(int8["mlp-fp16"], tmp_path / "m.engine", "int8", EngineConfig(strip_plan=True))
    assert trt.config.flags == {"TF32", "STRIP_PLAN", "REFIT_IDENTICAL"}


def test_a_timing_cache_is_read_and_written_back(on_gpu, int8, tmp_path):
    trt = on_gpu("10.3.0")
    config = EngineConfig(timing_cache=str(tmp_path / "deep" / "cache"))
    tensorrt(int8["mlp-fp16"], tmp_path / "m.engine", "int8", config)
    assert (tmp_path / "deep" / "cache").read_bytes() == b"+measured"
    tensorrt(int8["mlp-fp16"], tmp_path / "m.engine", "int8", config)
    assert trt.config.cache.data == b"+measured"
    (tmp_path / "deep" / "cache").write_bytes(b"other version")
    with pytest.raises(UserError, match=r"cache is a timing cache of another version or GPU"):
        tensorrt(int8["mlp-fp16"], tmp_path / "m.engine", "int8", config)
    assert (tmp_path / "deep" / "cache").read_bytes() == b"other version", "a cache that is not ours is left alone"


def test_flags_that_a_version_lacks_are_sentences(on_gpu, int8, tmp_path):
    trt = on_gpu("10.3.0")
    for name in ("WEIGHT_STREAMING", "TF32"):
        delattr(trt.BuilderFlag, name)
    del trt.ProfilingVerbosity
    del trt.MemoryPoolType
    config = EngineConfig(weight_streaming=True, tf32=False, workspace_mb=1)
    info = tensorrt(int8["mlp-fp16"], tmp_path / "m.engine", "int8", config)
    assert [n.split(":")[0] for n in info.notes] == [
        "tensorrt 10.3.0 has no WEIGHT_STREAMING",
        "tensorrt 10.3.0 has no TF32 to turn off",
        "tensorrt 10.3.0 has no memory pools",
        "tensorrt 10.3.0 has no detailed profiling",
    ]


def test_what_tensorrt_refuses_is_its_own_sentence(on_gpu, int8, tmp_path):
    on_gpu("11.4.0", plan=None)
    with pytest.raises(GateFailed, match=r"tensorrt 11.4.0 cannot compile mlp-fp16.onnx: .*blocks.0.attn.qkv\.$"):
        tensorrt(int8["mlp-fp16"], tmp_path / "m.engine", "int8")


def test_settings_that_contradict_each_other():
    assert EngineConfig().problems() == []
    assert ALL.problems() == []
    assert EngineConfig(workspace_mb=0).problems() == ["workspace_mb must be at least 1, got 0"]
    assert EngineConfig(exclude_lean_runtime=True).problems()[0].startswith("exclude_lean_runtime does nothing")
    bad = EngineConfig(profiles=[BatchProfile(min_batch=2, opt_batch=1)])
    assert bad.problems() == ["profiles: min_batch, opt_batch and max_batch must be at least 1 and not decrease, got 2, 1, 64"]
