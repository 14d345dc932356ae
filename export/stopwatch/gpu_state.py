"""What state a GPU is in while it is measured: clocks, temperature, what holds it back. From NVML, else from `nvidia-smi`.

A GPU that is hot, capped or still waking up runs at another speed than it will later: without its state a latency says little.
The GPU is found by its UUID, as CUDA_VISIBLE_DEVICES numbers GPUs otherwise than NVML does.
"""

import importlib
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

# nvmlClocksEventReasons, and the fields of nvidia-smi; idle is no throttling.
REASONS = {
    0x0000000000000002: "applications_clocks_setting",
    0x0000000000000004: "sw_power_cap",
    0x0000000000000008: "hw_slowdown",
    0x0000000000000010: "sync_boost",
    0x0000000000000020: "sw_thermal_slowdown",
    0x0000000000000040: "hw_thermal_slowdown",
    0x0000000000000080: "hw_power_brake_slowdown",
    0x0000000000000100: "display_clock_setting",
}
FIELDS = ("clocks.sm", "clocks.mem", "temperature.gpu", "clocks_throttle_reasons.active")
NAMES = ("sm_clock_mhz", "memory_clock_mhz", "temperature_c", "throttling")
State = dict[str, Any]


class NoNvml(Exception):
    """NVML does not answer; the message is the reason of a "not measured" row."""


class NvmlDevice:
    """One GPU through NVML. `pynvml` is nvidia-ml-py's module, initialised."""

    def __init__(self, pynvml: Any, handle: Any):
        self.pynvml, self.handle = pynvml, handle

    def state(self) -> State:
        """sm_clock_mhz, memory_clock_mhz, temperature_c, throttling; what this GPU does not tell is None."""
        p, h = self.pynvml, self.handle
        values = (
            self._told(lambda: p.nvmlDeviceGetClockInfo(h, p.NVML_CLOCK_SM)),
            self._told(lambda: p.nvmlDeviceGetClockInfo(h, p.NVML_CLOCK_MEM)),
            self._told(lambda: p.nvmlDeviceGetTemperature(h, p.NVML_TEMPERATURE_GPU)),
            throttling(self._told(lambda: p.nvmlDeviceGetCurrentClocksThrottleReasons(h))),
        )
        return dict(zip(NAMES, values, strict=True))

    def energy_mj(self) -> int:
        """Millijoules since the driver was loaded.

        Raises:
            NoNvml: this GPU does not count them.
        """
        try:
            return int(self.pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle))
        except self.pynvml.NVMLError as e:
            raise NoNvml(f"this GPU does not count its energy (NVML: {e}).") from e

    def _told(self, ask: Callable[[], int]) -> int | None:
        try:
            return int(ask())
        except self.pynvml.NVMLError:
            return None


def nvml_device(uuid: Callable[[], str] | None = None) -> NvmlDevice:
    """PyTorch's first CUDA GPU in NVML; `uuid` is asked for its UUID.

    Raises:
        NoNvml: nvidia-ml-py is not installed, or there is no driver that answers.
    """
    try:
        pynvml = importlib.import_module("pynvml")
    except ImportError as e:
        raise NoNvml("nvidia-ml-py, which reads NVML, is not installed; pip install nvidia-ml-py.") from e
    try:
        pynvml.nvmlInit()
        return NvmlDevice(pynvml, pynvml.nvmlDeviceGetHandleByUUID((uuid or gpu_uuid)()))
    except pynvml.NVMLError as e:
        raise NoNvml(f"NVML does not answer for this GPU ({e}).") from e


def gpu_uuid() -> str:
    """UUID of PyTorch's first CUDA GPU as NVML writes it."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(0).uuid}"


def gpu_state(uuid: Callable[[], str] = gpu_uuid) -> State | str:
    """The state of PyTorch's first CUDA GPU, with `source` nvml or nvidia-smi; a sentence where neither tells it."""
    try:
        return {**nvml_device(uuid).state(), "source": "nvml"}
    except NoNvml as e:
        return smi_state(uuid) or f"not read: {e}"


def smi_state(uuid: Callable[[], str]) -> State | None:
    """The same from `nvidia-smi`; None where it is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--id={uuid()}", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    parts = [part.strip() for part in text.strip().split(",")]
    if len(parts) != len(FIELDS):
        return None
    numbers = [int(part) if part.isdigit() else None for part in parts[:3]]
    bits = int(parts[3], 16) if parts[3].startswith("0x") else None
    return {**dict(zip(NAMES, (*numbers, throttling(bits)), strict=True)), "source": "nvidia-smi"}


def throttling(bits: int | None) -> str | None:
    """What holds the clocks down, as names; "none" when nothing does."""
    if bits is None:
        return None
    return ", ".join(name for bit, name in REASONS.items() if bits & bit) or "none"


def state_conditions(before: State | str, after: State | str) -> dict[str, Any]:
    """Conditions of a row: gpu_sm_clock_mhz_before, ..._after and so on; `gpu_state` says where they come from, or why there are none."""
    if isinstance(before, str) or isinstance(after, str):
        return {"gpu_state": before if isinstance(before, str) else after}
    found = {f"gpu_{name}_{when}": state[name] for name in NAMES for when, state in (("before", before), ("after", after))}
    return {**found, "gpu_state": before["source"]}
