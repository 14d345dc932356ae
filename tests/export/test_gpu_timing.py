"""GPU time by events and CUDA graphs, against a fake `torch.cuda` whose GPU works on a clock of its own."""

import contextlib
import types

import pytest
import torch

from distill.progress import Progress
from export.benchmark import BenchmarkConfig, Case, benchmark
from export.stopwatch.bench_meters import Instruments
from export.stopwatch.gpu_timing import captured, event_seconds, gpu_work


class Gpu:
    """As much of torch.cuda as is used: `work` moves the GPU's clock, and is written down."""

    def __init__(self, capturable=True):
        self.now, self.log, self.recording, self.capturable = 0.0, [], None, capturable
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self, stream):
                self.at = gpu.now

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3

        class CUDAGraph:
            def replay(self):
                for seconds in self.recorded:
                    gpu.now += seconds * 0.5  # without launches
                gpu.log.append("replay")

        self.Event, self.CUDAGraph = Event, CUDAGraph
        self.one = types.SimpleNamespace(synchronize=lambda: self.log.append("sync"), wait_stream=lambda s: None)

    def current_stream(self):
        return self.one

    def Stream(self):
        return self.one

    def stream(self, stream):
        return contextlib.nullcontext()

    def synchronize(self, device=None):
        self.log.append("sync")

    @contextlib.contextmanager
    def graph(self, graph, stream):
        if not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recording = graph.recorded = []
        yield
        self.recording = None

    def work(self, seconds):
        if self.recording is not None:
            self.recording.append(seconds)
            return
        self.now += seconds
        self.log.append("work")


class Engine:
    """An encoder as EngineEncoder is one."""

    def __init__(self, gpu, seconds, device="NVIDIA H100"):
        self.gpu, self.seconds, self.stream = gpu, seconds, gpu.one
        self.conditions = {"runtime": "tensorrt 11", "device": device}

    def infer(self, inputs):
        self.gpu.work(self.seconds)
        return {}

    def __call__(self, inputs):
        self.infer(inputs)


@pytest.fixture
def no_copies(monkeypatch):
    """Tensors stay where they are: there is no GPU to send them to."""
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: self)


def test_events_stand_around_every_call(no_copies):
    gpu = Gpu()
    work = gpu_work(Engine(gpu, 0.002), torch.zeros(1, 3, 8, 8))
    assert event_seconds(work, 3, gpu) == pytest.approx([0.002] * 3)
    assert gpu.log == ["work"] * 3 + ["sync"]  # waited for once


def test_a_graph_is_warmed_up_captured_and_replayed(no_copies):
    gpu = Gpu()
    work = captured(gpu_work(Engine(gpu, 0.002), torch.zeros(1, 3, 8, 8)), gpu)
    assert gpu.log == ["work"] * 3 + ["sync"]
    assert event_seconds(work, 2, gpu) == pytest.approx([0.001] * 2)
    assert gpu.log[-3:] == ["replay", "replay", "sync"]


def test_what_cannot_be_captured_or_had_alone_says_why(no_copies):
    gpu = Gpu(capturable=False)
    work = gpu_work(Engine(gpu, 0.002), torch.zeros(1, 3, 8, 8))
    assert "not permitted" in str(captured(work, gpu))
    other = types.SimpleNamespace(conditions={"runtime": "onnxruntime 1.32"})
    assert "onnxruntime 1.32 runs on CUDA streams of its own" in str(gpu_work(other, torch.zeros(1)))


@pytest.mark.parametrize("graph", [False, True])
def test_rows_of_a_gpu(no_copies, graph):
    gpu = Gpu()
    state = {"sm_clock_mhz": 1980, "memory_clock_mhz": 2619, "temperature_c": 61, "throttling": "none", "source": "nvml"}
    states = iter([state, {**state, "temperature_c": 80, "throttling": "sw_power_cap"}])
    last = [state]

    def read():
        last[0] = next(states, last[0])
        return last[0]

    instruments = Instruments(meter_for=lambda d: f"{d}: no counter.", state=read, cuda=gpu)
    config = BenchmarkConfig(batches=[1], seconds=0.2, warmup_seconds=0.05, cuda_graph=graph)
    cases = [Case("s", t, 32, lambda threads, s=s: Engine(gpu, s)) for t, s in (("trt-fp16", 0.002), ("trt-int8", 0.001))]
    rows = benchmark(config, cases, Progress("quiet"), lambda: gpu.now, None, instruments)
    found = {r.target: r for r in rows if r.metric == "gpu_latency_p50_ms"}
    assert found["trt-fp16"].value == pytest.approx(1.0 if graph else 2.0)
    assert found["trt-fp16"].low == pytest.approx(found["trt-fp16"].value)
    conditions = found["trt-int8"].conditions
    assert conditions["cuda_graph"] is graph
    assert (conditions["gpu_temperature_c_before"], conditions["gpu_temperature_c_after"]) == (61, 80)
    assert conditions["gpu_throttling_after"] == "sw_power_cap"
    latency = next(r for r in rows if r.metric == "latency_p50_ms" and r.target == "trt-fp16")
    assert latency.value == pytest.approx(2.0)
    assert latency.conditions["gpu_state"] == "nvml"
    assert {r.reason for r in rows if r.metric == "energy_mj_per_image"} == {"gpu: no counter."}
    assert all(r.status == "not measured" for r in rows if r.metric == "peak_memory_mb")


def test_a_gpu_whose_state_nobody_tells_says_so(no_copies):
    gpu = Gpu(capturable=False)
    instruments = Instruments(meter_for=lambda d: "no counter.", state=lambda: "not read: no NVML.", cuda=gpu)
    config = BenchmarkConfig(batches=[1], seconds=0.2, warmup_seconds=0.05, cuda_graph=True)
    rows = benchmark(
        config, [Case("s", "trt-fp16", 32, lambda t: Engine(gpu, 0.01))], Progress("quiet"), lambda: gpu.now, None, instruments
    )
    (row,) = (r for r in rows if r.metric == "gpu_latency_p50_ms")
    assert row.status == "not measured"
    assert "CUDA graph" in str(row.reason)
    assert row.conditions["gpu_state"] == "not read: no NVML."
