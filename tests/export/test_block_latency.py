"""The table of latencies: what it measures, keeps, interpolates and refuses; and pruned networks as ONNX files."""

import itertools
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny import TINY, pictures

from distill.errors import UserError
from distill.models.backbone import Backbone, BackboneConfig, BlockWidths
from export.graph import INPUT, export_onnx, linear_nodes, load_graph, serialize, torch_graph
from export.stopwatch.block_latency import Grid, LatencyTable, Point, grid_of

torch.set_num_threads(1)

CONFIG = BackboneConfig(**TINY)
GRID = Grid([16, 32], [1, 2], [64, 128])


def widths(dim: int, *blocks: tuple[int, int]) -> BackboneConfig:
    pairs = [BlockWidths(heads=h, hidden=i) for h, i in blocks]
    return CONFIG.model_copy(update={"dim": dim, "heads": None, "depth": None, "head_dim": 16, "blocks": pairs})


def law(config: BackboneConfig) -> float:
    """A machine whose time is linear in every width."""
    dim = config.shape()[0]
    return 0.5 + 0.01 * dim + sum(0.001 * dim * (20 * b.heads + b.hidden) for b in config.widths())


@pytest.fixture
def table(tmp_path) -> LatencyTable:
    """With points of a known law in place of measured ones."""
    found = LatencyTable(CONFIG, 32, tmp_path / "latency.json", grid=GRID)
    for p in GRID.points():
        found.points[p.key()] = law(widths(p.dim, *[(p.heads, p.hidden)] * p.depth))
    return found


def test_a_grid_reaches_from_least_to_all_of_it():
    grid = grid_of(BackboneConfig(), least=0.25, round_to=16, steps=4)
    assert grid.dims == [96, 192, 288, 384]
    assert grid.heads == [1, 2, 4, 6]
    assert grid.hidden == [384, 768, 1152, 1536]
    assert len(grid.points()) == len(set(grid.points())) == 4 * (4 + 3 + 1)
    assert grid_of(widths(32, (2, 64), (1, 48)), least=1.0) == Grid([32], [2], [64])


def test_measured_points_come_back_and_the_rest_is_interpolated(table):
    for p in GRID.points():
        config = widths(p.dim, *[(p.heads, p.hidden)] * p.depth)
        assert table.cost(config) == pytest.approx(law(config))
    for config in (widths(16, (1, 96), (2, 64)), widths(32, (2, 80)), widths(32, *[(1, 64)] * 7)):
        assert table.cost(config) == pytest.approx(law(config))
    middle = widths(24, (2, 128))  # products of widths are not linear in the width between two points, but close
    assert table.cost(middle) == pytest.approx((table.cost(widths(16, (2, 128))) + table.cost(widths(32, (2, 128)))) / 2)
    assert table.saving(CONFIG, widths(32, (2, 128), (1, 128))) == pytest.approx(0.001 * 32 * 20)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (widths(8, (1, 64)), "dim 8"),
        (widths(40, (1, 64)), "dim 40"),
        (widths(32, (3, 64)), "heads 3"),
        (widths(32, (1, 32)), "hidden 32"),
    ],
    ids=["narrow", "wide", "heads", "hidden"],
)
def test_outside_of_what_was_measured_it_says_so(table, config, name):
    with pytest.raises(UserError, match=f"{name} lies outside"):
        table.cost(config)


@pytest.fixture(scope="module")
def any_graph() -> bytes:
    """Exporting takes seconds: where only the bookkeeping is tested, one small graph stands for all."""
    return serialize(torch_graph(Backbone(widths(16, (1, 64))).eval(), 32))


