"""What a reader of a number must know of the machine that gave it, and its memory high-water mark. Standard library only."""

import contextlib
import ctypes
import importlib
import importlib.util
import os
import platform
import subprocess
from pathlib import Path

RUNTIMES = ("numpy", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx")


def machine():
    """What a reader must know of this machine: processor, memory, GPU, system, versions. No names, no paths."""
    found = {
        "python": platform.python_version(),
        "system": platform.system().lower(),
        "machine": platform.machine().lower(),
        "cpu": first_match("/proc/cpuinfo", "model name") or platform.processor(),
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": kibibytes("MemTotal"),
        "model": text("/proc/device-tree/model"),
        "l4t": (text("/etc/nv_tegra_release") or "").partition("\n")[0],
        "gpu": output("nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"),
        "jetpack": output("dpkg-query", "-W", "-f", "${Version}", "nvidia-jetpack"),
        "power_mode": output("nvpmodel", "-q"),
    }
    found.update({name: version(name) for name in RUNTIMES})
    return {k: v for k, v in found.items() if v}


def version(module):
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return getattr(importlib.import_module(module), "__version__", None)
    except Exception as e:  # a package whose libraries do not load
        return f"broken ({(str(e).splitlines() or [type(e).__name__])[0]})"


def state():
    """What may slow this machine down: the hottest zone in °C, the load of the last minute, the processor's governor."""
    zones = []
    for path in sorted(Path("/sys/class/thermal").glob("thermal_zone*/temp")) if Path("/sys/class/thermal").is_dir() else []:
        value = text(path)
        if value and value.lstrip("-").isdigit():
            zones.append(int(value) / 1000)
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    governor = text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {"hottest_c": max(zones, default=None), "load_average": load, "governor": governor}


def reset_peak():
    """Restart the memory high-water mark -> resident bytes now; None where that cannot be done (not Linux)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)  # what is asked for again has to be counted again
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    return int(first_match("/proc/self/status", "VmRSS").split()[0]) * 1024


def peak_bytes():
    return int(first_match("/proc/self/status", "VmHWM").split()[0]) * 1024


def first_match(path, key):
    """The first value of `key: value` in a file of /proc."""
    for entry in (text(path) or "").splitlines():
        name, _, value = entry.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def kibibytes(key):
    value = first_match("/proc/meminfo", key)
    return round(int(value.split()[0]) * 1024 / 1e9, 1) if value else None


def text(path):
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return None


def output(*command):
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return "; ".join(done.stdout.decode("utf-8", "replace").split("\n")).strip("; ") or None
