"""Files of any origin as cases: what they are fed, what they say about themselves, what is refused and how."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from test_runtimes import artifact_of
from tiny import backbone

from distill.data.preprocess import Preprocess
from distill.errors import UserError
from distill.models.checkpoints import save_model
from export.artifact import Unrunnable
from export.stopwatch.bench_files import Wanted, cases_of, distinct
from export.stopwatch.bench_graphs import engine_runtime
from export.stopwatch.bench_ports import Port, feed, only_batch, resolution_of

F, U8, I64, BOOL = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT64, TensorProto.BOOL


def save(path, inputs, nodes, weights=(), output="y"):
    """An ONNX file; inputs: name -> (type, shape)."""
    x = [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()]
    graph = helper.make_graph(nodes, "g", x, [helper.make_tensor_value_info(output, F, None)], list(weights))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def conv(path, shape, kind=F):
    """Pictures through a convolution of 4 px."""
    weight = numpy_helper.from_array(np.ones((2, 3, 4, 4), np.float32), "w")
    nodes = [helper.make_node("Cast", ["x"], ["f"], to=F), helper.make_node("Conv", ["f", "w"], ["y"], strides=[4, 4])]
    return save(path, {"x": (kind, shape)}, nodes, [weight])


def one(path, **wanted):
    with cases_of([path], Wanted(**wanted)) as ((case,),):
        return case


@pytest.mark.parametrize(
    ("port", "batch", "shape"),
    [
        (Port("x", "float32", ("N", 3, "h", "w")), 2, (2, 3, 64, 64)),
        (Port("x", "uint8", (None, None, None, 3)), 2, (2, 64, 64, 3)),
        (Port("pixel_values", "float32", ("batch_size", "num_channels", "height", "width")), 4, (4, 3, 64, 64)),
        (Port("x", "float16", (1, 3, 32, 32)), 1, (1, 3, 32, 32)),
        (Port("lengths", "int64", ("N",)), 5, (5,)),
        (Port("scale", "float32", ()), 5, ()),
    ],
)
def test_open_dimensions(port, batch, shape):
    (value,) = feed([port], batch, 64, "m.onnx").values()
    assert value.shape == shape
    assert value.dtype == np.dtype(port.dtype)


def test_values_are_safe_to_feed_and_always_the_same():
    ports = [
        Port("input_ids", "int64", ("N", 7)),
        Port("attention_mask", "int64", ("N", 7)),
        Port("keep", "bool", ("N",)),
        Port("x", "uint8", ("N", 3, 8, 8)),
        Port("z", "float32", (3, "N")),
    ]
    fed = feed(ports, 2, 8, "m.onnx")
    assert not fed["input_ids"].any()
    assert fed["attention_mask"].all()
    assert fed["keep"].all()
    assert len(np.unique(fed["x"])) > 50
    assert fed["z"].shape == (3, 2)  # the batch's name, wherever it stands
    assert all(np.array_equal(a, b) for a, b in zip(fed.values(), feed(ports, 2, 8, "m.onnx").values(), strict=True))


def test_what_cannot_be_guessed_is_asked_for():
    with pytest.raises(UserError, match=r"leaves dimension 1 \(sequence\) of its input input_ids open.*--dim_param sequence"):
        feed([Port("input_ids", "int64", ("batch", "sequence"))], 1, None, "m.onnx")


def test_batches_and_sides_that_are_fixed():
    picture = Port("x", "float32", (4, 3, 32, 32))
    assert only_batch([picture]) == 4
    assert only_batch([Port("a", "float32", (7,)), picture]) == 4  # the picture's leads
    assert only_batch([Port("a", "float32", (7,))]) == 1
    assert only_batch([Port("a", "float32", ("N", 7))]) is None
    assert resolution_of([picture], None, "m.onnx") == 32
    assert resolution_of([Port("x", "float32", (1, 3, None, None))], None, "m.onnx") == 224
    assert resolution_of([Port("ids", "int64", (1, 9))], 64, "m.onnx") is None
    with pytest.raises(UserError, match="32 x 32 px only, not --resolution 64"):
        resolution_of([picture], 64, "m.onnx")


def test_a_foreign_picture_network_on_two_runtimes(tmp_path):
    pytest.importorskip("openvino")
    path = conv(tmp_path / "m.onnx", ["batch", 3, "h", "w"], U8)
    with cases_of([path], Wanted(32, ("onnxruntime", "openvino"))) as (cases,):
        assert [c.key for c in cases] == [("m.onnx", "onnxruntime"), ("m.onnx", "openvino")]
        assert {c.resolution for c in cases} == {32}
        assert {c.size_bytes for c in cases} == {path.stat().st_size}
        fed = cases[0].feed(2)
        ort, vino = (c.open(1) for c in cases)
        (expected,) = ort(fed)
        assert expected.shape == (2, 2, 8, 8)
        np.testing.assert_allclose(next(iter(vino(fed).values())), expected, rtol=1e-2)
        assert ort.conditions["inputs"] == "x uint8 [batch, 3, h, w]"
        assert ort.conditions["threads"] == 1
        assert vino.conditions["runtime"].startswith("openvino ")


def test_two_inputs_of_different_kinds(tmp_path):
    table = numpy_helper.from_array(np.ones((10, 3), np.float32), "table")
    nodes = [helper.make_node("Gather", ["table", "ids"], ["e"]), helper.make_node("Add", ["e", "x"], ["y"])]
    path = save(tmp_path / "two.onnx", {"ids": (I64, ["n", 4]), "x": (F, ["n", 4, 3])}, nodes, [table])
    case = one(path)
    (found,) = case.open(1)(case.feed(3))
    assert found.shape == (3, 4, 3)
    assert case.resolution is None
    assert case.only_batch is None


def test_an_openvino_graph(tmp_path):
    ov = pytest.importorskip("openvino")
    ov.save_model(ov.convert_model(conv(tmp_path / "m.onnx", [2, 3, 16, 16])), tmp_path / "m.xml")
    case = one(tmp_path / "m.xml")
    assert (case.target, case.only_batch, case.resolution) == ("openvino", 2, 16)
    assert next(iter(case.open(1)(case.feed(2)).values())).shape == (2, 2, 4, 4)
    (tmp_path / "m.bin").unlink()
    with pytest.raises(UserError, match=r"m\.bin, which does not lie beside"):
        one(tmp_path / "m.xml")


def test_external_weights_count_and_must_be_there(tmp_path):
    model = onnx.load(conv(tmp_path / "m.onnx", [1, 3, 16, 16]))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    case = one(tmp_path / "m.onnx")
    assert case.size_bytes == (tmp_path / "m.onnx").stat().st_size + (tmp_path / "m.data").stat().st_size
    case.open(1)(case.feed(1))
    (tmp_path / "m.data").unlink()
    with pytest.raises(UserError, match=r"weights in m\.data, which does not lie beside"):
        one(tmp_path / "m.onnx")


def test_what_a_runtime_refuses_is_not_measured_with_its_reason(tmp_path):
    path = save(tmp_path / "m.onnx", {"x": (F, [1, 4])}, [helper.make_node("Nonsense", ["x"], ["y"])])
    with pytest.raises(Unrunnable, match=r"cannot load m\.onnx"):
        one(path).open(1)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("m.onnx", b"this is a letter to my aunt", "not an ONNX file"),
        ("m.txt", b"text", "of no kind that can be timed"),
        ("m.engine", b"text of some length", "does not begin as a TensorRT engine"),
        ("m.onnx", None, "There is no file"),
    ],
)
def test_what_is_no_network(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        one(tmp_path / name)


def test_types_that_cannot_be_fed(tmp_path):
    words = save(tmp_path / "s.onnx", {"x": (TensorProto.STRING, [1])}, [helper.make_node("Cast", ["x"], ["y"], to=F)])
    with pytest.raises(UserError, match="a type that NumPy cannot make"):
        one(words)
    half = save(tmp_path / "b.onnx", {"x": (TensorProto.BFLOAT16, [1])}, [helper.make_node("Cast", ["x"], ["y"], to=F)])
    with pytest.raises(UserError, match="x bfloat16"):
        one(half)


def test_a_bundle_that_does_not_verify(tmp_path):
    (tmp_path / "b.tar.gz").write_bytes(b"not an archive")
    with pytest.raises(UserError, match="was refused"):
        one(tmp_path / "b.tar.gz")


def test_an_engine_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr("export.stopwatch.bench_graphs.gpu_capability", lambda: None)
    (tmp_path / "m.engine").write_bytes(b"vtrt\0\0\0\0plan")
    case = one(tmp_path / "m.engine")
    assert (case.target, case.size_bytes) == ("tensorrt_rtx", 12)
    with pytest.raises(Unrunnable, match="no CUDA GPU"):
        case.open(1)
    assert engine_runtime(b"ftrt\0\0\0\0") == "tensorrt"


def test_artifacts_and_models(graphs, tmp_path):
    _, graph, size = graphs["mlp-fp32"]
    artifact = artifact_of(graph, tmp_path / "onnx-fp32", size)
    network = backbone()
    save_model(tmp_path / "small", network, Preprocess(32, 32))
    with cases_of([artifact.folder, tmp_path / "small"], Wanted()) as ((exported,), (model,)):
        assert exported.key == ("onnx-fp32", "onnx-fp32")
        assert exported.build_s == 1.0
        assert model.key == ("small", "torch-fp32")
        assert model.open(1)(model.feed(2)).cls.shape == (2, 32)
        assert model.size_bytes == (tmp_path / "small" / "backbone.safetensors").stat().st_size
        assert torch.isfinite(exported.open(1)(exported.feed(1)).cls).all()
    with pytest.raises(UserError, match="no artifact"):
        one(tmp_path)


def test_labels_are_as_short_as_they_can_be(tmp_path):
    assert distinct([tmp_path / "a.onnx", tmp_path / "b.onnx"]) == ["a.onnx", "b.onnx"]
    assert distinct([tmp_path / "a" / "m.onnx", tmp_path / "b" / "m.onnx"]) == ["a/m.onnx", "b/m.onnx"]
    with pytest.raises(UserError, match="named twice"):
        distinct([tmp_path / "m.onnx", tmp_path / "x" / ".." / "m.onnx"])
