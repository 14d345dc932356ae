"""What a reader must know of the machine behind a number: processor, memory, GPU, system, versions. No names, no paths."""

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = (
    "decant-vision",
    "torch",
    "timm",
    "accelerate",
    "torch-pruning",
    "numpy",
    "pillow",
    "datasets",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
)
# The instructions that decide how fast fp32, bf16 and int8 matrix products run; /proc/cpuinfo lists a hundred others.
FEATURES = frozenset(
    """sse4_2 avx avx2 fma f16c avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16 avx_vnni avx_vnni_int8
    amx_tile amx_int8 amx_bf16 asimd asimdhp asimddp i8mm bf16 sve sve2""".split()  # noqa: SIM905
)


def fingerprint() -> dict[str, Any]:
    """JSON-ready description of this machine and this code; a value that cannot be found is None.

    Keys: cpu {model, features, cores, threads, usable_threads}, memory_gb (10^9 bytes), gpus [{name, memory_gb, driver,
    compute_capability, max_clock_mhz}], os, python, packages {name: version}, commit (of this code, with `-modified` when
    files differ from it).
    """
    return {
        "cpu": {
            "model": _cpu_model(),
            "features": _cpu_features(),
            "cores": psutil.cpu_count(logical=False),
            "threads": psutil.cpu_count(),
            "usable_threads": usable_threads(),
        },
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": _gpus(),
        "os": f"{platform.system()} {_release()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        **code(),
    }


def code() -> dict[str, Any]:
    """What computed: `packages` and `commit`, as in `fingerprint`. The same on every machine that has the same installed."""
    return {"packages": {name: version for name in PACKAGES if (version := _version(name))}, "commit": _commit()}


def usable_threads() -> int:
    """Logical processors that this process may run on (a container or `taskset` may allow fewer than there are)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _release() -> str:
    """The kernel's version number alone: what builders append to it may name them."""
    found = re.match(r"[0-9.]+", platform.release())
    return found.group() if found else "of unknown version"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str, cwd: Path | None = None) -> str | None:
    """Standard output of a command, or None when it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, cwd=cwd, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpuinfo(key: str) -> str | None:
    """The first value of a key in Linux's /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key and ":" in line), None)


def _cpu_model() -> str | None:
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    return _cpuinfo("model name") or platform.processor() or None


def _cpu_features() -> list[str]:
    flags = _cpuinfo("flags") or _cpuinfo("Features")  # x86, Arm
    if flags:
        have = set(flags.split())
        return sorted(FEATURES & have)
    return [torch.backends.cpu.get_cpu_capability().lower()]


def _gpus() -> list[dict[str, Any]]:
    fields = "name,memory.total,driver_version,compute_cap,clocks.max.sm"
    text = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    if text:
        return [_gpu(line) for line in text.splitlines() if line.count(",") == fields.count(",")]
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "memory_gb": round(p.total_memory / 1e9, 1), "compute_capability": f"{p.major}.{p.minor}"}
        for p in found
    ]


def _gpu(line: str) -> dict[str, Any]:
    name, memory_mib, driver, capability, clock = (part.strip() for part in line.split(","))
    number = memory_mib.replace(".", "", 1).isdigit()
    return {
        "name": name,
        "memory_gb": round(float(memory_mib) * 2**20 / 1e9, 1) if number else None,
        "driver": driver,
        "compute_capability": capability,
        "max_clock_mhz": int(clock) if clock.isdigit() else None,
    }


def _commit() -> str | None:
    """The commit of this file's checkout, or that which the installed package was built from (setup.py); None where nobody noted it."""
    here = Path(__file__).resolve()
    if _output("git", "ls-files", "--error-unmatch", here.name, cwd=here.parent) is None:
        noted = here.with_name("commit.txt")
        return noted.read_text(encoding="ascii").strip() if noted.is_file() else None
    commit = _output("git", "rev-parse", "HEAD", cwd=here.parent)
    modified = _output("git", "status", "--porcelain", "--untracked-files=no", cwd=here.parent)
    return commit and commit + ("-modified" if modified else "")
