"""Artifacts on disk as Encoders: what they say about themselves, what they refuse."""

import dataclasses
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import backbone, pictures

from distill.data.preprocess import Preprocess
from distill.encoder import Encoder, TorchEncoder
from distill.errors import EnvironmentFailed, UserError
from distill.files import read_json, sha256_file, write_json
from export import runtimes
from export.artifact import Artifact, ArtifactFile, ExtraFile, TensorSpec, Unrunnable, read_artifact
from export.graph import export_onnx
from export.runtimes import EngineEncoder, OnnxEncoder, OpenVinoEncoder, open_artifact, why_unrunnable
from export.sessions import exact_session

OPENVINO = {"runtime": "openvino", "target": "openvino-fp32"}


def artifact_of(path: Path, folder: Path, size: int, **changes: Any) -> Artifact:
    """An artifact folder around one file, as an export target writes it."""
    folder.mkdir(parents=True)
    (folder / path.name).write_bytes(path.read_bytes())
    entry = ArtifactFile(
        path=path.name,
        resolution=size,
        sha256=sha256_file(path),
        bytes=path.stat().st_size,
        inputs=[TensorSpec(name="images", dtype="float32", shape=["batch", 3, size, size])],
        outputs=[TensorSpec(name="cls", dtype="float32", shape=["batch", 192])],
        preprocess=dataclasses.asdict(Preprocess(size, size)),
    )
    values: dict[str, Any] = {"student": "small", "target": "onnx-fp32", "precision": "fp32", "runtime": "onnxruntime"}
    values |= {"files": [entry], "source": "torch-fp32", "dim": 192, "patch": 8, "opset": 20, "max_batch": 16}
    values |= {"build_seconds": 1.0, "folder": folder}
    return Artifact(**{**values, **changes}).write()


@pytest.fixture
def onnx_artifact(graphs, tmp_path) -> Artifact:
    _, path, size = graphs["mlp-fp32"]
    return artifact_of(path, tmp_path / "onnx-fp32", size)


@pytest.fixture
def engine_artifact(tmp_path) -> Artifact:
    (tmp_path / "m.engine").write_bytes(b"plan")
    engine = {"target": "rtx-fp16", "precision": "fp16", "runtime": "tensorrt_rtx", "compute_capabilities": ["8.6", "8.9"]}
    return artifact_of(tmp_path / "m.engine", tmp_path / "rtx-fp16", 32, **engine)


def test_round_trip(onnx_artifact):
    again = read_artifact(onnx_artifact.folder)
    assert again == onnx_artifact
    assert again.size_mb() == pytest.approx(onnx_artifact.files[0].bytes / 1e6)
    assert "folder" not in read_json(onnx_artifact.folder / "artifact.json"), "a path of the machine does not ship"


@pytest.mark.parametrize("threads", [1, None])
def test_onnx_is_an_encoder_like_the_torch_model(graphs, onnx_artifact, threads):
    encoder = open_artifact(read_artifact(onnx_artifact.folder), threads=threads)
    assert isinstance(encoder, OnnxEncoder)
    assert isinstance(encoder, Encoder)
    images = pictures(3, 32)
    got, want = encoder(images), TorchEncoder(graphs["mlp-fp32"][0])(images)
    assert torch.allclose(got.cls, want.cls, atol=1e-4)
    assert torch.allclose(got.patches, want.patches, atol=1e-4)
    assert got.patches.dtype == torch.float32
    c = encoder.conditions
    assert encoder.target == "onnx-fp32"
    assert c["artifact_sha256"] == onnx_artifact.files[0].sha256
    assert (c["precision"], c["resolution"]) == ("fp32", 32)
    assert c["runtime"].startswith("onnxruntime ")
    if not torch.cuda.is_available():
        assert (c["device"], c["threads"]) == ("cpu", threads or runtimes.available_cores())
    assert encoder.session.get_session_options().intra_op_num_threads == (threads or runtimes.available_cores())


def test_images_of_another_size(onnx_artifact):
    with pytest.raises(UserError, match=r"takes images \[batch, 3, 32, 32\] and got \[2, 3, 40, 40\]"):
        open_artifact(onnx_artifact)(pictures(2, 40))
    with pytest.raises(UserError, match=r"got \[0, 3, 32, 32\]"):
        open_artifact(onnx_artifact)(pictures(0, 32))


