"""A Jetson as far as subprocesses can tell: a CUDA driver in C on the host's memory, a `tensorrt` and a `trtexec` (device/)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FAKES = HERE / "device"


def fake_device(folder: Path, version: str | None, trtexec: bool = False) -> dict[str, str]:
    """Environment variables of a process on that device; `folder`/log takes what builders were asked.

    Args:
        version: of TensorRT's Python package, None without one. trtexec: whether the command is there.
    """
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("the driver is written in C for Linux")
    libraries, commands, packages = (folder / n for n in ("lib", "bin", "site"))
    for made in (libraries, commands, packages):
        made.mkdir(parents=True)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", libraries / "libcuda.so.1", FAKES / "libcuda.c"], check=True)
    if trtexec:
        shutil.copy(FAKES / "trtexec", commands)
    if version:
        shutil.copy(FAKES / "tensorrt.py", packages)
    (packages / "tensorrt_rtx.py").write_text("raise ImportError('not on this device')\n")
    found = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "LD_LIBRARY_PATH")}
    python = os.pathsep.join(map(str, (packages, HERE, HERE.parent.parent)))
    ours = {"PYTHONPATH": python, "LD_LIBRARY_PATH": str(libraries), "PATH": f"{commands}{os.pathsep}{found['PATH']}"}
    return {**found, **ours, "FAKE_TENSORRT": version or "", "FAKE_LOG": str(folder / "log"), "OMP_NUM_THREADS": "1"}
