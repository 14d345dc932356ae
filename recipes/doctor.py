"""What this machine is and has: versions, processor features, GPU, runtimes, disk; and what each missing thing would give."""

import importlib.metadata
import os
import platform
import sys
from functools import cache
from pathlib import Path

PACKAGES = (
    "decant-vision", "torch", "timm", "accelerate", "torch-pruning", "onnx", "onnxscript", "onnxruntime", "tensorrt_rtx",
    "tensorrt", "openvino", "datasets", "numpy", "pillow", "safetensors", "scikit-learn",
)  # fmt: skip


@cache
def versions() -> dict[str, str]:
    """Installed versions by distribution; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def device() -> dict[str, str]:
    """The processor and, where torch is loaded already and sees one, the GPU."""
    found = {"cpu": cpu_name(), "cores": str(os.cpu_count()), "system": f"{platform.system()} {platform.machine()}"}
    torch = sys.modules.get("torch")  # not imported for this: a run that needs it has done so
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
    return found


@cache
def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