def test_a_resolution_that_was_not_exported(onnx_artifact):
    with pytest.raises(UserError, match=r"holds no file for 64 px \(only 32\)"):
        open_artifact(onnx_artifact, 64)


def test_the_weights_beside_an_openvino_file_name_its_numbers_too(onnx_artifact):
    def hashed(weights: str) -> str:
        entry = onnx_artifact.file().model_copy(update={"path": "model-32.xml"})
        beside = ExtraFile(path="model-32.bin", sha256=weights, bytes=4)
        return onnx_artifact.model_copy(update={"files": [entry], "extras": [beside]}).content_sha256(entry)

    assert hashed("a" * 64) != hashed("b" * 64)
    assert onnx_artifact.content_sha256(onnx_artifact.file()) == onnx_artifact.file().sha256


def test_a_changed_file_is_not_loaded(onnx_artifact, monkeypatch):
    path = onnx_artifact.path(onnx_artifact.files[0])
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(bytes(data))
    monkeypatch.setattr(
        runtimes.onnxruntime, "InferenceSession", lambda *a, **k: pytest.fail("loaded before its hash was checked")
    )
    with pytest.raises(UserError, match="was changed since it was exported"):
        open_artifact(read_artifact(onnx_artifact.folder))


def test_a_file_that_this_onnxruntime_cannot_load(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"\xff" * 64)
    with pytest.raises(Unrunnable, match=r"onnxruntime .* cannot load m.onnx"):
        open_artifact(artifact_of(tmp_path / "m.onnx", tmp_path / "a", 32))


def test_bf16_in_onnxruntime_runs_or_says_why_not(tmp_path):
    """ONNX Runtime has no BF16 kernels on most CPUs."""
    model = backbone()
    export_onnx(model, tmp_path / "m.onnx", 32, "bf16")
    artifact = artifact_of(tmp_path / "m.onnx", tmp_path / "a", 32, target="onnx-bf16", precision="bf16")
    images, reason = pictures(2, 32), ""
    try:
        got = open_artifact(artifact, threads=1)(images)
    except Unrunnable as e:
        reason = str(e)
    if reason:
        assert re.match(r"onnxruntime .* cannot load m.onnx: .*Could not find an implementation for Conv", reason)
    else:
        assert (got.patches - TorchEncoder(model)(images).patches).abs().max() < 0.2


def test_engines_say_why_they_cannot_run(engine_artifact, monkeypatch):
    monkeypatch.setattr(runtimes, "gpu_capability", lambda: None)
    with pytest.raises(Unrunnable, match=r"^no CUDA GPU on this machine; the tensorrt_rtx engine is compiled for SM 8.6, 8.9$"):
        open_artifact(engine_artifact)
    monkeypatch.setattr(runtimes, "gpu_capability", lambda: "9.0")
    with pytest.raises(Unrunnable, match=r"GPU is SM 9.0; the tensorrt_rtx engine is compiled for SM 8.6, 8.9"):
        open_artifact(engine_artifact)
    monkeypatch.setattr(runtimes, "gpu_capability", lambda: "8.9")
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    with pytest.raises(Unrunnable, match="tensorrt_rtx is not installed"):
        open_artifact(engine_artifact)
    assert why_unrunnable("onnxruntime", []) is None


class FakeTrt(types.SimpleNamespace):
    """A runtime that records what it is asked to do: what matters here happens before any GPU is touched."""

    def __init__(self, valid: bool):
        done: list[str] = []

        class Runtime:
            def __init__(self, log: object): ...

            def get_engine_validity(self, data: bytes) -> tuple[int, int]:
                done.append("validity")
                return (0 if valid else 2), 2

            def deserialize_cuda_engine(self, data: bytes) -> None:
                done.append("deserialize")

        members = {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2}
        super().__init__(
            Runtime=Runtime,
            done=done,
            __version__="1.7",
            Logger=object,
            ILogger=type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0}),
            EngineValidity=types.SimpleNamespace(INVALID=2),
            EngineInvalidityDiagnostics=types.SimpleNamespace(__members__=members),
        )


