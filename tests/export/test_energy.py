"""Energy from counters that are files, fakes or a script: joules, wraps, refusals, and the rows that come of them."""

import sys
import types

import pytest

from distill.progress import Progress
from export.benchmark import BenchmarkConfig, Case, benchmark
from export.stopwatch import energy, gpu_state
from export.stopwatch.bench_meters import Instruments
from export.stopwatch.energy import Rapl, Tegrastats, idle_watts, measure, nvml_meter, rail_watts, rapl
from export.stopwatch.gpu_state import NoNvml, nvml_device, state_conditions, throttling
from export.stopwatch.gpu_state import gpu_state as read_state

UUID = "GPU-1234"


@pytest.fixture
def powercap(tmp_path):
    """Two packages, the DRAM of the first, and the whole platform, as Linux shows them."""
    for zone, name, counter in (
        ("intel-rapl:0", "package-0", 1_000_000),
        ("intel-rapl:0:0", "dram", 5),
        ("intel-rapl:1", "package-1", 9_000_000),
        ("intel-rapl:2", "psys", 7),
    ):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(name + "\n")
        (tmp_path / zone / "energy_uj").write_text(f"{counter}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("9999999\n")
    return tmp_path


def test_rapl_sums_packages_and_survives_a_wrap(powercap):
    meter = rapl(powercap)
    assert isinstance(meter, Rapl)
    assert "2 CPU packages" in meter.name
    meter.start()
    (powercap / "intel-rapl:0" / "energy_uj").write_text("3500000\n")
    (powercap / "intel-rapl:1" / "energy_uj").write_text("250000\n")  # over 9,999,999 and on
    (powercap / "intel-rapl:0:0" / "energy_uj").write_text("9000000\n")
    assert meter.stop() == pytest.approx(2.5 + 1.25)


def test_rapl_that_is_not_there_or_may_not_be_read(tmp_path, powercap, monkeypatch):
    assert "no RAPL" in str(rapl(tmp_path / "nothing"))

    def refused(packages):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(energy, "Rapl", refused)
    assert "only root may read" in str(rapl(powercap))


@pytest.mark.parametrize(
    ("line", "watts"),
    [
        (
            "RAM 2448/7772MB (lfb 4x4MB) CPU [2%@729] VDD_IN 5014mW/4998mW VDD_CPU_GPU_CV 500mW/480mW VDD_SOC 1200mW/1210mW",
            5.014,
        ),
        ("RAM 1903/3964MB SWAP 0/1982MB CPU [0%@102] POM_5V_IN 2450/2450 POM_5V_GPU 40/40 POM_5V_CPU 367/367", 2.45),
        ("RAM 5/6MB VDD_GPU_SOC 2000mW/2000mW VDD_CPU_CV 400mW/400mW VIN_SYS_5V0 3000mW/3000mW", 5.4),
        ("RAM 2448/7772MB SWAP 0/3886MB CPU [2%@729,off] GR3D_FREQ 0%", None),
    ],
)
def test_lines_of_tegrastats(line, watts):
    assert rail_watts(line) == (None if watts is None else pytest.approx(watts))


def test_tegrastats_runs_beside():
    script = "import time\nfor _ in range(500): print('VDD_IN 4000mW/4000mW', flush=True); time.sleep(0.01)"
    meter = Tegrastats((sys.executable, "-c", script))
    meter.start()
    while not meter.watts:
        pass
    joules = meter.stop()
    assert joules > 0
    assert set(meter.watts) == {4.0}
    silent = Tegrastats((sys.executable, "-c", "print('RAM 1/2MB')"))
    silent.start()
    with pytest.raises(OSError, match="no power"):
        silent.stop()


class Counter:
    """A meter whose joules follow a clock: idle watts always, more while something works."""

    name = "fake"

    def __init__(self, clock, watts=10.0):
        self.clock, self.watts = clock, watts

    def start(self):
        self.began = self.clock()

    def stop(self):
        return (self.clock() - self.began) * self.watts


class Clock:
    now = 0.0

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


def test_calls_fill_the_time_and_idle_power_is_apart():
    clock = Clock()
    found = measure(Counter(clock), lambda: clock.pass_(0.25), 1.0, 100, 3.0, clock)
    assert (found.joules, found.calls, found.seconds, found.idle_w, found.source) == (10.0, 4, 1.0, 3.0, "fake")
    assert measure(Counter(clock), lambda: clock.pass_(0.25), 1.0, 2, 3.0, clock).calls == 2
    assert measure(Counter(clock), lambda: clock.pass_(9.0), 1.0, 100, 3.0, clock).calls == 1
    assert idle_watts(Counter(clock, 7.0), 1.0, clock.pass_, clock) == pytest.approx(7.0)


class Runs:
    def __init__(self, clock):
        self.clock, self.conditions = clock, {"runtime": "fake", "device": "cpu"}

    def __call__(self, images):
        self.clock.pass_(0.01)


CONFIG = BenchmarkConfig(batches=[1, 4], seconds=0.4, warmup_seconds=0.1)


def rows_with(meter_for, clock):
    instruments = Instruments(meter_for=meter_for, sleep=clock.pass_)
    rows = benchmark(CONFIG, [Case("s", "onnx-fp32", 32, lambda t: Runs(clock))], Progress("quiet"), clock, None, instruments)
    return [r for r in rows if r.metric == "energy_mj_per_image"]


def test_one_row_a_batch():
    clock, asked = Clock(), []

    def meter_for(device):
        asked.append(device)
        return Counter(clock)

    one, four = rows_with(meter_for, clock)
    assert asked == ["cpu"]  # and idle power is measured once
    assert one.value == pytest.approx(0.01 * 10 * 1e3)
    assert four.value == pytest.approx(0.01 * 10 * 1e3 / 4)
    assert one.n == 40
    assert one.conditions["idle_w"] == pytest.approx(10)
    assert one.conditions["mean_w"] == pytest.approx(10)
    assert one.conditions["energy_source"] == "fake"


def test_no_meter_is_a_reason():
    clock = Clock()
    assert [r.reason for r in rows_with(lambda d: "nothing counts here.", clock)] == ["nothing counts here."] * 2

    class Breaks(Counter):
        def stop(self):
            raise OSError("gone")

    assert all("gone" in str(r.reason) for r in rows_with(lambda d: Breaks(clock), clock))


class NVMLError(Exception):
    pass


def fake_nvml(counts=True):
    """nvidia-ml-py as far as it is used; its energy counter moves by 500 mJ a reading."""
    module = types.ModuleType("pynvml")
    module.NVMLError, module.NVML_CLOCK_SM, module.NVML_CLOCK_MEM, module.NVML_TEMPERATURE_GPU = NVMLError, 1, 2, 0
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    module.nvmlDeviceGetClockInfo = lambda h, kind: {1: 1980, 2: 2619}[kind]
    module.nvmlDeviceGetTemperature = lambda h, kind: 61
    module.nvmlDeviceGetCurrentClocksThrottleReasons = lambda h: 0x24
    readings = iter(range(1000, 100_000, 500))

    def energy_of(handle):
        if not counts:
            raise NVMLError("Not Supported")
        return next(readings)

    module.nvmlDeviceGetTotalEnergyConsumption = energy_of
    return module


def test_nvml_tells_state_and_energy(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    state = read_state(lambda: UUID)
    assert state == {
        "sm_clock_mhz": 1980,
        "memory_clock_mhz": 2619,
        "temperature_c": 61,
        "throttling": "sw_power_cap, sw_thermal_slowdown",
        "source": "nvml",
    }
    found = state_conditions(state, {**state, "temperature_c": 70})
    assert (found["gpu_temperature_c_before"], found["gpu_temperature_c_after"], found["gpu_state"]) == (61, 70, "nvml")
    meter = nvml_meter(nvml_device(lambda: UUID))
    meter.start()
    assert meter.stop() == pytest.approx(0.5)


def test_a_gpu_that_does_not_count(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(counts=False))
    assert "does not count" in str(nvml_meter(nvml_device(lambda: UUID)))


def test_without_nvml_nvidia_smi_is_asked_and_without_both_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NoNvml, match="pip install nvidia-ml-py"):
        nvml_device(lambda: UUID)
    assert "nvidia-ml-py" in str(energy.meter_for("gpu"))
    monkeypatch.setattr(gpu_state.shutil, "which", lambda name: "nvidia-smi")
    done = types.SimpleNamespace(stdout="1410, 1215, 43, 0x0000000000000004\n")
    monkeypatch.setattr(gpu_state.subprocess, "run", lambda *a, **k: done)
    state = read_state(lambda: UUID)
    assert (state["sm_clock_mhz"], state["temperature_c"], state["throttling"]) == (1410, 43, "sw_power_cap")
    assert state["source"] == "nvidia-smi"
    done.stdout = "[N/A], [N/A], 43, [N/A]\n"
    assert read_state(lambda: UUID)["sm_clock_mhz"] is None
    monkeypatch.setattr(gpu_state.shutil, "which", lambda name: None)
    reason = read_state(lambda: UUID)
    assert "not read" in str(reason)
    assert state_conditions(reason, reason) == {"gpu_state": reason}


def test_reasons_have_names():
    assert throttling(0) == "none"
    assert throttling(0x1) == "none"  # idle
    assert throttling(0x40) == "hw_thermal_slowdown"
    assert throttling(None) is None
