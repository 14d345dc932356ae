"""The stopwatch against encoders whose time is known: their calls move a clock instead of waiting."""

import gc
import itertools
import json
import os
import re
import socket
import weakref

import numpy as np
import pytest
import torch

from distill.data.preprocess import Preprocess
from distill.encoder import Features, TorchEncoder
from distill.models.backbone import Backbone, BackboneConfig
from distill.progress import Progress
from distill.rows import read_rows, write_rows
from export.artifact import Unrunnable
from export.benchmark import BenchmarkConfig, Case, Timed, benchmark
from export.fingerprint import fingerprint
from export.stopwatch import timing
from export.stopwatch.bench_rows import comparison_rows

QUIET = Progress("quiet")


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """As the command does: what was imported is no garbage, and the stopwatch collects often."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Clock:
    """Seconds that pass only when somebody works; `pace` slows everything, as a hot processor does."""

    def __init__(self):
        self.now, self.pace = 0.0, 1.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds * self.pace


class FakeEncoder:
    """Takes `base + per_image * B` seconds with log-normal jitter, and logs whose turn it was."""

    def __init__(self, clock, name, base, per_image=0.0, jitter=0.02, seed=0, log=None, device="cpu", cold=0):
        self.target, self.conditions = name, {"runtime": "fake 1", "precision": "fp32", "device": device}
        self.clock, self.base, self.per_image, self.jitter = clock, base, per_image, jitter
        self.random, self.log, self.cold = np.random.default_rng(seed), log, cold

    def __call__(self, images):
        b = len(images)
        slow = 10 if self.cold > 0 else 1
        self.cold -= 1
        self.clock.work(slow * (self.base + self.per_image * b) * float(np.exp(self.random.normal(0, self.jitter))))
        if self.log is not None:
            self.log.append((self.target, b))
        return Features(torch.zeros(b, 4), torch.zeros(b, 1, 4))


def fake_case(clock, target, base, subject="students/small", resolution=32, load=0.1, seeds=None, case=None, **rest):
    seeds = iter(range(100)) if seeds is None else seeds

    def open_it(threads):
        clock.work(load)
        return FakeEncoder(clock, target, base, seed=next(seeds) + hash(target) % 1000, **rest)

    return Case(subject, target, resolution, open_it, **(case or {}))


def find(rows, metric, **where):
    """The rows of a metric whose fields and conditions are as said."""
    return [
        r
        for r in rows
        if r.metric == metric and all((getattr(r, k, None) or r.conditions.get(k)) == v for k, v in where.items())
    ]


def one(rows, metric, **where):
    (row,) = find(rows, metric, **where)
    return row


CONFIG = BenchmarkConfig(batches=[1, 8], seconds=0.5, rounds=20, warmup_seconds=0.2)


def test_known_times_come_back():
    clock = Clock()
    cases = [
        fake_case(clock, "onnx-fp32", 0.002, per_image=0.001, case={"size_bytes": 4_000_000}),
        fake_case(clock, "onnx-int8", 0.001, per_image=0.0005, case={"size_bytes": 1_000_000}),
    ]
    rows = benchmark(CONFIG, cases, QUIET, clock)
    p50 = one(rows, "latency_p50_ms", target="onnx-fp32", batch=8)
    assert p50.value == pytest.approx(10.0, rel=0.02)
    assert p50.low < p50.value < p50.high
    assert p50.high - p50.low < 0.5
    assert 40 <= p50.n <= 51  # half a second of 10 ms calls
    assert one(rows, "latency_p90_ms", target="onnx-fp32", batch=8).value == pytest.approx(10 * np.exp(1.2816 * 0.02), rel=0.02)
    rate = one(rows, "images_per_s", target="onnx-int8", batch=8)
    assert rate.value == pytest.approx(8 / 0.005, rel=0.02)
    assert rate.low < rate.value < rate.high
    assert one(rows, "load_s", target="onnx-int8").value == pytest.approx(0.1)
    assert one(rows, "size_mb", target="onnx-int8").value == 1.0
    assert p50.conditions["runtime"] == "fake 1"
    assert p50.conditions["resolution"] == 32
    assert p50.conditions["warmup_calls"] >= 5
    assert p50.conditions["settled"] is True
    assert {"load_average", "other_cores_busy", "rounds", "measures"} <= p50.conditions.keys()


def test_rows_survive_the_disk(tmp_path):
    clock = Clock()
    rows = benchmark(CONFIG, [fake_case(clock, "onnx-fp32", 0.01)], QUIET, clock)
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows


def test_verdicts():
    clock = Clock()
    cases = [
        fake_case(clock, "onnx-fp32", 0.004),
        fake_case(clock, "onnx-int8", 0.002),
        fake_case(clock, "onnx-fp16", 0.008),
        fake_case(clock, "rtx-fp16", 0.004, jitter=0.2),
    ]
    rows = benchmark(CONFIG, cases, QUIET, clock)
    ratios = {r.target: r for r in find(rows, "latency_ratio", batch=1)}
    assert {t: r.conditions["verdict"] for t, r in ratios.items()} == {
        "onnx-int8": "FASTER",
        "onnx-fp16": "SLOWER",
        "rtx-fp16": "INCONCLUSIVE",
    }
    assert ratios["onnx-int8"].value == pytest.approx(0.5, rel=0.02)
    assert ratios["onnx-int8"].low < 0.5 < ratios["onnx-int8"].high
    assert all(r.conditions["versus"] == "students/small/onnx-fp32" for r in ratios.values())
    floor = one(rows, "noise_floor_percent")
    assert 0 < floor.value < 5
    assert floor.n == 2  # a pair a batch


def test_what_differs_between_openings_is_not_called_a_difference():
    """Each opening of anything is up to 10 % slower or faster until it is closed; a 3 % gain then means nothing, a 50 % gain does."""
    clock, luck = Clock(), np.random.default_rng(3)

    def opened(base):
        return lambda threads: FakeEncoder(clock, "x", base * luck.uniform(0.9, 1.1), jitter=0.001)

    cases = [
        Case("students/small", t, 32, opened(s)) for t, s in (("onnx-fp32", 4e-3), ("onnx-int8", 3.88e-3), ("rtx-int8", 2e-3))
    ]
    rows = benchmark(BenchmarkConfig(batches=[1], seconds=0.5, warmup_seconds=0.1), cases, QUIET, clock)
    ratios = {r.target: r for r in find(rows, "latency_ratio")}
    assert ratios["onnx-int8"].conditions["verdict"] == "INCONCLUSIVE"
    assert ratios["rtx-int8"].conditions["verdict"] == "FASTER"
    assert ratios["rtx-int8"].conditions["openings"] == 5


def timed(target, seconds):
    """What a case of constant time is timed as."""
    case = Case("students/small", target, 32, lambda threads: None)
    return Timed(case, 1, {}, {(o, 4 * o + r): np.full(3, seconds) for o in range(5) for r in range(4)})


@pytest.mark.parametrize(("floor", "verdict"), [(0.1, "INCONCLUSIVE"), (0.04, "FASTER")])
def test_the_noise_floor_widens_the_interval(floor, verdict):
    (row,) = comparison_rows([timed("onnx-fp32", 0.004), timed("onnx-int8", 0.0038)], floor)
    assert row.value == pytest.approx(0.95)
    assert row.low == pytest.approx(0.95 / (1 + floor))
    assert row.high == pytest.approx(0.95 * (1 + floor))
    assert row.conditions["verdict"] == verdict
    assert row.conditions["noise_floor_percent"] == pytest.approx(floor * 100)


def test_a_base_may_be_chosen():
    base = ("students/small", "onnx-int8")
    (row,) = comparison_rows([timed("onnx-fp32", 0.004), timed("onnx-int8", 0.002)], 0.0, base)
    assert (row.target, row.value, row.conditions["versus"]) == ("onnx-fp32", 2.0, "students/small/onnx-int8")


def test_a_grid_of_threads():
    clock, seen = Clock(), []

    def opened(base):
        def open_it(threads):
            seen.append((threads, torch.get_num_threads()))
            return FakeEncoder(clock, "x", base / threads)

        return open_it

    before = torch.get_num_threads()
    cases = [
        Case("s", t, 32, opened(b), size_bytes=1000, preprocess=None) for t, b in (("onnx-fp32", 0.008), ("onnx-int8", 0.002))
    ]
    config = BenchmarkConfig(batches=[1], seconds=0.5, warmup_seconds=0.1, threads=[1, 2])
    rows = benchmark(config, cases, QUIET, clock)
    assert set(seen) == {(1, 1), (2, 2)}
    assert torch.get_num_threads() == before
    assert len(find(rows, "size_mb", target="onnx-int8")) == 1
    for threads in (1, 2):
        assert one(rows, "latency_p50_ms", target="onnx-int8", threads=threads).value == pytest.approx(2 / threads, rel=0.02)
        ratio = one(rows, "latency_ratio", target="onnx-int8", threads=threads)  # never across numbers of threads
        assert ratio.value == pytest.approx(0.25, rel=0.03)
        assert one(rows, "load_s", target="onnx-int8", threads=threads).n == 5
    assert one(rows, "noise_floor_percent").n == 2
    assert "threads" not in one(benchmark(CONFIG, cases[:1], QUIET, clock), "latency_p50_ms", batch=1).conditions


def test_a_fixed_batch_says_so():
    clock = Clock()
    rows = benchmark(CONFIG, [fake_case(clock, "onnx-fp32", 0.01, case={"only_batch": 8})], QUIET, clock)
    assert "fixed at 8" in str(one(rows, "latency_p50_ms", batch=1).reason)
    assert one(rows, "latency_p50_ms", batch=8).status == "measured"


def test_everything_is_opened_anew_in_another_order_and_closed_before():
    clock, log, alive = Clock(), [], []

    def opener(name):
        def open_it(threads):
            log.append((name, sum(ref() is not None for ref in alive)))
            encoder = FakeEncoder(clock, name, 0.01)
            alive.append(weakref.ref(encoder))
            return encoder

        return open_it

    cases = [Case("s", t, 32, opener(t)) for t in ("onnx-fp32", "onnx-int8", "rtx-int8")]
    benchmark(BenchmarkConfig(batches=[1], seconds=0.5, warmup_seconds=0.1), cases, QUIET, clock)
    again = log[7:]  # each twice, and a twin
    assert len(again) == 4 * 4
    openings = [again[4 * i : 4 * i + 4] for i in range(4)]
    assert all([n for _, n in o] == [0, 1, 2, 3] for o in openings)
    assert len({tuple(name for name, _ in o) for o in openings}) > 1


def test_the_noise_floor_is_of_what_others_are_compared_with():
    clock = Clock()
    cases = [fake_case(clock, "torch-fp32", 0.01, subject="teacher"), fake_case(clock, "onnx-fp32", 0.01)]
    assert (
        one(benchmark(CONFIG, cases, QUIET, clock), "noise_floor_percent").conditions["artifacts"] == "students/small onnx-fp32"
    )


def test_interleaving_keeps_a_slowing_machine_fair():
    """The machine becomes three times slower in mid-run: both cases suffer alike, so their ratio stays true."""
    clock = Clock()

    class Slowing(FakeEncoder):
        def __call__(self, images):
            self.clock.pace = 3.0 if self.clock.now > 1.5 else 1.0
            return super().__call__(images)

    cases = [
        Case("students/small", "onnx-fp32", 32, lambda threads: Slowing(clock, "a", 0.004)),
        Case("students/small", "onnx-int8", 32, lambda threads: Slowing(clock, "b", 0.0034)),
    ]
    rows = benchmark(BenchmarkConfig(batches=[1], seconds=1.0, warmup_seconds=0.1), cases, QUIET, clock)
    ratio = one(rows, "latency_ratio")
    assert ratio.value == pytest.approx(0.85, rel=0.05)
    assert ratio.conditions["verdict"] == "FASTER"
    p50 = one(rows, "latency_p50_ms", target="onnx-fp32")
    assert p50.high > 2 * p50.low  # the the interval of each alone tells that the machine was not steady


def test_a_machine_that_becomes_slow_after_warm_up_costs_calls_and_not_rounds():
    clock = Clock()

    class Throttled(FakeEncoder):
        calls = 0

        def __call__(self, images):
            self.calls += 1
            self.clock.pace = 40.0 if self.calls > 60 else 1.0
            return super().__call__(images)

    case = Case("students/small", "onnx-fp32", 32, lambda threads: Throttled(clock, "a", 0.001))
    rows = benchmark(BenchmarkConfig(batches=[1], seconds=1.0, warmup_seconds=0.01), [case], QUIET, clock)
    row = one(rows, "latency_p50_ms")
    assert row.low is not None
    assert row.conditions["rounds"] >= timing.INTERVAL_NEEDS
    assert clock.now < 6


def test_cases_take_turns():
    clock, log = Clock(), []  # type: ignore[var-annotated]
    cases = [fake_case(clock, t, 0.01, log=log) for t in ("onnx-fp32", "onnx-int8")]
    benchmark(BenchmarkConfig(batches=[1], seconds=1.0, rounds=10, warmup_seconds=0.1), cases, QUIET, clock)
    names = [name for name, _ in log]
    turns = sum(a != b for a, b in itertools.pairwise(names))
    assert turns > 8


def test_a_turn_does_not_pay_for_the_one_before():
    """Whoever follows another case is ten times slower at first, as with cold caches: none of that is timed."""
    clock, last = Clock(), []

    class Polluted(FakeEncoder):
        def __call__(self, images):
            self.cold = 0 if last and last[-1] is self else 1
            last.append(self)
            return super().__call__(images)

    cases = [Case("students/small", t, 32, lambda threads, t=t: Polluted(clock, t, 0.005)) for t in ("onnx-fp32", "onnx-int8")]
    rows = benchmark(BenchmarkConfig(batches=[1], seconds=0.5, warmup_seconds=0.1), cases, QUIET, clock)
    assert all(r.value == pytest.approx(5, rel=0.05) for r in find(rows, "latency_mean_ms"))


def test_warm_up_waits_until_the_time_settles():
    clock = Clock()
    case = fake_case(clock, "onnx-fp32", 0.001, cold=30)
    (row,) = find(
        benchmark(BenchmarkConfig(batches=[1], seconds=0.2, warmup_seconds=10.0), [case], QUIET, clock), "latency_p90_ms"
    )
    assert row.conditions["warmup_calls"] > 30
    assert row.value < 1.2  # none of the ten times slower first calls was timed


def test_total_time_is_bounded():
    """Ten-second calls, half a second asked: three timed calls and no interval, so no verdict either."""
    clock = Clock()
    cases = [fake_case(clock, "onnx-fp32", 10.0), fake_case(clock, "onnx-int8", 2.0)]
    rows = benchmark(BenchmarkConfig(batches=[1], seconds=0.5, warmup_seconds=0.5), cases, QUIET, clock)
    row = one(rows, "latency_p50_ms", target="onnx-fp32")
    assert row.n == 3
    assert row.low is None
    assert one(rows, "latency_ratio").conditions["verdict"] == "INCONCLUSIVE"
    assert clock.now < 150


def test_99th_percentile_needs_a_thousand_calls():
    clock = Clock()
    many = [fake_case(clock, "onnx-fp32", 0.0005)]
    rows = benchmark(BenchmarkConfig(batches=[1], seconds=0.6), many, QUIET, clock)
    assert one(rows, "latency_p99_ms").n >= 1000
    rows = benchmark(BenchmarkConfig(batches=[1], seconds=0.3), many, QUIET, clock)
    assert not find(rows, "latency_p99_ms")
    rows = benchmark(BenchmarkConfig(batches=[1], seconds=5.0, max_calls=500), many, QUIET, clock)
    assert one(rows, "latency_p50_ms").n == 500


def test_what_cannot_run_says_why():
    clock = Clock()

    def refuses(threads):
        raise Unrunnable("There is no NVIDIA GPU on this machine.")

    cases = [
        Case("students/small", "rtx-fp16", 32, refuses, size_bytes=2_000_000),
        fake_case(clock, "onnx-fp32", 0.01, case={"max_batch": 4}),
    ]
    rows = benchmark(CONFIG, cases, QUIET, clock)
    engine = [r for r in rows if r.target == "rtx-fp16"]
    assert one(engine, "size_mb").value == 2.0  # it was built, so its size is known
    rest = [r for r in engine if r.metric != "size_mb"]
    assert {r.metric for r in rest} >= {"latency_p50_ms", "images_per_s", "load_s"}
    assert all(r.status == "not measured" and "no NVIDIA GPU" in str(r.reason) for r in rest)
    assert sorted(r.conditions["batch"] for r in find(engine, "latency_p50_ms")) == [1, 8]
    large = one(rows, "latency_p50_ms", target="onnx-fp32", batch=8)
    assert large.status == "not measured"
    assert "at most 4" in str(large.reason)
    assert one(rows, "latency_p50_ms", target="onnx-fp32", batch=1).status == "measured"


def test_nothing_runs_here_and_nothing_asked():
    def refuses(threads):
        raise Unrunnable("no.")

    rows = benchmark(CONFIG, [Case("students/small", "rtx-fp16", 32, refuses)], QUIET, Clock())
    assert all(r.status == "not measured" for r in rows)
    assert one(rows, "noise_floor_percent").reason
    assert benchmark(CONFIG, [], QUIET, Clock()) == []


def test_student_is_compared_with_the_teacher_too():
    clock = Clock()
    cases = [fake_case(clock, "torch-fp32", 0.009, subject="teacher"), fake_case(clock, "torch-fp32", 0.003)]
    ratio = one(benchmark(CONFIG, cases, QUIET, clock), "latency_ratio", batch=1)
    assert (ratio.subject, ratio.conditions["versus"]) == ("students/small", "teacher/torch-fp32")
    assert ratio.value == pytest.approx(1 / 3, rel=0.03)


def test_resolutions_are_apart():
    clock = Clock()
    cases = [
        fake_case(clock, t, s, resolution=r)
        for r, f in ((32, 1), (64, 4))
        for t, s in (("onnx-fp32", 0.002 * f), ("x-int8", 0.001))
    ]
    rows = benchmark(CONFIG, cases, QUIET, clock)
    assert one(rows, "latency_ratio", resolution=32, batch=1).value == pytest.approx(0.5, rel=0.03)
    assert one(rows, "latency_ratio", resolution=64, batch=1).value == pytest.approx(0.125, rel=0.03)


def test_real_encoders_with_preprocessing_threads_and_memory():
    backbone = Backbone(BackboneConfig(dim=32, depth=2, heads=2, patch=8, image_size=32, layer_scale=1.0, init="fan_in"))
    seen = []
    alive = []

    def open_it(threads):
        seen.append((threads, torch.get_num_threads()))
        encoder = TorchEncoder(backbone)
        alive.append(weakref.ref(encoder))
        return encoder

    preprocess = Preprocess(size=32, resize=36)
    case = Case("students/small", "torch-fp32", 32, open_it, preprocess=preprocess)
    before = torch.get_num_threads()
    rows = benchmark(BenchmarkConfig(batches=[2], seconds=0.2, warmup_seconds=0.1, threads=1), [case], QUIET)
    assert torch.get_num_threads() == before
    assert set(seen) == {(1, 1)}
    assert one(rows, "latency_p50_ms").value > 0.05
    shown = one(rows, "preprocess_p50_ms")
    assert shown.conditions["photo"] == "640 x 480"
    assert 0.05 < shown.value < 100
    assert len(find(rows, "peak_memory_mb")) == 1
    gc.collect()
    assert not any(ref() for ref in alive)  # no encoder outlives the benchmark


@pytest.mark.skipif(timing.reset_peak() is None, reason="the memory high-water mark cannot be restarted here")
def test_peak_memory_sees_what_a_call_takes():
    class Hungry:
        target, conditions = "torch-fp32", {"runtime": "torch", "device": "cpu"}

        def __init__(self):
            self.weights = torch.ones(10_000_000)  # 40 MB

        def __call__(self, images):
            torch.ones(len(images), 5_000_000)  # 20 MB an image, gone after the call
            return Features(torch.zeros(1, 1), torch.zeros(1, 1, 1))

    config = BenchmarkConfig(batches=[1, 4], seconds=0.05, rounds=6, warmup_seconds=0.0)
    rows = benchmark(config, [Case("students/small", "torch-fp32", 32, lambda threads: Hungry())], QUIET)
    assert one(rows, "peak_memory_mb", batch=1).value == pytest.approx(60, abs=8)
    assert one(rows, "peak_memory_mb", batch=4).value == pytest.approx(120, abs=8)


def test_gpu_memory_that_nobody_tells_is_not_guessed():
    clock = Clock()
    rows = benchmark(CONFIG, [fake_case(clock, "rtx-fp16", 0.001, device="cuda:0")], QUIET, clock)
    assert all(r.status == "not measured" for r in find(rows, "peak_memory_mb"))


def test_a_gpu_is_waited_for(monkeypatch):
    clock, waits = Clock(), []

    def wait(device=None):
        waits.append(device)
        clock.work(0.01)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    seconds = timing.call(FakeEncoder(clock, "torch-fp32", 0.001, jitter=0.0, device="cuda:0"), torch.zeros(1, 3, 8, 8), clock)
    assert waits == ["cuda:0", "cuda:0"]
    assert seconds == pytest.approx(0.011)  # the wait before is not the call's, the wait after is


def test_bootstrap_covers_the_median():
    random = np.random.default_rng(1)
    inside = 0
    for _ in range(40):
        rounds = [random.lognormal(0, 0.3, 10) for _ in range(20)]
        low, high = timing.median_interval(rounds)
        inside += low <= 1.0 <= high
    assert 34 <= inside <= 40
    assert timing.median_interval(rounds[:5]) is None
    once = {(r // 4, r): s for r, s in enumerate(rounds)}
    ratio, (low, high) = timing.ratio({k: 2 * s for k, s in once.items()}, once)
    assert (ratio, low, high) == pytest.approx((2.0, 2.0, 2.0))


def test_student_interval_over_openings():
    """By hand: log ratios 0.1, 0.2, 0.3 have mean 0.2 and standard deviation 0.1; t(2, 97.5 %) is 4.3027."""
    a = {(o, o): np.full(3, np.exp(0.1 * (o + 1))) for o in range(3)}
    b = {key: np.ones(5) for key in a}
    ratio, interval = timing.ratio(a, b)
    assert ratio == pytest.approx(np.exp(0.2))
    half = 4.302653 * 0.1 / 3**0.5
    assert interval == pytest.approx((np.exp(0.2 - half), np.exp(0.2 + half)))
    assert timing.ratio(dict(list(a.items())[:2]), b)[1] is None
    assert np.isnan(timing.ratio(a, {})[0])


def test_settings_that_cannot_be_right():
    assert BenchmarkConfig().problems() == []
    bad = BenchmarkConfig(
        batches=[0, 0], seconds=0.0, rounds=2, openings=2, warmup_seconds=-1.0, max_calls=1, threads=[2, 2], photo=[640]
    )
    text = " ".join(bad.problems())
    names = ("batches", "seconds", "rounds", "openings", "warmup_seconds", "max_calls", "threads", "photo")
    assert all(word in text for word in names)
    assert BenchmarkConfig(threads=[]).problems()
    assert BenchmarkConfig(batches=[]).problems()


def test_fingerprint_describes_the_machine_and_names_nobody():
    found = fingerprint()
    assert json.loads(json.dumps(found)) == found
    assert found["cpu"]["usable_threads"] >= 1
    assert found["memory_gb"] > 0.1
    assert found["packages"]["torch"] == torch.__version__.split("+")[0] or found["packages"]["torch"] == torch.__version__
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-modified)?", found["commit"])
    text = json.dumps(found)
    assert socket.gethostname() not in text or len(socket.gethostname()) < 4
    assert os.path.expanduser("~") not in text