def test_an_engine_is_hashed_before_it_is_deserialized(engine_artifact, monkeypatch):
    trt = FakeTrt(valid=True)
    monkeypatch.setattr(runtimes, "load_runtime", lambda name: trt)
    engine_artifact.path(engine_artifact.files[0]).write_bytes(b"evil")
    with pytest.raises(UserError, match="was changed since it was exported"):
        EngineEncoder(engine_artifact, engine_artifact.files[0])
    assert trt.done == []


def test_an_engine_that_the_runtime_calls_invalid_is_not_deserialized(engine_artifact, monkeypatch):
    trt = FakeTrt(valid=False)
    monkeypatch.setattr(runtimes, "load_runtime", lambda name: trt)
    with pytest.raises(Unrunnable, match=r"says that m\.engine cannot run here: unsupported cc"):
        EngineEncoder(engine_artifact, engine_artifact.files[0])
    assert trt.done == ["validity"]


def test_an_engine_that_does_not_load(engine_artifact, monkeypatch):
    trt = FakeTrt(valid=True)
    monkeypatch.setattr(runtimes, "load_runtime", lambda name: trt)
    with pytest.raises(Unrunnable, match=r"tensorrt_rtx 1.7 cannot load m.engine: it gave no reason"):
        EngineEncoder(engine_artifact, engine_artifact.files[0])
    assert trt.done == ["validity", "deserialize"]