def test_measuring_goes_on_where_it_was_interrupted_and_a_finished_table_costs_nothing(tmp_path, any_graph):
    built: list[Point] = []

    def make() -> LatencyTable:
        return LatencyTable(CONFIG, 32, tmp_path / "latency.json", grid=GRID, build=build)

    def build(backbone: Backbone, size: int) -> bytes:
        w = backbone.config.widths()
        built.append(Point(backbone.dim, w[0].heads, w[0].hidden, len(w)))
        return any_graph

    class Killed(BaseException):
        pass

    def kill(done: int, total: int) -> None:
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        make().measure(kill)
    assert len(built) == 3
    with pytest.raises(UserError, match="call `measure` first"):
        make().cost(widths(16, (1, 64)))
    seen: list[tuple[int, int]] = []
    again = make()
    again.measure(lambda done, total: seen.append((done, total)))
    assert seen[-1] == (8, 8)
    assert sorted(map(Point.key, set(built))) == sorted(p.key() for p in GRID.points())
    assert all(v > 0 for v in again.points.values())
    before = len(built)
    make().measure()
    assert len(built) == before
    assert make().cost(CONFIG) == again.cost(CONFIG)
    found = again.against_measured(Backbone(widths(16, (1, 96), (2, 64))).eval())
    assert found["measured_ms"] > 0
    assert found["predicted_ms"] == pytest.approx(again.cost(widths(16, (1, 96), (2, 64))), abs=1e-3)
    json.dumps(found, allow_nan=False)


def test_latencies_are_told_by_ratio_to_the_reference(tmp_path):
    """A machine that gets three times slower between two points changes nothing."""
    ticks = itertools.count()
    speed = {"now": 1.0}
    table = LatencyTable(CONFIG, 32, tmp_path / "t.json", grid=GRID, clock=lambda: next(ticks) * 0.01 * speed["now"])
    table._opened = lambda backbone: lambda image: None  # type: ignore[method-assign]
    table.measure(lambda done, total: speed.update(now=1.0 + done))
    assert set(np.round(list(table.points.values()), 6)) == {10.0}


def test_a_table_of_other_conditions_is_refused(tmp_path, table):
    table._opened = lambda backbone: lambda image: None  # type: ignore[method-assign]
    table.points.clear()
    table.measure()
    LatencyTable(CONFIG, 32, table.path, grid=GRID)
    with pytest.raises(UserError, match="measured with threads 1 and is asked for 2"):
        LatencyTable(CONFIG, 32, table.path, threads=2, grid=GRID)
    with pytest.raises(UserError, match="resolution 32 and is asked for 48"):
        LatencyTable(CONFIG, 48, table.path, grid=GRID)
    table.path.write_text("{")
    with pytest.raises(UserError, match="is no latency table"):
        LatencyTable(CONFIG, 32, table.path, grid=GRID)
    with pytest.raises(UserError, match="needs a way to build"):
        LatencyTable(CONFIG, 32, tmp_path / "other.json", precision="int8", grid=GRID)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_real_networks_on_a_real_runtime(tmp_path, runtime):
    if runtime == "openvino":
        pytest.importorskip("openvino")
    table = LatencyTable(CONFIG, 32, tmp_path / "t.json", runtime, grid=Grid([32], [2], [128]))
    table.measure()
    one, four = (table.points[Point(32, 2, 128, depth).key()] for depth in (1, 4))
    assert 0 < one < four
    assert json.loads(table.path.read_text())["conditions"]["runtime"].startswith(f"{runtime} ")


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_a_pruned_network_is_exported_like_any_other(tmp_path, ffn):
    """Blocks of other widths, a stream that is no multiple of the heads: names, LayerNorms and numbers hold."""
    torch.manual_seed(0)
    config = widths(24, (1, 40), (2, 96), (1, 64)).model_copy(update={"ffn": ffn, "registers": 2})
    model = Backbone(config).eval()
    path = tmp_path / "model.onnx"
    export_onnx(model, path, 32)
    graph = load_graph(path)
    onnx.checker.check_model(graph, full_check=True)
    names = [n.name for n in linear_nodes(graph)]
    assert names == [f"blocks.{i}.{part}" for i in range(3) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    x = pictures(3, 32)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    cls, patches = session.run(None, {INPUT: x.numpy()})
    with torch.no_grad():
        want = model(x)
    assert np.abs(cls - want.cls.numpy()).max() < 1e-4
    assert np.abs(patches - want.patches.numpy()).max() < 1e-4
