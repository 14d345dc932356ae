"""Energy of calls in joules, from whatever counts it here: RAPL for CPUs, NVML for NVIDIA GPUs, tegrastats for Jetson modules.

A meter counts for the whole processor, GPU or module: what other processes do and what idling costs is in the figure. So the
idle power is measured apart, and a row states both. Where nothing counts, `meter_for` says why in one sentence.

RAPL: https://docs.kernel.org/power/powercap/powercap.html; NVML: nvmlDeviceGetTotalEnergyConsumption (millijoules since the driver
was loaded, Volta and later); tegrastats: NVIDIA Jetson Linux Developer Guide, "tegrastats Utility".
"""

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from export.stopwatch.gpu_state import NoNvml, nvml_device

POWERCAP = Path("/sys/class/powercap")
IDLE_S = 1.0  # NVML renews its counter about every 20 to 100 ms, tegrastats is asked every 100 ms
TEGRASTATS_MS = 100
TOTAL_RAILS = ("VDD_IN", "POM_5V_IN", "VIN")  # what the whole module draws, where it is measured in one place
RAIL = re.compile(r"\b([A-Z][A-Z0-9_]*) (\d+)(?:mW)?/(\d+)(?:mW)?(?=\s|$)")


class Meter(Protocol):
    """Counts joules between `start` and `stop`.

    Attributes:
        name: what counts, and of what.
    """

    name: str

    def start(self) -> None: ...

    def stop(self) -> float: ...


@dataclass(frozen=True)
class Energy:
    """What `measure` found: joules in `seconds`, in which `calls` calls were made; watts of the idle machine; what counted."""

    joules: float
    seconds: float
    calls: int
    idle_w: float
    source: str


def measure(
    meter: Meter,
    once: Callable[[], object],
    seconds: float,
    most: int,
    idle_w: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Energy:
    """Call again and again for `seconds`, at least once and at most `most` times, while the meter counts."""
    calls = 0
    meter.start()
    start = clock()
    while not calls or (calls < most and clock() - start < seconds):
        once()
        calls += 1
    passed = clock() - start
    return Energy(meter.stop(), passed, calls, idle_w, meter.name)


def idle_watts(
    meter: Meter,
    seconds: float = IDLE_S,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Mean power in watts while this process sleeps; others may work meanwhile."""
    meter.start()
    start = clock()
    sleep(seconds)
    passed = clock() - start
    return meter.stop() / passed


def meter_for(device: str) -> Meter | str:
    """The meter for a device (`cpu`, or anything else for the CUDA GPU that PyTorch uses); a sentence where there is none."""
    if shutil.which("tegrastats"):
        return Tegrastats()
    if device == "cpu":
        return rapl()
    try:
        return nvml_meter(nvml_device())
    except NoNvml as e:
        return str(e)


def rapl(root: Path = POWERCAP) -> "Rapl | str":
    """The counters of the CPU packages, or why they cannot be read."""
    zones = [z for z in sorted(root.glob("intel-rapl:*")) if re.fullmatch(r"intel-rapl:\d+", z.name)]
    packages = [z for z in zones if (z / "name").is_file() and (z / "name").read_text().strip().startswith("package")]
    if not packages:
        return "this machine has no RAPL energy counters that Linux shows (virtual machines and Arm have none)."
    try:
        return Rapl(packages)
    except PermissionError:
        return (
            f"only root may read the energy counters in {root}; `sudo chmod a+r {root}/intel-rapl:*/energy_uj` lets everybody."
        )
    except OSError as e:
        return f"the energy counters in {root} cannot be read ({e.strerror})."


class Rapl:
    """Intel's and AMD's counters of energy in microjoules, one for each CPU package; DRAM is apart and not counted.

    A counter begins anew at `max_energy_range_uj`, after some minutes to an hour at full load; longer measurements are not made.

    Raises:
        OSError: a counter may not be read.
    """

    def __init__(self, packages: list[Path]):
        self.counters = [p / "energy_uj" for p in packages]
        self.ranges = [int((p / "max_energy_range_uj").read_text()) for p in packages]
        self.name = f"RAPL: {len(packages)} CPU package{'s' if len(packages) > 1 else ''}, without DRAM"
        self.start()

    def start(self) -> None:
        self.began = self._read()

    def stop(self) -> float:
        counted = zip(self.began, self._read(), self.ranges, strict=True)
        return sum((after - before) % (most + 1) for before, after, most in counted) / 1e6

    def _read(self) -> list[int]:
        return [int(c.read_text()) for c in self.counters]


def nvml_meter(device: Any) -> "Nvml | str":
    """The counter of a GPU (see `gpu_state.nvml_device`), or why it has none."""
    try:
        return Nvml(device)
    except NoNvml as e:
        return str(e)


class Nvml:
    """A GPU's energy counter: the whole board.

    Raises:
        NoNvml: this GPU does not count (before Volta, some virtual GPUs).
    """

    name = "NVML: the GPU board"

    def __init__(self, device: Any):
        self.device = device
        self.start()

    def start(self) -> None:
        self.began = self.device.energy_mj()

    def stop(self) -> float:
        return (self.device.energy_mj() - self.began) / 1e3


class Tegrastats:
    """The power rails of a Jetson, sampled beside by its own tool: mean power times seconds."""

    def __init__(self, command: tuple[str, ...] = ("tegrastats", "--interval", str(TEGRASTATS_MS))):
        self.command = command
        self.name = "tegrastats: the whole module"

    def start(self) -> None:
        self.watts: list[float] = []
        self.began = time.perf_counter()
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.reader = threading.Thread(target=self._collect, daemon=True)
        self.reader.start()

    def stop(self) -> float:
        if not self.watts:
            self.reader.join(5 * TEGRASTATS_MS / 1e3)  # shorter than one sample: wait for the first
        seconds = time.perf_counter() - self.began
        self.process.terminate()
        self.process.wait()
        self.reader.join()
        if not self.watts:
            raise OSError("tegrastats told no power (it may need root)")
        return sum(self.watts) / len(self.watts) * seconds

    def _collect(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if (watts := rail_watts(line)) is not None:
                self.watts.append(watts)


def rail_watts(line: str) -> float | None:
    """Watts that a line of tegrastats tells: of the module's input, else the sum of its rails; None without any.

    Every rail is `NAME now/mean`, in mW: `VDD_IN 5014mW/4998mW`, in older versions without the unit. Memory and clocks look alike
    with a unit of their own (`RAM 2448/7772MB`) and are no rails.
    """
    rails = {name: int(now) / 1e3 for name, now, _ in RAIL.findall(line)}
    total = next((rails[name] for name in TOTAL_RAILS if name in rails), None)
    return total if total is not None else sum(rails.values()) if rails else None