class TestOpenVino:
    """An OpenVINO artifact is an ONNX graph or an IR with its weights beside it."""

    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("openvino")

    @pytest.fixture
    def ir(self, graphs, tmp_path) -> Artifact:
        import openvino as ov

        (tmp_path / "made").mkdir()
        core = ov.Core()
        ov.save_model(core.read_model(graphs["mlp-fp32"][1]), tmp_path / "made" / "m.xml", compress_to_fp16=False)
        artifact = artifact_of(tmp_path / "made" / "m.xml", tmp_path / "ir", 32, **OPENVINO)
        weights = tmp_path / "made" / "m.bin"
        (artifact.folder / "m.bin").write_bytes(weights.read_bytes())
        extra = ExtraFile(path="m.bin", sha256=sha256_file(weights), bytes=weights.stat().st_size)
        return artifact.model_copy(update={"extras": [extra]}).write()

    @pytest.fixture
    def onnx(self, graphs, tmp_path) -> Artifact:
        return artifact_of(graphs["mlp-fp32"][1], tmp_path / "ov", 32, **OPENVINO)

    @pytest.mark.parametrize("kind", ["ir", "onnx"])
    @pytest.mark.parametrize("threads", [1, None])
    def test_an_encoder_like_the_torch_model(self, kind, threads, graphs, request):
        artifact = read_artifact(request.getfixturevalue(kind).folder)
        encoder = open_artifact(artifact, threads=threads)
        assert isinstance(encoder, OpenVinoEncoder)
        for batch in (3, 1, 5, 2, 7):  # more sizes than are compiled for by themselves
            images = pictures(batch, 32, seed=batch)
            got, want = encoder(images), TorchEncoder(graphs["mlp-fp32"][0])(images)
            assert torch.allclose(got.cls, want.cls, atol=1e-4)
            assert torch.allclose(got.patches, want.patches, atol=1e-4)
        assert len(encoder.requests) <= runtimes.OPENVINO_SHAPES + 1
        c = encoder.conditions
        assert c["runtime"].startswith("openvino 20")
        assert (c["precision"], c["inference_precision"], c["device"]) == ("fp32", "f32", "cpu")
        assert c["threads"] == (threads or runtimes.available_cores())
        compiled = encoder.requests[1].get_compiled_model()
        assert compiled.get_property("INFERENCE_NUM_THREADS") == c["threads"]

    def test_features_outlive_the_next_call(self, onnx):
        """A request reuses its output buffers: features that were views of them would change."""
        encoder = open_artifact(onnx, threads=1)
        first = encoder(pictures(2, 32, seed=1))
        kept = first.patches.clone()
        encoder(pictures(2, 32, seed=2))
        assert torch.equal(first.patches, kept)

    def test_inference_precision_of_the_details(self, graphs, tmp_path):
        capabilities = __import__("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        changes = {**OPENVINO, "precision": "bf16", "details": {"openvino": {"inference_precision": "bf16"}}}
        artifact = artifact_of(graphs["mlp-fp32"][1], tmp_path / "bf16", 32, **changes)
        if "BF16" not in capabilities:
            with pytest.raises(Unrunnable, match="which lacks BF16"):
                open_artifact(artifact)
            return
        encoder, images = open_artifact(artifact), pictures(2, 32)
        assert encoder.conditions["inference_precision"] == "bf16"
        gap = (encoder(images).patches - TorchEncoder(graphs["mlp-fp32"][0])(images).patches).abs().max()
        assert 1e-4 < gap < 0.2

    def test_bf16_that_the_plugin_does_not_compute_in(self, graphs, tmp_path):
        changes = {**OPENVINO, "precision": "bf16", "details": {"openvino": {"inference_precision": "f32"}}}
        with pytest.raises(Unrunnable, match=r"computes in f32 on this CPU, which lacks BF16; .* is called bf16"):
            open_artifact(artifact_of(graphs["mlp-fp32"][1], tmp_path / "bf16", 32, **changes))

    @pytest.mark.parametrize("name", ["m.xml", "m.bin"])
    def test_a_changed_file_is_not_read(self, ir, name, monkeypatch):
        path = ir.folder / name
        data = bytearray(path.read_bytes())
        data[-10] ^= 1
        path.write_bytes(bytes(data))
        with pytest.raises(UserError, match=rf"{name} was changed since it was exported"):
            open_artifact(read_artifact(ir.folder))

    def test_an_ir_without_its_weights(self, ir):
        with pytest.raises(UserError, match=r"holds m.xml without its weights m.bin; run the export stage again"):
            open_artifact(ir.model_copy(update={"extras": []}))

    def test_a_file_that_openvino_cannot_load(self, tmp_path):
        (tmp_path / "m.onnx").write_bytes(b"\xff" * 64)
        with pytest.raises(Unrunnable, match=r"openvino .* cannot load m.onnx"):
            open_artifact(artifact_of(tmp_path / "m.onnx", tmp_path / "a", 32, **OPENVINO))

    def test_without_the_package(self, onnx, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "openvino", None)
        with pytest.raises(Unrunnable, match=r"openvino is not installed; pip install 'decant-vision\[openvino\]'"):
            open_artifact(onnx)
        assert "decant-vision[openvino]" in (why_unrunnable("openvino", []) or "")
        with pytest.raises(EnvironmentFailed, match="openvino is not installed"):
            runtimes.load_openvino()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="executing an engine needs a CUDA GPU")
def test_an_engine_on_this_gpu(graphs, tmp_path):
    from export.engine import build_engine, gpu_capability

    pytest.importorskip("tensorrt_rtx")
    model, path, size = graphs["mlp-fp16"]
    capability = gpu_capability()
    assert capability is not None
    info = build_engine(path, tmp_path / "m.engine", "tensorrt_rtx", "fp16", (1, 4, 16), [capability])
    engine = {"target": "rtx-fp16", "precision": "fp16", "runtime": "tensorrt_rtx", "compute_capabilities": info.capabilities}
    encoder = open_artifact(artifact_of(tmp_path / "m.engine", tmp_path / "rtx-fp16", size, **engine))
    for batch in (1, 7, 16):
        images = pictures(batch, size)
        got, want = encoder(images), TorchEncoder(model, "cpu")(images)
        assert torch.cosine_similarity(got.patches, want.patches, dim=-1).min() > 0.999
    with pytest.raises(UserError, match="built for batches up to 16, got 17"):
        encoder(pictures(17, size))


class TestReadArtifact:
    def test_an_interrupted_export(self, tmp_path):
        (tmp_path / "model_32.onnx").write_bytes(b"x")
        with pytest.raises(UserError, match="holds no artifact"):
            read_artifact(tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "decant-artifact-9"}, "has format 'decant-artifact-9'"),
            ({"files": []}, "is damaged at files"),
            ({"precision": "fp7"}, "is damaged at precision"),
            ({"surprise": 1}, "is damaged at surprise"),
        ],
    )
    def test_damage_is_named(self, onnx_artifact, change, message):
        path = onnx_artifact.folder / "artifact.json"
        write_json(path, {**read_json(path), **change})
        with pytest.raises(UserError, match=message):
            read_artifact(onnx_artifact.folder)

    @pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "a\\b", "C:x", ".hidden", ""])
    def test_files_outside_the_folder(self, onnx_artifact, name):
        path = onnx_artifact.folder / "artifact.json"
        value = read_json(path)
        value["files"][0]["path"] = name
        write_json(path, value)
        with pytest.raises(UserError, match=r"is damaged at files.0.path"):
            read_artifact(onnx_artifact.folder)

    def test_missing_truncated_or_linked_files(self, onnx_artifact):
        file = onnx_artifact.path(onnx_artifact.files[0])
        data = file.read_bytes()
        file.write_bytes(data[:-1])
        with pytest.raises(UserError, match="is missing or not"):
            read_artifact(onnx_artifact.folder)
        file.unlink()
        with pytest.raises(UserError, match="is missing or not"):
            read_artifact(onnx_artifact.folder)
        elsewhere = onnx_artifact.folder.parent / "elsewhere"
        elsewhere.write_bytes(data)
        file.symlink_to(elsewhere)
        with pytest.raises(UserError, match="is missing or not"):
            read_artifact(onnx_artifact.folder)

    def test_not_json(self, onnx_artifact):
        (onnx_artifact.folder / "artifact.json").write_text("{")
        with pytest.raises(UserError, match="is not JSON"):
            read_artifact(onnx_artifact.folder)


def test_eight_bit_products_are_exact_on_every_processor(monkeypatch):
    """Weights at the end of their range and inputs all large: without VNNI a plain session cuts the sums of two products off."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    def model(shared: bool) -> bytes:
        codes = np.full((64, 8), 127, np.int8)
        constants = {"s": np.array(1.0, np.float32), "z": np.array(0, np.int8), "ws": np.ones(8, np.float32)}
        constants |= {f"w{i}": codes[:, :] if i == 0 else codes[:8, :] for i in range(2)}
        constants |= {"z0": np.zeros(8, np.int8)} | ({} if shared else {"z1": np.zeros(8, np.int8)})
        nodes = []
        for i, (source, zero) in enumerate((("x", "z0"), ("y0", "z0" if shared else "z1"))):
            nodes += [
                helper.make_node("QuantizeLinear", [source, "s", "z"], [f"q{i}"]),
                helper.make_node("DequantizeLinear", [f"q{i}", "s", "z"], [f"d{i}"]),
                helper.make_node("DequantizeLinear", [f"w{i}", "ws", zero], [f"v{i}"], axis=1),
                helper.make_node("MatMul", [f"d{i}", f"v{i}"], [f"y{i}"]),
            ]
        ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, w]) for n, w in (("x", 64), ("y0", 8), ("y1", 8))]
        initializers = [numpy_helper.from_array(v, n) for n, v in constants.items()]
        graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10).SerializeToString()

    images = np.full((1, 64), 127, np.float32)
    wanted = 64 * 127 * 127
    (first, _) = exact_session(model(shared=False), 1).run(None, {"x": images})
    assert first.tolist() == [[wanted] * 8]
    entry = "session.x64quantprecision"
    monkeypatch.setattr("export.sessions.has_vnni", lambda: True)  # exact by itself, and much faster without the entry
    with pytest.raises(RuntimeError, match=entry):
        exact_session(model(shared=False), 1).get_session_options().get_session_config_entry(entry)
    monkeypatch.setattr("export.sessions.has_vnni", lambda: False)
    assert exact_session(model(shared=False), 1).get_session_options().get_session_config_entry(entry) == "1"
    (first, _) = exact_session(model(shared=False), 1).run(None, {"x": images})
    assert first.tolist() == [[wanted] * 8]
    # A graph that ONNX Runtime cannot open so is opened as usual.
    assert exact_session(model(shared=True), 1).run(None, {"x": images})[0].shape == (1, 8)
